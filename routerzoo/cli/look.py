"""`python -m routerzoo look`: a page and a picture of where a checkpoint routes tokens."""

# Shape suffix: S tokens.

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule
from rich.console import Console

from routerzoo.checkpoints.names import under_own_names
from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.cli.main import RouterZooCLI
from routerzoo.cli.main import main as run
from routerzoo.cli.parser_errors import CommandParser
from routerzoo.data.tokens import TextBatch
from routerzoo.errors import UserError
from routerzoo.look.drawings import draw, label_names, pieces
from routerzoo.look.observe import claims, observe
from routerzoo.look.page import write_page
from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.tasks.base import MoETask

PAGE, PICTURE = "look.html", "look.png"


def main(args: Sequence[str]) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m routerzoo look",
        description="Show where a checkpoint sends patches of images, or pieces of text, and what each expert claims. "
        f"Writes {PAGE} and {PICTURE} into the run's folder. All other options are those of test.",
    )
    parser.add_argument("--split", choices=("val", "test"), default="test", help="data to look at; by default test")
    parser.add_argument("--examples", type=int, default=6, help="images, or texts, to show; by default 6")
    parser.add_argument("--batches", type=int, default=20, help="batches to count claims in; by default 20")
    options, rest = parser.parse_known_args(args)
    if options.examples < 1 or options.batches < 1:
        parser.exit(2, f"error: --examples {options.examples} and --batches {options.batches} must be at least 1\n")
    run(["test", *rest], partial(_LookCLI, options=options))


class _LookCLI(RouterZooCLI):
    """Looks at the checkpoint of a `test` command instead of testing it."""

    def __init__(self, args: Sequence[str], options: argparse.Namespace) -> None:
        self.options = options
        super().__init__(args)

    def test(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, MoETask) or datamodule is None:
            raise UserError(f"look shows routerzoo's tasks with their data, not a {type(model).__name__}")
        trainer = self.trainer
        assert trainer is not None  # it is built before
        if ckpt_path is not None:
            try:
                saved = read_checkpoint(Path(ckpt_path))["state_dict"]
                model.load_state_dict(under_own_names(saved, model.state_dict().keys()))
            except RuntimeError as error:  # names or shapes
                raise UserError(f"{ckpt_path} does not fit the model: {' '.join(str(error).split())}") from None
        split, batches, examples = self.options.split, self.options.batches, self.options.examples
        datamodule.prepare_data()
        datamodule.setup("test" if split == "test" else "validate")
        loader: Any = datamodule.test_dataloader() if split == "test" else datamodule.val_dataloader()
        device = trainer.strategy.root_device
        model.to(device)
        console = Console(highlight=False, soft_wrap=True)
        with console.status(f"looking at {batches} batches"):
            seen = [
                observe(model, model.transfer_batch_to_device(batch, device, 0))
                for batch in itertools.islice(loader, batches)
            ]
        first, names = seen[0], label_names(datamodule)
        folder = Path(trainer.default_root_dir)
        figure = draw(model, datamodule, first, examples)
        text = first.batch if isinstance(first.batch, TextBatch) else None
        write_page(
            folder / PAGE,
            f"Routing of the {split} split: {type(inner_router(next(moe_layers(model.net)))).__name__}",
            first,
            claims(seen, len(names)),
            names,
            texts=[pieces(datamodule, ids_S) for ids_S in text.ids_BS[:examples]] if text else [],
            picture=None if text else figure,
            command=f"python -m routerzoo look --ckpt_path {shlex.quote(ckpt_path or '...')}",
        )
        figure.savefig(folder / PICTURE, dpi=110)
        console.print(f"page: {folder / PAGE}")
        console.print(f"picture: {folder / PICTURE}")
