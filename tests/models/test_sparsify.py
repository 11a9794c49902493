"""`sparsify` replaces what is a feed-forward network, keeps what surrounds it, and says what it leaves alone."""

import random
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.testing import assert_close
from torchvision.models import VisionTransformer

from routerzoo import MLPExperts, MoE, SwiGLUExperts, moe_layers, plan_sparsify, sparsify
from routerzoo.moe.activations import ACTIVATIONS


class Mlp(nn.Module):
    def __init__(self, width=16, hidden=32, out=16, act=nn.GELU, dropout=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), act(), nn.Linear(hidden, out)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class ConvMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3, padding=1, groups=32)

    def forward(self, x):
        return self.fc2(self.act(self.conv(self.fc1(x).mT).mT))


class NormMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


class ScaledMlp(Mlp):
    def forward(self, x):
        return self.fc2(2 * self.act(self.fc1(x)))


class ResidualMlp(Mlp):
    def forward(self, x):
        return x + 2 * super().forward(x)


class HiddenDropoutMlp(Mlp):
    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), 0.5, self.training))


class SwitchedOffMlp(Mlp):
    """Stochastic depth that is no module; rarely."""

    def forward(self, x):
        y = super().forward(x)
        return y * (torch.rand(()) > 0.001) if self.training else y


class PythonSwitchedOffMlp(Mlp):
    def forward(self, x):
        y = super().forward(x)
        return 0 * y if self.training and random.random() < 0.001 else y


class DetachedMlp(Mlp):
    def forward(self, x):
        return super().forward(x.detach())


class DetachedHiddenMlp(Mlp):
    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)).detach())


class ClampedMlp(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x).clamp(-7, 7)))


class BranchingMlp(Mlp):
    def forward(self, x):
        return super().forward(x if x.abs().max() < 20 else x.tanh())


class NormedClampedMlp(ClampedMlp):
    """Whose input is never large."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return super().forward(self.norm(x))


class Gated(nn.Module):
    """Llama's original names; w3 is multiplied, w2 goes out."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((16, 32), (32, 16), (16, 32)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ClampedGated(Gated):
    """gpt-oss's clamps."""

    def forward(self, x):
        return self.w2(F.silu(self.w1(x).clamp(max=7)) * self.w3(x).clamp(-7, 7))


class Packed(nn.Module):
    """Phi3's: one layer for gate and up."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(16, 64, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.gelu(gate) * up)


class InlineBlock(nn.Module):
    """Attention and the two layers of the network in one module, as in OPT."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)
        self.dropout, self.out_dropout = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.out_dropout(self.fc2(self.dropout(self.activation_fn(self.fc1(x)))))


class PairBlock(nn.Module):
    """The two layers in two modules, as in BERT."""

    def __init__(self):
        super().__init__()
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense, self.intermediate.act_fn = nn.Linear(16, 32), nn.GELU()
        self.output.dense, self.output.norm = nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        hidden = self.intermediate.act_fn(self.intermediate.dense(x))
        return self.output.norm(self.output.dense(hidden) + x)


class Conv1D(nn.Module):
    """GPT-2's linear layer: `weight` is `[in, out]`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf) * 0.3), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class GPT2MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj, self.act = Conv1D(32, 16), Conv1D(16, 32), ACTIVATIONS["gelu_tanh"]

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), inner

    def forward(self, x):
        return x + self.inner(self.norm(x))


class ResidualArgument(nn.Module):
    """BLOOM's: the residual path comes as an argument, and layers have names of their own."""

    def __init__(self):
        super().__init__()
        self.dense_h_to_4h, self.gelu_impl, self.dense_4h_to_h = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x, residual):
        return residual + self.dense_4h_to_h(self.gelu_impl(self.dense_h_to_4h(x)))


class WithResidualArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = ResidualArgument()

    def forward(self, x):
        return self.mlp(x, x)


