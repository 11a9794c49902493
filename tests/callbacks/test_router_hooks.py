"""Router updates in Lightning: once per optimizer step, whatever the loop of the module."""
# Every batch has 6 tokens, of which each is sent to one expert, so that the counts of a batch sum to 6.

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from routerzoo import (
    LayerSpec,
    LogitRouter,
    MoE,
    Router,
    RouterHooks,
    Routing,
    RoutingContext,
    StableMoERouter,
    auxiliary_loss,
    moe_layers,
)
from routerzoo.callbacks import KSchedule, StopOnNonFiniteLoss
from routerzoo.functional import gate_linear
from tests.conftest import router_factory

D, E, TOKENS, VOCAB = 8, 4, 6, 20
SPEC = LayerSpec(D, E, layer=0, vocab_size=VOCAB)


class Counting(LogitRouter):
    """Remembers its updates: the load of each step, and which steps began."""

    paper = "test"
    needs_updates = True
    renormalize = False

    def __init__(self, spec, *, top_k=1):
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model))
        self.register_buffer("bias", torch.zeros(spec.num_experts))
        self.loads, self.begun = [], []

    def logits(self, x_TD, context):
        return gate_linear(x_TD, self.weight)

    def statistics(self, routing, context):
        return {"load": routing.expert_load(self.spec.num_experts)}

    def begin_step(self, step, total_steps):
        self.begun.append((step, total_steps))

    def update(self, statistics):
        load_E = statistics["load"]
        self.loads.append(load_E.sum().item())
        self.bias += 0.1 * (load_E.mean() - load_E).sign()


class Data(LightningDataModule):
    def __init__(self, batches=6):
        super().__init__()
        self.x = torch.randn(batches, TOKENS, D)

    def train_dataloader(self):
        return DataLoader(self.x, batch_size=None)

    def token_counts(self):
        return torch.arange(VOCAB)


class Automatic(LightningModule):
    def __init__(self, router=Counting, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.layer = MoE(SPEC, router)
        self.build = lambda parameters: optimizer(parameters, **{"lr": 0.01, **options})

    def training_step(self, x_TD, batch_idx):
        return self.loss(x_TD)

    def loss(self, x_TD):
        return self.layer(x_TD, RoutingContext(torch.arange(len(x_TD)))).square().mean()

    def configure_optimizers(self):
        return self.build(self.parameters())

    @property
    def router(self):
        return self.layer.router


def trainer(*callbacks, hooks=True, **options):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callbacks = [*callbacks, *([RouterHooks()] if hooks else [])]
    return Trainer(**{"max_epochs": 1, "enable_checkpointing": False, **quiet, **options}, callbacks=callbacks)


def test_a_router_is_updated_after_each_step():
    module = Automatic()
    trainer().fit(module, Data())
    assert module.router.loads == [6.0] * 6
    assert module.router.begun == [(step, 6) for step in range(7)]
    assert not module.layer.is_driven  # detached


def test_accumulated_batches_are_one_step():
    module = Automatic()
    trainer(accumulate_grad_batches=4).fit(module, Data(6))
    assert module.router.loads == [24.0, 12.0]
    assert module.router.begun == [(0, 2), (1, 2), (2, 2)]


def test_the_number_of_steps_is_fixed_at_the_start():
    module, ks = Automatic(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ks.append(pl_module.router.top_k)

    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    trainer(KSchedule(1, 4), schedule, Watch(), max_epochs=3).fit(module, Data(6))
    assert {total for _, total in module.router.begun} == {6 + 2 + 2}
    assert module.router.loads[:2] == [6.0, 6.0]  # at k = 1
    assert ks == sorted(ks)
    assert ks[-1] == 4


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.SGD])
def test_a_closure_that_runs_several_times_counts_once(optimizer):
    options = {"max_iter": 3, "tolerance_change": 0, "tolerance_grad": 0} if optimizer is torch.optim.LBFGS else {}
    module = Automatic(optimizer=optimizer, **options)
    trainer().fit(module, Data(3))
    assert module.router.loads == [6.0] * 3


