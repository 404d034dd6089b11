"""Progress of a transfer, shown on a terminal or told to the caller."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

Progress = Callable[[int], object]
"""A function that is called now and then, on the thread that waits, with the number of bytes that are done."""
Show = bool | Callable[[int, int], object]
"""Whether a bar is shown if standard error is a terminal; or a function that is called on the thread that waits, with
the bytes that are done and the bytes in all. An exception of the function ends the transfer.
"""


@contextmanager
def progress_bar(title: str, total_bytes: int, show: Show) -> Iterator[Progress | None]:
    """Yields the function that a transfer tells its progress; None if no progress is wanted.

    A bar stays below 100 % until the block has ended well, because what is written is not in its place before.
    """
    if callable(show):
        yield lambda done_bytes: show(done_bytes, total_bytes)
    elif not show or sys.stderr is None:  # A shell can start a program with it closed.
        yield None
    else:
        # By default tqdm shows nothing where standard error is no terminal, which it is not in a notebook.
        disable = False if _in_notebook() else None
        with tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, disable=disable) as bar:
            most_bytes = total_bytes * 99 // 100
            yield lambda done_bytes: bar.update(min(done_bytes, most_bytes) - bar.n)
            bar.update(total_bytes - bar.n)


def after(base_bytes: int, progress: Progress | None) -> Progress | None:
    """Returns a function that tells `progress` the bytes that are done, with `base_bytes` added."""
    return None if progress is None else lambda done_bytes: progress(base_bytes + done_bytes)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
