"""The command line, and every trap that it closes."""

import ast
import copy
import csv
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from routerzoo import LossWeight, __main__, registry
from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.cli import main as cli
from routerzoo.errors import UserError
from routerzoo.moe.auxiliary_loss import loss_of

CONFIG = """
model:
  class_path: LanguageModeling
  init_args:
    d_model: 16
    num_blocks: 2
    num_heads: 2
    num_experts: 4
    router: {class_path: HyperRouter, init_args: {top_k: 2, hidden_dim: 8}}
data: {class_path: TextData, init_args: {sequence_length: 16, batch_size: 8}}
trainer:
  accelerator: cpu
  max_steps: 4
  log_every_n_steps: 1
  val_check_interval: 2
  limit_val_batches: 2
  limit_test_batches: 2
  enable_progress_bar: false
"""
VISION = """
model:
  class_path: ImageClassification
  init_args:
    num_experts: 4
    patch_ids: lsh
    backbone_arguments: {patch_size: 14, embed_dim: 12, depth: 2, num_heads: 2}
    router: {class_path: HashRouter}
data: {class_path: ImageData, init_args: {batch_size: 32}}
trainer: {accelerator: cpu, max_steps: 2, limit_val_batches: 1, limit_test_batches: 1, limit_predict_batches: 2}
"""
RUN = Path("runs/tiny-shakespeare-HyperRouter/000")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One trained run, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["fit", "--config", "config.yaml"])
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return RUN


