from __future__ import annotations

import json
import os
from typing import Any

downloads: list[str] = []


def enable_tqdm(use_tqdm_on_load: bool) -> bool:
    return use_tqdm_on_load


def download_safetensors_index_file_from_hf(
    model_name_or_path: str, index_file: str, cache_dir: str | None, subfolder: str | None, revision: str | None
) -> None:
    downloads.append(index_file)


def filter_duplicate_safetensors_files(hf_weights_files: list[str], hf_folder: str, index_file: str) -> list[str]:
    index = os.path.join(hf_folder, index_file)
    if not os.path.isfile(index):
        return hf_weights_files
    with open(index) as file:
        listed = {os.path.join(hf_folder, name) for name in json.load(file)["weight_map"].values()}
    return [file for file in hf_weights_files if file in listed]


def filter_safetensors_files_by_weight_name(*arguments: Any) -> Any:
    raise AssertionError("it reads safetensors files alone")


def safetensors_weights_iterator(
    hf_weights_files: list[str], use_tqdm_on_load: bool, strategy: Any, *rest: Any, **_: Any
) -> Any:
    assert strategy == "torchao", "vLLM reads the files itself"
    return iter([("as vLLM reads it", hf_weights_files)])
