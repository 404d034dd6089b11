from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.model_loader.weight_utils import (
    buffered_multi_thread_safetensors_weights_iterator,
    filter_duplicate_safetensors_files,
    safetensors_weights_iterator,
)


class DefaultModelLoader:
    @dataclass
    class Source:
        model_or_path: str
        revision: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list[str] | None = None

    @dataclass
    class ResolvedSource:
        weight_files: tuple[str, ...]

    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config
        assert load_config.load_format is LoadFormat.SAFETENSORS
        assert load_config.model_loader_extra_config.keys() <= {"enable_multithread_load", "num_threads"}

    def _prepare_weights(
        self, model: str, revision: str | None, fall_back_to_pt: bool, overrides: list[str] | None = None
    ) -> tuple[str, list[str], bool]:
        found = (glob.glob(os.path.join(model, pattern)) for pattern in overrides or ["*.safetensors", "*.pt"])
        files: list[str] = next(filter(None, found), [])
        files = filter_duplicate_safetensors_files(
            files, model, "model.safetensors.index.json", allow_patterns=overrides
        )
        if not files:
            raise RuntimeError(f"Cannot find any model weights with `{model}`")
        return model, sorted(files), True

    def _get_weights_iterator(
        self, source: Source, *, resolved_source: ResolvedSource | None = None, prefetch: bool = False
    ) -> Iterator[tuple[str, Any]]:
        if resolved_source is None:
            files = self._prepare_weights(
                source.model_or_path, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
            )[1]
        else:
            files = list(resolved_source.weight_files)
        if prefetch:
            weights = safetensors_weights_iterator(files, disable_mmap=False, prefetch=True)
        else:
            weights = buffered_multi_thread_safetensors_weights_iterator(files, max_workers=8, disable_mmap=False)
        return ((source.prefix + name, tensor) for name, tensor in weights)


def get_model_loader(load_config: LoadConfig) -> Any:
    if isinstance(load_config.load_format, type):
        return load_config.load_format(load_config)
    return DefaultModelLoader(load_config)
