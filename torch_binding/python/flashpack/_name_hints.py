"""Names of tensors that torch's wrappers have changed. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection

from ._logging import cut

_COMPILED = "_orig_mod."
_OF_COMPILED = re.compile(r"(^|\.)_orig_mod\.")


def hint_of(only_in_file: Collection[str], only_in_model: Collection[str]) -> str:
    """Returns what distinguishes the names that only a file has from those that only a model has, and the cure.

    The text goes behind a message. It is empty if the names differ otherwise.
    """
    if not only_in_file or not only_in_model:
        return ""
    file, model = set(only_in_file), set(only_in_model)
    if {without_compiled(name) for name in file} & model:
        return (
            f"; the file has {_COMPILED!r} in its names, which torch.compile puts there: load into the compiled module "
            f"or save with pack_to_file(..., strip_compiled=True) (flashpack convert --strip-compiled)"
        )
    if file & {without_compiled(name) for name in model}:
        return f"; the model has {_COMPILED!r} in its names: load into the module that was compiled, its _orig_mod"
    if prefix := _prefix(file, model):
        begin, module = cut(prefix), cut(prefix[:-1])
        return (
            f"; the names in the file begin with {begin!r}, those of the model do not: load into a module that has "
            f"the model below {module!r}, or load_file() the tensors and rename them"
        )
    if prefix := _prefix(model, file):
        begin, module = cut(prefix), cut(prefix[:-1])
        return f"; names of the model begin with {begin!r}, those in the file do not: load into its {module!r}"
    return ""


def without_compiled(name: str) -> str:
    """Returns the name that a tensor had before its module, or one above or below that, was compiled."""
    return _OF_COMPILED.sub(r"\1", name)


def _prefix(longer: set[str], shorter: set[str]) -> str:
    """Returns the beginning that all of `longer` have and without which one of them is in `shorter`."""
    first = min(longer)
    # The ends that are names are looked for, not the beginnings that end in a dot: a forged name may have millions.
    rest = max((name for name in shorter if first.endswith(f".{name}")), key=len, default=first)
    prefix = first.removesuffix(rest)
    return prefix if all(name.startswith(prefix) for name in longer) else ""
