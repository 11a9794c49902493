"""Every file in configs/ is parsed; a whole config is what its parts make."""

from pathlib import Path

import pytest
import yaml

from routerzoo import cli

CONFIGS = Path(__file__).parents[1] / "configs"
SIX = ["HashRouter", "HyperRouter", "LinearRouter", "RandomFrozenRouter", "StableMoERouter", "XMoERouter"]
RESOLVED = "--print_config"


def resolved(capsys, *configs):
    arguments = [part for config in configs for part in ("--config", str(CONFIGS / config))]
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", *arguments, RESOLVED])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    return yaml.safe_load(shown.out)


@pytest.mark.parametrize("domain", ["language", "vision"])
@pytest.mark.parametrize("name", [*SIX, "dense"])
def test_whole_configs_resolve(domain, name, capsys):
    config = resolved(capsys, f"{domain}/{name}.yaml")
    chosen = config["model"]["init_args"]["router"]
    assert chosen is None if name == "dense" else chosen["class_path"].endswith(name)


@pytest.mark.parametrize("name", SIX)
def test_a_whole_config_is_what_its_parts_make(name, capsys):
    whole = resolved(capsys, f"language/{name}.yaml")
    parts = resolved(capsys, "tasks/language.yaml", f"routers/{name}.yaml", "experts/mlp.yaml")
    assert parts == whole


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp"])
@pytest.mark.parametrize("experts", ["mlp", "swiglu", "shared"])
def test_parts_compose(trainer, experts, capsys):
    config = resolved(
        capsys,
        "tasks/vision.yaml",
        "routers/HyperRouter.yaml",
        f"experts/{experts}.yaml",
        f"trainer/{trainer}.yaml",
        "schedules/growing-k.yaml",
    )
    assert config["model"]["init_args"]["num_shared_experts"] == (experts == "shared")
    assert config["trainer"]["callbacks"][0]["class_path"] == "routerzoo.KSchedule"


def test_every_config_says_what_it_is():
    for path in CONFIGS.rglob("*.yaml"):
        assert path.read_text().startswith("# "), path
