"""A dtype that is asked for, wherever it can be."""

from __future__ import annotations

import flashpack
import pytest
import torch
from flashpack.commands import convert_to_flashpack
from support import assert_bit_equal

# Those of a model whose weights are packed, and of one whose values say nothing without a scale.
TENSORS = {
    "packed.qweight": torch.tensor([[-(2**31), 2**31 - 1]], dtype=torch.int32),
    "packed.zeros": torch.tensor([255], dtype=torch.uint8),
    "norm.num_batches_tracked": torch.tensor(5),
    "mask": torch.tensor([True, False]),
    "scaled": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    "spectrum": torch.tensor([1 + 2j]),
    "weight": torch.tensor([0.1, 3e38]),
    "double": torch.tensor([0.1], dtype=torch.float64),
}
CAST = TENSORS | {name: TENSORS[name].bfloat16() for name in ("weight", "double")}


def save(tensors, path, dtype):
    flashpack.pack_to_file(tensors, path, target_dtype=dtype)
    return flashpack.revert_from_file(path)


def convert(tensors, path, dtype):
    torch.save(tensors, path.with_suffix(".pt"))
    return flashpack.revert_from_file(convert_to_flashpack(path.with_suffix(".pt"), dtype=dtype))


def load(tensors, path, dtype):
    flashpack.pack_to_file(tensors, path)
    return flashpack.load_file(path, dtype=dtype)


def assign(tensors, path, dtype):
    flashpack.pack_to_file(tensors, path)
    model = torch.nn.Module()
    for number, tensor in enumerate(tensors.values()):
        model.register_buffer(str(number), torch.empty_like(tensor))
    stand_in = dict(zip(map(str, range(len(tensors))), tensors.values(), strict=True))
    flashpack.pack_to_file(stand_in, path)
    flashpack.assign_from_file(model, path, dtype=dtype)
    return dict(zip(tensors, model.state_dict().values(), strict=True))


def stream(tensors, path, dtype):
    flashpack.pack_to_file(tensors, path)
    return dict(flashpack.stream_tensors(path, dtype=dtype))


WAYS = pytest.mark.parametrize("way", [save, convert, load, assign])


@WAYS
def test_a_floating_point_dtype_is_for_floating_point_tensors_and_no_others(way, tmp_path):
    assert_bit_equal(way(TENSORS, tmp_path / "a.flashpack", torch.bfloat16), CAST)


@WAYS
def test_a_complex_dtype_is_for_complex_tensors_and_no_others(way, tmp_path):
    expected = TENSORS | {"spectrum": TENSORS["spectrum"].to(torch.complex128)}
    assert_bit_equal(way(TENSORS, tmp_path / "a.flashpack", torch.complex128), expected)


@pytest.mark.parametrize("way", [load, assign, stream])
@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_asked_for_by_the_name_that_torch_has_for_it(way, name, tmp_path):
    assert_bit_equal(way(TENSORS, tmp_path / "a.flashpack", name), CAST)


@pytest.mark.parametrize("way", [load, assign, stream])
@pytest.mark.parametrize("name", ["bfloat17", "Tensor", "", 16])
def test_what_names_no_dtype_is_refused_with_an_example_of_what_does(way, name, tmp_path):
    with pytest.raises(flashpack.FlashPackError, match=f"dtype={name!r} is neither .* such as 'bfloat16'"):
        way(TENSORS, tmp_path / "a.flashpack", name)


@WAYS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_a_dtype_that_would_cut_off_what_numbers_are_is_refused(way, dtype, tmp_path):
    with pytest.raises(flashpack.FlashPackError, match=str(dtype)):
        way(TENSORS, tmp_path / "a.flashpack", dtype)


def test_a_file_of_integers_may_be_asked_for_in_the_dtype_that_they_have_and_in_no_other(tmp_path):
    path = tmp_path / "a.flashpack"
    tensors = {"ids": torch.tensor([300]), "more": torch.tensor([1])}
    assert_bit_equal(save(tensors, path, torch.int64), tensors)
    with pytest.raises(flashpack.FlashPackError, match=r"could lose values of 2 tensors: \['ids', 'more'\]"):
        save(tensors, path, torch.uint8)
    assert_bit_equal(flashpack.revert_from_file(path), tensors)


