"""`MoETask`: the base class of all tasks, whatever the domain."""
# Shape suffixes: E experts, V token ids.

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, get_type_hints

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentError, set_parsing_settings
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric

from routerzoo.callbacks.router_hooks import AVERAGING, RouterHooks, averaged_models
from routerzoo.callbacks.steps import accumulation, planned_steps
from routerzoo.checkpoints.names import under_own_names
from routerzoo.costs import Costs, TrainedTokens, count_costs
from routerzoo.distributed.collectives import all_ranks
from routerzoo.errors import UserError
from routerzoo.moe.auxiliary_loss import auxiliary_losses
from routerzoo.moe.averaging import copy_router_state
from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.optim import EXECUTION, PLATEAU, WarmupCosine, parameter_groups, use_fused_kernel
from routerzoo.router import LossWeight, Router
from routerzoo.routers.logit_scale import match_logit_std
from routerzoo.routing import RoutingContext
from routerzoo.tasks.class_paths import known_classes_only, refusal
from routerzoo.tasks.factories import allow_in_checkpoints, plain_factory

FORMAT_KEY, FORMAT = "routerzoo_format", 2
"""Key and value of the format version in checkpoints."""

if TYPE_CHECKING:
    SchedulerFactory = Callable[..., LRScheduler]
else:

    class SchedulerFactory(Protocol):
        """Builds a learning-rate schedule; the option parser does not ask for what is given here."""

        def __call__(self, optimizer: Optimizer, /, *, total_steps: int) -> LRScheduler:
            """Return the schedule; `total_steps` is given to what has such a parameter alone."""

    # Of annotations that are strings jsonargparse parses the whole file again, 200 times a command: 1.6 s.
    SchedulerFactory.__call__.__annotations__ = get_type_hints(SchedulerFactory.__call__)


class Prediction(NamedTuple):
    """The result of one forward pass for a batch.

    Args:
        logits_NC: predictions, `[rows, classes]`.
        loss: the task's loss, mean over the rows that count.
        token_losses_T: the task's loss of each token, for routers that learn from it; 0 for those without a target.
        context: of the pass.
        counted_N: which rows count; None for all.
    """

    logits_NC: Tensor
    loss: Tensor
    token_losses_T: Tensor
    context: RoutingContext
    counted_N: Tensor | None = None


