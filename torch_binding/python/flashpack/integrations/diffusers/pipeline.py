"""The mixin for pipelines of diffusers."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..._checkpoint import Verify
from ..._destination import own_files
from ..._durable import make_directories
from ..._hub import Download, Upload, resolve_directory, upload_directory
from ..._links import check_folder
from ..._logging import in_one_line
from ..._native import FlashPackError
from ..._options import Casts, Filters, LoadOptions, Sharing, Strictness
from ..._parts import INDEX_NAME, components_of
from ..._paths import StrPath
from ..._repository import blaming, read_json, string_in
from ..._transfers import ReadOptions
from ...constants import (
    DEFAULT_ALIGN_BYTES,
    DEFAULT_CHUNK_BYTES,
    DEFAULT_NUM_STREAMS,
    DEFAULT_NUM_WRITE_WORKERS,
    WEIGHTS_NAME,
)
from ...utils import logger
from .._arguments import flashpack_file, placement_of, requested_dtype
from .._classes import PREFIX, library_class, promoted_class
from ._components import (
    accepted_components,
    check_components,
    class_named,
    declared_classes,
    entry_known_to_diffusers,
    flashpack_class,
    index_entry,
    is_packed,
    mixin_for,
    promote,
    uncompiled,
)
from .model import make_directory

_WEIGHTS = frozenset({".bin", ".onnx", ".pb", ".pt", ".safetensors"})

Self = TypeVar("Self", bound="FlashPackDiffusionPipeline")


class FlashPackDiffusionPipeline(DiffusionPipeline):
    """Adds save_pretrained_flashpack() and from_pretrained_flashpack() to a pipeline of diffusers.

    `class FlashPackSD(StableDiffusionPipeline, FlashPackDiffusionPipeline): pass`. If the constructor annotates a
    component with a class that has a flashpack mixin, the component is loaded as an instance of that class.
    """

    def save_pretrained_flashpack(
        self,
        save_directory: StrPath,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        repo_id: str | None = None,
        private: bool | None = None,
        is_main_process: bool = True,
        align_bytes: int = DEFAULT_ALIGN_BYTES,
        silent: bool = True,
        num_workers: int = DEFAULT_NUM_WRITE_WORKERS,
        target_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        checksum: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes model_index.json and each component into a directory of its own.

        Models with a flashpack mixin, or after patch_integrations() all, become `<component>/model.flashpack` and
        config.json. Everything else is saved by its own save_pretrained(), which gets `safe_serialization`, `variant`
        and `max_shard_size` where it takes them. Older weights of another format stay beside a model.flashpack, and are
        logged, because programs without flashpack load them.

        `target_dtype`: one for all models with the mixin, or {component: dtype}.
        The other arguments are those of FlashPackDiffusersModelMixin.save_pretrained_flashpack.
        """
        if not is_main_process:
            return
        components = {name: uncompiled(value) for name, value in self.components.items() if value is not None}
        dtypes = _per_component(target_dtype, components)
        directory = make_directory(save_directory)
        for name, component in components.items():
            if is_packed(type(component)):
                make_directories(directory / name)
                component.save_pretrained_flashpack(
                    directory / name,
                    target_dtype=dtypes.get(name),
                    align_bytes=align_bytes,
                    silent=silent,
                    num_workers=num_workers,
                    checksum=checksum,
                    **kwargs,
                )
            elif hasattr(component, "save_pretrained"):
                _save(component, directory / name, safe_serialization, variant, max_shard_size)
            else:
                logger.warning("%s, a %s, cannot be saved", name, type(component).__name__)
                self.register_to_config(**{name: (None, None)})
        own_files(directory, "*.json")
        self.save_config(directory)
        if push_to_hub:
            upload_directory(directory, Upload(repo_id, token, private, create_pr, commit_message))

    @classmethod
    def from_pretrained_flashpack(
        cls: type[Self],
        pretrained_model_name_or_path: StrPath | None,
        device: str | torch.device | None = None,
        *,
        num_streams: int = DEFAULT_NUM_STREAMS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        ignore_names: Collection[str] | None = None,
        ignore_prefixes: Collection[str] | None = None,
        silent: bool = True,
        use_distributed_loading: bool = False,
        distributed_sharded: bool = False,
        distributed_shard_strategy: str | None = None,
        coerce_dtype: bool = False,
        ignore_suffixes: Collection[str] | None = None,
        strict: bool | None = None,
        strict_params: bool = True,
        strict_buffers: bool = False,
        keep_flash_ref_on_model: bool = False,
        mmap: bool = False,
        verify: Verify = "auto",
        **kwargs: Any,
    ) -> Self:
        """Returns the pipeline of a directory, or of a repository on the Hub.

        Components that have a `model.flashpack` are loaded from it, in the order of their names, as the class that the
        constructor annotates or model_index.json names. Everything else is left to from_pretrained() of the pipeline.
        FlashPackDiffusionPipeline itself takes the class of the pipeline from model_index.json.

        `device`: the device of all components, by default the CPU. `device_map` may name it, too.
        `kwargs`: components that are there already, or None for those that are not wanted; `dtype` or `torch_dtype`, a
        dtype or {component: dtype, "default": dtype}; `rank`, `local_rank`, `world_size`; and all that
        from_pretrained() takes. The other arguments are those of
        FlashPackDiffusersModelMixin.from_pretrained_flashpack.

        Nothing in the directory can run code or set an option of the load: `trust_remote_code` and its like have an
        effect only as arguments of this call.

        Raises FlashPackError for files that are not a pipeline's. An error of a component becomes a RuntimeError "Error
        loading X from LIBRARY CLASS", which is a FlashPackError, too, if its cause is one.
        """
        if pretrained_model_name_or_path is None:
            raise FlashPackError("pretrained_model_name_or_path is required")
        places = [kwargs.pop(name, None) for name in ("rank", "local_rank", "world_size")]
        device_map = kwargs.pop("device_map", None)
        placed = placement_of(device_map if device is None else {"": device})
        if placed.split is not None:
            raise FlashPackError(f"device_map={device_map!r}: a pipeline goes to one device")
        options = LoadOptions(
            placed.device,
            Filters.of(ignore_names, ignore_prefixes, ignore_suffixes),
            Strictness(strict, strict_params, strict_buffers),
            Casts(coerce_dtype),
            ReadOptions(mmap, verify, not silent),
            Sharing(use_distributed_loading, distributed_sharded, distributed_shard_strategy, *places),
            keep_flash_ref_on_model,
        )
        pipeline: Self = _load(cls, pretrained_model_name_or_path, options, kwargs)
        pipeline.register_to_config(_name_or_path=os.fspath(pretrained_model_name_or_path))
        # Components without a flashpack file are still on the CPU.
        is_done = options.device is None or torch.device(options.device).type == "cpu"
        return pipeline if is_done else pipeline.to(options.device)

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name_or_path: StrPath, **kwargs: Any) -> Self:
        """Loads as diffusers does. Models get the class that the constructor annotates if it adds a mixin to theirs."""
        pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name, declared in declared_classes(type(pipeline)).items():
            component = getattr(pipeline, name, None)
            if name not in kwargs and issubclass(declared, type(component)):
                promote(component, declared)
        return pipeline

    def to_json_string(self) -> str:
        """Returns the config as ConfigMixin does, but names classes that are loadable without flashpack."""
        components = {name: uncompiled(getattr(self, name, None)) for name in _components_in(self.config)}
        self.register_to_config(
            **{
                name: index_entry(type(component))
                for name, component in components.items()
                if is_packed(type(component))
            }
        )
        # The index has no module of the pipeline's class, so that nobody finds a class outside of diffusers.
        original = library_class(type(self), FlashPackDiffusionPipeline)
        if original is type(self):
            return str(super().to_json_string())
        stand_in = original.__new__(original)
        stand_in.register_to_config(**self.config)
        return str(stand_in.to_json_string())


