"""The page of the API names every public call, and all of its arguments."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import reduce
from pathlib import Path
from typing import Any

import flashpack
import pytest

PAGE = Path(__file__).parent.parent.parent / "torch_binding" / "python" / "docs" / "api.md"
SECTIONS = dict(re.findall(r"^### `([\w.]+)`$(.*?)(?=^##|\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE))


def arguments_in(section: str) -> set[str]:
    """Returns the names at the beginning of the lines of a list."""
    lines = re.findall(r"^\* ((?:`\*{0,2}\w+`(?:, )?)+):", section, re.MULTILINE)
    return {name for line in lines for name in re.findall(r"\w+", line)}


def named(name: str) -> Any:
    place, _, rest = name.removeprefix("flashpack.").partition(".")
    if not rest:
        return getattr(flashpack, place)
    if name.startswith("flashpack."):
        parts = name.split(".")
        for count in range(len(parts) - 1, 0, -1):
            try:
                module = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError as error:
                if not error.name or not name.startswith(error.name):
                    pytest.skip(f"{error.name} is not installed")
                continue
            return reduce(getattr, parts[count:], module)
    return reduce(getattr, name.split("."), flashpack)


@pytest.mark.parametrize("name", SECTIONS)
def test_all_arguments_of_a_call_are_there_and_no_others(name):
    call = named(name)
    section = SECTIONS[name]
    try:
        parameters = set(inspect.signature(call).parameters)
    except ValueError:  # Written in C++.
        parameters = set()
    own = arguments_in(section)
    others = re.search(r"The other arguments are those of `(\w+)`", section)
    known = own | (arguments_in(SECTIONS[others[1]]) if others else set())
    assert own <= parameters, "arguments that it does not have"
    assert parameters - {"self", "cls", "args", "kwargs"} <= known, "arguments that the page lacks"


def test_every_public_call_is_there():
    calls = [name for name in flashpack.__all__ if inspect.isroutine(getattr(flashpack, name))]
    assert [name for name in calls if name not in SECTIONS] == []
