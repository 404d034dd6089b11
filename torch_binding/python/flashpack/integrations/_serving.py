"""The common part of the loaders of vLLM and SGLang: options, the choice of files, and the reading of weights."""

from __future__ import annotations

import errno
import functools
import re
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from .._checkpoint import Checkpoint, Verify, opened_checkpoint
from .._conversion import files_of
from .._device import CPU
from .._file import open_file
from .._logging import logger
from .._native import FlashPackError
from .._options import positive_integer
from .._stream import stream_tensors
from .._transfers import ReadOptions, supported_device
from ..constants import WEIGHTS_NAME
from ._lazy import LazyTensor

LOAD_FORMAT = "flashpack"
INDEX_NAME = "model.flashpack.index.json"
PATTERNS = ["*.flashpack", "*.safetensors"]
"""The files that are loaded. A directory with both has converted weights beside the original ones."""

Keep = Callable[[str], bool]
Weights = Generator[tuple[str, torch.Tensor], None, None]

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.flashpack")
_replacing = threading.RLock()  # A replacement may be called within, and replace others.


@dataclass(frozen=True)
class Options:
    """The options that a user can give in model_loader_extra_config."""

    verify: Verify = "auto"
    # Half of the default of a stream: the host gives each tensor to the model at once, and wants its memory itself.
    window_bytes: int = 256 << 20
    device: str | None = None
    lazy: bool = False

    @classmethod
    def of(cls, extra_config: Any, keys_of_host: Collection[str]) -> tuple[Options, dict[str, Any]]:
        """Returns the options, and the entries whose keys are the host's own. Raises FlashPackError for any other."""
        if not isinstance(extra_config, Mapping):
            raise FlashPackError(f"model_loader_extra_config must be an object, got {extra_config!r}")
        own = {key: value for key, value in extra_config.items() if key in cls.__dataclass_fields__}
        host = {key: value for key, value in extra_config.items() if key in keys_of_host}
        if unknown := sorted(map(str, extra_config.keys() - own.keys() - host.keys())):
            known = ", ".join([*cls.__dataclass_fields__, *keys_of_host])
            raise FlashPackError(
                f"model_loader_extra_config has {', '.join(unknown)}; load format {LOAD_FORMAT} knows {known}"
            )
        return cls(**own), host

    def __post_init__(self) -> None:
        supported_device(self.device or "cpu", ReadOptions(verify=self.verify))
        if not isinstance(self.lazy, bool):
            raise FlashPackError(f"lazy of model_loader_extra_config must be true or false, got {self.lazy!r}")
        positive_integer("window_bytes of model_loader_extra_config", self.window_bytes)


