"""The arguments of from_pretrained() of transformers, and which of them mean something for flashpack files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..._casts import asked_dtype
from ..._device import AUTOMATIC, CPU
from ..._native import FlashPackError
from .._arguments import Placement, placement_of, requested_dtype

# These say where and how transformers reads weights, so that they have no effect here.
_WITHOUT_MEANING = frozenset(
    {
        "_commit_hash",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
        "code_revision",
        "disable_mmap",
        "low_cpu_mem_usage",
        "mirror",
        "tqdm_class",
        "trust_remote_code",
        "use_safetensors",
        "weights_only",
    }
)
_REFUSED = frozenset(
    {
        "device_mesh",
        "distributed_config",
        "from_flax",
        "from_tf",
        "gguf_file",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "offload_state_dict",
        "state_dict",
        "tp_plan",
        "tp_size",
        "variant",
    }
)
# Only transformers' own loader can do what these ask for.
FOR_TRANSFORMERS = frozenset(
    {
        "allow_all_kernels",
        "fusion_config",
        "kernel_config",
        "key_mapping",
        "quantization_config",
        "use_kernels",
    }
)


def accepted(arguments: dict[str, Any]) -> dict[str, Any]:
    refused = [name for name in arguments if name in _REFUSED and arguments[name]]
    if (arguments.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        refused.append("an adapter in the same directory")
    if refused:
        raise FlashPackError(f"{', '.join(refused)} cannot be used with flashpack files")
    dropped = _WITHOUT_MEANING | _REFUSED | {"adapter_kwargs", "adapter_name"}
    return {name: value for name, value in arguments.items() if name not in dropped}


def read_config(
    model_class: type[PreTrainedModel], directory: Path, arguments: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Returns the configuration, and the arguments that it did not take."""
    config = arguments.pop("config", None)
    if isinstance(config, PretrainedConfig):
        return config, arguments
    if model_class.config_class is None:
        raise FlashPackError(f"{model_class.__name__} has no config_class: pass config=, or load with AutoModel")
    # These are settings of the load, even where a configuration has entries of the same names.
    settings = ("dtype", "torch_dtype", "device_map", "attn_implementation", "experts_implementation")
    kept = {name: arguments.pop(name) for name in (*settings, *FOR_TRANSFORMERS) if name in arguments}
    config, unused = model_class.config_class.from_pretrained(
        directory if config is None else config, return_unused_kwargs=True, **arguments
    )
    return config, unused | kept


def placement(device: str | torch.device | None, device_map: Any) -> Placement:
    """Returns where the model goes, by default to the CPU. `device` decides where the map leaves the choice open."""
    if device is None:
        mapped = placement_of(device_map)
        return mapped if mapped.device is not None else Placement(CPU)
    is_open = isinstance(device_map, str) and device_map in AUTOMATIC
    given = placement_of({"": device})
    if device_map is not None and not is_open and placement_of(device_map) != given:
        raise FlashPackError(f"device={str(device)!r} and device_map={device_map!r} contradict each other")
    return given


def dtype_of(arguments: dict[str, Any]) -> torch.dtype | None:
    dtype = requested_dtype(arguments)
    return None if dtype == "auto" else asked_dtype(dtype)
