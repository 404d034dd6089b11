"""Converting checkpoints to flashpack files, and back."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._casts import dtype_of
from ._conversion import files_of, map_tensors, metadata_of
from ._destination import refuse_existing, refuse_source, staged
from ._directory import (
    copy_companions,
    declare_dtype,
    download,
    find_checkpoints,
    is_repo_id,
    refuse_replacing,
    warn_of_older,
)
from ._hub import Download
from ._native import FlashPackError
from ._options import Filters
from ._paths import StrPath
from ._pretrained import build_model
from ._reversal import revert
from ._weight_names import FOREIGN_SUFFIXES, flashpack_name_of, stem_of, suffix_of
from .serialization import dicts_of_tensors, pack_to_file, refuse_name_of_directory
from .utils import dtype_to_string, filter_state_dict, logger

__all__ = [
    "convert_to_flashpack",
    "convert_to_flashpack_from_diffusers_repo_id_or_dir",
    "convert_to_flashpack_from_model",
    "convert_to_flashpack_from_state_dict",
    "convert_to_flashpack_from_state_dict_file",
    "convert_to_flashpack_from_transformers_repo_id_or_dir",
    "filter_kwargs_for_method",
    "revert_from_flashpack",
]

StateDict = Mapping[str, torch.Tensor]
Names = list[str] | None

_FOREIGN_SUFFIXES = FOREIGN_SUFFIXES | {".gguf", ".onnx", ".json"}


class NoDestinationError(FlashPackError, AssertionError):
    """There is no default for a destination. Callers of 0.4.5 expect an AssertionError."""


class _Packing(NamedTuple):
    """The choices, casts and options with which tensors are written to a flashpack file."""

    dtype: torch.dtype | None
    filters: Filters
    silent: bool
    strip_compiled: bool = False
    key: str | None = None
    """The name under which a pickle has its state dict, if it has more than that."""

    @classmethod
    def of(cls, dtype: torch.dtype | str | None, silent: bool, *filters: Names) -> _Packing:
        return cls(None if dtype is None else dtype_of(dtype), Filters.of(*filters), silent)

    def write(self, state_dict: StateDict, destination: StrPath, metadata: Mapping[str, str] | None = None) -> str:
        """Writes `state_dict` to `destination`, and returns that."""
        tensors = filter_state_dict(state_dict, *self.filters)
        options: dict[str, Any] = {"silent": self.silent, "metadata": metadata, "strip_compiled": self.strip_compiled}
        pack_to_file(tensors, destination, self.dtype, **options)
        return os.fspath(destination)

    def convert(self, checkpoint: Path, state_dict: StateDict, destination: StrPath) -> str:
        """Writes the tensors and the metadata of the file `checkpoint`, which errors name. Returns `destination`."""
        metadata = metadata_of(checkpoint)
        try:
            return self.write(state_dict, destination, metadata)
        except FlashPackError as error:
            keys = dicts_of_tensors(state_dict)
            cure = f"; --key {keys[0]} (in Python: key={keys[0]!r}) converts these alone" if keys else ""
            raise FlashPackError(f"{checkpoint}: {error}{cure}") from error


def filter_kwargs_for_method(kwargs: dict[str, Any], method: Callable[..., Any]) -> dict[str, Any]:
    """Returns those of `kwargs` that `method` takes: all, if it has a `**` parameter."""
    parameters = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


def convert_to_flashpack(
    model_or_state_dict_or_path_or_repo_id: StrPath | torch.nn.Module | StateDict,
    destination_path: StrPath | None = None,
    dtype: torch.dtype | str | None = None,
    ignore_names: Names = None,
    ignore_prefixes: Names = None,
    ignore_suffixes: Names = None,
    use_transformers: bool = False,
    use_diffusers: bool = False,
    silent: bool = True,
    **kwargs: Any,
) -> str:
    """Converts a model, a state dict, a file or a directory, local or on the Hub. Returns the destination.

    A model, a state dict or a file (safetensors, written by torch.save, or the index of a sharded checkpoint) becomes
    a file; for a file, the default is beside it. A directory becomes a directory with model.flashpack (an adapter keeps
    its name: adapter_model.flashpack), for a pipeline in the folder of each component, and the other files that the
    model needs; the default is the source itself. Modules of sentence-transformers after the model itself keep their
    weights as they are. Folders with other files stay behind, and are logged. A repository of the Hub becomes a
    directory, too, and has no default. If the destination of either is called *.flashpack, it becomes a file with the
    weights alone.

    Tensors keep the names of the checkpoint and no model is built, unless `use_transformers` or `use_diffusers` asks
    for the names of the model that the library builds.

    A default destination that exists is an error; a `destination_path` is replaced, but only by a whole result, and
    never if it is the source. If it is a directory, its weights are replaced, and other files that differ from those of
    the source are an error. `force=True` replaces a default destination and such files, too. Older weights in other
    formats stay in a destination, and are logged, because programs without flashpack load them.

    `dtype`: floating-point tensors are cast to it, as in pack_to_file. A config.json that is copied and names a dtype
    of weights then names this one. `ignore_*`: names not to write.
    `kwargs`: `strip_compiled`, see pack_to_file; `key`, the name under which a file of torch.save has the state dict,
    as "state_dict" of Lightning; `subfolder` and `variant` of a directory; `copy_code=True`, which copies the Python
    files that come with a model, too, for loads that trust them (none of them is run); arguments of huggingface_hub,
    like `revision`; with `use_*`, of from_pretrained().

    Raises FlashPackError (a ValueError) for a source that cannot be converted, OSError for the system's failures.
    """
    source = model_or_state_dict_or_path_or_repo_id
    packing = _Packing.of(dtype, silent, ignore_names, ignore_prefixes, ignore_suffixes)._replace(
        strip_compiled=kwargs.pop("strip_compiled", False), key=kwargs.pop("key", None)
    )
    if use_transformers and use_diffusers:
        raise FlashPackError("use_transformers and use_diffusers exclude each other")
    if isinstance(source, torch.nn.Module):
        return packing.write(source.state_dict(), _required(destination_path, "a model"))
    if isinstance(source, Mapping):
        return packing.write(source, _required(destination_path, "a state dict"))
    force = kwargs.pop("force", False)
    if force and destination_path is None and os.path.exists(source):
        destination_path = _default_destination(source, kwargs.get("subfolder"))
    if os.path.exists(source) and not os.path.isdir(source):
        if use_transformers or use_diffusers:
            raise FlashPackError(f"a model cannot be built from {source} alone: give its directory")
        _warn_of_unused(kwargs)
        return _convert_file(Path(source), destination_path, packing)
    library = "transformers" if use_transformers else "diffusers" if use_diffusers else None
    return _convert_directory(source, destination_path, library, packing, kwargs | {"force": force})


def convert_to_flashpack_from_state_dict(
    state_dict: StateDict,
    destination_path: StrPath,
    dtype: torch.dtype | str | None = None,
    ignore_names: Names = None,
    ignore_prefixes: Names = None,
    ignore_suffixes: Names = None,
    silent: bool = True,
) -> str:
    """Calls pack_to_file for all names but the ignored ones. `dtype` may be a name. Returns the destination."""
    packing = _Packing.of(dtype, silent, ignore_names, ignore_prefixes, ignore_suffixes)
    return packing.write(state_dict, destination_path)


def convert_to_flashpack_from_model(
    model: torch.nn.Module,
    destination_path: StrPath,
    dtype: torch.dtype | str | None = None,
    ignore_names: Names = None,
    ignore_prefixes: Names = None,
    ignore_suffixes: Names = None,
    silent: bool = True,
) -> str:
    """Calls convert_to_flashpack_from_state_dict with the state dict of `model`."""
    return convert_to_flashpack_from_state_dict(
        model.state_dict(), destination_path, dtype, ignore_names, ignore_prefixes, ignore_suffixes, silent
    )


def convert_to_flashpack_from_state_dict_file(
    path: StrPath,
    destination_path: StrPath | None = None,
    dtype: torch.dtype | str | None = None,
    ignore_names: Names = None,
    ignore_prefixes: Names = None,
    ignore_suffixes: Names = None,
    silent: bool = True,
) -> str:
    """Converts one checkpoint: a safetensors file, what torch.save wrote, or the index of several of either.

    Only tensors and the `__metadata__` of safetensors files are taken from it, nothing is run. Tensors are read while
    others are written, so that no copy of the checkpoint is made in memory. The default destination and the errors are
    those of convert_to_flashpack.
    """
    packing = _Packing.of(dtype, silent, ignore_names, ignore_prefixes, ignore_suffixes)
    return _convert_file(Path(path), destination_path, packing)


def convert_to_flashpack_from_diffusers_repo_id_or_dir(
    model_dir: StrPath,
    destination_path: StrPath,
    dtype: torch.dtype | str | None = None,
    ignore_names: Names = None,
    ignore_prefixes: Names = None,
    ignore_suffixes: Names = None,
    silent: bool = True,
    **kwargs: Any,
) -> str:
    """Calls convert_to_flashpack for a directory or a repository, with `use_diffusers`."""
    names = (ignore_names, ignore_prefixes, ignore_suffixes)
    return convert_to_flashpack(model_dir, destination_path, dtype, *names, silent=silent, use_diffusers=True, **kwargs)


def convert_to_flashpack_from_transformers_repo_id_or_dir(
    model_dir: StrPath,
    destination_path: StrPath,
    dtype: torch.dtype | str | None = None,
    ignore_names: Names = None,
    ignore_prefixes: Names = None,
    ignore_suffixes: Names = None,
    silent: bool = True,
    **kwargs: Any,
) -> str:
    """Calls convert_to_flashpack for a directory or a repository, with `use_transformers`."""
    names = (ignore_names, ignore_prefixes, ignore_suffixes)
    return convert_to_flashpack(
        model_dir, destination_path, dtype, *names, silent=silent, use_transformers=True, **kwargs
    )


def revert_from_flashpack(
    path: StrPath, destination_path: StrPath | None = None, silent: bool = True, force: bool = False
) -> str:
    """Converts a flashpack file to a safetensors file or, if the destination has another suffix, with torch.save.

    By default the destination is beside the source, a safetensors file, and must not exist. Returns the destination.
    Metadata of the file becomes that of the safetensors file.

    A directory becomes a directory, as convert_to_flashpack makes one of the other: safetensors files of the names that
    its library looks for, for a pipeline in the folder of each component, and the same other files. By default this is
    the source itself. If the destination is called like a file with tensors (*.safetensors, *.bin,
    *.pt, *.pth, *.ckpt), it becomes a file with the weights alone.

    Older weights that programs would load in place of the result, which are an index or a flashpack file, are an error
    in a directory, and beside a default destination; beside a file that is named, they are logged. `force=True`
    replaces a default destination and, in a directory, files that differ from those of the source. From a directory it
    removes such an index or flashpack file, once the result is durable, but not the files that the index lists.

    Raises FlashPackError (a ValueError) for what the destination cannot hold, OSError for the system's failures.
    """
    return revert(path, destination_path, silent, force)


def _default_destination(source: StrPath, subfolder: str | None = None) -> str:
    """Returns where the conversion of a file, or of a directory's `subfolder`, goes if no destination is given."""
    path = Path(source)
    return os.fspath(path / (subfolder or "") if path.is_dir() else path.with_name(f"{stem_of(path)}.flashpack"))


