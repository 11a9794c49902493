"""What Lightning's own tests do with its callbacks, with every callback of ours."""

import copy
import importlib
import inspect
import io
import pickle
import pkgutil
import warnings

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import routerzoo.callbacks
import routerzoo.runs
from routerzoo.callbacks import (
    ExpertNormMonitor,
    ExpertSpecialization,
    FineTune,
    KSchedule,
    RouterHooks,
    RoutingMonitor,
    StabilityMonitor,
    StopOnNonFiniteLoss,
)
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers
from routerzoo.runs.checkpoint import RunCheckpoint
from routerzoo.runs.final_validation import FinalValidation
from routerzoo.runs.predictions import PredictionWriter
from routerzoo.runs.progress_file import ProgressFile
from routerzoo.runs.report import RunReport
from routerzoo.runs.routing_pictures import RoutingPictures
from tests.callbacks.plain import BATCHES, QUIET, Plain, loader

BUILD = {
    "ExpertNormMonitor": lambda folder: ExpertNormMonitor(),
    "ExpertSpecialization": lambda folder: ExpertSpecialization(),
    "FinalValidation": lambda folder: FinalValidation(),
    "FineTune": lambda folder: FineTune(str(folder / "start.ckpt"), freeze_router=False, freeze_experts=False),
    "KSchedule": lambda folder: KSchedule(1, 3),
    "PredictionWriter": lambda folder: PredictionWriter(str(folder)),
    "ProgressFile": lambda folder: ProgressFile(str(folder / "progress.json")),
    "RouterHooks": lambda folder: RouterHooks(),
    "RoutingMonitor": lambda folder: RoutingMonitor(picture=None),
    "RoutingPictures": lambda folder: RoutingPictures(),
    "RunCheckpoint": lambda folder: RunCheckpoint(str(folder / "checkpoints"), "last", every_n_train_steps=4),
    "RunReport": lambda folder: RunReport(str(folder)),
    "StabilityMonitor": lambda folder: StabilityMonitor(every_n_steps=4, picture=None),
    "StopOnNonFiniteLoss": lambda folder: StopOnNonFiniteLoss(),
}
OBSERVERS = sorted(set(BUILD) - {"FineTune", "KSchedule"})
"""Those that leave training as it is."""
# Two that differ in what their state depends on.
SECOND = {
    "RoutingMonitor": lambda folder: RoutingMonitor("other.png"),
    "RoutingPictures": lambda folder: RoutingPictures(examples=1),
    "RunCheckpoint": lambda folder: RunCheckpoint(str(folder / "checkpoints"), "best", monitor="val/loss"),
    "StabilityMonitor": lambda folder: StabilityMonitor(every_n_steps=4, top_k=1, picture=None),
}
IGNORES_K = pytest.mark.filterwarnings("ignore:LinearRouter was built with top_k = 2")  # KSchedule's
ONE_IS_ENOUGH = {"RouterHooks", "RunReport"}


@pytest.fixture(params=sorted(BUILD))
def name(request):
    return request.param


@pytest.fixture
def callback(name, tmp_path):
    if name == "FineTune":
        torch.manual_seed(1)
        trainer = Trainer(**QUIET)
        trainer.strategy.connect(Plain())
        trainer.save_checkpoint(tmp_path / "start.ckpt")
        torch.manual_seed(0)
    return BUILD[name](tmp_path)


def trainer_with(*callbacks, tmp_path=".", **options):
    checkpoints = any(isinstance(callback, RunCheckpoint) for callback in callbacks)
    quiet = {**QUIET, "enable_checkpointing": checkpoints, "default_root_dir": tmp_path}
    return Trainer(**{**quiet, **options}, callbacks=list(callbacks))


def fit(trainer, module=None):
    module = Plain() if module is None else module
    trainer.fit(module, loader(), loader(1))
    return module


