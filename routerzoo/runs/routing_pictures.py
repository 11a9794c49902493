"""`RoutingPictures`: patches or tokens colored by expert, at intervals of training."""

from __future__ import annotations

from typing import Any, final

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng

from routerzoo.data.images import ImageBatch
from routerzoo.data.tokens import TextBatch
from routerzoo.look.drawings import draw
from routerzoo.look.observe import observe
from routerzoo.moe.layer import moe_layers
from routerzoo.tasks.base import MoETask


@final
class RoutingPictures(Callback):
    """Draws the first validation batch, colored by expert, into TensorBoard. Training is unaffected.

    Args:
        every_n_validations: validations between pictures; the first is drawn. None for no pictures.
        examples: images to draw; of text, the first sequence is drawn.

    Raises:
        ValueError: either is below 1.
    """

    def __init__(self, every_n_validations: int | None = 10, examples: int = 4) -> None:
        if (every_n_validations is not None and every_n_validations < 1) or examples < 1:
            raise ValueError(
                f"every_n_validations and examples must be at least 1, got {every_n_validations} and {examples}"
            )
        self.every_n_validations, self.examples = every_n_validations, examples
        self.validations = 0

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints."""
        return self._generate_state_key(every_n_validations=self.every_n_validations, examples=self.examples)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validations of an earlier run."""
        if trainer.global_step == 0:
            self.validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw at intervals."""
        every = self.every_n_validations
        if every is None or trainer.sanity_checking or trainer.state.fn != "fit" or not isinstance(pl_module, MoETask):
            return
        self.validations += 1
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        data: Any = getattr(trainer, "datamodule", None)
        if (self.validations - 1) % every or not loggers or data is None:
            return
        if trainer.fast_dev_run or next(moe_layers(pl_module.net), None) is None:  # type: ignore[attr-defined]
            return
        with isolate_rng():  # iterating over a loader draws a random number
            batch = next(iter(data.val_dataloader()))
        if not isinstance(batch, (TextBatch, ImageBatch)):
            return
        batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
        # On every rank: sharded parameters need all.
        observation = observe(pl_module, batch)
        if trainer.is_global_zero:
            figure = draw(pl_module, data, observation, self.examples)
            for logger in loggers:
                logger.experiment.add_figure("routing/by expert", figure, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self.validations = state_dict["validations"]
