"""`LookingTrainer`: Lightning's trainer, which can also be asked to look at a checkpoint's routing."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule, LightningModule, Trainer
from matplotlib.figure import Figure
from rich.console import Console

from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.data.images import ImageBatch
from routerzoo.data.tokens import TextBatch
from routerzoo.errors import UserError
from routerzoo.look.drawings import patches_by_expert, text_by_expert
from routerzoo.look.observe import Observation, claims, observe
from routerzoo.look.page import write_page
from routerzoo.moe.layer import moe_layers
from routerzoo.tasks.base import MoETask

PAGE, PICTURE = "look.html", "look.png"


class LookingTrainer(Trainer):
    """Lightning's `Trainer`, and `look`."""

    def look(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        split: Literal["val", "test"] = "test",
        examples: int = 6,
        batches: int = 20,
    ) -> None:
        """Show where a checkpoint sends patches of images, or pieces of text, and what each expert claims.

        Writes `look.html` and `look.png` into the run's folder.

        Args:
            model: a task of routerzoo.
            datamodule: its data.
            ckpt_path: the checkpoint; by default the model as it was drawn.
            split: which data to look at.
            examples: images, or texts, to show.
            batches: batches that the experts' claims are counted in.

        Raises:
            UserError: no task of routerzoo, no data, or nothing to look at.
        """
        if not isinstance(model, MoETask) or datamodule is None:
            raise UserError(f"look shows routerzoo's tasks with their data, not a {type(model).__name__}")
        if examples < 1 or batches < 1:
            raise UserError(f"examples and batches must be at least 1, got {examples} and {batches}")
        if ckpt_path is not None:
            model.load_state_dict(read_checkpoint(Path(ckpt_path))["state_dict"])
        device = self.strategy.root_device
        model.to(device)
        datamodule.prepare_data()
        datamodule.setup("test" if split == "test" else "validate")
        loader: Any = datamodule.test_dataloader() if split == "test" else datamodule.val_dataloader()
        console = Console(highlight=False, soft_wrap=True)
        with console.status(f"looking at {batches} batches"):
            seen = [
                observe(model, model.transfer_batch_to_device(batch, device, 0))
                for batch in itertools.islice(loader, batches)
            ]
        names = label_names(datamodule)
        folder = Path(self.default_root_dir)
        figure = draw(model, datamodule, seen[0], examples)
        text = isinstance(seen[0].batch, TextBatch)
        command = f"python -m routerzoo look --ckpt_path {shlex.quote(ckpt_path or '...')}"
        write_page(
            folder / PAGE,
            f"Routing of the {split} split: {type(next(moe_layers(model.net)).router).__name__}",
            seen[0],
            claims(seen, len(names)),
            names,
            texts=[pieces(datamodule, row) for row in seen[0].batch.ids_BS[:examples]] if text else [],  # type: ignore[union-attr]
            picture=None if text else figure,
            command=command,
        )
        figure.savefig(folder / PICTURE, dpi=110)
        console.print(f"page: {folder / PAGE}")
        console.print(f"picture: {folder / PICTURE}")


def draw(model: MoETask, datamodule: Any, observation: Observation, examples: int = 6) -> Figure:
    """Draw a batch, images or text, in the colours of its experts."""
    if isinstance(observation.batch, ImageBatch):
        net: Any = model.net
        names = label_names(datamodule)
        return patches_by_expert(observation, net.grid_size, net.num_prefix_tokens, names, examples)
    return text_by_expert(observation, pieces(datamodule, observation.batch.ids_BS[0]))


def label_names(datamodule: Any) -> list[str]:
    """Return what the labels of a data module's tokens are called: classes, or pieces of text."""
    if hasattr(datamodule, "class_names"):
        return list(datamodule.class_names)
    return [repr(datamodule.decode([label]))[1:-1] for label in range(datamodule.vocab_size)]


def pieces(datamodule: Any, ids_S: Any) -> list[str]:
    """Return the text of each token; words with the space that follows."""
    space = " " if getattr(datamodule, "unit", "bytes") == "words" else ""
    return [datamodule.decode([int(index)]) + space for index in ids_S]
