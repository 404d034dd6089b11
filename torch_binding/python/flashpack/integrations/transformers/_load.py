"""Building a transformers model and filling it from a file.

A file with just the names of the module is assigned to it. The tensors of any other file, such as one with names of a
checkpoint or without some weights, are given to transformers' own loader: it knows how to rename, convert and tie them,
and how to initialise missing ones.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from ..._assign import make_parameter
from ..._checkpoint import Checkpoint, Entry, open_checkpoint
from ..._device import CPU
from ..._loading import assign, load_entries
from ..._meta_init import meta_parameters, warn_of_meta
from ..._native import FlashPackError
from ..._options import Casts, LoadOptions
from ..._own_code import own_code_of
from ..._plan import Plan, check_strictness, slots_of
from ..._repository import blaming, check_model_config
from ..._safetensors import dtype_name, header_shape
from ...utils import string_to_dtype
from .._arguments import main_dtype
from ._arguments import FOR_TRANSFORMERS, accepted, dtype_of, placement, read_config

# transformers does not call load_state_dict(), and has other ways to do what its own modules and torch's do there.
_WITHOUT_LOAD_STATE_DICT = frozenset({"torch", "transformers"})
# A read of few tensors is slow, because it looks at all metadata; one of many takes their memory a second time.
_READ_TOGETHER = 64
_OLD = int(transformers_version.split(".")[0]) < 5


@dataclass
class Request:
    """A load: its file and what the caller asks for."""

    directory: Path
    name: str
    """The path or repository that the caller gave."""
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype | None
    """None keeps the dtypes of the file."""
    options: LoadOptions
    arguments: dict[str, Any]
    """Arguments for transformers to build the model with."""
    may_mismatch: bool = False
    """Whether a tensor of the file with another shape is passed over."""

    def entries(self) -> list[Entry]:
        """The tensors that are wanted."""
        return [entry for entry in self.checkpoint.entries() if not self.options.filters.ignore(entry.name)]

    @property
    def keeps_dtypes(self) -> bool:
        """Whether every tensor is to have the dtype that it has in the file."""
        return self.dtype is None and not self.options.casts.coerce


def load(
    model_class: type[PreTrainedModel],
    path: Path,
    name: str,
    options: LoadOptions,
    arguments: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns an instance of `model_class`, in eval mode, and what transformers calls its loading info.

    `arguments`: those of from_pretrained().
    """
    arguments = accepted(arguments)
    check_model_config(path.parent)
    with blaming(path.parent):
        config, arguments = read_config(model_class, path.parent, arguments)
    generation_config = arguments.pop("generation_config", None)
    placed = placement(options.device, arguments.pop("device_map", None))
    device = placed.device or CPU
    dtype = dtype_of(arguments)
    may_mismatch = arguments.pop("ignore_mismatched_sizes", False)
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    with open_checkpoint(path) as checkpoint:
        request = Request(path.parent, name, checkpoint, device, dtype, options, arguments, may_mismatch)
        empty = _empty(model_class, config, request)
        if empty is not None:
            request = _with_names_of(empty, request)
        model = None if empty is None else _assigned(empty, request)
        if model is None:
            misfits = set() if empty is None else _tied_misfits(empty, request)
            model, info = _loaded_by_transformers(model_class, config, request, misfits)
    _finish(model, request, generation_config)
    return placed.dispatch(model), info


def _empty(model_class: type[PreTrainedModel], config: PretrainedConfig, request: Request) -> PreTrainedModel | None:
    """Returns the model without memory for its parameters; None if only transformers can build it."""
    if getattr(config, "quantization_config", None) is not None or FOR_TRANSFORMERS & set(request.arguments):
        return None
    dtype = request.dtype or main_dtype(request.checkpoint) or torch.float32
    config = copy.deepcopy(config)  # It may be the caller's.
    config.dtype = dtype
    # A TypeError may come from arguments that the caller passes on, so that files are not blamed for it.
    with blaming(request.directory, passed=(TypeError,) if request.arguments else ()), meta_parameters():
        model = model_class._from_config(config, dtype=dtype, **request.arguments)
    if not _OLD:
        _compute_buffers(model)
    return model


