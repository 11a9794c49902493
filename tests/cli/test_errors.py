"""Invalid input to any command gives one line: the fault, the value and the way out."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch._utils import ExceptionWrapper

from routerzoo.__main__ import main
from routerzoo.errors import UserError, in_a_sentence
from tests.cli.test_main import CONFIG, VISION

CONFIGS = Path(__file__).parents[2] / "configs"
FIT = ["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "true"]
FILES = {
    "config.yaml": CONFIG,
    "vision.yaml": VISION,
    "router.yaml": (CONFIGS / "routers" / "LinearRouter.yaml").read_text(),
    "broken.yaml": "model: {class_path: LanguageModeling\ndata: [\n",
    "latin.yaml": b"model: {class_path: caf\xe9}\n",
    "nul.yaml": b"model: \0\n",
    "list.yaml": "- model\n",
    "empty.yaml": "",
    "two.yaml": "trainer: {callbacks: [{class_path: KSchedule, init_args: {start: one, end: 2}}]}",
    "file": "",
}


@pytest.fixture(autouse=True)
def files(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def said(capsys, *arguments):
    """Run a command that must fail, and return the one line that it says."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code not in (0, None)
    printed = capsys.readouterr().err.strip()
    line = str(ended.value.code) if isinstance(ended.value.code, str) else printed
    assert "\n" not in line
    assert line.startswith("error: ")
    for internal in ("Namespace", "NoneType", "Union", "<class", "Traceback", "jsonargparse"):
        assert internal not in line
    return line


