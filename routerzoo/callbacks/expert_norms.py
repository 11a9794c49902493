"""`ExpertNormMonitor`: norms of the experts' parameters and outputs in training, with warnings."""
# Shape suffix: E experts.

from __future__ import annotations

from functools import partial
from typing import Any, final

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from routerzoo.callbacks.steps import completes_step, steps_taken
from routerzoo.errors import UserError
from routerzoo.metrics import ExpertNorms
from routerzoo.metrics.expert_norms import OutputHook, norm_statistics, parameter_norms, relative_norms
from routerzoo.moe.layer import MoE, moe_layers

Limits = tuple[float, float]
"""The smallest and the largest norm over the median expert's that is no cause for a warning."""


class ExpertNormWarning(UserWarning):
    """An expert's norm is far from the median expert's."""


@final
class ExpertNormMonitor(Callback):
    """Logs the largest and the smallest norm of the experts over the median, and warns of experts that die or explode.

    For the i-th MoE layer these are `train/moe<i>/parameter_norm_largest`, `_smallest`, and `output_norm_largest`,
    `_smallest`, at the steps that Lightning logs. A dying or an exploding expert shows here before it shows in load or
    loss (Step 3.5 Flash, https://arxiv.org/abs/2602.10604). Each expert is warned of once. Outputs are not seen where a
    layer computes its experts in one operator (`low_memory`, the default on a GPU) or merges them, parameters not where
    they are sharded; the layer then has no such entry.

    Args:
        parameter_limits: smallest and largest norm of an expert's parameters over the median's.
        output_limits: smallest and largest mean norm of an expert's outputs over the median's.

    Raises:
        UserError: a smallest norm that is not below 1, or a largest that is not above it.
    """

    def __init__(self, parameter_limits: Limits = (0.33, 3.0), output_limits: Limits = (0.1, 10.0)) -> None:
        for name, (low, high) in (("parameter_limits", parameter_limits), ("output_limits", output_limits)):
            if not low < 1 < high:
                raise UserError(f"{name} must be a number below 1 and one above 1, got {low} and {high}")
        self.limits = {"parameter": parameter_limits, "output": output_limits}
        self._handles: list[OutputHook] = []
        # By layer, while recording.
        self._metrics: dict[MoE, ExpertNorms] = {}
        self._warned: set[tuple[int, int, str]] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the experts."""
        self._warned = set()
        layers = list(moe_layers(pl_module))
        if not layers:
            raise UserError("ExpertNormMonitor has nothing to follow: the model has no MoE layer")
        self._handles = [OutputHook(layer.experts, partial(self._metrics.get, layer)) for layer in layers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to record a step that Lightning logs, or continue with its next batch."""
        every, step = trainer.log_every_n_steps, steps_taken(trainer) + 1  # type: ignore[attr-defined]
        if not self._metrics and every > 0 and step % every == 0 and not trainer.barebones:
            for layer in moe_layers(pl_module):
                self._metrics[layer] = ExpertNorms(layer.num_experts).to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a step that is complete, and warn."""
        if not self._metrics or not completes_step(trainer):
            return
        metrics = dict(self._metrics)
        self._metrics.clear()
        for index, (layer, metric) in enumerate(metrics.items()):
            norms = {"parameter": parameter_norms(layer.experts, layer.num_experts)}
            if metric.update_called:
                norms["output"] = metric.norms_E
            for kind, norms_E in norms.items():
                self._report(pl_module, index, kind, norms_E)

    def _report(self, pl_module: LightningModule, index: int, kind: str, norms_E: Tensor) -> None:
        if norms_E.isnan().all():
            return
        statistics = norm_statistics(norms_E)
        named = {f"train/moe{index}/{kind}_norm_{name}": value for name, value in statistics.items()}
        # Those of outputs are each process's, averaged.
        pl_module.log_dict({name: value.to(pl_module.device) for name, value in named.items()}, sync_dist=True)
        low, high = self.limits[kind]
        for expert, norm in enumerate(relative_norms(norms_E).tolist()):
            unknown = bool(norms_E[expert].isnan())  # an expert without a token
            if unknown or low <= norm <= high or (index, expert, kind) in self._warned:
                continue
            self._warned.add((index, expert, kind))
            what = "vanishes" if norm < low else "explodes"
            rank_zero_warn(
                f"expert {expert} of MoE layer {index} {what}: the norm of its {kind}s is {norm:.3g} times the median "
                f"expert's, outside {low:g} to {high:g}. Lower the learning rate, clip gradients, or look at it with "
                "python -m routerzoo audit",
                category=ExpertNormWarning,
            )

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._metrics.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no more."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no more: no teardown follows."""
        self._stop()
