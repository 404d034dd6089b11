"""Progress of a transfer, shown on a terminal or told to the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int], object]
"""A function that is called now and then, on the thread that waits, with the number of bytes that are done."""
Show = bool | Callable[[int, int], object]
"""Whether a bar is shown if standard error is a terminal; or a function that is called on the thread that waits, with
the bytes that are done and the bytes in all. An exception of the function ends the transfer.
"""


@contextmanager
def progress_bar(title: str, total_bytes: int, show: Show) -> Iterator[Progress | None]:
    """Yields the function that a transfer tells its progress; None if no progress is wanted."""
    if callable(show):
        yield lambda done_bytes: show(done_bytes, total_bytes)
    elif not show:
        yield None
    else:
        with tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
            yield lambda done_bytes: bar.update(done_bytes - bar.n)
