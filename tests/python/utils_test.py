from __future__ import annotations

import numpy as np
import pytest
import torch
from flashpack import FlashPackError, _native, utils
from support import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_have_names_widths_and_carriers(dtype):
    name = utils.dtype_to_string(dtype)
    assert utils.string_to_dtype(name) is dtype
    assert _native.element_bytes(name) == dtype.itemsize
    carrier = utils.get_packing_dtype(dtype)
    assert np.dtype(utils.torch_dtype_to_numpy_dtype(dtype)).itemsize == _native.element_bytes(name)
    assert utils.torch_dtype_to_numpy_dtype(carrier) is utils.torch_dtype_to_numpy_dtype(dtype)


@pytest.mark.parametrize("name", ["Tensor", "nonsense", "", "nn"])
def test_names_that_are_no_dtypes_are_refused(name):
    with pytest.raises(FlashPackError, match="Unsupported dtype string"):
        utils.string_to_dtype(name)


def test_dtypes_without_a_carrier_are_refused():
    with pytest.raises(FlashPackError, match="Unsupported dtype for packing"):
        utils.torch_dtype_to_numpy_dtype(torch.quint8)
    with pytest.raises(FlashPackError, match="Unsupported dtype"):
        utils.dtype_to_string("float32")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00ns"),
        (0.0425, "42.50ms"),
        (1.0, "1.00s"),
        (59.99, "59.99s"),
        (60, "1m0s"),
        (3600, "1h0m0s"),
        (90061, "25h1m1s"),
    ],
)
def test_durations_read_well(seconds, text):
    assert utils.human_duration(seconds) == text


@pytest.mark.parametrize(("elements", "text"), [(0, "0"), (1000, "1000"), (1001, "1.00K"), (7_250_000_000, "7.25B")])
def test_counts_read_well(elements, text):
    assert utils.human_num_elements(elements) == text


def test_a_timer_prints_unless_silent(capsys):
    with utils.timer("work"):
        pass
    with utils.timer("hidden", silent=True):
        pass
    out = capsys.readouterr().out
    assert out.startswith("work: ")
    assert "hidden" not in out


def test_filters_match_whole_names_beginnings_and_ends():
    names = dict.fromkeys(["a", "ab", "b.a", "c"])
    assert list(utils.filter_state_dict(names, ignore_names=["a"])) == ["ab", "b.a", "c"]
    assert list(utils.filter_state_dict(names, ignore_prefixes=["a"])) == ["b.a", "c"]
    assert list(utils.filter_state_dict(names, ignore_suffixes=["a", "b"])) == ["c"]
    assert list(utils.filter_state_dict(names, [], [], [])) == list(names)


def test_names_lead_to_modules():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert utils.get_module_and_attribute(model, "0.bias") == (model[0], "bias")
    assert utils.get_module_and_attribute(model, "own") == (model, "own")
    with pytest.raises(AttributeError):
        utils.get_module_and_attribute(model, "1.bias")
