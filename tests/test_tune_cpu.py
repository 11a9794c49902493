import subprocess
import sys

import pytest

pytestmark = pytest.mark.full

# In a process of its own: the settings are the process's.
TUNE = "import routerzoo, torch; print({}, torch.tensor([1e-40]).mul(1.0).item() == 0)"


def run(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_tune_cpu_says_what_it_did():
    assert run(TUNE.format("routerzoo.tune_cpu()")) == ["True", "True"]
    assert run(TUNE.format("routerzoo.tune_cpu(flush_denormals=False)")) == ["True", "False"]
    # Somebody who sets the allocator knows better.
    assert run(TUNE.format("routerzoo.tune_cpu()"), MALLOC_ARENA_MAX="2") == ["False", "True"]


def test_importing_changes_nothing():
    assert run(TUNE.format("None")) == ["None", "False"]


@pytest.mark.parametrize(("switch", "tuned"), [("1", "True"), ("0", "False")])
def test_the_command_tunes_its_process(switch, tuned):
    code = (
        "import sys, torch, routerzoo.cli.main, routerzoo.__main__; sys.argv = ['routerzoo', 'fit'];"
        "routerzoo.cli.main.main = lambda args: print(torch.tensor([1e-40]).mul(1.0).item() == 0);"
        "routerzoo.__main__.main()"
    )
    assert run(code, ROUTERZOO_TUNE_CPU=switch) == [tuned]
