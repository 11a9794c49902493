"""A model of transformers that reads text, built from options that are JSON, and called as a `Decoder` is."""
# Shape suffixes: B sequences, S tokens of a sequence.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from routerzoo.errors import UserError
from routerzoo.hf.changes import KEEP, released_sites
from routerzoo.hf.context import ContextOfInputs
from routerzoo.hf.pretrained import freeze_experts, replace_routers, train_routers_only, upcycle
from routerzoo.models.blocks import MoEBlocks
from routerzoo.moe.context import ContextHook
from routerzoo.moe.layer import ExpertsFactory, RouterFactory, moe_layers
from routerzoo.registry import did_you_mean
from routerzoo.routing import RoutingContext

Trained = Literal["all", "all-but-experts", "routers"]
KINDS = {
    "AutoModelForCausalLM": "causal language model",
    "AutoModelForSequenceClassification": "classifier of texts",
    "AutoModel": "model",
}
"""What an Auto class of transformers builds, in words."""


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
    model: Any = _read(source, auto_class, num_labels, vocab_size, dict(options))
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
        model = _adapted(model, {**({} if num_labels is None else {"task_type": "SEQ_CLS"}), **lora})
    elif train == "routers":
        train_routers_only(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError("train is 'routers', and no router of the model has parameters: nothing would be trained")
        if num_labels is not None:
            for name, parameter in model.named_parameters():
                if not name.startswith(f"{model.base_model_prefix}."):  # the head
                    parameter.requires_grad_(True)
    elif train == "all-but-experts":
        freeze_experts(model)
    return model.train()


def _read(
    source: str | Mapping[str, Any],
    auto_class: Any,
    num_labels: int | None,
    vocab_size: int | None,
    options: dict[str, Any],
) -> PreTrainedModel:
    kind = KINDS[auto_class.__name__]
    if isinstance(source, Mapping):
        try:
            config = _config(dict(source), vocab_size)
            if num_labels is not None:
                config.num_labels = num_labels
            model: PreTrainedModel = auto_class.from_config(config, **options)
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"no {kind} has the config {dict(source)}: {_sentence(error)}") from error
    else:
        if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
            raise UserError(f"there is no folder {source} to read a model from")
        labels = {} if num_labels is None else {"num_labels": num_labels}
        try:
            model = auto_class.from_pretrained(str(Path(source).expanduser()), **labels, **options)
        except UserError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            if "ignore_mismatched_sizes" in str(error):
                raise UserError(
                    f"weights of {source} have other sizes than its config and the data's labels say: set "
                    "model.options to {ignore_mismatched_sizes: true}, and those are initialized anew"
                ) from error
            where = "the folder" if Path(source).exists() else "the name or path"
            raise UserError(f"transformers reads no {kind} of {where} {source}: {_sentence(error)}") from error
    if num_labels is not None and model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = 0  # what texts are padded with, whatever it is; see `TextModel`
    own = model.config.get_text_config().vocab_size
    if vocab_size is not None and (vocab_size > own or (isinstance(source, str) and vocab_size < 0.9 * own)):
        # Models pad their vocabularies by some percent.
        raise UserError(
            f"the data has {vocab_size} token ids, and the model {own}: set data.tokenizer to "
            + (source if isinstance(source, str) else "one that fits, or leave vocab_size out of the model's config")
        )
    return model


def _config(values: dict[str, Any], vocab_size: int | None) -> PreTrainedConfig:
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING.keys())
        hint = did_you_mean(str(kind), known) if kind else ", such as llama or mixtral."
        raise UserError(f"source.model_type is {kind!r}, which names no architecture of transformers{hint}")
    plain = CONFIG_MAPPING[kind]()
    known = [*plain.to_dict(), *plain.attribute_map]
    for name in values:
        if name not in known:  # transformers would keep it in silence
            raise UserError(f"the config of {kind} has no {name!r}{did_you_mean(name, known)}")
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
        # Those of the published models, which a small vocabulary may not have.
        values |= {n: values.get(n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    return config


def _adapted(model: Any, lora: dict[str, Any]) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft: pip install 'routerzoo[hf]'") from error
    layer = next(moe_layers(model), None)
    if layer is None:
        raise UserError("LoRA here is that of experts, and the model has none")
    if not lora.get("target_modules") and not lora.get("target_parameters"):
        banks = [name for name, parameter in layer.experts.named_parameters() if parameter.ndim == 3]
        lora["target_parameters"] = [f"experts.{name}" for name in banks]
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**lora))
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