def _with_names_of(model: PreTrainedModel, request: Request) -> Request:
    """Returns `request` with the names of `model`, for a file of a model that has a head where this one has none.

    It does the same for the opposite case. transformers does so, too, but only after it has converted the names of the
    file as if a checkpoint had them, and some conversions take the name of one module for that of another.
    """
    prefix, slots = f"{model.base_model_prefix}.", slots_of(model)
    names = [entry.name for entry in request.checkpoint.entries()]
    parameters = {id(slot.value) for slot in slots.values() if slot.is_parameter}
    for renamed in (
        {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)},
        {name: prefix + name for name in names},
    ):
        found = {old: name for old, name in renamed.items() if name in slots}
        is_whole = parameters <= {id(slots[name].value) for name in found.values()} or len(found) == len(names)
        if found and is_whole and slots.keys().isdisjoint(found) and renamed.keys().isdisjoint(renamed.values()):
            # Version 4 takes a file with any name of that prefix for one in which all names have it.
            new_names = renamed if _OLD else found
            filters = request.options.filters.after_renaming(names, new_names, slots)
            options = request.options._replace(filters=filters)
            return replace(request, checkpoint=request.checkpoint.renamed(new_names), options=options)
    return request


def _assigned(model: PreTrainedModel, request: Request) -> PreTrainedModel | None:
    """Returns `model`, filled as by assign_from_file; None if the file does not fit it one to one."""
    # transformers does not take these from a file either: it has computed them from the configuration.
    computed = [name for name, slot in slots_of(model).items() if not slot.is_persistent]
    options = request.options._replace(filters=request.options.filters.also(computed))
    request = replace(request, options=options)
    entries = request.entries()
    if not _fits(model, entries):
        return None
    _set_dtypes(model, entries, request)
    casts = Casts(request.options.casts.coerce or request.dtype is not None)
    assign(model, request.checkpoint, request.options._replace(device=request.device, casts=casts))
    _untie(model, request)
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Computes buffers that no file has again, because the dtype that the model was built in may be too coarse."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            module._is_hf_initialized = False
    model.initialize_weights()


def _fits(model: PreTrainedModel, entries: list[Entry]) -> bool:
    """Whether names and shapes are those of the module or left to its own code, and no parameter is missing."""
    slots, own_code = slots_of(model), own_code_of(model, _WITHOUT_LOAD_STATE_DICT)
    there: dict[int, str] = {}
    for entry in entries:
        slot = slots.get(entry.name)
        if slot is not None and tuple(slot.value.shape) == entry.shape:
            if there.setdefault(id(slot.value), entry.dtype) != entry.dtype:
                return False  # Names of a tied weight cannot have several dtypes as long as it is tied.
        elif not own_code.takes(entry.name):
            return False
    parameters = {name: slot for name, slot in slots.items() if slot.is_parameter}
    return all(id(slot.value) in there or own_code.sees(name) for name, slot in parameters.items())


def _refuse_own_code(model: PreTrainedModel, request: Request) -> None:
    for prefix, what, _, _ in own_code_of(model, _WITHOUT_LOAD_STATE_DICT).pieces:
        raise FlashPackError(
            f"{request.checkpoint} does not have the tensors of {type(model).__name__} as they are, and "
            f"transformers, which can convert them, passes over {what} of module {prefix.removesuffix('.')!r}"
        )


def _set_dtypes(model: PreTrainedModel, entries: list[Entry], request: Request) -> None:
    """Gives tensors of the empty model the dtypes that assign_from_file is to find there.

    If the caller asks for a dtype, modules that transformers keeps in float32 do not get it. Otherwise buffers get the
    dtype of the file, because assign_from_file refuses any other; parameters need no such help.
    """
    kept = _kept_in_float32(model, request.dtype)
    dtypes = {entry.name: string_to_dtype(entry.dtype) for entry in entries}
    for name, slot in slots_of(model).items():
        value = slot.value
        if not value.is_floating_point():
            continue
        if kept is not None and slot.is_persistent and kept.search(name):
            value.data = value.data.float()
        elif request.keeps_dtypes and not slot.is_parameter:
            value.data = value.data.to(dtypes.get(name, value.dtype))


