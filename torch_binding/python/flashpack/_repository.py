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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from . import _native
from ._logging import in_one_line
from ._native import FlashPackError
from ._paths import StrPath, path_of

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
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise FlashPackError(f"{path} is not a JSON object")
    return value


def string_in(path: Path, config: dict[str, Any], key: str) -> str | None:
    """Returns `config[key]`, None if there is none. Raises FlashPackError, naming `path`, if it is no string."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise wrong_type(path, key, value, "a string")
    return value


def strings_in(path: Path, config: dict[str, Any], key: str) -> list[str]:
    """Returns the list of strings `config[key]`, empty if there is none. Raises FlashPackError for any other type."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise wrong_type(path, key, value, "a list of strings")
    return value


def auto_map_in(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Returns, by Auto class, the classes in code that comes with a model; of two tokenizers, the first (slow) one."""
    value = config.get("auto_map")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong_type(path, "auto_map", value, "an object")
    first = {key: target[0] if isinstance(target, list) and target else target for key, target in value.items()}
    for key, target in first.items():
        if target is not None and not isinstance(target, str):
            raise wrong_type(path, f"auto_map[{key!r}]", target, "a string")
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


def read_any_json(path: Path) -> Any:
    """Returns the value of a JSON file. Raises as read_json does, but for a value that is no object."""
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


def wrong_type(path: Path, key: str, value: Any, wanted: str) -> FlashPackError:
    """Returns the error for a field of the file `path` that has another type than is wanted."""
    return FlashPackError(f"{path}: {key} is {_JSON_TYPES.get(type(value), 'a number')}, not {wanted}: {value!r:.200}")
