"""Names of files with weights, as libraries give them to files and look for them in a directory. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import _native
from ._native import FlashPackError
from ._repository import plain_name, read_json
from .constants import WEIGHTS_NAME

_SUFFIXES = (".safetensors", ".bin")
# Files of these names have tensors for other programs than flashpack.
FOREIGN_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
# These are the names that transformers and diffusers give to their files.
_STEMS = {
    "transformers": {".safetensors": "model", ".bin": "pytorch_model"},
    "diffusers": {".safetensors": "diffusion_pytorch_model", ".bin": "diffusion_pytorch_model"},
}
# Files of these names have adapters for a model, and stand in a directory where no model is.
_ADAPTERS = ("adapter_model", "pytorch_lora_weights")


def stem_of(path: Path) -> str:
    """Returns the file's name without suffixes of a format: `a` for a.safetensors and a.safetensors.index.json."""
    return _native.without_index_suffix(path).stem


def suffix_of(path: Path) -> str:
    """Returns the suffix in small letters, because people and other systems make no difference."""
    return path.suffix.lower()


def own_stem_of(path: Path) -> str | None:
    """Returns the file's name without suffixes if it keeps that in any format, as adapters do; else None."""
    stem = stem_of(path)
    return stem if stem in _ADAPTERS else None


def flashpack_name_of(checkpoint: Path) -> str:
    """Returns the name of the flashpack file for a directory's checkpoint. Libraries know adapters by their names."""
    stem = own_stem_of(checkpoint)
    return WEIGHTS_NAME if stem is None else f"{stem}.flashpack"


def stem_for(directory: Path) -> str:
    """Returns the name, without a suffix, of the safetensors file that the model's library loads from `directory`."""
    config = _config_of(directory)
    named = _named_in(config, directory)
    if named is not None and suffix_of(named) == ".safetensors":
        return named.stem
    return _STEMS[_library_of(config) or "transformers"][".safetensors"]


def named_weights(directory: Path) -> Path | None:
    """Returns the weights that a configuration of transformers names. Raises FlashPackError if they are elsewhere."""
    return _named_in(_config_of(directory), directory)


def _named_in(config: dict[str, Any], directory: Path) -> Path | None:
    named = config.get("transformers_weights") if _library_of(config) == "transformers" else None
    return None if named is None else directory / plain_name(directory / "config.json", named)


def rivals_of(file: Path, flashpack_name: str | None) -> dict[Path, str]:
    """Returns the files beside a new one that programs load in its place; for each, a phrase that says which programs.

    Only safetensors files have such neighbours. `flashpack_name`: the name of a flashpack file with weights of the same
    model, which would be older; None if no such file can be there.
    """
    if suffix_of(file) != ".safetensors":
        return {}
    others = {f"{file.name}.index.json": "programs that look for an index first, as diffusers and vLLM, load"}
    if flashpack_name is not None:
        others |= dict.fromkeys((flashpack_name, f"{flashpack_name}.index.json"), "flashpack loads")
    paths = {file.with_name(name): who for name, who in others.items()}
    return {path: who for path, who in paths.items() if os.path.lexists(path) and not path.is_dir()}


def weight_patterns(suffix: str, variant: str | None) -> list[str]:
    """Returns patterns for the names of weights that find_checkpoint may find, whole or in shards."""
    dot = f".{variant}" if variant else ""
    shard = "-?????-of-?????"
    return [
        pattern
        for stem in (*(stems[suffix] for stems in _STEMS.values()), *_ADAPTERS)
        for pattern in (f"{stem}{dot}{suffix}", f"{stem}{dot}{shard}{suffix}", f"{stem}{shard}{dot}{suffix}")
    ]


def find_checkpoint(directory: Path, variant: str | None = None) -> Path | None:
    """Returns the file, or the index of the files, that the model's library would load from `directory`.

    Safetensors are preferred. A lone safetensors file may have any name. Adapters are found where no model is. The file
    that a configuration of transformers names as `transformers_weights` comes first.
    """
    config = _config_of(directory)
    named = _named_in(config, directory)
    if named is not None:
        return named if named.is_file() else None
    sets = [(library, suffix) for suffix in _SUFFIXES for library in _STEMS]
    if home := _library_of(config):
        sets.sort(key=lambda each: each[0] != home)
    for name in (name for library, suffix in sets for name in _names(library, suffix, variant)):
        if (directory / name).is_file():
            return directory / name
    if variant is not None:
        return None
    for path in (directory / f"{stem}{suffix}" for stem in _ADAPTERS for suffix in _SUFFIXES):
        if path.is_file():
            return path
    lone = sorted(directory.glob("*.safetensors"))
    return lone[0] if len(lone) == 1 else None


def _config_of(directory: Path) -> dict[str, Any]:
    """Returns the configuration in `directory`; an empty one if none can be read."""
    try:
        return read_json(directory / "config.json")
    except (FlashPackError, OSError):
        return {}


def _library_of(config: dict[str, Any]) -> str | None:
    """Returns the library whose model `config` is for, if it says so."""
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if config.keys() & {"architectures", "model_type"} else None


def _names(library: str, suffix: str, variant: str | None) -> list[str]:
    """Returns the names of files and indices in the order in which the library looks for them."""
    stem = _STEMS[library][suffix]
    whole = [f"{stem}.{variant}{suffix}" if variant else f"{stem}{suffix}"]
    indices = [f"{stem}{suffix}.index.json"]
    if variant:  # Several versions of the libraries named it differently.
        indices = [
            f"{stem}{suffix}.index.{variant}.json",
            f"{stem}{suffix}.{variant}.index.json",
            f"{stem}.{variant}{suffix}.index.json",
        ]
    # transformers looks for the whole file first, and so does diffusers for pickles.
    return indices + whole if library == "diffusers" and suffix == ".safetensors" else whole + indices
