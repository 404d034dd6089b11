"""The arguments of stream_tensors."""

from __future__ import annotations

import re
from pathlib import Path

import flashpack
import numpy as np
import pytest
import torch
from support import assert_bit_equal, random_tensor


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"{i:02}": random_tensor((300 - i,), seed=i) for i in range(12)}


@pytest.fixture
def path(pack, tensors) -> Path:
    return pack(tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "size"}, "order must be"),
        ({"order": "names"}, "needs a list"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"verify": "perhaps"}, "verify must be"),
        ({"device": "nowhere"}, "nowhere"),
        ({"device": True}, "True"),
        ({"device_map": {"": "nowhere"}}, "nowhere"),
        ({"names": 5}, "names must be .*, got 5"),
        ({"names": b"ab"}, "names must be .*, got b'ab'"),
        ({"names": ["00", 5]}, "names must be .*, got .*which has 5"),
        *(
            ({"window_bytes": value}, f"window_bytes must be a positive integer, got {re.escape(repr(value))}")
            for value in ("4", True, np.True_, 0, -1, np.int64(-1), 1.5, None)
        ),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(path, options, message):
    with pytest.raises(flashpack.FlashPackError, match=message):
        flashpack.stream_tensors(path, **options)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (5, TypeError, "not a int"),
        (["a", None], TypeError, "not a NoneType"),
        ("a\0b", flashpack.FlashPackError, "NUL character"),
        ([], flashpack.FlashPackError, "list of paths is empty"),
    ],
)
def test_paths_that_are_none_are_refused_at_the_call(wrong, error, message):
    with pytest.raises(error, match=message):
        flashpack.stream_tensors(wrong)


@pytest.mark.parametrize("window_bytes", [np.int64(4096), np.uint32(4096), np.array(4096)])
def test_a_window_may_be_an_integer_of_numpy(path, tensors, window_bytes):
    assert_bit_equal(dict(flashpack.stream_tensors(path, window_bytes=window_bytes)), tensors)


def test_one_name_is_a_list_of_one_and_iterators_are_lists(path, tensors):
    assert [name for name, _ in flashpack.stream_tensors(path, names="07", order="names")] == ["07"]
    assert {name for name, _ in flashpack.stream_tensors(path, names=iter(["07", "03"]))} == {"03", "07"}
    assert_bit_equal(dict(flashpack.stream_tensors(iter([path]))), tensors)


def test_what_the_caller_does_with_his_lists_after_the_call_changes_nothing(path):
    names, paths = ["07", "03"], [path]
    stream = flashpack.stream_tensors(paths, names=names, order="names")
    names.reverse()
    paths.clear()
    assert [name for name, _ in stream] == ["07", "03"]
