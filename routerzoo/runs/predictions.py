"""`PredictionWriter`: write predictions to a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TextIO, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.markup import escape

from routerzoo.data.labelled_text import LabelledText
from routerzoo.errors import UserError
from routerzoo.tasks.classification import ClassPredictions
from routerzoo.tasks.language_modeling import Continuation

SHOWN = 3


@final
class PredictionWriter(BasePredictionWriter):
    """Writes sampled text to `predictions.jsonl`, class probabilities to `predictions.csv`, and shows the first few.

    Args:
        folder: of the file; by default the trainer's.
        write_interval: `batch`.
    """

    def __init__(self, folder: str | None = None, write_interval: Literal["batch"] = "batch") -> None:
        super().__init__(write_interval)
        self.folder = Path(folder) if folder is not None else None
        self._file: TextIO | None = None
        self._written = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new file."""
        self._file, self._written = None, 0

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch.

        Raises:
            UserError: there is no data module to decode predictions with.
        """
        classes = isinstance(prediction, ClassPredictions)
        if not classes and not (isinstance(prediction, list) and all(isinstance(p, Continuation) for p in prediction)):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None:
            raise UserError(
                "PredictionWriter decodes predictions with the data module: call trainer.predict(model, datamodule=...)"
            )
        if classes:
            self._write_classes(trainer, prediction, datamodule.class_names)
        else:
            self._write_text(trainer, prediction, datamodule)

    def _open(self, trainer: Trainer, name: str) -> TextIO:
        if self._file is None:
            folder = self.folder or Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            # One file per process.
            stem, _, suffix = name.partition(".")
            rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
            self._file = (folder / f"{stem}{rank}.{suffix}").open("w", encoding="utf-8", newline="")
        return self._file

    def _write_text(self, trainer: Trainer, predictions: list[Continuation], data: Any) -> None:
        file = self._open(trainer, "predictions.jsonl")
        for prompt_ids, sampled_ids in predictions:
            prompt = data.decode(prompt_ids)
            # Decoded together: a character may straddle the end of the prompt.
            continuation = data.decode([*prompt_ids, *sampled_ids])[len(prompt) :]
            file.write(json.dumps({"prompt": prompt, "continuation": continuation}, ensure_ascii=False) + "\n")
            if self._written < SHOWN:
                Console().print(f"[bold]{escape(prompt)}[/bold]{escape(continuation)}\n", highlight=False)
            self._written += 1

    def _write_classes(self, trainer: Trainer, predictions: ClassPredictions, names: Sequence[str]) -> None:
        first = self._file is None
        writer = csv.writer(self._open(trainer, "predictions.csv"))
        if first:
            writer.writerow([self._what(trainer), "label", "predicted", *names])
        for row, probs_L in enumerate(predictions.probs_BL.tolist()):
            predicted = names[max(range(len(probs_L)), key=probs_L.__getitem__)]
            label = "" if predictions.labels_B is None else names[int(predictions.labels_B[row])]
            writer.writerow([self._written, label, predicted, *(f"{prob:.6f}" for prob in probs_L)])
            if self._written < SHOWN:
                Console().print(
                    f"{self._what(trainer)} {self._written}: {predicted} ({max(probs_L):.1%}); label {label}"
                )
            self._written += 1

    def _what(self, trainer: Trainer) -> str:
        return "text" if isinstance(trainer.datamodule, LabelledText) else "image"  # type: ignore[attr-defined]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file, and print its path."""
        if self._file is not None:
            self._file.close()
            Console().print(f"{self._written} predictions: {self._file.name}", soft_wrap=True, highlight=False)
