from __future__ import annotations

from collections.abc import Callable
from typing import Any

loaders: dict[str, Any] = {}


def register_model_loader(load_format: str) -> Callable[[Any], Any]:
    def register(loader: Any) -> Any:
        assert load_format not in loaders, "registered twice"
        loaders[load_format] = loader
        return loader

    return register


def get_model_loader(load_config: Any) -> Any:
    return loaders[load_config.load_format](load_config)
