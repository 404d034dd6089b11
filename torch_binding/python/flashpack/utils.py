"""Helpers for names, dtypes, numbers that people read, and process groups."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from ._logging import logger as logger
from ._native import FlashPackError


def existing_dtypes(*names: str) -> tuple[torch.dtype, ...]:
    """Returns those dtypes that this torch has."""
    return tuple(dtype for dtype in (getattr(torch, name, None) for name in names) if isinstance(dtype, torch.dtype))


_FP8_DTYPES: Final = existing_dtypes(
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"
)
_CARRIERS: Final[dict[torch.dtype, torch.dtype]] = {
    torch.bfloat16: torch.uint16,
    torch.complex32: torch.uint32,
    **dict.fromkeys(_FP8_DTYPES, torch.uint8),
}
_NUMPY: Final[dict[torch.dtype, type[np.generic]]] = {
    torch.bool: np.bool_,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.int16: np.int16,
    torch.uint16: np.uint16,
    torch.int32: np.int32,
    torch.uint32: np.uint32,
    torch.int64: np.int64,
    torch.uint64: np.uint64,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}


@cache
def string_to_dtype(string: str) -> torch.dtype:
    """Returns the dtype called `string`, without "torch."; raises FlashPackError if this torch has none."""
    dtype = getattr(torch, string, None)
    if not isinstance(dtype, torch.dtype):
        raise FlashPackError(f"Unsupported dtype string in metadata: {string}")
    return dtype


def dtype_to_string(dtype: torch.dtype) -> str:
    """Returns torch's name of `dtype`, without "torch."."""
    if not isinstance(dtype, torch.dtype):
        raise FlashPackError(f"Unsupported dtype in metadata: {dtype}")
    return str(dtype).removeprefix("torch.")


def get_packing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype whose numpy array carries the bits of `dtype`: itself, or an unsigned integer of its size."""
    carrier = _CARRIERS.get(dtype, dtype)
    if carrier not in _NUMPY and dtype in existing_dtypes("float4_e2m1fn_x2", "float4_e2m1fn"):
        raise FlashPackError(f"Unsupported dtype for packing: {dtype}")
    return carrier


def torch_dtype_to_numpy_dtype(dtype: torch.dtype) -> type[np.generic]:
    """Returns the numpy type of get_packing_dtype(dtype); raises FlashPackError if numpy has none."""
    carrier = _CARRIERS.get(dtype, dtype)
    if carrier not in _NUMPY:
        raise FlashPackError(f"Unsupported dtype for packing: {dtype}")
    return _NUMPY[carrier]


def effective_read_threads(requested: int, *, floor: int = 1) -> int:
    """Returns `requested`, but at most the larger of `floor` and the processors of this process, and at least one.

    This is kept for compatibility: the engine decides itself how many threads it has.
    """
    return max(1, min(requested, max(len(os.sched_getaffinity(0)), floor)))


def diffusers_is_available() -> bool:
    """Whether diffusers is installed; it is not imported."""
    return find_spec("diffusers") is not None


def transformers_is_available() -> bool:
    """Whether transformers is installed; it is not imported."""
    return find_spec("transformers") is not None


def human_duration(seconds: float) -> str:
    """Returns `seconds` in a fitting unit: "500.00ms", "1m5s"."""
    for unit, below, scale in (("ns", 1e-6, 1e9), ("µs", 1e-3, 1e6), ("ms", 1.0, 1e3), ("s", 60.0, 1.0)):
        if seconds < below:
            return f"{seconds * scale:.2f}{unit}"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def human_num_elements(elements: int) -> str:
    """Returns `elements` in thousands, millions or billions: "5.00K"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if elements > scale:
            return f"{elements / scale:.2f}{unit}"
    return str(elements)


@contextmanager
def timer(name: str, silent: bool = False) -> Iterator[None]:
    """Prints how long the block took, unless `silent` or it raised."""
    start = time.perf_counter()
    yield
    if not silent:
        print(f"{name}: {human_duration(time.perf_counter() - start)}")


def listed(names: Iterable[str] | None) -> Collection[str] | None:
    """Returns `names` as a collection, because an iterator could be read only once. One string is one name."""
    if isinstance(names, str):
        return (names,)
    return names if names is None or isinstance(names, Collection) else tuple(names)


def is_ignored_tensor_name(
    name: str,
    ignore_names: Iterable[str] | None = None,
    ignore_prefixes: Iterable[str] | None = None,
    ignore_suffixes: Iterable[str] | None = None,
) -> bool:
    """Whether `name` is one of the names, or begins with one of the prefixes, or ends with one of the suffixes."""
    names, prefixes, suffixes = listed(ignore_names), listed(ignore_prefixes), listed(ignore_suffixes)
    return (
        (names is not None and name in names)
        or (prefixes is not None and name.startswith(tuple(prefixes)))
        or (suffixes is not None and name.endswith(tuple(suffixes)))
    )


def filter_state_dict(
    state_dict: Mapping[str, Any],
    ignore_names: Iterable[str] | None = None,
    ignore_prefixes: Iterable[str] | None = None,
    ignore_suffixes: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Returns the entries of `state_dict` whose names are not ignored."""
    filters = (listed(ignore_names), listed(ignore_prefixes), listed(ignore_suffixes))
    return {name: value for name, value in state_dict.items() if not is_ignored_tensor_name(name, *filters)}


def get_module_and_attribute(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Returns the submodule that owns `name`, and the attribute's name there; AttributeError if there is none."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def is_distributed() -> bool:
    """Whether this process has a process group."""
    return dist.is_available() and dist.is_initialized()


def maybe_init_distributed(
    rank: int | None = None, local_rank: int | None = None, world_size: int | None = None
) -> None:
    """Makes the process group, unless there is one or `world_size` is below 2: NCCL's on CUDA machines, else Gloo's.

    Missing arguments are taken from RANK, LOCAL_RANK and WORLD_SIZE, as torchrun sets them; the ranks meet where
    MASTER_ADDR and MASTER_PORT say. The CUDA device `local_rank` becomes the current one.
    """
    rank = _env_number("RANK", 0) if rank is None else rank
    local_rank = _env_number("LOCAL_RANK", rank) if local_rank is None else local_rank
    world_size = _env_number("WORLD_SIZE", 1) if world_size is None else world_size
    if world_size <= 1 or is_distributed():
        return
    if not dist.is_available():
        raise RuntimeError("this torch has no torch.distributed, and so no process group")
    if not 0 <= rank < world_size:
        raise FlashPackError(f"rank must be below the world size of {world_size}, got {rank}")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world_size)
        return
    device = torch.device("cuda", local_rank)
    # NCCL sets up on the current device, so that this comes first.
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method="env://", rank=rank, world_size=world_size, device_id=device)


def _env_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise FlashPackError(f"{variable} in the environment is not a number: '{text}'") from None
