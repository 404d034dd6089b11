"""Everything that a caller can ask of a load, in one object that is handed on."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ._casts import dtype_when_asked
from ._checkpoint import Entry
from ._native import FlashPackError
from ._transfers import ReadOptions
from .utils import is_ignored_tensor_name, listed, string_to_dtype

Names = Collection[str] | None


def positive_integer(name: str, value: Any) -> int:
    """Returns the value of the argument `name`, which may be an integer of numpy. Raises FlashPackError for others."""
    # numpy before 2.3 takes its truth values for indices.
    is_truth = isinstance(value, bool) or getattr(value, "dtype", None) == "bool"
    try:
        number = 0 if is_truth else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise FlashPackError(f"{name} must be a positive integer, got {value!r}")
    return number


class Filters(NamedTuple):
    """The tensors that are neither read nor required."""

    ignore_names: Names = None
    ignore_prefixes: Names = None
    ignore_suffixes: Names = None

    @classmethod
    def of(cls, names: Iterable[str] | None, prefixes: Iterable[str] | None, suffixes: Iterable[str] | None) -> Filters:
        """Returns filters that can be used any number of times, even if a caller gave iterators."""
        return cls(listed(names), listed(prefixes), listed(suffixes))

    def ignore(self, name: str) -> bool:
        return not self._are_absent() and is_ignored_tensor_name(name, *self)

    def without_ignored(self, entries: list[Entry]) -> list[Entry]:
        """Returns the entries that are not ignored. Without filters, no entry is asked for."""
        return entries if self._are_absent() else [entry for entry in entries if not self.ignore(entry.name)]

    def after_renaming(self, names: Iterable[str], renamed: Mapping[str, str], of_model: Iterable[str]) -> Filters:
        """Returns filters for a file whose `names` are `renamed`, to those of a model that has the names `of_model`.

        They ignore the same tensors of the file, and the same names of the model that the file lacks.
        """
        new_names = {renamed.get(name, name): name for name in names}
        ignored = [new for new, name in new_names.items() if self.ignore(name)]
        return Filters([*ignored, *(name for name in of_model if name not in new_names and self.ignore(name))])

    def _are_absent(self) -> bool:
        # A caller's array of names compares by element, and so has no single answer to `== None`.
        return self.ignore_names is self.ignore_prefixes is self.ignore_suffixes is None

    def also(self, names: Iterable[str]) -> Filters:
        """Returns filters that ignore these names, too."""
        return self._replace(ignore_names=[*(self.ignore_names or ()), *names])


class Strictness(NamedTuple):
    """The differences between the names of a file and those of a model that are errors."""

    strict: bool | None = None
    """Stands for both of the others, unless it is None."""
    strict_params: bool = True
    strict_buffers: bool = False


class Casts(NamedTuple):
    """The dtypes that the tensors of a file are given."""

    coerce: bool = False
    """Tensors take the dtypes of the module."""
    asked: torch.dtype | None = None
    """See dtype_when_asked."""

    def dtype_of(self, entry: Entry, old: torch.Tensor) -> torch.dtype:
        """Returns the dtype that `entry` has once it is in the place of `old`."""
        return old.dtype if self.coerce else self.dtype_of_any(entry)

    def dtype_of_any(self, entry: Entry) -> torch.dtype:
        """Returns the dtype that `entry` has where nothing is known of its place."""
        return dtype_when_asked(string_to_dtype(entry.dtype), self.asked)


class Sharing(NamedTuple):
    """The arguments for a load that the ranks of a process group share."""

    use_distributed_loading: bool = False
    distributed_sharded: bool = False
    distributed_shard_strategy: str | None = None
    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None


class LoadOptions(NamedTuple):
    """The arguments of assign_from_file, but for the model and the file."""

    device: str | torch.device | None
    filters: Filters
    strictness: Strictness
    casts: Casts
    reading: ReadOptions
    sharing: Sharing
    keep_storage: bool
    """Whether the model keeps the macroblocks that were read, and the footer."""
    in_place: bool = False
    """Whether tensors keep their memory, and are read into it."""

    def keywords(self) -> dict[str, Any]:
        """Returns what from_flashpack() and from_pretrained_flashpack() call these options, but for `dtype`."""
        return {
            "device": self.device,
            **self.filters._asdict(),
            **self.strictness._asdict(),
            **self.sharing._asdict(),
            "coerce_dtype": self.casts.coerce,
            "mmap": self.reading.mmap,
            "verify": self.reading.verify,
            "silent": not self.reading.show,
            "keep_flash_ref_on_model": self.keep_storage,
        }
