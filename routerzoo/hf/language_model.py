"""A causal language model of transformers, built from options that are JSON, and called as a `Decoder` is."""
# Shape suffixes: B sequences, S tokens of a sequence, V vocabulary.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
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


class LanguageModel(nn.Module):
    """A causal language model of transformers behind the interface of `routerzoo.models.decoder.Decoder`.

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
        task_ids_B: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
        sequence_ids_BS: Tensor | None = None,
        attend_across: bool = True,
    ) -> tuple[Tensor, RoutingContext]:
        """Return next-token logits `[B, S, V]`, and the context with the routing of every MoE layer.

        Args:
            ids_BS: token ids.
            padding_mask_BS: True where a token is padding; experts skip it.
            task_ids_B: ignored: no model of transformers tells tasks apart.
            step: optimizer steps taken, where known.
            total_steps: optimizer steps that the run will take, where known.
            process_group: processes that train on parts of this batch; see `RoutingContext`.
            sequence_ids_BS: the document of each token, where a row is packed from several, counted over the batch.
                Routers see it, and positions from the beginning of each.
            attend_across: whether attention crosses the boundaries of documents.

        Raises:
            UserError: documents to be kept apart, by a model whose layers do not all attend to whole sequences.
        """
        known: dict[str, Any] = {"step": step, "total_steps": total_steps, "process_group": process_group}
        given: dict[str, Any] = {}
        if padding_mask_BS is not None:
            given["attention_mask"], known["padding_mask"] = (~padding_mask_BS).long(), padding_mask_BS
        if sequence_ids_BS is not None:
            positions_BS = _positions(sequence_ids_BS)
            known |= {"sequence_ids": sequence_ids_BS, "positions": positions_BS}
            if not attend_across:
                self._check_attention()
                given = {"attention_mask": self._apart(sequence_ids_BS, padding_mask_BS), "position_ids": positions_BS}
        self._known = known
        try:
            logits_BSV = self.model(input_ids=ids_BS, use_cache=False, **given).logits
        finally:
            self._known = {}
        return logits_BSV, self.base.routing.context

    def _apart(self, sequence_ids_BS: Tensor, padding_mask_BS: Tensor | None) -> Tensor:
        """Return what is added to attention's scores, `[B, 1, S, S]`, so that documents do not see each other."""
        seen_BSS = (sequence_ids_BS.unsqueeze(2) == sequence_ids_BS.unsqueeze(1)).tril()
        if padding_mask_BS is not None:  # padding sees itself, since a softmax of nothing is no number
            seen_BSS = seen_BSS & (
                ~padding_mask_BS.unsqueeze(1) | torch.eye(seen_BSS.shape[-1], device=seen_BSS.device).bool()
            )
        dtype = self.base.dtype
        mask_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device)
        return mask_BSS.masked_fill(~seen_BSS, torch.finfo(dtype).min).unsqueeze(1)

    def _check_attention(self) -> None:
        config = self.base.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        if window is not None and window >= self.max_length:
            kinds -= {"sliding_attention"}
        if kinds - {"full_attention"} or not hasattr(config, "rope_parameters") or config.model_type == "jamba":
            raise UserError(
                f"{type(self.base).__name__} cannot keep documents apart, since not all of its layers are rotary "
                "attention over whole sequences: set data.documents to marked or joined"
            )

    @torch.no_grad()
    def generate(self, ids_BS: Tensor, tokens: int, temperature: float, top_p: float, seed: int) -> Tensor:
        """Return sampled tokens after each prompt, `[B, S]`, as far as the model has positions; after the end, padding.

        Args:
            ids_BS: the prompts, of one length.
            tokens: most tokens to sample.
            temperature: divides the logits; 0 takes the most likely token.
            top_p: samples from the most likely tokens that hold this share of the probability.
            seed: of the random numbers.
        """
        config = self.base.config.get_text_config()
        end = config.eos_token_id
        longest = getattr(config, "max_position_embeddings", None)
        tokens = tokens if longest is None else min(tokens, longest - ids_BS.shape[1])
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        # With the default cache, a router that looks back would refuse.
        tokenwise = all(layer.router.properties.tokenwise for layer in moe_layers(self))
        with torch.random.fork_rng(devices=[ids_BS.device] if ids_BS.is_cuda else []):
            torch.manual_seed(seed)
            out_BS: Tensor = self.model.generate(
                input_ids=ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                max_new_tokens=tokens,
                use_cache=tokenwise,
                pad_token_id=end[0] if isinstance(end, list) else end,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
        return out_BS[:, ids_BS.shape[1] :]


def _positions(sequence_ids_BS: Tensor) -> Tensor:
    """Return the place of each token in its document."""
    places_BS = torch.arange(sequence_ids_BS.shape[1], device=sequence_ids_BS.device).expand_as(sequence_ids_BS)
    begins_BS = F.pad(sequence_ids_BS.diff(dim=1) != 0, (1, 0), value=True)
    return places_BS - (places_BS * begins_BS).cummax(dim=1).values


def build_language_model(
    source: str | Mapping[str, Any],
    *,
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
    """Build, change and freeze a model as `routerzoo.PretrainedLanguageModeling` says; see there.

    Raises:
        UserError: a model that there is not, or options that do not fit it or each other.
    """
    model: Any = _read(source, vocab_size, dict(options))
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
        model = _adapted(model, dict(lora))
    elif train == "routers":
        train_routers_only(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError("train is 'routers', and no router of the model has parameters: nothing would be trained")
    elif train == "all-but-experts":
        freeze_experts(model)
    return model.train()


def _read(source: str | Mapping[str, Any], vocab_size: int | None, options: dict[str, Any]) -> PreTrainedModel:
    auto: Any = transformers.AutoModelForCausalLM
    if isinstance(source, Mapping):
        try:
            model: PreTrainedModel = auto.from_config(_config(dict(source), vocab_size), **options)
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"no causal language model has the config {dict(source)}: {_sentence(error)}") from error
    else:
        if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
            raise UserError(f"there is no folder {source} to read a model from")
        try:
            model = auto.from_pretrained(str(Path(source).expanduser()), **options)
        except UserError:
            raise
        except (OSError, ValueError, TypeError) as error:
            where = "the folder" if Path(source).exists() else "the name or path"
            raise UserError(
                f"transformers reads no causal language model of {where} {source}: {_sentence(error)}"
            ) from error
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
