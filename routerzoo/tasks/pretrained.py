"""`PretrainedTask`: the base class of tasks that train a model of transformers."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer
from torchmetrics import Metric

from routerzoo.errors import UserError
from routerzoo.models.blocks import MoEBlocks
from routerzoo.moe.layer import ExpertsFactory, RouterFactory
from routerzoo.optim import WarmupCosine, parameter_groups
from routerzoo.registry import did_you_mean
from routerzoo.router import LossWeight
from routerzoo.tasks.base import SchedulerFactory
from routerzoo.tasks.decoder import TextTask
from routerzoo.tasks.factories import plain_factory


class PretrainedTask(TextTask):
    """Trains a model of transformers on text. Needs the extra `routerzoo[hf]`.

    A dense model is upcycled; of a released Mixture of Experts the routers are kept or replaced. `net.model` is the
    model, which has `save_pretrained`.

    Args:
        source: name or path of a model, or the config of one to build, such as
            `{model_type: llama, hidden_size: 64, num_hidden_layers: 2}`.
        evaluation_metrics: see `MoETask`.
        router: the router of each MoE layer. `keep`, for a released Mixture of Experts, is the one that computes what
            its gate does, with its weights.
        num_experts: experts that each feed-forward network of a dense model becomes.
        experts: what they are; by default copies of the network.
        moe_blocks: which blocks of a dense model become MoE layers; see
            `routerzoo.models.blocks.moe_block_indices`.
        num_shared_experts: experts per layer of a dense model that see every token.
        copy_weights: start experts from the weights of the dense model.
        train: `all` weights, `all-but-experts`, the MoE layers alone (`moe`), or their `routers` alone; a classifier's
            head always.
        lora: arguments of PEFT's `LoraConfig`, such as `{r: 8, lora_alpha: 16}`: adapters are trained alone (and a
            classifier's head), by default those of the experts. Routers that are new need `modules_to_save: [router]`.
        router_options: options of the optimizer for the routers alone, such as `{lr: 1.0e-3}`.
        options: arguments of `from_pretrained`, such as `{dtype: bfloat16, revision: main}`; weights are read in
            float32 unless `dtype` says otherwise. Of a config, those of `from_config`.
        activation_checkpointing: keep only the blocks' inputs and compute the rest again in the backward pass.
        vocab_size: number of the data's token ids. From the command line it is the data's.
        max_length: longest sequence; by default 256. From the command line it is the data's `sequence_length`.
        num_tasks: ignored: no model of transformers tells corpora apart. From the command line it is the
            data's.
        loss_weights: see `MoETask`; likewise the arguments that follow.
        eval_top_k: see `MoETask`.
        initial_logit_std: see `MoETask`.
        consistency: see `MoETask`.
        optimizer: see `MoETask`.
        lr_scheduler: see `MoETask`.

    Raises:
        UserError: an extra that is not installed; a model, a router or data that do not fit each other.
    """

    free_arguments = ("router_options", "options")

    def __init__(
        self,
        source: str | dict[str, Any],
        evaluation_metrics: Callable[[], dict[str, Metric]],
        *,
        router: RouterFactory | Literal["keep"] = "keep",
        num_experts: int | None = None,
        experts: ExpertsFactory | None = None,
        moe_blocks: MoEBlocks = "all",
        num_shared_experts: int = 0,
        copy_weights: bool = True,
        train: Literal["all", "all-but-experts", "moe", "routers"] = "all",
        lora: dict[str, Any] | None = None,
        router_options: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        vocab_size: int | None = None,
        max_length: int | None = None,
        num_tasks: int | None = None,
        loss_weights: dict[str, float | LossWeight] | None = None,
        eval_top_k: int | list[int] | None = None,
        initial_logit_std: float | None = None,
        consistency: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = WarmupCosine,
    ) -> None:
        self.router_options = router_options
        try:
            net = self.build_net(
                source,
                max_length if max_length is not None else 256,
                router=plain_factory(router),
                num_experts=num_experts,
                experts=plain_factory(experts),
                moe_blocks=moe_blocks,
                num_shared_experts=num_shared_experts,
                copy_weights=copy_weights,
                vocab_size=vocab_size,
                lora=lora,
                train=train,
                activation_checkpointing=activation_checkpointing,
                options={"dtype": "float32", **(options or {})},
            )
        except ModuleNotFoundError as error:
            raise UserError(f"{type(self).__name__} needs {error.name}: pip install 'routerzoo[hf]'") from error
        super().__init__(
            net,
            evaluation_metrics,
            loss_weights=loss_weights,
            eval_top_k=eval_top_k,
            initial_logit_std=initial_logit_std,
            consistency=consistency,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.vocab_size = net.vocab_size

    @abstractmethod
    def build_net(self, source: str | dict[str, Any], max_length: int, **options: Any) -> Any:
        """Return the model, as a `routerzoo.hf.text_model.TextModel`.

        Args:
            source: see the class.
            max_length: see the class.
            options: for `build_text_model`.
        """

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups, those of routers with options of their own."""
        return parameter_groups(self, routers=self.router_options)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule.

        Raises:
            UserError: an option of the routers that the optimizer does not have.
        """
        built = super().configure_optimizers()
        optimizer: Optimizer = built["optimizer"] if isinstance(built, dict) else built
        for name in self.router_options or ():
            if name not in optimizer.defaults:  # torch would keep it in silence
                hint = did_you_mean(name, optimizer.defaults)
                raise UserError(f"router_options: {type(optimizer).__name__} has no option {name!r}{hint}")
        if self.router_options:
            self._check_router_options(optimizer)
        return built

    def _check_router_options(self, optimizer: Optimizer) -> None:
        """Refuse values that the optimizer checks when it is built, but not those of a group."""
        cls, options = type(optimizer), {**optimizer.defaults, **(self.router_options or {})}
        known = inspect.signature(cls).parameters
        try:
            cls(optimizer.param_groups[0]["params"][:1], **{name: options[name] for name in options if name in known})
        except (ValueError, TypeError) as error:
            raise UserError(f"router_options: {cls.__name__} refuses {self.router_options}: {error}") from error