class Adversaries(LightningModule):
    """Two layers with an optimizer each; the second one's steps are every other batch."""

    automatic_optimization = False

    def __init__(self, toggle):
        super().__init__()
        self.one, self.other = MoE(SPEC, Counting), MoE(SPEC, Counting)
        self.toggle = toggle

    def training_step(self, x_TD, batch_idx):
        first, second = self.optimizers()
        self.step(first, self.one(self.other(x_TD)))  # its gradient reaches both
        if batch_idx % 2:
            self.step(second, self.other(self.one(x_TD).detach()))

    def step(self, optimizer, y_TD):
        optimizer.zero_grad()
        self.manual_backward(y_TD.square().mean())
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.one, self.other)]


class Toggled(Adversaries):
    """As GANs are trained: the parameters of the other optimizer are switched off."""

    def training_step(self, x_TD, batch_idx):
        first, second = self.optimizers()
        for number, (optimizer, layers) in enumerate(
            ((first, (self.other, self.one)), (second, (self.one, self.other)))
        ):
            if number and not batch_idx % 2:
                continue
            self.toggle_optimizer(optimizer)
            self.step(optimizer, layers[1](layers[0](x_TD)))
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("kind", [Adversaries, Toggled])
def test_each_layer_follows_the_optimizer_that_trains_it(kind):
    module = kind(toggle=False)
    trainer().fit(module, Data(6))
    assert module.one.router.loads == [6.0] * 6
    assert module.other.router.loads == [6.0] * 3
    assert [step for step, _ in module.one.router.begun] == list(range(7))
    assert [step for step, _ in module.other.router.begun] == list(range(4))


def test_max_steps_counts_the_steps_of_all_optimizers():
    module = Adversaries(toggle=False)
    trainer(max_steps=8, max_epochs=-1).fit(module, Data(20))
    assert {total for _, total in module.one.router.begun} == {4}


def test_a_layer_that_no_optimizer_trains_follows_the_first():
    class HeadOnly(Automatic):
        def __init__(self):
            super().__init__()
            self.layer.experts.requires_grad_(False)
            self.layer.router.requires_grad_(False)
            self.inlet = nn.Linear(D, D)

        def loss(self, x_TD):
            return super().loss(self.inlet(x_TD))

        def configure_optimizers(self):
            return torch.optim.SGD(self.inlet.parameters(), lr=0.1)

    module = HeadOnly()
    trainer().fit(module, Data(4))
    assert module.router.loads == [6.0] * 4
    frozen = HeadOnly()
    frozen.layer.router.freeze()
    trainer().fit(frozen, Data(4))
    assert frozen.router.loads == frozen.router.begun == []


class Break(Callback):
    """Makes the loss of the second step NaN."""

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == 1:
            loss.data.fill_(torch.nan)


def test_a_step_with_a_broken_loss_moves_nothing():
    module, states = Automatic(), []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    with pytest.warns(UserWarning, match="step 1"):
        trainer(Break(), StopOnNonFiniteLoss(skip=1), Keep()).fit(module, Data(4))
    assert module.router.loads == [6.0] * 3
    assert [step for step, _ in module.router.begun] == [0, 1, 2, 3]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    assert not torch.equal(states[2]["layer.router.bias"], states[1]["layer.router.bias"])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_moves_nothing(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)  # the first gradients overflow
    module = Automatic(optimizer=torch.optim.AdamW, fused=fused)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(plugins=[plugin], max_epochs=10).fit(module, Data(6))
    steps = [state["step"].item() for state in module.trainer.optimizers[0].state.values()]
    assert 0 < steps[0] < 60
    assert len(module.router.loads) == steps[0]
    assert set(module.router.loads) == {6.0}


