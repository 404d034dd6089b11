from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashpack
import pytest


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """Packs into a new file and returns its path."""
    made: list[Path] = []

    def pack_one(source: Any, **options: Any) -> Path:
        path = tmp_path / f"{len(made)}.flashpack"
        flashpack.pack_to_file(source, path, **options)
        made.append(path)
        return path

    return pack_one
