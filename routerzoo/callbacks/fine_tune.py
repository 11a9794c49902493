"""`FineTune`: start from the weights of another run, with its routing frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from lightning import Callback, LightningModule, Trainer

from routerzoo.checkpoints.names import under_own_names
from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.errors import UserError
from routerzoo.models.vit import ViTMoE
from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.router import Router


@final
class FineTune(Callback):
    """Starts from a checkpoint's weights, with a new optimizer and schedule, and may freeze the routing.

    X-MoE (Chi et al. 2022, section 3) freezes router *and* experts when it fine-tunes, and keeps the balance loss,
    which then trains the hidden states alone; it reports 72.2 against 71.7 on XNLI. That is the default here, for any
    router. Each router's k is that of the new run. Of images of another size, vision transformers keep the learned
    positions, resampled.

    Args:
        checkpoint: file of the run to start from.
        freeze_router: routers neither learn nor adapt.
        freeze_experts: experts do not learn.
        except_for: prefixes of weights that are not loaded, such as `net.vit.head`.
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
        """Freeze, before the optimizer is built."""
        if stage != "fit":
            return
        for layer in moe_layers(pl_module):
            if self.freeze_router:
                inner_router(layer).freeze()
            if self.freeze_experts:
                layer.experts.requires_grad_(False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights, unless the run resumes or continues.

        Raises:
            UserError: there is no such checkpoint, or it does not fit the model.
        """
        if trainer.ckpt_path is not None or trainer.global_step > 0:
            return
        if not self.checkpoint.is_file():
            raise UserError(f"no checkpoint to fine-tune from: {self.checkpoint} does not exist")
        own = pl_module.state_dict()
        state = under_own_names(read_checkpoint(self.checkpoint)["state_dict"], own.keys())
        for name, module in pl_module.named_modules():
            if isinstance(module, ViTMoE):
                state = module.resample_positions(state, f"{name}.")
        kept = {f"{name}.k" for name, module in pl_module.named_modules() if isinstance(module, Router)}
        saved = {
            name: value for name, value in state.items() if name not in kept and not name.startswith(self.except_for)
        }
        unfit = [
            name for name in own if name not in saved and name not in kept and not name.startswith(self.except_for)
        ]
        unfit += [name for name, value in saved.items() if name not in own or _shape(value) != _shape(own[name])]
        if unfit:
            where = ", ".join(unfit[:4]) + (" and more" if len(unfit) > 4 else "")
            raise UserError(
                f"{self.checkpoint} does not fit the model at {where}: build the same model, or name the weights that "
                "are not to be loaded in except_for"
            )
        pl_module.load_state_dict({**own, **saved})


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
