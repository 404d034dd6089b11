"""Matching the tensors of a file to the slots of a module, and putting in all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ._casts import cast_exactly, dtype_when_asked, is_same_kind
from ._checkpoint import Entry
from ._name_hints import hint_of
from ._native import FlashPackError
from ._options import Casts, Filters, Strictness
from ._own_code import OwnCode, own_code_of
from .utils import string_to_dtype

DTypeOf = Callable[[Entry], torch.dtype]


@dataclass(frozen=True)
class Slot:
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


def dtypes_when_read(plan: Plan, casts: Casts) -> DTypeOf:
    """Returns a function that tells the dtype that the bytes of an entry can be given while they are read.

    It is that of the entry's place, unless a value could be lost; whether any is can be told only of whole tensors.
    """
    given = {entry.name: casts.dtype_of(entry, plan.slots[entry.name].value) for entry in plan.wanted}

    def dtype_of(entry: Entry) -> torch.dtype:
        own = own_dtype(entry)
        dtype = given.get(entry.name, own)
        return dtype if is_same_kind(own, dtype) else own

    return dtype_of


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


def make_plan(model: torch.nn.Module, entries: Iterable[Entry], filters: Filters, casts: Casts) -> Plan:
    """Checks every tensor of the file against its slot. Raises TypeError or ValueError naming the tensor.

    Tensors that loading code of the module's own may change first need not have the shape and dtype of their slot.
    """
    if casts.coerce and casts.asked is not None:
        raise ValueError("coerce_dtype and dtype exclude each other")
    refuse_kept_elsewhere(model)
    plan = Plan(slots_of(model), own_code_of(model), filters)
    chosen: dict[int, Entry] = {}
    for entry in entries:
        if filters.ignore(entry.name):
            continue
        slot = plan.slots.get(entry.name)
        if slot is None:
            if plan.own_code.takes(entry.name):
                plan.passed_on.append(entry)
            else:
                plan.unexpected.append(entry.name)
            continue
        check_class(entry.name, slot)
        misfit = misfit_of(entry, slot, casts)
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


def check_class(name: str, slot: Slot) -> None:
    """Raises TypeError for tensors that cannot be given other memory, or whose bytes mean something of their own."""
    value = slot.value
    if is_lazy(value):
        return  # A lazy one becomes a plain parameter or buffer.
    if not has_plain_class(value):
        kind = "parameter" if slot.is_parameter else "buffer"
        raise TypeError(f"{kind} {name!r} is a {type(value).__name__}, which cannot be replaced by a plain tensor")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"{name!r} is not a dense tensor in the model")


def has_plain_class(value: torch.Tensor) -> bool:
    """Whether the class of `value` is one of torch, or derives from one and does not change what tensors do."""
    for cls in type(value).__mro__:
        if cls in (torch.nn.Parameter, torch.Tensor):
            return True
        for name, attribute in vars(cls).items():
            if name == "__torch_function__" and attribute is torch._C._disabled_torch_function_impl:
                continue
            is_special = name.startswith("__") and name not in ("__torch_function__", "__torch_dispatch__")
            if not is_special and hasattr(torch.Tensor, name):
                return False
    return False


def misfit_of(entry: Entry, slot: Slot, casts: Casts) -> TypeError | ValueError | None:
    """Returns an error if the tensor of the file cannot take the place of the module's, else None."""
    name, value = entry.name, slot.value
    if not is_lazy(value) and tuple(value.shape) != entry.shape:
        return ValueError(f"shape mismatch for {name!r}: model={list(value.shape)} vs flash={list(entry.shape)}")
    dtype = string_to_dtype(entry.dtype)
    chosen = casts.asked is not None and dtype_when_asked(value.dtype, casts.asked) == casts.dtype_of(entry, value)
    if not slot.is_parameter and not chosen and value.dtype != casts.dtype_of(entry, value):
        cure = "coerce_dtype=True casts to the dtypes of the model, dtype= floats to one dtype"
        return TypeError(f"dtype mismatch for buffer {name!r}: model={value.dtype} vs flash={dtype}; {cure}")
    return None