def _untie(model: PreTrainedModel, request: Request) -> None:
    """Unties weights that differ in the file, as transformers does from version 5 on."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties, *ties.values()}
    slots, values = slots_of(model), _Values(request)
    together: dict[int, list[str]] = {}
    for name in values.entries:
        if name in tied:
            together.setdefault(id(slots[name].value), []).append(name)
    # The first in the file was assigned, unless code of the model's own has loaded another one over it.
    is_first = not own_code_of(model)
    differing = []
    for first, *others in together.values():
        if others:
            held = slots[first].value
            expected = held if is_first else values.read([first])[first].to(held.dtype)
            if any(not torch.equal(values.read([name])[name].to(held.dtype), expected) for name in others):
                differing.append([first, *others])
    for names in differing:
        for name, value in values.read(names).items():
            slots[name].put(make_parameter(slots[name].value, value.to(slots[name].value.dtype)))
    if differing:
        # It ties the names that the file lacks, and those whose values are equal.
        model.tie_weights(missing_keys=tied - values.entries.keys(), recompute_mapping=False)


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Returns a pattern for names of tensors that stay float32 in a load as `dtype`; None if there are none."""
    kept: list[str] = []
    if dtype is torch.float16:
        kept += model._keep_in_fp32_modules or []
    if dtype in (torch.float16, torch.bfloat16):
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    return re.compile("|".join(part.replace("*", ".*") for part in kept)) if kept else None


class _Values:
    """The tensors of a file. All are read when the first is taken; one that is taken twice is read again."""

    def __init__(self, request: Request) -> None:
        self.references: dict[str, Any] = {}
        """The attributes that a model gets for keep_flash_ref_on_model."""
        self._request = request
        self.entries = {entry.name: entry for entry in request.entries()}
        self._lock = threading.Lock()
        self._left: dict[str, torch.Tensor] | None = None

    def take(self, name: str) -> torch.Tensor:
        with self._lock:  # transformers asks from several threads.
            if self._left is None:
                self._left = self.read(self.entries)
            return self._left.pop(name) if name in self._left else self.read([name])[name]

    def state_dict(self) -> dict[str, Any]:
        """Returns a state dict for transformers, which from version 5 on takes anything that gives a tensor if indexed.

        It reserves device memory before it takes tensors. If they were read by then, both would have to fit.
        """
        if _OLD:
            return {name: self.take(name) for name in self.entries}
        return {name: _Value(self, name) for name in self.entries}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads the tensors of these names, whether they have been taken or not."""
        request = self._request
        entries = [self.entries[name] for name in names]
        tensors, storage = load_entries(request.checkpoint, entries, request.device, request.options)
        if storage is not None:
            self.references = {
                "_flash_shared_storage": storage,
                "_flash_shared_storage_meta": request.checkpoint.metadata,
            }
        return tensors


@dataclass(frozen=True)
class _Value:
    """One tensor of `values` that is not read yet, in the form that transformers handles: a slice of safetensors."""

    values: _Values
    name: str

    def get_dtype(self) -> str:
        return dtype_name(self.values.entries[self.name])

    def get_shape(self) -> list[int]:
        return header_shape(self.values.entries[self.name])

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.values.take(self.name)[index]


def _tied_misfits(model: PreTrainedModel, request: Request) -> set[str]:
    """Returns further names of a tied weight whose shape in the file is another; transformers cannot compare these."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    shapes = {name: tuple(slot.value.shape) for name, slot in slots_of(model).items()}
    misfits = {entry.name for entry in request.entries() if shapes.get(entry.name, entry.shape) != entry.shape}
    return {name for name, first in ties.items() if name in misfits and first in misfits}


def _loaded_by_transformers(
    model_class: type[PreTrainedModel], config: PretrainedConfig, request: Request, left_out: Collection[str]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    values = _Values(request)
    main = request.dtype or main_dtype(request.checkpoint) or torch.float32
    arguments = dict(request.arguments)
    if request.device != CPU:  # transformers wants accelerate as soon as there is a device map.
        arguments["device_map"] = {"": request.device}
    with blaming(request.directory, passed=(RuntimeError,)), _named_in_report(request.name):
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: value for name, value in values.state_dict().items() if name not in left_out},
            dtype=main,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
    _refuse_own_code(model, request)
    if not request.may_mismatch:
        _check_shapes(model, info, request)
    _check_names(model, info, request)
    if request.keeps_dtypes and getattr(model, "hf_quantizer", None) is None:
        _restore_dtypes(model, values)
    for name, reference in values.references.items():
        setattr(model, name, reference)
    warn_of_meta(model, request.checkpoint.path)
    return model, info


