"""What a pipeline's files and its constructor say about the classes of its components."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin

from ..._native import FlashPackError
from .._classes import PREFIX, original_class, promoted_class
from .model import FlashPackDiffusersModelMixin

_OURS = "flashpack.integrations."
_LIBRARIES = ("diffusers", "transformers")


def mixin_for(cls: type) -> Any:
    """The flashpack mixin for a class of diffusers or transformers; None if it is no model."""
    if issubclass(cls, ModelMixin):
        return FlashPackDiffusersModelMixin if issubclass(cls, ConfigMixin) else None
    # Importing transformers takes seconds, and who has not imported it has no model of it.
    if "transformers" not in sys.modules or not issubclass(cls, sys.modules["transformers"].PreTrainedModel):
        return None
    from ..transformers import FlashPackTransformersModelMixin

    return FlashPackTransformersModelMixin


def has_mixin(cls: type) -> bool:
    mixin = mixin_for(cls)
    return mixin is not None and issubclass(cls, mixin)


def uncompiled(component: Any) -> Any:
    """What torch.compile has wrapped in a module of its own."""
    return getattr(component, "_orig_mod", component)


def flashpack_class(cls: type) -> Any:
    """`cls` with its mixin. FlashPackError if it is no model."""
    mixin = mixin_for(cls)
    if mixin is None:
        raise FlashPackError(f"{cls.__name__} is not a model of diffusers or transformers")
    return promoted_class(cls, mixin)


def promote(component: Any, wanted: type | None = None) -> Any:
    """Gives a model, in place, the class that adds the mixin to its own, or `wanted`. Others stay what they are."""
    own = type(component)
    if mixin_for(own) is not None and not has_mixin(own):
        component.__class__ = wanted or flashpack_class(own)
    return component


def declared_classes(pipeline_class: Any) -> dict[str, type]:
    """The components that the constructor of a pipeline annotates with a class that has the mixin."""
    try:
        hints = typing.get_type_hints(pipeline_class.__init__)
    except (NameError, TypeError, AttributeError):
        # A name that exists only for type checkers, or in a function.
        hints = inspect.get_annotations(pipeline_class.__init__)
    declared = {}
    for name, hint in hints.items():
        for candidate in typing.get_args(hint) or (hint,):
            if isinstance(candidate, type) and has_mixin(candidate):
                declared[name] = candidate
    return declared


def entries_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of each component of a model_index.json, in the order of the names; absent ones left out."""
    entries = {}
    for name, value in sorted(index.items()):
        if not name.startswith("_") and isinstance(value, (list, tuple)) and len(value) == 2 and value[0] is not None:
            entries[name] = (value[0], value[1])
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """The object of a config file. FlashPackError if it is not one."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise FlashPackError(f"{path} is not a JSON file") from error
    if not isinstance(content, dict):
        raise FlashPackError(f"{path} is not a JSON object")
    return content


def index_entry(cls: type) -> tuple[str, str]:
    """Library and class of a model, as diffusers writes them into model_index.json."""
    original = original_class(cls, mixin_for(cls))
    pipeline = DiffusionPipeline()
    pipeline.register_modules(component=original.__new__(original))
    library, name = pipeline.config["component"]
    return library, name


def entry_known_to_diffusers(cls: type) -> tuple[str, str]:
    """index_entry(); of a class of one's own, that of the nearest base that diffusers or transformers exports.

    When from_pretrained() is passed a component, it fails for an entry that names any other module (diffusers 0.42).
    """
    library, name = index_entry(cls)
    if library in _LIBRARIES or hasattr(diffusers.pipelines, library):
        return library, name
    for base in cls.__mro__:
        library = base.__module__.split(".")[0]
        if library in _LIBRARIES and getattr(sys.modules[library], base.__name__, None) is base:
            return library, base.__name__
    return library, name


def class_named(library: str, name: str) -> Any:
    """The class of an entry of model_index.json. Imports nothing but diffusers and transformers: files are not trusted.

    Raises FlashPackError if there is no such class.
    """
    if library.startswith(_OURS):
        # flashpack 0.4.5 wrote the module that had made the class.
        library = library.removeprefix(_OURS).split(".")[0]
    if library in _LIBRARIES:
        module: Any = importlib.import_module(library)
    else:
        module = getattr(diffusers.pipelines, library, None) or sys.modules.get(library)
    if module is None:
        raise FlashPackError(f"{library} has not been imported: import it first, or pass the component")
    for candidate in (name, name.removeprefix(PREFIX)):
        found = getattr(module, candidate, None)
        if isinstance(found, type):
            return found
    raise FlashPackError(f"{library} has no class {name}")
