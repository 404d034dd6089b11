"""Runs the C++ programs that come with the package."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).parent


def find(name: str) -> str:
    """Returns the program: the package's own, else the one on PATH. Raises FileNotFoundError if there is none."""
    own = _HERE / name
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            f"there is no {name}: neither in {_HERE}, because the package was built without CLI11 (libcli11-dev on "
            "Debian), nor on PATH, where `cmake --install` of a checkout puts it"
        )
    return found


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs the program, and returns its exit status, 128 and more if a signal has ended it."""
    with subprocess.Popen([find(name), *arguments]) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # flashpack_tune removes the file that it measures with.
            raise
    return 128 - status if status < 0 else status
