"""Progress on a terminal, or told to the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int], object]
"""Told how many bytes are done, now and then, on the thread that waits."""
Show = bool | Callable[[int, int], object]
"""Whether a bar is shown, where standard error is a terminal; or who is told how many bytes are done, and of how many,
on the thread that waits. What it raises ends the transfer.
"""


@contextmanager
def progress_bar(title: str, total_bytes: int, show: Show) -> Iterator[Progress | None]:
    """What a transfer tells of its progress; None if nobody wants to know."""
    if callable(show):
        yield lambda done_bytes: show(done_bytes, total_bytes)
    elif not show:
        yield None
    else:
        with tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
            yield lambda done_bytes: bar.update(done_bytes - bar.n)
