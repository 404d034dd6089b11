from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.config.model import ModelConfig as ModelConfig


@dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None
    safetensors_load_strategy: str | None = None
    model_loader_extra_config: Any = field(default_factory=dict)
    device: str | None = None
    use_tqdm_on_load: bool = False


class VllmConfig:
    pass
