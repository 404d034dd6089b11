from __future__ import annotations

import json
import os
from typing import Any

downloads: list[str] = []


def download_safetensors_index_file_from_hf(
    model_name_or_path: str, index_file: str, cache_dir: str | None, revision: str | None
) -> None:
    downloads.append(index_file)


def filter_duplicate_safetensors_files(
    hf_weights_files: list[str], hf_folder: str, index_file: str, allow_patterns: list[str] | None = None
) -> list[str]:
    index = os.path.join(hf_folder, index_file)
    if not os.path.isfile(index):
        return hf_weights_files
    with open(index) as file:
        listed = {os.path.join(hf_folder, name) for name in json.load(file)["weight_map"].values()}
    return [file for file in hf_weights_files if file in listed]


def safetensors_weights_iterator(*arguments: Any, **_: Any) -> Any:
    raise AssertionError("SGLang reads the files itself")


buffered_multi_thread_safetensors_weights_iterator = safetensors_weights_iterator
