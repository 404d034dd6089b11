"""Tells a forked child from its parent. The child has copies of the parent's objects, but none of its threads."""

from __future__ import annotations

import os
import threading

from . import _native


class OwnerProcess(_native.OwnerProcess):
    """The process that has made the object. It is thread-safe."""

    def require_current(self, what: str) -> None:
        """Raises RuntimeError in a forked child, with `what` in the message."""
        if not self.is_current():
            raise RuntimeError(f"{what} belongs to the process that started it; make another one in a forked child")


def held_by_forks(lock: threading.Lock | threading.RLock) -> None:
    """Takes `lock` before each fork and releases it afterwards, so that a child never inherits it locked.

    A thread must not hold it for long.
    """
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
