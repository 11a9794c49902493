"""Tasks through Lightning's Trainer, in Python."""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.testing import assert_close

import routerzoo
from routerzoo import ImageClassification, ImageData, LanguageModeling, ShardedStrategy, TextData, moe_layers
from routerzoo.callbacks import KSchedule
from routerzoo.errors import UserError
from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.optim import WarmupCosine, parameter_groups, use_fused_kernel
from tests.conftest import QUIET, router_factory


def language(router, table=None, **options):
    sizes = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "max_length": 16}
    arguments = {"top_k": 2} if table is None else {"top_k": 2, "table": table}
    return LanguageModeling(router=router_factory(router, **arguments), **{**sizes, **options})


def vision(router, **options):
    arguments = {"patch_size": 14, "embed_dim": 12, "depth": 2, "num_heads": 2}
    sizes = {"image_size": 28, "in_channels": 1, "num_experts": 4, "backbone_arguments": arguments, "patch_ids": "lsh"}
    return ImageClassification(router=router_factory(router, top_k=2), **{**sizes, **options})


def text_data(**options):
    return TextData(**{"sequence_length": 16, "batch_size": 4, **options})


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.full)])
def test_every_router_trains_on_text(router_name, precision):
    task = language(router_name)
    trainer = Trainer(**QUIET, max_steps=3, limit_val_batches=1, precision=precision, enable_checkpointing=False)
    trainer.fit(task, text_data())
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert_close(
        trainer.callback_metrics["train/bpb"], trainer.callback_metrics["train/loss"] / torch.tensor(2.0).log()
    )


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.full)])
def test_every_router_trains_on_images(router_name, precision):
    task = vision(router_name)
    trainer = Trainer(**QUIET, max_steps=3, limit_val_batches=1, precision=precision, enable_checkpointing=False)
    trainer.fit(task, ImageData(batch_size=8))
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_evaluation_weighs_every_token_alike():
    task, data = language("LinearRouter").eval(), text_data(batch_size=7)
    trainer = Trainer(**QUIET)
    trainer.validate(task, data, verbose=False)
    total = tokens = 0.0
    with torch.no_grad():
        for ids, targets, *_ in data.val_dataloader():
            logits, _ = task.net(ids)
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            tokens += (targets >= 0).sum()
    assert tokens == len(data.stream("val")) - 1
    assert_close(trainer.callback_metrics["val/loss"], total / tokens)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    task = language("LinearRouter", metric="ppl")
    trainer = Trainer(**QUIET, limit_test_batches=3)
    trainer.test(task, text_data(), verbose=False)
    assert_close(trainer.callback_metrics["test/ppl"], trainer.callback_metrics["test/loss"].exp())


def test_loss_weights_are_applied_once_per_layer():
    task, ids = language("LinearRouter", loss_weights={"balance": 0.5}), torch.randint(256, (2, 16))
    _, context = task.net(ids)
    losses = task.auxiliary_losses(context)
    assert losses.keys() == {"balance"}
    raw = [loss_of("balance", published.routing, context) for published in context.routings]
    assert len(raw) == 2
    assert_close(losses["balance"], 0.5 * sum(raw))
    published = language("LinearRouter")
    assert published.auxiliary_losses(published.net(ids)[1]).keys() == {"balance", "z"}
    none = language("HyperRouter")
    assert none.auxiliary_losses(none.net(ids)[1]) == {}
    wanted = language("HyperRouter", loss_weights={"balance": 0.01})
    assert wanted.auxiliary_losses(wanted.net(ids)[1]).keys() == {"balance"}
    impossible = language("HashRouter", loss_weights={"balance": 0.01})
    with pytest.raises(UserError, match="loss_weights: HashRouter has no loss 'balance'; it has none"):
        impossible.auxiliary_losses(impossible.net(ids)[1])


def test_evaluation_may_use_another_k():
    task = language("LinearRouter", eval_top_k=1)
    seen = []
    for layer in moe_layers(task):
        layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing.experts_TK.shape[1]))
    Trainer(**QUIET, max_steps=1, limit_val_batches=1, val_check_interval=1, enable_checkpointing=False).fit(
        task, text_data()
    )
    assert seen == [2, 2, 1, 1]
    with pytest.raises(UserError, match="eval_top_k must be between 1 and 4, got 5"):
        language("LinearRouter", eval_top_k=5)


def test_k_grows_with_any_router(router_name):
    task = language(router_name)
    ks = []
    layer = next(moe_layers(task))
    layer.register_routing_hook(lambda published, context: ks.append(published.routing.experts_TK.shape[1]))
    trainer = Trainer(
        **QUIET, max_steps=5, limit_val_batches=0, enable_checkpointing=False, callbacks=[KSchedule(1, 4)]
    )
    trainer.fit(task, text_data())
    assert ks == [1, 2, 2, 3, 3]  # round(1 + 3 t / 5), halves to even
    assert task.state_dict()["net.blocks.0.feed_forward.router.k"] == 3


