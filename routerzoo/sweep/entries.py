"""`Entries`: the runs that a plan comes to, each an ordinary config, as far as they can be known."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from routerzoo.costs import short
from routerzoo.errors import UserError
from routerzoo.runs.atomic import atomic_write
from routerzoo.sweep.engine import LocalEngine
from routerzoo.sweep.ledger import Ledger
from routerzoo.sweep.plan import STEPS, TOLERANCE, TUNED, Cell, Plan
from routerzoo.sweep.planned import PlannedTraining, planned_training
from routerzoo.sweep.tested_k import KEY, with_possible_k
from routerzoo.sweep.tuning import Tuning, trial_score

RUNS = "runs"
_SEED = re.compile(r"(?m)^seed_everything: .*$")


class Entries:
    """The runs of a plan, in the order in which to make them.

    Args:
        plan: the plan.
        folder: of the sweep.
        ledger: of what configs resolve to, and of what trials have measured.
        engine: reads configs in a process of its own.
        code: version of the sources.
        console: where to say what a user would not expect.

    Raises:
        UserError: no run can be made, or the runs are not to be compared.
    """

    def __init__(
        self, plan: Plan, folder: Path, ledger: Ledger, engine: LocalEngine, code: str, console: Console
    ) -> None:
        self.plan, self.folder, self.ledger, self.engine = plan, folder, ledger, engine
        self.code, self.console = code, console
        self.refused: dict[str, str] = {}
        """Why configs cannot be run, by label."""
        self.tunings: list[Tuning] = []
        self.unequal: list[str] = []
        """Why runs are not of equal cost, in sentences."""
        self._known: dict[str, str] = {}
        self._possible_tests: dict[str, Cell] = {}
        (folder / "overlays").mkdir(exist_ok=True)
        self._cells = self._matched(list(plan.cells()))
        self._resolve(self._cells)
        for router in sorted({cell.router for cell in self._cells if self._possible(cell) not in (cell, None)}):
            console.print(f"{router} has one k, or chooses its own: it is tested without {KEY}", markup=False)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the ledger's plan that can be known by now: those of trials first, then the final ones.

        They follow from the plan and from what the ledger has measured alone, so that a sweep that was killed goes on.
        """
        rows: dict[str, dict[str, Any]] = {}
        self.tunings = self._begun_tunings()
        tuned = {tuning.base.place: tuning for tuning in self.tunings}
        measured = {run.key: trial_score(run) for run in self.ledger.runs() if run.stage == "trial"}
        scores: dict[str, float | None] = {}
        going_on = True
        while going_on:
            present = [(tuning, tuning.cells()) for tuning in self.tunings]
            self._resolve([cell for _, cells in present for cell in cells])
            for _, cells in present:
                for cell in cells:
                    row = self._row(cell)
                    if row is not None:  # places that share their trials share their rows
                        rows.setdefault(row["key"], row)
                    scores[cell.label] = float("inf") if row is None else measured.get(row["key"])
            advanced = [tuning.advance(lambda cell: scores[cell.label]) for tuning, _ in present]
            going_on = any(advanced)
        finals = []
        for cell in self._cells:
            if self.plan.tune is None or self.plan.tune.untuned:
                finals.append(cell)
            tuning = tuned.get(cell.place)
            if tuning is None or not tuning.is_over:
                continue
            if tuning.best is None:
                self.refused[f"{cell.label} {TUNED}"] = "none of its trials has finished"
            else:
                finals.append(cell.having(tuning.best, note=TUNED))
        self._resolve(finals)
        labels: dict[str, str] = {}
        for cell in finals:
            if (row := self._row(cell)) is None:
                continue
            if (key := row["key"]) in labels:
                raise UserError(f"{labels[key]} and {cell.label} are the same run: their configs do not differ")
            labels[key] = cell.label
            rows[key] = row
        if self.refused and not rows:
            label, reason = next(iter(self.refused.items()))
            raise UserError(f"no run of the sweep can be made; {label}: {reason}")
        return list(rows.values())

    @property
    def is_complete(self) -> bool:
        """Whether all runs are known: tuning is over."""
        return all(tuning.is_over for tuning in self.tunings)

    def _overlay(self, cell: Cell) -> str:
        # The seed is put into what a config resolves to, which takes no time.
        return str(yaml.safe_dump({**cell.overlay, "seed_everything": 0}, sort_keys=True))

    def _source(self, cell: Cell) -> str:
        # What a config resolves to follows from the files and from the code, whose defaults it takes.
        parts = [self.code, self._overlay(cell), *(path.read_text(encoding="utf-8") for path in cell.configs)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _resolve(self, cells: Sequence[Cell]) -> None:
        """Let the ledger know what the configs of these resolve to; note those that are refused."""
        unknown: dict[str, list[str]] = {}
        sources = {cell.label: self._source(cell) for cell in cells}
        for cell in cells:
            source = sources[cell.label]
            if source in unknown or self.ledger.resolved(source) is not None or cell.label in self.refused:
                continue
            text = self._overlay(cell)
            overlay = self.folder / "overlays" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
            if not overlay.is_file():
                atomic_write(overlay, text)
            unknown[source] = cell.arguments(overlay)
        if not unknown:
            return
        with self.console.status(f"reading {len(unknown)} configs"):
            answers = dict(zip(unknown, self.engine.resolve(list(unknown.values())), strict=True))
        self.ledger.remember({source: text for source, (text, reason) in answers.items() if not reason})
        for cell in cells:
            _, reason = answers.get(sources[cell.label], ("", ""))
            if reason:
                self.refused[cell.label] = reason

    def _config(self, cell: Cell) -> str | None:
        """Return a point's whole config; None where it was refused."""
        source = self._source(cell)
        config = self._known.get(source) or self.ledger.resolved(source)
        if config is None:
            return None
        self._known[source] = config
        return _SEED.sub(f"seed_everything: {cell.seed}", config)

    def _possible(self, cell: Cell) -> Cell | None:
        """Return a point that is tested at the k that its router can do; None where it was refused."""
        config = self._config(cell)
        if config is None or cell.stage == "trial":  # which are not tested
            return None if config is None else cell
        source = self._source(cell)
        if source not in self._possible_tests:
            try:
                self._possible_tests[source] = with_possible_k(cell, config)
            except UserError as error:
                self.refused[cell.label] = str(error)
                return None
        return replace(cell, test=self._possible_tests[source].test)

    def _row(self, cell: Cell) -> dict[str, Any] | None:
        possible, config = self._possible(cell), self._config(cell)
        if possible is None or config is None:
            return None
        test = possible.test_arguments if cell.stage == "final" else []
        identity = [config, test, cell.stage, cell.note if cell.stage == "final" else ""]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9._=-]+", "-", f"{cell.task}-{cell.variant}-{cell.seed}").strip("-")
        place = {"task": cell.task, "router": cell.router, "variant": cell.variant, "seed": cell.seed}
        return {
            "key": key,
            **place,
            "stage": cell.stage,
            "folder": f"{RUNS}/{name}-{key}",
            "config": config,
            "test": test,
        }

    def _matched(self, cells: list[Cell]) -> list[Cell]:
        """Return the points with equal training FLOPs, if the plan says so; say where k or FLOPs are not equal."""
        self._resolve(cells)
        configs = {cell.place: config for cell in cells if (config := self._config(cell)) is not None}
        planned = self._planned(configs)
        steps: dict[tuple[str, str, tuple[str, ...]], int] = {}
        others: list[str] = []
        for place, own in planned.items():
            task, router, settings = place
            base = planned.get((task, self.plan.baseline, settings))
            if base is None:
                continue
            if self.plan.budget == "flops":
                steps[place] = max(round(base.flops / own.step_flops), 1)
                continue
            name = " ".join([router, *settings])
            both_take_k = own.takes_k and base.takes_k
            if both_take_k and own.k is not None and base.k is not None and _differ(own.k, base.k):
                others.append(f"in {task}, {name} trains at k = {own.k:.3g} and {self.plan.baseline} at {base.k:.3g}")
            if _differ(own.flops, base.flops):
                self.unequal.append(
                    f"in {task}, {name} trains with {own.flops / base.flops:.2f} times the FLOPs of "
                    f"{self.plan.baseline} ({short(own.flops)} to {short(base.flops)})"
                )
        if others and not self.plan.allow_unequal:
            more = f", and {len(others) - 1} more" if len(others) > 1 else ""
            raise UserError(
                f"{self.plan.path}: {others[0]}{more}: give all one k (init_args: {{top_k: ...}}), set budget: flops "
                "for equal training FLOPs, or allow_unequal: true to compare them as they are"
            )
        self.unequal = others + self.unequal
        if self.unequal:
            more = f"; and {len(self.unequal) - 1} more" if len(self.unequal) > 1 else ""
            self.console.print(
                f"[yellow]Budgets differ: {self.unequal[0]}{more}. budget: flops makes them equal[/yellow]"
            )
        if self.plan.budget == "steps":
            return cells
        if lacking := [cell for cell in cells if cell.place in configs and cell.place not in steps]:
            raise UserError(
                f"{self.plan.path}: budget: flops needs to know the training FLOPs of {lacking[0].label} and of "
                f"{self.plan.baseline} in that task: set trainer.max_steps or max_epochs, and train the baseline in it"
            )
        return [
            cell.having({STEPS: steps[cell.place], "trainer.max_epochs": -1})
            if cell.router != self.plan.baseline and cell.place in steps
            else cell
            for cell in cells
        ]

    def _planned(self, configs: dict[Any, str]) -> dict[Any, PlannedTraining]:
        """Return what training will take, by the same names as the configs; without those where it cannot be known."""
        sources = {
            name: hashlib.sha256("\0".join(["planned", self.code, _SEED.sub("", config)]).encode()).hexdigest()
            for name, config in configs.items()
        }
        unknown = {source: configs[name] for name, source in sources.items() if self.ledger.resolved(source) is None}
        if unknown:
            with self.console.status(f"counting the FLOPs of {len(unknown)} configs"):
                answers = self.engine.ask(planned_training, list(unknown.values()))
            found = zip(unknown, answers, strict=True)
            self.ledger.remember({source: answer for source, answer in found if isinstance(answer, str)})
        texts = {name: self.ledger.resolved(source) for name, source in sources.items()}
        return {name: PlannedTraining(**json.loads(text)) for name, text in texts.items() if text}

    def _begun_tunings(self) -> list[Tuning]:
        """Return a tuning for each place of the grid, before its first trial.

        Raises:
            UserError: it is not known how many steps a run takes, or the configs of all trials are refused.
        """
        tune = self.plan.tune
        if tune is None:
            return []
        first: dict[Any, Cell] = {}
        for cell in self._cells:
            first.setdefault(cell.place, cell.having(tune.common))
        self._resolve(list(first.values()))
        tunings = []
        for base in first.values():
            config = self._config(base)
            if config is None:
                continue
            steps = yaml.safe_load(config)["trainer"]["max_steps"]
            if steps < 1:
                raise UserError(f"{self.plan.path}: tune needs trainer.max_steps, which {base.task} does not set")
            tunings.append(Tuning(base, tune, steps))
        trials = [cell for tuning in tunings for cell in tuning.cells()]
        self._resolve(trials)
        if trials and all(cell.label in self.refused for cell in trials):
            raise UserError(f"{self.plan.path}: no trial of tune can be made: {self.refused[trials[0].label]}")
        return tunings


def _differ(one: float, other: float) -> bool:
    return abs(one - other) > TOLERANCE * max(one, other)
