"""Reading a file into the memory that the tensors of a module have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ._assign import initialize, swap_in
from ._casts import cast_exactly, is_same_kind
from ._checkpoint import Checkpoint, Entry
from ._into import Target, read_into
from ._logging import logger
from ._memory import extent_bytes
from ._native import FlashPackError
from ._options import LoadOptions
from ._plan import Plan, dtype_when_read, own_dtype, shape_mismatch

_MIXED = "the module was loaded in place, and may have values of the file and older ones now"

_Span = tuple[int, int, str]
"""Where the memory of a tensor begins and ends, and its name."""


def check_in_place(options: LoadOptions) -> None:
    """Raises FlashPackError for options that a load in place cannot have."""
    excluded = {
        "mmap": options.reading.mmap,
        "keep_flash_ref_on_model": options.keep_storage,
        "use_distributed_loading": options.sharing.use_distributed_loading,
        "dtype": options.casts.asked is not None,
    }
    for name, is_given in excluded.items():
        if is_given:
            raise FlashPackError(f"in_place=True and {name} exclude each other")


def targets_in_place(plan: Plan, device: torch.device, options: LoadOptions) -> list[Target]:
    """Returns where the tensors of `plan` go. Raises TypeError or ValueError if one cannot be written to.

    Those that have no memory yet get new memory on `device`. All others stay where they are, and keep their dtype.
    """
    for prefix, what, _, _ in plan.own_code.pieces:
        raise TypeError(
            f"module {prefix.removesuffix('.')!r} has loading code of its own ({what}), which no load in place runs"
        )
    targets: list[Target] = []
    spans: dict[torch.device, list[_Span]] = defaultdict(list)
    for entry in plan.wanted:
        value = plan.slots[entry.name].value
        if value.is_meta or is_lazy(value):
            dtype = dtype_when_read(entry, options.casts.dtype_of(entry, value))
            targets.append(Target(entry, device, dtype))
            continue
        # Detached, it keeps its memory and shape even if a thread gives the parameter others meanwhile.
        memory = value.detach()
        own_device = memory.device
        if options.device is not None and not _is_on(memory, device):
            raise ValueError(f"in_place=True leaves {entry.name!r} on {own_device}, but device is {device}")
        if size_bytes := _checked_extent_bytes(entry, memory):
            begin = memory.data_ptr()
            spans[own_device].append((begin, begin + size_bytes, entry.name))
        targets.append(Target(entry, own_device, memory.dtype, memory))
    for each in spans.values():
        _check_apart(each)
    return targets


def _is_on(value: torch.Tensor, device: torch.device) -> bool:
    return value.device.type == device.type and device.index in (None, value.device.index)


def _checked_extent_bytes(entry: Entry, value: torch.Tensor) -> int:
    """Returns the size of the memory of `value`, which can take the values of the entry; otherwise this raises."""
    if value.shape != entry.shape:
        raise shape_mismatch(entry, value)
    own = own_dtype(entry)
    if value.dtype != own and not is_same_kind(own, value.dtype):
        raise TypeError(
            f"dtype mismatch for {entry.name!r}: model={value.dtype} vs flash={own}; whether values would be lost is "
            f"not known before they are read, so that in_place=True does not cast them"
        )
    size_bytes = extent_bytes(value)
    begin_bytes = value.storage_offset() * value.element_size()
    if size_bytes and begin_bytes + size_bytes > value.untyped_storage().nbytes():
        raise ValueError(f"{entry.name!r} has less memory than its shape needs")
    if size_bytes and not value.is_contiguous() and _may_overlap_itself(value):
        raise ValueError(f"{entry.name!r} has one memory for several of its elements, as expand() and unfold() make it")
    return size_bytes


def _may_overlap_itself(value: torch.Tensor) -> bool:
    elements = 1  # As many as lie between the first and the last one of all smaller strides.
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < elements:
                return True
            elements += (size - 1) * stride
    return False


def _check_apart(spans: Sequence[_Span]) -> None:
    """Raises ValueError if two tensors of a device may share memory, because the file may have two values for it.

    Views whose elements lie between each other are refused, too, because to tell them apart would cost too much.
    """
    for (_, end, name), (begin, _, next_name) in pairwise(sorted(spans)):
        if begin < end:
            raise ValueError(f"{name!r} and {next_name!r} share memory, but are two tensors of the model")


def load_in_place(
    checkpoint: Checkpoint, plan: Plan, targets: Sequence[Target], options: LoadOptions, undo: ExitStack
) -> dict[str, Any]:
    """Reads to `targets`, and gives the module the tensors that are new. Returns figures of the reads.

    If it raises, the new ones are not in the module, but the others may have got some of their values.
    """
    old_memory = [target.memory for target in targets if target.memory is not None]
    with ExitStack() as reading:

        def begin() -> None:
            if old_memory:
                reading.enter_context(_told_to_be_mixed())
            for memory in old_memory:
                # Autograd must not use what it has saved of this memory, and does not know who else writes to it.
                torch.autograd.graph.increment_version(memory)

        tensors, stats = read_into(checkpoint, targets, options.reading, begin)
        new_values: dict[int, torch.Tensor] = {}
        for target in targets:
            if target.memory is None:
                old = plan.slots[target.entry.name].value
                initialize(old, undo)
                dtype = options.casts.dtype_of(target.entry, old)
                new_values[id(old)] = cast_exactly(target.entry.name, tensors.pop(target.entry.name), dtype)
        swap_in(plan, new_values, undo)
    return stats


@contextmanager
def _told_to_be_mixed() -> Iterator[None]:
    """Within it, an error says that tensors may have values of the file and older ones."""
    try:
        yield
    except BaseException as error:
        if type(error) is FlashPackError:
            raise FlashPackError(f"{error}; {_MIXED}") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror}; {_MIXED}", error.filename) from error
        logger.warning("%s", _MIXED)  # The caller wants to see this error as it is.
        raise
