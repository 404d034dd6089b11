"""The cache of the Hugging Face Hub, where files of a repository are links to blobs that are called by their hashes.

What is written through such a link makes the blob something else than its name says, for every revision that shares it.
So flashpack follows other links and replaces these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ._footer import StrPath

_MAX_LINKS = 40  # As many as the kernel follows.
_HASH = re.compile(r"[0-9a-f]{64}")


def is_blob_link(path: StrPath) -> bool:
    """Whether `path` is a symbolic link that leads to a blob of the cache, there or not."""
    return any(map(_is_blob, _targets(path)))


def _targets(path: StrPath) -> Iterator[Path]:
    """What the link `path` points to; if that is a link, what that points to, and so on. Nothing, if it is no link.

    Each by the directory that its link names, and by the one that this leads to: `blobs` may itself be a link.
    """
    link = Path(path)
    for _ in range(_MAX_LINKS):
        try:
            target = os.readlink(link)
        except OSError:
            return
        directory, name = os.path.split(target)
        named = os.path.normpath(os.path.join(os.path.realpath(link.parent), directory))
        yield Path(named, name)
        link = Path(os.path.realpath(named), name)
        yield link


def _is_blob(path: Path) -> bool:
    home = path.parent
    if home.name == "blobs":
        return (home.parent / "snapshots").is_dir()
    # From version 2 on huggingface_hub lets repositories share blobs, in blobs/<two digits of the hash>/<hash>.
    is_named_for_hash = _HASH.fullmatch(path.name) is not None and home.name == path.name[:2]
    return is_named_for_hash and home.parent.name == "blobs"
