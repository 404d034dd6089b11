"""Matching the tensors of a file to the slots of a module, and putting them in: all or none."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ._casts import cast_exactly, check_asked, dtype_when_asked
from ._footer import Entry
from ._native import FlashPackError
from .utils import is_ignored_tensor_name, string_to_dtype

Names = Collection[str] | None
Filters = tuple[Names, Names, Names]
"""Ignored names, prefixes and suffixes."""


class Casts(NamedTuple):
    """What becomes of the dtypes in a file."""

    coerce: bool = False
    """To those of the module."""
    asked: torch.dtype | None = None
    """See dtype_when_asked."""

    def dtype_of(self, entry: Entry, old: torch.Tensor) -> torch.dtype:
        """Of what `entry` becomes in the place of `old`."""
        if self.coerce:
            return old.dtype
        return dtype_when_asked(string_to_dtype(entry.dtype), self.asked)


@dataclass(frozen=True)
class Slot:
    """One name under which a module holds a parameter or buffer."""

    module: torch.nn.Module
    attribute: str
    is_parameter: bool
    is_persistent: bool
    value: torch.Tensor

    def put(self, value: torch.Tensor) -> None:
        # Past __setattr__ and register_*: no hooks, no checks that could fail half way.
        table = self.module._parameters if self.is_parameter else self.module._buffers
        table[self.attribute] = value  # type: ignore[assignment]


@dataclass
class Plan:
    """What will be read and where it goes. Tensors that a module holds under several names are read once."""

    slots: dict[str, Slot]
    wanted: list[Entry] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing_parameters: list[str] = field(default_factory=list)
    missing_buffers: list[str] = field(default_factory=list)


def slots_of(model: torch.nn.Module) -> dict[str, Slot]:
    """Every name of every parameter and buffer; tied ones appear under each of their names."""
    slots = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        lead = f"{prefix}." if prefix else ""
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                slots[lead + attribute] = Slot(module, attribute, True, True, parameter)
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                persistent = attribute not in module._non_persistent_buffers_set
                slots[lead + attribute] = Slot(module, attribute, False, persistent, buffer)
    return slots


def make_plan(model: torch.nn.Module, entries: Iterable[Entry], filters: Filters, casts: Casts) -> Plan:
    """Checks every tensor of the file against its slot. Raises TypeError or ValueError naming the tensor."""
    if casts.coerce and casts.asked is not None:
        raise ValueError("coerce_dtype and dtype exclude each other")
    check_asked(casts.asked)
    refuse_sharded(model)
    plan = Plan(slots_of(model))
    chosen: dict[int, Entry] = {}
    for entry in entries:
        if is_ignored_tensor_name(entry.name, *filters):
            continue
        slot = plan.slots.get(entry.name)
        if slot is None:
            plan.unexpected.append(entry.name)
            continue
        first = chosen.setdefault(id(slot.value), entry)
        if first is entry:
            check_slot(entry, slot, casts)
            plan.wanted.append(entry)
        elif (first.dtype, first.shape) != (entry.dtype, entry.shape):
            raise ValueError(
                f"'{first.name}' and '{entry.name}' are one tensor in the model but differ in the file: "
                f"{first.dtype} {list(first.shape)} and {entry.dtype} {list(entry.shape)}"
            )
    seen = set(chosen)
    for name, slot in plan.slots.items():
        if id(slot.value) in seen or is_ignored_tensor_name(name, *filters):
            continue
        seen.add(id(slot.value))
        if slot.is_parameter:
            plan.missing_parameters.append(name)
        elif slot.is_persistent:
            plan.missing_buffers.append(name)
    return plan


def check_slot(entry: Entry, slot: Slot, casts: Casts) -> None:
    """Whether the tensor of the file may take the place of what the module has."""
    name, value = entry.name, slot.value
    expected_class = torch.nn.Parameter if slot.is_parameter else torch.Tensor
    if type(value) is not expected_class:
        kind = "parameter" if slot.is_parameter else "buffer"
        raise TypeError(f"{kind} '{name}' is a {type(value).__name__}, which cannot be replaced by a plain tensor")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"'{name}' is not a dense tensor in the model")
    if tuple(value.shape) != entry.shape:
        raise ValueError(f"shape mismatch for '{name}': model={list(value.shape)} vs flash={list(entry.shape)}")
    dtype = string_to_dtype(entry.dtype)
    chosen = casts.asked is not None and dtype_when_asked(value.dtype, casts.asked) == casts.dtype_of(entry, value)
    if not slot.is_parameter and not chosen and value.dtype != casts.dtype_of(entry, value):
        raise TypeError(f"dtype mismatch for buffer '{name}': model={value.dtype} vs flash={dtype}.")


def check_strictness(plan: Plan, path: str, strict: bool | None, strict_params: bool, strict_buffers: bool) -> None:
    """`strict`, when given, stands for both flags; with either of them, every name of the file must be the module's."""
    if strict is not None:
        strict_params = strict_buffers = strict
    if plan.unexpected and (strict_params or strict_buffers):
        raise FlashPackError(f"{path}: Could not assign {len(plan.unexpected)} names: {plan.unexpected}")
    missing = []
    if strict_params and plan.missing_parameters:
        missing.append((f"{len(plan.missing_parameters)} parameters", plan.missing_parameters))
    if strict_buffers and plan.missing_buffers:
        missing.append((f"{len(plan.missing_buffers)} buffers", plan.missing_buffers))
    if missing:
        counts, names = zip(*missing, strict=True)
        raise FlashPackError(f"{path}: Missing {' and '.join(counts)}: {' '.join(map(str, names))}")


