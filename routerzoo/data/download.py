"""Downloads with a checksum: a file is there whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from tqdm import tqdm

from routerzoo.errors import UserError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checksum:
    """A published digest.

    Args:
        algorithm: its name in `hashlib`.
        digest: hexadecimal.
    """

    algorithm: str
    digest: str

    def of(self, path: Path) -> str:
        """Return a file's digest, hexadecimal."""
        digest = hashlib.new(self.algorithm)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()


def default_root() -> Path:
    """Return the folder that data sets are kept in: `$ROUTERZOO_DATA`, or `~/.cache/routerzoo`."""
    return Path(os.environ.get("ROUTERZOO_DATA", Path.home() / ".cache" / "routerzoo"))


def verify(path: Path, checksum: Checksum) -> None:
    """Refuse a file with another checksum.

    Raises:
        UserError: it differs.
    """
    found = checksum.of(path)
    if found != checksum.digest:
        raise UserError(
            f"{path} is not the published file: its {checksum.algorithm} is {found}, not {checksum.digest}. "
            "Delete it, and it will be downloaded again"
        )


def download(urls: Sequence[str], path: Path, checksum: Checksum | None) -> Path:
    """Download a file unless it is there, with a progress bar.

    The file gets its name only once it is whole and its checksum right, so that a broken download is never mistaken for
    a good one. Processes that want the same file wait for each other.

    Args:
        urls: where it can be had; tried in order.
        path: where it shall lie.
        checksum: of the whole file, where one is published.

    Raises:
        UserError: no address gave the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        partial = path.with_name(path.name + ".part")
        failures = []
        for url in urls:
            try:
                _fetch(url, partial)
                if checksum is not None and (found := checksum.of(partial)) != checksum.digest:
                    raise OSError(f"wrong {checksum.algorithm} {found}, expected {checksum.digest}")
            except OSError as error:
                failures.append(f"{url} ({error})")
                partial.unlink(missing_ok=True)
            else:
                partial.replace(path)
                return path
        raise UserError(
            f"cannot download {path.name} from {', nor from '.join(failures)}. If you have the file, put it at {path}"
        )


def _fetch(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "routerzoo"})
    with urllib.request.urlopen(request, timeout=60) as response, path.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"downloading {path.stem}") as bar:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        if size and file.tell() != size:
            raise OSError(f"the connection ended after {file.tell()} of {size} bytes")


def extract_member(archive: Path, member: str, path: Path, checksum: Checksum | None = None) -> Path:
    """Extract one file of a zip archive, whole or not at all.

    Only this member is read and only `path` is written, so that an archive cannot write elsewhere.

    Raises:
        UserError: the archive is broken, has no such member, or the member's checksum is wrong.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if PurePosixPath(name).name == PurePosixPath(member).name]
            if not names:
                raise UserError(f"{archive} holds no file {member}")
            with zipped.open(names[0]) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
        if checksum is not None:
            verify(partial, checksum)
    except UserError:
        partial.unlink(missing_ok=True)
        raise
    except Exception as error:  # a damaged archive can raise anything
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{archive} is a broken archive ({error}); delete it, and it will be downloaded again"
        ) from error
    partial.replace(path)
    return path
