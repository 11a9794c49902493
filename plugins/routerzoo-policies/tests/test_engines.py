"""Routes of vLLM and SGLang: every form that they come in is read, replayed, and written back."""

import base64
import io

import numpy as np
import pytest
import torch
from routerzoo_policies import (
    encode_routed_experts,
    read_routed_experts,
    record,
    replay,
    routed_experts,
    routings_from_engine,
)

from routerzoo import LayerSpec, MoE, RoutingContext, moe_layers
from routerzoo.models.decoder import Decoder

ROUTES = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]])
"""Of 3 tokens in 2 layers, k is 2."""


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def raw(array):
    return base64.b64encode(array.tobytes()).decode()


FORMS = {
    "an array of vLLM": ROUTES.astype(np.uint8),
    "a tensor": torch.from_numpy(ROUTES),
    "nested lists": ROUTES.tolist(),
    "a string of vLLM's server": npy(ROUTES.astype(np.uint16)),
    "a string of SGLang": raw(ROUTES.astype(np.int32)),
    "data and shape": {"data": raw(ROUTES.astype(np.uint8)), "shape": [3, 2, 2], "start": 0},
    "data, shape and dtype": {"data": raw(ROUTES.astype(np.int16)), "shape": [3, 2, 2], "dtype": "int16"},
    "an answer of vLLM": {"choices": [{"routed_experts": npy(ROUTES.astype(np.uint8))}], "prompt_routed_experts": None},
    "a split answer of vLLM": {
        "prompt_routed_experts": ROUTES[:2].tolist(),
        "choices": [{"routed_experts": ROUTES[2:].tolist()}],
    },
    "generate of SGLang": {"text": "", "meta_info": {"routed_experts": raw(ROUTES.astype(np.int32))}},
    "a chat of SGLang": {"choices": [{}], "sglext": {"routed_experts": raw(ROUTES.astype(np.int32))}},
    "a choice of SGLang": {"choices": [{"sgl_ext": {"routed_experts": raw(ROUTES.astype(np.int32))}}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form):
    read = read_routed_experts(FORMS[form], num_layers=2, top_k=2)
    assert read.dtype == np.int64
    assert np.array_equal(read, ROUTES)


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (None, "the engine gave no routes: start it with --enable-return-routed-experts"),
        ({"choices": [{"routed_experts": None}]}, "the engine gave no routes"),
        (np.zeros((3, 2)), r"integers \[tokens, layers, k\], got float64 of shape \[3, 2\]"),
        (
            {"choices": [{"routed_experts": ROUTES}] * 2},
            "the answer has 2 completions: give the routes of one at a time",
        ),
        ("no base 64!", "not in base64"),
        (raw(np.zeros(5, np.int32)), "20 bytes are no int32 array of 2 layers and 2 experts per token"),
        ({"data": raw(np.zeros(5, np.uint8)), "shape": [3, 2, 2]}, r"of shape \[3, 2, 2\] cannot have 5 bytes"),
    ],
)
def test_other_payloads_are_refused(payload, told):
    with pytest.raises(ValueError, match=told):
        read_routed_experts(payload, num_layers=2, top_k=2)


def test_a_string_of_sglang_needs_its_shape():
    with pytest.raises(ValueError, match="come without their shape: give num_layers and top_k"):
        read_routed_experts(raw(ROUTES.astype(np.int32)))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_is_written_is_read_again(engine):
    assert np.array_equal(
        read_routed_experts(encode_routed_experts(ROUTES.astype(np.uint8), engine), num_layers=2, top_k=2), ROUTES
    )


def model():
    torch.manual_seed(0)
    return Decoder(40, "LinearRouter", d_model=16, num_blocks=2, num_heads=2, num_experts=8, max_length=16).eval()


def test_training_routes_as_the_rollout_did():
    engine, ids = model(), torch.randint(40, (2, 9))
    lengths = [9, 6]
    with record(engine) as recording:
        engine(ids)
    mask_BS = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    routes = routed_experts(recording.joined(), mask_BS)
    assert [route.shape for route in routes] == [(8, 2, 2), (5, 2, 2)]  # the last token is no input of an engine
    assert {route.dtype for route in routes} == {np.dtype("uint8")}
    recorded = [calls[0].experts_TK.view(2, 9, 2) for calls in recording.joined().values()]
    assert np.array_equal(routes[1], torch.stack([one[1, :5] for one in recorded], 1).numpy())
    trained = model()
    with torch.no_grad():
        for layer in moe_layers(trained):
            layer.router.weight.copy_(layer.router.weight.flip(0))
    strings = [encode_routed_experts(route, "sglang") for route in routes]
    with replay(trained, routings_from_engine(trained, strings, mask_BS, num_layers=2)):
        logits, context = trained(ids, padding_mask_BS=~mask_BS)
        logits.sum().backward()
    own = trained(ids, padding_mask_BS=~mask_BS)[1]
    for index, published in enumerate(context.routings):
        now = published.routing.experts_TK.view(2, 9, 2)
        assert torch.equal(now[0, :8], recorded[index][0, :8])
        assert torch.equal(now[1, :5], recorded[index][1, :5])
        assert (now[1, 6:] == -1).all()  # padding
        assert published.layer.router.weight.grad.abs().sum() > 0
    # The last tokens are routed by the model itself: in the first layer, before anything differs, as without replay.
    first, alone = (c.routings[0].routing.experts_TK.view(2, 9, 2) for c in (context, own))
    assert torch.equal(first[0, 8], alone[0, 8])
    assert torch.equal(first[1, 5], alone[1, 5])


