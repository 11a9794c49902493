"""Every registered router, installed plugins' included, is what it declares."""

import pytest

from routerzoo.registry import router_class
from routerzoo.testing import CHECKS, check_router


@pytest.mark.parametrize("check", CHECKS)
def test_router(router_name, check):
    check_router(router_name, only=[check])


def test_every_router_says_where_it_comes_from(router_name):
    assert "arXiv" in router_class(router_name).paper or router_class(router_name).inspired_by