def _components_in(config: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in sorted(config.items())
        if not name.startswith("_") and isinstance(value, (list, tuple)) and len(value) == 2 and value[0] is not None
    ]


def _per_component(
    target_dtype: torch.dtype | Mapping[str, torch.dtype] | None, components: Mapping[str, Any]
) -> dict[str, torch.dtype | None]:
    if not isinstance(target_dtype, Mapping):
        return dict.fromkeys(components, target_dtype)
    unknown = sorted(target_dtype.keys() - components.keys())
    if unknown:
        raise FlashPackError(f"target_dtype names what is no component: {', '.join(unknown)}")
    return dict(target_dtype)


def _save(
    component: Any, directory: Path, safe_serialization: bool, variant: str | None, max_shard_size: int | str | None
) -> None:
    """Calls the component's own save_pretrained() with those arguments that it names."""
    arguments: dict[str, Any] = {"safe_serialization": safe_serialization, "variant": variant}
    if max_shard_size is not None:
        arguments["max_shard_size"] = max_shard_size
    known = inspect.signature(component.save_pretrained).parameters
    make_directories(directory)
    own_files(directory, "**/*")
    component.save_pretrained(directory, **{name: value for name, value in arguments.items() if name in known})
    # A flashpack file from an earlier save would be loaded instead of this component.
    (directory / WEIGHTS_NAME).unlink(missing_ok=True)


def _load(cls: type[Self], path_or_repo: StrPath, options: LoadOptions, arguments: dict[str, Any]) -> Any:
    directory = _download(path_or_repo, arguments)
    pipeline_class = _pipeline_class(cls, directory, arguments)
    accepted = accepted_components(pipeline_class)
    entries = {
        name: entry
        for name, entry in sorted(components_of(directory).items())
        if name in accepted and name not in arguments
    }
    loaded = _load_components(pipeline_class, directory, entries, requested_dtype(dict(arguments)), options)
    if loaded and arguments.get("quantization_config") is not None:
        logger.warning("quantization_config has no effect on %s, which flashpack loads", ", ".join(loaded))
    # `local_dir` was for the download, and from_pretrained() would complain of it.
    arguments.pop("local_dir", None)
    components = arguments | loaded
    if not arguments.get("trust_remote_code"):
        check_components(pipeline_class, directory, components)
    with blaming(directory), _understood_by_diffusers(directory, components) as understood:
        return pipeline_class.from_pretrained(understood, **components)