def test_balanced_tables_are_calibrated_from_the_training_split():
    task = language("HashRouter", table="balanced")
    before = next(moe_layers(task)).router.table.clone()
    Trainer(**QUIET, max_steps=1, limit_val_batches=0, enable_checkpointing=False).fit(task, text_data())
    assert not torch.equal(next(moe_layers(task)).router.table, before)


def test_patch_ids_are_fitted_to_the_training_split():
    task = vision("HashRouter", patch_ids="codebook", num_patch_ids=16)
    before = task.net.patch_ids.codebook.clone()
    Trainer(**QUIET, max_steps=1, limit_val_batches=0, enable_checkpointing=False).fit(task, ImageData(batch_size=8))
    assert not torch.equal(task.net.patch_ids.codebook, before)


def test_a_model_with_other_classes_than_the_data_is_refused():
    with pytest.raises(UserError, match="the data has 10 classes, the model 3: set num_classes to 10"):
        Trainer(**QUIET, max_steps=1).fit(vision("LinearRouter", num_classes=3), ImageData(batch_size=8))


def test_a_run_without_end_is_refused():
    with pytest.raises(UserError, match=r"set trainer.max_steps or trainer.max_epochs"):
        Trainer(**QUIET, max_epochs=-1).fit(language("LinearRouter"), text_data())


def test_weight_decay_spares_norms_biases_and_embeddings():
    task = vision("XMoERouter")
    names = {id(parameter): name for name, parameter in task.net.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(task.net))
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    assert {"vit.pos_embed", "vit.cls_token", "vit.norm.weight", "vit.blocks.0.attn.qkv.bias"} <= spared
    assert "vit.blocks.1.mlp.experts.up_bias" in spared
    assert "vit.blocks.1.mlp.router.expert_embedding" in spared
    assert {"vit.blocks.0.attn.qkv.weight", "vit.blocks.1.mlp.experts.up", "vit.head.weight"} <= decayed
    text = language("LinearRouter")
    decayed, spared = (group["params"] for group in parameter_groups(text.net))
    assert any(p is text.net.embedding.weight for p in spared)  # tied with the output layer


def test_optimisers_are_fused_where_the_user_has_not_chosen():
    torch.manual_seed(0)
    start = torch.randn(7, 5, dtype=torch.float64)
    gradients = torch.randn(6, 7, 5, dtype=torch.float64)

    def train(fused_from: int | None, **options) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, **options)
        for number, gradient in enumerate(gradients):
            if number == fused_from:
                use_fused_kernel(optimizer)
            parameter.grad = gradient
            optimizer.step()
        return parameter.detach(), optimizer

    expected, plain = train(None)
    assert plain.param_groups[0]["fused"] is None
    for fused_from in (0, 3):  # from the start, and with a state that another kernel has made
        result, optimizer = train(fused_from)
        assert optimizer.param_groups[0]["fused"] is True
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        assert result._version >= 6 - fused_from  # what is kept until a parameter changes depends on it
    for choice in ({"foreach": True}, {"fused": False}):
        result, optimizer = train(0, **choice)
        assert not optimizer.param_groups[0]["fused"]
    without = torch.optim.Rprop([torch.nn.Parameter(start.clone())])
    use_fused_kernel(without)
    assert "fused" not in without.param_groups[0]


def test_a_run_is_fused_also_when_it_goes_on(tmp_path):
    trainer = Trainer(**QUIET, max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(language("LinearRouter"), text_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["fused"] for group in groups] == [True, True]
    for group in groups:  # as a run on several processes saves it
        group["fused"] = False
    torch.save(saved, tmp_path / "b.ckpt")
    again = Trainer(**QUIET, max_steps=2, limit_val_batches=0, enable_checkpointing=False)
    again.fit(language("LinearRouter"), text_data(), ckpt_path=tmp_path / "b.ckpt")
    assert [group["fused"] for group in again.optimizers[0].param_groups] == [True, True]


def test_an_optimizer_without_state_goes_on(tmp_path):
    sgd = partial(torch.optim.SGD, lr=0.1)
    for steps, resumed in ((1, None), (2, tmp_path / "a.ckpt")):
        trainer = Trainer(**QUIET, max_steps=steps, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(language("LinearRouter", optimizer=sgd), text_data(), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trainer.global_step == 2


def test_the_learning_rate_warms_up_and_falls():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupCosine(optimizer, 110, warmup_steps=10, final_share=0.1)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0"):
        WarmupCosine(optimizer, 10, warmup_steps=-1)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), [1.0, 0.5, 0.25]),
        (partial(torch.optim.lr_scheduler.StepLR, step_size=2), [1.0, 1.0, 0.1]),
        (partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)), [1.0, 1 / 2, 1 / 3]),
        (partial(WarmupCosine, warmup_steps=2), [0.5, 1.0, 1.0]),
        (lambda optimizer, total_steps: WarmupCosine(optimizer, total_steps // 4), [1.0, 0.1, 0.1]),
        (None, [1.0, 1.0, 1.0]),
    ],
)
def test_the_number_of_steps_goes_to_schedules_that_ask_for_it(schedule, rates):
    task = language("LinearRouter", optimizer=partial(torch.optim.SGD, lr=1.0), lr_scheduler=schedule)
    task._total_steps = 4
    configured = task.configure_optimizers()
    optimizer = configured if schedule is None else configured["optimizer"]
    seen = []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule is not None:
            configured["lr_scheduler"]["scheduler"].step()
    assert seen == pytest.approx(rates)


