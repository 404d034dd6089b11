"""The API of safetensors.torch, and safe_open, for safetensors and flashpack files alike.

A call for another framework than torch, or for a device that is neither the CPU nor CUDA, is left to safetensors
itself. A file that is saved under a name *.flashpack becomes a flashpack file. All other names are those of
safetensors.torch and safetensors.

There are two differences. A tensor is read when it is asked for, and shares bytes with no other. safetensors by default
maps the file, so that tensors on the CPU share the page cache with it, bytes are read when they are first used, and a
file that somebody truncates kills the process. `backend="mmap"` asks for just that. And a save is durable, keeps the
mode of the file that it replaces, follows links, makes missing directories, and raises OSError for the system's
failures.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from types import FunctionType, SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .._accelerate import original_open as _original_open
from .._checkpoint import Entry, Verify, open_checkpoint
from .._device import DeviceLike
from .._file import FlashPackFile, TensorSlice, UnknownIndexError, open_file
from .._file import load_file as load_any_file
from .._mapped_tensors import MappedTensors
from .._paths import StrPath
from .._safetensors import CheckpointError, FileOnDevice, catchable, dtype_name, header_shape

if TYPE_CHECKING:
    from .._prefetch_loader import PrefetchLoader, PrefetchPlan

__all__ = [
    "CheckpointError",
    "PrefetchLoader",
    "SafetensorError",
    "TensorMeta",
    "load",
    "load_file",
    "load_model",
    "safe_open",
    "save",
    "save_file",
    "save_model",
]

Backend = Literal["mmap", "pread"] | None

_FRAMEWORKS = frozenset({"pt", "torch", "pytorch"})
_original_load: Any = safetensors.torch.load_file


class TensorMeta(NamedTuple):
    """The facts about one tensor in a file."""

    dtype: str
    """The name that safetensors has for it: "F32"."""
    shape: list[int]
    data_offsets: tuple[int, int]
    """The places where its bytes begin and end, counted from the end of the header."""


class safe_open:  # noqa: N801  It has the name that it has in safetensors.
    """A file, or several, whose tensors are read by name. See the module for what differs from safetensors.

    `filename`: also a flashpack file, the index of several files, a directory, or a list of files, whose tensors are
    taken for those of one. `device`: tensors are read to it.
    `backend`: None and "pread" read tensors into memory. "mmap" maps the file, for tensors on the CPU.
    `verify`: see assign_from_file; safetensors files have no checksums, and what is mapped is not verified.

    Several threads and forked processes may use one. At the end of a with block it is closed; slices that it gave can
    still be read.

    Raises CheckpointError, which is a SafetensorError, for a file or a name that is not valid, OSError for the system's
    failures.
    """

    _file: FlashPackFile | None
    _device: DeviceLike
    _map: MappedTensors | None

    def __new__(
        cls,
        filename: StrPath | Sequence[StrPath],
        framework: str = "pt",
        device: DeviceLike | None = "cpu",
        *,
        backend: Backend = None,
        verify: Verify = "auto",
    ) -> Any:
        if not is_ours(framework, device):
            return _original_open(filename, framework, device, **_given(backend))
        if backend not in (None, "mmap", "pread"):
            raise CheckpointError(f'backend must be "mmap", "pread" or None, got {backend!r}')
        handle = super().__new__(cls)
        handle._device = "cpu" if device is None else device
        with catchable():
            handle._file = open_file(filename, handle._device, verify=verify)
        is_mapped = backend == "mmap" and handle._file._device.type == "cpu"
        if is_mapped and verify == "always":
            raise CheckpointError(
                f'{handle._file.path}: backend="mmap" reads nothing, so verify="always" cannot verify'
            )
        handle._map = MappedTensors(handle._file) if is_mapped else None
        return handle

    def keys(self) -> list[str]:
        """Returns the names, sorted."""
        return sorted(self._opened().keys())

    def offset_keys(self) -> list[str]:
        """Returns the names in file order, file by file."""
        return self._opened().keys()

    def metadata(self) -> dict[str, str] | None:
        """Returns the text in the header (of a flashpack file: in the footer), None if there is none."""
        return self._opened()._checkpoint.native.user_metadata or None

    def get_tensor(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        with catchable():
            return self._opened().get(name) if self._map is None else self._map.tensor(entry)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors, in file order. They are read together."""
        file = self._opened()
        with catchable():
            if self._map is not None:
                return self._map.tensors(list(file._entries.values()))
            return load_any_file(file._checkpoint, self._device, verify=file._options.verify)

    def get_slice(self, name: str) -> PySafeSlice:
        """Returns a tensor to read parts of: get_slice("w")[10:20, :5]. Nothing is read before."""
        return PySafeSlice(self._opened(), self._entry(name), self._map)

    def get_tensor_meta(self, name: str) -> TensorMeta:
        entry = self._entry(name)
        file = self._opened()._checkpoint.files()[entry.file]
        begin = entry.offset_bytes - file.payload_begin
        return TensorMeta(dtype_name(entry), header_shape(entry), (begin, begin + entry.size_bytes))

    def prefetch(
        self, plan: PrefetchPlan | None = None, *, device: DeviceLike | None = None, threads: int = 8
    ) -> PrefetchLoader:
        """Starts to load tensors in the background, and returns where to take them from.

        `plan`: the names to load, each with None or a slice of step 1 along its first dim; by default all tensors,
        whole. `device`: by default that of the file; also the CPU. `threads` has no effect: the engine chooses.
        """
        from .._prefetch_loader import PrefetchLoader, checked_rows

        file = self._opened()
        where = self._device if device is None else device
        with catchable():
            rows = (
                None if plan is None else {name: checked_rows(self._entry(name), part) for name, part in plan.items()}
            )
            if rows is not None and not rows:
                raise CheckpointError("the prefetch plan selects no tensors")
            return PrefetchLoader(file, where, rows)

    def __repr__(self) -> str:
        return "safe_open(closed)" if self._file is None else f"safe_open({_arguments(repr(self._file))})"

    def _repr_html_(self) -> str:
        return repr(self) if self._file is None else self._file._repr_html_()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file = None  # It is closed when the last slice is gone.
        self._map = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle or copy a safe_open: open the file in each process")

    def _opened(self) -> FlashPackFile:
        if self._file is None:
            raise CheckpointError("the file is closed: use it within its with block")
        return self._file

    def _entry(self, name: str) -> Entry:
        file = self._opened()
        try:
            return file._entries[name]
        except KeyError:
            raise CheckpointError(f"{file.path} does not contain tensor {name}") from None


