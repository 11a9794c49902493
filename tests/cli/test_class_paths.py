"""What a config or a checkpoint can run: classes of known packages, of the kind asked for, and nothing else."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse._common import parsing_settings

from routerzoo import LanguageModeling, registry
from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.cli import main as cli
from routerzoo.errors import UserError
from routerzoo.tasks import class_paths
from tests.cli.test_main import CONFIG, RUN
from tests.cli.test_main import run as run  # fixtures
from tests.cli.test_main import trained as trained

NUMBERS = itertools.count()
FIT = ["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "true"]
PLACES = [
    "model",
    "data",
    "model.init_args.router",
    "model.init_args.experts",
    "model.init_args.optimizer",
    "model.init_args.lr_scheduler",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.strategy",
    "trainer.plugins",
    "trainer.profiler",
]
FOREIGN = """
from pathlib import Path
from lightning import Callback
Path("ran").touch()
class Quiet(Callback):
    pass
"""


@pytest.fixture(autouse=True)
def files(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    yield
    assert "*" not in parsing_settings["import_path_verdicts"]  # other parsers of the process are as they were


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Return the name of a class in a module that has not been imported, and that leaves a trace when it is."""
    module = f"foreign{next(NUMBERS)}"  # a class that has once been imported stays known
    (tmp_path / f"{module}.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{module}.Quiet"


def config(place, value):
    for key in reversed(place.split(".")):
        value = {key: value}
    Path("hostile.yaml").write_text(yaml.safe_dump(value))
    return ["--config", "hostile.yaml"]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    line = str(ended.value.code) if isinstance(ended.value.code, str) else capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    assert not Path("ran").exists()
    return line


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", ["mapping", pytest.param("name", marks=pytest.mark.full)])
def test_no_config_runs_a_function_of_the_system(capsys, place, form):
    spec = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
    command = [*FIT, *config(place, spec if form == "mapping" else "os.system")]
    if place == "model":
        command[1:3] = ["--data", "TextData"]  # two configs of tasks would be refused for that
    line = refused(capsys, *command)
    assert "os.system" in line or "`profiler` parameter of `Trainer`, it can only be one of" in line


@pytest.mark.parametrize("place", PLACES[2:7])
def test_no_config_runs_a_function_of_a_known_package(capsys, place):
    Path("kept").touch()
    spec = {"class_path": "routerzoo.runs.atomic.remove", "init_args": {"path": "kept"}}
    assert "routerzoo.runs.atomic.remove" in refused(capsys, *FIT, *config(place, spec))
    assert "is a function, and a class_path names a class" in refused(
        capsys, *FIT, *config("model.init_args.router", {"class_path": "torch.hub.load"})
    )
    assert Path("kept").exists()


@pytest.mark.parametrize("name", ["torch.nn.Linear", "routerzoo.MLPExperts"])
def test_a_class_of_another_kind_is_refused(capsys, name):
    assert f"{name} is not a Router" in refused(capsys, *FIT, "--model.router", name)


def test_a_class_of_no_known_package_is_not_imported_unless_the_command_asks_for_it(capsys, foreign):
    hostile = config("trainer.callbacks", [{"class_path": foreign}])
    line = refused(capsys, *FIT, *hostile)
    assert f"trainer.callbacks: {foreign} is of no known package" in line
    assert "If you trust it, name it on the command line, or add --trust" in line
    # A config that has the name of its module is still no name on the command line.
    named = foreign.replace("Quiet", "yaml")
    Path(named).write_text(Path("hostile.yaml").read_text())
    refused(capsys, *FIT, "--config", named)
    cli.main([*FIT, *hostile, "--trust"])
    assert Path("ran").exists()


@pytest.mark.parametrize("form", ["--trainer.callbacks+={}", "--trainer.callbacks=[{{class_path: {}}}]"])
def test_the_command_itself_may_name_any_class(form, foreign):
    cli.main([*FIT, form.format(foreign)])
    assert Path("ran").exists()


def test_who_resumes_a_run_of_foreign_classes_is_told_to_trust_it(foreign):
    seen = []
    for options in ([], ["--trust"], [f"--trainer.callbacks+={foreign}"], ["--trainer.callbacks+=routerzoo.KSchedule"]):
        cli.main(["fit", *options], cli=lambda _: seen.append(class_paths.goes_beyond_known()))
    assert seen == [False, True, True, False]
    assert not class_paths.goes_beyond_known()


def test_the_environment_may_trust_and_a_config_may_not(capsys, monkeypatch, foreign):
    hostile = config("trainer.callbacks", [{"class_path": foreign}])
    Path("trusting.yaml").write_text("trust: true\n")
    refused(capsys, *FIT, "--config", "trusting.yaml", *hostile)
    monkeypatch.setenv(cli.TRUST_VARIABLE, "1")
    cli.main([*FIT, *hostile])
    assert Path("ran").exists()


def test_the_config_beside_a_checkpoint_runs_nothing_foreign(run, capsys, foreign):
    saved = yaml.safe_load((RUN / "config.yaml").read_text())
    cli.main(["test", "--ckpt_path", str(RUN / "checkpoints" / "best.ckpt")])  # one's own works as it is
    for place, spec in (
        ("lr_scheduler", {"class_path": "os.system", "init_args": {"command": "touch ran"}}),
        ("lr_scheduler", {"class_path": foreign}),
    ):
        saved["model"]["init_args"][place] = spec
        (RUN / "config.yaml").write_text(yaml.safe_dump(saved))
        line = refused(capsys, "test", "--ckpt_path", str(RUN / "checkpoints" / "best.ckpt"))
        assert f"{spec['class_path']} is of no known package" in line


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("os.system", {"command": "touch ran"}, "os.system is of no known package"),
        ("foreign", {}, "Quiet is of no known package"),
        ("routerzoo.runs.atomic.remove", {"path": "config.yaml"}, "is a function, and a class_path names a class"),
        ("torch.hub.load", {"repo_or_dir": "."}, "is a function, and a class_path names a class"),
    ],
)
@pytest.mark.parametrize("form", ["mapping", pytest.param("name", marks=pytest.mark.full)])
def test_a_checkpoint_runs_nothing_foreign(run, foreign, name, arguments, message, form):
    name = foreign if name == "foreign" else name
    content = read_checkpoint(RUN / "checkpoints" / "best.ckpt")
    content["hyper_parameters"]["router"] = {"class_path": name, "init_args": arguments} if form == "mapping" else name
    torch.save(content, "hostile.ckpt")
    with pytest.raises(UserError, match=message):
        LanguageModeling.load_from_checkpoint("hostile.ckpt", weights_only=True)
    assert not Path("ran").exists()
    assert Path("config.yaml").exists()


