import pytest
import torch
from flashpack._casts import _is_equal, cast_exactly
from flashpack._native import FlashPackError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTEGRAL = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGRAL)
def test_a_float_past_the_greatest_integer_is_no_integer_of_that_dtype(device, dtype):
    end = torch.iinfo(dtype).max + 1
    with pytest.raises(FlashPackError, match="'weight' would lose values"):
        cast_exactly("weight", torch.tensor([float(end)], dtype=torch.float64, device=device), dtype)
    assert cast_exactly("weight", torch.tensor([end / 2.0], device=device), dtype).tolist() == [end // 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("own", "asked"),
    [
        (torch.int32, torch.float32),
        (torch.int64, torch.float32),
        (torch.int64, torch.float64),
        (torch.int64, torch.complex128),
        (torch.int16, torch.bfloat16),
        (torch.uint8, torch.float8_e5m2),
    ],
    ids=str,
)
def test_the_greatest_integer_is_no_float_that_is_rounded_up(device, own, asked):
    with pytest.raises(FlashPackError, match="would lose values"):
        cast_exactly("mask", torch.tensor([torch.iinfo(own).max], dtype=own, device=device), asked)
    assert cast_exactly("mask", torch.tensor([64], dtype=own, device=device), asked).to(torch.complex128).item() == 64


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    "own", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex32, torch.complex64], ids=str
)
@pytest.mark.parametrize("dtype", [*INTEGRAL, torch.bool], ids=str)
def test_every_kind_of_number_can_be_an_integer(own, dtype):
    one = torch.tensor([1.0]).to(own)
    assert cast_exactly("step", cast_exactly("step", one, dtype), own).dtype == own


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 0.5])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(FlashPackError, match="would lose values"):
        cast_exactly("step", torch.tensor([value], dtype=torch.float16), torch.int64)


def test_what_a_gpu_made_the_greatest_integer_is_not_taken_for_the_float():
    greatest = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert not _is_equal(torch.tensor([2.0**31]), greatest)
    assert not _is_equal(torch.tensor([2.0**31 + 0j]), greatest)
