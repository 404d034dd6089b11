"""Directories, files and their names are made so that they are still there after a crash. Needs no torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ._paths import StrPath


def make_directories(path: StrPath) -> None:
    """Makes a directory and those above it that are missing, all durably, even if another process makes them meanwhile.

    Raises OSError.
    """
    directory = Path(path)
    missing = [place for place in (directory, *directory.parents) if not os.path.exists(place)]
    os.makedirs(directory, exist_ok=True)
    for place in missing:
        sync(place.parent)


def sync(path: StrPath) -> None:
    """Makes a file durable, or the names in a directory. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # A directory may be writable without being readable.
        os.sync()
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = os.fspath(path)
        if error.errno != errno.EINVAL:  # Some file systems have no fsync for directories.
            raise
    finally:
        os.close(descriptor)
