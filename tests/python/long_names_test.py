"""Names in a file may be long, full of dots, and many: they take bounded work, and messages are short."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import flashpack
import pytest
import torch
from flashpack._logging import cut, shortened
from flashpack._name_hints import hint_of


class Hooked(torch.nn.Linear):
    """Has code of its own that is given all tensors below it."""

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


def refused(model: torch.nn.Module, path) -> None:
    with pytest.raises(flashpack.FlashPackError):
        flashpack.assign_from_file(model, path)


LOADS = {
    "device map": lambda path: flashpack.load_file(path, device_map={"": "cpu", "a.b": "cpu"}),
    "stream": lambda path: list(flashpack.stream_tensors(path, device_map={"": "cpu", "a.b": "cpu"})),
    "module": lambda path: refused(torch.nn.Linear(2, 2), path),
    "own code": lambda path: refused(torch.nn.Sequential(torch.nn.Sequential(Hooked(2, 2))), path),
}


def calls_of(function: Callable[[], object]) -> int:
    """Returns how many calls this thread makes of functions, and of generators for each item, in Python and C."""
    before, count = sys.getprofile(), 0

    def one_more(*_) -> None:
        nonlocal count
        count += 1

    sys.setprofile(one_more)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("letters", [".", "a.", "0."])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_load_makes_no_more_calls_for_a_name_of_more_dots(load, letters, pack):
    few, many = (pack({letters * count: torch.zeros(1)}) for count in (1_000, 20_000))
    load(few)  # It does what is done once in a process.
    assert calls_of(lambda: load(many)) < calls_of(lambda: load(few)) + 200


def test_the_text_behind_a_message_is_found_without_trying_every_dot():
    few, many = ("." * count + "b" for count in (1_000, 20_000))
    for names in ([few, "a"], [many, "a"]):
        assert hint_of(names[:1], ["c"]) == hint_of(["c"], names[:1]) == ""
    assert calls_of(lambda: hint_of([many], ["c"])) == calls_of(lambda: hint_of([few], ["c"]))


def test_of_several_beginnings_the_shortest_is_the_one_that_the_text_names():
    assert "begin with 'x.'" in hint_of(["x.a.b", "x.c"], ["b", "a.b", "c"])
    assert "begin with 'x.y.'" in hint_of(["x.y.a.b"], ["b", "a.b"])
    assert hint_of(["x.a", "y.b"], ["a", "b"]) == ""


@pytest.mark.parametrize("name", ["a" * 100_000, "module." + "a." * 50_000 + "weight"], ids=["plain", "dotted"])
def test_a_message_does_not_hold_the_whole_of_a_long_name(name, pack, caplog):
    with caplog.at_level(logging.INFO, "flashpack"):
        with pytest.raises(flashpack.FlashPackError, match=r"Could not assign 1 names: \['(a|module)") as caught:
            flashpack.assign_from_file(torch.nn.Linear(2, 2), pack({name: torch.zeros(1)}))
        report = flashpack.assign_from_file(torch.nn.Linear(2, 2), pack({name: torch.zeros(1)}), strict=False)
    assert f"{name[:200]}... and {len(name) - 200} characters more" in str(caught.value)
    assert report.unexpected == (name,)
    assert max(map(len, [str(caught.value), caplog.text, repr(report)])) < 5_000


def test_a_message_names_the_first_of_many_names_and_says_how_many_more_there_are(pack, caplog):
    path = pack({f"extra.{number:04d}": torch.zeros(1) for number in range(5_000)})
    with pytest.raises(flashpack.FlashPackError) as caught:
        flashpack.assign_from_file(torch.nn.Linear(2, 2), path)
    assert "Could not assign 5000 names: ['extra.0000', " in str(caught.value)
    assert str(caught.value).endswith("'extra.0019', and 4980 more]")
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(5_000)))
    with pytest.raises(flashpack.FlashPackError, match=r"Missing 5000 parameters: \['0.weight', .*, and 4980 more\]$"):
        flashpack.assign_from_file(model, path, strict_params=True, ignore_prefixes=["extra"])
    with caplog.at_level(logging.INFO, "flashpack"):
        flashpack.assign_from_file(model, path, strict=False)
    assert all(f"{side}: ['" in caplog.text for side in ("not in the model", "not in the file"))
    assert len(caplog.text) < 5_000
    with pytest.raises(flashpack.FlashPackError, match=r"has no tensors \['0', '1', .*, and 80 more\]$"):
        flashpack.load_file(path, names=map(str, range(100)))


def test_names_of_an_ordinary_number_and_length_are_shown_whole():
    names = [f"layers.{number}." + "a" * 150 for number in range(20)]
    assert shortened(names) == str(names)
    assert shortened([]) == "[]"
    assert cut("a" * 200) == "a" * 200
    assert cut("a" * 201) == "a" * 200 + "... and 1 characters more"
