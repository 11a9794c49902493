"""The benchmarks run; what they measure is no test's business."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import BUILT_IN

pytestmark = pytest.mark.full

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_table_of_routers_names_each():
    sizes = ["--tokens", "16", "--d_model", "16", "--num_experts", "4", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "routers.py"), *sizes],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"| {name} |" in done.stdout for name in BUILT_IN)


def test_contenders_map_tokens_to_tokens(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contenders

    for experts in ("mlp", "swiglu"):
        setting = contenders.Setting(32, 16, 4, 2, experts, "float32", "cpu")
        for name, build in {**contenders.FLOORS, **contenders.OURS}.items():
            if name in ("routerzoo compiled", "routerzoo CUDA graph"):
                with pytest.raises(contenders.Unavailable, match="for GPUs"):
                    build(setting)
                continue
            assert build(setting)(torch.randn(32, 16)).shape == (32, 16)
        # Every contender does the same number of operations with its experts.
        layer, floor = contenders.ours(setting), contenders.ExpertFloor(setting)
        assert sum(p.numel() for p in layer.experts.parameters()) == sum(p.numel() for p in floor.parameters())


def test_the_benchmark_of_models_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import argparse

    import model

    options = argparse.Namespace(device="cpu", sequences=1, rounds=1)
    for build in (model.decoder_step, model.vit_step):
        for num_experts in (model.EXPERTS, 0):
            assert model.timed(build(num_experts, options), "cpu") > 0


def test_power_laws_share_an_exponent(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import _power_laws

    scales = {"LinearRouter": 10.0, "HyperRouter": 10.0 * 2**-0.1}  # as good with half of the tokens
    told = _power_laws({(router, n): a * n**-0.1 for router, a in scales.items() for n in (10, 40, 160)})
    assert told[0] == "loss = a tokens^-0.1000"
    assert told[-2:] == ["| LinearRouter | 10.000 | 1.00 |", "| HyperRouter | 9.330 | 2.00 |"]
    assert "need losses that fall" in _power_laws({("LinearRouter", 10): 1.0})[0]
    assert "need losses that fall" in _power_laws({})[0]


def test_differences_at_each_k(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import by_k

    rows = ["router,seed,k,value"]
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        rows += [f"Linear,{seed},{k},{2 + noise}" for k in (1, 2)]
        rows += [f"Hash,{seed},1,{1.5 + 2 * noise}", f"Hash,{seed},2,{2.0 - noise}"]
    (tmp_path / "by_k.csv").write_text("\n".join(rows))
    monkeypatch.setattr(sys, "argv", ["by_k.py", str(tmp_path / "by_k.csv"), "Hash: Linear"])
    by_k.main()
    # t(2) = 4.3027; standard errors of 0.01, 0.02 and, of the differences, 0.01 and 0.02, each over the root of 3.
    assert capsys.readouterr().out.splitlines() == [
        "| router | k = 1 | k = 2 |",
        "| --- | --- | --- |",
        "| Linear | 2.000 ± 0.025 | 2.000 ± 0.025 |",
        "| Hash | 1.500 ± 0.050 | 2.000 ± 0.025 |",
        "",
        "| less | of | k = 1 | k = 2 |",
        "| --- | --- | --- | --- |",
        "| Hash | Linear | -0.500 ± 0.025* | +0.000 ± 0.050 |",
        "",
    ]
    monkeypatch.setattr(sys, "argv", ["by_k.py", str(tmp_path / "by_k.csv"), "Hash: Other"])
    with pytest.raises(SystemExit):
        by_k.main()
    assert "there is no router 'Other'; there are Linear, Hash" in capsys.readouterr().err


def test_the_record_of_hyperrouter_has_the_numbers_of_its_rows(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import by_k

    record = (BENCHMARKS / "results/hyperrouter.md").read_text()
    pairs = [line.split("|")[1:3] for line in record.splitlines() if "±" in line and line.count("|") == 8]
    pairs = [f"{one.strip()}: {other.strip()}" for one, other in pairs]
    monkeypatch.setattr(sys, "argv", ["by_k.py", str(BENCHMARKS / "results/hyperrouter_by_k.csv"), *pairs])
    by_k.main()
    assert all(line in record for line in capsys.readouterr().out.splitlines())
