"""The models in one directory: components of a pipeline, and modules of sentence-transformers. Needs no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ._native import FlashPackError
from ._repository import read_any_json, read_json, wrong_type

INDEX_NAME = "model_index.json"
_MODULES_NAME = "modules.json"
# These arguments of from_pretrained() of diffusers' pipelines cannot be names of components, which are arguments, too.
OPTIONS = frozenset(
    {
        *("cache_dir", "custom_pipeline", "custom_revision", "dduf_file", "device", "device_map", "disable_mmap"),
        *("dtype", "force_download", "from_flax", "load_connected_pipeline", "local_dir", "local_files_only"),
        *("low_cpu_mem_usage", "max_memory", "mirror", "offload_folder", "offload_state_dict", "output_loading_info"),
        *("pretrained_model_name", "pretrained_model_name_or_path", "provider", "provider_options", "proxies"),
        *("quantization_config", "resume_download", "return_cached_folder", "revision", "sess_options", "token"),
        *("torch_dtype", "trust_remote_code", "use_auth_token", "use_flashpack", "use_onnx", "use_safetensors"),
        *("variant", "cls", "self"),
    }
)
_LIBRARY = re.compile(r"\w[\w.-]*")


def components_of(directory: Path) -> dict[str, tuple[str, str]]:
    """Returns library and class of each component of the pipeline in `directory`; nothing without model_index.json.

    Components that the index says are absent are left out.
    """
    index = directory / INDEX_NAME
    return _components_in(index, read_json(index)) if index.is_file() else {}


def _components_in(path: Path, index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Does the same for an index that was read from `path`, and ignores the settings of the pipeline in it."""
    found = {}
    for name, value in index.items():
        # Such a name is no argument of a constructor, and may be a path. diffusers ignores it, too.
        if name.startswith("_") or not name.isidentifier():
            continue
        if not (isinstance(value, list) and len(value) == 2 and any(isinstance(part, str) for part in value)):
            if value != [None, None] and (path.parent / name).is_dir():
                raise wrong_type(path, name, value, "a library and a class")
            continue
        library, class_name = value
        if name in OPTIONS:
            raise FlashPackError(f"{path} has a component {name!r}, which is an option of from_pretrained()")
        if library is None:
            continue
        if not (isinstance(library, str) and isinstance(class_name, str)):
            raise wrong_type(path, name, value, "a library and a class")
        if not _LIBRARY.fullmatch(library) or not class_name.isidentifier():
            raise FlashPackError(f"{path}: {name} is {value!r}, which cannot be a library and a class")
        found[name] = (library, class_name)
    return found


def model_folders(directory: Path) -> list[str]:
    """Returns the folders with weights: those of the components of a pipeline, or "" for a directory of one model."""
    if not (directory / INDEX_NAME).is_file():
        return [""]
    # Schedulers, tokenizers and processors have no config.json, but files of other names.
    return [name for name in components_of(directory) if (directory / name / "config.json").is_file()]


def modules_of(directory: Path) -> list[str]:
    """Returns the folders that modules.json of sentence-transformers names, but for `directory` itself.

    Raises FlashPackError if one of them cannot be a folder in `directory`.
    """
    path = directory / _MODULES_NAME
    modules = read_any_json(path) if path.is_file() else None
    named = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [folder for name in named if name is not None and (folder := _folder_in(path, name)) != "."]


def _folder_in(path: Path, name: object) -> str:
    """Returns a folder that the file `path` names, "." for its own. Raises FlashPackError if it is not inside that."""
    folder = os.path.normpath(name) if isinstance(name, str) else ""
    parts = folder.split(os.sep)
    if "\0" in folder or not folder or os.path.isabs(folder) or os.pardir in parts:
        raise FlashPackError(f"{path} names {name!r}, which is no folder beside it")
    return folder
