"""The place that files are written to: replacing what is there only by a whole result, all files of it or none."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ._durable import make_directories, sync
from ._links import is_blob_link
from ._native import FlashPackError
from ._temporary import place_of, temporary_directory
from .serialization import file_to_replace
from .utils import logger


def own_files(directory: Path, pattern: str) -> None:
    """Replaces links in `directory` to blobs of the Hub's cache by copies of the blobs.

    Libraries that write into the directory would write through the links. `pattern`: for the names, as in Path.glob().
    Raises what pack_to_file raises if one of them is something else than a file or directory.
    """
    paths = list(directory.glob(pattern))
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            file_to_replace(path)
    links = [path for path in paths if is_blob_link(path)]
    if not links:
        return
    with staged(directory) as stage:
        for link in links:
            if not link.exists():  # The blob is missing, and writing through the link would make it.
                link.unlink()
                continue
            copy = stage / link.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(link, copy)


def refuse_existing(destination: Path) -> None:
    """Raises FlashPackError if there is something at a destination that nobody has named."""
    if os.path.lexists(destination):
        raise FlashPackError(
            f"{destination} exists already; name it as the destination, or use --force (in Python: force=True), to "
            f"replace it"
        )


def refuse_source(sources: Iterable[Path], destination: Path) -> None:
    """Raises FlashPackError if `destination` is one of `sources`, whatever its path."""
    if destination.exists() and any(destination.samefile(source) for source in sources):
        raise FlashPackError(f"{destination} is the source; it is not replaced by its conversion")


@contextlib.contextmanager
def staged(destination: Path, source: Path | None = None) -> Iterator[Path]:
    """Yields a directory to write into. If the block ends well, its files are moved into `destination`, durably.

    Otherwise nothing stays but directories that were missing, and what was there is put back. Only if the process or
    the system ends between two moves, or if an old file cannot have a hard link for that time, files of both may be
    there. The files replace what pack_to_file would
    replace; what that raises comes before any move.

    Raises FlashPackError if links in `destination` lead to files of `source`, or two of them to one file.
    """
    destination = destination.absolute()
    # Files are moved by rename, so that the temporary directory has to be on the file system of the destination.
    existing = next(path for path in (destination, *destination.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(existing))
    with contextlib.ExitStack() as homes:
        with _error_of(destination):
            stage = homes.enter_context(temporary_directory(existing))
        with _errors_in(stage, destination):
            yield stage
        files = sorted(path for path in stage.rglob("*") if path.is_file())
        targets = [file_to_replace(destination / file.relative_to(stage)) for file in files]
        _check_targets(targets, destination, source)
        ready = _beside_targets(files, targets, {Path(os.path.realpath(existing)): stage}, homes)
        for target in targets:
            make_directories(target.parent)
        _move_all(ready, targets)


def _move_all(files: Sequence[Path], targets: Sequence[Path]) -> None:
    """Moves each file to its target, durably. If one cannot be moved, what was at the targets is put back."""
    with contextlib.ExitStack() as undo:
        for file, target in zip(files, targets, strict=True):
            with _error_of(target):
                undo.callback(_put_back_of(target, file))  # First, because an interrupt may come after the move.
                file.replace(target)
                sync(target.parent)
        undo.pop_all()


def _put_back_of(target: Path, file: Path) -> Callable[[], None]:
    """Keeps what is at `target` by a hard link beside `file`, and returns the function that puts it back.

    So there is always a file at the target, also for a crash. What can have no link is not put back, because a system
    that ends between two renames would lose it.
    """
    kept = file.with_name(f".before-{secrets.token_hex(8)}")
    try:
        os.link(target, kept, follow_symlinks=False)
    except FileNotFoundError:
        return partial(_put_back, None, target)
    except OSError as error:
        why = error

        def tell() -> None:
            if not file.exists():  # It has been moved.
                logger.warning("%s cannot be put back to what it was, because it had no hard link: %s", target, why)

        return tell
    return partial(_put_back, kept, target)


def _put_back(kept: Path | None, target: Path) -> None:
    """Renames `kept` to the target, or removes what is there if nothing was. Logs if that cannot be."""
    try:
        if kept is None:
            target.unlink(missing_ok=True)
        else:
            kept.replace(target)
        sync(target.parent)
    except OSError as error:
        logger.warning("%s cannot be put back to what it was: %s", target, error)


def _beside_targets(
    files: Sequence[Path], targets: Sequence[Path], known: dict[Path, Path], homes: contextlib.ExitStack
) -> list[Path]:
    """Returns the files, complete and durable, where a rename can move each to its target.

    Links, and folders that are mounted, lead to other file systems. `known`: temporary directories by the directory
    that they are in; others are made, which `homes` removes.
    """
    ready: list[Path] = []
    for file, target in zip(files, targets, strict=True):
        with _error_of(target):
            place = Path(os.path.realpath(next(path for path in target.parents if path.exists())))
            if place not in known:
                known[place] = homes.enter_context(temporary_directory(place))
            if not file.is_relative_to(known[place]):
                file = _moved(file, known[place] / str(len(ready)))
            sync(file)
            if target.exists():
                shutil.copymode(target, file)
            ready.append(file)
    return ready


def _moved(file: Path, path: Path) -> Path:
    try:
        file.replace(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(file, path)
        file.unlink()
    return path


@contextlib.contextmanager
def _error_of(path: Path) -> Iterator[None]:
    """Within it, the system's errors name `path`, because nobody has heard of the temporary files that they are of."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


@contextlib.contextmanager
def _errors_in(stage: Path, destination: Path) -> Iterator[None]:
    """Within it, the system's errors in writing a file below `stage` name the one that it becomes."""
    try:
        yield
    except OSError as error:
        place = place_of(error, Path("/"))
        real = Path(os.path.realpath(stage))
        if not place.is_relative_to(real):
            raise
        with _error_of(destination / place.relative_to(real)):
            raise


def _check_targets(targets: Sequence[Path], destination: Path, source: Path | None) -> None:
    # A target that is a link still is replaced itself.
    real = [Path(os.path.realpath(target.parent), target.name) for target in targets]
    if len(set(real)) < len(real):
        raise FlashPackError(f"{destination} has several links to one file, which cannot become several files")
    origin = None if source is None else Path(os.path.realpath(source))
    if origin is None or Path(os.path.realpath(destination)).is_relative_to(origin):
        return
    for target, path in zip(targets, real, strict=True):
        refuse_source([path] if path.is_relative_to(origin) else [], target)
