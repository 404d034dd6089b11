"""Runs flashpack_tune, the C++ program that measures a disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ._tune_picture import check_picture, draw

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


def tune(options: Sequence[str], path: str, picture: str | None = None) -> int:
    """Runs the program, draws what it has measured, and returns its exit status, 128 and more if a signal has ended it.

    Raises FlashPackError if the picture cannot be made, and that as early as it is known.
    """
    if picture is None:
        return _run([*options, "--", path])
    check_picture(picture)
    with tempfile.TemporaryDirectory(prefix="flashpack_tune.") as folder:
        report = Path(folder, "report.json")
        status = _run([*options, f"--json_file={report}", "--", path])
        if report.exists() and report.stat().st_size:  # A measurement that fails may leave it empty.
            draw(json.loads(report.read_text(encoding="utf-8")), picture)
    return status


def _run(arguments: Sequence[str]) -> int:
    with subprocess.Popen([program(), *arguments]) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # It removes the file that it measures with.
            raise
    return 128 - status if status < 0 else status
