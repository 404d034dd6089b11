"""Checkpoints in other formats, opened without reading their tensors."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import _native
from ._checkpoint import open_checkpoint
from ._logging import logger
from ._native import FlashPackError
from ._repository import blaming, open_regular
from ._weight_names import suffix_of
from .serialization import check_name

# Records of an archive are read in parts of this size, which bounds the memory; with smaller ones the calls would be
# more.
_READ_BYTES = 1 << 20
# A message of torch that names what it does not unpickle.
_NOT_ALLOWED = re.compile(r"GLOBAL (\S+) was not an allowed global")
# Tied layers and masks of one number take more memory than file, but no model takes a hundred times its file.
_MOST_TIMES = 100
# Any disk has room for this, so that small files with large masks pass.
_ALWAYS_ALLOWED_BYTES = 1 << 30


def map_tensors(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint by name. Files are mapped, so that bytes are read when they are needed.

    `path`: a safetensors file, a file that torch.save wrote, or the index of several of either. From pickles only
    tensors are taken; nothing in them is run. Archives, which torch.save has written since version 1.6, are read once
    to verify their checksums. `key`: what a pickle has under this name is taken for all of it.

    Raises FlashPackError for a file that is none of these, OSError for the system's failures.
    """
    return _open_sharded(path, key) if _native.is_index(path) else _open_file(path, key)


def metadata_of(path: Path) -> dict[str, str]:
    """Returns `__metadata__` of a checkpoint's safetensors files. Logs entries in which they differ, and omits them."""
    metadata: dict[str, str] = {}
    disputed = set()
    for file in files_of(path):
        if not _native.is_index(file) and (suffix_of(file) == ".safetensors" or _refusal_of(file) is None):
            for key, value in _header_of(file).items():
                if metadata.setdefault(key, value) != value:
                    disputed.add(key)
    if disputed:
        logger.warning(
            "%s: its files contradict each other in metadata, which is left out: %s", path, ", ".join(sorted(disputed))
        )
    return {key: value for key, value in metadata.items() if key not in disputed}


def files_of(path: Path) -> list[Path]:
    """Returns `path` and, if it is an index, the files that it lists."""
    if not _native.is_index(path):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_native.read_index(path).values())))]


def _open_file(path: Path, key: str | None) -> dict[str, torch.Tensor]:
    with open_regular(path) as file:
        head = file.read(_native.FOREIGN_HEAD_BYTES)
    refusal = _refusal_of(path)
    if suffix_of(path) == ".safetensors" or refusal is None:
        if key is not None:
            raise FlashPackError(f"{path} has no key {key!r}: only what torch.save wrote can have tensors below a name")
        if refusal is not None:
            raise refusal  # The library of safetensors takes headers that contradict themselves.
        return _open_safetensors(path)
    try:
        # Only the archives that torch has written since version 1.6 can be mapped.
        loaded = _open_pickle(path, mmap=head.startswith(b"PK\x03\x04"))
    except FlashPackError:
        what = "" if head.startswith((b"PK\x03\x04", b"\x80")) else _native.what_it_is(head)
        if not what:
            raise
        raise FlashPackError(f"{path} is not a file that torch.save wrote: {what}") from None
    return _state_dict_of(path, loaded, key)


def _refusal_of(path: Path) -> FlashPackError | None:
    """Returns the error that reading `path` as a safetensors file is, None if it is one whatever it is called.

    Raises FlashPackError if it is a flashpack file.
    """
    try:
        with open_checkpoint(path) as checkpoint:
            formats = [file.format for file in checkpoint.files()]
    except FlashPackError as error:
        return error
    if formats == ["flashpack"]:
        raise FlashPackError(f'{path} is a flashpack file already; "flashpack revert" makes a safetensors file of it')
    return None


def _open_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with _opened_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  It is no mapping.


def _header_of(path: Path) -> dict[str, str]:
    with _opened_safetensors(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
        return metadata


@contextlib.contextmanager
def _opened_safetensors(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    open_regular(path).close()
    with blaming(path), safe_open(path, framework="pt") as file:
        yield file


def _open_pickle(path: Path, mmap: bool) -> object:
    try:
        if mmap:
            _check_archive(path)
        with open_regular(path) as file:
            # torch maps a file by its name in UTF-8, which need not be the bytes of the name.
            is_utf8 = os.fspath(path).encode(errors="replace") == os.fsencode(path)
            name = f"/proc/self/fd/{file.fileno()}" if mmap and not is_utf8 else path
            return torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    except MemoryError:
        raise
    except Exception as error:  # torch may raise anything here, and its messages advise to turn the check off.
        if found := _NOT_ALLOWED.search(str(error)):
            raise FlashPackError(
                f"{path} has more in it than tensors, {found[1]}, which is not loaded, because unpickling can run "
                f"code: the state_dict() of a module is what can be saved and converted"
            ) from error
        raise FlashPackError(
            f"{path} is not a file that torch.save wrote, or is damaged, or has more in it than tensors, which is not "
            f"loaded, because unpickling can run code"
        ) from error


def _state_dict_of(path: Path, loaded: object, key: str | None) -> dict[str, torch.Tensor]:
    """Returns the state dict that a pickle is, or has under the name `key`."""
    if key is not None:
        if not isinstance(loaded, dict) or key not in loaded:
            names = ", ".join(map(repr, list(loaded)[:10])) if isinstance(loaded, dict) else type(loaded).__name__
            raise FlashPackError(f"{path} has no key {key!r}, but {names}")
        loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise FlashPackError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    _check_sizes(path, loaded)
    return loaded


def _check_sizes(path: Path, tensors: dict[str, Any]) -> None:
    """Refuses tensors that share so much of the file's bytes that they would fill a disk when they are written out."""
    total_bytes = sum(
        tensor.numel() * tensor.element_size()
        for tensor in tensors.values()
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
    )
    if total_bytes > _ALWAYS_ALLOWED_BYTES + _MOST_TIMES * path.stat().st_size:
        raise FlashPackError(f"{path} has tensors of {total_bytes} bytes in all, far more than are in the file")


def _check_archive(path: Path) -> None:
    """Verifies that the entries of an archive are in the file and have their checksums, because torch does not."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                # torch compresses nothing, and a compressed entry may grow a thousand times while it is read.
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile("a record is compressed")
                # torch writes 0 if it is told to make no checksums.
                if info.CRC != 0:
                    with archive.open(info) as record:
                        while record.read(_READ_BYTES):
                            pass
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise zipfile.BadZipFile("a record is said to be outside of the file") from error
        raise


def _open_sharded(path: Path, key: str | None) -> dict[str, torch.Tensor]:
    weight_map = _native.read_index(path)
    files = [path.parent / name for name in sorted(set(weight_map.values()))]
    opened = [_open_file(file, key) for file in files]
    names = [
        [name for name, value in there.items() if name in weight_map or isinstance(value, torch.Tensor)]
        for there in opened
    ]
    for name in itertools.chain(*names):
        check_name(name)
    places = _native.places_in_shards(list(zip(files, names, strict=True)), path, weight_map)
    tensors = {names[file][number]: opened[file][names[file][number]] for file, number in places}
    if unlisted := sorted(tensors.keys() - weight_map.keys()):
        logger.warning("%s does not list, but its files have: %s", path, ", ".join(unlisted))
    return tensors
