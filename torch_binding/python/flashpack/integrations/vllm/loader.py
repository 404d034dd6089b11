"""vLLM's loader for `--load-format flashpack`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import vllm.config.model
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader import default_loader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import (
    download_safetensors_index_file_from_hf,
    enable_tqdm,
    filter_duplicate_safetensors_files,
    safetensors_weights_iterator,
)
from vllm.platforms import current_platform
from vllm.transformers_utils.config import checkpoint_has_lm_head

from ..._native import FlashPackError
from .._serving import (
    INDEX_NAME,
    PATTERNS,
    Options,
    Weights,
    are_flashpack,
    files_to_load,
    names_in,
    replaced,
    weights_of,
)


class FlashPackModelLoader(default_loader.DefaultModelLoader):
    """Loads safetensors files, as vLLM's default loader does, and flashpack files, both through the engine.

    The default loader chooses the files, applies its filters and feeds the model, so that only its iterator over the
    tensors of files is another one. Ranks do not wait for each other.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._options, of_host = Options.of(load_config.model_loader_extra_config, {"enable_weights_track"})
        # The parent refuses the load format, and the options.
        super().__init__(dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config=of_host))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        # vLLM has looked for an lm_head in safetensors files alone. If it is told of none, it drops the one that it is
        # given, where the configuration says that it is tied.
        with replaced(vllm.config.model, {"checkpoint_has_lm_head": self._has_lm_head}):
            model_config.maybe_untie_word_embeddings()
        return super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def _has_lm_head(self, model: str, *, revision: str | None = None) -> bool | None:
        found: bool | None = checkpoint_has_lm_head(model, revision=revision)
        if found is not None:
            return found
        with contextlib.suppress(RuntimeError):  # There are no files if the model has them in folders of its own.
            files = self._prepare_weights(model, None, revision, False, None)[1]
            return any(name.endswith("lm_head.weight") for file in files for name in names_in(file))
        return None

    def _prepare_weights(
        self,
        model_name_or_path: str,
        subfolder: str | None,
        revision: str | None,
        fall_back_to_pt: bool,
        allow_patterns_overrides: list[str] | None,
    ) -> tuple[str, list[str], bool, str]:
        prepare = super()._prepare_weights
        folder, files, use_safetensors, index = prepare(
            model_name_or_path, subfolder, revision, fall_back_to_pt, allow_patterns_overrides or PATTERNS
        )

        def safetensors() -> list[str]:
            with contextlib.suppress(RuntimeError):  # There are none.
                return prepare(model_name_or_path, subfolder, revision, False, None)[1]
            return []

        if allow_patterns_overrides is None and are_flashpack(files):
            is_local = os.path.isdir(model_name_or_path)
            if len(files) > 1 and not is_local:
                cache = self.load_config.download_dir
                download_safetensors_index_file_from_hf(model_name_or_path, INDEX_NAME, cache, subfolder, revision)
            files = files_to_load(folder, files, is_local, safetensors)
            index = INDEX_NAME if are_flashpack(files) else index
        elif allow_patterns_overrides is None:  # The parent applies the index only if it is given no patterns.
            files = filter_duplicate_safetensors_files(files, folder, index)
        return folder, files, use_safetensors, index

    def _get_weights_iterator(self, source: default_loader.DefaultModelLoader.Source) -> Weights:
        self._is_asked = False
        functions: dict[str, Callable[..., Any]] = {
            "safetensors_weights_iterator": self._stream,
            "filter_safetensors_files_by_weight_name": _used_files,
        }
        with replaced(default_loader, functions):
            weights: Weights = super()._get_weights_iterator(source)
        if not self._is_asked:
            raise FlashPackError("this version of vLLM loads safetensors files in a way that flashpack does not know")
        return weights

    def _stream(
        self,
        files: list[str],
        use_tqdm_on_load: bool,
        strategy: str | None = None,
        local_expert_ids: set[int] | None = None,
        **for_safetensors: Any,
    ) -> Weights:
        """Takes the place of safetensors_weights_iterator."""
        self._is_asked = True
        if strategy == "torchao":
            if are_flashpack(files):
                raise FlashPackError(
                    f"{files[0]}: tensors of torchao are put together from what safetensors files say of them, which "
                    f"flashpack files do not say; load the safetensors files that it was converted from"
                )
            return safetensors_weights_iterator(files, use_tqdm_on_load, strategy, local_expert_ids, **for_safetensors)

        def keep(name: str) -> bool:
            return not should_skip_weight(name, local_expert_ids)

        device = self.load_config.device or current_platform.device_type
        filtered = None if local_expert_ids is None else keep
        files = sorted(files, key=_natural_order)
        return weights_of(files, device, self._options, filtered, enable_tqdm(use_tqdm_on_load))


def _natural_order(file: str) -> list[str | int]:
    """Sorts shard-10 after shard-9, as vLLM does. If files have tensors of the same name, the last one stays."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file)]


def _used_files(files: list[str], is_unused_weight: Callable[[str], bool]) -> list[str]:
    """Does what vLLM's filter_safetensors_files_by_weight_name does, for flashpack files, too."""
    return [file for file in files if not all(map(is_unused_weight, names_in(file)))] or files