class DroppedActivation(Mlp):
    """A dropout whose name sounds like the activation's."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.activation_dropout = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.fc2(self.activation_dropout(self.act(self.fc1(x))))


class UnknownResidual(Mlp):
    def __init__(self):
        super().__init__(act=nn.Tanh)

    def forward(self, x):
        return x + super().forward(x)


class UnequalMlp(Mlp):
    """Of which two look alike, and differ in an attribute."""

    def __init__(self, scales):
        super().__init__()
        self.scales = scales

    def forward(self, x):
        return self.fc2(self.scales[0] * self.act(self.fc1(x)))


def randomized(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return model


def sequential():
    network = [nn.LayerNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 16), nn.Dropout(0.3)]
    return nn.Sequential(*network)


ENCODER = partial(nn.TransformerEncoderLayer, 16, 2, 32)
SUPPORTED = {
    "Mlp": (Mlp, "1.inner", MLPExperts, "gelu"),
    "what follows the network": (ResidualMlp, "1.inner.fc1", MLPExperts, "gelu"),
    "a residual argument": (WithResidualArgument, "1.inner.mlp.dense_h_to_4h", MLPExperts, "gelu"),
    "another activation": (partial(Mlp, act=nn.SiLU), "1.inner", MLPExperts, "silu"),
    "w1, w2, w3": (Gated, "1.inner", SwiGLUExperts, "silu"),
    "packed": (Packed, "1.inner", SwiGLUExperts, "gelu"),
    "inline": (InlineBlock, "1.inner.fc1", MLPExperts, "relu"),
    "pair": (PairBlock, "1.inner.intermediate.dense", MLPExperts, "gelu"),
    "Conv1D": (GPT2MLP, "1.inner", MLPExperts, "gelu_tanh"),
    "Sequential": (sequential, "1.inner.1", MLPExperts, "silu"),
    "TransformerEncoderLayer": (partial(ENCODER, batch_first=True), "1.inner.linear1", MLPExperts, "relu"),
    "TransformerEncoderLayer, gelu": (partial(ENCODER, activation="gelu"), "1.inner.linear1", MLPExperts, "gelu"),
    "TransformerEncoderLayer, SiLU": (partial(ENCODER, activation=nn.SiLU()), "1.inner.linear1", MLPExperts, "silu"),
    "timm's GluMlp": (
        partial(timm.layers.GluMlp, 16, 64, act_layer=nn.Sigmoid),
        "1.inner",
        SwiGLUExperts,
        "sigmoid",
    ),
    "timm's packed SwiGLU": (partial(timm.layers.SwiGLUPacked, 16, 64), "1.inner", SwiGLUExperts, "silu"),
    "timm's SwiGLU": (partial(timm.layers.SwiGLU, 16, 32), "1.inner", SwiGLUExperts, "silu"),
}


@pytest.mark.parametrize("case", SUPPORTED)
def test_upcycled_networks_compute_what_they_did(case):
    build, place, kind, activation = SUPPORTED[case]
    model = randomized(nn.Sequential(Residual(build()), Residual(build()))).eval()
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    x = torch.randn(2, 5, 16)
    expected = model(x)
    sparsify(model, num_experts=4, upcycle=True)
    assert [name for name, m in model.named_modules() if isinstance(m, MoE)] == [place]
    (layer,) = moe_layers(model)
    assert isinstance(layer.experts, kind)
    assert layer.experts.activation == activation
    assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)] == attention
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in layer.experts.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_read_off_the_behavior(activation):
    class Hidden(Mlp):
        def forward(self, x):
            return self.fc2(ACTIVATIONS[activation](self.fc1(x)))

    model = nn.Sequential(Hidden())
    sparsify(model, num_experts=2, blocks="all", upcycle=True)
    assert model[0].experts.activation == activation


def test_an_unknown_activation_is_refused_unless_the_experts_are_chosen():
    model = nn.Sequential(Mlp(act=nn.Tanh))
    with pytest.raises(ValueError, match=r"0 \(Mlp\): fc1, fc2 are not two linear maps with one of gelu, .* between"):
        sparsify(model, num_experts=2, blocks="all")
    sparsify(model, num_experts=2, blocks="all", experts=partial(MLPExperts, activation="relu"))
    assert model[0].experts.activation == "relu"


@pytest.mark.parametrize("experts", [None, MLPExperts])
@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (ConvMlp, r"it holds conv \(Conv1d\), which experts have no counterpart of"),
        (NormMlp, r"it holds norm \(LayerNorm\), which experts have no counterpart of"),
        (partial(Mlp, out=10), "its output is not as wide as its input"),
        (partial(timm.layers.GlobalResponseNormMlp, 16, 32), r"it holds grn \(GlobalResponseNorm\)"),
    ],
)
def test_what_holds_more_than_the_network_is_left_alone_and_named(network, reason, experts):
    model = nn.Sequential(Mlp(), network(), Mlp())
    with pytest.warns(UserWarning, match=rf"sparsify leaves as they are: 1 \(.*\): {reason}"):
        sparsify(model, num_experts=2, blocks="all", experts=experts)
    assert [type(m) for m in model] == [MoE, type(network()), MoE]
    with pytest.raises(ValueError, match=rf"1 \(.*\) cannot become a MoE layer: {reason}"):
        sparsify(model, num_experts=2, blocks="all", experts=experts, match=lambda m: m is model[1])


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (ScaledMlp, "fc1, fc2 are not two linear maps"),
        (HiddenDropoutMlp, "in training it does something else"),
        (SwitchedOffMlp, "in training it does something else"),
        (PythonSwitchedOffMlp, "in training it does something else"),
        (DetachedMlp, "its gradients are others"),
        (DetachedHiddenMlp, "its gradients are others"),
        (ClampedMlp, "it computes something else where values are large"),
        (ClampedGated, "it computes something else where values are large"),
        (BranchingMlp, "it computes something else where values are large"),
        (NormedClampedMlp, r"it holds norm \(LayerNorm\), which experts have no counterpart of"),
    ],
)
def test_what_computes_something_else_is_refused(network, reason):
    with pytest.raises(ValueError, match=reason):
        sparsify(nn.Sequential(network()), num_experts=2, blocks="all")


class First(nn.Module):
    """Takes the first of what its network returns."""

    def __init__(self, network):
        super().__init__()
        self.ffn = network

    def forward(self, x):
        return self.ffn(x)[0]


class TupleMlp(Mlp):
    def forward(self, x):
        return super().forward(x), None


class OneTupleMlp(Mlp):
    def forward(self, x):
        return (super().forward(x),)


class HiddenTupleMlp(Mlp):
    def forward(self, x):
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden), hidden


class TupleGatedMlp(Gated):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("network", [TupleMlp, OneTupleMlp])
def test_a_module_that_returns_a_tuple_still_does(network):
    model = randomized(nn.Sequential(First(network())))
    x = torch.randn(2, 5, 16)
    expected = model(x)
    sparsify(model, num_experts=2, blocks="all", upcycle=True)
    assert isinstance(model[0].ffn.fc1, MoE)
    assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", [TupleGatedMlp, HiddenTupleMlp])
def test_a_tuple_that_experts_cannot_return_is_kept(network):
    plan = plan_sparsify(nn.Sequential(network(), Mlp()), blocks="all")
    assert list(plan.replaced) == ["1"]
    assert plan.kept["0"] == "it returns a tuple, a MoE layer a tensor"


class MaskedGated(Gated):
    def forward(self, x, mask):
        return super().forward(x)


class NamedMaskMlp(Mlp):
    def forward(self, x, *, mask):
        return super().forward(x)


def test_a_module_that_takes_other_arguments_still_does():
    model = nn.ModuleList([NamedMaskMlp(), MaskedGated()])
    x = torch.randn(2, 5, 16)
    expected = model[0](x, mask=None)
    assert plan_sparsify(model, blocks="all").kept == {
        "1": "it takes other arguments (mask), a MoE layer hidden states alone"
    }
    with pytest.warns(UserWarning, match=r"1 \(MaskedGated\): it takes other arguments"):
        sparsify(model, num_experts=2, blocks="all", upcycle=True)
    assert_close(model[0](x, mask=None), expected, rtol=1e-5, atol=1e-5)


def test_networks_that_look_alike_are_told_apart():
    model = nn.Sequential(UnequalMlp([1.0]), UnequalMlp([3.0]))
    with pytest.warns(UserWarning, match=r"leaves as they are: 1 \(UnequalMlp\)"):
        sparsify(model, num_experts=2, blocks="all")
    assert isinstance(model[0], MoE)


def test_experts_of_another_function_replace_no_residual_path():
    with pytest.raises(ValueError, match="fc1, fc2 are not two linear maps"):
        sparsify(nn.Sequential(UnknownResidual()), num_experts=2, blocks="all", experts=MLPExperts)


def test_experts_that_start_from_frozen_weights_stay_frozen():
    def sparse(upcycle, frozen):
        model = nn.Sequential(Mlp(), Residual(InlineBlock()))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen(name))
        sparsify(model, num_experts=2, blocks="all", upcycle=upcycle)
        return [{p.requires_grad for p in layer.experts.parameters()} for layer in moe_layers(model)]

    assert sparse(True, lambda name: True) == [{False}, {False}]
    assert sparse(True, lambda name: name.startswith("0")) == [{False}, {True}]
    assert sparse(False, lambda name: True) == [{True}, {True}]
    with pytest.warns(UserWarning, match=r"0 \(Mlp\) is frozen in part, its experts are trained"):
        assert sparse(True, lambda name: name == "0.fc1.weight") == [{True}, {True}]


def test_weights_are_tried_at_random_so_that_zeros_hide_nothing():
    model = nn.Sequential(ScaledMlp())
    nn.init.zeros_(model[0].fc2.weight)
    nn.init.zeros_(model[0].fc2.bias)
    with pytest.raises(ValueError, match="are not two linear maps"):
        sparsify(model, num_experts=2, blocks="all", upcycle=True)


def test_dropout_stays_where_it_was():
    model = nn.Sequential(Residual(InlineBlock(0.2)), Residual(sequential()), Mlp(dropout=0.4))
    sparsify(model, num_experts=2, blocks="all")
    assert [layer.experts.dropout for layer in moe_layers(model)] == [0.2, 0.1, 0.4]
    assert (model[0].inner.dropout.p, model[0].inner.out_dropout.p) == (0.0, 0.2)
    assert (model[1].inner[3].p, model[1].inner[5].p) == (0.0, 0.3)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, proj_drop_rate=0.5)
    sparsify(vit, num_experts=2, blocks="all")
    assert vit.blocks[0].mlp[0].experts.dropout == 0.5
    assert vit.blocks[0].mlp[1].p == 0.5
    with pytest.raises(ValueError, match=r"drops hidden units with a probability of 0.4.*: give them dropout=0.4"):
        sparsify(nn.Sequential(Mlp(dropout=0.4)), num_experts=2, blocks="all", experts=MLPExperts)


def test_a_dropout_is_not_taken_for_an_activation():
    model = nn.Sequential(DroppedActivation())
    sparsify(model, num_experts=2, blocks="all")
    assert (next(moe_layers(model)).experts.dropout, model[0].activation_dropout.p) == (0.3, 0.0)


def test_a_shared_network_is_one_layer_in_every_place():
    shared = Mlp()
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared), nn.Sequential(Mlp())])
    sparsify(model, num_experts=4, blocks="all")
    assert model[0][0] is model[1][0]
    assert len(list(moe_layers(model))) == 2


def test_shared_weights_and_hooks_are_not_lost():
    model = nn.Sequential(Mlp(), Mlp())
    model[1].fc1.weight = model[0].fc1.weight
    with pytest.raises(ValueError, match=r"0 \(Mlp\): it shares its weights with 1.fc1.weight"):
        sparsify(model, num_experts=4, blocks="all")
    model = nn.Sequential(Mlp())
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="it has hooks, which would be lost"):
        sparsify(model, num_experts=4, blocks="all")


def test_the_model_itself_is_refused():
    for model in (Mlp(), Gated()):
        with pytest.raises(ValueError, match="it is the model itself, which cannot be replaced in place: build MoE"):
            sparsify(model, num_experts=4, blocks="all")
        assert not list(moe_layers(model))


def test_a_refusal_leaves_the_model_as_it_was():
    model = nn.Sequential(Mlp(), Mlp(hidden=24))
    with pytest.raises(ValueError, match="leave hidden_dim to it"):
        sparsify(model, num_experts=2, blocks="all", experts=partial(MLPExperts, hidden_dim=32), upcycle=True)
    assert [type(m) for m in model] == [Mlp, Mlp]


def test_the_plan_says_what_is_replaced_what_not_and_why():
    model = nn.Sequential(Mlp(dropout=0.1), ConvMlp(), Gated(), Mlp(hidden=4))
    plan = plan_sparsify(model, blocks=[0])
    assert plan.replaced == {"0": "Mlp: 16 -> 32 -> 16, gelu, dropout 0.1"}
    assert list(plan.kept) == ["1", "2", "3"]
    assert plan.kept["2"] == "blocks leaves it out"
    assert plan.kept["3"] == "its 4 hidden units are fewer than its 16 inputs, as an adapter's or a squeeze's"
    assert str(plan).splitlines()[0] == "replace  0  Mlp: 16 -> 32 -> 16, gelu, dropout 0.1"
    assert not list(moe_layers(model))


class NormedWeightsMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.utils.parametrizations.weight_norm(self.fc1)


class DeepMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(32, 32)

    def forward(self, x):
        return self.fc2(self.act(self.middle(self.act(self.fc1(x)))))


def stack(*widths):
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.GELU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (NormedWeightsMlp, "it computes the weights of fc1, as weight_norm does"),
        (DeepMlp, "it holds middle (Linear)"),
        (partial(stack, 16, 32, 32, 16), "its layers do not fit each other (0 [32, 16], 2 [32, 32]"),
        (partial(stack, 16, 32, 32, 32, 16), "it has 4 linear layers"),
        (partial(timm.layers.ConvMlp, 16, 32), "fc1, fc2 are convolutions"),
        (partial(timm.layers.GlobalResponseNormMlp, 16, 32, use_conv=True), "fc1, fc2 are convolutions"),
    ],
)
def test_the_plan_lists_what_looks_like_a_network(network, reason):
    kept = plan_sparsify(nn.ModuleDict({"dense": Mlp(), "mlp": network()}), blocks="all").kept
    assert list(kept) == ["mlp"]
    assert reason in kept["mlp"]


def test_the_plan_lists_a_sequential_model():
    assert "it is the model itself" in plan_sparsify(stack(16, 32, 16), blocks="all").kept[""]


def test_torch_and_torchvision_models_compute_what_they_did():
    encoder = nn.TransformerEncoder(ENCODER(batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.arange(5).expand(2, -1) >= torch.tensor([[5], [3]])
    expected = encoder(x, src_key_padding_mask=mask)
    sparsify(encoder, num_experts=4, blocks=[1], upcycle=True)
    with torch.no_grad():
        assert_close(encoder(x, src_key_padding_mask=mask)[~mask], expected[~mask], rtol=1e-5, atol=1e-5)
    decoder = randomized(nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32), 2)).eval()
    expected = decoder(x, x)
    sparsify(decoder, num_experts=4, blocks="all", upcycle=True)
    assert_close(decoder(x, x), expected, rtol=1e-5, atol=1e-5)
    vit = randomized(VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = vit(images)
    sparsify(vit, num_experts=4, blocks="all", upcycle=True)
    assert len(list(moe_layers(vit))) == 2
    assert_close(vit(images), expected, rtol=1e-5, atol=1e-5)


ROLES = {
    "mixer_s32_224": (8, "it mixes tokens, not channels"),
    "resmlp_12_224": (12, None),
    "cait_xxs24_224": (24, "class attention or pooling"),
    "volo_d1_224": (18, "class attention or pooling"),
    "xcit_nano_12_p16_224": (12, "class attention or pooling"),
    "vit_base_patch16_siglip_224": (12, "class attention or pooling"),
    "swinv2_cr_tiny_ns_224": (12, "it computes position biases"),
    "maxvit_rmlp_pico_rw_256": (22, "it computes position biases"),
    "convnextv2_tiny": (0, r"it holds grn (GlobalResponseNorm)"),
    "gmlp_ti16_224": (0, "it holds gate"),
    "mambaout_femto": (0, "it holds norm (LayerNorm), conv (Conv2d)"),
    "pvt_v2_b0": (0, "it holds dwconv"),
    "eva02_base_patch14_224": (0, "it holds norm (LayerNorm)"),
    "vit_relpos_medium_patch16_224": (12, "it computes position biases"),
    "deepseek_vit_412m_align": (32, "its output is not as wide as its input"),
    "gemma4_vit_167m": (0, "it holds gate_proj (Gemma4ClippableLinear)"),
    "caformer_b36": (0, "it holds act (StarReLU)"),
    "tiny_vit_5m_224": (10, None),
    "swin_tiny_patch4_window7_224": (12, None),
    "eva02_tiny_patch14_224": (12, None),
    "vit_giant_patch14_dinov2": (40, None),
}


@pytest.mark.full
@pytest.mark.parametrize("name", ROLES)
def test_networks_of_other_roles_are_not_taken_for_those_of_blocks(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = plan_sparsify(model, blocks="all")
    number, reason = ROLES[name]
    assert len(plan.replaced) == number
    if reason is None:
        assert not plan.kept
    else:
        assert any(reason in why for why in plan.kept.values())


def test_models_on_the_meta_device_are_sparsified_there():
    with torch.device("meta"):
        model = nn.Sequential(Residual(Mlp()), Residual(InlineBlock()), Residual(Gated()))
        sparsify(model, num_experts=4, blocks="all", upcycle=True)
    assert len(list(moe_layers(model))) == 3
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_trial_leaves_no_trace():
    model = nn.Sequential(Residual(InlineBlock(0.1)), Residual(ConvMlp()))
    state, drawn = torch.get_rng_state(), random.getstate()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        plan = plan_sparsify(model, blocks="all")
    assert len(plan.replaced) == 1
    assert model.training
    assert model[0].inner.dropout.p == 0.1
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_of_another_kind_than_the_network_cannot_start_from_it():
    with pytest.raises(NotImplementedError, match="take SwiGLUExperts"):
        sparsify(nn.Sequential(Gated()), num_experts=2, blocks="all", experts=MLPExperts, upcycle=True)
    with pytest.raises(NotImplementedError, match="take MLPExperts"):
        sparsify(nn.Sequential(Mlp()), num_experts=2, blocks="all", experts=SwiGLUExperts, upcycle=True)


def test_timm_does_not_decay_the_biases_of_experts():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    sparsify(model, num_experts=4, blocks="all")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert "blocks.1.mlp.experts.up" in decayed
    assert not [name for name in decayed if name.endswith("bias")]
