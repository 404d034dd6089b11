"""Tensors of a file that are read when something is done with them, and then only the part that is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch.utils._pytree import tree_any, tree_map_only

from .._file import FlashPackFile, TensorSlice

Ranges: TypeAlias = list[range | int]
"""The wanted part of each dim of a tensor in a file; an integer takes the dim away."""

_ATEN = torch.ops.aten


class LazyTensor(torch.Tensor):
    """A tensor of a file, or a part of one, without memory.

    Slices, single indices and pieces of a dim are lazy tensors, too. Any other operation reads its arguments, into
    memory that only its result may keep, so that another operation reads again. One that would write to a lazy tensor
    is a RuntimeError, because the values would be lost. The file stays open while there are lazy tensors of it.
    """

    _source: TensorSlice
    _ranges: Ranges

    @staticmethod
    def __new__(cls, source: TensorSlice, ranges: Ranges, device: torch.device) -> LazyTensor:
        shape = [len(each) for each in ranges if isinstance(each, range)]
        tensor: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=device)
        tensor._source, tensor._ranges = source, ranges
        return tensor

    @classmethod
    def of(cls, file: FlashPackFile, name: str, device: torch.device) -> LazyTensor:
        source = file.get_slice(name)
        return cls(source, [range(size) for size in source.shape], device)

    def read(self) -> torch.Tensor:
        """Returns an ordinary tensor, in memory of its own."""
        index = (each if isinstance(each, int) else slice(each.start, each.stop, each.step) for each in self._ranges)
        return self._source[tuple(index)]

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        return self.read().numpy(force=force)

    def tolist(self) -> Any:
        return self.read().tolist()

    def data_ptr(self) -> NoReturn:
        raise RuntimeError("a lazy tensor has no memory, and so no address: clone() makes a tensor with memory")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PARTS:
            return _PARTS[func](*args, **(kwargs or {}))
        if tree_any(lambda each: isinstance(each, cls), _written(func, args, kwargs or {})):
            raise RuntimeError(f"{func}: a lazy tensor has no memory to write to: clone() makes a tensor with memory")
        arguments, options = tree_map_only(cls, cls.read, (args, kwargs or {}))
        return func(*arguments, **options)

    def _part(self, dim: int, take: Callable[[range], range | int]) -> LazyTensor:
        """Returns the part that `take` leaves of the range of a dim."""
        at = [at for at, each in enumerate(self._ranges) if isinstance(each, range)][dim]
        whole = self._ranges[at]
        assert isinstance(whole, range)
        return LazyTensor(self._source, [*self._ranges[:at], take(whole), *self._ranges[at + 1 :]], self.device)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Returns the arguments that an operation writes to."""
    known = func._schema.arguments
    given = {argument.name: value for argument, value in zip(known, args, strict=False)} | kwargs
    return [given.get(each.name) for each in known if each.alias_info is not None and each.alias_info.is_write]


def _alias(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor._source, tensor._ranges, tensor.device)


def _slice(
    tensor: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyTensor:
    return tensor._part(dim, lambda whole: whole[start:end:step])


def _select(tensor: LazyTensor, dim: int, index: int) -> LazyTensor:
    return tensor._part(dim, lambda whole: whole[index])


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split(tensor: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    return [_slice(tensor, dim, begin, begin + size) for begin in range(0, max(tensor.shape[dim], 1), max(size, 1))]


def _split_with_sizes(tensor: LazyTensor, sizes: list[int], dim: int = 0) -> list[LazyTensor]:
    begins = [sum(sizes[:at]) for at in range(len(sizes))]
    return [_slice(tensor, dim, begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]


_PARTS: dict[Any, Callable[..., Any]] = {
    _ATEN.alias.default: _alias,
    _ATEN.detach.default: _alias,
    _ATEN.slice.Tensor: _slice,
    _ATEN.select.int: _select,
    _ATEN.unbind.int: _unbind,
    _ATEN.split.Tensor: _split,
    _ATEN.split_with_sizes.default: _split_with_sizes,
}
