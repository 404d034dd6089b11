"""Loading tensors in the background, to take them by name or as they arrive."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import NoReturn

import torch

from ._checkpoint import Entry
from ._device import DeviceLike, as_on_this_thread
from ._engine import left_before_exit
from ._file import FlashPackFile
from ._owner_process import OwnerProcess
from ._safetensors import CheckpointError, FileOnDevice, catchable
from ._stream import TensorStream, stream_tensors

PrefetchPlan = Mapping[str, slice | None]
"""The tensors to load, and which rows of them; None for all rows."""


class PrefetchLoader:
    """Tensors that are loaded in the background. Made by safe_open.prefetch().

    Each is handed out once. A tensor that is handed out can be used on any stream. Loading ends early when this is
    closed or dropped. It cannot be used in a forked child, where RuntimeError says so.
    """

    def __init__(self, file: FlashPackFile, device: DeviceLike, rows: Mapping[str, slice | None] | None) -> None:
        order = file.keys()
        self._names = order if rows is None else [name for name in order if name in rows]
        self._landing = _Landing(self._names)
        load = as_on_this_thread(partial(_land, self._landing, file, device, self._names, rows or {}))
        threading.Thread(target=load, name="flashpack-prefetch-loader", daemon=True).start()

    def __repr__(self) -> str:
        return f"PrefetchLoader({len(self._names)} tensors)"

    def names(self) -> list[str]:
        """Returns the names, in file order."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def take(self, name: str) -> torch.Tensor:
        """Returns a tensor as soon as it is there. Raises CheckpointError if it was handed out before."""
        return self._landing.take(name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors as they arrive, without those that have been taken."""
        while (landed := self._landing.take_any()) is not None:
            yield landed

    def close(self) -> None:
        """Ends the loading. Tensors that were not handed out are gone."""
        self._landing.close()

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if landing := getattr(self, "_landing", None):
            landing.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle or copy a PrefetchLoader: it owns a thread")


class _Landing:
    """The place where tensors wait between the thread that loads them and those that take them."""

    def __init__(self, names: list[str]) -> None:
        self._owner = OwnerProcess()
        self._changed = threading.Condition()
        self._expected = set(names)
        self._known = frozenset(names)
        self._landed: dict[str, torch.Tensor] = {}
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None
        """The traceback of the thread that loads. Each raise of the error adds frames of the thread that waits."""
        self._closed = False

    def put(self, name: str, tensor: torch.Tensor) -> bool:
        """Returns whether more is wanted."""
        with self._changed:
            if not self._closed:
                self._landed[name] = tensor
                self._changed.notify_all()
            return not self._closed

    @contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """Within it, errors go to those who wait."""
        try:
            yield
        except BaseException as error:
            with self._changed:
                self._error, self._traceback = error, error.__traceback__
                self._changed.notify_all()

    def close(self) -> None:
        if not self._owner.is_current():
            return  # The thread that loads is in the parent, and may have held the lock at the fork.
        with self._changed:
            self._closed = True
            self._landed.clear()
            self._changed.notify_all()

    def take(self, name: str) -> torch.Tensor:
        self._owner.require_current("a prefetch loader")
        if name not in self._known:
            raise CheckpointError(f"tensor {name} is not in the prefetch plan")
        with self._changed:
            self._wait(lambda: name in self._landed or name not in self._expected)
            if name not in self._expected:
                raise CheckpointError(f"tensor {name} was already delivered")
            return self._pop(name)

    def take_any(self) -> tuple[str, torch.Tensor] | None:
        """Returns the one that has been there longest, None when all have been handed out."""
        self._owner.require_current("a prefetch loader")
        with self._changed:
            self._wait(lambda: bool(self._landed) or not self._expected)
            if not self._expected:
                return None
            name = next(iter(self._landed))
            return name, self._pop(name)

    def _pop(self, name: str) -> torch.Tensor:
        self._expected.discard(name)
        self._changed.notify_all()
        return self._landed.pop(name)

    def _wait(self, ready: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._closed or ready() or self._error is not None)
        if self._closed:
            raise CheckpointError("the prefetch loader is closed")
        if not ready() and self._error is not None:
            with catchable():
                raise self._error.with_traceback(self._traceback)


def _land(
    landing: _Landing, file: FlashPackFile, device: DeviceLike, names: list[str], rows: Mapping[str, slice | None]
) -> None:
    """Loads whole tensors in one stream, then parts of tensors. Errors go to those who wait."""
    with landing.told_of_errors(), left_before_exit:
        with _stream(file, device, [name for name in names if rows.get(name) is None]) as whole:
            for name, tensor in whole:
                if not landing.put(name, tensor):
                    return
        there = FileOnDevice(file, device)
        for name, part in rows.items():
            if part is not None and not landing.put(name, there.get_slice(name)[part]):
                return


def _stream(file: FlashPackFile, device: DeviceLike, names: list[str]) -> TensorStream:
    """Streams without a window, because the loader keeps what nobody has taken yet."""
    verify = file._options.verify
    return stream_tensors(file._checkpoint, device, names=names, window_bytes=sys.maxsize, verify=verify)


def checked_rows(entry: Entry, part: slice | None) -> slice | None:
    """Returns the checked value of a plan for one tensor."""
    if part is None:
        return None
    if not isinstance(part, slice):
        raise CheckpointError(f"values of a prefetch plan must be None or a slice, got {part!r} for {entry.name}")
    name, shape = entry.name, entry.shape
    if not shape:
        raise CheckpointError(f"{name} is a 0-d tensor, which has no rows to slice")
    if part.step not in (None, 1):
        raise CheckpointError(f"invalid prefetch plan slice for {name}: it must have step 1, got {part.step}")
    for bound in (part.start, part.stop):
        # Python would cut the bound off at the end of the tensor, and a wrong plan would go unnoticed.
        if bound is not None and not -shape[0] <= bound <= shape[0]:
            raise CheckpointError(f"{bound} in the prefetch plan for {name} is out of range: it has {shape[0]} rows")
    return part