@contextmanager
def replaced(module: ModuleType, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Gives global functions of a host's module other values within it, for one thread at a time.

    Raises FlashPackError if the module lacks one, because then the host is a version with another way to load.
    """
    with _replacing:
        if missing := sorted(functions.keys() - vars(module).keys()):
            raise FlashPackError(
                f"{module.__name__} has no {', '.join(missing)}; load format {LOAD_FORMAT} is made for vLLM 0.32 and "
                f"0.33 and for SGLang 0.5.23"
            )
        originals = {name: vars(module)[name] for name in functions}
        vars(module).update(functions)
        try:
            yield
        finally:
            vars(module).update(originals)


def are_flashpack(files: Iterable[str]) -> bool:
    return any(file.endswith(".flashpack") for file in files)


def files_to_load(folder: str, files: list[str], is_local: bool, safetensors: Callable[[], list[str]]) -> list[str]:
    """Returns those of the flashpack files of `folder` that are its checkpoint, or safetensors files in their place.

    Without an index, files may be there that are no checkpoint, or a part of one, as an interrupted conversion leaves
    them. They are loaded only if there is nothing else, because a host does not notice that weights are missing.

    `is_local`: whether the times of files tell which is older. Those of a download do not. `safetensors`: returns the
    safetensors files of the model.

    Raises FlashPackError for an index that is not valid, and for shards that are not all there; FileNotFoundError for
    a file that the index lists and that is not there.
    """
    if Path(folder, INDEX_NAME).is_file():
        chosen = _listed_files(folder, files)
    else:
        chosen = _whole_checkpoint(files) or safetensors() or _without_shards(files)
        if others := sorted({*files} - {*chosen}):
            _warn_once(f"{', '.join(others)}: not loaded, because no {INDEX_NAME} lists this; loading {min(chosen)}")
    if is_local and are_flashpack(chosen):
        _warn_of_newer_weights(folder, chosen)
    return chosen


def _whole_checkpoint(files: list[str]) -> list[str]:
    """Returns model.flashpack, or the only set of shards that is whole by its names; nothing if there is neither."""
    sets: dict[tuple[str, int], list[str]] = {}
    for file in files:
        if Path(file).name == WEIGHTS_NAME:
            return [file]
        if (shard := _SHARD.fullmatch(Path(file).name)) and 0 < int(shard[2]) <= int(shard[3]):
            sets.setdefault((shard[1], int(shard[3])), []).append(file)
    whole = [shards for (_, count), shards in sets.items() if len(shards) == count]
    return whole[0] if len(whole) == 1 else []


def _without_shards(files: list[str]) -> list[str]:
    if shards := sorted(file for file in files if _SHARD.fullmatch(Path(file).name)):
        raise FlashPackError(
            f"{', '.join(shards)}: these are not just all shards of one checkpoint, and there is neither {INDEX_NAME} "
            f"nor a safetensors file; was the conversion or the download interrupted, or are there several checkpoints?"
        )
    return files


def _listed_files(folder: str, files: list[str]) -> list[str]:
    """Returns those flashpack files of `folder` that its index lists."""
    index = Path(folder, INDEX_NAME)
    listed = files_of(index)[1:]
    for file in listed:
        if not file.is_file():
            message = f"{index} lists a file that is not there; was its download interrupted?"
            raise FileNotFoundError(errno.ENOENT, message, str(file))
    names = {file.name for file in listed}
    return [file for file in files if Path(file).name in names]


def _warn_of_newer_weights(folder: str, files: list[str]) -> None:
    """Warns if the model was saved as safetensors files after it was converted."""
    others = [*Path(folder).glob("model.safetensors"), *Path(folder).glob("model-*.safetensors")]
    with suppress(OSError):  # A link leads nowhere, or a file is gone: there is nothing to warn of.
        newest = max(others, key=_mtime, default=None)
        oldest = min(map(Path, files), key=_mtime)
        if newest is not None and _mtime(newest) > _mtime(oldest):
            _warn_once(f"{oldest} is loaded, but {newest} is newer: if its weights are others, convert it again")


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns


@functools.cache
def _warn_once(message: str) -> None:
    """Warns once in this process, because hosts choose the files several times."""
    logger.warning("%s", message)


def names_in(file: str) -> list[str]:
    """Returns the names of the tensors of a flashpack or safetensors file. Its payload is not read."""
    with open_file(file) as opened:
        return opened.keys()


def weights_of(files: list[str], device: str, options: Options, keep: Keep | None, show: bool) -> Weights:
    """Yields the tensors of the files in turn, those alone whose names are to be kept, each soon after it is read.

    `device`: "cuda" stands for the current device; any but a CUDA device for the CPU. `show`: whether to show a bar.
    """
    target = _device(options.device or device)
    weights = _lazy_weights if options.lazy else _read_weights
    with (
        closing(weights(files, target, options, keep)) as found,
        tqdm(desc="Loading with flashpack", unit="B", unit_scale=True, disable=not show) as bar,
    ):
        for name, tensor in found:
            bar.update(tensor.nbytes)
            yield name, tensor
            del tensor  # Otherwise it would be there until the next one is.


def _device(name: str) -> torch.device:
    """Returns the device with its index, because the current device may be another one when a tensor is read."""
    if not name.startswith("cuda"):
        return CPU
    device = torch.device(name)
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _lazy_weights(files: list[str], device: torch.device, options: Options, keep: Keep | None) -> Weights:
    for file in files:
        opened = open_file(file, device, verify=options.verify)
        for name in opened.keys():  # noqa: SIM118  It is no mapping.
            if keep is None or keep(name):
                yield name, LazyTensor.of(opened, name, device)


def _read_weights(files: list[str], device: torch.device, options: Options, keep: Keep | None) -> Weights:
    opened = _opened_as_one(files)
    if opened is None:
        for file in files:
            yield from _read_weights([file], device, options, keep)
        return
    window_bytes, verify = options.window_bytes, options.verify
    with (
        closing(opened.native),
        stream_tensors(opened, device, names=keep, window_bytes=window_bytes, verify=verify) as weights,
    ):
        yield from weights


def _opened_as_one(files: list[str]) -> Checkpoint | None:
    """Opens files as one checkpoint; None if that cannot be, because files have tensors of the same name.

    The hosts give such tensors to the model one after the other, so that the last one stays. An error that one of the
    files has by itself comes again when that is opened alone.
    """
    try:
        return opened_checkpoint(files)
    except FlashPackError:
        if len(files) == 1:
            raise
        return None
