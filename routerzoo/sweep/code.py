"""Which code a run was made by."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import socket
from importlib.metadata import entry_points
from pathlib import Path

import routerzoo
from routerzoo.errors import UserError
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


class OtherCodeError(UserError):
    """A machine has other sources than the one that hands it runs."""


def expect_code(code: str) -> None:
    """Check that this machine has the sources that a run is said to be made by.

    Args:
        code: as `code_version` has it where the run was handed out, with anything behind a further `+`.

    Raises:
        OtherCodeError: it has others.
    """
    code_version.cache_clear()  # of a process that takes run after run, before an edit and after it
    own = code_version()
    if not f"{code}+".startswith(f"{own}+"):
        raise OtherCodeError(
            f"{socket.gethostname()} has other code ({own}) than the command ({code}): give all machines the same "
            "version, do not edit it while it runs, and run the command again: it resumes"
        )
