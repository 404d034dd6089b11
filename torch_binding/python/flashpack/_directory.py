"""Model directories as transformers and diffusers lay them out, on disk or on the Hub, and directories made whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._checkpoint import find_checkpoint, is_index, weight_patterns
from ._hub_cache import is_blob_link
from ._native import FlashPackError
from .integrations._hub import resolve_directory

# What a model needs beside its weights: configuration, tokenizer, generation, code, and what it may be used for.
_COMPANIONS = [
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.spm", "*.jinja", "additional_chat_templates/*.jinja"),
    *("*.py", "*.md", "LICENSE*"),
]
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TENSOR_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|flashpack|index(\.[^.]+)?\.json)$")


def is_repo_id(name: str) -> bool:
    """Whether `name` can be that of a repository on the Hub, and does not look like a file's."""
    return _REPO_ID.fullmatch(name) is not None and _TENSOR_FILE.search(name) is None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FlashPackError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise FlashPackError(f"{path} has no JSON object in it")
    return value


def components_of(directory: Path) -> dict[str, tuple[str, str]]:
    """Of a pipeline: the library and the class of every folder it uses, models and others. Empty for a model."""
    index = directory / "model_index.json"
    listed = read_json(index) if index.is_file() else {}
    return {
        name: (value[0], value[1])
        for name, value in listed.items()
        if isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
        and name.isidentifier()
        and (directory / name).is_dir()
    }


def model_folders(directory: Path) -> list[str]:
    """The folders that have a model's weights: of a pipeline, those of its components; else "", the directory."""
    if not (directory / "model_index.json").is_file():
        return [""]
    # Schedulers, tokenizers and processors call theirs something else.
    return [name for name in components_of(directory) if (directory / name / "config.json").is_file()]


def find_checkpoints(directory: Path, variant: str | None) -> dict[str, Path]:
    """The checkpoint of every folder of model_folders(); of a pipeline, not every one need have the variant.

    Raises FlashPackError naming the folders that have none.
    """
    found = {folder: _find(directory, folder, variant) for folder in model_folders(directory)}
    lacking = [os.fspath(directory / folder) for folder, path in found.items() if path is None]
    if lacking or not found:
        what = f"no weights of variant {variant!r}" if variant else "no safetensors or torch weights"
        raise FlashPackError(f"{what} in {', '.join(lacking) or directory}")
    return {folder: path for folder, path in found.items() if path is not None}


def download(repo_id: str, subfolder: str | None, variant: str | None, **hub: Any) -> Path:
    """The local copy of a model on the Hub: what it needs beside the weights, and one set of those."""
    directory = resolve_directory(repo_id, subfolder=subfolder, allow_patterns=_COMPANIONS, **hub)
    is_pipeline = (directory / "model_index.json").is_file()
    variants = [variant, None] if variant and is_pipeline else [variant]
    for suffix, choice in ((suffix, choice) for suffix in (".safetensors", ".bin") for choice in variants):
        lacking = [folder for folder in model_folders(directory) if _find(directory, folder, variant) is None]
        patterns = [
            f"{folder}/{pattern}" if folder else pattern
            for folder in lacking
            for pattern in weight_patterns(suffix, choice)
        ]
        if patterns:
            resolve_directory(repo_id, subfolder=subfolder, allow_patterns=patterns, **hub)
    return directory


def copy_companions(source: Path, destination: Path) -> None:
    """Copies what the model in `source` needs beside its weights."""
    for folder in ("", *components_of(source)):
        for file in (file for pattern in _COMPANIONS for file in (source / folder).glob(pattern)):
            if file.is_file() and not is_index(file):
                target = destination / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def own_files(directory: Path, pattern: str) -> None:
    """Makes copies of their own of those files in `directory` that are links to blobs of the Hub's cache.

    For libraries that are about to write into it, because they write through links. `pattern`: of the names, as in
    Path.glob().
    """
    links = [path for path in directory.glob(pattern) if is_blob_link(path)]
    if not links:
        return
    with staged(directory) as stage:
        for link in links:
            if not link.exists():  # Opening it would make the blob.
                link.unlink()
                continue
            copy = stage / link.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(link, copy)


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A directory to write into. If the block ends well, its files are moved into `destination`; else nothing stays."""
    destination = Path(os.path.abspath(destination))
    # On the file system of the destination, wherever that is.
    existing = next(path for path in (destination, *destination.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(existing))
    with tempfile.TemporaryDirectory(prefix=".flashpack_", dir=existing) as temporary:
        stage = Path(temporary)
        yield stage
        for file in sorted(path for path in stage.rglob("*") if path.is_file()):
            target = destination / file.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                shutil.copymode(target, file)
            file.replace(target)
            _sync(target.parent)


def _find(directory: Path, folder: str, variant: str | None) -> Path | None:
    found = find_checkpoint(directory / folder, variant)
    return find_checkpoint(directory / folder) if found is None and folder else found


def _sync(directory: Path) -> None:
    """Makes the names in it durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
