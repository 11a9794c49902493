"""Read a model of transformers by name or path, or build one from a config, and say what is wrong with it."""
# Shape suffixes: B sequences, S tokens of a sequence, V vocabulary.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from routerzoo.errors import UserError
from routerzoo.registry import did_you_mean

KINDS = {
    "AutoModelForCausalLM": "causal language model",
    "AutoModelForSequenceClassification": "classifier of texts",
    "AutoModel": "model",
}
"""What an Auto class of transformers builds, in words."""

COUNTS_FROM_PADDING = ("camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta")
"""Architectures whose positions are counted from the id of padding, so that there must be one."""
REFUSALS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError, StrictDataclassError)
"""What transformers raises where a config does not fit."""


def read_model(
    source: str | Mapping[str, Any],
    auto_class: Any,
    num_labels: int | None,
    vocab_size: int | None,
    options: dict[str, Any],
) -> PreTrainedModel:
    """Return the model that a source names.

    Args:
        source: name or path of a model, or the config of one to build.
        auto_class: of transformers: `AutoModelForCausalLM`, `AutoModelForSequenceClassification`, `AutoModel`.
        num_labels: of a classifier of texts.
        vocab_size: number of the data's token ids.
        options: for `from_pretrained`; of a config, for `from_config`.

    Raises:
        UserError: no such model, weights that it lacks, one that sees the future, or another vocabulary than the
            data's.
    """
    if isinstance(source, Mapping):
        model = _built(source, auto_class, num_labels, vocab_size, options)
    else:
        model = load_model(source, auto_class, options, num_labels)
    text: Any = model.config.get_text_config()
    if auto_class.__name__ == "AutoModelForCausalLM":
        _check_causal(model)
    own = text.vocab_size
    if vocab_size is not None and (vocab_size > own or (isinstance(source, str) and vocab_size < 0.9 * own)):
        # Models pad their vocabularies by some percent.
        raise UserError(
            f"the data has {vocab_size} token ids, and the model {own}: set data.tokenizer to "
            + (source if isinstance(source, str) else "one that fits, or leave vocab_size out of the model's config")
        )
    return model


def _built(
    source: Mapping[str, Any], auto_class: Any, num_labels: int | None, vocab_size: int | None, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        config = _config(dict(source), vocab_size)
        if num_labels is not None:
            config.num_labels = num_labels
        model: PreTrainedModel = auto_class.from_config(config, **options)
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(f"no {KINDS[auto_class.__name__]} has the config {dict(source)}: {_sentence(error)}") from error
    return model


def load_model(
    source: str, auto_class: Any, options: dict[str, Any], num_labels: int | None = None, *, new_heads: bool = True
) -> PreTrainedModel:
    """Return the model of a name or path.

    Args:
        source: name or path.
        auto_class: of transformers.
        options: for `from_pretrained`.
        num_labels: of a classifier of texts.
        new_heads: let transformers draw a head that the files lack, as fine-tuning needs it; never that of a causal
            language model.

    Raises:
        UserError: no such model, a file that is damaged, or weights that it lacks.
    """
    path, kind = Path(source).expanduser(), KINDS.get(auto_class.__name__, "model")
    if path.is_file():
        raise UserError(f"{source} is a file: name the folder that it is in, with the model's config and weights")
    if source.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"there is no folder {source} to read a model from")
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model: PreTrainedModel
    try:
        model, found = auto_class.from_pretrained(str(path), output_loading_info=True, **labels, **options)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(damaged_weights(source, error)) from error
    except (ImportError, OSError, *REFUSALS) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(
                f"weights of {source} have other sizes than its config says: they are another model's"
                if num_labels is None
                else f"weights of {source} have other sizes than its config and the data's labels say: if "
                "only its head has, set model.options to {ignore_mismatched_sizes: true}, and that is initialized anew"
            ) from error
        where = "the folder" if path.exists() else "the name or path"
        raise UserError(f"transformers reads no {kind} of {where} {source}: {_sentence(error)}") from error
    # Most checkpoints have no pooler, and none has the head of a new task; what is in the body must be there.
    body = f"{model.base_model_prefix}." if model.base_model is not model else ""
    may_be_new = new_heads and auto_class.__name__ != "AutoModelForCausalLM"
    drawn = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    needed = [name for name in drawn if "pooler" not in name and (name.startswith(body) or not may_be_new)]
    if needed:
        raise UserError(
            f"{source} lacks {len(needed)} of the weights of a {type(model).__name__}, such as {min(needed)}, or has "
            "them in other sizes, and transformers would draw them at random: it is incomplete, or another model's"
        )
    return model


def damaged_weights(source: str, error: SafetensorError) -> str:
    """Return a sentence that names the file of a model's weights that cannot be read."""
    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as found:
            return f"{file} is damaged ({found}): copy or download it again"
    return f"a file of the weights of {source} is damaged ({error}): download it again"


def _config(values: dict[str, Any], vocab_size: int | None) -> PreTrainedConfig:
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING.keys())
        hint = did_you_mean(str(kind), known) if kind else ", such as llama or mixtral."
        raise UserError(f"source.model_type is {kind!r}, which names no architecture of transformers{hint}")
    plain = CONFIG_MAPPING[kind]()
    known, given = [*plain.to_dict(), *plain.attribute_map], list(values)
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
        # Those of the published models, which a small vocabulary may not have.
        special = ("bos_token_id", "eos_token_id", *(() if kind in COUNTS_FROM_PADDING else ("pad_token_id",)))
        values |= {name: values.get(name) for name in special}
    config: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    generation = GenerationConfig()  # type: ignore[no-untyped-call]
    for name in given:
        # Others, such as rope_theta, transformers turns into those that it knows; these it keeps, or drops, in silence.
        if name not in known and (name in vars(config) or hasattr(generation, name)):
            raise UserError(f"the config of {kind} has no {name!r}{did_you_mean(name, known)}")
    return config


@torch.no_grad()
def _check_causal(model: Any) -> None:
    """Refuse an encoder with a head for the next token, which would read it off its input."""
    if getattr(model.config, "is_decoder", True) or model.device.type == "meta":
        return
    ids_BS = torch.tensor([[0, 1], [0, 2]], device=model.device)
    first_BV = model.eval()(input_ids=ids_BS).logits[:, 0]
    if not torch.allclose(first_BV[0], first_BV[1]):
        raise UserError(
            f"{type(model).__name__} sees the tokens that it is to predict, as an encoder: add is_decoder: true to the "
            "config in source, or to options"
        )


def _sentence(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"transformers does not know {error}"
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
