"""Progress on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int], object]
"""Told how many bytes are done, now and then, on the thread that waits."""


@contextmanager
def progress_bar(title: str, total_bytes: int, silent: bool) -> Iterator[Progress | None]:
    """A callback that moves a bar; None when `silent`. Where standard error is no terminal, nothing is shown."""
    if silent:
        yield None
        return
    with tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
        yield lambda done_bytes: bar.update(done_bytes - bar.n)
