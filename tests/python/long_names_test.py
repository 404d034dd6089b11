"""Names in a file may be long and many: messages about them are short."""

from __future__ import annotations

import logging

import flashpack
import pytest
import torch
from flashpack._logging import cut, shortened


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
