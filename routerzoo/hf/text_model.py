"""A model of transformers that reads text, built from options that are JSON, and called as a `Decoder` is."""
# Shape suffixes: B sequences, S tokens of a sequence.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from routerzoo.errors import UserError
from routerzoo.hf.changes import KEEP, released_sites
from routerzoo.hf.context import ContextOfInputs
from routerzoo.hf.lora import adapted
from routerzoo.hf.pretrained import freeze_experts, replace_routers, upcycle, warn_of_untrained_routers
from routerzoo.hf.source import read_model
from routerzoo.models.blocks import MoEBlocks
from routerzoo.moe.context import ContextHook
from routerzoo.moe.layer import ExpertsFactory, RouterFactory, moe_layers
from routerzoo.routing import RoutingContext

Trained = Literal["all", "all-but-experts", "moe", "routers"]


class TextModel(nn.Module):
    """A model of transformers behind the interface of `routerzoo.models.decoder.Decoder`.

    Routers see token ids, positions, sequences, padding and the step.

    Args:
        model: the model, or one of PEFT around it.
        max_length: longest sequence of the data.

    Raises:
        UserError: the model's positions end before.
    """

    num_tasks: int | None = None

    def __init__(self, model: Any, max_length: int) -> None:
        super().__init__()
        self.model, self.max_length = model, max_length
        config = self.base.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None:
            longest -= _first_position(self.base)
        if longest is not None and max_length > longest:
            raise UserError(
                f"the model has positions up to {longest}, and the data's sequence_length is {max_length}: lower it"
            )
        self.vocab_size: int = config.vocab_size
        self._inputs, self._known = ContextOfInputs(self.base), dict[str, Any]()
        if isinstance(getattr(self.base, "routing", None), ContextHook):
            self.base.routing.remove()
        self.base.routing = ContextHook(self.base, self._context)

    @property
    def base(self) -> Any:
        """The model of transformers itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # of PEFT

    def _context(self, *args: Any, **kwargs: Any) -> RoutingContext:
        return self._inputs(*args, **kwargs).replace(**self._known)

    def forward(
        self,
        ids_BS: Tensor,
        *,
        padding_mask_BS: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, RoutingContext]:
        """Return the model's output, logits or hidden states, and the context with the routing of every MoE layer.

        Args:
            ids_BS: token ids.
            padding_mask_BS: True where a token is padding; experts skip it.
            step: optimizer steps taken, where known.
            total_steps: optimizer steps that the run will take, where known.
            process_group: processes that train on parts of this batch; see `RoutingContext`.
        """
        given = {"use_cache": False} if "use_cache" in self._inputs.names else {}
        if padding_mask_BS is not None:  # classifiers that are decoders find the last token by the id of padding
            ids_BS = ids_BS.masked_fill(padding_mask_BS, self.base.config.get_text_config().pad_token_id or 0)
        known = {"step": step, "total_steps": total_steps, "process_group": process_group}
        return self._run(ids_BS, padding_mask_BS, known, **given)

    def _run(
        self, ids_BS: Tensor, padding_mask_BS: Tensor | None, known: dict[str, Any], **given: Any
    ) -> tuple[Tensor, RoutingContext]:
        """Run the model on given inputs, in a context of what is known beside them."""
        if padding_mask_BS is not None:
            known = {"padding_mask": padding_mask_BS, **known}
            given = {"attention_mask": (~padding_mask_BS).long(), **given}
        self._known = known
        try:
            output: Tensor = self.model(input_ids=ids_BS, **given)[0]
        finally:
            self._known = {}
        return output, self.base.routing.context


def _first_position(model: nn.Module) -> int:
    """Return the position of the first token: in RoBERTa and MPNet it comes after that of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def build_text_model(
    source: str | Mapping[str, Any],
    auto_class: Any,
    *,
    num_labels: int | None = None,
    router: RouterFactory | Literal["keep"],
    num_experts: int | None,
    experts: ExpertsFactory | None,
    moe_blocks: MoEBlocks,
    num_shared_experts: int,
    copy_weights: bool,
    vocab_size: int | None,
    lora: Mapping[str, Any] | None,
    train: Trained,
    activation_checkpointing: bool,
    options: Mapping[str, Any],
) -> Any:
    """Build, change and freeze a model as `routerzoo.tasks.pretrained.PretrainedTask` says; see there.

    Args:
        source: see there, likewise the arguments that are not named here.
        auto_class: of transformers: `AutoModelForCausalLM`, `AutoModelForSequenceClassification`, `AutoModel`.
        num_labels: of a classifier of texts.

    Raises:
        UserError: a model that there is not, or options that do not fit it or each other.
    """
    if train not in get_args(Trained):
        raise UserError(f"train must be one of {', '.join(get_args(Trained))}, got {train!r}")
    model: Any = read_model(source, auto_class, num_labels, vocab_size, dict(options))
    text = model.config.get_text_config()
    if num_labels is not None and text.pad_token_id is None:
        text.pad_token_id = 0  # what texts are padded with, whatever it is; see `TextModel`
    ours = hasattr(model.config, "routing")
    released = ours or any(released_sites(model))
    if released and num_experts is not None:
        raise UserError(f"{type(model).__name__} has experts already: leave num_experts out")
    if released:
        for name, value, default in (
            ("experts", experts, None),
            ("moe_blocks", moe_blocks, "all"),
            ("num_shared_experts", num_shared_experts, 0),
        ):
            if value != default:
                raise UserError(f"{name} is for dense models, {type(model).__name__} has experts: leave it out")
        if not (ours and router == KEEP):
            replace_routers(model, router)
    elif moe_blocks not in ("none", []):
        if num_experts is None:
            raise UserError(
                f"{type(model).__name__} has no gate that is known, as a dense model has none: set num_experts, and "
                "its feed-forward networks become experts"
            )
        if router == KEEP:
            raise UserError(f"{type(model).__name__} is dense and has no router to keep: name one")
        upcycle(
            model,
            num_experts=num_experts,
            router=router,
            experts=experts,
            blocks=moe_blocks,
            num_shared_experts=num_shared_experts,
            copy_weights=copy_weights,
        )
    if activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if lora is not None:
        if train != "all":
            raise UserError(f"LoRA trains its adapters alone, and train is {train!r}: leave one of them out")
        model = adapted(model, {**({} if num_labels is None else {"task_type": "SEQ_CLS"}), **lora})
    elif train == "all-but-experts":
        freeze_experts(model)
    elif train != "all":
        # All of a language model's body and head, the body alone of a classifier.
        frozen = model if num_labels is None else getattr(model, model.base_model_prefix)
        parts = (layer.router if train == "routers" else layer for layer in moe_layers(model))
        trained = {parameter for part in parts for parameter in part.parameters()}
        for parameter in frozen.parameters():
            parameter.requires_grad_(parameter in trained)
        if not trained and auto_class.__name__ == "AutoModelForCausalLM":
            raise UserError(f"train is {train!r}, and the model has no such parameters: nothing would be trained")
        if train == "routers":
            warn_of_untrained_routers(model)
    return model.train()
