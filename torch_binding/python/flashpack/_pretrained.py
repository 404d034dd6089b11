"""Models built by the library that they belong to, for those who want its names for the tensors."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

from ._casts import PLAIN_FLOATS
from ._checkpoint import open_checkpoint
from ._directory import components_of, read_json
from ._native import FlashPackError


def build_model(
    library: str, directory: Path, folder: str, checkpoint: Path, variant: str | None, **kwargs: Any
) -> torch.nn.Module:
    """The model in `folder` of `directory`, made by from_pretrained() of its class, with the dtype of `checkpoint`.

    `library`: "transformers" or "diffusers", for a model that is no component of a pipeline.
    `kwargs`: for from_pretrained().

    Raises FlashPackError when the library does not know the class, or would make up tensors that the checkpoint lacks.
    """
    home = directory / folder
    if folder:
        library, class_name = components_of(directory)[folder]
        cls = _class_of(library, class_name.removeprefix("FlashPack"))
    else:
        cls = _own_class(library, read_json(home / "config.json"))
    dtype = "torch_dtype" if cls.__module__.startswith("diffusers") else "dtype"
    keywords = {dtype: _dtype_of(checkpoint), "variant": variant, "output_loading_info": True, **kwargs}
    # A component need not have the variant that its pipeline has.
    if variant is not None and variant not in checkpoint.name.split("."):
        del keywords["variant"]
    model, info = cls.from_pretrained(home, **keywords)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise FlashPackError(
            f"{home} lacks {len(missing)} tensors that {type(model).__name__} has (e.g., {', '.join(missing[:3])}), "
            f"which would be packed with random values"
        )
    if not isinstance(model, torch.nn.Module):
        raise FlashPackError(f"{cls.__name__} of {home} is not a torch.nn.Module")
    return model


def _own_class(library: str, config: dict[str, Any]) -> Any:
    """The class that a model's configuration names; for one that the library does not know, its AutoModel."""
    module = importlib.import_module(library)
    if library == "diffusers":
        return getattr(module, str(config.get("_class_name")).removeprefix("FlashPack"), module.AutoModel)
    name = str((config.get("architectures") or [None])[0])
    # Code that came with the checkpoint is reached through the Auto class that it is registered for.
    auto = [key for key, target in (config.get("auto_map") or {}).items() if str(target).endswith(f".{name}")]
    return getattr(module, name, None) or getattr(module, auto[0] if auto else "AutoModel", module.AutoModel)


def _class_of(library: str, name: str) -> Any:
    """The class of a pipeline's component. The names come from a file: modules of other libraries are not imported."""
    import diffusers

    known = {"diffusers": diffusers}
    if library == "transformers":
        known[library] = importlib.import_module(library)
    module = known.get(library, getattr(diffusers.pipelines, library, None))
    cls = getattr(module, name, None)
    if cls is None:
        raise FlashPackError(f"{name} of {library} is not known to diffusers {diffusers.__version__} or transformers")
    return cls


def _dtype_of(checkpoint: Path) -> torch.dtype:
    """The narrowest floating-point dtype that holds all that `checkpoint` has, so that building loses nothing."""
    dtypes = {tensor.dtype for tensor in open_checkpoint(checkpoint).values() if tensor.dtype in PLAIN_FLOATS}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32
