"""What tensors become when a dtype is asked for, and casts that must not lose anything."""

from __future__ import annotations

from typing import Final

import torch

from ._native import FlashPackError

PLAIN_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Those in which models compute. Narrower ones hold quantised weights, whose scales are other tensors."""


def check_asked(dtype: torch.dtype | None) -> None:
    """Raises FlashPackError for what no tensor can be cast to without losing what it is."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise FlashPackError(f"dtype={dtype!r} is not a torch.dtype")
    if not (dtype.is_floating_point or dtype.is_complex):
        raise FlashPackError(f"dtype={dtype} is neither floating point nor complex: numbers would be cut off")


def dtype_when_asked(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """What a tensor of dtype `own` becomes when `asked` is asked for all.

    Floating-point tensors take a floating-point dtype, complex ones a complex dtype. Everything else keeps its own:
    counters and indices would be rounded, and packed or quantised weights, those of 8-bit floats included, are not the
    numbers that they look like.
    """
    if asked is None:
        return own
    takes = (own in PLAIN_FLOATS and asked.is_floating_point) or (own.is_complex and asked.is_complex)
    return asked if takes else own


def cast_exactly(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` as `dtype`. Where either is of integers, or only one is complex, no value may change.

    Raises FlashPackError naming the tensor.
    """
    # torch warns when it drops an imaginary part, whether that is zero or not.
    new = (tensor.real if tensor.is_complex() and not dtype.is_complex else tensor).to(dtype)
    if tensor.dtype != dtype and not _is_same_kind(tensor.dtype, dtype) and not _is_equal(tensor, new):
        raise FlashPackError(f"{name!r} would lose values if it were cast from {tensor.dtype} to {dtype}")
    return new


def _is_same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    return (a.is_floating_point and b.is_floating_point) or (a.is_complex and b.is_complex)


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """torch does not compare 8-bit floats."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype not in PLAIN_FLOATS else tensor


def _is_equal(tensor: torch.Tensor, new: torch.Tensor) -> bool:
    if not (_is_integral(tensor.dtype) and _is_integral(new.dtype)):
        return torch.equal(_comparable(new.to(tensor.dtype)), _comparable(tensor))
    # Through something wider: what wraps around would wrap back.
    wide, wide_new = tensor.to(torch.int64), new.to(torch.int64)
    may_pass_int64 = torch.uint64 in (tensor.dtype, new.dtype) and bool((wide < 0).any())
    return torch.equal(wide, wide_new) and not may_pass_int64
