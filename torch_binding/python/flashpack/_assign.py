"""Putting tensors into the slots of a module: all of them or none."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from ._casts import cast_exactly
from ._options import Casts
from ._plan import Plan, Slot, has_plain_class


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
        _add_further_names(plan, given)
    for slot in plan.slots.values():
        if id(slot.value) in new_values:
            continue
        if plan.own_code and has_plain_class(slot.value):
            new_values[id(slot.value)] = _memory_for_own_code(slot.value, device)
        elif _follows(slot, device):
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


def _add_further_names(plan: Plan, given: dict[str, torch.Tensor]) -> None:
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


def _memory_for_own_code(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns memory that loading code of the module's own may write to, so that `value` is kept for a failed load."""
    return torch.empty_like(value, device=device) if value.is_meta else value.detach().to(device, copy=True)


def swap_in(plan: Plan, new_values: dict[int, torch.Tensor], undo: ExitStack) -> None:
    """Gives each tensor of the module, by its id, its new value; all its names get the same."""
    replacements: dict[int, torch.Tensor] = {}
    # One list and one callback, because a callback for each of many tensors takes longer than all else.
    changed: list[_Before] = []
    replaced: list[Slot] = []
    undo.callback(_put_back_all, changed, replaced)
    for slot in plan.slots.values():
        old = slot.value
        if id(old) not in new_values:
            continue
        if isinstance(old, torch.nn.Parameter) and not old.is_meta:
            changed.append(_Before(old, old.data, old.requires_grad, old.grad))
            _set_data(old, new_values[id(old)])
            continue
        if id(old) not in replacements:
            replacements[id(old)] = _replacement_of(old, new_values[id(old)])
        replaced.append(slot)
        slot.put(replacements[id(old)])


class _Before(NamedTuple):
    """A parameter, and what it had."""

    parameter: torch.Tensor
    data: torch.Tensor
    required_grad: bool
    grad: torch.Tensor | None


def _put_back_all(changed: list[_Before], replaced: list[Slot]) -> None:
    """Puts everything back, also if one step fails or is interrupted, and then raises that error."""
    failed: BaseException | None = None
    while changed or replaced:
        try:
            while replaced:
                replaced[-1].put(replaced[-1].value)
                replaced.pop()
            while changed:
                _put_back(changed[-1])
                changed.pop()
        except Exception as error:  # The same step would fail again.
            failed = failed or error
            (replaced or changed).pop()
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _put_back(before: _Before) -> None:
    parameter = before.parameter
    with _mode_of(parameter):
        parameter.requires_grad_(False)
        parameter.data = before.data
        parameter.requires_grad_(before.required_grad)
        parameter.grad = before.grad


def _mode_of(parameter: torch.Tensor) -> AbstractContextManager[object]:
    """Returns the mode that fits a parameter.

    One that was made in inference mode has no version counter. Its flags can be set only in that mode, and only a
    tensor of that mode fits it.
    """
    inference = parameter.is_inference()
    return nullcontext() if inference == torch.is_inference_mode_enabled() else torch.inference_mode(inference)


def _follows(slot: Slot, device: torch.device) -> bool:
    """Whether a tensor that is not assigned goes to `device`. Parameters of other classes may not survive a move."""
    if slot.value.is_meta:
        return False
    if not isinstance(slot.value, torch.nn.Parameter):
        return True
    dense = slot.value.layout is torch.strided and not slot.value.is_quantized
    return has_plain_class(slot.value) and dense and slot.value.device != device


def _set_data(parameter: torch.Tensor, new: torch.Tensor) -> None:
    """Gives `parameter` other memory, keeping the object, so that optimizers, hooks and ties stay valid."""
    grad = parameter.grad
    with _mode_of(parameter):
        if grad is not None and (grad.dtype, grad.device) != (new.dtype, new.device):
            parameter.grad = None
        if parameter.requires_grad and not _can_require_grad(new):
            parameter.requires_grad_(False)
        parameter.data = _same_memory(new) if parameter.is_inference() else new


def _same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor over the same memory that is no view, so that in inference mode it becomes one of that mode."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _replacement_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns the tensor that replaces a buffer, or a meta parameter, because that cannot be given memory."""
    if isinstance(old, torch.nn.Parameter):
        return make_parameter(old, new)
    return new if type(old) is type(new) else new.as_subclass(type(old))


def make_parameter(old: torch.Tensor, new: torch.Tensor) -> torch.nn.Parameter:
    """Returns a parameter of the values `new` with the class, the attributes and the hooks of `old`."""
    requires_grad = old.requires_grad and _can_require_grad(new)
    cls: Any = type(old)
    # Constructors are avoided, because those of classes derived from Parameter may want more than values.
    parameter: torch.nn.Parameter = torch.Tensor._make_subclass(cls, new, requires_grad)
    parameter.__dict__.update(old.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        # Both have the same dict, so that handles can still remove their hooks.
        setattr(parameter, hooks, getattr(old, hooks))
    return parameter


def _can_require_grad(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
