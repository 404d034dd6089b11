"""Symbolic links: to blobs of the Hub's cache, and out of a model's directory. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ._native import FlashPackError
from ._paths import StrPath

_MAX_LINKS = 40  # The kernel follows no more.
_HASH = re.compile(r"[0-9a-f]{64}")


def is_blob_link(path: StrPath) -> bool:
    """Whether `path` is a symbolic link that leads to a blob of the Hub's cache, whether the blob exists or not.

    In the cache, files of a repository are links to blobs, whose names are hashes of their contents. Writing through
    such a link would change the file in every revision that shares the blob. So flashpack follows other links, and
    replaces these.
    """
    return any(map(is_blob, _targets(path)))


def _targets(path: StrPath) -> Iterator[Path]:
    """Yields the target of the link `path` and, as long as the target is a link again, the next target.

    Each target is yielded in the directory that the link names, and again in the directory that this resolves to,
    because `blobs` may itself be a link.
    """
    link = Path(path)
    for _ in range(_MAX_LINKS):
        try:
            target = os.readlink(link)
        except OSError:
            return
        directory, name = os.path.split(target)
        home = os.path.join(os.path.realpath(link.parent), directory)
        yield Path(os.path.normpath(home), name)
        link = Path(os.path.realpath(home), name)
        yield link


def is_blob(path: Path) -> bool:
    """Whether `path`, which need not exist, is where the Hub's cache keeps a blob."""
    home = path.parent
    if home.name == "blobs":
        return (home.parent / "snapshots").is_dir()
    # From version 2 on huggingface_hub lets repositories share blobs, in blobs/<two digits of the hash>/<hash>.
    is_named_for_hash = _HASH.fullmatch(path.name) is not None and home.name == path.name[:2]
    return is_named_for_hash and home.parent.name == "blobs"


def check_inside(root: Path, paths: Iterable[Path]) -> None:
    """Raises FlashPackError if one of `paths` is a link that leads out of the directory `root`.

    If `root` is a snapshot in a Hub cache, links may lead to the blobs of its repository.
    """
    roots = [os.path.realpath(root), *map(os.path.realpath, _blobs_of(root))]
    for path in paths:
        if not _leads_into(os.fspath(path.absolute()), roots[:1], roots[1:]):
            raise FlashPackError(f"{path} is a link that leads out of {root}, to {os.path.realpath(path)}")


def check_folder(root: Path, folder: str) -> None:
    """Calls check_inside() for the folder of a component, or for `root` itself if it is "", and for all files in it."""
    directory = root / folder
    check_inside(root, [directory])
    if directory.is_dir():
        check_inside(root, (Path(entry) for entry in os.scandir(directory) if entry.is_symlink()))


def _leads_into(path: str, roots: list[str], blobs: list[str]) -> bool:
    for _ in range(_MAX_LINKS):
        parent = os.path.realpath(os.path.dirname(path))
        if parent in blobs:
            return True
        last = os.path.basename(path)
        path = os.path.realpath(path) if last in ("", ".", "..") else os.path.join(parent, last)
        if not os.path.islink(path):
            return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
        path = os.path.join(parent, os.readlink(path))
    return False


def _blobs_of(directory: Path) -> list[Path]:
    """Returns the folders of a Hub cache that have the files of the snapshot `directory`, or of the one around it."""
    snapshots = {
        parent
        for place in (directory.absolute(), directory.resolve())
        for parent in place.parents
        # A name before ".." need not be one of a directory above the place.
        if parent.name == "snapshots" and os.pardir not in place.relative_to(parent).parts
    }
    return [blobs for blobs in (parent.parent / "blobs" for parent in snapshots) if blobs.is_dir()]
