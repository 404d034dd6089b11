"""Building a module without memory for its parameters, and warning of tensors that are left without."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ._assign import make_parameter
from ._paths import StrPath


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Within it, parameters go to the meta device as modules of this thread register them; buffers stay real.

    Buffers that no checkpoint has, such as position tables, are computed by constructors and must keep their values.
    One parameter under several names stays one. Subclasses of Parameter are left alone.
    """
    owner = threading.get_ident()
    seen: dict[int, tuple[weakref.ref[torch.Tensor], torch.nn.Parameter]] = {}

    def to_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if threading.get_ident() != owner or type(parameter) is not torch.nn.Parameter or parameter.is_meta:
            return None
        known, meta = seen.get(id(parameter), (None, None))
        if meta is None or known is None or known() is not parameter:  # An id is used again once its object is gone.
            meta = make_parameter(parameter, torch.empty_like(parameter, device="meta"))
            seen[id(parameter)] = (weakref.ref(parameter), meta)
        return meta

    # torch's type hint forgets that a hook may return a parameter.
    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def warn_of_meta(model: torch.nn.Module, path: StrPath) -> tuple[str, ...]:
    """Warns of tensors that have no memory after `path` was loaded into `model`, and returns their names."""
    if not any(_has_meta(module) for module in model.modules()):  # To make all names takes longer.
        return ()
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    left = tuple(name for name, tensor in tensors if tensor.is_meta)
    if left:
        warnings.warn(
            f"flashpack: {len(left)} tensors are still on the meta device after loading {path}, "
            f"because it does not have them: {list(left)}",
            stacklevel=7,
        )
    return left


def _has_meta(module: torch.nn.Module) -> bool:
    """Whether the module itself has such a tensor."""
    own = itertools.chain(module._parameters.values(), module._buffers.values())
    return any(tensor is not None and tensor.is_meta for tensor in own)