def _download(path_or_repo: StrPath, arguments: Mapping[str, Any]) -> Path:
    """Returns a pipeline's directory. For a component with a flashpack file no other weights are downloaded."""
    hub = Download.of(arguments)
    code = ["*.py"] if arguments.get("trust_remote_code") or arguments.get("custom_pipeline") else []
    patterns = ["*.json", "*.flashpack", "README.md", *code]
    directory = resolve_directory(path_or_repo, hub, patterns)
    if Path(path_or_repo).is_dir():
        return directory
    others = [
        f"{name}/*"
        for name in components_of(directory)
        if name not in arguments and not (directory / name / WEIGHTS_NAME).is_file()
    ]
    if others:
        if directory.parent.name == "snapshots":
            # The branch may have moved since, so that the same commit is asked for.
            hub = hub._replace(revision=directory.name)
        resolve_directory(path_or_repo, hub, others)
    return directory


def _pipeline_class(cls: type[Self], directory: Path, arguments: Mapping[str, Any]) -> Any:
    """Returns the class of the pipeline. A class in trusted code of the pipeline is left to diffusers."""
    path = directory / INDEX_NAME
    index = read_json(path)
    if not (arguments.get("trust_remote_code") and isinstance(index.get("_class_name"), list)):
        string_in(path, index, "_class_name")
    if cls is not FlashPackDiffusionPipeline:
        return cls
    name = index.get("_class_name")
    original = getattr(diffusers, name.removeprefix(PREFIX), None) if isinstance(name, str) else None
    if not (isinstance(original, type) and issubclass(original, DiffusionPipeline)):
        raise FlashPackError(f"{path}: diffusers has no pipeline {name}: call from_pretrained_flashpack() of its class")
    return promoted_class(original, FlashPackDiffusionPipeline)


class _ComponentError(FlashPackError, RuntimeError):
    """An invalid file of a component; a RuntimeError, too, because 0.4.5 raises that."""


def _load_components(
    pipeline_class: Any,
    directory: Path,
    entries: Mapping[str, tuple[str, str]],
    dtype: Any,
    options: LoadOptions,
) -> dict[str, Any]:
    """Loads those of `entries` that have a flashpack file, on all ranks of a group in the same order."""
    declared = declared_classes(pipeline_class)
    loaded = {}
    for name, (library, class_name) in entries.items():
        wanted = dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
        try:
            check_folder(directory, name)
            if (directory / name / WEIGHTS_NAME).is_file():
                cls: Any = declared.get(name) or flashpack_class(class_named(library, class_name))
                arguments = {} if wanted is None else {"dtype": wanted}
                loaded[name] = cls.from_pretrained_flashpack(directory / name, **options.keywords(), **arguments)
            elif _lacks_weights(directory / name, library, class_name):
                flashpack_file(directory / name)
        except Exception as error:
            kind = _ComponentError if isinstance(error, FlashPackError) else RuntimeError
            raise kind(f"Error loading {name} from {library} {class_name}: {in_one_line(error)}") from error
    return loaded


def _lacks_weights(directory: Path, library: str, class_name: str) -> bool:
    """Whether the class is a model's, and no file in its directory can be its weights."""
    if not directory.is_dir() or any(path.suffix in _WEIGHTS for path in directory.iterdir()):
        return False
    try:
        return mixin_for(class_named(library, class_name)) is not None
    except FlashPackError:
        return False


@contextmanager
def _understood_by_diffusers(directory: Path, components: Mapping[str, Any]) -> Iterator[Path]:
    """Yields `directory` or, if its index names classes that diffusers does not take, a stand-in of links to its files.

    Such classes are the caller's own, and those FlashPack... that 0.4.5 named. `components` are loaded already.
    """
    index = read_json(directory / INDEX_NAME)
    names = {}
    for name, (library, class_name) in components_of(directory).items():
        own = type(uncompiled(components[name])) if name in components else None
        if own is not None and mixin_for(own) is not None:
            names[name] = entry_known_to_diffusers(own)
        elif own is None and class_name.startswith(PREFIX):
            names[name] = index_entry(class_named(library, class_name))
    if all(tuple(index[name]) == entry for name, entry in names.items()):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="flashpack-") as stand_in:
        for path in directory.resolve().iterdir():
            if path.name != INDEX_NAME:
                Path(stand_in, path.name).symlink_to(path)
        Path(stand_in, INDEX_NAME).write_text(json.dumps({**index, **names}), encoding="utf-8")
        yield Path(stand_in)
