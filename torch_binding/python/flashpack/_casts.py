"""The dtypes that tensors get when a caller asks for one, and casts that must not lose values."""

from __future__ import annotations

from typing import Final

import torch

from ._native import FlashPackError
from .utils import existing_dtypes

DTypeLike = torch.dtype | str
"""A dtype, or its name: "bfloat16", "torch.bfloat16" or "bf16"."""
PLAIN_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Models compute in these. Narrower ones hold quantised weights, whose scales are other tensors."""
_PACKED: Final = existing_dtypes("float4_e2m1fn_x2")
_SHORT_NAMES: Final = {
    "bf16": "bfloat16",
    **{f"{kind}{bits}": f"float{bits}" for kind in ("f", "fp") for bits in (16, 32, 64)},
}


def dtype_of(asked: object) -> torch.dtype:
    """Returns the dtype that a caller gives, or gives the name of. Raises FlashPackError if that is none."""
    found: object = asked
    if isinstance(asked, str):
        name = asked.lower().removeprefix("torch.")
        found = getattr(torch, _SHORT_NAMES.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise FlashPackError(f"dtype={asked!r} is neither a torch.dtype nor the name of one, such as 'bfloat16'")
    return found


def asked_dtype(dtype: DTypeLike | None) -> torch.dtype | None:
    """Returns the dtype that a caller asks for. Raises FlashPackError unless it is None or can be cast to."""
    if dtype is None:
        return None
    found = dtype_of(dtype)
    if not (found.is_floating_point or found.is_complex):
        raise FlashPackError(f"dtype={found} is neither floating point nor complex: numbers would be cut off")
    if found in _PACKED:
        raise FlashPackError(f"dtype={found}: torch cannot cast to it, because each byte has two numbers")
    return found


def dtype_when_asked(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Returns the dtype that a tensor of dtype `own` gets if the caller asks for `asked`.

    Floating-point tensors take a floating-point dtype, complex ones a complex dtype. All others keep their own:
    counters and indices would be rounded, and packed or quantised weights, those of 8-bit floats included, are not the
    numbers that they look like.
    """
    if asked is None:
        return own
    takes = (own in PLAIN_FLOATS and asked.is_floating_point) or (own.is_complex and asked.is_complex)
    return asked if takes else own


def cast_exactly(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns `tensor` as `dtype`. Raises FlashPackError, naming the tensor, if a value would change.

    Only casts between floating-point dtypes, or between complex ones, may round.
    """
    new = _cast(tensor, dtype)
    if tensor.dtype != dtype and not is_same_kind(tensor.dtype, dtype) and not _is_equal(tensor, new):
        raise FlashPackError(f"{name!r} would lose values if it were cast from {tensor.dtype} to {dtype}")
    return new


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # torch warns when it drops an imaginary part, whether that is zero or not.
    return (tensor.real if tensor.is_complex() and not dtype.is_complex else tensor).to(dtype)


def is_same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether a cast from one to the other may round, and does no more than that."""
    return (a.is_floating_point and b.is_floating_point) or (a.is_complex and b.is_complex)


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns 8-bit floats as float32 and complex32 as complex64, because torch does not compare them."""
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64)
    return tensor.float() if tensor.is_floating_point() and tensor.dtype not in PLAIN_FLOATS else tensor


def _is_in_range(numbers: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all are finite and less than the greatest value of `dtype` plus 1, which no cast rounds down."""
    end = 2.0 if dtype == torch.bool else float(torch.iinfo(dtype).max + 1)
    real = _comparable(numbers.real if numbers.is_complex() else numbers)
    return bool((real.isfinite() & (real < end)).all())


def _is_equal(tensor: torch.Tensor, new: torch.Tensor) -> bool:
    if not (_is_integral(tensor.dtype) and _is_integral(new.dtype)):
        # GPUs and Arm CPUs cast what is past the end of an integral dtype to its greatest value, and others cast
        # infinity to its least one. A cast back would give the old value, though it is another number.
        for numbers, dtype in ((tensor, new.dtype), (new, tensor.dtype)):
            if _is_integral(dtype) and not _is_in_range(numbers, dtype):
                return False
        return torch.equal(_comparable(_cast(new, tensor.dtype)), _comparable(tensor))
    # int64 is wider: in the dtype of `tensor`, a value that had wrapped around would wrap back.
    wide, wide_new = tensor.to(torch.int64), new.to(torch.int64)
    may_pass_int64 = torch.uint64 in (tensor.dtype, new.dtype) and bool((wide < 0).any())
    return torch.equal(wide, wide_new) and not may_pass_int64
