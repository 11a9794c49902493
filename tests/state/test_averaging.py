"""Averaged weights: every loop, library and router; what is an index is never averaged."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from safetensors.torch import load_file, load_model, save_file, save_model
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from routerzoo import (
    ContextHook,
    ImageClassification,
    KSchedule,
    LanguageModeling,
    LogitRouter,
    MoE,
    Router,
    TextData,
    attach,
    copy_router_state,
    list_routers,
    moe_layers,
    sparsify,
)
from routerzoo.moe.layer import NonCausalRouterError, inner_router
from routerzoo.registry import router_class
from routerzoo.router import UnmetRequirementError
from tests.conftest import BUILT_IN
from tests.state.models import PROVIDED, SPEC, context_of

STEPS = 40


class Measured(LogitRouter):
    """Has a buffer that training measures."""

    paper = "for this test"
    trained_buffers = frozenset({"level"})

    def __init__(self, spec):
        super().__init__(spec)
        self.register_buffer("level", torch.tensor(torch.inf))

    def logits(self, x_TD, context):
        return x_TD[:, : self.spec.num_experts]


# Those of plugins take minutes.
ROUTERS = [name if name in BUILT_IN else pytest.param(name, marks=pytest.mark.full) for name in list_routers()]
TOKENS = 5  # of an image: the class token and 4 patches
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def vit(router):
    """Return a sparsified ViT of timm's whose layers get every field of a context."""
    sizes = {"depth": 2, "img_size": 28, "patch_size": 14, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    model = sparsify(
        timm.create_model("vit_tiny_patch16_224", **sizes),
        num_experts=4,
        router=router,
        blocks="all",
        provides=PROVIDED,
        vocab_size=20,
        num_positions=TOKENS,
    )
    model.hook = ContextHook(model, lambda images: context_of(len(images), TOKENS))
    return model


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def indices(model):
    """Return all integers that decide routings: as tensors, and as the routers read them."""
    tensors = {
        f"{number} {name}": buffer.clone()
        for number, router in enumerate(routers(model))
        for name, buffer in router.named_buffers(recurse=False)
        if not buffer.is_floating_point()
    }
    return tensors, [dict(router._stored_ints) for router in routers(model)]


def assert_same_indices(trained, averaged):
    (expected, stored), (found, found_stored) = indices(trained), indices(averaged)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found_stored == stored


# Images belong to no task, which `sparsify` could number.
REFUSED = {"TaskRouter": "TaskRouter requires num_tasks, which this model does not provide"}


@pytest.mark.parametrize("name", ROUTERS)
def test_averages_of_a_vision_transformer(name, tmp_path):
    if name in REFUSED:
        with pytest.raises(UnmetRequirementError, match=REFUSED[name]):
            vit(name)
        return
    model = vit(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    updates = attach(model, optimizer, STEPS, token_counts=torch.arange(20))
    averages = {
        "timm 2": ModelEmaV2(model, decay=0.9),
        "timm 3": ModelEmaV3(model, decay=0.9),
        "torch": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        "torch with buffers": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    }
    images, labels = torch.randn(4, 3, 28, 28), torch.arange(4) % 3
    for step in range(STEPS):
        if step == 10:  # k grows, as far as the router can
            for router in map(inner_router, moe_layers(model)):
                router.top_k = min(3, router.max_top_k)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for averaged in averages.values():
            getattr(averaged, "update_parameters", getattr(averaged, "update", None))(model)
            copy_router_state(model, averaged)
    updates.remove()
    model.eval()
    for label, averaged in averages.items():
        assert_same_indices(model, averaged)
        assert averaged.eval()(images).isfinite().all(), label
    expected = averages["timm 3"].module(images)

    state = averages["timm 3"].module.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_model(averages["timm 3"].module, str(tmp_path / "b.safetensors"))
    for load in (
        lambda fresh: fresh.load_state_dict(load_file(tmp_path / "a.safetensors")),
        lambda fresh: load_model(fresh, str(tmp_path / "b.safetensors")),
    ):
        fresh = vit(name)
        for router, trained in zip(
            map(inner_router, moe_layers(fresh)), map(inner_router, moe_layers(model)), strict=True
        ):
            router.top_k = trained.top_k
        load(fresh)
        assert_same_indices(model, fresh)
        assert torch.equal(fresh.eval()(images), expected)


@pytest.fixture
def corpora():
    """Two of them, so that sequences belong to tasks."""
    for name, text in (("a", "abcd " * 120), ("b", "xyz " * 150)):
        with open(f"{name}.txt", "w") as file:
            file.write(text)
    return TextData(["a.txt", "b.txt"], sequence_length=8, batch_size=4)


def language(name, **options):
    sizes = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "max_length": 8, "num_tasks": 2}
    return LanguageModeling(router=partial(router_class(name)), **{**sizes, **options})


def language_of_any(name):
    """Build one also with routers that a decoder refuses, since they look at later tokens."""
    refused = not inner_router(MoE(SPEC, name)).properties.causal
    if refused:
        with pytest.raises(NonCausalRouterError, match=f"{name} is not causal"):
            language(name)
    return language(name, allow_non_causal=refused)


def growth(task):
    """Let k grow, where the routers can."""
    largest = min(inner_router(layer).max_top_k for layer in moe_layers(task))
    return [KSchedule(1, 3)] if largest >= 3 else []


class Validations(Callback):
    """Saves a checkpoint after each validation, and keeps what it gave."""

    def __init__(self):
        self.losses = {}

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.global_step}.ckpt")
        self.losses[f"{trainer.global_step}.ckpt"] = float(trainer.callback_metrics["val/loss"])


