"""The kernels compiled for NVIDIA's GPUs, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from routerzoo.moe.low_memory import HAS_TRITON

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_they_compile_to_tensor_cores_and_spill_nothing(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-W", "ignore", "-m", "tests.moe.compiled_kernels"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * (5 * 2 + 3 * (2 + 4 + 4) + 2 + 5)
    for name, made in found.items():
        assert made["stack"] <= 64, (name, made)
        assert made["shared"] <= 99 * 2**10, (name, made)  # what consumer cards have
        if name.startswith(("product", "weight_grad")) and "fp32" not in name:
            few_rows = " 8 " in name  # too few for a warp group
            instruction = "HGMMA" if name.endswith("sm_90") and not few_rows else "HMMA"
            assert made[instruction] > 0, (name, made)
