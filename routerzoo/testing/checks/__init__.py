"""The laws that every router keeps, one function each. A docstring says what, why, and how to mend a router."""

from routerzoo.testing.checks import answers, independence, numerics, training  # noqa: F401 (they register their laws)
from routerzoo.testing.checks.common import CHECKS

__all__ = ["CHECKS"]