def test_a_resumed_fit_continues_the_steps():
    def fit(router, epochs, ckpt_path=None):
        torch.manual_seed(0)
        module, data = Automatic(router), Data(3)
        run = trainer(max_epochs=epochs)
        run.fit(module, data, ckpt_path=ckpt_path)
        run.save_checkpoint(f"{epochs}.ckpt")
        return module

    assert fit(Counting, 1).router.begun == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert fit(Counting, 2, "1.ckpt").router.begun == [(3, 6), (4, 6), (5, 6), (6, 6)]
    staged = router_factory("StableMoERouter", stage1_steps=4)
    assert fit(staged, 1).router.stage == 1
    again, whole = fit(staged, 2, "1.ckpt"), fit(staged, 2)
    assert again.router.stage == whole.router.stage == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_second_fit_starts_anew_or_continues():
    module, hooks = Automatic(), RouterHooks()
    run = trainer(hooks, hooks=False)
    run.fit(module, Data(3))
    run.fit_loop.max_epochs = 2
    run.fit(module, Data(3))
    assert [step for step, _ in module.router.begun] == [0, 1, 2, 3, 3, 4, 5, 6]
    other = Automatic()
    trainer(hooks, hooks=False).fit(other, Data(2))
    assert other.router.begun == [(0, 2), (1, 2), (2, 2)]


def test_stages_switch_with_the_optimizer():
    module, stages = Automatic(router_factory("StableMoERouter", stage1_fraction=0.5)), []
    module.layer.register_routing_hook(lambda published, context: stages.append(module.router.stage))
    trainer(accumulate_grad_batches=2).fit(module, Data(8))
    assert isinstance(module.router, StableMoERouter)
    assert stages == [1] * 4 + [2] * 4


@pytest.mark.parametrize("given", [None, torch.arange(VOCAB).flip(0)])
def test_tables_are_fitted_to_token_counts_once(given):
    module = Automatic(router_factory("HashRouter", table="balanced"))
    fitted = []
    fit = module.router.fit_token_counts
    module.router.fit_token_counts = lambda counts: (fitted.append(counts), fit(counts))
    run = trainer(RouterHooks(given), hooks=False)
    run.fit(module, Data(2))
    (counts,) = fitted
    assert torch.equal(counts, torch.arange(VOCAB) if given is None else given)
    run.save_checkpoint("table.ckpt")
    resumed = Automatic(router_factory("HashRouter", table="balanced"))
    resumed.router.fit_token_counts = fitted.append
    trainer(RouterHooks(given), hooks=False, max_epochs=2).fit(resumed, Data(2), ckpt_path="table.ckpt")
    assert len(fitted) == 1
    assert torch.equal(resumed.router.table, module.router.table)


class Rewarded(Router):
    """Has a loss that depends on the loss of each token."""

    paper = "test"
    wants_feedback = True
    default_loss_weights = {"reward": 0.5}  # noqa: RUF012

    def __init__(self, spec):
        super().__init__(spec, top_k=1)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model))

    def route(self, x_TD, context):
        logits_TE = gate_linear(x_TD, self.weight)
        return Routing(logits_TE.argmax(-1, keepdim=True), logits_TE.softmax(-1).amax(-1, keepdim=True), logits_TE)

    def feedback(self, routing, context, token_losses_T):
        return {"reward": token_losses_T.mean() + 0.0 * routing.logits_TE.sum()}


def test_feedback_under_manual_optimization():
    class Manual(Automatic):
        automatic_optimization = False

        def training_step(self, x_TD, batch_idx):
            context = RoutingContext()
            token_losses_T = self.layer(x_TD, context).square().mean(-1)
            added = auxiliary_loss(self, context, token_losses=token_losses_T)
            assert added.item() == pytest.approx(0.5 * token_losses_T.mean().item())
            self.optimizers().zero_grad()
            self.manual_backward(token_losses_T.mean() + added)
            self.optimizers().step()

    trainer().fit(Manual(Rewarded), Data(2))


def test_without_the_callback_a_warning_names_it():
    module = Automatic()
    with pytest.warns(UserWarning, match=r"add the callback routerzoo.RouterHooks\(\) to the Trainer"):
        trainer(hooks=False).fit(module, Data(2))
    assert module.router.loads == []
    assert [layer.is_driven for layer in moe_layers(module)] == [False]


def test_an_exception_detaches():
    class Broken(Automatic):
        def training_step(self, x_TD, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken")
            return super().training_step(x_TD, batch_idx)

    module, hooks = Broken(), RouterHooks()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(hooks, hooks=False).fit(module, Data(4))
    assert not module.layer.is_driven
    assert hooks.state_dict() == {"steps": [2]}
