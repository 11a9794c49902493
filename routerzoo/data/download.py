"""Downloads with checksums; a file that is in its place, however it came there, is used as it is."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pooch
from filelock import FileLock

from routerzoo.errors import UserError


def default_root() -> Path:
    """Return the folder that data sets are kept in: `$ROUTERZOO_DATA`, or `~/.cache/routerzoo`."""
    return Path(os.environ.get("ROUTERZOO_DATA", Path.home() / ".cache" / "routerzoo"))


def download(urls: Sequence[str], path: Path, known_hash: str | None) -> Path:
    """Download a file unless it exists, and return its path.

    Processes that want the same file wait for each other.

    Args:
        urls: tried in order.
        path: where to put it.
        known_hash: `md5:` or `sha256:` and the published digest in hexadecimal, where there is one.

    Raises:
        UserError: no address gave the file.
    """
    if path.exists():  # with no lock: a shared folder may be read-only
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        failures = []
        for url in urls:
            try:
                pooch.retrieve(url, known_hash, path.name, path.parent, progressbar=True)
            except (OSError, ValueError) as error:  # of the network, and of the checksum
                reason = str(error).partition(". ")[0]
                failures.append(f"{url} ({reason})")
            else:
                path.chmod(0o644)  # pooch's temporary files are its user's alone
                return path
    raise UserError(
        f"cannot download {path.name} from {', nor from '.join(failures)}. If you have the file, put it at {path}"
    )


def extract_member(archive: Path, member: str, path: Path, known_hash: str | None = None) -> Path:
    """Extract one file of a zip archive atomically, and return its path.

    Only this member is read and only `path` is written, so that an archive cannot write elsewhere.

    Args:
        archive: the zip archive.
        member: the file's name, in whatever folder of the archive it is.
        path: where to put it.
        known_hash: of the file, as in `download`.

    Raises:
        UserError: the archive is broken, has no such member, or the member's checksum is wrong.
    """
    partial = path.with_name(path.name + ".part")
    again = f"delete {archive}, and it will be downloaded again"
    try:
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if PurePosixPath(name).name == member]
            if not names:
                raise UserError(f"{archive} holds no file {member}; {again}")
            with zipped.open(names[0]) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        if known_hash is not None:
            algorithm, digest = known_hash.split(":")
            if (found := pooch.file_hash(partial, algorithm)) != digest:
                raise UserError(
                    f"{member} is not the published file: its {algorithm} is {found}, not {digest}; {again}"
                )
        partial.replace(path)
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(f"{archive} is a broken archive ({error}); {again}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
