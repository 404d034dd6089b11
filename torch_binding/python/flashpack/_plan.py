"""Matching the tensors of a file to the slots of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from ._casts import dtype_when_asked, is_same_kind
from ._checkpoint import Entry
from ._logging import shortened
from ._name_hints import hint_of
from ._native import FlashPackError
from ._options import Casts, Filters, Strictness
from ._own_code import OwnCode, own_code_of
from .utils import string_to_dtype

DTypeOf = Callable[[Entry], torch.dtype]
_PLAIN_CLASSES = (torch.nn.Parameter, torch.Tensor)


class Slot(NamedTuple):
    """One name under which a module holds a parameter or buffer."""

    module: torch.nn.Module
    attribute: str
    is_parameter: bool
    is_persistent: bool
    value: torch.Tensor
    """The tensor that the module held when the load began."""

    def now(self) -> torch.Tensor:
        return self._table[self.attribute]  # type: ignore[return-value]

    def put(self, value: torch.Tensor) -> None:
        # __setattr__ and register_* are avoided, because their hooks and checks could fail half way.
        self._table[self.attribute] = value

    @property
    def _table(self) -> dict[str, torch.Tensor | None]:
        return self.module._parameters if self.is_parameter else self.module._buffers  # type: ignore[return-value]


@dataclass
class Plan:
    """The tensors that are read, and their slots. A tensor that a module holds under several names is read once."""

    slots: dict[str, Slot]
    own_code: OwnCode = field(default_factory=OwnCode)
    filters: Filters = field(default_factory=Filters)
    wanted: list[Entry] = field(default_factory=list)
    passed_on: list[Entry] = field(default_factory=list)
    """Tensors that do not fit as they are, and go to loading code of the module's own."""
    unexpected: list[str] = field(default_factory=list)
    missing_parameters: list[str] = field(default_factory=list)
    missing_buffers: list[str] = field(default_factory=list)
    """Includes extra state."""
    untold: str = ""
    """The reason why missing and unexpected names are not known, if they are not."""

    def filled(self) -> set[int]:
        """Returns the ids of the module's tensors that `wanted` fills."""
        return {id(self.slots[entry.name].value) for entry in self.wanted}

    def empty_slots(self) -> list[Slot]:
        """Returns the slots that had no memory and that `wanted` does not fill."""
        filled = self.filled()
        return [slot for slot in self.slots.values() if slot.value.is_meta and id(slot.value) not in filled]

    def correct(self, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """Takes over the names that load_state_dict has found missing and unexpected."""
        names = [name for name in dict.fromkeys(missing) if not self.filters.ignore(name)]
        parameters = {name for name, slot in self.slots.items() if slot.is_parameter}
        self.missing_parameters = [name for name in names if name in parameters]
        self.missing_buffers = [name for name in names if name not in parameters]
        self.unexpected = list(dict.fromkeys([*self.unexpected, *unexpected]))

    def assigned(self) -> list[str]:
        """Returns the names that were assigned. Call it when the load is done."""
        assigned = [entry.name for entry in self.wanted]
        if not self.own_code:
            return assigned
        given, absent = self.filled(), {*self.missing_parameters, *self.missing_buffers}
        for name, slot in self.slots.items():
            if slot.is_persistent and id(slot.value) not in given and not slot.now().is_meta:
                given.add(id(slot.value))
                if name not in absent and not self.filters.ignore(name):
                    assigned.append(name)
        return assigned + [entry.name for entry in self.passed_on if entry.name in self.own_code.extra_states]


def own_dtype(entry: Entry) -> torch.dtype:
    return string_to_dtype(entry.dtype)


def dtype_when_read(entry: Entry, wanted: torch.dtype) -> torch.dtype:
    """Returns the dtype that the bytes of an entry can be given while they are read.

    It is the wanted one, unless a value could be lost; whether any is can be told only of whole tensors.
    """
    own = own_dtype(entry)
    return wanted if is_same_kind(own, wanted) else own


def dtypes_when_read(plan: Plan, casts: Casts) -> DTypeOf:
    """Returns a function that tells dtype_when_read() of an entry, where the dtype of its place is wanted."""
    given = {entry.name: casts.dtype_of(entry, plan.slots[entry.name].value) for entry in plan.wanted}
    return lambda entry: dtype_when_read(entry, given.get(entry.name, own_dtype(entry)))


def slots_of(model: torch.nn.Module) -> dict[str, Slot]:
    """Returns the slots of all parameters and buffers by name; tied ones appear under each of their names."""
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


def make_plan(model: torch.nn.Module, entries: list[Entry], filters: Filters, casts: Casts) -> Plan:
    """Checks every tensor of the file against its slot. Raises TypeError or ValueError naming the tensor.

    Tensors that loading code of the module's own may change first need not have the shape and dtype of their slot.
    """
    if casts.coerce and casts.asked is not None:
        raise ValueError("coerce_dtype and dtype exclude each other")
    _refuse_kept_elsewhere(model)
    plan = Plan(slots_of(model), own_code_of(model), filters)
    chosen: dict[int, Entry] = {}
    for entry in filters.without_ignored(entries):
        slot = plan.slots.get(entry.name)
        if slot is None:
            if plan.own_code.takes(entry.name):
                plan.passed_on.append(entry)
            else:
                plan.unexpected.append(entry.name)
            continue
        _check_class(entry.name, slot)
        misfit = _misfit_of(entry, slot, casts)
        if misfit is not None and plan.own_code.sees(entry.name):
            plan.passed_on.append(entry)
            continue
        first = chosen.setdefault(id(slot.value), entry)
        if first is entry:
            if misfit is not None:
                raise misfit
            plan.wanted.append(entry)
        elif plan.own_code.sees(first.name) or plan.own_code.sees(entry.name):
            plan.passed_on.append(entry)  # Such code may have saved tied tensors as different ones.
        elif (first.dtype, first.shape) != (entry.dtype, entry.shape):
            raise ValueError(
                f"{first.name!r} and {entry.name!r} are one tensor in the model but differ in the file: "
                f"{first.dtype} {list(first.shape)} and {entry.dtype} {list(entry.shape)}"
            )
    seen = set(chosen)
    for name, slot in plan.slots.items():
        if id(slot.value) in seen or filters.ignore(name):
            continue
        seen.add(id(slot.value))
        if slot.is_parameter:
            plan.missing_parameters.append(name)
        elif slot.is_persistent:
            plan.missing_buffers.append(name)
    return plan


def _check_class(name: str, slot: Slot) -> None:
    """Raises TypeError for tensors that cannot be given other memory, or whose bytes mean something of their own."""
    value = slot.value
    if type(value) not in _PLAIN_CLASSES:
        if is_lazy(value):
            return  # A lazy one becomes a plain parameter or buffer.
        if not has_plain_class(value):
            kind = "parameter" if slot.is_parameter else "buffer"
            raise TypeError(f"{kind} {name!r} is a {type(value).__name__}, which cannot be replaced by a plain tensor")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise TypeError(f"{name!r} is not a dense tensor in the model")


def has_plain_class(value: torch.Tensor) -> bool:
    """Whether the class of `value` is one of torch, or derives from one and does not change what tensors do."""
    for cls in type(value).__mro__:
        if cls in _PLAIN_CLASSES:
            return True
        for name, attribute in vars(cls).items():
            if name == "__torch_function__" and attribute is torch._C._disabled_torch_function_impl:
                continue
            is_special = name.startswith("__") and name not in ("__torch_function__", "__torch_dispatch__")
            if not is_special and hasattr(torch.Tensor, name):
                return False
    return False


def _misfit_of(entry: Entry, slot: Slot, casts: Casts) -> TypeError | ValueError | None:
    """Returns an error if the tensor of the file cannot take the place of the module's, else None."""
    name, value = entry.name, slot.value
    if not is_lazy(value) and value.shape != entry.shape:
        return shape_mismatch(entry, value)
    dtype = string_to_dtype(entry.dtype)
    if slot.is_parameter:
        return None
    chosen = casts.asked is not None and dtype_when_asked(value.dtype, casts.asked) == casts.dtype_of(entry, value)
    if not chosen and value.dtype != casts.dtype_of(entry, value):
        cure = "coerce_dtype=True casts to the dtypes of the model, dtype= floats to one dtype"
        return TypeError(f"dtype mismatch for buffer {name!r}: model={value.dtype} vs flash={dtype}; {cure}")
    return None


def shape_mismatch(entry: Entry, value: torch.Tensor) -> ValueError:
    return ValueError(f"shape mismatch for {entry.name!r}: model={list(value.shape)} vs flash={list(entry.shape)}")


def check_strictness(plan: Plan, path: str, strictness: Strictness) -> None:
    """Raises FlashPackError for missing and unexpected names. Either flag makes unexpected names an error."""
    strict, strict_params, strict_buffers = strictness
    if strict is not None:
        strict_params = strict_buffers = strict
    if plan.untold and (strict_params or strict_buffers):
        raise FlashPackError(f"{path}: {plan.untold}; strict=False loads without knowing")
    if plan.unexpected and (strict_params or strict_buffers):
        hint = hint_of(plan.unexpected, plan.missing_parameters + plan.missing_buffers)
        names = shortened(plan.unexpected)
        raise FlashPackError(f"{path}: Could not assign {len(plan.unexpected)} names: {names}{hint}")
    missing = []
    if strict_params and plan.missing_parameters:
        missing.append((f"{len(plan.missing_parameters)} parameters", plan.missing_parameters))
    if strict_buffers and plan.missing_buffers:
        missing.append((f"{len(plan.missing_buffers)} buffers", plan.missing_buffers))
    if missing:
        counts, absent = zip(*missing, strict=True)
        raise FlashPackError(f"{path}: Missing {' and '.join(counts)}: {' '.join(map(shortened, absent))}")


def _refuse_kept_elsewhere(model: torch.nn.Module) -> None:
    """Raises TypeError for modules that hold their tensors only during a forward, because a load would be lost."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(f"module {name or type(model).__name__!r} is wrapped in FullyShardedDataParallel")
        library = _offloader_of(module)
        if library is not None:
            raise TypeError(
                f"module {name or type(model).__name__!r} is offloaded by {library}, which brings its own tensors for "
                f"each forward: remove its hooks, or load before offloading"
            )


def _offloader_of(module: torch.nn.Module) -> str | None:
    """Returns the library that has offloaded this module, and would bring its old tensors back; None if none has."""
    hook = vars(module).get("_hf_hook")
    # If there are several hooks, `hook` is a list of them.
    if any(getattr(each, "offload", False) is True for each in (hook, *getattr(hook, "hooks", ()))):
        return "accelerate"
    registry = vars(module).get("_diffusers_hook")
    return "diffusers" if registry is not None and registry.get_hook("group_offloading") is not None else None
