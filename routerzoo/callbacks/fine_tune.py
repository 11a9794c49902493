"""`FineTune`: start from the weights of another run, with its routing frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from lightning import Callback, LightningModule, Trainer

from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers


@final
class FineTune(Callback):
    """Starts from a checkpoint's weights, with a new optimiser and schedule, and may freeze the routing.

    X-MoE (Chi et al. 2022, section 3) freezes router *and* experts when it fine-tunes, and keeps the balance loss,
    which then shapes the hidden states alone; they report 72.2 against 71.7 on XNLI. That is the default here, for any
    router.

    Args:
        checkpoint: file of the run to start from.
        freeze_router: routers learn no more, and adapt nothing.
        freeze_experts: experts learn no more.
        except_for: beginnings of the names of weights that start anew, such as `net.vit.head`.
    """

    def __init__(
        self,
        checkpoint: str,
        freeze_router: bool = True,
        freeze_experts: bool = True,
        except_for: list[str] | None = None,
    ) -> None:
        self.checkpoint = Path(checkpoint)
        self.freeze_router, self.freeze_experts = freeze_router, freeze_experts
        self.except_for = tuple(except_for or ())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze, before the optimiser is built."""
        if stage != "fit":
            return
        for layer in moe_layers(pl_module):
            if self.freeze_router:
                layer.router.freeze()
            if self.freeze_experts:
                layer.experts.requires_grad_(False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights; a resumed run has its own."""
        if trainer.ckpt_path is not None:
            return
        if not self.checkpoint.is_file():
            raise UserError(f"no checkpoint to fine-tune from: {self.checkpoint} does not exist")
        saved = read_checkpoint(self.checkpoint)["state_dict"]
        own = pl_module.state_dict()
        wanted = {name: value for name, value in saved.items() if not name.startswith(self.except_for)}
        unfit = [name for name in own if name not in wanted and not name.startswith(self.except_for)]
        unfit += [name for name, value in wanted.items() if name not in own or _shape(value) != _shape(own[name])]
        if unfit:
            where = ", ".join(unfit[:4]) + (" and more" if len(unfit) > 4 else "")
            raise UserError(
                f"{self.checkpoint} does not fit the model at {where}: "
                "build the same model, or name what is to start anew in except_for"
            )
        asked = [layer.router.top_k for layer in moe_layers(pl_module)]
        pl_module.load_state_dict({**own, **wanted})
        # The other run's k came with its routers; this run's is what was asked for.
        for layer, top_k in zip(moe_layers(pl_module), asked, strict=True):
            layer.router.top_k = top_k


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