class MoETask(LightningModule, ABC):
    """Trains `net`, a model that returns its output and the context with its MoE layers' routings.

    The loss is the task's plus, for each MoE layer, each auxiliary loss times its coefficient. Coefficients are applied
    here and nowhere else. `RouterHooks` updates the routers once per optimizer step. All arguments of the constructors,
    the subclass's included, are hyperparameters of the checkpoint.

    Args:
        net: the model.
        evaluation_metrics: builds the metrics of an evaluation. The progress bar shows `loss` and the headline.
        loss_weights: coefficient by auxiliary loss, a number (summed over layers) or `{value: ..., over_layers: ...}`,
            instead of those that the router's authors use. `balance` and `z` are defined for any router with logits.
        eval_top_k: experts per token in validation, test and prediction; by default as in training. Several are
            evaluated one after the other: metrics are those of the first, and those of each by its name.
        initial_logit_std: scale each router so that its logits start with this standard deviation; for comparisons, in
            which a router whose logits start larger would look more certain.
        consistency: send each training batch through the model twice, and weight the divergence of the two predictions
            with this, for routers (or dropout) that draw random numbers; 0 for one pass.
        optimizer: builds the optimizer from parameter groups.
        lr_scheduler: builds the learning-rate schedule, which advances by the step, from the optimizer, and from the
            number of steps if it has a parameter `total_steps`; None for a constant learning rate.
    """

    headline_higher_is_better: bool = False
    """Whether a larger headline metric is better."""

    def __init__(
        self,
        net: nn.Module,
        evaluation_metrics: Callable[[], dict[str, Metric]],
        *,
        loss_weights: dict[str, float | LossWeight] | None = None,
        eval_top_k: int | list[int] | None = None,
        initial_logit_std: float | None = None,
        consistency: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = WarmupCosine,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.lr_scheduler = plain_factory(optimizer), plain_factory(lr_scheduler)
        self.loss_weights, self.eval_top_k = loss_weights, eval_top_k
        if consistency < 0:
            raise UserError(f"consistency must be at least 0, got {consistency}")
        self.consistency = consistency
        self.eval_top_ks: list[int | None] = [*(eval_top_k if isinstance(eval_top_k, list) else [eval_top_k])]
        if not self.eval_top_ks or len(set(self.eval_top_ks)) < len(self.eval_top_ks):
            raise UserError(f"eval_top_k must name at least one k, and none twice, got {eval_top_k}")
        if len(self.eval_top_ks) > 1 and not list(moe_layers(net)):
            raise UserError(f"eval_top_k is {eval_top_k}, but the model has no MoE layer")
        for layer in moe_layers(net):
            for top_k in self.eval_top_ks:
                if top_k is not None and not 1 <= top_k <= inner_router(layer).max_top_k:
                    raise UserError(f"eval_top_k must be between 1 and {inner_router(layer).max_top_k}, got {top_k}")
        if initial_logit_std is not None:
            match_logit_std(map(inner_router, moe_layers(net)), initial_logit_std)
        self.evaluated = nn.ModuleList([nn.ModuleDict(evaluation_metrics()) for _ in self.eval_top_ks])
        self._random_state: Tensor | None = None
        self._total_steps: int | None = None
        self.trained = TrainedTokens()
        self._costs_before_sharding: list[Costs] | None = None
        self.save_hyperparameters(ignore=["net", "evaluation_metrics"])
        self._keep_defaults(type(net))
        allow_in_checkpoints(*self.hparams.values())

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **options: Any) -> Self:
        """Build the task from a checkpoint, as Lightning does; classes that it names are those of known packages.

        Raises:
            UserError: it names a class of another package, or a function, or what no task can be built from.
        """
        try:
            with known_classes_only():
                return super().load_from_checkpoint(checkpoint_path, *arguments, **options)
        except ArgumentError as error:
            if refused := refusal(str(error)):
                raise UserError(f"{checkpoint_path}: {refused}. If you trust it, import its package first") from None
            told = " ".join(str(error).split())
            raise UserError(f"{checkpoint_path} does not describe a task that can be built: {told}") from None

    def _keep_defaults(self, net_class: type[nn.Module]) -> None:
        """Add the defaults of the model's arguments to the hyperparameters: those of a later version may differ."""
        for parameter in inspect.signature(net_class).parameters.values():
            if parameter.default is not parameter.empty:
                self.hparams.setdefault(parameter.name, parameter.default)

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded over processes."""
        return self._costs_before_sharding is not None

    def configure_model(self) -> None:
        """Shard the model, if the strategy does."""
        mesh = self._device_mesh
        if mesh is None or self.is_sharded:
            return
        if any(isinstance(callback, AVERAGING) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "averaged weights cannot be sharded: leave the averaging callback out, or choose the strategy ddp"
            )
        from routerzoo.distributed.fsdp import shard_model  # takes a second to import

        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                "tensor parallelism is not supported: take the strategy routerzoo.ShardedStrategy, which has expert "
                "parallelism, or set its tensor_parallel_size to 1 and data_parallel_size to the number of processes"
            )
        # Costs can only be measured before sharding, while each process can compute alone.
        costs = [self.costs(place) for place in range(len(self.eval_top_ks))]
        shard_model(self.net, mesh["data_parallel"], getattr(self.trainer.strategy, "expert_parallel", 1))
        self._costs_before_sharding = costs

    @abstractmethod
    def predict_batch(self, batch: Any) -> Prediction:
        """Send a batch through the model, in training with `self.progress`."""

    @abstractmethod
    def training_metrics(self, batch: Any, prediction: Prediction, loss: Tensor) -> dict[str, Tensor]:
        """Return the metrics of a training batch beside its loss.

        Args:
            batch: the batch.
            prediction: of the first pass.
            loss: the task's loss, mean over the passes, without gradient.
        """

    @abstractmethod
    def evaluate(self, batch: Any, metrics: Mapping[str, Metric]) -> None:
        """Add a batch to an evaluation's metrics."""

    @abstractmethod
    def example(self, count: int = 1) -> int:
        """Run the model on so many examples, and return of how many tokens in all."""

    @abstractmethod
    def token_counts(self) -> Tensor | None:
        """Return how often each token id occurs in the training split, int64 `[V]`; None where there are no ids."""

    @property
    @abstractmethod
    def headline_metric(self) -> str:
        """Name of the metric that papers report, without the stage."""

    @abstractmethod
    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Return name and headline metric of a baseline on the validation split, None if unknown."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps that the run will take, as planned when it started.

        Raises:
            UserError: a run without end.
        """
        if self._total_steps is None:
            self._total_steps = planned_steps(self.trainer)
            if self._total_steps is None:
                raise UserError("the run has no end to plan for: set trainer.max_steps or trainer.max_epochs")
        return self._total_steps

    def setup(self, stage: str) -> None:
        """Keep the warning about batch-dependent routers for runs that do not fit."""
        for layer in moe_layers(self.net):
            layer.warns_of_batch_dependence = stage != "fit"  # the validation of a fit serves no users

    def configure_callbacks(self) -> list[Callback]:
        """Update the routers once per optimizer step, unless the trainer has the callback already."""
        if any(isinstance(callback, RouterHooks) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return []
        return [RouterHooks()]

    def auxiliary_losses(self, context: RoutingContext, token_losses_T: Tensor | None = None) -> dict[str, Tensor]:
        """Return each auxiliary loss, weighted and reduced over layers; see `routerzoo.auxiliary_loss`.

        Args:
            context: of the pass.
            token_losses_T: the task's loss of each token, for routers that learn from it.

        Raises:
            UserError: a coefficient for a loss that the router does not have.
        """
        try:
            return auxiliary_losses(self.net, context, self.loss_weights, token_losses=token_losses_T)
        except ValueError as error:
            raise UserError(f"loss_weights: {error}") from None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch with its auxiliary losses.

        With `consistency`, two passes of a model that draws random numbers (stochastic routers, dropout) are pulled
        together by the mean of both Kullback-Leibler divergences of their predictions (THOR, Zuo et al. 2022,
        https://arxiv.org/abs/2110.04260, equation 4; R-Drop): `loss_1 + loss_2 + consistency * (KL_12 + KL_21) / 2`.
        """
        passes = [self._pass(batch) for _ in range(2 if self.consistency else 1)]
        first = passes[0][0]
        total = torch.stack([loss for _, loss in passes]).sum()
        if self.consistency:
            divergence = _divergence(*(prediction for prediction, _ in passes))
            total = total + self.consistency * divergence
            self.log("train/consistency_loss", divergence.detach(), sync_dist=True)
        if self.loss_weights is not None and all_ranks() is not None and not self.is_sharded:
            # DDP waits for a gradient of every parameter, also of those that only a loss that is left out would reach.
            routers = (layer.router for layer in moe_layers(self.net))
            total = total + 0.0 * sum(p.sum() for router in routers for p in router.parameters() if p.requires_grad)
        loss = torch.stack([prediction.loss for prediction, _ in passes]).mean().detach()
        metrics = {"loss": loss, **self.training_metrics(batch, first, loss)}
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, prog_bar=True, sync_dist=True)
        return total

    def _pass(self, batch: Any) -> tuple[Prediction, Tensor]:
        """Return a prediction, and its loss with the auxiliary losses, which are logged."""
        prediction = self.predict_batch(batch)
        self.trained.add(prediction.context, self.trainer.world_size)
        losses = self.auxiliary_losses(prediction.context, prediction.token_losses_T)
        if losses:
            self.log_dict({f"train/{name}_loss": loss.detach() for name, loss in losses.items()}, sync_dist=True)
        return prediction, torch.stack([prediction.loss, *losses.values()]).sum()

    @property
    def progress(self) -> dict[str, Any]:
        """Step, total steps and the processes that train together, as the routers see them."""
        return {"step": self.global_step, "total_steps": self.total_steps, "process_group": all_ranks()}

    def on_fit_start(self) -> None:
        """Drop the plan of an earlier fit, and what it has trained on, unless it is resumed."""
        self._total_steps = None
        if self.trainer.ckpt_path is None and self.global_step == 0:
            self.trained = TrainedTokens()

    def on_train_start(self) -> None:
        """Select the optimizer's kernel, once a resumed run has restored its state."""
        if not self.is_sharded:
            for optimizer in self.trainer.optimizers:
                use_fused_kernel(optimizer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random state where a resumed run takes its first step."""
        if self._random_state is not None:
            # Not before: loaders draw numbers when they are set up.
            torch.set_rng_state(self._random_state.cpu())
            self._random_state = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the gradients of the parameters that a sharded model replicates."""
        if self.is_sharded:
            from routerzoo.distributed.fsdp import average_gradients

            average_gradients(self.parameters())

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups."""
        return parameter_groups(self)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule, which advances by the step."""
        groups = self.optimizer_groups()
        if self.is_sharded:
            # Fused and foreach kernels require parameters that are sharded alike; these are not.
            groups = [{**group, **dict.fromkeys(EXECUTION, False)} for group in groups]
        optimizer = self.optimizer(groups)
        if self.lr_scheduler is None:
            return optimizer
        planned = "total_steps" in inspect.signature(self.lr_scheduler).parameters
        scheduler = self.lr_scheduler(optimizer, **({"total_steps": self.total_steps} if planned else {}))
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError(f"lr_scheduler: ReduceLROnPlateau {PLATEAU}: take another class, or none")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients, also of parameters that are sharded differently."""
        if not self.is_sharded or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        from routerzoo.distributed.fsdp import clip_gradients

        clip_gradients((p for group in optimizer.param_groups for p in group["params"]), float(gradient_clip_val))

    @contextmanager
    def override_top_k(self, place: int = 0) -> Iterator[None]:
        """Route with one of the k of `eval_top_k` for a while."""
        top_k = self.eval_top_ks[place]
        with ExitStack() as stack:
            for layer in moe_layers(self.net) if top_k is not None else ():
                assert top_k is not None
                stack.enter_context(inner_router(layer).override_top_k(top_k))
            yield

    def _evaluation_step(self, stage: str, batch: Any) -> None:
        for place, top_k in enumerate(self.eval_top_ks):
            metrics = _metrics(self.evaluated[place])
            with self.override_top_k(place):
                self.evaluate(batch, metrics)
            if place == 0:
                shown = ("loss", self.headline_metric)
                self.log_dict({f"{stage}/{n}": metrics[n] for n in shown}, on_step=False, on_epoch=True, prog_bar=True)
                rest = {f"{stage}/{name}": metric for name, metric in metrics.items() if name not in shown}
                self.log_dict(rest, on_step=False, on_epoch=True)
            if len(self.eval_top_ks) > 1:
                each = {f"{stage}/k{top_k}/{name}": metric for name, metric in metrics.items()}
                self.log_dict(each, on_step=False, on_epoch=True)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: those that an evaluation in inference mode reset cannot be updated outside one."""
        for metric in self.evaluated.modules():
            if isinstance(metric, Metric):
                metric.reset()
                # A model that is converted to 16 bits takes its metrics along, whose sums then stop growing.
                if any(isinstance(s, Tensor) and s.dtype.itemsize < 4 for s in metric.metric_state.values()):
                    metric.set_dtype(torch.float32)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the validation split's report."""
        self._evaluation_step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the test split's report."""
        self._evaluation_step("test", batch)

    def costs(self, place: int = 0) -> Costs:
        """Count parameters and operations at one of the k of `eval_top_k`."""
        if self._costs_before_sharding is not None:
            return self._costs_before_sharding[place]
        with self.override_top_k(place):
            one, two = count_costs(self.net, self.example), count_costs(self.net, lambda: self.example(2))
        more = two.expert_flops * ((two.experts_per_token or 0.0) - (one.experts_per_token or 0.0))
        # What a pass computes once is halved.
        return replace(one, once_flops=2 * (one.flops - (two.flops - more)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random state, so that dropout continues as in an uninterrupted run."""
        checkpoint["random_state"] = torch.get_rng_state()
        checkpoint["trained"] = self.trained.numbers()
        if self._trainer is not None:
            checkpoint["accumulation"] = accumulation(self._trainer)
        checkpoint[FORMAT_KEY] = FORMAT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the format and restore each k; the random state follows when the first step starts."""
        if checkpoint.get(FORMAT_KEY) != FORMAT:
            raise UserError(
                f"the checkpoint is of format {checkpoint.get(FORMAT_KEY, 1)}, this version reads {FORMAT}: train "
                "again, or use the version of routerzoo that wrote it"
            )
        checkpoint["state_dict"] = under_own_names(checkpoint["state_dict"], self.state_dict().keys())
        for name, module in self.named_modules():
            if isinstance(module, Router) and (k := checkpoint["state_dict"].get(f"{name}.k")) is not None:
                module.top_k = int(k)  # a schedule had set it
        for averaged in averaged_models(self._trainer):
            copy_router_state(self, averaged)
        self._random_state, states = checkpoint.get("random_state"), checkpoint.get("optimizer_states", [])
        if self._trainer is not None and self._trainer.state.fn == "fit":
            _refuse_half_a_state(self._random_state, states)
            _refuse_another_accumulation(checkpoint, self._trainer)
            tokens, routed, assigned = checkpoint.get("trained", (0, 0.0, 0.0))
            self.trained = TrainedTokens(int(tokens), routed, assigned)
            started = checkpoint["global_step"] > 0 and not any(state.get("state") for state in states)
            if started and not self.is_sharded and _keeps_state(self.optimizer):  # that strategy loads it by itself
                raise UserError(
                    f"the checkpoint is incomplete: it is of step {checkpoint['global_step']}, but its "
                    "optimizer_states are empty. It cannot be resumed: train again"
                )
        # Several processes save the optimizer's state by name; one reads it by number.
        if not self.is_sharded and states and any(isinstance(name, str) for name in states[0]["state"]):
            from routerzoo.checkpoints.sharded import by_number

            checkpoint["optimizer_states"] = [by_number(states[0], self.optimizer_groups(), self)]


def _refuse_another_accumulation(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    now = accumulation(trainer)
    saved = checkpoint.get("accumulation", now)
    if saved != now:
        raise UserError(
            f"the checkpoint was trained with trainer.accumulate_grad_batches {_shown(saved)}, and it is {_shown(now)} "
            "now: set it as it was, or start a run from its weights (the callback FineTune)"
        )


def _shown(schedule: Mapping[int, int]) -> str:
    return str(schedule[0]) if list(schedule) == [0] else f"by epoch {dict(schedule)}"


def in_full_precision(logits: Tensor) -> Tensor:
    """Return logits of 16 bits in float32: losses are not rounded to three digits."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _metrics(module: Any) -> Mapping[str, Metric]:
    return dict(module.items())


def _refuse_half_a_state(random_state: Any, optimizer_states: Any) -> None:
    """Refuse a checkpoint that training would continue from in silence, but not as if it had not stopped."""
    whole = isinstance(random_state, Tensor) and random_state.dtype == torch.uint8
    if not whole or not optimizer_states:
        lacks = "optimizer_states" if whole else "random_state"
        raise UserError(f"the checkpoint is incomplete: it has no {lacks}. It cannot be resumed: train again")


def _keeps_state(optimizer: OptimizerCallable) -> bool:
    """Whether an optimizer remembers anything after a step; SGD without momentum does not."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    trial = optimizer([{"params": [parameter]}])
    trial.step(lambda: 0.0)
    return bool(trial.state)


def _divergence(one: Prediction, other: Prediction) -> Tensor:
    """Return the mean of both Kullback-Leibler divergences of two passes, mean over rows."""
    rows = (p.logits_NC if p.counted_N is None else p.logits_NC[p.counted_N] for p in (one, other))
    one_NC, other_NC = (F.log_softmax(logits_NC.float(), dim=-1) for logits_NC in rows)
    forward = F.kl_div(one_NC, other_NC, log_target=True, reduction="batchmean")
    return (forward + F.kl_div(other_NC, one_NC, log_target=True, reduction="batchmean")) / 2


allow_in_checkpoints(torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, WarmupCosine)
# Lightning rebuilds a task by the name in its checkpoint, as a subclass of itself, which a final class has none of.
set_parsing_settings(subclasses_enabled=[MoETask])
