"""lm-evaluation-harness on models with routers of ours, and its numbers in the results of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routerzoo.errors import UserError
from routerzoo.runs.atomic import atomic_write

RESULTS = "results.json"


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model by lm-evaluation-harness (`pip install lm-eval`), without a copy of it.

    Args:
        model: of transformers, changed by us or plain: what `upcycle` returned, or the `net.base` of a task.
        tokenizer: its tokenizer, of transformers.
        tasks: names of tasks.
        include_path: a folder with the YAML files of tasks of one's own.
        run: folder of a run, whose `results.json` gets the numbers, under `lm_eval`.
        batch_size: sequences per batch.
        options: for `lm_eval.simple_evaluate`, such as `num_fewshot` and `limit`.

    Returns:
        Its numbers, by task and metric.

    Raises:
        UserError: lm-eval is not installed, a task that it does not know, or a run without results.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"evaluate needs lm-eval: pip install lm-eval ({error})") from error
    results = None if run is None else Path(run) / RESULTS
    if results is not None and not results.is_file():
        raise UserError(f"{results} does not exist: run names the folder of a run that has ended")
    folder = None if include_path is None else str(include_path)
    # An index of its own 15,000 tasks takes seconds.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"lm-eval knows no task {unknown[0]!r}: name the folder of its YAML file as include_path")
    training = model.training
    try:
        harness = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        found = simple_evaluate(harness, tasks=list(tasks), task_manager=manager, **options)
    finally:
        model.train(training)
    numbers = {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
    if results is not None:
        known = json.loads(results.read_text(encoding="utf-8"))
        known["lm_eval"] = {**known.get("lm_eval", {}), **numbers}
        atomic_write(results, json.dumps(known, indent=2) + "\n")
    return numbers
