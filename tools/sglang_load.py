#!/usr/bin/env python3
"""Loads a model with SGLang's own loader and with flashpack's, from both formats, and compares the weights.

usage: tools/sglang_load.py FOLDER          (tools/sglang_load.sh sets up what it needs)

The model has random weights, in one file and in several with an index, made in FOLDER.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import flashpack
import safetensors.torch
import torch

# Kernels and notebooks. Loading calls nothing of them.
ABSENT = ("sgl_kernel", "IPython")


class AbsentModule(ModuleType):
    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes packages that are not installed importable. Their contents can be named, but are of no use."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Model(torch.nn.Module):
    """Takes weights as SGLang's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(96, 64) for _ in range(4))
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameters.pop(name).data.copy_(weight)
        assert not parameters, f"without weights: {sorted(parameters)}"


def make_models(folder: Path) -> list[Path]:
    """Makes the model in one safetensors file and in two, and both again as flashpack files."""
    state = {name: torch.randn_like(each) for name, each in Model().state_dict().items()}
    items = list(state.items())
    made = []
    for suffix in ("safetensors", "flashpack"):
        for name, parts in (("whole", [items]), ("sharded", [items[:5], items[5:]])):
            directory = folder / f"{name}-{suffix}"
            directory.mkdir()
            files = [f"model-{number}.{suffix}" for number in range(len(parts))]
            for file, part in zip(files, parts, strict=True):
                save = safetensors.torch.save_file if suffix == "safetensors" else flashpack.pack_to_file
                save(dict(part), directory / file)
            weight_map = {name: file for file, part in zip(files, parts, strict=True) for name, _ in part}
            (directory / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
            made.append(directory)
    return made


def loaded(directory: Path, load_format: str, extra_config: str) -> dict[str, torch.Tensor]:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    loader = get_model_loader(LoadConfig(load_format=load_format, model_loader_extra_config=extra_config))
    print(f"{directory.name}, load format {load_format}, {extra_config}: {type(loader).__module__}")
    model = Model()
    weights = loader._get_weights_iterator(DefaultModelLoader.Source(str(directory), revision=None))
    DefaultModelLoader.load_weights_only(model, weights, torch.device("cpu"))
    return model.state_dict()


def main(folder: Path) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_context

    load_plugins()
    from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES

    assert "flashpack" in LOAD_FORMAT_CHOICES
    directories = make_models(folder)
    with get_context().override_server_args():
        expected = loaded(directories[0], "safetensors", "{}")
        for directory in directories:
            checked = ['{"verify": "always"}'] if directory.name.endswith("flashpack") else []
            for extra_config in ("{}", '{"lazy": true}', *checked):
                state = loaded(directory, "flashpack", extra_config)
                assert all(torch.equal(state[name], weight) for name, weight in expected.items()), directory
    print("the same weights")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(", ".join(f"{name} {version(name)}" for name in ("flashpack", "sglang", "torch", "transformers")))
    sys.meta_path.append(Absent())
    main(Path(sys.argv[1]))
