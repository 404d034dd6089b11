"""Loading a model whose class is named in its files alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ConfigMixin

from ..._hub import Download, resolve_directory
from ..._links import check_folder
from ..._meta_init import meta_parameters
from ..._native import FlashPackError
from ..._parts import INDEX_NAME, components_of
from ..._paths import StrPath
from ..._repository import auto_map_in, check_model_config, string_in, strings_in
from ._components import class_named, flashpack_class, promote


class AutoFlashPackModel(ConfigMixin):
    """diffusers.AutoModel whose models have save_pretrained_flashpack()."""

    config_name = "config.json"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} has no instances: call its from_pretrained()")

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: StrPath | None = None, **kwargs: Any) -> Any:
        """Calls AutoModel.from_pretrained of diffusers or, with `use_flashpack=True`, from_pretrained_flashpack()."""
        if kwargs.pop("use_flashpack", False):
            return cls.from_pretrained_flashpack(pretrained_model_or_path, **kwargs)
        return promote(diffusers.AutoModel.from_pretrained(pretrained_model_or_path, **kwargs))

    @classmethod
    def from_pretrained_flashpack(cls, pretrained_model_or_path: StrPath | None = None, **kwargs: Any) -> Any:
        """Returns the model of a directory with `model.flashpack`, or of a repository on the Hub.

        The class of a `subfolder` is read from the model_index.json above it, if there is one, else from its
        config.json. `trust_remote_code=True` runs code that comes with the model. The other `kwargs` are those of
        from_pretrained_flashpack() of the model's class.
        """
        if pretrained_model_or_path is None:
            raise FlashPackError("pretrained_model_or_path is required")
        trust_remote_code = kwargs.pop("trust_remote_code", False)
        subfolder = kwargs.get("subfolder") or ""
        code = ("*.py",) if trust_remote_code else ()
        directory = resolve_directory(
            pretrained_model_or_path,
            Download.of(kwargs),
            (INDEX_NAME, *(str(Path(subfolder, name)) for name in ("config.json", *code))),
        )
        model_class = flashpack_class(_class_of(directory, subfolder, trust_remote_code))
        return model_class.from_pretrained_flashpack(pretrained_model_or_path, **kwargs)


def _class_of(directory: Path, subfolder: str, trust_remote_code: bool) -> Any:
    entry = components_of(directory).get(subfolder) if subfolder else None
    if entry is not None:
        check_folder(directory, subfolder)
        return class_named(*entry)
    path = directory / subfolder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    config = check_model_config(path.parent)
    if trust_remote_code and "AutoModel" in auto_map_in(path, config):
        with meta_parameters():
            return type(diffusers.AutoModel.from_config(path.parent, trust_remote_code=True))
    name = string_in(path, config, "_class_name")
    if name is not None:
        return class_named("diffusers", name)
    architectures = strings_in(path, config, "architectures")
    if architectures:
        return class_named("transformers", architectures[0])
    raise FlashPackError(f"{path} does not say which class the model is of")