def check_strictness(plan: Plan, path: str, strictness: Strictness) -> None:
    """Raises FlashPackError for missing and unexpected names. Either flag makes unexpected names an error."""
    strict, strict_params, strict_buffers = strictness
    if strict is not None:
        strict_params = strict_buffers = strict
    if plan.untold and (strict_params or strict_buffers):
        raise FlashPackError(f"{path}: {plan.untold}; strict=False loads without knowing")
    if plan.unexpected and (strict_params or strict_buffers):
        hint = hint_of(plan.unexpected, plan.missing_parameters + plan.missing_buffers)
        raise FlashPackError(f"{path}: Could not assign {len(plan.unexpected)} names: {plan.unexpected}{hint}")
    missing = []
    if strict_params and plan.missing_parameters:
        missing.append((f"{len(plan.missing_parameters)} parameters", plan.missing_parameters))
    if strict_buffers and plan.missing_buffers:
        missing.append((f"{len(plan.missing_buffers)} buffers", plan.missing_buffers))
    if missing:
        counts, names = zip(*missing, strict=True)
        raise FlashPackError(f"{path}: Missing {' and '.join(counts)}: {' '.join(map(str, names))}")


def refuse_kept_elsewhere(model: torch.nn.Module) -> None:
    """Raises TypeError for modules that hold their tensors only during a forward, because a load would be lost."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(f"module {name or type(model).__name__!r} is wrapped in FullyShardedDataParallel")
        library = offloader_of(module)
        if library is not None:
            raise TypeError(
                f"module {name or type(model).__name__!r} is offloaded by {library}, which brings its own tensors for "
                f"each forward: remove its hooks, or load before offloading"
            )


def offloader_of(module: torch.nn.Module) -> str | None:
    """Returns the library that has offloaded this module, and would bring its old tensors back; None if none has."""
    hook = vars(module).get("_hf_hook")
    # If there are several hooks, `hook` is a list of them.
    if any(getattr(each, "offload", False) is True for each in (hook, *getattr(hook, "hooks", ()))):
        return "accelerate"
    registry = vars(module).get("_diffusers_hook")
    return "diffusers" if registry is not None and registry.get_hook("group_offloading") is not None else None


def commit(
    plan: Plan, tensors: dict[str, torch.Tensor], device: torch.device, casts: Casts, undo: ExitStack
) -> dict[str, torch.Tensor]:
    """Moves `tensors` out of the dict, to `device`, and into the module. `undo` puts back what was there.

    Returns the tensors for loading code of the module's own, if it has any. As in torch, such code loads into other
    memory than that of the tensors that it sees.
    """
    new_values: dict[int, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}
    for entry in plan.wanted:
        old = plan.slots[entry.name].value
        initialize(old, undo)
        new = cast_exactly(entry.name, tensors.pop(entry.name).to(device), casts.dtype_of(entry, old))
        if plan.own_code:
            given[entry.name] = new
        new_values[id(old)] = new.clone() if plan.own_code.sees(entry.name) else new
    if plan.own_code:
        for entry in plan.passed_on:
            dtype = None if entry.name in plan.own_code.extra_states else casts.dtype_of_any(entry)
            given[entry.name] = tensors.pop(entry.name).to(device=device, dtype=dtype)
        add_further_names(plan, given)
    for slot in plan.slots.values():
        if id(slot.value) in new_values:
            continue
        if plan.own_code and has_plain_class(slot.value):
            new_values[id(slot.value)] = memory_for_own_code(slot.value, device)
        elif follows(slot, device):
            # Tensors that the file lacks, such as rotary tables, go to the device of the weights.
            is_parameter = isinstance(slot.value, torch.nn.Parameter)
            new_values[id(slot.value)] = slot.value.detach().to(device) if is_parameter else slot.value.to(device)
    swap_in(plan, new_values, undo)
    return given


def initialize(value: torch.Tensor, undo: ExitStack) -> None:
    """Turns the placeholder in a lazy module into the parameter or buffer that it becomes, still empty."""
    if is_lazy(value):
        undo.callback(setattr, value, "__class__", type(value))
        value.__class__ = type(value).cls_to_become  # type: ignore[union-attr]


def add_further_names(plan: Plan, given: dict[str, torch.Tensor]) -> None:
    """Adds the other names of tied tensors. Code of the module's own sees copies of them, which it may change."""
    first_names = {id(plan.slots[entry.name].value): entry.name for entry in plan.wanted}
    for name, slot in plan.slots.items():
        first = first_names.get(id(slot.value))
        if first is not None and name not in given:
            is_seen = plan.own_code.sees(name) or plan.own_code.sees(first)
            given[name] = given[first].clone() if is_seen else given[first]
    for name, slot in plan.slots.items():
        if not slot.is_persistent:
            given.pop(name, None)  # torch gives non-persistent buffers to no loading code.


