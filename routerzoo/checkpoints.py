"""Reading checkpoint files without letting them run code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from routerzoo.errors import UserError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's content without letting it run code.

    Raises:
        UserError: not a checkpoint, broken, or one that needs code to be read.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a checkpoint, or a broken one: it is not an archive as torch.save writes it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read: {first}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path} is not a checkpoint of a Lightning module: it holds no state_dict")
    return content