def refuse_sharded(model: torch.nn.Module) -> None:
    """FSDP keeps the bytes of its parameters elsewhere."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(f"module '{name or type(model).__name__}' is wrapped in FullyShardedDataParallel")


def commit(plan: Plan, tensors: dict[str, torch.Tensor], device: torch.device, casts: Casts) -> None:
    """Moves `tensors` out of the dict, to `device`, and into the module. Any failure puts back what was there."""
    new_values: dict[int, torch.Tensor] = {}
    for entry in plan.wanted:
        old = plan.slots[entry.name].value
        new = cast_exactly(entry.name, tensors.pop(entry.name).to(device), casts.dtype_of(entry, old))
        new_values[id(old)] = make_parameter(old, new) if old.is_meta and plan.slots[entry.name].is_parameter else new
    for slot in plan.slots.values():
        # What the file lacks, such as rotary tables, follows the weights.
        if id(slot.value) not in new_values and follows(slot, device):
            new_values[id(slot.value)] = slot.value.detach().to(device) if slot.is_parameter else slot.value.to(device)

    with ExitStack() as undo:
        for slot in plan.slots.values():
            old = slot.value
            if id(old) not in new_values:
                continue
            if slot.is_parameter and not old.is_meta:
                set_data(old, new_values[id(old)], undo)
            else:
                undo.callback(slot.put, old)
                slot.put(new_values[id(old)])
        undo.pop_all()


def follows(slot: Slot, device: torch.device) -> bool:
    """Whether a tensor that is not assigned goes to `device`. Parameters of other classes may not survive a move."""
    if slot.value.is_meta:
        return False
    if not slot.is_parameter:
        return True
    plain = type(slot.value) is torch.nn.Parameter and slot.value.layout is torch.strided
    return plain and not slot.value.is_quantized and slot.value.device != device


def set_data(parameter: torch.Tensor, new: torch.Tensor, undo: ExitStack) -> None:
    """Gives `parameter` other memory, keeping the object, so that optimizers, hooks and ties stay valid."""
    old, required_grad, grad = parameter.data, parameter.requires_grad, parameter.grad
    # A parameter that was made in inference mode has no version counter; only there may its flags be set, and only
    # a tensor of that mode fits it.
    inference = parameter.is_inference()

    def restore() -> None:
        with torch.inference_mode(inference):
            parameter.requires_grad_(False)
            parameter.data = old
            parameter.requires_grad_(required_grad)
            parameter.grad = grad

    undo.callback(restore)
    with torch.inference_mode(inference):
        if grad is not None and (grad.dtype, grad.device) != (new.dtype, new.device):
            parameter.grad = None
        if required_grad and not can_require_grad(new):
            parameter.requires_grad_(False)
        parameter.data = same_memory(new) if inference else new


def same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the memory of `tensor` that is no view of it: in inference mode, one of that mode."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def make_parameter(old: torch.Tensor, new: torch.Tensor) -> torch.nn.Parameter:
    """What stands in for a meta parameter, which cannot be given memory."""
    parameter = torch.nn.Parameter(new, requires_grad=old.requires_grad and can_require_grad(new))
    parameter.__dict__.update(old.__dict__)
    return parameter


def can_require_grad(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