def memory_for_own_code(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns memory that loading code of the module's own may write to, so that `value` is kept for a failed load."""
    return torch.empty_like(value, device=device) if value.is_meta else value.detach().to(device, copy=True)


def swap_in(plan: Plan, new_values: dict[int, torch.Tensor], undo: ExitStack) -> None:
    """Gives each tensor of the module, by its id, its new value; all its names get the same."""
    replacements: dict[int, torch.Tensor] = {}
    for slot in plan.slots.values():
        old = slot.value
        if id(old) not in new_values:
            continue
        if isinstance(old, torch.nn.Parameter) and not old.is_meta:
            set_data(old, new_values[id(old)], undo)
            continue
        if id(old) not in replacements:
            replacements[id(old)] = replacement_of(old, new_values[id(old)])
        undo.callback(slot.put, old)
        slot.put(replacements[id(old)])


def follows(slot: Slot, device: torch.device) -> bool:
    """Whether a tensor that is not assigned goes to `device`. Parameters of other classes may not survive a move."""
    if slot.value.is_meta:
        return False
    if not isinstance(slot.value, torch.nn.Parameter):
        return True
    dense = slot.value.layout is torch.strided and not slot.value.is_quantized
    return has_plain_class(slot.value) and dense and slot.value.device != device


def set_data(parameter: torch.Tensor, new: torch.Tensor, undo: ExitStack) -> None:
    """Gives `parameter` other memory, keeping the object, so that optimizers, hooks and ties stay valid."""
    old, required_grad, grad = parameter.data, parameter.requires_grad, parameter.grad
    # A parameter that was made in inference mode has no version counter. Its flags can be set only in that mode, and
    # only a tensor of that mode fits it.
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
    """Returns a tensor over the same memory that is no view, so that in inference mode it becomes one of that mode."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def replacement_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns the tensor that replaces a buffer, or a meta parameter, because that cannot be given memory."""
    if isinstance(old, torch.nn.Parameter):
        return make_parameter(old, new)
    return new if type(old) is type(new) else new.as_subclass(type(old))


def make_parameter(old: torch.Tensor, new: torch.Tensor) -> torch.nn.Parameter:
    """Returns a parameter of the values `new` with the class, the attributes and the hooks of `old`."""
    requires_grad = old.requires_grad and can_require_grad(new)
    cls: Any = type(old)
    # Constructors are avoided, because those of classes derived from Parameter may want more than values.
    parameter: torch.nn.Parameter = torch.Tensor._make_subclass(cls, new, requires_grad)
    parameter.__dict__.update(old.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        # Both have the same dict, so that handles can still remove their hooks.
        setattr(parameter, hooks, getattr(old, hooks))
    return parameter


def can_require_grad(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
