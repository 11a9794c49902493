"""Checkpoints of another k or of an older format, and parameters that are drawn again."""

import warnings
from dataclasses import replace

import pytest
import torch
from lightning import Trainer

from routerzoo import LanguageModeling, LinearRouter, MoE, RoutingContext, list_routers
from routerzoo.callbacks import FineTune, KSchedule
from routerzoo.cli import main as cli
from routerzoo.data import TextData
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers
from routerzoo.router import LoadedTopKWarning
from tests.conftest import router_factory
from tests.state.models import CONTEXT, SPEC

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
SIZES = {"d_model": 16, "num_blocks": 1, "num_heads": 2, "num_experts": 4, "max_length": 16}


def task(**options):
    return LanguageModeling(router=router_factory("LinearRouter", top_k=2), **{**SIZES, **options})


def data():
    return TextData(sequence_length=16, batch_size=4)


@pytest.fixture
def checkpoint():
    """Of a run whose k grew from 1 to 3."""
    trainer = Trainer(
        **QUIET, max_steps=4, limit_val_batches=0, enable_checkpointing=False, callbacks=[KSchedule(1, 4)]
    )
    trainer.fit(task(), data())
    trainer.save_checkpoint("grown.ckpt")
    return "grown.ckpt"


def test_another_k_is_loaded_with_a_warning():
    trained, fresh = (MoE(d_model=8, num_experts=4, router=router_factory("LinearRouter", top_k=k)) for k in (3, 2))
    with pytest.warns(LoadedTopKWarning) as caught:
        fresh.load_state_dict(trained.state_dict())
    (warning,) = caught
    message = "LinearRouter was built with top_k = 2 and routes with the checkpoint's, 3: set top_k after loading"
    assert str(warning.message) == f"{message} to change it"
    assert fresh.router.top_k == 3
    assert fresh(torch.randn(5, 8)).shape == (5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(trained.state_dict())


def test_a_k_that_the_router_cannot_do_is_refused():
    layer = MoE(d_model=8, num_experts=4)
    state = {**layer.state_dict(), "router.k": torch.tensor(5)}
    with pytest.raises(RuntimeError, match=r"router.k is 5; it must be between 1 and 4"):
        layer.load_state_dict(state)


def test_tasks_resume_and_evaluate_another_k_without_a_warning(checkpoint):
    resumed = task()
    options = {"limit_val_batches": 0, "enable_checkpointing": False, "callbacks": [KSchedule(1, 4)]}
    Trainer(**QUIET, max_steps=6, **options).fit(resumed, data(), ckpt_path=checkpoint)
    for load in (
        lambda: Trainer(**QUIET, limit_val_batches=1).validate(task(), data(), ckpt_path=checkpoint, verbose=False),
        lambda: LanguageModeling.load_from_checkpoint(checkpoint, weights_only=True),
    ):
        load()  # a warning would be an error
    loaded = LanguageModeling.load_from_checkpoint(checkpoint, weights_only=True)
    assert [layer.router.top_k for layer in moe_layers(loaded)] == [3]


def to_first_format(path):
    """Write a checkpoint as the first format had it: k and stage in dicts, no format number."""
    content = torch.load(path, weights_only=True)
    state = {name: value for name, value in content["state_dict"].items() if not name.endswith("router.k")}
    state |= {name[:-1] + "_extra_state": {"top_k": 2} for name in content["state_dict"] if name.endswith("router.k")}
    content["state_dict"] = state
    del content["routerzoo_format"]
    torch.save(content, "old.ckpt")
    return "old.ckpt"


def test_the_first_format_is_refused_in_a_sentence(checkpoint):
    old = to_first_format(checkpoint)
    message = "the checkpoint is of format 1, this version reads 2: train again, or use the version of routerzoo that"
    with pytest.raises(UserError, match=message):
        LanguageModeling.load_from_checkpoint(old, weights_only=True)
    with pytest.raises(UserError, match=message):
        Trainer(**QUIET, limit_val_batches=1).validate(task(), data(), ckpt_path=old, verbose=False)
    state = torch.load(old, weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="_extra_state is of a checkpoint of routerzoo's first format"):
        task().load_state_dict(state)
    with pytest.raises(UserError, match=r"old\.ckpt"):
        Trainer(**QUIET, max_steps=1, callbacks=[FineTune(old, False, False)]).fit(task(), data())


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_command_line_refuses_the_first_format(checkpoint, command):
    old = to_first_format(checkpoint)
    sizes = [f"--model.{name}={value}" for name, value in SIZES.items() if name != "max_length"]
    model = ["--model=LanguageModeling", "--model.router=LinearRouter", *sizes]
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *model, "--data=TextData", "--trainer.max_steps=6", "--ckpt_path", old])
    message = "error: the checkpoint is of format 1, this version reads 2: train again, or use the version of routerzoo"
    assert str(ended.value.code).startswith(message)


@pytest.mark.parametrize("name", list_routers())
def test_a_layer_built_on_the_meta_device_is_initialized_as_the_constructor_does_it(name):
    spec = replace(SPEC, num_experts=8)  # the largest default k
    with torch.device("meta"):
        layer = MoE(spec, name, num_shared_experts=1)
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 10**9)
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    built = MoE(spec, name, num_shared_experts=1)
    for key, value in built.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key
    assert layer.router.top_k == built.router.top_k
    assert layer(torch.randn(12, SPEC.d_model), CONTEXT.new_pass()).isfinite().all()


def test_a_parametrized_router_is_not_initialized_again_in_silence():
    layer = MoE(d_model=16, num_experts=4)
    torch.nn.utils.parametrizations.weight_norm(layer.router, "weight")
    with pytest.raises(ValueError, match=r"LinearRouter has no weight any more.*call reset_parameters before"):
        layer.reset_parameters()


def test_a_model_with_an_init_weights_of_its_own_can_call_it():
    """As models of timm and transformers are initialized: module by module, `module.apply(init)`."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), MoE(d_model=16, num_experts=4, router=LinearRouter))

    def init_weights(module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)
        elif isinstance(module, MoE):
            module.reset_parameters()

    before = model[1].router.weight.clone()
    model.apply(init_weights)
    assert not model[0].weight.any()
    assert not torch.equal(model[1].router.weight, before)
    assert model(torch.randn(3, 16)).isfinite().all()
    assert model[1](torch.randn(3, 16), RoutingContext()).shape == (3, 16)
