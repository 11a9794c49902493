"""`RoutingCallback` in the Trainer of transformers."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from routerzoo import LinearRouter, StableMoERouter, auxiliary_loss, moe_layers
from routerzoo.errors import UserError
from tests.hf.models import build

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf = pytest.importorskip("routerzoo.hf")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
IDS = torch.randint(3, 40, (8, 8), generator=torch.Generator().manual_seed(0))
WEIGHTS = {"z": 0.3}
"""The mean over tokens of something of each token: of two half batches it is that of the whole one."""


def upcycled(router=None):
    return hf.upcycle(build("Llama"), num_experts=4, router=router or partial(LinearRouter, top_k=2))


def trainer_of(model, folder, *, steps=1, batch=4, accumulate=1, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer._get_train_sampler = lambda *_: None  # in order
    return trainer


def routers_of(model):
    return [layer.router.weight.detach() for layer in moe_layers(model)]


@pytest.mark.parametrize(
    "accumulate", [1, pytest.param(2, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)]
)
def test_a_step_is_that_of_a_loop_of_ones_own(accumulate, tmp_path):
    expected = upcycled().train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    loss = expected(input_ids=IDS[:4], labels=IDS[:4]).loss
    (loss + auxiliary_loss(expected, expected.routing.context, WEIGHTS)).backward()
    optimizer.step()
    trainer = trainer_of(upcycled(), tmp_path, batch=4 // accumulate, accumulate=accumulate)
    trainer.add_callback(hf.RoutingCallback(trainer, WEIGHTS))
    trainer.train()
    assert_close(routers_of(trainer.model), routers_of(expected), rtol=1e-5, atol=1e-6)
    assert not torch.equal(routers_of(expected)[0], routers_of(upcycled())[0])
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logs["z_loss"] == pytest.approx(auxiliary_loss(expected, expected.routing.context, WEIGHTS).item(), rel=1e-5)
    worst = max(float(p.routing.expert_load(4).max() * 4 / (4 * 8 * 2)) for p in expected.routing.context.routings)
    assert logs["moe/load_max"] == pytest.approx(worst)


@pytest.mark.full
def test_routers_are_driven_and_evaluation_changes_nothing(tmp_path):
    trainer = trainer_of(upcycled(partial(StableMoERouter, top_k=1)), tmp_path, steps=4)
    trainer.add_callback(hf.RoutingCallback(trainer, detail="detailed", token_counts=torch.ones(40, dtype=torch.int64)))
    trainer.train()
    assert {layer.router.stage for layer in moe_layers(trainer.model)} == {2}
    assert not any(layer.is_driven for layer in moe_layers(trainer.model))
    assert "moe1/load_entropy" in {key for entry in trainer.state.log_history for key in entry}
    trainer.train()  # attaches again


@pytest.mark.full
def test_adapters_of_peft_are_trained_with_the_losses(tmp_path):
    config = peft.LoraConfig(r=2, target_parameters=["experts.gate_up", "experts.down"], modules_to_save=["router"])
    trainer = trainer_of(peft.get_peft_model(upcycled(), config), tmp_path, steps=2)
    trainer.add_callback(hf.RoutingCallback(trainer, {"balance": 0.1}))
    trainer.train()
    assert "balance_loss" in {key for entry in trainer.state.log_history for key in entry}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: build("Llama"), {}, "LlamaForCausalLM has no routers of ours"),
        (upcycled, {"label_smoothing_factor": 0.1}, "label_smoothing_factor replaces the model's loss"),
        (lambda: balanced_twice(), {}, "output_router_logits adds the model's own balance loss"),
    ],
    ids=["plain", "smoothing", "twice"],
)
@pytest.mark.full
def test_what_would_go_wrong_in_silence_is_refused(model, options, message, tmp_path):
    trainer = trainer_of(model(), tmp_path, **options)

    def train():
        trainer.add_callback(hf.RoutingCallback(trainer, {"balance": 0.1}))
        trainer.train()

    with pytest.raises(UserError, match=message):
        train()


def balanced_twice():
    model = hf.replace_routers(build("Mixtral"))
    model.config.output_router_logits = True
    return model
