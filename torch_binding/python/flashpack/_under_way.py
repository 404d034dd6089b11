"""Loads that are under way, and the figures of those that have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Generic, TypeVar

from . import _native
from ._progress import Progress, after

What = TypeVar("What")

AT_ONCE = 4
"""Loads of a stream that are under way at a time: enough that the disk has work while the consumer is at the oldest."""


class UnderWay(Generic[What]):
    """Loads that have been started and not been waited for, in their order. Leaving a block with them ends them.

    Loads that belong together, such as those of several devices, are started and waited for together. No variable may
    refer to one of them, because the traceback of an error would keep it, and so its memory, alive.
    """

    def __init__(self) -> None:
        self._started: deque[tuple[What, list[_native.Load]]] = deque()
        self._done_bytes = 0

    def __len__(self) -> int:
        return len(self._started)

    def start(self, what: What, loads: Iterable[_native.Load]) -> None:
        """Starts the loads that `loads` makes, one after the other. finish() returns `what`."""
        self._started.append((what, []))
        self._started[-1][1].extend(loads)

    def finish(self, progress: Progress | None = None) -> tuple[What, list[dict[str, Any]]]:
        """Waits for the oldest loads that belong together, and returns figures of each.

        `progress` is told the bytes of all loads so far. Raises the error of a load, and then all of these have ended.
        """
        stats = _native.finish_loads(self._started[0][1], after(self._done_bytes, progress))
        self._done_bytes += sum(each["requested_bytes"] for each in stats)
        return self._started.popleft()[0], stats

    def __enter__(self) -> UnderWay[What]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._started.clear()


def add_stats(stats: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds the statistics of a transfer to those of transfers that were started at the same time."""
    for name, value in more.items():
        if name == "seconds":
            value = max(value, stats.get(name, 0.0))
        elif type(value) is int:
            value += stats.get(name, 0)
        elif name == "fallback_reason" and (before := stats.get(name)):
            value = before if value in before else f"{before}; {value}"
        stats[name] = value or stats.get(name, value)


def describe(stats: dict[str, Any]) -> str:
    rate = stats["requested_bytes"] / max(stats["seconds"], 1e-9) / 1e9
    text = (
        f"{stats['requested_bytes']} bytes in {stats['seconds']:.3f} s ({rate:.2f} GB/s), "
        f"{stats['direct_bytes']} direct, {stats['buffered_bytes']} through the page cache, "
        f"{stats['verified_bytes']} verified, backend {stats['backend']}"
    )
    if stats["profile"]:
        text += f", profile {stats['profile']}"
    return f"{text}; {stats['fallback_reason']}" if stats["fallback_reason"] else text