def _convert_file(source: Path, destination_path: StrPath | None, packing: _Packing) -> str:
    refuse_name_of_directory(destination_path or "")
    destination = Path(_default_destination(source) if destination_path is None else destination_path)
    sources = files_of(source)
    is_source = destination.exists() and any(destination.samefile(each) for each in sources)
    if destination_path is None and not is_source:
        refuse_existing(destination)
    # The kind of the source is looked at first: a flashpack file, or none at all, would be called its own destination.
    tensors = map_tensors(source, packing.key)
    refuse_source(sources, destination)
    _refuse_foreign_name(destination)
    return packing.convert(source, tensors, destination)


def _convert_directory(
    source: StrPath,
    destination_path: StrPath | None,
    library: str | None,
    packing: _Packing,
    kwargs: dict[str, Any],
) -> str:
    hub = Download.of(kwargs)._replace(subfolder=kwargs.get("subfolder"))
    variant, copy_code = kwargs.get("variant"), kwargs.get("copy_code", False)
    taken = {*hub._fields, "local_dir_use_symlinks", "variant", "copy_code", "force"}
    rest = {name: value for name, value in kwargs.items() if name not in taken}
    if library is None:
        _warn_of_unused(rest)
    with_code = copy_code or bool(rest.get("trust_remote_code"))
    directory = _directory_of(source, destination_path, hub, variant, with_code)
    destination = directory if destination_path is None else Path(destination_path)
    _refuse_foreign_name(destination)
    checkpoints = find_checkpoints(directory, variant)

    def pack(folder: str, checkpoint: Path, path: StrPath) -> None:
        if library is None:
            state_dict = map_tensors(checkpoint, packing.key)
        else:
            state_dict = build_model(library, directory, folder, checkpoint, variant, **rest).state_dict()
        packing.convert(checkpoint, state_dict, path)

    if suffix_of(destination) == ".flashpack" and not destination.is_dir():
        if [*checkpoints] != [""]:
            raise FlashPackError(f"a pipeline converts to a directory, which {destination} does not look like")
        refuse_name_of_directory(destination_path or "")
        pack("", checkpoints[""], destination)
        return os.fspath(destination)
    if destination_path is None:
        for folder, checkpoint in checkpoints.items():
            refuse_existing(destination / folder / flashpack_name_of(checkpoint))
    in_place = destination.exists() and destination.samefile(directory)
    if not in_place and not kwargs["force"]:
        refuse_replacing(directory, destination, copy_code)
    with staged(destination, directory) as stage:
        for folder, checkpoint in checkpoints.items():
            pack(folder, checkpoint, stage / folder / flashpack_name_of(checkpoint))
        if not in_place:
            copy_companions(directory, stage, copy_code)
            if packing.dtype is not None:
                for folder in checkpoints:
                    declare_dtype(stage / folder, dtype_to_string(packing.dtype))
    if not in_place:
        for folder, checkpoint in checkpoints.items():
            warn_of_older(destination / folder / flashpack_name_of(checkpoint))
    return os.fspath(destination if destination_path is None else destination_path)


