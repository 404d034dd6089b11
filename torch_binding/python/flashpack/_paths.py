"""Paths that a caller gives: of one file or directory, or of several files. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set

from ._native import FlashPackError

StrPath = str | os.PathLike[str]


def name_of(path: StrPath | Sequence[StrPath]) -> str:
    """Returns what messages call a checkpoint, without a look at its files. Raises as path_of does."""
    paths = paths_of(path)
    return path_of(path) if paths is None else ", ".join(paths)


def checked_path(path: StrPath | Sequence[StrPath]) -> StrPath | list[str]:
    """Returns a path, or a copy of a list of them, without a look at the files. Raises as path_of does."""
    paths = paths_of(path)
    if paths is None:
        path_of(path)
        return path  # type: ignore[return-value]  # path_of refuses lists.
    if not paths:
        raise FlashPackError("a checkpoint has at least one file, but the list of paths is empty")
    return paths


def paths_of(path: object) -> list[str] | None:
    """Returns the paths of a list of files, None for one path. Raises as path_of does."""
    if isinstance(path, (str, bytes)) or hasattr(path, "read") or not isinstance(path, (Sequence, Set, Iterator)):
        return None
    return [path_of(each) for each in path]


def path_of(path: object) -> str:
    """Returns a path as text. Raises TypeError for what is none, and FlashPackError if no file can have that path."""
    if isinstance(path, (str, bytes, os.PathLike)):
        text = os.fsdecode(path)
        if "\0" in text:
            raise FlashPackError(f"the path {text!r} has a NUL character, which no path can have")
        return text
    cure = ""
    if hasattr(path, "read"):
        cure = ": only files can be read and written, so that bytes in memory have to be written to one first"
    elif hasattr(path, "state_dict") or isinstance(path, Mapping):
        cure = ": the arguments may be in the wrong order"
    raise TypeError(f"a path is a str or an os.PathLike, not a {type(path).__name__}{cure}")
