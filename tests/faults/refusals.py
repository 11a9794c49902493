"""Folders and disks that refuse to be written to, for root too, and without mounting anything."""

import contextlib
import ctypes
import os
import resource
import signal
import stat

# Linux lets a process with this capability ignore the modes of files; root has it.
CAP_DAC_OVERRIDE = 1
VERSION = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _ignore_modes(ignore):
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(VERSION, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    bit = 1 << CAP_DAC_OVERRIDE
    sets[0].effective = sets[0].effective | bit if ignore else sets[0].effective & ~bit
    assert libc.capset(ctypes.byref(header), sets) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def read_only(folder):
    """Let nobody write below a folder, this process included."""
    places = [folder, *folder.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in places}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    root = os.geteuid() == 0
    if root:
        _ignore_modes(False)
    try:
        yield
    finally:
        if root:
            _ignore_modes(True)
        for path, mode in modes.items():
            path.chmod(mode)


@contextlib.contextmanager
def full_disk(size):
    """Let no file become larger than that, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