def _directory_of(
    source: StrPath, destination_path: StrPath | None, hub: Download, variant: str | None, with_code: bool
) -> Path:
    """Returns the directory to convert, downloaded if `source` is a repository, which has no default destination."""
    if os.path.isdir(source):
        return Path(source, hub.subfolder or "")
    if is_repo_id(os.fspath(source)) and not os.path.lexists(source):
        _required(destination_path, f"{source}, which is no file or directory here but perhaps a repository,")
        return download(os.fspath(source), hub, variant, with_code)
    with contextlib.suppress(FileNotFoundError, ValueError):
        os.stat(source)  # A link to itself, or a directory that nobody may search, has an error of its own.
    is_swapped = destination_path is not None and os.path.isfile(destination_path)
    hint = ", but there is the destination: the source comes first" if is_swapped else ""
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT) + hint, os.fspath(source))


def _required(destination_path: StrPath | None, source: str) -> StrPath:
    if destination_path is None:
        raise NoDestinationError(f"destination_path is required: {source} has no default")
    return destination_path


def _refuse_foreign_name(destination: Path) -> None:
    """Refuses to write a flashpack file under a name that other programs would take for another kind of file."""
    if suffix_of(destination) in _FOREIGN_SUFFIXES and not destination.is_dir():
        raise FlashPackError(
            f"{destination} would be a flashpack file with the name of another kind of file: call it "
            f"{destination.with_suffix('.flashpack').name}"
        )


def _warn_of_unused(kwargs: dict[str, Any]) -> None:
    unused = sorted(name for name, value in kwargs.items() if value not in (None, False))
    if unused:
        logger.warning("not used in this conversion: %s", ", ".join(unused))
