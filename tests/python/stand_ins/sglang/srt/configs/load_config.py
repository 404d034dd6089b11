from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from typing import Any


class LoadFormat(str, enum.Enum):
    AUTO = "auto"
    SAFETENSORS = "safetensors"


@dataclass
class LoadConfig:
    load_format: Any = LoadFormat.AUTO
    download_dir: str | None = None
    model_loader_extra_config: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.model_loader_extra_config, str):
            self.model_loader_extra_config = json.loads(self.model_loader_extra_config)
        self._verify_load_format()

    def _verify_load_format(self) -> None:
        if isinstance(self.load_format, str):
            self.load_format = LoadFormat(self.load_format.lower())
