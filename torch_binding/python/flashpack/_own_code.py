"""Loading code of a module's own: hooks of load_state_dict, methods that it calls, extra state.

load_state_dict runs this code on a module that has the tensors of the file already. So tensors are copied onto
themselves, which costs nothing, parameters stay the same objects, and the code overwrites only new memory.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

if TYPE_CHECKING:
    from ._plan import Plan

EXTRA_STATE = "_extra_state"
# These do nothing if a file has all tensors of the module.
_PLAIN_LOADS = {
    torch.nn.Module._load_from_state_dict,
    _NormBase._load_from_state_dict,
    _InstanceNorm._load_from_state_dict,
}


class Piece(NamedTuple):
    """One function that takes part in a load."""

    prefix: str
    """The module that it belongs to: "" or "layers.0."."""
    what: str
    code: Callable[..., Any]
    sees_tensors: bool
    """Whether it is given the tensors below `prefix`, and may change them, their names and their shapes."""


class OwnCode:
    """All loading code of a model's own; false if there is none."""

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self.pieces = tuple(pieces)
        self.extra_states = {piece.prefix + EXTRA_STATE for piece in self.pieces if piece.what == "set_extra_state"}
        """Names under which modules expect extra state."""
        self._seen = {piece.prefix for piece in self.pieces if piece.sees_tensors}
        self._deepest = max((prefix.count(".") for prefix in self._seen), default=0)

    def __bool__(self) -> bool:
        return bool(self.pieces)

    def sees(self, name: str) -> bool:
        """Whether such code is given the tensor of that name before it is loaded."""
        return bool(self._seen) and any(prefix in self._seen for prefix in _prefixes_of(name, self._deepest))

    def takes(self, name: str) -> bool:
        """Whether such code may use a tensor whose name is neither a parameter nor a buffer."""
        return name in self.extra_states or self.sees(name)


def own_code_of(model: torch.nn.Module, but_of: Collection[str] = ()) -> OwnCode:
    """Returns the loading code of the model's own, without that of the packages `but_of`."""
    return OwnCode(piece for piece in _pieces_of(model) if piece.code.__module__.split(".")[0] not in but_of)


def _pieces_of(model: torch.nn.Module) -> Iterator[Piece]:
    if _function(model.load_state_dict) is not torch.nn.Module.load_state_dict:
        yield Piece("", "load_state_dict", _function(model.load_state_dict), True)
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        load = _function(module._load_from_state_dict)
        if load not in _PLAIN_LOADS:
            yield Piece(prefix, "_load_from_state_dict", load, True)
        for hook in module._load_state_dict_pre_hooks.values():
            yield Piece(prefix, "a pre-hook of load_state_dict", getattr(hook, "hook", hook), True)
        for hook in module._load_state_dict_post_hooks.values():
            yield Piece(prefix, "a post-hook of load_state_dict", hook, False)
        if type(module).set_extra_state is not torch.nn.Module.set_extra_state:
            yield Piece(prefix, "set_extra_state", type(module).set_extra_state, False)


def _function(method: Any) -> Callable[..., Any]:
    return getattr(method, "__func__", method)  # type: ignore[no-any-return]


def _prefixes_of(name: str, deepest: int) -> Iterator[str]:
    """Yields the prefixes of the modules above `name`: "", "a." and "a.b." for "a.b.c".

    `deepest`: the most dots that any of them may have, because a forged name may have millions.
    """
    yield ""
    end = 0
    for _ in range(deepest):
        end = name.find(".", end) + 1
        if end == 0:
            return
        yield name[:end]


def run_own_code(model: torch.nn.Module, plan: Plan, state: dict[str, torch.Tensor], undo: ExitStack) -> None:
    """Calls load_state_dict of `model`, and corrects the missing and unexpected names of `plan`. `undo` restores all.

    Raises what the model's code raises; RuntimeError, as torch does, for tensors that do not fit.
    """
    _remember(model, undo)
    empty = [(slot, slot.now(), slot.now()._version) for slot in plan.empty_slots()]
    result = _load_state_dict(model, state)
    for slot, stand_in, version in empty:
        if slot.now() is stand_in and stand_in._version == version:
            slot.put(slot.value)  # No code has written to the new memory, so that the meta tensor comes back.
    if not hasattr(result, "missing_keys"):
        if plan.passed_on or plan.unexpected or plan.missing_parameters or plan.missing_buffers:
            plan.untold = f"load_state_dict of {type(model).__name__} does not return what is missing and unexpected"
        return
    plan.correct(result.missing_keys, result.unexpected_keys)


def _load_state_dict(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> Any:
    given = OrderedDict(state)
    # The file does not say which version of a class wrote it, so that the present one is assumed.
    given._metadata = {  # type: ignore[attr-defined]
        name: {"version": module._version} for name, module in model.named_modules(remove_duplicate=False)
    }
    parameters = inspect.signature(model.load_state_dict).parameters
    takes_strict = "strict" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return model.load_state_dict(given, **({"strict": False} if takes_strict else {}))


def _remember(model: torch.nn.Module, undo: ExitStack) -> None:
    """Has `undo` restore the attributes of modules, and the contents of containers and tensors among them.

    Parameters and buffers are no part of this: commit() has given them new memory, and has `undo` restore them.
    """
    for module in set(model.modules()):
        attributes = vars(module)
        undo.callback(_restore, attributes, dict(attributes))
        for value in attributes.values():
            if type(value) in (dict, OrderedDict, list, set):
                undo.callback(_restore, value, value.copy())
            elif isinstance(value, torch.Tensor) and not value.is_meta:
                undo.callback(_write_back, value, value.detach().clone())


def _restore(container: Any, before: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)


def _write_back(tensor: torch.Tensor, before: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.data = before
