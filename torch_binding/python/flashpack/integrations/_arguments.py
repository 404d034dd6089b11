"""Helpers of both integrations, for the arguments of callers and for what files say before a model is built."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._casts import PLAIN_FLOATS
from .._checkpoint import Checkpoint
from .._device import CPU, DeviceLike, devices_by_module, torch_device
from .._native import FlashPackError
from ..constants import WEIGHTS_NAME
from ..utils import logger, string_to_dtype


def without_unknown(function: str, arguments: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns those of `arguments` that are in `known`. Others are only logged, because 0.4.5 took them, too."""
    dropped = sorted(name for name in arguments if name not in known)
    if dropped:
        logger.warning("%s does not take %s", function, ", ".join(dropped))
    return {name: value for name, value in arguments.items() if name in known}


def requested_dtype(arguments: dict[str, Any]) -> Any:
    """Takes `dtype` and its older name `torch_dtype` out of `arguments`, and returns what they ask for."""
    older = arguments.pop("torch_dtype", None)
    dtype = arguments.pop("dtype", None)
    return older if dtype is None else dtype


class Placement(NamedTuple):
    """The result of a device map for a model."""

    device: torch.device | None
    """The device that tensors are read to; None if the map says nothing of it."""
    split: dict[str, Any] | None = None
    """The devices of modules, if there are several. The tensors get there from the CPU."""

    def dispatch(self, model: Any) -> Any:
        """Moves the modules of a loaded model to the devices of `split`, and has accelerate move what they exchange."""
        if self.split is None:
            return model
        from accelerate import dispatch_model

        skipped = getattr(model, "_skip_keys_device_placement", None)
        return dispatch_model(model, device_map=self.split, skip_keys=skipped)


def placement_of(device_map: Any) -> Placement:
    """Returns where a device map puts a model. Raises FlashPackError if that is not on devices of one kind."""
    asked = devices_by_module(device_map)
    is_offloaded = "disk" in asked.values()  # That is what accelerate calls files in a folder.
    devices = set() if is_offloaded else {_numbered(device, device_map) for device in asked.values()}
    if len(devices) < 2 and not is_offloaded:
        return Placement(next(iter(devices), None))
    if {device.type for device in devices} != {"cuda"}:
        raise FlashPackError(
            f"device_map={device_map!r}: devices must be of one kind. To offload a part of the model, load it to the "
            f"CPU, and call accelerate.dispatch_model"
        )
    return Placement(CPU, asked)


def _numbered(device: DeviceLike, device_map: Any) -> torch.device:
    """Returns torch's device, with its number if it is a GPU, so that one device has one name."""
    found = torch_device(device, f"device_map={device_map!r}: {device!r} is not a device")
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def flashpack_file(directory: Path) -> Path:
    """Returns the file with the weights of a model; raises FileNotFoundError if there is none."""
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"Flashpack file {path} not found", str(path))
    return path


def main_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Returns that dtype of PLAIN_FLOATS that most bytes of the file have; None if no tensor has one of them."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in checkpoint.entries():
        sizes[string_to_dtype(entry.dtype)] += entry.size_bytes
    return max((dtype for dtype in sizes if dtype in PLAIN_FLOATS), key=lambda dtype: sizes[dtype], default=None)
