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


def inherited_by(section: str) -> tuple[set[str], set[str]]:
    """Returns the arguments that a call has from another one, and those that it does not have from there."""
    found = re.search(r"The other arguments are those of\s`(\w+)`(?:, but\sfor\s([^.]*))?\.", section)
    if found is None:
        return set(), set()
    left_out = set(re.findall(r"`(\w+)`", found[2] or ""))
    # Arguments without a default, the model and the path, belong to the other call alone.
    parameters = inspect.signature(named(found[1])).parameters.values()
    optional = {each.name for each in parameters if each.default is not each.empty}
    inherited = arguments_in(SECTIONS[found[1]]) & optional
    assert left_out <= inherited, "arguments that the other call does not have"
    return inherited - left_out, left_out


def taken_by_kwargs(section: str) -> set[str]:
    """Returns the names that the line of `**kwargs` has."""
    return {
        name
        for line in re.findall(r"^\* `\*\*kwargs`:(.*(?:\n  .*)*)", section, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line)
    }


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
    inherited, left_out = inherited_by(section)
    assert own <= parameters, "arguments that it does not have"
    assert parameters - {"self", "cls", "args", "kwargs"} <= own | inherited, "arguments that the page lacks"
    assert inherited - own <= parameters | taken_by_kwargs(section), "inherited arguments that it does not have"
    assert not left_out & parameters, "arguments that it has all the same"


def test_every_public_call_is_there():
    calls = [name for name in flashpack.__all__ if inspect.isroutine(getattr(flashpack, name))]
    assert [name for name in calls if name not in SECTIONS] == []