def test_packed_sequences_parts_and_dense_layers_find_their_places():
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 4), MoE(LayerSpec(4, 16)), torch.nn.Linear(4, 4), MoE(LayerSpec(4, 16))
    )
    whole = np.zeros((3, 4, 2), np.int64)  # four hidden layers, two of them dense
    whole[:, [1, 3]] = ROUTES
    routings = routings_from_engine(net, [whole, whole[1:]], [4, 3], starts=[0, 1])
    assert routings[0][0].experts_TK.tolist() == [[1, 2], [5, 6], [9, 10], [-2, -2], [-2, -2], [5, 6], [9, 10]]
    assert routings[1][0].experts_TK[0].tolist() == [3, 4]
    chosen = routings_from_engine(net, [whole], [3], columns=[3, 1])
    assert chosen[0][0].experts_TK.tolist() == ROUTES[:, 1].tolist()
    written = routed_experts({0: chosen[1], 1: chosen[0]}, [3], columns=[1, 3], num_layers=4, last=True)
    assert np.array_equal(written[0], whole)
    with replay(net, routings), pytest.raises(ValueError, match="the recording is of 7 tokens, the call has 3"):
        net(torch.randn(3, 4))
    left = torch.tensor([[0, 1, 1, 1]])
    assert routings_from_engine(net, [whole[:2]], left)[0][0].experts_TK.tolist() == [
        [-2, -2],
        [1, 2],
        [5, 6],
        [-2, -2],
    ]


def test_a_start_that_the_answer_names_is_taken_and_zeros_for_the_last_token_are_not():
    two = torch.nn.ModuleList([MoE(LayerSpec(4, 16)), MoE(LayerSpec(4, 16))])
    expected = [[-2, -2], [-2, -2], [1, 2], [5, 6], [9, 10], [-2, -2]]
    part = {"data": raw(ROUTES.astype(np.uint8)), "shape": [3, 2, 2], "start": 2}
    answer = {"meta_info": {"routed_experts": raw(ROUTES.astype(np.int32)), "routed_experts_start_len": 2}}
    padded = np.concatenate([ROUTES, np.zeros_like(ROUTES[:1])])
    for routes, starts in (
        (part, None),
        ({"choices": [{"routed_experts": part}]}, None),
        (answer, None),
        ({"choices": [answer]}, None),
        (padded, [2]),
    ):
        routings = routings_from_engine(two, [routes], [6], starts=starts, num_layers=2)
        assert routings[0][0].experts_TK.tolist() == expected


def test_tokens_that_an_engine_recorded_nothing_for_are_refused():
    two = torch.nn.ModuleList([MoE(LayerSpec(4, 16)), MoE(LayerSpec(4, 16))])
    cached = ROUTES.copy()
    cached[0] = 0  # of a prefix that was not computed
    with pytest.raises(
        ValueError, match=r"an expert twice for token 0 in MoE layer 0, \[0, 0\]: the engine recorded no"
    ):
        routings_from_engine(two, [cached], [4])
    assert routings_from_engine(two, [cached[1:]], [4], starts=[1])[0][0].experts_TK[0].tolist() == [-2, -2]
    dropped = ROUTES.copy()
    dropped[1] = -1  # ours: no expert has room
    assert routings_from_engine(two, [dropped], [4])[0][0].experts_TK[1].tolist() == [-1, -1]


def test_what_does_not_fit_is_said():
    net = MoE(LayerSpec(4, 8))
    two = torch.nn.ModuleList([MoE(LayerSpec(4, 16)), MoE(LayerSpec(4, 16))])
    for build, told in (
        (
            lambda: routings_from_engine(two, [ROUTES], [5]),
            "of sequence 0 are of tokens 0 to 2, the sequence has 5 tokens",
        ),
        (lambda: routings_from_engine(two, [ROUTES], [3, 3]), "there are 1 sequences of routes and 2 of tokens"),
        (
            lambda: routings_from_engine(net, [ROUTES], [3]),
            "the routes have 2 layers, the model 1 MoE layers: say by col",
        ),
        (lambda: routings_from_engine(net, [ROUTES], [3], columns=[0]), "name expert 10, MoE layer 0 has 8"),
        (lambda: routings_from_engine(net, [ROUTES], [3], columns=[2]), "must name one of 2 layers of the routes"),
        (lambda: routings_from_engine(torch.nn.Linear(1, 1), [ROUTES], [3]), "the model has no MoE layer"),
    ):
        with pytest.raises(ValueError, match=told):
            build()
    routings = routings_from_engine(two, [ROUTES], [3])
    with (
        pytest.raises(ValueError, match="has no weights, as those of inference engines"),
        replay(two, routings, weights="recorded"),
    ):
        pass
    one = routings_from_engine(two, [ROUTES[:, :, :1]], [4])
    with (
        replay(two, one),
        pytest.raises(ValueError, match="the recording has 1 experts for each token, and tokens wit"),
    ):
        two[0](torch.randn(4, 4), RoutingContext())
