"""SGLang's loader for `--load-format flashpack`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import torch.distributed as dist
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.model_loader import loader
from sglang.srt.model_loader.weight_utils import (
    download_safetensors_index_file_from_hf,
    filter_duplicate_safetensors_files,
)
from sglang.srt.platforms import current_platform

from ..._native import FlashPackError
from .._serving import (
    INDEX_NAME,
    PATTERNS,
    Options,
    Weights,
    are_flashpack,
    files_to_load,
    replaced,
    weights_of,
)


class FlashPackModelLoader(loader.DefaultModelLoader):
    """Loads safetensors files, as SGLang's default loader does, and flashpack files, both through the engine.

    The default loader chooses the files and feeds the model, so that only its iterators over the tensors of files are
    others. Ranks do not wait for each other.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._options, _ = Options.of(load_config.model_loader_extra_config or {}, ())
        # The parent refuses the load format, and the options.
        super().__init__(
            dataclasses.replace(load_config, load_format=LoadFormat.SAFETENSORS, model_loader_extra_config={})
        )

    def _prepare_weights(
        self,
        model_name_or_path: str,
        revision: str | None,
        fall_back_to_pt: bool,
        allow_patterns_overrides: list[str] | None = None,
    ) -> tuple[str, list[str], bool]:
        prepare = super()._prepare_weights

        def without_duplicates(
            files: list[str], folder: str, index: str, allow_patterns: list[str] | None = None
        ) -> list[str]:
            if are_flashpack(files):
                return files
            return filter_duplicate_safetensors_files(files, folder, index, allow_patterns_overrides)

        def safetensors() -> list[str]:
            with contextlib.suppress(RuntimeError):  # There are none.
                return prepare(model_name_or_path, revision, False, None)[1]
            return []

        with replaced(loader, {"filter_duplicate_safetensors_files": without_duplicates}):
            folder, files, use_safetensors = prepare(
                model_name_or_path, revision, fall_back_to_pt, allow_patterns_overrides or PATTERNS
            )
            if allow_patterns_overrides is None and are_flashpack(files):
                is_local = os.path.isdir(model_name_or_path)
                if len(files) > 1 and not is_local:
                    cache = self.load_config.download_dir
                    download_safetensors_index_file_from_hf(model_name_or_path, INDEX_NAME, cache, revision)
                files = files_to_load(folder, files, is_local, safetensors)
        return folder, files, use_safetensors

    def _get_weights_iterator(self, source: loader.DefaultModelLoader.Source, **already_done: Any) -> Weights:
        self._is_asked = False
        iterators = ("safetensors_weights_iterator", "buffered_multi_thread_safetensors_weights_iterator")
        with replaced(loader, dict.fromkeys(iterators, self._stream)):
            weights: Weights = super()._get_weights_iterator(source, **already_done)
        if not self._is_asked:
            raise FlashPackError("this version of SGLang loads safetensors files in a way that flashpack does not know")
        return weights

    def _stream(self, files: list[str], **for_safetensors: Any) -> Weights:
        """Takes the place of the iterators over safetensors files, in whose order SGLang has put the files."""
        self._is_asked = True
        show = not dist.is_initialized() or dist.get_rank() == 0
        return weights_of(files, current_platform.device_type, self._options, None, show)
