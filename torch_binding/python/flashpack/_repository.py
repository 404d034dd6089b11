"""Reading the configuration in a model's directory, which may come from anybody and is not trusted. Needs no torch.

Only regular files are read, fields must have the right type, and files may name only files of the directory.
docs/downloaded_repositories.md has the rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from . import _native
from ._checkpoint import StrPath, path_of
from ._logging import in_one_line
from ._native import FlashPackError

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
_IMPLEMENTATION = re.compile(r"_implementation(_internal)?$")
_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def open_regular(path: StrPath) -> BinaryIO:
    """Opens a file for reading. Raises FlashPackError if it is no regular file, OSError for the system's failures."""
    descriptor = _native.open_to_read(path_of(path))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FlashPackError(f"{os.fspath(path)} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file. Raises FlashPackError if it has none, OSError for the system's failures."""
    value = _read_any_json(path)
    if not isinstance(value, dict):
        raise FlashPackError(f"{path} is not a JSON object")
    return value


def string_in(path: Path, config: dict[str, Any], key: str) -> str | None:
    """Returns `config[key]`, None if there is none. Raises FlashPackError, naming `path`, if it is no string."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong_type(path, key, value, "a string")
    return value


def strings_in(path: Path, config: dict[str, Any], key: str) -> list[str]:
    """Returns the list of strings `config[key]`, empty if there is none. Raises FlashPackError for any other type."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise _wrong_type(path, key, value, "a list of strings")
    return value


def auto_map_in(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Returns, by Auto class, the classes in code that comes with a model; of two tokenizers, the first (slow) one."""
    value = config.get("auto_map")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong_type(path, "auto_map", value, "an object")
    first = {key: target[0] if isinstance(target, list) and target else target for key, target in value.items()}
    for key, target in first.items():
        if target is not None and not isinstance(target, str):
            raise _wrong_type(path, f"auto_map[{key!r}]", target, "a string")
    return {key: target for key, target in first.items() if target is not None}


def check_model_config(directory: Path) -> dict[str, Any]:
    """Returns the configuration of a transformers or diffusers model, which is then safe to give to these libraries.

    It is empty if there is none. Raises FlashPackError if a field that steers the load has a wrong type, names a file
    elsewhere, or asks for code from the Hub, where `attn_implementation` and its like can name a repository of kernels.
    """
    path = directory / "config.json"
    config = _checked_config(path)
    # transformers may read one of these files instead.
    for name in strings_in(path, config, "configuration_files"):
        _checked_config(directory / plain_name(path, name))
    return config


def plain_name(path: Path, name: object) -> str:
    """Returns `name`, which the file `path` names. Raises FlashPackError if it cannot be a file beside `path`."""
    if not isinstance(name, str) or not _native.is_plain_name(name):
        raise FlashPackError(f"{path} names {name!r}, which is no file beside it")
    return name


def components_of(directory: Path) -> dict[str, tuple[str, str]]:
    """Returns library and class of each component of the pipeline in `directory`; nothing without model_index.json.

    Components that the index says are absent are left out.
    """
    index = directory / INDEX_NAME
    return components_in(index, read_json(index)) if index.is_file() else {}


def components_in(path: Path, index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Does the same for an index that was read from `path`, and ignores the settings of the pipeline in it."""
    found = {}
    for name, value in index.items():
        # Such a name is no argument of a constructor, and may be a path. diffusers ignores it, too.
        if name.startswith("_") or not name.isidentifier():
            continue
        if not (isinstance(value, list) and len(value) == 2 and any(isinstance(part, str) for part in value)):
            if value != [None, None] and (path.parent / name).is_dir():
                raise _wrong_type(path, name, value, "a library and a class")
            continue
        library, class_name = value
        if name in OPTIONS:
            raise FlashPackError(f"{path} has a component {name!r}, which is an option of from_pretrained()")
        if library is None:
            continue
        if not (isinstance(library, str) and isinstance(class_name, str)):
            raise _wrong_type(path, name, value, "a library and a class")
        if not _LIBRARY.fullmatch(library) or not class_name.isidentifier():
            raise FlashPackError(f"{path}: {name} is {value!r}, which cannot be a library and a class")
        found[name] = (library, class_name)
    return found


def modules_of(directory: Path) -> list[str]:
    """Returns the folders that modules.json of sentence-transformers names, but for `directory` itself.

    Raises FlashPackError if one of them cannot be a folder in `directory`.
    """
    path = directory / _MODULES_NAME
    modules = _read_any_json(path) if path.is_file() else None
    named = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [folder for name in named if name is not None and (folder := _folder_in(path, name)) != "."]


def _folder_in(path: Path, name: object) -> str:
    """Returns a folder that the file `path` names, "." for its own. Raises FlashPackError if it is not inside that."""
    folder = os.path.normpath(name) if isinstance(name, str) else ""
    parts = folder.split(os.sep)
    if "\0" in folder or not folder or os.path.isabs(folder) or os.pardir in parts:
        raise FlashPackError(f"{path} names {name!r}, which is no folder beside it")
    return folder


def check_inside(root: Path, paths: Iterable[Path]) -> None:
    """Raises FlashPackError if one of `paths` is a link that leads out of the directory `root`.

    If `root` is a snapshot in a Hub cache, links may lead to the blobs of its repository.
    """
    roots = [os.path.realpath(root), *map(os.path.realpath, _blobs_of(root))]
    for path in paths:
        if not _leads_into(os.fspath(path.absolute()), roots[:1], roots[1:]):
            raise FlashPackError(f"{path} is a link that leads out of {root}, to {os.path.realpath(path)}")


def check_folder(root: Path, folder: str) -> None:
    """Calls check_inside() for the folder of a component, or for `root` itself if it is "", and for all files in it."""
    directory = root / folder
    check_inside(root, [directory])
    if directory.is_dir():
        check_inside(root, (Path(entry) for entry in os.scandir(directory) if entry.is_symlink()))


@contextlib.contextmanager
def blaming(path: StrPath, passed: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Within it, errors of a library that uses the files at `path` become a FlashPackError that names `path`.

    OSError, ImportError, MemoryError and those of `passed` stay what they are.
    """
    unchanged: tuple[type[BaseException], ...] = (FlashPackError, OSError, ImportError, MemoryError, *passed)
    try:
        yield
    except RecursionError as error:
        raise FlashPackError(f"{os.fspath(path)} cannot be used: it is nested too deeply") from error
    except unchanged:
        raise
    except Exception as error:
        raise FlashPackError(
            f"{os.fspath(path)} cannot be used: {type(error).__name__}: {in_one_line(error)}"
        ) from error


def _read_any_json(path: Path) -> Any:
    with open_regular(path) as file:
        content = file.read()
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        what = "" if content[:1] in (b"{", b"[") else _native.what_it_is(content[: _native.FOREIGN_HEAD_BYTES])
        raise FlashPackError(f"{path} is not a JSON file: {what or error}") from error


def _checked_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config = read_json(path)
    for key in ("_class_name", "model_type"):
        string_in(path, config, key)
    strings_in(path, config, "architectures")
    auto_map_in(path, config)
    for key, value in _fields(config):
        if _IMPLEMENTATION.search(key) and any("/" in text for text in _texts(value)):
            raise FlashPackError(
                f"{path}: {key} names {value!r}, which is code from elsewhere; only the caller may ask for that"
            )
    return config


def _leads_into(path: str, roots: list[str], blobs: list[str]) -> bool:
    for _ in range(40):  # The kernel follows no more.
        parent = os.path.realpath(os.path.dirname(path))
        if parent in blobs:
            return True
        last = os.path.basename(path)
        path = os.path.realpath(path) if last in ("", ".", "..") else os.path.join(parent, last)
        if not os.path.islink(path):
            return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
        path = os.path.join(parent, os.readlink(path))
    return False


def _blobs_of(directory: Path) -> list[Path]:
    """Returns the folders of a Hub cache that have the files of the snapshot `directory`, or of the one around it."""
    snapshots = {
        parent
        for place in (directory.absolute(), directory.resolve())
        for parent in place.parents
        # A name before ".." need not be one of a directory above the place.
        if parent.name == "snapshots" and os.pardir not in place.relative_to(parent).parts
    }
    return [blobs for blobs in (parent.parent / "blobs" for parent in snapshots) if blobs.is_dir()]


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the fields of an object and of all objects in it."""
    if isinstance(value, dict):
        yield from value.items()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _fields(child)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _texts(child)


def _wrong_type(path: Path, key: str, value: Any, wanted: str) -> FlashPackError:
    return FlashPackError(f"{path}: {key} is {_JSON_TYPES.get(type(value), 'a number')}, not {wanted}: {value!r:.200}")
