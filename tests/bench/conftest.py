from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def small_task():
    return str(HERE / "small_task.py")


@pytest.fixture
def own_routers(monkeypatch):
    """Let class paths name the routers of `own_router.py`, in workers too."""
    monkeypatch.syspath_prepend(str(HERE))