class PySafeSlice:
    """A tensor of a file, of which parts can be read. Made by safe_open.get_slice(). It keeps its file open."""

    __slots__ = ("_entry", "_file", "_map")

    def __init__(self, file: FlashPackFile, entry: Entry, of_file: MappedTensors | None) -> None:
        self._file = file
        self._entry = entry
        self._map = of_file

    def __repr__(self) -> str:
        return f"PySafeSlice({_arguments(repr(TensorSlice(self._file, self._entry)))})"

    def get_shape(self) -> list[int]:
        return header_shape(self._entry)

    def get_dtype(self) -> str:
        return dtype_name(self._entry)

    def on(self, device: DeviceLike) -> PySafeSlice:
        """Returns the same tensor, whose parts are read to another device, without a way through the CPU."""
        return PySafeSlice(FileOnDevice(self._file, device), self._entry, None)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Returns what torch gives for `index`. By integers, slices and `...`, only the wanted bytes are read."""
        if self._map is not None:
            with catchable():
                return self._map.part(self._entry, index)
        with catchable():
            if index is ...:
                return self._file.get(self._entry.name)
            try:
                return TensorSlice(self._file, self._entry)[index]
            except UnknownIndexError:  # Lists, masks, tensors, None.
                return self._file.get(self._entry.name)[index]


def is_ours(framework: str, device: Any) -> bool:
    """Whether tensors of `framework` on `device` are for the engine; if not, they are for safetensors."""
    if framework not in _FRAMEWORKS:
        return False
    if isinstance(device, int):  # torch chooses the accelerator.
        return torch.cuda.is_available()
    try:
        return device is None or torch.device(device).type in ("cpu", "cuda")
    except (RuntimeError, TypeError):
        return False


def is_gpu(device: Any) -> bool:
    """Whether tensors can be read to `device` without a way through the CPU."""
    return device is not None and is_ours("pt", device) and torch.device(device).type == "cuda"


def load_file(
    filename: StrPath | Sequence[StrPath], device: DeviceLike = "cpu", *, backend: Backend = None
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, in file order. See safe_open for the arguments and errors."""
    if not is_ours("pt", device):
        theirs: dict[str, torch.Tensor] = _original_load(filename, device, **_given(backend))
        return theirs
    with safe_open(filename, device=device, backend=backend) as file:
        tensors: dict[str, torch.Tensor] = file.get_tensors()
    return tensors


