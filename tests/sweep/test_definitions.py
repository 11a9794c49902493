"""Every sweep that ships resolves: each of its runs is a config."""

import re
from pathlib import Path

import pytest
import yaml

from routerzoo.sweep import work
from routerzoo.sweep.plan import read_plan

ROOT = Path(__file__).parents[2]
DEFINITIONS = [*ROOT.glob("configs/sweeps/*.yaml"), *ROOT.glob("benchmarks/sweeps/*.yaml")]
SWEEPS = [path for path in DEFINITIONS if "routers" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.full] * (p.stem != "quick")) for p in SWEEPS]
)
def test_sweep(path, tmp_path, monkeypatch):
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()
    each_run_is_a_config_of_its_own(path, tmp_path, monkeypatch)


@pytest.mark.full
def test_the_grid_of_the_docs(tmp_path, monkeypatch):
    grid, tune = re.findall("```yaml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.DOTALL)
    (tmp_path / "docs.yaml").write_text(grid + tune)
    each_run_is_a_config_of_its_own(tmp_path / "docs.yaml", tmp_path, monkeypatch)


def each_run_is_a_config_of_its_own(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(path)
    # One seed of each is enough: the others differ by it alone.
    cells = [cell for cell in plan.cells() if cell.seed == plan.seeds[0]]
    seen = set()
    for number, cell in enumerate(cells):
        overlay = tmp_path / f"{number}.yaml"
        overlay.write_text(yaml.safe_dump(dict(cell.overlay)))
        config, reason = work.resolve(cell.arguments(overlay))
        assert not reason, f"{cell.label}: {reason}"
        assert yaml.safe_load(config)["seed_everything"] == plan.seeds[0]
        seen.add(config)
    assert len(seen) == len(cells)
