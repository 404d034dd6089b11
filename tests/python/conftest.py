from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flashpack
import pytest
import torch
from flashpack import _native, _transfers
from support import require_gpu


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        require_gpu()


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


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object] | None], None]:
    """Makes loads tell a function of the test about their progress."""

    def install(progress: Callable[[int], object] | None) -> None:
        monkeypatch.setattr(_transfers, "progress_bar", lambda *args: contextlib.nullcontext(progress))

    return install


@pytest.fixture
def after_the_footer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Makes something happen each time that a footer has been read."""

    def install(happens: Callable[[], object]) -> None:
        open_checkpoint = _native.open_checkpoint

        def then(path: Any) -> _native.Checkpoint:
            checkpoint = open_checkpoint(path)
            happens()
            return checkpoint

        monkeypatch.setattr(_native, "open_checkpoint", then)

    return install


@pytest.fixture
def streams_of_threads(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Stands in for CUDA, which has a current device and stream for each thread."""
    current = threading.local()

    @contextlib.contextmanager
    def stream(which: object) -> Iterator[None]:
        before, current.stream = getattr(current, "stream", None), which
        yield
        current.stream = before

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: getattr(current, "stream", None))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return current