def load_model(
    model: torch.nn.Module,
    filename: StrPath,
    strict: bool = True,
    device: DeviceLike = "cpu",
    *,
    backend: Backend = None,
) -> tuple[Collection[str], list[str]]:
    """Copies the tensors of a file into a model, and returns the missing and the unexpected names.

    Does what safetensors.torch.load_model does, which also knows the names of tied tensors that are in no file.
    """

    def read(filename: StrPath, device: DeviceLike = "cpu", **_: Any) -> dict[str, torch.Tensor]:
        tensors = load_file(filename, device, backend=backend)
        # A flashpack file has tied tensors under each of their names, which would be unexpected.
        if is_ours("pt", device) and _has_flashpack_files(filename):
            tied = safetensors.torch._remove_duplicate_names(model.state_dict(), preferred_names=list(tensors))
            for name in itertools.chain(*tied.values()):
                tensors.pop(name, None)
        return tensors

    # The same code, but for how the file is read.
    theirs = safetensors.torch.load_model
    function = FunctionType(theirs.__code__, vars(safetensors.torch) | {"load_file": read})
    function.__kwdefaults__ = theirs.__kwdefaults__
    missing, unexpected = function(model, filename, strict, device)
    return missing, unexpected


def _has_flashpack_files(filename: StrPath) -> bool:
    with open_checkpoint(filename) as checkpoint:
        return any(file.format == "flashpack" for file in checkpoint.files())


def save_file(tensors: dict[str, torch.Tensor], filename: StrPath, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors to a flashpack file if it is called *.flashpack, else to a safetensors file.

    Both are written as pack_to_file writes: durably, and whole or not at all. Both formats keep `metadata`. A
    safetensors file takes no tensors that share memory or are not contiguous, none called "__metadata__", and no
    complex32 or complex128; it may be empty, which a flashpack file may not.

    Raises CheckpointError, which is a SafetensorError, naming the tensor that the file cannot have, RuntimeError for
    tensors of a safetensors file that share memory, OSError for the system's failures.
    """
    from ..serialization import pack_to_file, save_as_safetensors

    with catchable():
        if _is_for_flashpack(filename):
            pack_to_file(tensors, filename, metadata=metadata)
        else:
            save_as_safetensors(_savable(tensors), filename, metadata)


def save_model(
    model: torch.nn.Module, filename: str, metadata: dict[str, str] | None = None, force_contiguous: bool = True
) -> None:
    """Writes a model to a file, in the format that save_file chooses.

    Of tied tensors, a safetensors file has one, and its metadata the other names; a flashpack file has all.
    """
    if _is_for_flashpack(filename):
        save_file(model, filename, metadata)  # type: ignore[arg-type]
        return
    from ..serialization import plan_safetensors

    state_dict = _resolved(model.state_dict())
    with catchable():
        plan_safetensors(state_dict)  # This names a tensor that the code below does not know.
    chosen: list[tuple[dict[str, torch.Tensor], dict[str, str] | None]] = []

    def keep(tensors: dict[str, torch.Tensor], filename: str, metadata: dict[str, str] | None) -> None:
        chosen.append((tensors, metadata))

    # The same code, but for the file, which is written below, because this code would change its errors.
    theirs = safetensors.torch.save_model
    choose = FunctionType(theirs.__code__, vars(safetensors.torch) | {"save_file": keep})
    # It asks the model for nothing but its state dict.
    choose(SimpleNamespace(state_dict=lambda: state_dict), filename, metadata, force_contiguous)
    [(tensors, metadata)] = chosen
    save_file(tensors, filename, metadata)


def _is_for_flashpack(filename: StrPath) -> bool:
    return os.fsdecode(filename).lower().endswith(".flashpack")


def _resolved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors, of which a lazy conjugate or negative has memory of its own; other things as they are."""
    return {
        name: tensor.resolve_conj().resolve_neg() if isinstance(tensor, torch.Tensor) else tensor
        for name, tensor in tensors.items()
    }


def _savable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors as they are saved. Raises what safetensors raises for those that it refuses.

    Its versions before 0.8 tell that only by a copy of all.
    """
    resolved: Any = _resolved(tensors) if isinstance(tensors, Mapping) else tensors
    if check := getattr(safetensors.torch, "_evaluate_tensors_for_save", None):
        check(resolved)
    if not isinstance(resolved, dict):
        raise CheckpointError(f"a dictionary of tensors is saved, not a {type(tensors).__name__}")
    for tensor in resolved.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            tensor.cpu()  # torch says that it has no data.
    return resolved


def _arguments(text: str) -> str:
    """Returns what is between the outer parentheses of a repr()."""
    return text.partition("(")[2][:-1]


def _given(backend: Backend) -> dict[str, str]:
    """Returns the argument for safetensors, whose older versions know only its default."""
    return {} if backend in (None, "mmap") else {"backend": str(backend)}


def __getattr__(name: str) -> Any:
    if name == "PrefetchLoader":
        from .._prefetch_loader import PrefetchLoader

        return PrefetchLoader
    for theirs in (safetensors.torch, safetensors):
        if hasattr(theirs, name):
            return getattr(theirs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
