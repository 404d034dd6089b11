"""Comparing two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ._casts import PLAIN_FLOATS
from ._checkpoint import Checkpoint, Entry
from ._listing import by_name
from ._logging import printable
from ._stream import stream_tensors

# The elements that are compared at a time, because each that differs takes some 50 bytes beside the tensors.
_PIECE = 1 << 20


class Difference(NamedTuple):
    """A tensor that is not the same in both checkpoints."""

    sign: str
    """"-": only in the first; "+": only in the second; "~": of another dtype or shape; "!": of other values."""
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.sign} {printable(self.name)} {self.what}"


def differences(first: Checkpoint, second: Checkpoint) -> Iterator[Difference]:
    """Yields what differs, by name. What both have in the same form is read from both, a window at a time."""
    ours, theirs = ({entry.name: entry for entry in each.entries()} for each in (first, second))
    alike = set()
    for entry in by_name(list((theirs | ours).values())):
        name = entry.name
        if name not in theirs:
            yield Difference("-", name, _form(entry))
        elif name not in ours:
            yield Difference("+", name, _form(entry))
        elif _form(entry) != _form(theirs[name]):
            yield Difference("~", name, f"{_form(entry)} -> {_form(theirs[name])}")
        else:
            alike.add(name)
    # The order is that of the first file, so that at least one is read from its beginning to its end.
    order = [entry.name for entry in first.entries() if entry.name in alike]
    with (
        stream_tensors(first, names=order, order="names") as left,
        stream_tensors(second, names=order, order="names") as right,
    ):
        for (name, a), (_, b) in zip(left, right, strict=True):
            if what := _values(a, b):
                yield Difference("!", name, what)


def _form(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _values(a: torch.Tensor, b: torch.Tensor) -> str:
    """Returns how the values differ; an empty text if all bits are the same, those of NaNs included."""
    if torch.equal(_bytes_of(a), _bytes_of(b)):
        return ""
    count, in_nan, distances = 0, 0, []
    for at in range(0, a.numel(), _PIECE):
        ours, theirs = (tensor.reshape(-1)[at : at + _PIECE] for tensor in (a, b))
        differing = (_bytes_of(ours) != _bytes_of(theirs)).any(1)
        count += int(differing.sum())
        if a.dtype in PLAIN_FLOATS and differing.any():
            apart = (ours[differing].double() - theirs[differing].double()).abs()
            numbers = apart[~apart.isnan()]
            in_nan += len(apart) - len(numbers)
            distances += [numbers.max().item()] if len(numbers) else []
    what = f"{a.dtype}".removeprefix("torch.") + f" {list(a.shape)}: {count} of {a.numel()} elements differ"
    return what + _distance(distances, in_nan)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view with a row for each element."""
    return tensor.reshape(-1).view(torch.uint8).view(tensor.numel(), tensor.element_size())


def _distance(distances: list[float], in_nan: int) -> str:
    """Returns how far apart values are whose bits differ, with those apart that have no distance."""
    ways = []
    if any(distances):
        ways.append(f", by at most {max(distances):.3g}")
    elif distances:
        ways.append(", in the sign of zero")
    if in_nan:
        ways.append(f"{' and' if ways else ','} {in_nan} of them in NaN")
    return "".join(ways)