def test_ones_own_checkpoint_is_built_as_before(run):
    task = LanguageModeling.load_from_checkpoint(RUN / "checkpoints" / "best.ckpt", weights_only=True)
    assert type(next(iter(task.net.modules()))).__name__ == "Decoder"


def test_a_factory_that_is_false_is_not_taken_for_the_default():
    with pytest.raises(TypeError, match="got 0"):
        LanguageModeling(d_model=16, num_heads=2, num_blocks=2, router=0)
    with pytest.raises(TypeError, match="got 0"):
        LanguageModeling(d_model=16, num_heads=2, num_blocks=2, experts=0)
    with pytest.raises(TypeError, match="None"):
        LanguageModeling(d_model=16, num_heads=2, num_blocks=2, router=lambda spec: None)


@pytest.mark.full
def test_a_fresh_process_knows_installed_plugins_and_no_more():
    code = "from routerzoo.tasks.class_paths import known_packages; print(*sorted(known_packages()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    known = set(done.stdout.split())
    assert {"lightning", "routerzoo", "routerzoo_topk", "timm", "torch"} <= known, done.stderr
    assert all(name in class_paths.LIBRARIES or name.startswith("routerzoo_") for name in known), known


def test_classes_that_a_package_registers_are_known(tmp_path, monkeypatch, recwarn):
    source = "from routerzoo import MLPExperts\nclass WideExperts(MLPExperts):\n    pass\n"
    (tmp_path / "wide_experts.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "wide_experts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wide-experts\nVersion: 1.0\n")
    points = "[routerzoo.experts]\nWideExperts = wide_experts:WideExperts\nWrong = wide_experts:MLPExperts.__init__\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.setattr(
        registry._registry, "groups_loaded", set(registry._registry.groups_loaded) - set(class_paths.GROUPS)
    )
    monkeypatch.setattr(registry._registry, "broken", [])
    with pytest.warns(UserWarning, match=r"Wrong of package wide-experts: .* is not a subclass of Experts"):
        assert class_paths.known_packages() >= {"wide_experts"}  # as `load_from_checkpoint` asks for them
    assert "wide_experts" in class_paths.known_packages()
    Path("wide.yaml").write_text("model: {init_args: {experts: wide_experts.WideExperts}}")
    cli.main([*FIT, "--config", "wide.yaml"])
