"""Which code a run was made by."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from importlib.metadata import entry_points
from pathlib import Path

import routerzoo
from routerzoo.registry import ENTRY_POINT_GROUP


@functools.cache
def code_version() -> str:
    """Return the version of routerzoo and a digest of all sources, other packages' routers included.

    Nothing is imported. It changes with every edit, also of what a run does not use: equal versions are equal code.
    """
    packages = {point.value.partition(":")[0].partition(".")[0] for point in entry_points(group=ENTRY_POINT_GROUP)}
    digest = hashlib.sha256()
    for package in ["routerzoo", *sorted(packages)]:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return f"{routerzoo.__version__}+{digest.hexdigest()[:8]}"