CHECKPOINT_MAKER = """
from functools import partial
import torch
from lightning import Trainer
from routerzoo import *
from routerzoo import ImageClassification, LanguageModeling, TextData
task = LanguageModeling(
    router=partial(HashRouter, top_k=2, seed=5), experts=SwiGLUExperts, d_model=16, num_blocks=1, num_heads=2,
    num_experts=4, max_length=16, optimizer=partial(torch.optim.AdamW, lr=0.1),
)
trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, logger=False, enable_progress_bar=False)
trainer.fit(task, TextData(sequence_length=16, batch_size=2))
trainer.save_checkpoint("made.ckpt")
torch.save(task.eval().net(torch.arange(16)[None])[0], "logits.pt")
"""


@pytest.mark.full
@pytest.mark.full
def test_checkpoints_made_in_python_load_in_another_process(tmp_path):
    subprocess.run([sys.executable, "-c", CHECKPOINT_MAKER], check=True, capture_output=True, cwd=tmp_path)
    task = LanguageModeling.load_from_checkpoint(tmp_path / "made.ckpt", weights_only=True)
    router = next(moe_layers(task)).router
    assert (type(router).__name__, router.top_k) == ("HashRouter", 2)
    expected = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(task.eval().net(torch.arange(16)[None])[0], expected)
    trainer = Trainer(**QUIET, limit_val_batches=1)
    trainer.validate(task, text_data(), ckpt_path=str(tmp_path / "made.ckpt"), verbose=False, weights_only=True)