def test_weights_that_are_no_integers_may_be_saved_as_8_bit_floats(tmp_path):
    saved = save({"weight": TENSORS["weight"], "ids": torch.tensor([300])}, tmp_path / "a", torch.float8_e5m2)
    assert saved["weight"].dtype is torch.float8_e5m2
    assert saved["ids"].tolist() == [300]


def coerced(value, into, path):
    model = torch.nn.Module()
    model.register_buffer("x", torch.zeros(value.shape, dtype=into))
    flashpack.pack_to_file({"x": value}, path)
    try:
        flashpack.assign_from_file(model, path, coerce_dtype=True)
    finally:
        assert model.x.dtype is into
    return model.x


@pytest.mark.parametrize(
    ("value", "into"),
    [
        (torch.tensor([5.0, -3.0], dtype=torch.bfloat16), torch.int64),
        (torch.tensor([5, 255], dtype=torch.uint8), torch.bfloat16),
        (torch.tensor([2**31 - 1]), torch.int32),
        (torch.tensor([1, 0]), torch.bool),
        (torch.tensor([2.0 + 0j]), torch.float32),
        (torch.tensor([448.0]).to(torch.float8_e4m3fn), torch.int16),
    ],
)
def test_coercing_between_kinds_is_fine_where_no_value_changes(value, into, tmp_path):
    assert torch.equal(coerced(value, into, tmp_path / "a"), value.to(into))


@pytest.mark.parametrize(
    ("value", "into"),
    [
        (torch.tensor([0.5]), torch.int64),
        (torch.tensor([float("nan")]), torch.int64),
        (torch.tensor([257]), torch.bfloat16),
        (torch.tensor([2**53 + 1]), torch.float64),
        (torch.tensor([200], dtype=torch.uint8), torch.int8),
        (torch.tensor([-1]), torch.uint64),
        (torch.tensor([2]), torch.bool),
    ],
)
def test_coercing_between_kinds_is_an_error_where_a_value_would_change(value, into, tmp_path):
    with pytest.raises(flashpack.FlashPackError, match=r"'x' would lose values if it were cast from torch\.\w+ to"):
        coerced(value, into, tmp_path / "a")


def scaled_model(*names):
    model = torch.nn.Module()
    for name in names:
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    return model


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("coerce_dtype", torch.float8_e4m3fn), ("coerce_dtype", torch.int8), ("in_place", torch.float8_e5m2)],
)
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_quantised_weights_that_are_cast_without_their_scales_are_told_once(tmp_path, caplog, option, dtype, suffix):
    quantised = torch.tensor([1.0, 16.0]).to(dtype)
    tensors = {"a": quantised, f"a{suffix}": torch.ones(2), "b": quantised, f"b{suffix}": torch.ones(2)}
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file(tensors, path)
    model = scaled_model("a", "b")
    flashpack.assign_from_file(model, path, strict=False, **{option: True})
    assert model.a.tolist() == model.b.tolist() == [1.0, 16.0]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{path}: 'a' is cast from {dtype} to torch.bfloat16 without its scale 'a{suffix}'" in warning
    assert warning.endswith("tensors of this kind: 2")


@pytest.mark.parametrize(
    ("names", "options"),
    [(["a", "b"], {}), (["a", "a_scale_inv"], {"coerce_dtype": True}), (["a"], {"dtype": "bfloat16"})],
    ids=["as they are", "with their scales", "not cast"],
)
def test_quantised_weights_are_not_told_of_without_a_cast_or_with_their_scales(tmp_path, caplog, names, options):
    quantised = torch.tensor([1.0, 16.0]).to(torch.float8_e4m3fn)
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file({"a": quantised, "a_scale_inv": torch.ones(2)}, path)
    flashpack.assign_from_file(scaled_model(*names), path, strict=False, **options)
    assert caplog.records == []
