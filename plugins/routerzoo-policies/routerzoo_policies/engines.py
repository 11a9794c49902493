"""Routes of inference engines, `routed_experts` of vLLM and SGLang: read for replay, and written."""
# Shape suffixes: B sequences, S tokens of one, T tokens of a batch, L layers of an engine's array, K choices per token.

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from routerzoo import Routing, moe_layers
from routerzoo_policies.replay import UNKNOWN

NPY = b"\x93NUMPY"
RAW_DTYPES = {1: np.dtype("uint8"), 2: np.dtype("uint16"), 4: np.dtype("int32")}
"""Of payloads that do not name it, by the bytes of an entry."""
Engine = Literal["vllm", "sglang"]


def read_routed_experts(payload: Any, *, num_layers: int | None = None, top_k: int | None = None) -> np.ndarray:
    """Return the expert ids of an engine's answer for one sequence, int64 `[tokens, layers, k]`.

    Args:
        payload: any of

            - an array, a tensor or nested lists: `CompletionOutput.routed_experts` of vLLM's Python interface;
            - a string of vLLM's servers, `choices[i]["routed_experts"]`: a `.npy` file in base64;
            - a string of SGLang, `meta_info["routed_experts"]`: int32 in base64, without its shape;
            - a mapping with `data`, `shape` and, if it says so, `dtype`, as routers in front of vLLM give;
            - a whole answer of one completion, as its JSON was decoded, that holds one of these; where vLLM splits
              prompt and completion (`prompt_routed_experts`), they are joined.
        num_layers: layers of the array, for SGLang's strings. Both engines count all hidden layers, dense ones too.
        top_k: experts per token, likewise.

    Raises:
        ValueError: no routes, those of several completions, or another form.
    """
    if isinstance(payload, Mapping) and "data" not in payload:
        prompt, rest = _in_answer(payload)
        parts = [read_routed_experts(p, num_layers=num_layers, top_k=top_k) for p in (prompt, rest) if p is not None]
        return np.concatenate(parts) if parts else read_routed_experts(None)
    if payload is None:
        raise ValueError(
            "the engine gave no routes: start it with --enable-return-routed-experts; a request to SGLang sets "
            "return_routed_experts too"
        )
    if isinstance(payload, (str, bytes)):
        array = _decoded(payload, num_layers, top_k)
    elif isinstance(payload, Mapping):
        raw, shape = _bytes_of(payload["data"]), tuple(payload["shape"])
        size = int(np.prod(shape))
        dtype: Any = np.dtype(payload["dtype"]) if payload.get("dtype") else RAW_DTYPES.get(len(raw) // max(size, 1))
        if dtype is None or len(raw) != size * dtype.itemsize:
            raise ValueError(f"routed_experts of shape {list(shape)} cannot have {len(raw)} bytes")
        array = np.frombuffer(raw, dtype).reshape(shape)
    else:
        array = payload.cpu().numpy() if isinstance(payload, Tensor) else np.asarray(payload)
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise ValueError(
            f"routed_experts are integers [tokens, layers, k], got {array.dtype} of shape {list(array.shape)}: give "
            "the routes of one sequence at a time"
        )
    return array.astype(np.int64)


def routings_from_engine(
    model: nn.Module,
    routes: Sequence[Any],
    tokens: Tensor | Sequence[int],
    *,
    columns: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    num_layers: int | None = None,
) -> dict[int, list[Routing]]:
    """Return what `replay` takes, so that training routes as the rollout did.

    The last sampled token was never an input of the engine, and has no routes; some trainers append a row of zeros for
    it. It, padding, and tokens before a start are routed by the model itself.

    Args:
        model: the model that is trained.
        routes: of each sequence, what `read_routed_experts` takes.
        tokens: where the sequences are in the batch: a bool or 0/1 mask `[B, S]` of their tokens, as an
            `attention_mask` is, padded on any side; or the length of each, of sequences packed one behind the other.
        columns: which layer of the array each of `moe_layers(model)` is; by default found by their number, or else by
            the number in their modules' names (`model.layers.3.mlp`).
        starts: the token that each sequence's routes start at, where the request asked for a part
            (`routed_experts_start_len` of SGLang, `routed_experts_prompt_start` of vLLM) or the engine leaves out a
            prefix that it has cached; by default what the answer says of it (`start` beside `data`,
            `meta_info["routed_experts_start_len"]`), or 0.
        num_layers: layers of the array, for SGLang's strings; by default `model.config.num_hidden_layers`, or the
            number of MoE layers.

    Raises:
        ValueError: routes of other tokens, layers or experts than the model's, or an expert twice for one token, as
            where an engine recorded nothing and leaves zeros.

    Example:
        >>> import torch
        >>> from routerzoo import MoE
        >>> from routerzoo_policies import replay
        >>> layer = MoE(d_model=8, num_experts=4)
        >>> routes = routings_from_engine(layer, [[[[3, 0]], [[1, 2]]]], [3])
        >>> with replay(layer, routes):
        ...     y = layer(torch.randn(3, 8))
    """
    layers = list(moe_layers(model))
    config: Any = getattr(model, "config", None)
    counted = num_layers or getattr(config, "num_hidden_layers", None) or len(layers)
    top_k = _top_k(layers)
    arrays = [read_routed_experts(route, num_layers=counted, top_k=top_k) for route in routes]
    rows = _rows(tokens, len(arrays))
    chosen = _columns(model, arrays[0].shape[1] if arrays else counted, columns)
    begins = [_start(route) for route in routes] if starts is None else list(starts)
    if len(begins) != len(arrays):
        raise ValueError(f"there are {len(arrays)} sequences and {len(begins)} starts")
    total = tokens.numel() if isinstance(tokens, Tensor) else sum(tokens)
    widths = {array.shape[1:] for array in arrays}
    if len(widths) > 1:
        raise ValueError(f"the sequences' routes have different layers or k: {sorted(widths)}")
    shape = (total, *(arrays[0].shape[1:] if arrays else (counted, top_k)))
    experts_TLK = np.full(shape, UNKNOWN, np.int64)
    for place, (array, rows_S, start) in enumerate(zip(arrays, rows, begins, strict=True)):
        if len(array) + start not in (len(rows_S) - 1, len(rows_S)):
            raise ValueError(
                f"the routes of sequence {place} are of tokens {start} to {start + len(array) - 1}, the sequence has "
                f"{len(rows_S)} tokens: routes cover all, or all but the last one"
            )
        if len(array) + start == len(rows_S) and top_k > 1 and not array[-1:].any():
            array = array[:-1]  # zeros for the token that was no input
        experts_TLK[rows_S[start : start + len(array)]] = array
        _check_distinct(array[:, chosen], place, start)
    routings = {}
    for index, (layer, column) in enumerate(zip(layers, chosen, strict=True)):
        experts_TK = torch.from_numpy(experts_TLK[:, column].copy())
        if experts_TK.numel() and not UNKNOWN <= int(experts_TK.min()) <= int(experts_TK.max()) < layer.num_experts:
            raise ValueError(
                f"the routes name expert {int(experts_TK.max())}, MoE layer {index} has {layer.num_experts}: routes "
                "must name the model's own experts, without fused shared ones and redundant copies"
            )
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        # Engines give no weights; NaN is refused where recorded ones are to be replayed.
        weights_TK = torch.full(experts_TK.shape, torch.nan)
        routings[index] = [Routing(experts_TK.to(device), weights_TK.to(device))]
    return routings


def routed_experts(
    routings: Mapping[int, Sequence[Routing]],
    tokens: Tensor | Sequence[int],
    *,
    columns: Sequence[int] | None = None,
    num_layers: int | None = None,
    last: bool = False,
) -> list[np.ndarray]:
    """Return recorded routings as an engine would give them: for each sequence `[tokens, layers, k]`.

    They are of the smallest dtype that vLLM takes, uint8 or uint16; of int32 where some token has fewer than k experts,
    which are -1.

    Args:
        routings: what `Recording.joined` gives: of each layer, the routing of its one call.
        tokens: see `routings_from_engine`.
        columns: the layer of the array that each of these is; by default their order.
        num_layers: layers of the array; those that nothing was recorded for are 0.
        last: keep the last token of each sequence, which engines leave out.

    Raises:
        ValueError: layers that are called several times, or differ in k, or name no k experts for each token.
    """
    order = sorted(routings)
    places = list(range(len(order))) if columns is None else list(columns)
    if len(places) != len(order):
        raise ValueError(f"there are {len(order)} recorded layers and {len(places)} columns")
    found = []
    for index in order:
        calls = routings[index]
        if len(calls) != 1 or calls[0].experts_TK is None:
            raise ValueError(
                f"MoE layer {index} has {len(calls)} calls, or no k experts for each token: engines have no form for it"
            )
        found.append(calls[0].experts_TK.cpu().numpy())
    shapes = {one.shape for one in found}
    if len(shapes) != 1:
        raise ValueError(f"the layers' routings have different shapes [tokens, k]: {sorted(shapes)}")
    experts_TLK = np.zeros((found[0].shape[0], num_layers or max(places) + 1, found[0].shape[1]), np.int64)
    for place, one in zip(places, found, strict=True):
        experts_TLK[:, place] = one
    largest, smallest = (int(experts_TLK.max()), int(experts_TLK.min())) if experts_TLK.size else (0, 0)
    dtype = np.int32 if smallest < 0 else np.uint8 if largest < 256 else np.uint16
    rows = _rows(tokens, len(tokens))
    return [experts_TLK[rows_S if last else rows_S[:-1]].astype(dtype) for rows_S in rows]


def encode_routed_experts(array: np.ndarray, engine: Engine) -> str:
    """Return the base64 string that an engine's server answers with: a `.npy` file (vLLM) or int32 (SGLang)."""
    if engine == "sglang":
        return base64.b64encode(np.ascontiguousarray(array, np.int32).tobytes()).decode()
    if engine != "vllm":
        raise ValueError(f"engine must be vllm or sglang, got {engine!r}")
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def _in_answer(answer: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the routes of prompt and rest in an answer's JSON."""
    choices = answer.get("choices") or [{}]
    if len(choices) > 1:
        raise ValueError(
            f"the answer has {len(choices)} completions: give the routes of one at a time, such as "
            "{'choices': [answer['choices'][0]]}"
        )
    choice = choices[0]
    for holder in (answer, answer.get("meta_info"), answer.get("sglext"), answer.get("sgl_ext"), choice):
        if holder and holder.get("routed_experts") is not None:
            return answer.get("prompt_routed_experts"), holder["routed_experts"]
    for name in ("meta_info", "sglext", "sgl_ext"):
        if choice.get(name) and choice[name].get("routed_experts") is not None:
            return None, choice[name]["routed_experts"]
    return answer.get("prompt_routed_experts"), None


def _start(payload: Any) -> int:
    """Return the index of the token that the routes start at; 0 where the answer does not give one."""
    if not isinstance(payload, Mapping):
        return 0
    if "data" in payload:
        return int(payload.get("start") or 0)
    prompt, rest = _in_answer(payload)
    if prompt is not None:
        return _start(prompt)
    for holder in (payload, (payload.get("choices") or [{}])[0]):
        start = (holder.get("meta_info") or {}).get("routed_experts_start_len")
        if start:
            return int(start)
    return _start(rest)


def _check_distinct(experts_SLK: np.ndarray, sequence: int, start: int) -> None:
    ordered_SLK = np.sort(experts_SLK, axis=-1)
    twice_SL = ((ordered_SLK[..., 1:] == ordered_SLK[..., :-1]) & (ordered_SLK[..., 1:] >= 0)).any(-1)
    if twice_SL.any():
        token, layer = np.argwhere(twice_SL)[0]
        raise ValueError(
            f"the routes of sequence {sequence} name an expert twice for token {start + token} in MoE layer {layer}, "
            f"{experts_SLK[token, layer].tolist()}: the engine recorded nothing there; begin after it (starts), and "
            "the model itself routes what is before"
        )


def _decoded(payload: str | bytes, num_layers: int | None, top_k: int | None) -> np.ndarray:
    raw = _bytes_of(payload)
    if raw.startswith(NPY):
        loaded: np.ndarray = np.load(io.BytesIO(raw), allow_pickle=False)
        return loaded
    if not num_layers or not top_k:
        raise ValueError("routed_experts of SGLang come without their shape: give num_layers and top_k")
    if len(raw) % (4 * num_layers * top_k):
        raise ValueError(f"{len(raw)} bytes are no int32 array of {num_layers} layers and {top_k} experts per token")
    return np.frombuffer(raw, np.int32).reshape(-1, num_layers, top_k)


def _bytes_of(payload: str | bytes) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"routed_experts are not in base64: {error}") from None


def _rows(tokens: Tensor | Sequence[int], num_sequences: int) -> list[np.ndarray]:
    """Return the places of each sequence's tokens in the batch."""
    if isinstance(tokens, Tensor):
        if tokens.ndim != 2:
            raise ValueError(f"the mask of tokens is [sequences, tokens], got {list(tokens.shape)}")
        places_BS = np.arange(tokens.numel()).reshape(tokens.shape)
        rows = [places_S[mask_S] for places_S, mask_S in zip(places_BS, tokens.bool().cpu().numpy(), strict=True)]
    else:
        ends = np.cumsum(tokens)
        rows = [np.arange(end - length, end) for end, length in zip(ends, tokens, strict=True)]
    if len(rows) != num_sequences:
        raise ValueError(f"there are {num_sequences} sequences of routes and {len(rows)} of tokens")
    return rows


def _columns(model: nn.Module, num_columns: int, columns: Sequence[int] | None) -> list[int]:
    layers = list(moe_layers(model))
    if columns is None and num_columns == len(layers):
        return list(range(num_columns))
    if columns is None:
        # Engines count all hidden layers, dense ones too; the blocks' numbers are in the names of their modules.
        names = {module: name for name, module in model.named_modules()}
        numbers = [re.search(r"\d+", names[layer]) for layer in layers]
        found = [int(number[0]) for number in numbers if number is not None]
        if len(set(found)) != len(layers) or max(found, default=0) >= num_columns:
            raise ValueError(
                f"the routes have {num_columns} layers, the model {len(layers)} MoE layers: say by columns= which is "
                "which"
            )
        return found
    if len(columns) != len(layers) or not all(0 <= column < num_columns for column in columns):
        raise ValueError(
            f"columns must name one of {num_columns} layers of the routes for each of {len(layers)} MoE layers, got "
            f"{list(columns)}"
        )
    return list(columns)


def _top_k(layers: Sequence[Any]) -> int:
    from routerzoo.moe.layer import inner_router

    ks = {inner_router(layer).top_k for layer in layers}
    if not ks:
        raise ValueError("the model has no MoE layer to replay routes in")
    return int(max(ks))