@contextmanager
def _named_in_report(name: str) -> Iterator[None]:
    """Within it, transformers' report of missing and unexpected weights names the load, where it would name None."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg = re.sub(r"\b(from:|at) None\b", lambda found: f"{found[1]} {name}", str(record.msg))
        return True

    reporter = logging.getLogger(PreTrainedModel.__module__)
    reporter.addFilter(rename)
    try:
        yield
    finally:
        reporter.removeFilter(rename)


def _check_shapes(model: PreTrainedModel, info: Mapping[str, Any], request: Request) -> None:
    shapes = {entry.name: list(entry.shape) for entry in request.entries()}
    places = {name: place for place, name in enumerate(shapes)}
    # From version 5 on, both shapes come with the name, that of the file first.
    mismatched = [(each,) if isinstance(each, str) else each for each in info["mismatched_keys"]]
    # They are a set, whose order is another in each process. The error names the first in the file.
    for name, *found in sorted(mismatched, key=lambda each: (places.get(each[0], len(places)), each[0])):
        expected = list(slots_of(model)[name].value.shape)
        shape = list(found[0]) if found else shapes.get(name)
        raise FlashPackError(f"{request.checkpoint}: shape mismatch for {name!r}: model={expected} vs flash={shape}")


def _check_names(model: PreTrainedModel, info: Mapping[str, Any], request: Request) -> None:
    """Applies the strict flags to what transformers found."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(name for name in info["missing_keys"] if not request.options.filters.ignore(name))
    plan = Plan(
        {},
        unexpected=sorted(info["unexpected_keys"]),
        missing_parameters=[name for name in missing if name in parameters],
        missing_buffers=[name for name in missing if name not in parameters],
    )
    check_strictness(plan, request.checkpoint.path, request.options.strictness)


def _restore_dtypes(model: PreTrainedModel, values: _Values) -> None:
    """Gives tensors their dtype in the file again, where transformers gave them the main dtype or float32."""
    prefix = f"{model.base_model_prefix}."
    floats = {name: slot for name, slot in slots_of(model).items() if slot.value.is_floating_point()}
    candidates = [
        (name, candidate)
        for name, slot in floats.items()
        for candidate in dict.fromkeys((name, prefix + name, name.removeprefix(prefix)))
        if candidate in values.entries and string_to_dtype(values.entries[candidate].dtype) != slot.value.dtype
    ]
    restored = set()
    for begin in range(0, len(candidates), _READ_TOGETHER):
        part = candidates[begin : begin + _READ_TOGETHER]
        read = values.read(dict.fromkeys(candidate for _, candidate in part))
        for name, candidate in part:
            slot, value = floats[name], read[candidate]
            if name in restored or value.dtype == slot.value.dtype:
                continue
            # transformers may have converted another tensor to this name.
            if torch.equal(value.to(slot.value.dtype), slot.value):
                slot.value.data = value
                restored.add(name)


def _finish(model: PreTrainedModel, request: Request, generation_config: GenerationConfig | None) -> None:
    model.eval()
    model.name_or_path = model.config.name_or_path = request.name
    with blaming(request.directory):
        _set_generation(model, request, generation_config)
    warn_of_meta(model, request.checkpoint.path)


def _set_generation(model: PreTrainedModel, request: Request, generation_config: GenerationConfig | None) -> None:
    if model.can_generate():
        if generation_config is not None:
            model.generation_config = GenerationConfig.from_dict(generation_config.to_dict())
        elif (request.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(request.directory)
        elif not _OLD and (request.directory / "config.json").is_file():
            # Version 5 drops what old configurations say of generation.
            model.generation_config = GenerationConfig.from_pretrained(
                request.directory, config_file_name="config.json", _from_model_config=True
            )
