from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader.weight_utils import (
    filter_duplicate_safetensors_files,
    filter_safetensors_files_by_weight_name,
    safetensors_weights_iterator,
)


class DefaultModelLoader:
    @dataclass
    class Source:
        model_or_path: str
        revision: str | None = None
        subfolder: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list[str] | None = None
        is_unused_weight: Callable[[str], bool] | None = None

    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config
        self.local_expert_ids: set[int] | None = None
        assert load_config.model_loader_extra_config.keys() <= {"enable_weights_track"}

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> Any:
        return dict(self._get_weights_iterator(self.Source(model_config.model)))

    def _prepare_weights(
        self,
        model: str,
        subfolder: str | None,
        revision: str | None,
        fall_back_to_pt: bool,
        overrides: list[str] | None,
    ) -> tuple[str, list[str], bool, str]:
        assert self.load_config.load_format == "safetensors"
        folder = os.path.join(model, subfolder or "")
        index = "model.safetensors.index.json"
        found = (glob.glob(os.path.join(folder, pattern)) for pattern in overrides or ["*.safetensors"])
        files: list[str] = next(filter(None, found), [])
        if overrides is None:
            files = filter_duplicate_safetensors_files(files, folder, index)
        if not files:
            raise RuntimeError(f"Cannot find any model weights with `{model}`")
        return folder, files, True, index

    def _get_weights_iterator(self, source: Source) -> Iterator[tuple[str, Any]]:
        _, files, _, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if source.is_unused_weight is not None:
            files = filter_safetensors_files_by_weight_name(files, source.is_unused_weight)
        weights = safetensors_weights_iterator(
            files,
            self.load_config.use_tqdm_on_load,
            self.load_config.safetensors_load_strategy,
            local_expert_ids=self.local_expert_ids,
            safetensors_prefetch_num_threads=8,
            safetensors_prefetch_block_size=1 << 24,
        )
        return ((source.prefix + name, tensor) for name, tensor in weights)
