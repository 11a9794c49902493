"""Every file in configs/ is parsed; a whole config is what its parts make."""

from pathlib import Path

import pytest
import yaml

from routerzoo.cli import main as cli

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
@pytest.mark.full
def test_a_whole_config_is_what_its_parts_make(name, capsys):
    whole = resolved(capsys, f"language/{name}.yaml")
    parts = resolved(capsys, "tasks/language.yaml", f"routers/{name}.yaml", "experts/mlp.yaml")
    assert parts == whole


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp", "sharded", "expert-parallel"])
@pytest.mark.parametrize("experts", ["mlp", "swiglu", "shared"])
@pytest.mark.full
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


@pytest.mark.parametrize("domain", ["language", "vision"])
@pytest.mark.parametrize("comparison", ["fixed-k", "grown-k"])
@pytest.mark.parametrize("name", SIX)
@pytest.mark.full
def test_every_router_is_crossed_with_fixed_and_grown_k(domain, comparison, name, capsys):
    config = resolved(capsys, f"{domain}/{name}.yaml", f"comparison/{comparison}.yaml")
    arguments = config["model"]["init_args"]
    assert arguments["router"]["class_path"].endswith(name)
    assert (arguments["router"]["init_args"]["top_k"], arguments["eval_top_k"]) == (2, 2)
    assert arguments["initial_logit_std"] == 0.3
    assert bool(config["trainer"]["callbacks"]) == (comparison == "grown-k")


def test_fine_tuning_with_frozen_routing_resolves(capsys):
    config = resolved(capsys, "language/XMoERouter.yaml", "schedules/fine-tune-frozen-routing.yaml")
    assert config["trainer"]["callbacks"][0]["class_path"] == "routerzoo.FineTune"


def test_every_config_says_what_it_is():
    for path in CONFIGS.rglob("*.yaml"):
        assert path.read_text().startswith("# "), path
