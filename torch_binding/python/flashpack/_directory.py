"""Model directories of transformers and diffusers, on disk or on the Hub: weights, and the files beside them."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _native
from ._conversion import files_of
from ._hub import Download, resolve_directory
from ._links import check_inside
from ._native import FlashPackError
from ._parts import components_of, model_folders, modules_of
from ._repository import read_json
from ._weight_names import (
    FOREIGN_SUFFIXES,
    find_checkpoint,
    flashpack_name_of,
    named_weights,
    suffix_of,
    weight_patterns,
)
from .utils import logger

# A model needs these beside its weights: configuration, tokenizer, generation, model card and licence.
_COMPANIONS = [
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.spm", "*.jinja", "additional_chat_templates/*.jinja"),
    *("*.md", "LICENSE*"),
]
_CODE = "*.py"
# sentence-transformers reads the weights of the modules after the model itself, and only in these formats.
_MODULE_WEIGHTS = ["*.safetensors", "*.bin", "*.index.json"]
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_CONFIG = "config.json"
_WEIGHT_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
_TENSOR_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|flashpack)$")


def is_repo_id(name: str) -> bool:
    """Whether `name` can be that of a repository on the Hub, and does not look like a file with tensors."""
    return _REPO_ID.fullmatch(name) is not None and not (_TENSOR_FILE.search(name) or _native.is_index(name))


def find_checkpoints(directory: Path, variant: str | None) -> dict[str, Path]:
    """Returns the checkpoint of every folder of model_folders(). In a pipeline, at least one must have the variant.

    Raises FlashPackError naming folders without a checkpoint, or a link that leads out of `directory`.
    """
    folders = model_folders(directory)
    check_inside(directory, [directory / folder for folder in folders])
    found = {folder: find_checkpoint(directory / folder, variant) for folder in folders}
    if any(found.values()):  # A component that lacks the variant is taken without a variant.
        found = {folder: path or find_checkpoint(directory / folder) for folder, path in found.items()}
    lacking = [os.fspath(directory / folder) for folder, path in found.items() if path is None]
    if lacking or not found:
        what = f"no weights of variant {variant!r}" if variant else "no safetensors or torch weights"
        why = "" if variant or not lacking else _why_not_taken(Path(lacking[0]))
        raise FlashPackError(f"{what} in {', '.join(lacking) or directory}{why}")
    checkpoints = {folder: path for folder, path in found.items() if path is not None}
    check_inside(directory, [file for path in checkpoints.values() for file in files_of(path)])
    return checkpoints


def _why_not_taken(folder: Path) -> str:
    """Returns the end of an error about weights in `folder`, which says which files there are not taken, and why."""
    if named := named_weights(folder):
        return f" are called {named.name}, as its config.json says"

    def weights(pattern: str) -> str:
        files = [
            path for path in sorted(folder.glob(pattern)) if path.is_file() and suffix_of(path) in FOREIGN_SUFFIXES
        ]
        names = [os.fspath(path.relative_to(folder)) for path in files]
        return ", ".join(names[:3]) + (", ..." if names[3:] else "")

    if here := weights("*"):
        return (
            f" are called as a library calls them: there are {here}, but model.safetensors, pytorch_model.bin, "
            f"diffusion_pytorch_model.* or a lone safetensors file is taken; others can be converted by their own path"
        )
    below = weights("*/*")
    return f" itself: there are {below}, which can be converted by the path of their folder" if below else ""


def download(repo_id: str, hub: Download, variant: str | None, with_code: bool) -> Path:
    """Downloads a model from the Hub, with one set of weights for each of its parts, and returns its directory."""
    companions = [*_COMPANIONS, _CODE] if with_code else _COMPANIONS
    directory = resolve_directory(repo_id, hub, companions)
    folders = model_folders(directory)

    def fetch(folders: list[str], variant: str | None) -> list[str]:
        """Downloads one set of weights for each folder, and returns the folders for which there is none."""
        for suffix in (".safetensors", ".bin"):
            folders = [folder for folder in folders if find_checkpoint(directory / folder, variant) is None]
            patterns = weight_patterns(suffix, variant)
            patterns = [f"{folder}/{pattern}" if folder else pattern for folder in folders for pattern in patterns]
            if patterns:
                resolve_directory(repo_id, hub, patterns)
        return [folder for folder in folders if find_checkpoint(directory / folder, variant) is None]

    lacking = fetch(folders, variant)
    # Components may lack the variant, but not all of them.
    if variant and folders != [""] and lacking != folders:
        fetch(lacking, None)
    fetch(_modules_in(directory), None)
    return directory


def refuse_replacing(source: Path, destination: Path, with_code: bool) -> None:
    """Raises FlashPackError if copy_companions() would replace files in `destination` that are not the same.

    The caller who names a directory as the destination names the weights that go there, but no other files in it. A
    configuration that declare_dtype() has changed is still the same.
    """
    names = [file.relative_to(source) for file in _companions_of(source, with_code)]
    others = [
        os.fspath(name)
        for name in dict.fromkeys(names)
        if (destination / name).is_file() and not _is_same(source / name, destination / name)
    ]
    if others:
        raise FlashPackError(
            f"{destination} has other files of the names that would be copied there: {', '.join(sorted(others))}; "
            f"remove them, or use --force (in Python: force=True), to replace them"
        )


def _is_same(file: Path, other: Path) -> bool:
    if filecmp.cmp(file, other, shallow=False):
        return True
    if file.name != _CONFIG:
        return False
    first, second = _with_dtype(file, "float32"), _with_dtype(other, "float32")
    return first is not None and first == second


def copy_companions(source: Path, destination: Path, with_code: bool) -> None:
    """Copies what the model in `source` needs beside its weights; its Python files only `with_code`.

    Indices of weights stay behind. Modules of sentence-transformers after the model itself keep their weights as they
    are. Folders with files that are not copied are logged.
    """
    companions = _companions_of(source, with_code)
    code = [] if with_code else _files_in(source, [_CODE])
    if code:
        logger.warning(
            "code is not copied, unless copy_code of a conversion asks for it: %s", ", ".join(map(os.fspath, code))
        )
    if left := _folders_left(source, {*companions, *code}):
        logger.warning("%s has folders with files that are not copied: %s", source, ", ".join(left))
    for file in companions:
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def declare_dtype(directory: Path, dtype: str) -> None:
    """Makes the config.json in `directory` say that the weights are `dtype`, wherever it names a dtype of weights.

    transformers loads weights as what their configuration says. The description of quantised weights stays as it is.
    """
    path = directory / _CONFIG
    changed = _with_dtype(path, dtype) if dtype in _WEIGHT_DTYPES and path.is_file() else None
    if changed is not None and changed != read_json(path):
        path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def _with_dtype(path: Path, dtype: str) -> Any:
    """Returns a configuration with `dtype` wherever it names a dtype of weights; None for a file that is none."""

    def declared(value: Any, key: str = "") -> Any:
        if isinstance(value, dict) and key != "quantization_config":
            return {name: declared(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [declared(part) for part in value]
        named = key in ("dtype", "torch_dtype") and isinstance(value, str)
        return dtype if named and value.removeprefix("torch.") in _WEIGHT_DTYPES else value

    try:
        return declared(read_json(path))
    except (FlashPackError, RecursionError):
        return None


def _companions_of(source: Path, with_code: bool) -> list[Path]:
    """Returns what copy_companions() copies. Raises FlashPackError for a link that leads out of `source`."""
    named = _files_in(source, [*_COMPANIONS, *([_CODE] if with_code else [])])
    weights = [
        file
        for folder in _modules_in(source)
        for pattern in _MODULE_WEIGHTS
        for file in (source / folder).glob(pattern)
    ]
    files = [file for file in [*(file for file in named if not _native.is_index(file)), *weights] if file.is_file()]
    check_inside(source, files)
    return files


def _files_in(source: Path, patterns: Sequence[str]) -> list[Path]:
    """Returns what has names of these patterns in a directory, and in the folders of its components and modules."""
    folders = [source / folder for folder in ("", *components_of(source), *_modules_in(source))]
    return [file for folder in folders for pattern in patterns for file in folder.glob(pattern)]


def _modules_in(directory: Path) -> list[str]:
    """Returns the folders of modules of sentence-transformers, which are not converted, as components are."""
    components = components_of(directory)
    return [folder for folder in modules_of(directory) if folder not in components]


def _folders_left(source: Path, taken: set[Path]) -> list[str]:
    """Returns the folders of `source` with other files than `taken`. Components are left out: they have other files."""
    components = components_of(source)
    folders = sorted(
        path.name for path in source.iterdir() if path.is_dir() and path.name not in components and path.name[0] != "."
    )
    return [
        folder
        for folder in folders
        if any(Path(home, name) not in taken for home, _, names in os.walk(source / folder) for name in names)
    ]


def warn_of_older(file: Path) -> None:
    """Logs the weights beside a new flashpack file that are loaded without flashpack."""
    older = find_checkpoint(file.parent)
    if older is not None and flashpack_name_of(older) == file.name:  # An adapter takes no model's place.
        logger.warning("flashpack loads %s, but programs without flashpack load %s, which is older", file, older)
