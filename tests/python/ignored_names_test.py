"""Names that are given: one string is one name, and what can be read only once is read only once."""

from __future__ import annotations

import flashpack
import numpy as np
import pytest
import torch
from flashpack import commands
from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file
from flashpack.utils import filter_state_dict, is_ignored_tensor_name

NAMES = ("encoder.a", "encoder.b", "decoder.a", "nce", "e")


def loaded(path, **ignored):
    return flashpack.load_file(path, **ignored)


def assigned(path, **ignored):
    model = torch.nn.Module()
    for name in NAMES:
        owner = model
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(name.split(".")[-1], torch.nn.Parameter(torch.zeros(2)))
    return flashpack.assign_from_file(model, path, **ignored).assigned


def iterated(path, **ignored):
    return dict(iterate_from_flash_tensor(*read_flashpack_file(path), **ignored))


def filtered(path, **ignored):
    return filter_state_dict(flashpack.load_file(path), **ignored)


def converted(path, **ignored):
    commands.convert_to_flashpack(flashpack.load_file(path), f"{path}.again", **ignored)
    return flashpack.load_file(f"{path}.again")


@pytest.mark.parametrize("way", [loaded, assigned, iterated, filtered, converted])
@pytest.mark.parametrize(
    ("ignored", "left"),
    [
        ({"ignore_prefixes": "encoder"}, ["decoder.a", "e", "nce"]),
        ({"ignore_names": "encoder.a"}, ["decoder.a", "e", "encoder.b", "nce"]),
        ({"ignore_suffixes": "coder.a"}, ["e", "encoder.b", "nce"]),
        ({"ignore_names": ["e", "nce"]}, ["decoder.a", "encoder.a", "encoder.b"]),
        ({"ignore_prefixes": ["e"], "ignore_suffixes": [".a"]}, ["nce"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("given_as", [list, iter, np.array], ids=["list", "iterator", "array"])
def test_what_is_named_and_nothing_else_is_ignored(way, ignored, left, given_as, pack):
    path = pack({name: torch.ones(2) for name in NAMES})
    ignored = {key: names if isinstance(names, str) else given_as(names) for key, names in ignored.items()}
    assert sorted(way(path, **ignored)) == left


def test_one_name_is_one_name_for_the_order_too(pack):
    source = {name: torch.ones(2) for name in NAMES}
    assert set(flashpack.load_file(pack(source, name_order="nce"))) == {"nce"}
    assert not is_ignored_tensor_name("e", "nce")
