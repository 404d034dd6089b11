"""Building a transformers model and filling it from a file.

A file whose names are all of the module's is assigned to it. For any other, such as one with the names of a checkpoint
or without some of the weights, transformers' own loader is given the tensors: it knows how to rename, convert and tie
them, and how to initialise what is missing.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from ..._assign import Filters, Plan, check_strictness, make_parameter, slots_of
from ..._casts import check_asked
from ..._device import CPU
from ..._footer import Entry, Footer, open_footer
from ..._meta_init import meta_parameters, warn_of_meta
from ..._native import FlashPackError
from ..._own_code import own_code_of
from ..._repository import blaming, check_model_config
from ...deserialization import assign_from_file
from ...utils import is_ignored_tensor_name, string_to_dtype

# What from_pretrained() of transformers takes and has no meaning here: where and how to read weights.
_WITHOUT_MEANING = frozenset(
    {
        "_commit_hash",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
        "code_revision",
        "disable_mmap",
        "low_cpu_mem_usage",
        "mirror",
        "tqdm_class",
        "trust_remote_code",
        "use_safetensors",
        "weights_only",
    }
)
_REFUSED = frozenset(
    {
        "device_mesh",
        "distributed_config",
        "from_flax",
        "from_tf",
        "gguf_file",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "offload_state_dict",
        "state_dict",
        "tp_plan",
        "tp_size",
        "variant",
    }
)
# What only transformers' own loader can do.
_FOR_TRANSFORMERS = frozenset(
    {
        "allow_all_kernels",
        "fusion_config",
        "ignore_mismatched_sizes",
        "kernel_config",
        "key_mapping",
        "quantization_config",
        "use_kernels",
    }
)
# transformers does not call load_state_dict(). What its own models and torch's do there, it does in other ways.
_WITHOUT_LOAD_STATE_DICT = frozenset({"torch", "transformers"})
_MAIN_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
# Each read looks at the whole footer; what is restored is in memory twice until it is in its place.
_READ_TOGETHER = 64
_OLD = int(transformers_version.split(".")[0]) < 5


@dataclass
class Request:
    """What to load and how."""

    directory: Path
    name: str
    """What the caller called it."""
    footer: Footer
    device: torch.device
    dtype: torch.dtype | None
    """None keeps what the file has."""
    options: dict[str, Any]
    """Of assign_from_file."""
    arguments: dict[str, Any]
    """Of transformers, for building the model."""

    @property
    def filters(self) -> Filters:
        return (self.options["ignore_names"], self.options["ignore_prefixes"], self.options["ignore_suffixes"])

    def entries(self) -> list[Entry]:
        """The tensors that are wanted."""
        return [entry for entry in self.footer.entries() if not is_ignored_tensor_name(entry.name, *self.filters)]


def load(
    model_class: type[PreTrainedModel],
    path: Path,
    name: str,
    device: str | torch.device | None,
    options: dict[str, Any],
    arguments: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """An instance of `model_class`, in eval mode, and what transformers calls its loading info.

    `options` are those of assign_from_file, `arguments` those of from_pretrained().
    """
    arguments = _accepted(arguments)
    check_model_config(path.parent)
    with blaming(path.parent):
        config, arguments = _read_config(model_class, path.parent, arguments)
    generation_config = arguments.pop("generation_config", None)
    device = _device(device, arguments.pop("device_map", None))
    dtype = _dtype(arguments)
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    with open_footer(path) as footer:
        request = Request(path.parent, name, footer, device, dtype, options, arguments)
        model = _assigned(model_class, config, request)
        if model is None:
            model, info = _loaded_by_transformers(model_class, config, request)
    _finish(model, request, generation_config)
    return model, info


def _accepted(arguments: dict[str, Any]) -> dict[str, Any]:
    refused = [name for name in arguments if name in _REFUSED and arguments[name]]
    if (arguments.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        refused.append("an adapter in the same directory")
    if refused:
        raise FlashPackError(f"{', '.join(refused)} cannot be used with flashpack files")
    dropped = _WITHOUT_MEANING | _REFUSED | {"adapter_kwargs", "adapter_name"}
    return {name: value for name, value in arguments.items() if name not in dropped}


def _read_config(
    model_class: type[PreTrainedModel], directory: Path, arguments: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The configuration, and the arguments that it did not take."""
    config = arguments.pop("config", None)
    if isinstance(config, PretrainedConfig):
        return config, arguments
    if model_class.config_class is None:
        raise FlashPackError(f"{model_class.__name__} has no config_class: pass config=, or load with AutoModel")
    # These are settings of the load, even where a configuration has entries of the same names.
    settings = ("dtype", "torch_dtype", "device_map", "attn_implementation", "experts_implementation")
    kept = {name: arguments.pop(name) for name in (*settings, *_FOR_TRANSFORMERS) if name in arguments}
    config, unused = model_class.config_class.from_pretrained(
        directory if config is None else config, return_unused_kwargs=True, **arguments
    )
    return config, unused | kept