def fails(*args):
    """Run a command that must fail, and return what it says in its single line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code != 0
    return str(ended.value.code)


def test_fit_leaves_config_checkpoints_logs_and_a_picture(config, capsys):
    cli.main(["fit", "--config", config, "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "2"])
    for name in ("config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "logs/metrics.csv", "routing.png"):
        assert (RUN / name).is_file(), name
    assert list((RUN / "logs").glob("events.*"))
    shown = capsys.readouterr().out
    for text in (
        "HyperRouter · 2 MoE layers of 4 MLPExperts, top 2",
        "step 0",
        "unigram",
        "4.80",
        "load entropy",
        str(RUN),
    ):
        assert text in shown, text
    with (RUN / "logs" / "metrics.csv").open() as file:
        names = next(csv.reader(file))
    for stage in ("train", "val"):
        for layer in (0, 1):
            for metric in ("load_max", "load_min", "load_cv", "load_entropy", "dead_experts", "gate_entropy"):
                assert f"{stage}/moe{layer}/{metric}" in names
    assert any(name.startswith("lr-") for name in names)
    cli.main(["fit", "--config", config])
    assert (RUN.parent / "001" / "config.yaml").is_file()


@pytest.mark.full
def test_the_saved_config_runs_again(run, capsys):
    cli.main(["fit", "--config", str(run / "config.yaml")])
    assert (RUN.parent / "001" / "checkpoints" / "last.ckpt").is_file()


def test_the_saved_config_keeps_nulls(config, capsys):
    nulls = ["--trainer.check_val_every_n_epoch", "null"]  # the default is 1
    made = cli.RouterZooCLI(["--config", config, *nulls], run=False)
    saved = made.run_dir / "config.yaml"
    again = cli.RouterZooCLI(["--config", str(saved)], run=False)
    assert made.trainer.check_val_every_n_epoch is again.trainer.check_val_every_n_epoch is None
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", config, *nulls, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)  # as a sweep's configs
    written = yaml.safe_load(saved.read_text())
    assert written == {name: printed[name] for name in written}


def test_evaluation_works_on_the_checkpoint_alone(run, capsys):
    cli.main(["validate", "--ckpt_path", "last"])
    cli.main(["test", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")])
    shown = capsys.readouterr().out
    assert "val split" in shown
    assert "test split" in shown
    cli.main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "5"])  # a saved config blocks no later stage


def test_predict_continues_text(run, capsys):
    options = ["--model.predict_tokens", "7", "--data.prompts", '["To be", "or not"]']
    cli.main(["predict", "--ckpt_path", "last", *options])
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["To be", "or not"]
    assert all(line["continuation"] for line in lines)


@pytest.mark.full
def test_predict_gives_class_probabilities(tmp_path, capsys):
    (tmp_path / "vision.yaml").write_text(VISION)
    cli.main(["fit", "--config", "vision.yaml", "--trainer.enable_progress_bar", "false"])
    cli.main(["predict", "--ckpt_path", "last", "--trainer.enable_progress_bar", "false"])
    with open("runs/fashion-mini-HashRouter/000/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 64
    assert sum(float(rows[0][name]) for name in list(rows[0])[3:]) == pytest.approx(1, abs=1e-4)
    assert rows[0]["predicted"] in rows[0]


def test_resuming_says_from_where_and_keeps_the_log(run, capsys):
    before = (run / "logs" / "metrics.csv").read_text()
    assert before
    cli.main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1"])
    shown = capsys.readouterr().out
    assert f"resuming {run}/checkpoints/last.ckpt at step 4" in shown
    with (run / "logs" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert min(steps) < 4 <= max(steps)
    cli.main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"])
    shown = capsys.readouterr().out
    assert "It had reached trainer.max_steps: raise that to train on" in shown
    assert "Nothing was trained: the run is at step 6" in shown
    assert "Nothing was validated" not in shown
    # A run that was killed between its last checkpoint and its results has them when it is resumed.
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    cli.main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"])
    again = json.loads((run / "results.json").read_text())["fit"]
    told = ("bpb", "best bpb", "step 0 bpb", "step", "training tokens", "trained k", "training FLOPs", "k")
    assert {name: again[name] for name in told} == {name: results["fit"][name] for name in told}


def test_last_that_finds_nothing_is_an_error(config):
    assert "no checkpoint to continue from" in fails("fit", "--config", config, "--ckpt_path", "last")
    assert "no checkpoint to continue from" in fails("validate", "--ckpt_path", "last")


def test_a_checkpoint_never_overrides_the_command(run, config):
    path = str(run / "checkpoints" / "last.ckpt")
    for command in ("validate", "fit"):
        message = fails(command, "--config", config, "--model.router", "LinearRouter", "--ckpt_path", path)
        assert "it has router HyperRouter, the command asks for LinearRouter" in message
    message = fails("test", "--config", config, "--model.router.top_k", "3", "--ckpt_path", path)
    assert "it has router top_k 2, the command asks for 3" in message
    assert "To evaluate at another k, set model.eval_top_k." in message
    message = fails("test", "--config", config, "--model.d_model", "32", "--ckpt_path", path)
    assert "it has d_model 16, the command asks for 32" in message
    message = fails("test", "--config", config, "--model.experts", "SwiGLUExperts", "--ckpt_path", path)
    assert "it has experts MLPExperts, the command asks for SwiGLUExperts" in message


def test_evaluation_k_may_differ_from_the_trained_one(run, capsys):
    cli.main(["validate", "--ckpt_path", "last", "--model.eval_top_k", "1"])
    assert "val split" in capsys.readouterr().out


def test_broken_checkpoints_are_refused_by_name(run, tmp_path, config):
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "cut.ckpt is not a checkpoint, or a broken one" in fails(
        "test", "--config", config, "--ckpt_path", "cut.ckpt"
    )
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    assert "other.ckpt is not a checkpoint of a Lightning module" in fails(
        "test", "--config", config, "--ckpt_path", "other.ckpt"
    )
    assert "nowhere.ckpt does not exist" in fails("test", "--config", config, "--ckpt_path", "nowhere.ckpt")


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_a_checkpoint_that_carries_code_is_refused_and_nothing_runs(tmp_path, config):
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.ckpt")
    message = fails("test", "--config", config, "--ckpt_path", "evil.ckpt")
    assert (
        "evil.ckpt is not a checkpoint that can be read: it holds getattr, which no checkpoint of a run has" in message
    )
    assert "weights_only" not in message  # torch advises to set it to False
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.router", "HyperRoute"],
            "unknown router 'HyperRoute'; did you mean 'HyperRouter'? Known routers: ",
        ),
        (
            ["--model.router.topk", "3"],
            "HyperRouter has no option 'topk'; did you mean 'top_k'? It takes: top_k, hidden",
        ),
        (["--model.experts", "SwiGLU"], "model.experts: no class is called 'SwiGLU'"),
        (["--model", "LanguageModel"], "no class is called 'LanguageModel'; did you mean 'LanguageModeling'?"),
        (["--data", "TextDat"], "no class is called 'TextDat'; did you mean 'TextData'?"),
        (["--model.num_expert", "3"], "LanguageModeling has no option 'num_expert'; did you mean 'num_experts'?"),
        (["--model.lr_scheduler", "ExponentialLR"], "ExponentialLR also needs gamma: add --model.lr_scheduler.gamma"),
        (["--model.lr_scheduler", "LambdaLR"], "LambdaLR takes a function, which no config can hold: take Cons"),
        (["--model.lr_scheduler", "ReduceLROnPlateau"], "model.lr_scheduler: ReduceLROnPlateau follows a metric"),
        (["--model.lr_scheduler.total_steps", "3"], "'warmup_steps'? It takes: warmup_steps, final_share."),
        (["--model.num_experts", "few"], "model.num_experts: expected int, got 'few'"),
        (["--trainer.max_epoch", "3"], "there is no option --trainer.max_epoch; did you mean '--trainer.max_epochs'?"),
    ],
)
def test_bad_options_are_explained_in_a_sentence(config, capsys, options, message):
    assert fails("fit", "--config", config, *options) == "2"
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1, shown
    assert message in shown[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.router.top_k", "9"], "error: top_k must be between 1 and num_experts = 4, got 9"),
        (["--model.num_experts", "0"], "error: num_experts must be at least 1, got 0"),
        (["--model.moe_blocks", "[7]"], "error: moe_blocks names block 7; the model has 2, from 0 to 1"),
        (
            ["--model.loss_weights", "{entropy: 1.0}"],
            "HyperRouter has no loss 'entropy'; it has balance, global_balance, importance, load",
        ),
        (["--model.vocab_size", "3"], "error: model.vocab_size is 3, but the data decides it: TextData has 256"),
        (["--data.dataset", "enwik9"], "error: no data set or file is called 'enwik9'"),
        (["--data.sequence_length", "0"], "error: sequence_length must be at least 1, got 0"),
        (["--trainer.accelerator", "abacus"], "accelerator='abacus'"),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], "error: the run has no end to plan for"),
    ],
)
def test_bad_values_are_explained_in_a_sentence(config, options, message):
    said = fails("fit", "--config", config, *options)
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        (["--model.lr_scheduler", "ExponentialLR", "--model.lr_scheduler.gamma", "0.5"], [1.0, 0.5, 0.25]),
        (["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "2"], [1.0, 1.0, 0.1]),
        (["--model.lr_scheduler", "null"], None),
    ],
)
def test_a_schedule_of_torch_takes_its_own_options(config, options, rates):
    made = cli.RouterZooCLI(["--config", config, *options], run=False)
    if rates is None:
        assert made.model.lr_scheduler is None
        return
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = made.model.lr_scheduler(optimizer), []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)


def test_a_command_parses_no_source_again_and_again(config, monkeypatch):
    """jsonargparse does for each annotation that is a string, of which the options of a function can be many."""
    parsed, parse = [], ast.parse
    monkeypatch.setattr("ast.parse", lambda source, *args, **kwargs: parsed.append(source) or parse(source))
    cli.RouterZooCLI(["--config", config], run=False)
    assert len(parsed) < 60


def test_an_option_of_a_router_not_chosen_yet_says_what_to_do(tmp_path, capsys):
    arguments = ["fit", "--model", "LanguageModeling", "--model.router.top_k", "3", "--data", "TextData"]
    assert fails(*arguments) == "2"
    assert "put --model.router NAME before --model.router.top_k" in capsys.readouterr().err


def test_help_explains_a_router(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--model", "LanguageModeling", "--model.router.help", "HyperRouter"])
    assert ended.value.code == 0
    assert "width H of the hypernetwork's hidden layer" in capsys.readouterr().out


def test_help_names_the_option_that_trusts_configs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    assert "--trust lets configs name classes of any package" in capsys.readouterr().out


def test_a_later_choice_replaces_the_earlier_router(config, tmp_path):
    (tmp_path / "router.yaml").write_text("model: {init_args: {router: {class_path: XMoERouter}}}")
    cli.main(["fit", "--config", config, "--config", "router.yaml", "--trainer.fast_dev_run", "true"])
    cli.main(["fit", "--config", config, "--model.router", "routerzoo.LinearRouter", "--trainer.fast_dev_run", "true"])
    assert not Path("runs").exists()


def test_every_router_is_a_known_name_on_the_command_line(config, router_name, capsys):
    cli.main(["fit", "--config", config, "--model.router", router_name, "--trainer.fast_dev_run", "true"])
    assert f"{router_name} · 2 MoE layers" in capsys.readouterr().out


@pytest.mark.full
def test_the_same_seed_gives_the_same_losses(config):
    for _ in range(2):
        cli.main(["fit", "--config", config, "--trainer.log_every_n_steps", "1"])
    logs = [(RUN.parent / number / "logs" / "metrics.csv").read_text() for number in ("000", "001")]
    assert logs[0] == logs[1]


def test_a_fit_warns_of_nothing(config, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        cli.main(["fit", "--config", config])
    assert [str(warning.message) for warning in caught] == []


def test_the_overview_needs_no_lightning(capsys):
    __main__.main(["--help"])
    assert "python -m routerzoo routers" in capsys.readouterr().out
    __main__.main(["routers", "--names"])
    assert capsys.readouterr().out.split() == registry.list_routers()


def test_read_checkpoint_gives_what_was_saved(run):
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 4
    with pytest.raises(UserError):
        read_checkpoint(run / "config.yaml")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["class_path"].endswith("LanguageModeling")


def built(*options):
    """Return the task that a command builds."""
    registry.load_plugins()
    return cli.RouterZooCLI(["fit", *options, "--trainer.fast_dev_run", "true"]).model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_task_built_by_the_command_line_can_be_copied(config, copied):
    optimizer = ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.5"]
    task = built("--config", config, "--model.experts", "SwiGLUExperts", *optimizer)
    twin = copied(task)
    assert (twin.optimizer.func, twin.optimizer.keywords["lr"]) == (torch.optim.SGD, 0.5)
    for name, value in task.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name


@pytest.mark.parametrize(
    "weights", ["{balance: 0.5, z: 0.1}", "{balance: {value: 0.5, over_layers: mean}, z: {value: 0.1}}"]
)
def test_loss_weights_are_numbers_or_say_how_layers_are_reduced(config, weights):
    task = built("--config", config, "--model.loss_weights", weights)
    mean = "mean" in weights
    assert task.loss_weights["balance"] == (LossWeight(0.5, "mean") if mean else 0.5)
    assert task.loss_weights["z"] == (LossWeight(0.1) if mean else 0.1)
    _, context = task.train().net(torch.arange(16).unsqueeze(0))
    raw = [loss_of("balance", published.routing, context) for published in context.routings]
    expected = 0.5 * sum(raw) / (len(raw) if mean else 1)
    torch.testing.assert_close(task.auxiliary_losses(context)["balance"], expected)


AVERAGING = {
    "exponential": ["EMAWeightAveraging", "--trainer.callbacks.decay", "0.9"],
    "stochastic": [
        *("StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.001"),
        *("--trainer.callbacks.swa_epoch_start", "1", "--trainer.callbacks.annealing_epochs", "1"),
        *("--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "4"),
    ],
}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize("kind", AVERAGING)
def test_averaged_weights_are_trained_and_evaluated(config, kind, capsys):
    grown = ["--trainer.callbacks+", "KSchedule", "--trainer.callbacks.start", "1", "--trainer.callbacks.end", "4"]
    options = ["--config", config, "--run_dir", "run", *grown, "--trainer.callbacks+", *AVERAGING[kind]]
    cli.main(["fit", *options])
    saved = read_checkpoint(Path("run/checkpoints/last.ckpt"))["state_dict"]
    ks = {int(value) for name, value in saved.items() if name.endswith("router.k")}
    assert ks == {3 if kind == "exponential" else 4}  # round(1 + 3 * step / steps) of steps 3 of 4, and 7 of 8
    cli.main(["validate", "--ckpt_path", "run/checkpoints/last.ckpt"])
    results = json.loads(Path("run/results.json").read_text())
    if kind == "exponential":  # the run's own validation had the averaged weights too
        assert results["val"]["bpb"] == pytest.approx(results["fit"]["bpb"], rel=1e-5)


def test_what_a_callback_refuses_is_a_sentence(config):
    swa = ["--trainer.callbacks+", "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.001"]
    message = fails("fit", "--config", config, *swa)
    assert message.startswith("error: SWA with `swa_epoch_start` as a float is not supported when `max_epochs=-1`")