def validated(task, data, checkpoint):
    (results,) = Trainer(**QUIET, limit_val_batches=2).validate(task, data, ckpt_path=checkpoint, verbose=False)
    return results["val/loss"]


IGNORED = (
    "ignore:You're using the WeightAveraging callback with a model",  # it would not be sharded
    "ignore:SWA is currently only supported every epoch",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    "ignore::routerzoo.moe.layer.BatchDependenceWarning",
)


def averaging(names):
    def mark(test):
        for message in IGNORED:
            test = pytest.mark.filterwarnings(message)(test)
        return pytest.mark.parametrize("name", names)(test)

    return mark


@averaging(ROUTERS)
def test_an_exponential_average_of_a_language_model(name, corpora):
    task, watch = language_of_any(name), Validations()
    average = EMAWeightAveraging(decay=0.9)
    trainer = Trainer(
        **QUIET,
        max_steps=STEPS,
        val_check_interval=STEPS // 2,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[*growth(task), average, watch],
    )
    trained = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == STEPS:
                trained["model"] = copy.deepcopy(pl_module.net)

    trainer.callbacks.insert(0, Keep())
    trainer.fit(task, corpora)
    assert_same_indices(trained["model"], task.net)  # after training it has the averaged weights
    assert_same_indices(trained["model"], average._average_model.module.net)
    assert any(not torch.equal(a, b) for a, b in zip(trained["model"].parameters(), task.net.parameters(), strict=True))
    assert list(watch.losses) == [f"{STEPS // 2}.ckpt", f"{STEPS}.ckpt"]
    for checkpoint, loss in watch.losses.items():
        fresh = language_of_any(name)
        assert validated(fresh, corpora, checkpoint) == pytest.approx(loss, rel=1e-6)
    assert_same_indices(trained["model"], fresh.net)


@averaging(ROUTERS)
def test_a_stochastic_average_of_a_language_model(name, corpora):
    task = language_of_any(name)
    average = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    trainer = Trainer(
        **QUIET,
        max_epochs=3,
        limit_train_batches=STEPS // 3,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[*growth(task), average],
    )
    trainer.fit(task, corpora)
    assert_same_indices(task.net, average._average_model.net)
    (results,) = trainer.validate(task, corpora, verbose=False)
    trainer.save_checkpoint("swa.ckpt")
    fresh = language_of_any(name)
    assert validated(fresh, corpora, "swa.ckpt") == pytest.approx(results["val/loss"], rel=1e-6)
    assert_same_indices(task.net, fresh.net)


@averaging(["LinearRouter", "StableMoERouter"])
def test_an_average_is_resumed(name, corpora):
    def fit(steps, ckpt_path=None):
        torch.manual_seed(0)
        task = language(name)
        trainer = Trainer(
            **QUIET,
            max_steps=steps,
            limit_val_batches=0,
            enable_checkpointing=False,
            callbacks=[KSchedule(1, 3), EMAWeightAveraging(decay=0.9)],
        )
        trainer.fit(task, corpora, ckpt_path=ckpt_path)
        trainer.save_checkpoint(f"{steps}.ckpt")
        return task

    fit(10)
    saved = torch.load("10.ckpt", weights_only=True)
    assert {int(value) for key, value in saved["state_dict"].items() if key.endswith("router.k")} == {3}
    fit(20, "10.ckpt")  # a warning of another k would be an error


def test_tasks_can_be_copied_and_pickled():
    for task in (
        language("HashRouter", optimizer=partial(torch.optim.SGD, lr=0.1)),
        ImageClassification(
            image_size=28,
            num_experts=4,
            backbone_arguments={"patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2},
        ),
    ):
        for twin in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
            assert twin.hparams.keys() == task.hparams.keys()
            for name, value in task.state_dict().items():
                assert torch.equal(twin.state_dict()[name], value), name


def test_a_buffer_starts_its_average_once_it_is_known():
    trained, averaged = MoE(SPEC, Measured), MoE(SPEC, Measured)
    copy_router_state(trained, averaged)
    assert averaged.router.level.isinf()
    trained.router.level.fill_(3.0)
    averaged.router.level.lerp_(trained.router.level, 0.1)  # infinity averages to NaN
    copy_router_state(trained, averaged)
    assert averaged.router.level == 3
    trained.router.level.fill_(5.0)
    averaged.router.level.lerp_(trained.router.level, 0.1)
    copy_router_state(trained, averaged)
    assert averaged.router.level == pytest.approx(3.2)


def test_integers_that_a_loop_of_ones_own_copies_in_place_are_read_in_evaluation():
    trained, averaged = MoE(SPEC, "StableMoERouter"), MoE(SPEC, "StableMoERouter")
    trained.router.freeze_choices()
    trained.router.top_k = 2
    for value, average in zip(trained.buffers(), averaged.buffers(), strict=True):
        average.copy_(value)
    averaged.eval()
    assert (averaged.router.stage, averaged.router.top_k) == (2, 2)


def test_evaluation_keeps_a_k_that_is_overridden():
    router = MoE(SPEC, "LinearRouter").router
    with router.override_top_k(3):
        with router.override_top_k(1):
            assert router.eval().top_k == 1
        assert router.top_k == 3
    assert router.top_k == int(router.k) == 2
