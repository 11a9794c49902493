"""Every registered router is what it declares, those of plugins in the full tier (they have tests of their own)."""

import pytest

import routerzoo
from routerzoo.registry import router_class
from routerzoo.testing import CHECKS, check_router


@pytest.mark.parametrize("check", CHECKS)
def test_router(router_name, check):
    check_router(router_name, only=[check])


@pytest.mark.full
@pytest.mark.parametrize("name", routerzoo.list_routers())
def test_router_on_many_sizes(name):
    check_router(name, examples=20)


def test_every_router_says_where_it_comes_from(router_name):
    assert "arXiv" in router_class(router_name).paper or router_class(router_name).inspired_by
