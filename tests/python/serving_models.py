"""What the tests of the loaders for vLLM and SGLang share: stand-ins for the two, and directories of models."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flashpack
import safetensors.torch
import torch
from support import random_tensor

FORMATS = ["safetensors", "flashpack"]
STATE = {
    "model.embed_tokens.weight": random_tensor((40, 8), torch.bfloat16, 1),
    "model.layers.0.mlp.experts.0.up_proj.weight": random_tensor((8, 4), torch.bfloat16, 2),
    "model.layers.0.mlp.experts.1.up_proj.weight": random_tensor((8, 4), torch.bfloat16, 3),
    "model.layers.0.mlp.experts.1.up_proj.scale": random_tensor((), torch.float32, 4),
    "lm_head.weight": random_tensor((40, 8), torch.bfloat16, 5),
}
_STAND_INS = Path(__file__).parent / "stand_ins"


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Makes vllm and sglang importable within it, and what flashpack has for them anew."""
    kept = dict(sys.modules)
    sys.path.insert(0, str(_STAND_INS))
    _forget()
    try:
        yield
    finally:
        sys.path.remove(str(_STAND_INS))
        _forget()
        sys.modules.update({name: module for name, module in kept.items() if _is_of_hosts(name)})


def _forget() -> None:
    for name in list(sys.modules):
        if _is_of_hosts(name):
            del sys.modules[name]


def _is_of_hosts(name: str) -> bool:
    lead = "flashpack.integrations."
    return name.removeprefix(lead).partition(".")[0] in ("vllm", "sglang")


def save_whole(directory: Path, suffix: str, state: dict[str, torch.Tensor] = STATE) -> Path:
    """Saves `state` in one file."""
    directory.mkdir(exist_ok=True)
    path = directory / f"model.{suffix}"
    if suffix == "flashpack":
        flashpack.pack_to_file(state, path)
    else:
        safetensors.torch.save_file(state, path)
    return directory


def save_sharded(directory: Path, suffix: str) -> Path:
    """Saves STATE in two files with an index, beside a file that the index does not list."""
    directory.mkdir(exist_ok=True)
    items = list(STATE.items())
    weight_map = {}
    for number, part in enumerate((items[:2], items[2:]), start=1):
        name = f"model-0000{number}-of-00002.{suffix}"
        save_whole(directory, suffix, dict(part))
        (directory / f"model.{suffix}").rename(directory / name)
        weight_map |= dict.fromkeys(dict(part), name)
    (directory / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return save_whole(directory, suffix, {"of another program": torch.zeros(3)})


def vllm_loader(**options: Any) -> Any:
    """Returns what vLLM makes of `--load-format flashpack`."""
    from flashpack.integrations.vllm import register
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    register()
    return get_model_loader(LoadConfig(load_format="flashpack", **options))


def sglang_loader(**options: Any) -> Any:
    """Returns what SGLang makes of the load format, which may be written in any case."""
    from flashpack.integrations.sglang import register
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import get_model_loader

    register()
    return get_model_loader(LoadConfig(load_format="FlashPack", **options))


def weights_of(directory: Path, loader: Any, **source: Any) -> dict[str, torch.Tensor]:
    return dict(loader._get_weights_iterator(loader.Source(str(directory), **source)))
