"""What torch knows about devices that the engine has to be told."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._engine import engine
from ._logging import logger
from ._native import Engine

CPU = torch.device("cpu")
DeviceLike = str | int | torch.device
"""What torch.device takes; a number is a CUDA device."""


class Side(NamedTuple):
    """Where bytes of a transfer are, beside the file: a device with its engine, and the stream that orders them."""

    device: torch.device
    engine: Engine
    stream: int


def side_of(device: torch.device) -> Side:
    """The side of the current stream of a CUDA device; of the CPU for others, and where the engine cannot use CUDA."""
    if device.type != "cuda":
        return Side(CPU, engine(), 0)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        device_engine = engine(index)
    except (OSError, RuntimeError) as error:
        logger.warning("%s; going through the CPU", error)
        return Side(CPU, engine(), 0)
    device = torch.device("cuda", index)
    return Side(device, device_engine, torch.cuda.current_stream(device).cuda_stream)
