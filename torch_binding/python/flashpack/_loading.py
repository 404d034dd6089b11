"""Loading a file into a module, or some of its tensors, alone or together with other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from ._assign import commit
from ._casts import PLAIN_FLOATS
from ._checkpoint import Checkpoint, Entry
from ._device import captures_undisturbed
from ._distributed import Ranks, join_ranks
from ._engine import left_before_exit
from ._in_place import check_in_place, load_in_place, targets_in_place
from ._into import read_and_cast
from ._logging import in_one_line, logger
from ._native import CollectorPause, FlashPackError
from ._options import LoadOptions
from ._own_code import run_own_code
from ._paths import StrPath
from ._plan import DTypeOf, Plan, check_strictness, dtypes_when_read, make_plan, own_dtype
from ._report import AssignReport, report_of
from ._storage import FlashTensorStorage, read_storage, view
from ._tensors import read_to_devices, tensors_of
from ._transfers import Wanted, supported_device

# Quantisers add one of these to the name of a tensor for its scale.
_SCALES = ("_scale_inv", "_scale")


class _Loaded(NamedTuple):
    """Tensors by name, and figures of the reads."""

    tensors: dict[str, torch.Tensor]
    storage: FlashTensorStorage | None
    """The whole payload, if the tensors are views of it."""
    stats: dict[str, Any] | None
    """None if another rank has read the file."""


@left_before_exit
@captures_undisturbed()
def assign(model: torch.nn.Module, path: StrPath, options: LoadOptions) -> AssignReport:
    """Does what assign_from_file promises."""
    if not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"the model comes first, and then the path: tensors are assigned to a module, not to {what}")
    if options.in_place:
        check_in_place(options)
    device = _device_of(model) if options.device is None else options.device
    if options.device is None and not options.in_place:
        _warn_of_gathering(model, device)
    with _opened(path, device, options) as source:
        plan, stats = _assign(model, source, options)
    return report_of(model, plan, path, stats)


@left_before_exit
@captures_undisturbed()
def load_entries(
    path: StrPath, entries: Sequence[Entry], device: torch.device, options: LoadOptions
) -> tuple[dict[str, torch.Tensor], FlashTensorStorage | None]:
    """Returns the tensors of `entries` on `device`, as they are in the file, and the storage that they may share."""
    with _opened(path, device, options) as source, torch.inference_mode(False), torch.no_grad():
        loaded = _load(source, entries, options)
        source.ranks.agree()
        return {entry.name: loaded.tensors[entry.name].to(device) for entry in entries}, loaded.storage


class _Source(NamedTuple):
    """The file of a load, the ranks that load together, and the device that this rank loads to."""

    checkpoint: Checkpoint
    ranks: Ranks
    device: torch.device


@contextmanager
def _opened(path: StrPath, device: str | torch.device, options: LoadOptions) -> Iterator[_Source]:
    is_shared, sharded, shard_strategy, *places = options.sharing
    ranks = join_ranks(device, *places) if is_shared else Ranks()
    with ranks.together():
        ranks.check(options.reading.mmap, sharded, shard_strategy)
        target = supported_device(device, options.reading)
        with ranks.checkpoint(path) as checkpoint:
            yield _Source(checkpoint, ranks, target)


def _assign(model: torch.nn.Module, source: _Source, options: LoadOptions) -> tuple[Plan, dict[str, Any] | None]:
    """Gives `model` the tensors of the file, with its own loading code if it has any, or leaves the model as it was."""
    checkpoint = source.checkpoint
    with CollectorPause(), _blamed_on(model, checkpoint, TypeError, ValueError):
        plan = make_plan(model, checkpoint.entries(), options.filters, options.casts)
    if not plan.own_code:
        check_strictness(plan, checkpoint.path, options.strictness)
    _warn_of_lost_scales(plan, checkpoint, options)
    if options.in_place:
        return plan, _assign_in_place(model, source, plan, options)
    with_gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        dtype_of = dtypes_when_read(plan, options.casts)
        tensors, storage, stats = _load(source, plan.wanted + plan.passed_on, options, dtype_of)
        source.ranks.agree()
        with CollectorPause():
            given = commit(plan, tensors, source.device, options.casts, undo)
        if plan.own_code:
            with _blamed_on(model, checkpoint, Exception), torch.set_grad_enabled(with_gradients):
                run_own_code(model, plan, given, undo)
            check_strictness(plan, checkpoint.path, options.strictness)
        undo.pop_all()
    if storage is not None:
        model._flash_shared_storage = storage  # type: ignore[assignment]
        model._flash_shared_storage_meta = checkpoint.metadata  # type: ignore[assignment]
    return plan, stats


def _warn_of_gathering(model: torch.nn.Module, device: str | torch.device) -> None:
    """Warns if parameters are on several devices, because the load takes them all to one."""
    devices = list(dict.fromkeys(str(parameter.device) for parameter in model.parameters() if not parameter.is_meta))
    if len(devices) > 1:
        logger.warning(
            "the parameters of %s are on %s, and the load takes them all to %s; device= decides where they go, and a "
            "model that is to be on several devices is spread over them after its load",
            type(model).__name__,
            " and ".join(devices),
            device,
        )


def _warn_of_lost_scales(plan: Plan, checkpoint: Checkpoint, options: LoadOptions) -> None:
    """Warns if quantised weights are cast to plain floats, and the module does not take the scales of the file."""
    cast = [
        entry
        for entry in plan.wanted
        if own_dtype(entry) not in PLAIN_FLOATS and _new_dtype(entry, plan, options) in PLAIN_FLOATS
    ]
    if not cast:
        return
    lost = {entry.name for entry in checkpoint.entries()} - {entry.name for entry in plan.wanted + plan.passed_on}
    scaled = [(entry, entry.name + suffix) for entry in cast for suffix in _SCALES if entry.name + suffix in lost]
    for entry, scale in scaled[:1]:
        logger.warning(
            "%s: %r is cast from %s to %s without its scale %r, which the model does not take, so that its values are "
            "those of the model only when they are scaled; tensors of this kind: %d",
            checkpoint,
            entry.name,
            own_dtype(entry),
            _new_dtype(entry, plan, options),
            scale,
            len(scaled),
        )


def _new_dtype(entry: Entry, plan: Plan, options: LoadOptions) -> torch.dtype:
    """Returns the dtype that a tensor of the file has in the module."""
    old = plan.slots[entry.name].value
    keeps_memory = options.in_place and not (old.is_meta or is_lazy(old))
    return old.dtype if keeps_memory else options.casts.dtype_of(entry, old)


def _assign_in_place(
    model: torch.nn.Module, source: _Source, plan: Plan, options: LoadOptions
) -> dict[str, Any] | None:
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        with CollectorPause(), _blamed_on(model, source.checkpoint, TypeError, ValueError):
            targets = targets_in_place(plan, source.device, options)
        stats = load_in_place(source.checkpoint, plan, targets, options, undo)
        undo.pop_all()
    return stats or None


def _load(source: _Source, entries: Sequence[Entry], options: LoadOptions, dtype_of: DTypeOf = own_dtype) -> _Loaded:
    """Reads `entries`. Where nothing is shared, they are given their dtypes while they are read."""
    checkpoint, ranks, device = source
    if options.keep_storage:
        storage = read_storage(checkpoint, device, options.reading, ranks.read_blocks)
        index = checkpoint.metadata["index"]
        # `data` gives each view a version counter of its own.
        shared = {entry.name: view(storage, index[entry.number]).data for entry in entries}
        return _Loaded(shared, storage, storage.stats)
    wanted = ranks.wanted_by_any(checkpoint, list(entries))
    if ranks.count == 1 and not options.reading.mmap and any(dtype_of(each) != own_dtype(each) for each in wanted):
        cast, stats = read_and_cast(checkpoint, {device: wanted}, dtype_of, options.reading)
        return _Loaded(cast, None, stats)
    if ranks.count == 1:
        tensors, stats = read_to_devices(checkpoint, {device: wanted}, options.reading)
        return _Loaded(tensors, None, stats or None)
    filled = ranks.read_blocks(Wanted(checkpoint, wanted), device, options.reading)
    return _Loaded(tensors_of(wanted, filled), None, filled.stats)


@contextmanager
def _blamed_on(model: torch.nn.Module, checkpoint: Checkpoint, *kinds: type[Exception]) -> Iterator[None]:
    """Within it, errors of these kinds become a FlashPackError that names the model's class and the file."""
    try:
        yield
    except torch.OutOfMemoryError:  # Callers catch it by its class.
        raise
    except kinds as error:
        raise FlashPackError(
            f"Error while assigning to {type(model).__name__} from {checkpoint}: {in_one_line(error)}"
        ) from error


def _device_of(model: torch.nn.Module) -> str | torch.device:
    device = getattr(model, "device", None)
    if isinstance(device, (str, torch.device)) and torch.device(device).type != "meta":
        return device
    first = next((parameter for parameter in model.parameters() if not parameter.is_meta), None)
    return torch.device("cpu") if first is None else first.device