def test_accumulated_gradients_are_those_of_a_larger_batch():
    def gradients(batch_size, accumulate):
        torch.manual_seed(0)
        task = language("HyperRouter")
        kept = []
        task.on_before_optimizer_step = lambda optimizer: kept.append([p.grad.clone() for p in task.net.parameters()])
        trainer = Trainer(
            **QUIET,
            max_steps=1,
            limit_val_batches=0,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=False,
        )
        trainer.fit(task, text_data(batch_size=batch_size))
        return kept[0]

    for got, expected in zip(gradients(2, 4), gradients(8, 1), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("make", [language, vision])
def test_one_checkpoint_is_evaluated_at_several_k(make):
    data = text_data() if make is language else ImageData(batch_size=8)
    task = make("LinearRouter", eval_top_k=[2, 1, 4])
    trainer = Trainer(**QUIET, limit_test_batches=3, enable_checkpointing=False)
    (results,) = trainer.test(task, data, verbose=False)
    name = task.headline_metric
    assert results[f"test/{name}"] == results[f"test/k2/{name}"]
    for top_k in (1, 2, 4):
        torch.manual_seed(0)
        alone = make("LinearRouter", eval_top_k=top_k)
        alone.load_state_dict(task.state_dict(), strict=False)
        (single,) = Trainer(**QUIET, limit_test_batches=3, enable_checkpointing=False).test(alone, data, verbose=False)
        assert results[f"test/k{top_k}/loss"] == pytest.approx(single["test/loss"], rel=1e-6)
        assert not any("/k" in key for key in single)
    assert [layer.router.top_k for layer in moe_layers(task)] == [2] * len(list(moe_layers(task)))


@pytest.mark.parametrize(
    ("top_ks", "message"),
    [([], "at least one k"), ([2, 2], "none twice"), ([1, 5], "eval_top_k must be between 1 and 4, got 5")],
)
def test_bad_lists_of_k_are_refused(top_ks, message):
    with pytest.raises(UserError, match=message):
        language("LinearRouter", eval_top_k=top_ks)
    with pytest.raises(UserError, match="has no MoE layer"):
        language("LinearRouter", eval_top_k=[1, 2], moe_blocks="none")


def test_a_schedule_beyond_what_a_router_can_do_is_refused_before_training():
    trainer = Trainer(
        **QUIET, max_steps=2, limit_val_batches=0, enable_checkpointing=False, callbacks=[KSchedule(2, 5)]
    )
    with pytest.raises(UserError, match="KSchedule sets k to 5, but LinearRouter of MoE layer 0 can do 4 at most"):
        trainer.fit(language("LinearRouter"), text_data())


def test_results_name_the_k_that_they_were_evaluated_with(tmp_path):
    from routerzoo.runs.report import RunReport

    callbacks = [RunReport(str(tmp_path))]
    trainer = Trainer(**QUIET, limit_test_batches=1, enable_checkpointing=False, callbacks=callbacks)
    trainer.test(language("LinearRouter", eval_top_k=[1, 4]), text_data(), verbose=False)
    results = json.loads((tmp_path / "results.json").read_text())["test"]
    assert results["k"] == 1
    assert [row["k"] for row in results["by k"]] == [1, 4]
    assert results["active parameters"] == results["by k"][0]["active parameters"]


def test_a_model_can_be_evaluated_before_it_is_trained():
    task, data = language("LinearRouter"), text_data()
    trainer = Trainer(**QUIET, max_steps=2, limit_val_batches=2, limit_test_batches=2, enable_checkpointing=False)
    (before,) = trainer.validate(task, data, verbose=False)
    trainer.test(task, data, verbose=False)
    trainer.fit(task, data)
    (after,) = trainer.validate(task, data, verbose=False)
    assert after["val/loss"] != before["val/loss"]


def test_checkpoints_made_in_python_name_the_defaults():
    task = language("LinearRouter")
    assert (task.hparams["num_heads"], task.hparams["d_model"]) == (2, 16)
    assert (task.hparams["rotary_base"], task.hparams["consistency"], task.hparams["top_p"]) == (10_000.0, 0.0, 0.95)
    with pytest.raises(TypeError, match="unexpected keyword argument 'd_mode'"):
        language("LinearRouter", d_mode=3)


def test_what_is_loaded_on_first_use_is_listed():
    assert {"LanguageModeling", "RouterHooks", "TextData", "MoE"} <= set(dir(routerzoo))
    assert routerzoo.LanguageModeling is LanguageModeling


def test_the_number_of_steps_is_planned_once():
    task, steps = language("LinearRouter"), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            steps.append(module.total_steps)

    schedule = GradientAccumulationScheduler({0: 1, 1: 4})
    limits = {"max_epochs": 3, "limit_train_batches": 8, "limit_val_batches": 0}
    Trainer(**QUIET, **limits, enable_checkpointing=False, callbacks=[Watch(), schedule]).fit(task, text_data())
    assert steps == [8 + 2 + 2] * 24


class Adapter(nn.Module):
    """Wraps a router, as adapters of fine-tuning do."""

    def __init__(self, router):
        super().__init__()
        self.base = router

    def forward(self, *arguments):
        return self.base(*arguments)


@pytest.mark.parametrize(("make", "data"), [(language, text_data), (vision, lambda: ImageData(batch_size=8))])
def test_a_wrapped_router_is_evaluated_like_a_bare_one(make, data):
    task, trainer = make("LinearRouter", eval_top_k=[1, 4]), Trainer(**QUIET, limit_val_batches=1)
    (expected,) = trainer.validate(task, data(), verbose=False)
    for layer in moe_layers(task):
        layer.router = Adapter(layer.router)
    (result,) = trainer.validate(task, data(), verbose=False)
    assert result == expected
    assert task.costs().active > 0
    if make is language:
        assert trainer.predict(task, torch.utils.data.DataLoader(torch.zeros(1, 4).long()))


def test_an_evaluation_in_16_bits_adds_up_in_32():
    task = language("HashRouter")  # routed alike in every precision
    results = [
        Trainer(**QUIET, limit_val_batches=100, precision=precision).validate(task, text_data(), verbose=False)[0]
        for precision in ("32-true", "bf16-true")
    ]
    for name in ("val/loss", "val/bpb"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-3)


def test_a_sharded_model_does_not_generate():
    task = language("LinearRouter")
    trainer = Trainer(**QUIET, devices=1, strategy=ShardedStrategy())
    with (
        patch.dict(os.environ),  # Lightning sets the address of the process group
        pytest.raises(UserError, match=r"a sharded model cannot generate: predict with trainer\.devices 1"),
    ):
        trainer.predict(task, [torch.zeros(1, 4).long()])
    torch.distributed.destroy_process_group()
    assert not task.is_sharded  # it is refused before anything is built and read


def test_fewer_prompts_than_processes_are_refused():
    data = text_data(prompts=["a", "b"])
    data.trainer = SimpleNamespace(world_size=3)
    with pytest.raises(UserError, match="2 prompts cannot be shared among 3 processes: predict with"):
        data.predict_dataloader()
    data.trainer.world_size = 2
    assert len(data.predict_dataloader()) == 2
