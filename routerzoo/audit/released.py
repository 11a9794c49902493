"""`subject_of_transformers`: a model of transformers on text."""
# Shape suffixes: B windows, S tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from routerzoo.audit.documents import Windows, cut, read_documents
from routerzoo.audit.subject import Losses, Subject
from routerzoo.errors import UserError


def subject_of_transformers(
    model: Any,
    data: str | Path,
    *,
    name: str,
    tokenizer: str,
    text_field: str = "text",
    split: str = "test",
    length: int = 512,
    batch_size: int = 4,
    num_batches: int = 20,
) -> Subject:
    """Return a model of transformers, whose routers are routerzoo's, with batches of text.

    Args:
        model: see `load`.
        data: a corpus, as `routerzoo.data.TextData` takes it.
        name: what the model is called.
        tokenizer: a name or path for `AutoTokenizer`, or `bytes`.
        text_field: name of the text in JSON, Parquet and data sets of Hugging Face.
        split: of text that has splits; `val` or `test`.
        length: tokens of a window, at most those that the model has positions for.
        batch_size: windows of a batch.
        num_batches: batches, at most.

    Raises:
        UserError: no MoE layer, no text, or a tokenizer that does not fit the model.
    """
    config = model.config.get_text_config()
    encode, decode = _tokenizer(tokenizer)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    batches, names = cut(read_documents(data, text_field, split), encode, length, batch_size, num_batches)
    largest = max((int(batch.ids_BS.max()) for batch in batches), default=0)
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} does not fit {name}: it gives the id {largest}, the model's vocabulary has "
            f"{config.vocab_size} entries: give the model's own tokenizer"
        )
    batches = [Windows(*(part.to(model.device) for part in batch)) for batch in batches]
    predicts = type(model).__name__.endswith("ForCausalLM")

    def losses(batch: Windows) -> Losses | None:
        logits_BSV = model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, **options)[0]
        return _losses(logits_BSV, batch) if predicts else None

    options = {"use_cache": False} if predicts else {}
    return Subject(
        name,
        str(data),
        model,
        batches,
        losses,
        token_ids=lambda batch: batch.ids_BS,
        groups=lambda batch: batch.documents_B if len(names) > 1 else None,
        group_kind="document",
        group_names=names,
        token_name=lambda index: repr(decode([index]))[1:-1],
    )


def load(folder: Path, device: str = "cpu") -> Any:
    """Load a model from a folder of transformers: one with routers of routerzoo, or a released Mixture of Experts.

    Raises:
        UserError: a dense model, one whose gates are not known, or files that are broken or lack weights.
    """
    try:
        import transformers

        from routerzoo import hf
        from routerzoo.hf.source import load_model
    except ImportError as error:
        raise UserError(f"{folder} is a model of transformers: {error}") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise UserError(f"{folder} is no model that transformers knows: {_sentence(error)}") from None
    except OSError as error:
        raise UserError(f"cannot read {folder}: {_sentence(error)}") from None
    architecture = (getattr(config, "architectures", None) or [""])[0]
    auto_class: Any = transformers.AutoModel
    for ending in ("ForCausalLM", "ForImageClassification"):  # those whose loss is known
        if architecture.endswith(ending):
            auto_class = getattr(transformers, "AutoModel" + ending)
    model: Any = load_model(str(folder), auto_class, {"dtype": "auto", "device_map": device}, new_heads=False)
    if getattr(config, "routing", None):
        return model
    try:
        return hf.replace_routers(model)
    except UserError as error:
        raise UserError(f"there is no routing to audit in {folder}: {error}") from None


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _losses(logits_BSV: Tensor, batch: Windows) -> Losses:
    """Return the loss of each window; one at a time, since logits in float32 are large."""
    sums = []
    for logits_SV, ids_S, mask_S in zip(logits_BSV, batch.ids_BS, batch.mask_BS, strict=True):
        losses_S = F.cross_entropy(logits_SV[:-1].float(), ids_S[1:], reduction="none")
        sums.append((losses_S * mask_S[1:]).sum())
    return Losses(torch.stack(sums), batch.mask_BS[:, 1:].sum(1))


def _tokenizer(name: str) -> tuple[Callable[[str], Sequence[int]], Callable[[list[int]], str]]:
    if name == "bytes":
        return lambda text: text.encode(), lambda ids: bytes(ids).decode("latin-1")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} has no tokenizer: give --tokenizer a name, a path or bytes ({_sentence(error)})"
        ) from None

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    return encode, lambda ids: str(tokenizer.decode(ids))
