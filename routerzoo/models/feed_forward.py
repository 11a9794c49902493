"""Feed-forward networks of any model: found by their structure, and proven by a trial.

Names and layers alone do not say what a module computes. So each network that was found is called with random weights,
beside what it is taken for: two linear maps with a known activation between them, or three of a gated network. What
computes anything else, in evaluation or in training, is refused, with the reason.
"""
# Shape suffixes: I input width, O output width.

from __future__ import annotations

import copy
import inspect
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from routerzoo.moe.activations import ACTIVATIONS, Activation
from routerzoo.moe.experts import FeedForwardWeights, LinearWeights
from routerzoo.moe.layer import MoE

INLINE = (("fc1", "fc2"), ("linear1", "linear2"), ("intermediate.dense", "output.dense"), ("ffn", "ffn_output"))
"""Linear layers that a block holds itself: those of OPT and BART, of torch's Transformer layers, of BERT, of ALBERT."""
_GATED = (("fc1_g", "fc1_x", "fc2"), ("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))
_CALLED_SO = re.compile(r"mlp|ffn|feed_?forward|glu", re.IGNORECASE)
_OTHER_ROLES = (
    (re.compile(r"mlp_tokens|token_?mix", re.IGNORECASE), "it mixes tokens, not channels"),
    (
        re.compile(r"class_?att|cls_att|class_?block|token_only|attention_?pool|attn_?pool", re.IGNORECASE),
        "it sees the tokens of class attention or pooling, not those of the blocks",
    ),
    (re.compile(r"^(experts|shared_experts?)$"), "it belongs to a MoE layer that the model has already"),
    (re.compile(r"^rel_pos$|RelPosMlp|meta_mlp|cpb_mlp|position_bias"), "it computes position biases"),
    (re.compile(r"^(head|classifier)$|(Mlp|Classifier|Classification)Head$"), "it belongs to a head"),
)
# The index is the layer's, which computes what the others do.
_ATTRIBUTES_OF_ALL = {*vars(nn.Module()), "layer_idx", "layer_id"}
_ACTIVATION = re.compile(r"act|gelu|relu|silu|swish", re.IGNORECASE)
# float32's rounding is some 1e-6 of the outputs; the two closest activations, gelu and its tanh form, are 7e-4 apart.
_TOLERANCE = 3e-5
# Clamps and branches show at large values: those of the input, and behind a norm those of the pre-activations.
_SCALES = (30.0, 1000.0)
_GRADIENT_TOLERANCE = 1e-3
_DRAWS = 8  # in training; one alone may drop nothing


_TWO_OR_THREE = "a feed-forward network has two, or three if it is gated"
_IN_TRAINING = "in training it does something else, such as a dropout that is not a module"


class Refused(ValueError):
    """A module that is not a feed-forward network that experts can replace; says why."""


class Layers(NamedTuple):
    """Names of the linear layers in the module that holds them.

    Args:
        up: into the hidden units.
        down: out of them.
        gate: of a gated network, what the activation follows.
        packed: where one layer holds gate and up, which half the gate is.
    """

    up: str
    down: str
    gate: str | None = None
    packed: Literal["gate_first", "gate_last"] | None = None

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None or self.packed is not None


@dataclass(frozen=True)
class Reading:
    """What a module was found to compute.

    Args:
        layers: its linear layers.
        activation: the function between them; None where nobody needs to know it.
        dropout: probability of dropping a hidden unit in training.
        place: the submodule that a MoE layer replaces; empty where that is the module itself.
        undone: submodules and functions that the MoE layer does the work of; identities take their place, and dropouts
            drop nothing.
        output_dropout: probability of dropping an output, where the MoE layer replaces the module itself.
    """

    layers: Layers
    activation: Activation | None
    dropout: float = 0.0
    place: str = ""
    undone: tuple[str, ...] = ()
    output_dropout: float = 0.0


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network of a model, or what looks like one.

    Args:
        names: every name of the module that holds it; it has several where it is shared.
        holder: that module.
        reading: what it computes; None where it is not to be replaced.
        reason: why it is not to be replaced.
        misread: whether the reason is that it was not understood.
    """

    names: tuple[str, ...]
    holder: nn.Module
    reading: Reading | None
    reason: str = ""
    misread: bool = False

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of its linear layers."""
        assert self.reading is not None
        layers = self.reading.layers
        names = [name for name in (layers.up, layers.gate, layers.down) if name is not None]
        return [p for name in names for p in self.holder.get_submodule(name).parameters()]

    def weights(self) -> FeedForwardWeights:
        """Return its weights."""
        assert self.reading is not None
        tensors = dict(self.holder.named_parameters(remove_duplicate=False))
        return _weights(self.holder, tensors, self.reading.layers, self.reading.activation or "gelu")

    def describe(self) -> str:
        """Return class, widths, activation and dropout in words."""
        assert self.reading is not None
        weights = self.weights()
        hidden, width = weights.up.weight_OI.shape
        parts = [f"{width} -> {hidden} -> {width}", ("gated " if weights.gate else "") + str(self.reading.activation)]
        parts += [f"dropout {self.reading.dropout:g}"] if self.reading.dropout else []
        return f"{type(self.holder).__name__}: {', '.join(parts)}"


def find_feed_forward(
    model: nn.Module, match: Callable[[nn.Module], bool] | None = None, *, exact: bool = True
) -> list[FeedForward]:
    """Return the feed-forward networks of a model in its order, and what looks like one and is not to be replaced.

    Args:
        model: any module.
        match: tells which modules are to be replaced; by default all that are feed-forward networks of blocks.
        exact: experts will compute the same function, which has to be known.
    """
    search = _Search(model, exact)
    if match is None:
        return search.below(model, [])
    matched = [module for module in model.modules() if match(module)]
    return [search.read(module) for module in matched]


class _Search:
    def __init__(self, model: nn.Module, exact: bool) -> None:
        self.model, self.exact = model, exact
        self.places: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.places.setdefault(id(module), []).append(name)
        self.owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.owners.setdefault(id(parameter), []).append(name)
        # Blocks of a model are alike, and a trial of one is a trial of all.
        self.tried: dict[Any, Reading | Refused] = {}
        self.seen: set[int] = set()

    def below(self, module: nn.Module, ancestors: list[nn.Module]) -> list[FeedForward]:
        """Return what is found in a module, innermost first: what holds a network stays as it is."""
        if id(module) in self.seen or isinstance(module, MoE):
            return []
        self.seen.add(id(module))
        found = [f for child in module.children() for f in self.below(child, [*ancestors, module])]
        if any(f.reading is not None for f in found):
            return found
        called_so = any(
            _CALLED_SO.search(name) for name in (type(module).__name__, self.places[id(module)][0].rpartition(".")[2])
        )
        if not _is_candidate(module):
            if not called_so or found or not (reason := _unread(module)):
                return found
            unread = FeedForward(tuple(self.places[id(module)]), module, None, reason, misread=True)
            other = self._other_role(unread, ancestors)
            return [replace(unread, reason=other, misread=False) if other else unread]
        read = self.read(module)
        if reason := self._other_role(read, ancestors):
            read = replace(read, reading=None, reason=reason, misread=False)
        listed = called_so or _named_layers(module) or _is_stack(module)
        return [*found, read] if read.reading is not None or listed else found

    def read(self, holder: nn.Module) -> FeedForward:
        """Return what a module computes, or why it is not to be replaced."""
        names = tuple(self.places[id(holder)])
        try:
            key = _signature(holder)
            if key not in self.tried:
                try:
                    self.tried[key] = _read(holder, self.exact)
                except Refused as refused:
                    self.tried[key] = refused
            reading = self.tried[key]
            if isinstance(reading, Refused):
                raise reading
            self._check_surroundings(holder, names, reading)
        except Refused as refused:
            return FeedForward(names, holder, None, str(refused), misread=True)
        return FeedForward(names, holder, reading)

    def _check_surroundings(self, holder: nn.Module, names: tuple[str, ...], reading: Reading) -> None:
        if not reading.place and "" in names:
            raise Refused("it is the model itself, which cannot be replaced in place: build MoE(d_model=...) instead")
        layers = (reading.layers.up, reading.layers.down)
        gone = [holder.get_submodule(name) for name in layers] if reading.place else [holder]
        for module in gone:
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                raise Refused("it has hooks, which would be lost")
            prefixes = tuple(f"{place}." if place else "" for place in self.places[id(module)])
            for parameter in module.parameters():
                elsewhere = [name for name in self.owners[id(parameter)] if not name.startswith(prefixes)]
                if elsewhere:
                    raise Refused(f"it shares its weights with {elsewhere[0]}")

    def _other_role(self, read: FeedForward, ancestors: list[nn.Module]) -> str:
        called = [*read.names[0].split("."), *(type(module).__name__ for module in [*ancestors[1:], read.holder])]
        for pattern, reason in _OTHER_ROLES:
            if any(pattern.search(name) for name in called):
                return reason
        if read.reading is None:
            return ""
        hidden, width = read.weights().up.weight_OI.shape
        if hidden < width:
            return f"its {hidden} hidden units are fewer than its {width} inputs, as an adapter's or a squeeze's"
        norms = [_norm_width(child) for child in ancestors[-1].children()] if ancestors else []
        widths = {norm for norm in norms if norm is not None}
        if widths and width not in widths and not read.reading.place:
            return f"its width is {width}, that of the norms beside it {min(widths)}: it mixes something else"
        return ""


def substitute(holder: nn.Module, reading: Reading, replacement: nn.Module) -> None:
    """Put a module at a reading's place inside the holder, and undo what it does the work of."""
    for path in reading.undone:
        owner_name, _, name = path.rpartition(".")
        owner = holder.get_submodule(owner_name)
        work = getattr(owner, name)
        if isinstance(work, _DropoutNd):
            work.p = 0.0
        elif isinstance(work, float):
            setattr(owner, name, 0.0)
        else:
            setattr(owner, name, nn.Identity() if isinstance(work, nn.Module) else _identity)
        if hasattr(owner, "activation_relu_or_gelu"):
            owner.activation_relu_or_gelu = 0  # type: ignore[assignment]  # else torch's fast path reads the weights
    _set(holder, reading.place, replacement)


def _identity(x: Tensor) -> Tensor:
    return x


def _set(holder: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(holder.get_submodule(owner), name, module)


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's: a linear layer whose weight is transposed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child
        for name, child in module.named_modules()
        if (isinstance(child, nn.Linear) or _is_conv1d(child)) and "weight" in child._parameters
    }


def _norm_width(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("Norm") or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    return weight.shape[0]


def _named_layers(module: nn.Module) -> list[tuple[str, ...]]:
    linears = _linears(module)
    return [names for names in (*INLINE, *_GATED) if all(name in linears for name in names)]


def _is_candidate(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) and len(_linears(module)) in (2, 3):
        return True
    return any(names in INLINE for names in _named_layers(module))


def _is_stack(module: nn.Module) -> bool:
    # Linear layers, what has no weights, and nothing else, one after the other.
    if not isinstance(module, nn.Sequential):
        return False
    weighty = [child for child in module if list(child.parameters())]
    return len(weighty) > 1 and all(isinstance(child, nn.Linear) for child in weighty)


def _unread(module: nn.Module) -> str:
    """Return why a module that is called a feed-forward network is not tried; nothing where it is none."""
    parts = [(name, part) for name, part in module.named_modules() if name]
    computed = [name for name, part in parts if isinstance(part, nn.Linear) and "weight" not in part._parameters]
    if computed:
        return f"it computes the weights of {', '.join(computed)}, as weight_norm does: remove that first"
    convolutions = [name for name, part in parts if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)]
    if len(convolutions) > 1:
        return f"{', '.join(convolutions)} are convolutions, experts have linear layers"
    number = len(_linears(module))
    return f"it has {number} linear layers, {_TWO_OR_THREE}" if number > 1 else ""


def _signature(holder: nn.Module) -> Any:
    """Return what tells modules apart that may compute different functions."""

    def plain(module: nn.Module) -> Iterator[tuple[str, str]]:
        for name, value in sorted(vars(module).items()):
            if name not in _ATTRIBUTES_OF_ALL:
                yield name, str(id(value)) if isinstance(value, Tensor) else repr(value)

    parts = [(name, type(module), *plain(module)) for name, module in holder.named_modules()]
    shapes = [(name, p.shape, p.dtype, p.device) for name, p in holder.named_parameters()]
    return repr((parts, shapes)), repr(holder)


def _weights(
    holder: nn.Module, tensors: Mapping[str, Tensor], layers: Layers, activation: Activation
) -> FeedForwardWeights:
    def linear(name: str) -> LinearWeights:
        weight = tensors[f"{name}.weight"]
        return LinearWeights(
            weight.T if _is_conv1d(holder.get_submodule(name)) else weight, tensors.get(f"{name}.bias")
        )

    up, down = linear(layers.up), linear(layers.down)
    gate = None if layers.gate is None else linear(layers.gate)
    if layers.packed is not None:
        biases = (None, None) if up.bias_O is None else up.bias_O.chunk(2)
        first, second = (LinearWeights(*half) for half in zip(up.weight_OI.chunk(2), biases, strict=True))
        gate, up = (first, second) if layers.packed == "gate_first" else (second, first)
    return FeedForwardWeights(up, down, gate, activation)


def _compute(weights: FeedForwardWeights, x: Tensor, hidden_scale: float = 1.0) -> Tensor:
    activation = ACTIVATIONS[weights.activation]
    up = F.linear(x, *weights.up)
    hidden = activation(up) if weights.gate is None else activation(F.linear(x, *weights.gate)) * up
    return F.linear(hidden * hidden_scale, *weights.down)


def _assignments(holder: nn.Module, names: tuple[str, ...]) -> list[tuple[int, Layers]]:
    """Return what the linear layers can be by their shapes, and the model width that follows, narrow ones first."""
    tensors = dict(holder.named_parameters(remove_duplicate=False))
    shapes = {}
    for name in names:
        shape = tuple(tensors[f"{name}.weight"].shape)
        shapes[name] = shape[::-1] if _is_conv1d(holder.get_submodule(name)) else shape
    found = []
    for *ups, down in itertools.permutations(names):
        width, hidden = shapes[down]
        if all(shapes[up] == (hidden, width) for up in ups):
            found.append((width, Layers(ups[0], down) if len(ups) == 1 else Layers(ups[0], down, gate=ups[1])))
        elif len(ups) == 1 and shapes[ups[0]] == (2 * hidden, width):
            found += [(width, Layers(ups[0], down, packed=half)) for half in ("gate_first", "gate_last")]
    return sorted(found, key=lambda each: each[0])


def _first(
    trial: Callable[[int, list[Layers]], Reading | None], assignments: list[tuple[int, Layers]]
) -> Reading | None:
    """Return the first reading that a trial gives, over the widths that the input may have."""
    refusals, widths = [], 0
    for width, group in itertools.groupby(assignments, key=lambda each: each[0]):
        widths += 1
        try:
            if reading := trial(width, [layers for _, layers in group]):
                return reading
        except Refused as refused:  # with inputs of the wrong width nothing can be tried
            refusals.append(refused)
    if refusals and len(refusals) == widths:
        raise refusals[0]
    return None


@torch.no_grad()
def _read(holder: nn.Module, exact: bool) -> Reading:
    linears = _linears(holder)
    inline = [names for names in _named_layers(holder) if names in INLINE]
    if len(linears) not in (2, 3) and not inline:
        raise Refused(f"it has {len(linears)} linear layers, {_TWO_OR_THREE}")
    names = inline[0] if inline else tuple(linears)
    known = {id(p) for name in names for p in linears[name].parameters(recurse=False)}
    beside = _beside(holder, known)
    assignments = _assignments(holder, names)
    if not assignments:
        shapes = ", ".join(f"{name} {list(linears[name].weight.shape)}" for name in names)  # type: ignore[arg-type]
        raise Refused(f"its output is not as wide as its input, or its layers do not fit each other ({shapes})")
    between = f"{'two' if len(names) == 2 else 'three'} linear maps with one of {', '.join(ACTIVATIONS)} between them"
    instead = ""
    if not beside:
        trial = _Trial(holder)
        if reading := _first(trial.whole, assignments):
            return reading
        if trial.further:
            instead = f"it takes other arguments ({', '.join(trial.further)}), a MoE layer hidden states alone"
        elif trial.in_tuple:
            instead = "it returns a tuple, a MoE layer a tensor"
        if not exact and (reading := _first(_Trial(holder).ends_in_down, assignments)):
            return reading
    few = len(linears) in (2, 3)
    if len(names) == 2:
        try:
            if reading := _first(_Trial(holder).inline, [each for each in assignments if each[1].gate is None]):
                return reading
        except Refused:
            if not (few and beside):
                raise
    if few and beside:
        raise Refused(f"it holds {', '.join(beside)}, which experts have no counterpart of in that place")
    if instead:
        raise Refused(instead)
    raise Refused(f"{', '.join(names)} are not {between}, or what is between them is no module that can be taken out")


def _beside(holder: nn.Module, known: set[int]) -> list[str]:
    """Return the submodules with parameters or buffers beside the known ones."""
    found = []
    for name, module in holder.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(id(tensor) not in known for tensor in own):
            found.append(f"{name or 'parameters'} ({type(module).__name__})")
    return found


class _Reference(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.p = 0.0  # of the dropout in whose place it may be

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Trial:
    """Copies of a module, called with random weights. The module itself is not touched."""

    def __init__(self, holder: nn.Module) -> None:
        self.holder = holder
        first = next(holder.parameters())
        self.device = torch.device("cpu") if first.is_meta else first.device
        generator = torch.Generator("cpu").manual_seed(0)
        self.values: dict[str, Tensor] = {}
        for name, parameter in holder.named_parameters():
            if not parameter.is_floating_point():
                raise Refused(f"its parameter {name} is not of floating point")
            drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            if parameter.ndim > 1:  # so that hidden units are of the size 1, where activations differ
                drawn = (2 * drawn - 1) * (3 / min(parameter.shape[-1], parameter.shape[0])) ** 0.5
            else:
                drawn = 2 * drawn - 1 if name.endswith("bias") else drawn + 0.5
            self.values[name] = drawn.to(self.device)
        for name, buffer in holder.named_buffers():
            kept = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu") if buffer.is_meta else buffer.detach()
            self.values[name] = (kept.float() if kept.is_floating_point() else kept).to(self.device)
        self.generator = generator
        self.further = [parameter.name for parameter in _required(holder)[1:]]
        self.in_tuple = self.draws_numbers = False  # whether the last call returned one, drew random ones
        self.dropouts = {n: m.p for n, m in holder.named_modules() if isinstance(m, _DropoutNd)}
        self.base = self._copy(holder)
        for name in self.dropouts:
            self.base.get_submodule(name).p = 0.0  # type: ignore[assignment]

    def _copy(self, module: nn.Module) -> nn.Module:
        references = [m for m in module.modules() if isinstance(m, _Reference)]
        shared = [*module.parameters(), *module.buffers(), *references]
        try:
            return copy.deepcopy(module, {id(part): part for part in shared})
        except Exception as error:  # a module may hold anything
            raise Refused(f"it cannot be copied, to be tried ({type(error).__name__}: {error})") from error

    def _draw(self, width: int) -> None:
        drawn = torch.randn(2, 3, width, generator=self.generator, dtype=torch.float32, device="cpu")
        self.x = drawn.to(self.device)

    def _call(self, module: nn.Module, training: bool = False, seed: int = 0) -> Tensor:
        own = {name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())}
        values = {name: value for name, value in self.values.items() if name in own}
        devices = [self.device] if self.device.type == "cuda" else []
        required = _required(module)
        failure: Exception | None = None
        # Further arguments are masks, which may be None, or other hidden states.
        for further in (None, self.x)[: len(required)]:
            try:
                with (
                    torch.device(self.device),
                    torch.autocast(self.device.type, enabled=False),
                    torch.random.fork_rng(devices),
                    _own_random_numbers(seed),
                ):
                    torch.manual_seed(seed)
                    before = _random_state(devices)
                    positional = [p for p in required[1:] if p.kind is not p.KEYWORD_ONLY]
                    named = {p.name: further for p in required[1:] if p.kind is p.KEYWORD_ONLY}
                    arguments = (self.x, *[further] * len(positional))
                    output = torch.func.functional_call(module.train(training), values, arguments, named)
                    self.draws_numbers = _random_state(devices) != before
                break
            except Exception as error:  # a module may raise anything
                failure = failure or error
        else:
            why = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            raise Refused(f"it cannot be tried with hidden states alone ({why})") from failure
        self.in_tuple = isinstance(output, tuple)
        if self.in_tuple and len(output) == 1:
            (output,) = output
        elif self.in_tuple:  # what comes beside the output must stay as it was too
            parts = [part for part in tree_leaves(output) if isinstance(part, Tensor) and part.is_floating_point()]
            output = torch.cat([part.float().flatten() for part in parts]) if parts else None
        if not isinstance(output, Tensor):
            raise Refused(f"it returns a {'tuple' if self.in_tuple else type(output).__name__}")
        return output

    def _network(self, layers: Layers, activation: Activation) -> FeedForwardWeights:
        return _weights(self.holder, self.values, layers, activation)

    def whole(self, width: int, assignments: list[Layers]) -> Reading | None:
        """Read a module that is a network and nothing else."""
        self._draw(width)
        output = self._call(self.base)
        if self.in_tuple or self.further:  # a MoE layer takes hidden states alone, and returns a tensor
            return None
        for layers, activation in itertools.product(assignments, ACTIVATIONS):
            network = self._network(layers, activation)
            if not _same(output, _compute(network, self.x)):
                continue
            self._check_large(layers, activation, lambda network: _compute(network, self.x))
            self._check_gradients(layers, activation, lambda network: _compute(network, self.x))
            reading = Reading(layers, activation)
            for name, p in self.dropouts.items():
                if p == 0:
                    continue
                doubled = self._call(self._doubling(self.base, name))
                if _same(doubled, _compute(network, self.x, hidden_scale=2)):
                    reading = replace(reading, dropout=_both(reading.dropout, p))
                elif _same(doubled, 2 * _compute(network, self.x)):
                    reading = replace(reading, output_dropout=_both(reading.output_dropout, p))
                elif not _same(doubled, output):
                    raise Refused(f"its dropout {name} is neither on the hidden units nor on the output")
            self._check_training(self.base, lambda _: output)
            if self.draws_numbers:
                raise Refused(_IN_TRAINING)
            return reading
        return None

    def ends_in_down(self, width: int, assignments: list[Layers]) -> Reading | None:
        """Read a module whose output is its last linear map's, whatever is before that."""
        self._draw(width)
        output, own = self._call(self.base), self.values
        if self.in_tuple or self.further:
            return None
        for layers in assignments:
            last = {name: 2 * value for name, value in own.items() if name.startswith(f"{layers.down}.")}
            self.values = {**own, **last}
            doubled = self._call(self.base)
            self.values = own
            if _same(doubled, 2 * output):
                return Reading(layers, None)
        return None

    def inline(self, width: int, assignments: list[Layers]) -> Reading | None:
        """Read a network whose layers are called by a module that does other things too."""
        self._draw(width)
        output = self._call(self.base)
        for layers in assignments:
            undone = (*_activations(self.holder, layers), layers.down)
            for activation in ACTIVATIONS:
                reading = Reading(layers, activation, place=layers.up, undone=undone)
                network = self._network(layers, activation)
                if not _same(self._call_without(reading, network), output):
                    continue
                self._check_large(layers, activation, partial(self._call_without, reading))
                self._check_gradients(layers, activation, partial(self._call_without, reading))
                return self._with_dropout(reading, network)
        return None

    def _with_dropout(self, reading: Reading, network: FeedForwardWeights) -> Reading:
        output = self._call(self.base)
        for name, p in self.dropouts.items():
            if p == 0:
                continue
            doubled = self._call(self._doubling(self.base, name))
            if _same(doubled, output):
                continue
            after = replace(reading, undone=(*reading.undone, name))
            if _same(doubled, self._call(self._doubling(self._without(self.base, reading, network), name))):
                continue
            if not _same(doubled, self._call(self._without(self.base, after, network, hidden_scale=2))):
                raise Refused(f"its dropout {name} is neither on the hidden units nor outside the network")
            reading = replace(after, dropout=_both(reading.dropout, p))
        base = self._copy(self.base)
        owner = reading.place.rpartition(".")[0]
        own = f"{owner}.activation_dropout".lstrip(".")
        p = getattr(self.holder.get_submodule(owner), "activation_dropout", 0.0)
        if isinstance(p, float) and p > 0:
            base.get_submodule(owner).activation_dropout = 0.0  # type: ignore[assignment]
            reading = replace(reading, undone=(*reading.undone, own), dropout=_both(reading.dropout, p))
        replaced = self._without(base, reading, network)
        self._check_training(base, lambda seed: self._call(replaced, training=True, seed=seed))
        return reading

    def _call_without(self, reading: Reading, network: FeedForwardWeights) -> Tensor:
        return self._call(self._without(self.base, reading, network))

    def _check_large(
        self, layers: Layers, activation: Activation, expected: Callable[[FeedForwardWeights], Tensor]
    ) -> None:
        x, values = self.x, self.values
        inward = tuple(f"{name}." for name in (layers.up, layers.gate) if name is not None)
        try:
            for scale in _SCALES:
                scaled = {name: scale * v if name.startswith(inward) else v for name, v in values.items()}
                for self.x, self.values in ((scale * x, values), (x, scaled)):
                    if not _same(self._call(self.base), expected(self._network(layers, activation))):
                        raise Refused("it computes something else where values are large, such as a clamp")
        finally:
            self.x, self.values = x, values

    def _check_gradients(
        self, layers: Layers, activation: Activation, expected: Callable[[FeedForwardWeights], Tensor]
    ) -> None:
        x, values = self.x, self.values
        name = f"{layers.down}.weight"
        try:
            self.x, down = x.clone().requires_grad_(), values[name].clone().requires_grad_()
            self.values = {**values, name: down}
            with torch.enable_grad():
                outputs = [self._call(self.base), expected(self._network(layers, activation))]
                gradients = [_gradients(output, (self.x, down)) for output in outputs]
        except RuntimeError as error:  # of a backward pass
            raise Refused(f"its gradients cannot be tried ({str(error).splitlines()[0]})") from error
        finally:
            self.x, self.values = x, values
        for gradient, wanted in zip(*gradients, strict=True):
            if (gradient - wanted).abs().max() > _GRADIENT_TOLERANCE * wanted.abs().max():
                raise Refused("its gradients are others, as where something is detached")

    def _check_training(self, module: nn.Module, expected: Callable[[int], Tensor]) -> None:
        for seed in range(_DRAWS):
            if not _same(self._call(module, training=True, seed=seed), expected(seed)):
                raise Refused(_IN_TRAINING)

    def _without(
        self, module: nn.Module, reading: Reading, network: FeedForwardWeights, hidden_scale: float = 1.0
    ) -> nn.Module:
        replaced = self._copy(module)
        substitute(replaced, reading, _Reference(lambda x: _compute(network, x, hidden_scale)))
        return replaced

    def _doubling(self, module: nn.Module, name: str) -> nn.Module:
        doubling = self._copy(module)
        _set(doubling, name, _Reference(lambda x: 2 * x))
        return doubling


def _activations(holder: nn.Module, layers: Layers) -> list[str]:
    """Return what may be the activation between two layers: modules without parameters, and functions."""
    if isinstance(holder, nn.Sequential):
        names = list(holder._modules)
        first, last = names.index(layers.up.partition(".")[0]), names.index(layers.down.partition(".")[0])
        outside = [holder._modules[name] for name in (*names[:first], *names[last + 1 :])]
        for module in outside:
            if not isinstance(module, nn.Identity | _DropoutNd) and _norm_width(module) is None:
                raise Refused(f"it holds a {type(module).__name__} beside the network")
        inner = [(name, holder._modules[name]) for name in names[first + 1 : last]]
        return [name for name, module in inner if not isinstance(module, nn.Identity | _DropoutNd)]
    found = []
    for owner in dict.fromkeys(["", layers.up.rpartition(".")[0]]):
        module = holder.get_submodule(owner)
        plain = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
        called = dict.fromkeys(plain, "")
        for name, child in module.named_children():
            if not list(child.parameters()) and not isinstance(child, nn.Identity | _DropoutNd):
                called[name] = type(child).__name__
        found += [f"{owner}.{n}".lstrip(".") for n, kind in called.items() if _ACTIVATION.search(f"{n} {kind}")]
    return found


def _gradients(output: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    cotangent = torch.linspace(-1, 2, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
    found = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def _required(module: nn.Module) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return [each for each in parameters if each.default is each.empty and each.kind in kinds]


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Seed Python's generator, and put it back afterwards."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _random_state(devices: list[torch.device]) -> list[Any]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    return [random.getstate(), *(state.tolist() for state in states)]


def _both(first: float, second: float) -> float:
    return 1 - (1 - first) * (1 - second) if first else second


def _same(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    return bool((output - expected).abs().max() <= _TOLERANCE * expected.std())
