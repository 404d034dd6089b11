"""What several tests need: every dtype of the format, tensors of random bits, comparison by bits."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flashpack.constants import MAGIC, U64LE

GOLDEN_DIR = Path(__file__).parent.parent / "golden"
GOLDEN_FILES = sorted(GOLDEN_DIR.glob("*.flashpack"))

INTEGERS = [f"{sign}int{width}" for width in (8, 16, 32, 64) for sign in ("", "u")]
FLOATS = ["float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"]
FLOATS_OF_A_BYTE = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
DTYPE_NAMES = ["bool", *INTEGERS, *FLOATS, *FLOATS_OF_A_BYTE]
DTYPES = [getattr(torch, name) for name in DTYPE_NAMES if hasattr(torch, name)]


def require_gpu() -> None:
    """Skips the calling test or file without a GPU, or fails it where FLASHPACK_REQUIRE_GPU=1 says there is one."""
    if torch.cuda.is_available():
        return
    if os.environ.get("FLASHPACK_REQUIRE_GPU") == "1":
        pytest.fail("FLASHPACK_REQUIRE_GPU=1, but torch sees no CUDA device")
    pytest.skip("no CUDA device", allow_module_level=True)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random bits, NaNs and all."""
    size_bytes = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (size_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_bit_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert bits(actual[name]) == bits(tensor), name


def state_of(module: torch.nn.Module) -> dict[str, Any]:
    """Everything that a failed load must leave alone: objects, memory, bytes, flags."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    state: dict[str, Any] = {
        name: (
            id(tensor),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            None if tensor.is_meta else (tensor.data_ptr(), bits(tensor)),
        )
        for name, tensor in named
    }
    state["attributes"] = set(vars(module))
    return state


def write_file(path: Path, footer: dict[str, Any] | bytes, payload: bytes = bytes(64)) -> Path:
    """A file with exactly this footer, however wrong."""
    raw = footer if isinstance(footer, bytes) else json.dumps(footer, separators=(",", ":")).encode()
    path.write_bytes(payload + raw + U64LE.pack(len(raw)) + MAGIC)
    return path


_CRC32C_OF_A_BYTE = list(range(256))
for _ in range(8):
    _CRC32C_OF_A_BYTE = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in _CRC32C_OF_A_BYTE]


def crc32c(data: bytes) -> int:
    """Computed here, so that it does not depend on the code that it tests."""
    table, crc = _CRC32C_OF_A_BYTE, 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[crc & 0xFF ^ byte]
    return crc ^ 0xFFFFFFFF


def footer_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    (length,) = U64LE.unpack(raw[-16:-8])
    return raw[-16 - length : -16]


def run_python(code: str, *arguments: object) -> str:
    """What a new interpreter prints that runs `code`; CalledProcessError if it does not end well."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def in_a_fork(call: Callable[[], object]) -> bool | int:
    """Whether `call` returns True in a forked child; else the status of the child, which dies after a minute."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            status = 0 if call() is True else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return status == 0 or status


# An interpreter that has the PyPI package flashpack 0.4.5.
REFERENCE = os.environ.get("FLASHPACK_REFERENCE_PYTHON")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="FLASHPACK_REFERENCE_PYTHON is not set")


def run_reference(code: str, *arguments: object) -> str:
    """What that interpreter prints, away from this package."""
    assert REFERENCE is not None
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [REFERENCE, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read and write everything; nobody may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def held_in_page_cache(path: Path) -> Iterator[None]:
    """Keeps the file's pages in the cache, also when the machine wants its memory back; where so much may not be locked
    (ulimit -l), they are read into it and may leave."""
    libc = ctypes.CDLL(None)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        size = ctypes.c_size_t(len(mapping))
        if libc.mlock(ctypes.c_void_p(ctypes.addressof(start)), size) != 0:
            path.read_bytes()
        del start
        yield
