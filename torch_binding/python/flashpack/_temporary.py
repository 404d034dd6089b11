"""Temporary directories, which are removed even if the process that has made them was killed. Needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A name that nobody gives to a directory of his own, because what has such a name may be removed.
_PREFIX, _SUFFIX = ".flashpack_conversion_", ".tmp"
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}" + re.escape(_SUFFIX))


@contextlib.contextmanager
def temporary_directory(place: Path) -> Iterator[Path]:
    """Yields a new directory in `place`, which is removed at the end of the block. Raises OSError.

    It is locked as long, so that another process knows which one was left behind by a process that was killed. Such
    ones in `place` are removed first.
    """
    _remove_leftovers(place)
    path, descriptor = _made(place)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def place_of(error: OSError, default: Path) -> Path:
    """Returns the real path of the file that the error is of; `default` if it names none, or only a descriptor."""
    named = default if error.filename is None or isinstance(error.filename, int) else error.filename
    return Path(os.path.realpath(os.fsdecode(named)))


def _made(place: Path) -> tuple[Path, int]:
    """Returns a new directory and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(suffix=_SUFFIX, prefix=_PREFIX, dir=place))
        # Another process may take it for a leftover until it is locked.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = _opened(path)
            try:
                _lock(descriptor)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return path, descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _lock(descriptor: int) -> bool:
    """Locks a directory, and returns whether its file system has locks. Raises BlockingIOError if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _remove_leftovers(place: Path) -> None:
    """Removes what killed processes of this user have left behind. What cannot be looked at stays."""
    with contextlib.suppress(OSError):
        for path in [path for path in place.iterdir() if _NAME.fullmatch(path.name)]:
            with contextlib.suppress(OSError):
                descriptor = _opened(path)
                try:
                    if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)
