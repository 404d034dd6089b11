"""Models built by their library, for conversions that take the names of tensors from there."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

from ._casts import PLAIN_FLOATS
from ._conversion import map_tensors
from ._links import check_folder
from ._native import FlashPackError
from ._parts import components_of
from ._repository import auto_map_in, blaming, check_model_config, string_in, strings_in


def build_model(
    library: str, directory: Path, folder: str, checkpoint: Path, variant: str | None, **kwargs: Any
) -> torch.nn.Module:
    """Returns the model in `folder` of `directory`, made by from_pretrained() of its class in the checkpoint's dtype.

    `library`: "transformers" or "diffusers", for a model that is no component of a pipeline.
    `kwargs`: for from_pretrained().

    Raises FlashPackError when the library does not know the class, or would make up tensors that the checkpoint lacks.
    """
    home = directory / folder
    check_folder(directory, folder)
    config = check_model_config(home)
    if folder:
        cls = _component_class(*components_of(directory)[folder])
    else:
        cls = _own_class(library, home / "config.json", config)
    dtype = "torch_dtype" if cls.__module__.startswith("diffusers") else "dtype"
    keywords = {dtype: _dtype_of(checkpoint), "variant": variant, "output_loading_info": True, **kwargs}
    if cls.__module__.startswith("transformers") and keywords.get("trust_remote_code") is None:
        keywords["trust_remote_code"] = False  # Without it, transformers would ask on the terminal.
    # A component need not have the variant that its pipeline has.
    if variant is not None and variant not in checkpoint.name.split("."):
        del keywords["variant"]
    with blaming(home):
        model, info = cls.from_pretrained(home, **keywords)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise FlashPackError(
            f"{home} lacks {len(missing)} tensors that {type(model).__name__} has "
            f"(e.g., {', '.join(map(repr, missing[:3]))}), which would be packed with random values"
        )
    if not isinstance(model, torch.nn.Module):
        raise FlashPackError(f"{cls.__name__} of {home} is not a torch.nn.Module")
    return model


def _own_class(library: str, path: Path, config: dict[str, Any]) -> Any:
    """Returns the class that a model's configuration names, or AutoModel if the library does not know that class."""
    module = importlib.import_module(library)
    if library == "diffusers":
        name = string_in(path, config, "_class_name") or ""
        return _subclass(module, name.removeprefix("FlashPack"), module.ModelMixin) or module.AutoModel
    name = next(iter(strings_in(path, config, "architectures")), "")
    # Code that came with the checkpoint is reached through the Auto class that it is registered for.
    autos = [key for key, target in auto_map_in(path, config).items() if target.endswith(f".{name}")]
    base = module.models.auto.auto_factory._BaseAutoModelClass
    auto = _subclass(module, autos[0], base) if autos else None
    return _subclass(module, name, module.PreTrainedModel) or auto or module.AutoModel


def _component_class(library: str, name: str) -> Any:
    """Returns the class of a pipeline's component. The names come from a file, so no other library is imported."""
    import diffusers

    known = {"diffusers": diffusers}
    if library == "transformers":
        known[library] = importlib.import_module(library)
    module = known.get(library, getattr(diffusers.pipelines, library, None))
    cls = _subclass(module, name.removeprefix("FlashPack"), torch.nn.Module)
    if cls is None:
        raise FlashPackError(f"{name} of {library} is not known to diffusers {diffusers.__version__} or transformers")
    return cls


def _subclass(module: Any, name: str, *bases: type) -> Any:
    """Returns the class `name` of `module` if it derives from one of `bases`, else None."""
    found = getattr(module, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, bases) else None


def _dtype_of(checkpoint: Path) -> torch.dtype:
    """Returns the narrowest floating-point dtype that holds all values of `checkpoint`, so that building loses none."""
    there = {getattr(tensor, "dtype", None) for tensor in map_tensors(checkpoint).values()}
    dtypes = [dtype for dtype in PLAIN_FLOATS if dtype in there]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32
