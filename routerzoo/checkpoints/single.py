"""Checkpoint files: written atomically, and read without running code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from routerzoo.checkpoints import sharded as folders
from routerzoo.errors import UserError
from routerzoo.runs.atomic import TEMPORARY, atomic_replace


@final
class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoint files atomically, and reads them, and folders of sharded models, without running code.

    Lightning writes into the system's temporary folder and moves the file, which is a copy where that is another file
    system: a run that is killed meanwhile leaves a torn checkpoint. Here the file is written beside its place, handed
    to the disk, and renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file.

        Raises:
            UserError: there is no room, or no permission. The file that was there is as it was.
        """
        path = Path(path)
        part = path.with_name(path.name + TEMPORARY)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            atomic_replace(part, path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            kept = f"; {path} is still the one before" if path.exists() else ""
            raise UserError(f"cannot write the checkpoint {path}: {_reason(error)}{kept}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file or a folder; with `weights_only`, whatever is asked for."""
        return _read(Path(path))  # `ddp_spawn` hands its weights back in a file of tensors alone


def _reason(error: BaseException) -> str:
    # torch says that writing failed, and its cause says why.
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    known = next((c for c in causes if isinstance(c, OSError) and c.strerror), None)
    return str(known.strerror) if isinstance(known, OSError) else str(error).splitlines()[0]


def expect_checkpoint(path: Path) -> None:
    """Refuse, without reading it, what cannot be a checkpoint.

    Raises:
        UserError: it does not exist, or is another kind of file.
    """
    if folders.is_folder(path):
        return
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a checkpoint, or a broken one: it is not an archive as torch.save writes it")


ALWAYS = {"global_step": int, "epoch": int}
RESUMED = {"loops": dict, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict}
"""What a checkpoint holds beside weights, for any use and to resume from. Lightning would do without some of it."""


def refuse_incomplete(path: Path, content: dict[str, Any], *, resumes: bool) -> None:
    """Refuse a checkpoint that lacks what its use needs.

    Args:
        path: of the checkpoint.
        content: see `read_outline`.
        resumes: training is to continue from it, as if it had not stopped.

    Raises:
        UserError: something is missing, or of another type; it says what.
    """
    for name, kind in {**ALWAYS, **(RESUMED if resumes else {})}.items():
        if isinstance(content.get(name), kind):
            continue
        lacks = f"its {name} is a {type(content[name]).__name__}" if name in content else f"it has no {name}"
        way_out = "It cannot be resumed: train again" if name in RESUMED else "Take another checkpoint of the run"
        raise UserError(f"the checkpoint {path} is incomplete: {lacks}. {way_out}")


def read_outline(path: Path) -> dict[str, Any]:
    """Read a checkpoint; of a folder of several processes, all but its tensors.

    Raises:
        UserError: see `read_checkpoint`.
    """
    return folders.read_meta(path) if folders.is_folder(path) else read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's content without letting it run code.

    Raises:
        UserError: not a checkpoint, broken, or one that needs code to be read.
    """
    content = _read(path)
    if "state_dict" not in content:
        raise UserError(f"{path} is not a checkpoint of a Lightning module: it holds no state_dict")
    return content


def _read(path: Path) -> dict[str, Any]:
    if folders.is_folder(path):
        return folders.read_whole(path)
    expect_checkpoint(path)
    try:
        # torch reads past a checksum that is wrong.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"{broken} has changed since it was written")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read: {first}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content
