"""Runs flashpack_tune, the C++ program that measures a disk."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_NAME = "flashpack_tune"
_HERE = Path(__file__).parent


def program() -> str:
    """Returns the program: the package's own, else the one on PATH. Raises FileNotFoundError if there is none."""
    own = _HERE / _NAME
    found = str(own) if own.is_file() else shutil.which(_NAME)
    if found is None:
        raise FileNotFoundError(
            f"there is no {_NAME}: neither in {_HERE}, because the package was built without CLI11 (libcli11-dev on "
            "Debian), nor on PATH, where `cmake --install` of a checkout puts it"
        )
    return found


def tune(arguments: Sequence[str]) -> int:
    """Runs the program with `arguments` and returns its exit status, 128 and more if a signal has ended it."""
    status = subprocess.run([program(), *arguments], check=False).returncode
    return 128 - status if status < 0 else status