def test_every_callback_is_here():
    found = set()
    for package in (routerzoo.callbacks, routerzoo.runs):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            found |= {
                cls.__name__
                for cls in vars(module).values()
                if inspect.isclass(cls) and issubclass(cls, Callback) and cls.__module__ == info.name
            }
    assert found == set(BUILD)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"logger": True, "log_every_n_steps": 0},
        {"max_epochs": 0},
        {"max_steps": 3},
        {"overfit_batches": 1, "log_every_n_steps": 1},
        {"fast_dev_run": True},
        {"num_sanity_val_steps": 2},
        {"val_check_interval": 4, "log_every_n_steps": 2},
        {"accumulate_grad_batches": 3, "log_every_n_steps": 1},
        {"precision": "bf16-mixed"},
        {"detect_anomaly": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*shuffling")
def test_trainers(callback, options, tmp_path):
    logger = CSVLogger(tmp_path) if options.get("logger") else False
    fit(trainer_with(callback, tmp_path=tmp_path, **{**options, "logger": logger}))


@pytest.mark.filterwarnings("ignore:.*self.log:UserWarning")
def test_barebones(callback):
    options = {"accelerator": "cpu", "barebones": True, "max_epochs": 1, "callbacks": [callback]}
    if isinstance(callback, RunCheckpoint):
        with pytest.raises(MisconfigurationException, match="enable_checkpointing=False"):
            Trainer(**options)
        return
    fit(Trainer(**options))


def test_without_validation(name, callback, tmp_path):
    trainer = trainer_with(callback, tmp_path=tmp_path, limit_val_batches=0)
    if name == "StabilityMonitor":
        with pytest.raises(UserError, match="there is no validation batch to follow"):
            fit(trainer)
        return
    fit(trainer)
    assert trainer.global_step == BATCHES


def test_validate_fit_test_predict_validate(callback, tmp_path):
    module, trainer = Plain(), trainer_with(callback, tmp_path=tmp_path)
    (before,) = trainer.validate(module, loader(1), verbose=False)
    fit(trainer, module)
    trainer.test(module, loader(1), verbose=False)
    assert len(trainer.predict(module, loader(1))) == BATCHES
    (after,) = trainer.validate(module, loader(1), verbose=False)
    assert before["val/loss"] != after["val/loss"]
    assert not any(layer._routing_hooks or layer._forward_pre_hooks for layer in moe_layers(module))


def test_two_fits_of_a_trainer(callback, tmp_path):
    trainer = trainer_with(callback, tmp_path=tmp_path, log_every_n_steps=4)
    module = fit(trainer)
    halfway = copy.deepcopy(module.state_dict())
    seen = []
    module.on_train_start = lambda: seen.append({name: v.clone() for name, v in module.state_dict().items()})
    trainer.fit_loop.max_epochs = 2
    fit(trainer, module)
    assert trainer.global_step == 2 * BATCHES
    assert all(torch.equal(seen[0][name], halfway[name]) for name in halfway if not name.endswith(".k"))


def test_one_instance_for_two_runs(callback, tmp_path):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = trainer_with(callback, tmp_path=tmp_path, log_every_n_steps=4)
        module = fit(trainer)
        states.append((copy.deepcopy(callback.state_dict()), module.state_dict()))
    (one, weights), (other, other_weights) = states
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    one.pop("seconds", None), other.pop("seconds", None)
    assert str(one) == str(other)


def test_two_instances(name, callback, tmp_path):
    second = SECOND.get(name, BUILD[name])(tmp_path)
    if name in ONE_IS_ENOUGH:
        with pytest.raises(RuntimeError, match="must be unique"):
            trainer_with(callback, second, tmp_path=tmp_path)
        return
    trainer = trainer_with(callback, second, tmp_path=tmp_path)
    fit(trainer)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert len(saved) == (2 if callback.state_dict() else 0)


@pytest.mark.full
@pytest.mark.parametrize("trained", [False, True])
def test_copies(callback, trained, tmp_path):
    if trained:
        fit(trainer_with(callback, tmp_path=tmp_path))
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.state_key == callback.state_key
        one, other = ({**c.state_dict(), "seconds": 0} for c in (copied, callback))
        assert str(one) == str(other)
        fit(trainer_with(copied, tmp_path=tmp_path, max_steps=2))


@pytest.mark.full
@IGNORES_K
def test_states_are_copies_that_plain_readers_load(name, callback, tmp_path):
    trainer = trainer_with(callback, tmp_path=tmp_path, log_every_n_steps=2)
    module = fit(trainer)
    state = callback.state_dict()
    state.pop("seconds", None)
    before = str(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert str(torch.load(file, weights_only=True)) == before
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.fit_loop.max_epochs = 2
    fit(trainer, module)
    assert str(state) == before
    resumed = trainer_with(BUILD[name](tmp_path), tmp_path=tmp_path, max_epochs=2)
    resumed.fit(Plain(), loader(), loader(1), ckpt_path=tmp_path / "end.ckpt")
    assert resumed.global_step == 2 * BATCHES


@pytest.mark.full
@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_leave_training_alone(name, tmp_path):
    weights = []
    for callbacks in ([], [BUILD[name](tmp_path)]):
        torch.manual_seed(0)
        module = Plain()
        trainer = trainer_with(*callbacks, tmp_path=tmp_path, log_every_n_steps=2, val_check_interval=4)
        fit(trainer, module)
        weights.append([*module.state_dict().values(), torch.rand(3)])
        metrics = {name for name in trainer.callback_metrics if not name.startswith(("train/moe", "val/moe"))}
        assert {"train/loss", "val/loss"} <= metrics
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("where", ["training_step", "validation_step", "test_step"])
def test_an_exception_leaves_the_module_usable(callback, where, tmp_path):
    module, trainer = Plain(), trainer_with(callback, tmp_path=tmp_path)
    step = getattr(module, where)

    def broken(batch, batch_idx):
        if batch_idx == 2:
            raise ZeroDivisionError
        return step(batch, batch_idx)

    setattr(module, where, broken)
    run = {
        "training_step": lambda: fit(trainer, module),
        "validation_step": lambda: trainer.validate(module, loader(1), verbose=False),
        "test_step": lambda: trainer.test(module, loader(1), verbose=False),
    }
    with pytest.raises(ZeroDivisionError):
        run[where]()
    with torch.no_grad():
        module(torch.randn(3, 8))
    assert not any(layer._routing_hooks or layer._forward_pre_hooks for layer in moe_layers(module))


@pytest.mark.full
@pytest.mark.parametrize("kept", ["without, then with", "with, then without"])
@IGNORES_K
def test_resuming_with_another_set_of_callbacks(callback, kept, tmp_path):
    first, then = ([], [callback]) if kept == "without, then with" else ([callback], [])
    trainer = trainer_with(*first, tmp_path=tmp_path)
    fit(trainer)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = trainer_with(*then, tmp_path=tmp_path, max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        resumed.fit(Plain(), loader(), loader(1), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.global_step == 2 * BATCHES