COMMANDS = [
    (["fitt"], "there is no command 'fitt'; did you mean 'fit'? Commands: fit, validate, test, predict, look, audit"),
    (["fit"], "there is no data and no model: give --config language/HyperRouter, for example"),
    (["plan"], "there is no data and no model: give --config language/HyperRouter, for example"),
    (["test"], "test needs a checkpoint: --ckpt_path best"),
    (["look"], "needs a checkpoint: --ckpt_path best"),
    (["fit", "config.yaml"], "'config.yaml' belongs to no option: give --config config.yaml"),
    (["routers", "--nam"], "there is no option --nam; did you mean '--names'? See python -m routerzoo routers --help"),
    (["check", "--examples", "many"], "argument --examples: invalid int value: 'many'. See"),
    (["sweep"], "the following arguments are required: --config. See python -m routerzoo sweep --help"),
    (["sweep", "--config", "nowhere.yaml"], "the config nowhere.yaml does not exist"),
    (["report", "nowhere"], "nowhere"),
    (["check", "XMoeRouter"], "unknown router 'XMoeRouter'; did you mean 'XMoERouter'?"),
    (["check", "NopeRouter"], "unknown router 'NopeRouter'. Known routers: "),
    (["plan", "--config", "config.yaml", "--processes", "0"], "--processes must be at least 1, got 0"),
    (["check", "--device", "cudax", "LinearRouter"], "--device cudax: Expected one of cpu, cuda"),
    (["test", "--ckpt_path"], "argument --ckpt_path: expected one argument"),
    (["fit", "--config", "--trainer.max_steps", "3"], "argument -c/--config: expected one argument"),
    (["configs", "language/HyperRoute"], "does not exist; did you mean 'language/HyperRouter'?"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS, ids=lambda value: " ".join(value)[:40])
def test_commands(capsys, arguments, message):
    assert message in said(capsys, *arguments)


CONFIG_FILES = [
    ("nowhere.yaml", "the config nowhere.yaml does not exist. `python -m routerzoo configs` lists those"),
    ("configs/language/HyperRoute.yaml", "does not exist; did you mean 'language/HyperRouter'?"),
    ("broken.yaml", "the config broken.yaml is not YAML: expected ',' or '}', but got ':' at line 2, column 5"),
    ("latin.yaml", "the config latin.yaml is not a text in UTF-8: byte 0xe9 at position 23. Save it as UTF-8"),
    ("nul.yaml", "the config nul.yaml is not YAML"),
    ("list.yaml", "the config list.yaml holds a list; a config maps names of options to values"),
    ("empty.yaml", "the config empty.yaml is empty"),
    (".", "cannot read the config .: Is a directory"),
    ("router.yaml", "model is not chosen yet, but router.init_args.top_k is set: put a config of a task before it"),
]


@pytest.mark.parametrize(("name", "message"), CONFIG_FILES)
def test_configs(capsys, name, message):
    assert message in said(capsys, "fit", "--config", name)


def test_the_configs_of_two_tasks(capsys):
    message = said(capsys, "fit", "--config", "tasks/vision", "--config", "tasks/language")
    assert "tasks/vision describes ImageClassification and tasks/language describes LanguageModeling" in message
    assert "give the config of one task" in message


OPTIONS = [
    (["--trainer.maxsteps", "4"], "there is no option --trainer.maxsteps; did you mean '--trainer.max_steps'?"),
    (["--trainr.max_steps", "4"], "there is no option --trainr.max_steps; did you mean '--trainer.max_steps'?"),
    (["--run_dirr", "x"], "there is no option --run_dirr; did you mean '--run_dir'?"),
    (["--model.router.top_k", "two"], "model.router.top_k: expected int, got 'two'"),
    (["--model.optimizer.lr", "fast"], "model.optimizer.lr: expected float, got 'fast'"),
    (["--model.optimizer.lrr", "1"], "AdamW has no option 'lrr'; did you mean 'lr'?"),
    (["--model.optimizer", "Adamm"], "model.optimizer: no class is called 'Adamm'; did you mean 'Adam"),
    (["--model.eval_top_k", "x"], "model.eval_top_k: expected int or list, got 'x'"),
    (["--model.loss_weights", "3"], "model.loss_weights: expected dict, got '3'"),
    (["--model.router", "torch.nn.Linear"], "model.router: torch.nn.Linear is not a Router"),
    (["--model"], "argument --model: expected one argument"),
    (["--trainer.precision", "half"], "trainer.precision: expected int or transformer-engine or"),
    (
        ["--trainer.callbacks+", "EarlyStop"],
        "trainer.callbacks: no class is called 'EarlyStop'; did you mean 'EarlyStopping'",
    ),
    (
        ["--trainer.callbacks+", "KSchedule", "--trainer.callbacks.start", "1"],
        "KSchedule also needs end: add --trainer.callbacks.end",
    ),
    (
        ["--trainer.callbacks+", "KSchedule", "--trainer.callbacks.start", "one"],
        "trainer.callbacks.start: expected int, got 'one'",
    ),
    (
        ["--trainer.callbacks+", "KSchedule", "--trainer.callbacks.strt", "1"],
        "KSchedule has no option 'strt'; did you mean 'start'?",
    ),
    (["--config", "two.yaml"], "trainer.callbacks.start: expected int, got 'one'"),
    (["--seed_everything", "-1"], "seed_everything must be between 0 and 4294967295, got -1"),
    (["--seed_everything", "99999999999"], "seed_everything must be between 0 and 4294967295, got 99999999999"),
    (
        ["--trainer.callbacks+", "Timer", "--trainer.callbacks.duration", "x"],
        "`Timer(duration='x')` is not a valid duration",
    ),
    (["--trainer", "nowhere.yaml"], "the config nowhere.yaml does not exist, or is not YAML"),
    (["--trainer", "latin.yaml"], "a file that the command names is not a text in UTF-8"),
    (["--model.router", "latin.yaml"], "model.router: 'utf-8' codec can't decode"),
    (["--trainer.devices", "x"], "`devices` selected with `CPUAccelerator` should be an int > 0"),
    (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches must be at least 1, got 0"),
    (["--model.optimizer.betas", "[2,3]"], "Invalid beta parameter at index 0: 2.0"),
    (["--data.num_workers", "-1"], "num_workers must be at least 0, got -1"),
    (["--ckpt_path", "nope.ckpt"], "the checkpoint nope.ckpt does not exist"),
    (["--ckpt_path", "config.yaml"], "config.yaml is not a checkpoint, or a broken one"),
    (["--data.dataset", "tiny-shakespear"], "no data set or file is called 'tiny-shakespear'"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: " ".join(value)[:40])
def test_options(capsys, options, message):
    assert message in said(capsys, *FIT, *options)


HELP = [
    (["--model.router.help"], "--model.router.help explains a class: give it"),
    (["--model", "LanguageModeling", "--model.experts.help"], "give it MLPExperts or SwiGLUExperts"),
    (["--model", "LanguageModeling", "--model.router.help", "Nope"], "unknown router 'Nope'. Known routers: "),
    (["--data.help", "Nope"], "data: no class is called 'Nope'. Known: ImageData, LabelledText, TextData."),
    (["--model.help", "Nope"], "model: no class is called 'Nope'. Known: ImageClassification, LanguageModeling"),
]


@pytest.mark.parametrize(("options", "message"), HELP, ids=lambda value: " ".join(value)[:40])
def test_help_of_what_is_not_there(capsys, options, message):
    assert message in said(capsys, "fit", *options)


@pytest.mark.parametrize(
    ("options", "usage", "option"),
    [
        (["--help"], "usage: python -m routerzoo fit [OPTIONS]", "--run_dir RUN_DIR"),
        (["--model", "LanguageModeling", "--model.router.help", "XMoERouter"], "usage: python -m routerzoo", ".top_k"),
        (
            ["--model", "LanguageModeling", "--model.experts.help", "MLPExperts"],
            "usage: python -m routerzoo",
            ".hidden_dim",
        ),
    ],
)
def test_help_has_one_line_of_usage_and_only_what_may_be_set(capsys, options, usage, option):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *options])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(usage)
    assert shown.splitlines()[1] == ""
    assert option in shown
    assert "spec." not in shown
    if options == ["--help"]:
        assert "last or best, of the latest run or of --run_dir" in " ".join(shown.split())


def test_values_of_another_domain(capsys):
    message = said(capsys, "fit", "--config", "vision.yaml", "--model.patch_ids", "none")
    assert "model.patch_ids: expected position or lsh or codebook, got 'none'" in message


@pytest.mark.parametrize("command", ["test", "validate", "predict", "look"])
@pytest.mark.parametrize(("path", "message"), [("nope.ckpt", "does not exist"), ("file", "is not a checkpoint")])
def test_checkpoints_that_are_none(capsys, command, path, message):
    assert f"{path} {message}" in said(capsys, command, "--ckpt_path", path)


def test_what_lightning_refuses_when_it_starts(capsys):
    message = said(capsys, "fit", "--config", "config.yaml", "--trainer.val_check_interval", "99999999")
    assert "`val_check_interval` (99999999) must be less than or equal to the number of the training batches" in message


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_run_folders_that_cannot_be(capsys, place):
    message = said(capsys, "fit", "--config", "config.yaml", "--run_dir", place)
    assert place in message
    assert "choose another with --run_dir" in message or "File name too long" in message


def test_a_timer_is_a_callback_like_any_other(capsys):
    main([*FIT, "--trainer.callbacks+", "Timer"])
    assert "Timer" not in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("routerzoo.LanguageModeling.training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(FIT)


def test_configs_are_named_from_anywhere(capsys):
    for name in ("tasks/language", "tasks/language.yaml", "configs/tasks/language.yaml"):
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", name, "--config=routers/XMoERouter", "--print_config"])
        assert ended.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["model"]["init_args"]["router"]["class_path"] == "routerzoo.XMoERouter"
    main(["configs"])
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed.keys() == {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert listed["language/HyperRouter"].startswith("HyperRouter on Tiny Shakespeare")
    main(["configs", "routers/LinearRouter"])
    assert capsys.readouterr().out == FILES["router.yaml"]


def test_a_file_comes_before_a_packaged_config_of_its_name(tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "language").write_text(CONFIG)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tasks/language", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["d_model"] == 16


@pytest.mark.parametrize(
    ("error", "message"),
    [(UserError("a.png is broken"), "error: a.png is broken"), (OSError("no such disk"), "error: no such disk")],
)
def test_errors_of_processes_that_load_data_are_one_line_too(error, message):
    try:
        raise error
    except Exception:
        caught = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(SystemExit, match=f"^{message}$"), in_a_sentence():
        caught.reraise()


@pytest.mark.full
def test_commands_that_need_no_lightning_do_not_wait_for_it():
    code = "import sys, routerzoo.cli.{0} as m; assert not {{'lightning', 'jsonargparse'}} & set(sys.modules)"
    for command in ("routers", "configs", "check", "report"):
        done = subprocess.run([sys.executable, "-c", code.format(command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
