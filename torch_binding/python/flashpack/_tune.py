"""Runs flashpack_tune, the C++ program that measures a disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ._programs import run
from ._tune_picture import check_picture, draw

_NAME = "flashpack_tune"


def tune(options: Sequence[str], path: str, picture: str | None = None) -> int:
    """Runs the program, draws what it has measured, and returns its exit status, 128 and more if a signal has ended it.

    Raises FlashPackError if the picture cannot be made, and that as early as it is known.
    """
    if picture is None:
        return run(_NAME, [*options, "--", path])
    check_picture(picture)
    with tempfile.TemporaryDirectory(prefix="flashpack_tune.") as folder:
        report = Path(folder, "report.json")
        status = run(_NAME, [*options, f"--json_file={report}", "--", path])
        if report.exists() and report.stat().st_size:  # A measurement that fails may leave it empty.
            draw(json.loads(report.read_text(encoding="utf-8")), picture)
    return status
