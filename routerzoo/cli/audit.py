"""`python -m routerzoo audit`: measure the routing of a model, judge it, and say so by the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from rich.console import Console

from routerzoo.audit import Audit, Compression, Thresholds, audit, compress, record_experts, subject_of_task
from routerzoo.audit.compression import Method, check
from routerzoo.audit.page import write_page
from routerzoo.audit.subject import Subject
from routerzoo.audit.thresholds import read_thresholds
from routerzoo.checkpoints.names import under_own_names
from routerzoo.checkpoints.sharded import is_folder
from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.cli.arguments import CommandParser
from routerzoo.cli.main import RouterZooCLI
from routerzoo.cli.main import main as run
from routerzoo.errors import UserError, reason_of
from routerzoo.runs import folder as runs
from routerzoo.runs.atomic import atomic_write
from routerzoo.tasks.base import MoETask

PAGE, RESULT = "audit.html", "audit.json"
UNHEALTHY, FAILED = 1, 2
FOR_TRANSFORMERS: dict[str, Any] = {"tokenizer": None, "text_field": "text", "length": 512, "batch_size": 4}
"""Options of models of transformers, with their defaults. A run has options of its own for its data."""


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: 0 healthy, 1 not healthy, 2 no audit.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    if options.thresholds is not None:
        try:
            parser.set_defaults(**read_thresholds(options.thresholds))
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            _fail(reason_of(error))
        options, rest = parser.parse_known_args(args)  # its options go before those of the file
    for name, least in (("batches", 1), ("length", 2), ("batch_size", 1), ("counterfactuals", 0), ("best", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    try:
        thresholds = Thresholds(
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(Thresholds)}
        )
        result, folder = _audited(options, rest, thresholds, parser)
        options.out.mkdir(parents=True, exist_ok=True) if options.out else folder.mkdir(parents=True, exist_ok=True)
        folder = options.out or folder
        write_page(folder / PAGE, result, "python -m routerzoo audit " + shlex.join(args))
        numbers = {**result.to_json(), **({} if options.cut is None else {"compression": options.cut._asdict()})}
        atomic_write(folder / RESULT, json.dumps(numbers, indent=1) + "\n")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(reason_of(error))
    except SystemExit as error:  # of the command that reads a run
        if isinstance(error.code, str):
            _fail(error.code.removeprefix("error: "))
        raise
    except Exception:  # Python's exit code would say "not healthy"
        traceback.print_exc()
        raise SystemExit(FAILED) from None
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for finding in result.findings:
        console.print(str(finding))
    console.print(f"{'healthy' if result.healthy else 'not healthy'}: {result.model}, {result.tokens} tokens")
    if options.cut is not None:
        console.print(_told(options.cut))
    console.print(f"page: {folder / PAGE}")
    console.print(f"numbers: {folder / RESULT}")
    if not result.healthy:
        raise SystemExit(UNHEALTHY)


def _told(cut: Compression) -> str:
    left = f"{len(cut.kept[0])} experts left in each layer, {cut.parameters_after / cut.parameters_before:.0%} of the"
    if cut.loss_before is None or cut.loss_after is None:
        return f"{left} parameters"
    return f"{left} parameters: the loss goes from {cut.loss_before:.4f} to {cut.loss_after:.4f} nats"


def _fail(reason: str) -> None:
    sys.stderr.write(f"error: {reason}\n")
    raise SystemExit(FAILED)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m routerzoo audit",
        description="Measure the routing of a Mixture of Experts and judge it. Exits with 0 where it is healthy, 1 "
        f"where it is not, 2 where it could not be audited. Writes {PAGE} and {RESULT}. For a run, all other options "
        "are those of test.",
    )
    parser.add_argument("model", type=Path, help="folder of a run, a checkpoint of one, or a folder of transformers")
    parser.add_argument(
        "--data",
        help="for a run, another data set than its own; for a model of transformers text, as data.dataset, or for a "
        "vision model images, likewise, or as a folder of images for each class",
    )
    parser.add_argument("--text-field", help="name of the text in JSON and Parquet; by default text")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="earlier checkpoints, for saturation")
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="of data that has splits; by default test"
    )
    parser.add_argument("--batches", type=int, default=20, help="batches to audit; by default 20")
    parser.add_argument(
        "--counterfactuals", type=int, default=2, help="of these, batches to change first choices in; by default 2"
    )
    parser.add_argument("--best", type=int, default=0, help="batches to try every expert in; by default 0")
    parser.add_argument("--tokenizer", help="of a model of transformers: a name, a path or bytes; by default its own")
    parser.add_argument(
        "--length", type=int, help="tokens of a window, for a language model of transformers; by default 512"
    )
    parser.add_argument(
        "--batch-size", type=int, help="windows or images of a batch, for a model of transformers; by default 4"
    )
    parser.add_argument("--device", help="for a model of transformers; by default cuda where there is one, or cpu")
    parser.add_argument("--out", type=Path, help="folder of page and numbers; by default the run's, or audit")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--prune", type=int, metavar="N", help="leave N experts in each layer, and report the loss then")
    cut.add_argument("--merge", type=int, metavar="N", help="the same, with the others merged into these")
    parser.add_argument("--by", choices=("load", "output"), default="output", help="what decides which are left")
    parser.add_argument("--save", type=Path, help="folder for the pruned or merged model of transformers")
    group = parser.add_argument_group("thresholds", "a number, or none to judge nothing")
    group.add_argument(
        "--thresholds", type=Path, metavar="FILE", help="thresholds in YAML or JSON, by name; options go before them"
    )
    for field in dataclasses.fields(Thresholds):
        shown = "none" if field.default is None else field.default
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=_limit,
            metavar="X",
            default=field.default,
            help=f"{field.metadata['help']}; by default {shown}",
        )
    return parser


def _limit(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or none is needed, got {text!r}") from None


def _audited(
    options: argparse.Namespace, rest: list[str], thresholds: Thresholds, parser: CommandParser
) -> tuple[Audit, Path]:
    measure = partial(_measured, options=options, thresholds=thresholds)
    options.cut = None
    if options.save is not None and options.prune is None and options.merge is None:
        parser.error("--save keeps a pruned or merged model: give --prune or --merge too")
    if not options.model.exists():
        raise UserError(f"{options.model} does not exist: give the folder of a run, a checkpoint, or a model's folder")
    if (options.model / "config.json").is_file():
        if rest:
            parser.error(f"unrecognized arguments: {rest[0]}")
        earlier = []
        for path in options.earlier:
            if not path.exists():
                raise UserError(f"the earlier checkpoint {path} does not exist")
            earlier.append((str(path), record_experts(_released(path, options))))
            gc.collect()  # before the next one is loaded
        subject = _released(options.model, options)
        result = measure(subject, earlier=earlier)
        if options.save is not None:
            released: Any = subject.net
            released.save_pretrained(options.save)
        return result, Path("audit")
    if options.save is not None:
        raise UserError(f"--save keeps models of transformers, {options.model} is a run: save its task from Python")
    for name in (*FOR_TRANSFORMERS, "device"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for models of transformers, {options.model} is a run: its options are "
                "those of test, such as --data.batch_size and --trainer.accelerator"
            )
    checkpoint = _checkpoint(options.model)
    given = ["test", "--ckpt_path", str(checkpoint), *rest]
    if options.data is not None:
        given += ["--data.dataset", options.data]
    run(given, partial(_AuditCLI, options=options, measure=measure))
    found: tuple[Audit, Path] = options.result
    return found


def _measured(subject: Subject, *, earlier: Any, options: argparse.Namespace, thresholds: Thresholds) -> Audit:
    number = options.prune if options.merge is None else options.merge
    method: Method = "prune" if options.merge is None else "merge"
    if number is not None:
        check(subject.net, number, method)  # before the audit, which takes its time
    result = audit(
        subject,
        thresholds=thresholds,
        earlier=earlier,
        counterfactual_batches=options.counterfactuals,
        best_batches=options.best,
    )
    if number is not None:
        options.cut = compress(subject, result, number, method=method, by=options.by)
    return result


def _released(folder: Path, options: argparse.Namespace) -> Subject:
    from routerzoo.audit.released import load, subject_of_transformers
    from routerzoo.audit.released_images import subject_of_images

    if options.data is None:
        raise UserError(f"{folder} comes with no text or images: give --data")
    model = load(folder, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = {name: getattr(options, name) for name in FOR_TRANSFORMERS}
    chosen = {name: FOR_TRANSFORMERS[name] if value is None else value for name, value in chosen.items()}
    if model.main_input_name == "pixel_values":
        for name in ("tokenizer", "text_field", "length"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for text, and {folder} takes images: leave it out")
        return subject_of_images(
            model,
            options.data,
            name=str(folder),
            folder=folder,
            split=options.split,
            batch_size=chosen["batch_size"],
            num_batches=options.batches,
        )
    if model.main_input_name != "input_ids":
        raise UserError(f"an audit reads text or images, {type(model).__name__} takes {model.main_input_name}")
    chosen["tokenizer"] = chosen["tokenizer"] or str(folder)
    return subject_of_transformers(model, options.data, name=str(folder), num_batches=options.batches, **chosen)


def _checkpoint(path: Path) -> Path:
    if path.is_file() or is_folder(path):
        return path
    for name in ("best", "last"):
        if runs.has_checkpoint(path, name):
            return path / runs.CHECKPOINTS / f"{name}.ckpt"
    raise UserError(f"{path} is neither a run with a checkpoint nor a folder of transformers: it has no config.json")


class _AuditCLI(RouterZooCLI):
    """Audits the checkpoint of a `test` command instead of testing it."""

    def __init__(self, args: Sequence[str], options: argparse.Namespace, measure: Any) -> None:
        self.options, self.measure = options, measure
        super().__init__(args)

    def test(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, MoETask) or datamodule is None:
            raise UserError(f"an audit reads routerzoo's tasks with their data, not a {type(model).__name__}")
        trainer, options = self.trainer, self.options
        assert trainer is not None  # it is built before
        assert ckpt_path is not None  # it is given
        model.to(trainer.strategy.root_device)
        subject = subject_of_task(
            model, datamodule, name=str(options.model), split=options.split, num_batches=options.batches
        )
        earlier = []
        for path in options.earlier:
            _read_into(model, path)
            earlier.append((str(path), record_experts(subject)))
        _read_into(model, Path(ckpt_path))
        options.result = (self.measure(subject, earlier=earlier), Path(trainer.default_root_dir))


def _read_into(model: MoETask, path: Path) -> None:
    """Copy a checkpoint's weights from its file, which is mapped, into the model: they are never held twice."""
    try:
        model.load_state_dict(under_own_names(read_checkpoint(path)["state_dict"], model.state_dict().keys()))
    except RuntimeError as error:  # names or shapes
        raise UserError(f"{path} does not fit the model: {' '.join(str(error).split())}") from None
