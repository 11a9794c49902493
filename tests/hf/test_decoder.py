"""Language models of our own tasks as models of transformers."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from routerzoo import HashRouter, HyperRouter, LanguageModeling, LinearRouter, MLPExperts, SwiGLUExperts
from routerzoo.models.decoder import Decoder

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("routerzoo.hf")

SIZES = {"num_experts": 4, "d_model": 16, "num_blocks": 2, "num_heads": 2, "max_length": 32}
IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def decoder(router=LinearRouter, experts=SwiGLUExperts, **options):
    model = Decoder(40, router, experts, **{**SIZES, **options}).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts": MLPExperts, "router": HashRouter, "num_shared_experts": 1, "tie_weights": False},
        {"router": partial(HyperRouter, hidden_dim=8), "moe_blocks": "every-other", "dense_width": 2},
        {"experts": partial(SwiGLUExperts, hidden_dim=12, bias=True), "rotary_base": 100.0},
    ],
)
@torch.no_grad()
def test_a_decoder_is_a_llama_with_moe_layers(options, tmp_path):
    model = decoder(**options)
    exported = hf.from_decoder(model)
    expected = model(IDS)[0]
    assert_close(exported(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    exported.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(again(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert again.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)


@torch.no_grad()
@pytest.mark.full
def test_a_task_goes_out_as_mixtral():
    task = LanguageModeling(
        router=partial(LinearRouter, top_k=1, renormalize=True), experts=SwiGLUExperts, vocab_size=40, **SIZES
    ).eval()
    for layer in task.net.blocks:
        layer.feed_forward.router.top_k = 2  # as a schedule of k leaves it
    plain = hf.to_transformers(hf.from_decoder(task))
    assert type(plain) is transformers.MixtralForCausalLM
    assert plain.config.num_experts_per_tok == 2
    assert_close(plain(IDS).logits, task.net(IDS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "takes a Decoder, or LanguageModeling around one, got Linear"),
        (lambda: decoder(moe_blocks=[]), "no MoE layer"),
        (lambda: decoder(experts=MLPExperts, moe_blocks=[1]), "block 0 has a dense network that Llama has not"),
    ],
)
def test_what_has_no_class_is_refused(build_it, message):
    with pytest.raises(ValueError, match=message):
        hf.from_decoder(build_it())
