"""Facts about devices that torch knows and the engine needs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from ._checkpoint import File
from ._engine import engine
from ._logging import logger
from ._native import Engine, FlashPackError

CPU = torch.device("cpu")
DeviceLike = str | int | torch.device
"""Anything that torch.device takes; a number is a CUDA device."""
DeviceMap = Mapping[str, DeviceLike] | DeviceLike
"""Devices by module, one device for all, or a word of AUTOMATIC."""
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""The words of accelerate for device maps that leave the choice of devices open."""


def torch_device(device: DeviceLike, refusal: str) -> torch.device:
    """Returns torch's device. Raises FlashPackError with the text `refusal` for what is none."""
    try:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise FlashPackError(refusal) from error


def devices_by_module(device_map: DeviceMap | None) -> dict[str, DeviceLike]:
    """Returns a device map by module, where "" stands for all. An open choice is the GPU, if there is one.

    Raises FlashPackError for a key that is no text: no module has it, and its device would be passed over.
    """
    if isinstance(device_map, Mapping):
        for name in device_map:
            if not isinstance(name, str):
                raise FlashPackError(f"device_map has the key {name!r}, a {type(name).__name__}, not a module's name")
        return dict(device_map)
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        return {"": "cuda" if torch.cuda.is_available() else "cpu"}
    return {} if device_map is None else {"": device_map}


class Side(NamedTuple):
    """The end of a transfer that is not the file: a device with its engine, and the stream that orders the transfer."""

    device: torch.device
    engine: Engine
    stream: int


def side_of(device: torch.device, file: File | None = None) -> Side:
    """Returns the side of a CUDA device and its current stream; the CPU's for others, or if the engine cannot use CUDA.

    `file`: what is loaded, whose disk may have a profile.

    Raises FlashPackError for a device that is not there, RuntimeError while its current stream is being captured.
    """
    if device.type != "cuda":
        return Side(CPU, engine(None, file), 0)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise FlashPackError(f"Unsupported device: cuda:{index}; there are {torch.cuda.device_count()} CUDA devices")
    with torch.cuda.device(index):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the current stream of cuda:{index} is being captured into a CUDA graph, and files are no part of "
                f"one: load and save before the capture, or in another thread"
            )
    try:
        device_engine = engine(index, file)
    except (OSError, RuntimeError) as error:
        logger.warning("%s; going through the CPU", error)
        return Side(CPU, engine(None, file), 0)
    device = torch.device("cuda", index)
    return Side(device, device_engine, torch.cuda.current_stream(device).cuda_stream)


Result = TypeVar("Result")


def as_on_this_thread(function: Callable[[], Result]) -> Callable[[], Result]:
    """Returns `function` for another thread, where it has the current CUDA device and stream of this one.

    Otherwise "cuda" would be another device there, and kernels on this thread's stream would not be waited for.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return function
    stream = torch.cuda.current_stream()

    def call() -> Result:
        with torch.cuda.stream(stream):
            return function()

    return call


# CU_STREAM_CAPTURE_MODE_RELAXED
_RELAXED = 2


@contextmanager
def captures_undisturbed() -> Iterator[None]:
    """Within it, calls of CUDA by this thread, such as for memory, do not end the capture of a graph by another thread.

    By default, CUDA ends the capture when any thread asks for memory.
    """
    mode = ctypes.c_int(_RELAXED)
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    exchange = _exchange_capture_mode() if in_use else None
    if exchange is None or exchange(ctypes.byref(mode)) != 0:
        yield
        return
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _exchange_capture_mode() -> Callable[[Any], int] | None:
    """Returns the driver's function that swaps the capture mode of this thread with the given one, if it has one."""
    try:
        function: Callable[[Any], int] = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    return function
