"""The classes of a pipeline's components, as its files and its constructor name them."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.pipelines import pipeline_loading_utils

from ..._links import check_folder
from ..._native import FlashPackError
from ..._parts import INDEX_NAME, OPTIONS, components_of
from ..._repository import check_model_config
from .._classes import LIBRARIES, PREFIX, original_class, promoted_class
from .model import FlashPackDiffusersModelMixin

_OURS = "flashpack.integrations."


def mixin_for(cls: type) -> Any:
    """Returns the flashpack mixin for a class of diffusers or transformers; None if the class is no model."""
    if issubclass(cls, ModelMixin):
        return FlashPackDiffusersModelMixin if issubclass(cls, ConfigMixin) else None
    # Importing transformers takes seconds, and before it is imported `cls` cannot be one of its models.
    if "transformers" not in sys.modules or not issubclass(cls, sys.modules["transformers"].PreTrainedModel):
        return None
    from ..transformers import FlashPackTransformersModelMixin

    return FlashPackTransformersModelMixin


def _has_mixin(cls: type) -> bool:
    mixin = mixin_for(cls)
    return mixin is not None and issubclass(cls, mixin)


def is_packed(cls: type) -> bool:
    """Whether a pipeline packs components of the class: those with the mixin or, once a library is patched, all."""
    return mixin_for(cls) is not None and hasattr(cls, "save_pretrained_flashpack")


def uncompiled(component: Any) -> Any:
    """Returns the module that torch.compile has wrapped in `component`, or else `component` itself."""
    return getattr(component, "_orig_mod", component)


def flashpack_class(cls: type) -> Any:
    """Returns `cls` with its mixin. Raises FlashPackError if it is no model."""
    mixin = mixin_for(cls)
    if mixin is None:
        raise FlashPackError(f"{cls.__name__} is not a model of diffusers or transformers")
    return promoted_class(cls, mixin)


def promote(component: Any, wanted: type | None = None) -> Any:
    """Adds the mixin to a model, in place: its class becomes `wanted` or flashpack_class(). Others are left alone."""
    own = type(component)
    if mixin_for(own) is not None and not _has_mixin(own):
        component.__class__ = wanted or flashpack_class(own)
    return component


def declared_classes(pipeline_class: Any) -> dict[str, type]:
    """Returns, by component, the classes with a mixin that the constructor of a pipeline annotates."""
    try:
        hints = typing.get_type_hints(pipeline_class.__init__)
    except (NameError, TypeError, AttributeError):
        # Some annotation names a thing that exists only for type checkers, or in a function.
        hints = inspect.get_annotations(pipeline_class.__init__)
    declared = {}
    for name, hint in hints.items():
        for candidate in typing.get_args(hint) or (hint,):
            if isinstance(candidate, type) and _has_mixin(candidate):
                declared[name] = candidate
    return declared


def index_entry(cls: type) -> tuple[str, str]:
    """Returns library and class of a model, as diffusers writes them into model_index.json."""
    original = original_class(cls, mixin_for(cls))
    pipeline = DiffusionPipeline()
    pipeline.register_modules(component=original.__new__(original))
    library, name = pipeline.config["component"]
    return library, name


def entry_known_to_diffusers(cls: type) -> tuple[str, str]:
    """Returns index_entry() of `cls` or, if that names any other module, of a base from diffusers or transformers.

    from_pretrained() fails for an entry that names any other module if it is passed the component (diffusers 0.42).
    """
    library, name = index_entry(cls)
    if library in LIBRARIES or hasattr(diffusers.pipelines, library):
        return library, name
    for base in cls.__mro__:
        library = base.__module__.split(".")[0]
        if library in LIBRARIES and getattr(sys.modules[library], base.__name__, None) is base:
            return library, base.__name__
    return library, name


def class_named(library: str, name: str) -> Any:
    """Returns the class of an entry of model_index.json. Raises FlashPackError if there is no such class.

    Files are not trusted, so that for them only diffusers and transformers are imported.
    """
    if library.startswith(_OURS):
        # flashpack 0.4.5 wrote the name of its own module that had made the class.
        library = library.removeprefix(_OURS).split(".")[0]
    module = _module_named(library)
    for candidate in (name, name.removeprefix(PREFIX)):
        found = getattr(module, candidate, None)
        if isinstance(found, type):
            return found
    cure = "" if library in LIBRARIES else ": define it first, or pass the component"
    raise FlashPackError(f"{library} has no class {name}{cure}")


def accepted_components(pipeline_class: Any) -> set[str]:
    """Returns the names that the constructor of a pipeline takes, without those of options of from_pretrained()."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(pipeline_class.__init__).parameters
    return {name for name, parameter in parameters.items() if parameter.kind in kinds} - OPTIONS


def check_components(pipeline_class: Any, directory: Path, there: Collection[str]) -> None:
    """Raises FlashPackError where diffusers would run code of a pipeline's directory, or read another directory.

    `there`: the components that diffusers is given and does not load.
    """
    accepted = accepted_components(pipeline_class)
    for name, (library, class_name) in components_of(directory).items():
        if name not in accepted or name in there:
            continue
        index = directory / INDEX_NAME
        # diffusers loads a component that has no folder of its own from the directory itself.
        folder = name if (directory / name).is_dir() else ""
        check_folder(directory, folder)
        check_model_config(directory / folder)
        if (directory / name / f"{library}.py").exists():
            raise FlashPackError(
                f"{index}: {name} is {class_name} of code that comes with it, which needs trust_remote_code"
            )
        found = getattr(_module_named(library), class_name.removeprefix(PREFIX), None)
        # diffusers itself reports classes that were renamed or removed, or that need another package.
        if found is None or type(found).__name__ == "DummyObject":
            continue
        if not (isinstance(found, type) and issubclass(found, _loadable())):
            raise FlashPackError(f"{index}: {name} is {class_name} of {library}, which is no component of a pipeline")
        if issubclass(found, DiffusionPipeline):
            check_components(found, directory / name, ())


def _module_named(library: str) -> Any:
    if library in LIBRARIES:
        return importlib.import_module(library)
    module = getattr(diffusers.pipelines, library, None)
    if not isinstance(module, ModuleType):
        module = sys.modules.get(library)
    if module is None:
        raise FlashPackError(f"{library} has not been imported: import it first, or pass the component")
    return module


def _loadable() -> tuple[type, ...]:
    """Returns the base classes that diffusers allows for components."""
    known = pipeline_loading_utils.LOADABLE_CLASSES
    modules = {library: sys.modules.get(library) for library in known}
    return tuple(
        base
        for library, names in known.items()
        for base in (getattr(modules[library], name, None) for name in names)
        if isinstance(base, type)
    )
