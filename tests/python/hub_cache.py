"""What huggingface_hub keeps of a repository that it has downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_hub_cache(cache: Path, files: Mapping[str, bytes], references: tuple[str, ...] = ("main",)) -> Path:
    """Puts a repository "x/y" of these files, at one commit, into the directory `cache`."""
    repository = cache / "models--x--y"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for number, (name, content) in enumerate(files.items()):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        link = repository / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    for reference in references:
        (repository / "refs" / reference).write_text(COMMIT)
    return cache