def _device(device: str | torch.device | None, device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise FlashPackError(f'device_map={device_map!r}: only one device for all is supported, {{"": device}}')
        device_map = device_map[""]
    if device_map is not None:
        try:
            mapped = torch.device(device_map)
        except (RuntimeError, TypeError) as error:
            raise FlashPackError(f"device_map={device_map!r} is not a device") from error
        if device is not None and torch.device(device) != mapped:
            raise FlashPackError(f"device={str(device)!r} and device_map={device_map!r} contradict each other")
        return mapped
    return CPU if device is None else torch.device(device)


def _dtype(arguments: dict[str, Any]) -> torch.dtype | None:
    old = arguments.pop("torch_dtype", None)
    dtype = arguments.pop("dtype", old)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = string_to_dtype(dtype.removeprefix("torch."))
    dtype = None if dtype == "auto" else dtype
    check_asked(dtype)
    return dtype


def _main_dtype(footer: Footer) -> torch.dtype:
    """What most bytes of the file are, among what a model can be built in."""
    sizes: Counter[str] = Counter()
    for block in footer.macroblocks():
        if block.dtype in _MAIN_DTYPES:
            sizes[block.dtype] += block.size_bytes
    return string_to_dtype(max(sizes, key=lambda dtype: sizes[dtype], default="float32"))


def _assigned(model_class: type[PreTrainedModel], config: PretrainedConfig, request: Request) -> PreTrainedModel | None:
    """The model, filled by assign_from_file; None if the file does not fit it one to one."""
    if getattr(config, "quantization_config", None) is not None or _FOR_TRANSFORMERS & set(request.arguments):
        return None
    dtype = request.dtype or _main_dtype(request.footer)
    config = copy.deepcopy(config)  # It may be the caller's.
    config.dtype = dtype
    # What the caller passes on to the constructor may be wrong, too.
    with blaming(request.directory, passed=(TypeError,) if request.arguments else ()), meta_parameters():
        model = model_class._from_config(config, dtype=dtype, **request.arguments)
    if not _OLD:
        _compute_buffers(model)
    entries = request.entries()
    if not _fits(model, entries):
        return None
    _set_dtypes(model, entries, request)
    options = request.options
    coerce_dtype = options["coerce_dtype"] or request.dtype is not None
    assign_from_file(model, request.footer, request.device, **options | {"coerce_dtype": coerce_dtype})
    _untie(model, request)
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Those that no file has, again, outside of the dtype that the model was built in, which may be too coarse."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            module._is_hf_initialized = False
    model.initialize_weights()


def _fits(model: PreTrainedModel, entries: list[Entry]) -> bool:
    """Whether the names and shapes are the module's, or left to code of its own, and no parameter is missing."""
    slots, own_code = slots_of(model), own_code_of(model, _WITHOUT_LOAD_STATE_DICT)
    there = set()
    for entry in entries:
        slot = slots.get(entry.name)
        if slot is not None and tuple(slot.value.shape) == entry.shape:
            there.add(id(slot.value))
        elif not own_code.takes(entry.name):
            return False
    parameters = {name: slot for name, slot in slots.items() if slot.is_parameter}
    return all(id(slot.value) in there or own_code.sees(name) for name, slot in parameters.items())


def _refuse_own_code(model: PreTrainedModel, request: Request) -> None:
    for prefix, what, _, _ in own_code_of(model, _WITHOUT_LOAD_STATE_DICT).pieces:
        raise FlashPackError(
            f"{request.footer.path} does not have the tensors of {type(model).__name__} as they are, and transformers, "
            f"which can convert them, passes over {what} of module {prefix.removesuffix('.')!r}"
        )


def _set_dtypes(model: PreTrainedModel, entries: list[Entry], request: Request) -> None:
    """Prepares the empty model for what assign_from_file makes of dtypes.

    When one is asked for, the modules that transformers keeps in float32 are no part of it. Else buffers, which have to
    agree, take the dtype that they have in the file, as parameters do without this.
    """
    kept = _kept_in_float32(model, request.dtype)
    dtypes = {entry.name: string_to_dtype(entry.dtype) for entry in entries}
    for name, slot in slots_of(model).items():
        value = slot.value
        if not value.is_floating_point():
            continue
        if kept is not None and slot.is_persistent and kept.search(name):
            value.data = value.data.float()
        elif request.dtype is None and not request.options["coerce_dtype"] and not slot.is_parameter:
            value.data = value.data.to(dtypes.get(name, value.dtype))


def _untie(model: PreTrainedModel, request: Request) -> None:
    """Does as transformers from version 5 on, which takes for tied only what is the same in the file."""
    values = _Values(request)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for tie in list(ties.items()):
        names = [name for name in values.entries if name in tie]
        if len(names) < 2:
            continue
        slot = slots_of(model)[names[1]]  # The first was assigned.
        value = values.read([names[1]])[names[1]].to(slot.value.dtype)
        if not torch.equal(value, slot.value):
            slot.put(make_parameter(slot.value, value))
            del ties[tie[0]]


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """What names of tensors match that stay float32 when the model is loaded as `dtype`."""
    kept: list[str] = []
    if dtype is torch.float16:
        kept += model._keep_in_fp32_modules or []
    if dtype in (torch.float16, torch.bfloat16):
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    return re.compile("|".join(part.replace("*", ".*") for part in kept)) if kept else None


class _Holder(torch.nn.Module):
    """Takes whatever tensors a file has, under their names, so that assign_from_file can read them."""

    def __init__(self, entries: list[Entry]) -> None:
        super().__init__()
        for entry in entries:
            empty = torch.empty(entry.shape, dtype=string_to_dtype(entry.dtype), device="meta")
            self._parameters[entry.name] = torch.nn.Parameter(empty, requires_grad=False)


class _Values:
    """The tensors of a file, read when one is asked for, all at once; each is given away once."""

    def __init__(self, request: Request) -> None:
        self.references: dict[str, Any] = {}
        """What keep_flash_ref_on_model leaves on a model."""
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
        """For transformers, which from version 5 on takes whatever gives a tensor when indexed.

        It reserves memory of a device before it looks at them. Were they there already, both would have to fit.
        """
        if _OLD:
            return {name: self.take(name) for name in self.entries}
        return {name: _Value(self, name) for name in self.entries}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """For these, whether they have been taken or not."""
        holder = _Holder([self.entries[name] for name in names])
        options = self._request.options | {"coerce_dtype": False, "strict": False}
        assign_from_file(holder, self._request.footer, self._request.device, **options)
        attributes = ("_flash_shared_storage", "_flash_shared_storage_meta")
        self.references |= {name: getattr(holder, name) for name in attributes if hasattr(holder, name)}
        return {name: parameter.data for name, parameter in holder._parameters.items() if parameter is not None}


@dataclass(frozen=True)
class _Value:
    """One of them, as transformers handles what is not read yet."""

    values: _Values
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.values.take(self.name)[index]


def _loaded_by_transformers(
    model_class: type[PreTrainedModel], config: PretrainedConfig, request: Request
) -> tuple[PreTrainedModel, dict[str, Any]]:
    values = _Values(request)
    main = request.dtype or _main_dtype(request.footer)
    arguments = dict(request.arguments)
    may_mismatch = arguments.pop("ignore_mismatched_sizes", False)
    if request.device != CPU:  # With a device map of any kind transformers asks for accelerate.
        arguments["device_map"] = {"": request.device}
    with blaming(request.directory, passed=(RuntimeError,)):
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=values.state_dict(),
            dtype=main,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
    _refuse_own_code(model, request)
    if not may_mismatch:
        _check_shapes(model, info, request)
    _check_names(model, info, request)
    if request.dtype is None and not request.options["coerce_dtype"] and getattr(model, "hf_quantizer", None) is None:
        _restore_dtypes(model, values)
    for name, reference in values.references.items():
        setattr(model, name, reference)
    warn_of_meta(model, request.footer.path)
    return model, info


def _check_shapes(model: PreTrainedModel, info: Mapping[str, Any], request: Request) -> None:
    shapes = {entry.name: list(entry.shape) for entry in request.entries()}
    for mismatched in info["mismatched_keys"]:
        # From version 5 on with the shapes, that of the file first.
        name, *found = (mismatched,) if isinstance(mismatched, str) else mismatched
        expected = list(slots_of(model)[name].value.shape)
        found = list(found[0]) if found else shapes.get(name)
        raise FlashPackError(f"{request.footer.path}: shape mismatch for {name!r}: model={expected} vs flash={found}")


def _check_names(model: PreTrainedModel, info: Mapping[str, Any], request: Request) -> None:
    """Applies the strict flags to what transformers found."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(name for name in info["missing_keys"] if not is_ignored_tensor_name(name, *request.filters))
    plan = Plan(
        {},
        unexpected=sorted(info["unexpected_keys"]),
        missing_parameters=[name for name in missing if name in parameters],
        missing_buffers=[name for name in missing if name not in parameters],
    )
    strict, strict_params, strict_buffers = (
        request.options[name] for name in ("strict", "strict_params", "strict_buffers")
    )
    check_strictness(plan, request.footer.path, strict, strict_params, strict_buffers)


def _restore_dtypes(model: PreTrainedModel, values: _Values) -> None:
    """Undoes that transformers gives all floating-point tensors the main dtype, or float32 to those it keeps so."""
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
            # It may have been converted to something else of that name.
            if torch.equal(value.to(slot.value.dtype), slot.value):
                slot.value.data = value
                restored.add(name)


def _finish(model: PreTrainedModel, request: Request, generation_config: GenerationConfig | None) -> None:
    model.eval()
    model.name_or_path = model.config.name_or_path = request.name
    with blaming(request.directory):
        _set_generation(model, request, generation_config)
    warn_of_meta(model, request.footer.path)


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
