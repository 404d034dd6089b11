"""Turning flashpack files, and directories with them, back into files for safetensors and torch."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import torch

from ._checkpoint import Checkpoint, open_checkpoint
from ._destination import refuse_existing, refuse_source, staged
from ._directory import copy_companions, refuse_replacing
from ._durable import sync
from ._file import load_file
from ._links import check_folder
from ._native import FlashPackError
from ._parts import model_folders
from ._paths import StrPath
from ._progress import Progress, progress_bar
from ._safetensors import safetensors_header, write_safetensors
from ._stream import stream_tensors
from ._temporary import place_of
from ._weight_names import FOREIGN_SUFFIXES, flashpack_name_of, own_stem_of, rivals_of, stem_for, stem_of, suffix_of
from .serialization import file_to_replace, refuse_name_of_directory
from .utils import logger

# A reversal holds about this much of a file, which leaves room for one group of a stream to be read while one is
# written. More would not be faster, because the write waits for the disk.
_WINDOW_BYTES = 128 << 20


def revert(path: StrPath, destination_path: StrPath | None, silent: bool, force: bool) -> str:
    """Does what revert_from_flashpack promises."""
    source = Path(path)
    is_file = destination_path is not None and _is_called_a_file(Path(destination_path))
    if source.is_dir() and not is_file:
        _revert_directory(source, destination_path, silent, force)
        return os.fspath(source if destination_path is None else destination_path)
    refuse_name_of_directory(destination_path or "")
    if destination_path is None:
        destination = source.with_name(f"{stem_of(source)}.safetensors")
    else:
        destination = Path(destination_path)
    if suffix_of(destination) == ".flashpack":
        raise FlashPackError(f"{destination} would not be a flashpack file: call it *.safetensors or *.pt")
    with open_checkpoint(source) as checkpoint:
        refuse_source([file.path for file in checkpoint.files()], destination)
        rivals = _rivals(checkpoint, destination, f"{stem_of(destination)}.flashpack")
        if destination_path is None and not force:
            refuse_existing(destination)
            _refuse_rivals(rivals, destination, "remove it, or name the destination")
        replaced = file_to_replace(destination)
        with staged(replaced.parent) as stage:
            _write(checkpoint, stage / replaced.name, destination, silent)
    for rival, who in rivals.items():
        logger.warning("%s is there, which %s in place of %s", rival, who, destination)
    return os.fspath(destination if destination_path is None else destination_path)


def _is_called_a_file(destination: Path) -> bool:
    return suffix_of(destination) in FOREIGN_SUFFIXES and not destination.is_dir()


def _revert_directory(source: Path, destination_path: StrPath | None, silent: bool, force: bool) -> None:
    destination = source if destination_path is None else Path(destination_path)
    in_place = destination.exists() and destination.samefile(source)
    if not in_place and not force:
        refuse_replacing(source, destination, with_code=False)
    reverted, rivals = 0, dict[Path, str]()
    with staged(destination, source) as stage:
        for folder in model_folders(source):
            check_folder(source, folder)
            with open_checkpoint(source / folder) as checkpoint:
                # Other components of a pipeline may be safetensors already.
                is_other = all(file.format == "safetensors" for file in checkpoint.files())
                if is_other and in_place:
                    continue
                reverted += not is_other
                file = Path(folder, f"{_stem_of(source / folder, checkpoint)}.safetensors")
                refuse_source([each.path for each in checkpoint.files()], destination / file)
                if destination_path is None and not force:
                    refuse_existing(destination / file)
                older = None if in_place else flashpack_name_of(checkpoint.files()[0].path)
                there = _rivals(checkpoint, destination / file, older)
                if not force:
                    _refuse_rivals(there, destination / file, "remove it, or use --force (in Python: force=True)")
                rivals |= there
                (stage / folder).mkdir(parents=True, exist_ok=True)
                _write(checkpoint, stage / file, destination / file, silent)
        if not reverted:
            raise FlashPackError(f"there is no flashpack file in {source} to revert")
        if not in_place:
            copy_companions(source, stage, with_code=False)
    for rival, who in rivals.items():
        rival.unlink()
        sync(rival.parent)
        logger.warning("%s, which %s in place of the new weights, is removed", rival, who)


def _rivals(checkpoint: Checkpoint, file: Path, flashpack_name: str | None) -> dict[Path, str]:
    """Does the same as rivals_of(), but for what is reverted itself."""
    sources = {os.path.realpath(path) for path in (Path(checkpoint.path), *(each.path for each in checkpoint.files()))}
    found = rivals_of(file, flashpack_name)
    return {path: who for path, who in found.items() if os.path.realpath(path) not in sources}


def _refuse_rivals(rivals: dict[Path, str], file: Path, cure: str) -> None:
    if rivals:
        path, who = next(iter(rivals.items()))
        raise FlashPackError(f"{path} is there, which {who} in place of {file}: {cure}")


def _stem_of(directory: Path, checkpoint: Checkpoint) -> str:
    """Returns the name, without a suffix, that the library of the model looks for."""
    return own_stem_of(checkpoint.files()[0].path) or stem_for(directory)


def _write(checkpoint: Checkpoint, file: Path, destination: Path, silent: bool) -> None:
    """Writes all of `checkpoint` to `file`, which becomes `destination`."""
    metadata, entries = checkpoint.native.user_metadata, checkpoint.entries()
    is_safetensors = suffix_of(destination) == ".safetensors"
    if is_safetensors:
        # Without this entry, transformers does not take the file for one of torch's.
        header, entries = safetensors_header(entries, {"format": "pt", **metadata})
    elif metadata:
        logger.warning("%s: metadata is left out, for which only safetensors files have a place", destination)
    stage = os.path.realpath(file.parent)
    try:
        if is_safetensors:
            with stream_tensors(checkpoint, window_bytes=_WINDOW_BYTES) as tensors:
                write_safetensors(file, header, entries, tensors, not silent)
        else:
            _save(_verified_and_mapped(checkpoint, silent), file, silent)
    except OSError as error:
        if not place_of(error, file).is_relative_to(stage):
            raise  # It is the source that cannot be read.
        number = error.errno or errno.EIO
        # Nobody has heard of the temporary file that the error names.
        raise OSError(number, os.strerror(number), os.fspath(destination)) from error


def _verified_and_mapped(checkpoint: Checkpoint, silent: bool) -> dict[str, torch.Tensor]:
    """Returns all tensors, which torch.save wants at once, mapped, because they may be larger than memory.

    What is mapped is not verified, so that all of it is read before. That also finds what the disk cannot read, where
    a mapping would kill the process.
    """
    total_bytes = sum(entry.size_bytes for entry in checkpoint.entries())
    with (
        stream_tensors(checkpoint, window_bytes=_WINDOW_BYTES) as tensors,
        progress_bar("Verifying", total_bytes, not silent) as progress,
    ):
        done_bytes = 0
        for _, tensor in tensors:
            done_bytes += tensor.nbytes
            if progress is not None:
                progress(done_bytes)
    return load_file(checkpoint, mmap=True)


def _save(tensors: dict[str, torch.Tensor], file: Path, silent: bool) -> None:
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with progress_bar("Writing", size_bytes, not silent) as progress, _Written(file, progress) as written:
        try:
            torch.save(tensors, written)
        except RuntimeError as error:
            if written.error is None:
                raise
            raise written.error from error


class _Written(io.BufferedWriter):
    """A file that tells the bytes that it has, and keeps the error that torch turns into one of its own."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.error: OSError | None = None
        self._progress = progress

    def write(self, data: Any) -> int:
        try:
            count = super().write(data)
        except OSError as error:
            self.error = error
            raise
        if self._progress is not None:
            self._progress(self.tell())
        return count
