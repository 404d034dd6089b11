"""Safetensors files, where flashpack files are expected."""

from __future__ import annotations

import flashpack
import pytest
import safetensors.torch
import torch
from support import assert_bit_equal

LEGACY_CALLS = [
    flashpack.get_flashpack_file_metadata,
    flashpack.read_flashpack_file,
    lambda path: flashpack.read_flashpack_file(path, metadata={"format": "flashpack_v3"}),
    lambda path: flashpack.open_file(path).metadata,
    lambda path: flashpack.assign_from_file(torch.nn.Linear(2, 3), path, keep_flash_ref_on_model=True),
]


@pytest.fixture
def path(tmp_path):
    tensors = {"weight": torch.arange(6.0).view(3, 2), "bias": torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_safetensors_file_is_no_flashpack_file_whatever_its_name(path):
    assert not flashpack.is_flashpack_file(path)
    assert not flashpack.is_flashpack_file(path.rename(path.with_suffix(".flashpack")))


@pytest.mark.parametrize("call", LEGACY_CALLS)
def test_what_needs_a_footer_says_that_safetensors_files_have_none_and_what_takes_them(path, call):
    with pytest.raises(flashpack.FlashPackError, match=r"model\.safetensors is a safetensors file.* load_file"):
        call(path)


def test_the_refusal_comes_before_the_model_is_touched(path):
    model = torch.nn.Linear(2, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(flashpack.FlashPackError):
        flashpack.assign_from_file(model, path, keep_flash_ref_on_model=True)
    assert_bit_equal(dict(model.state_dict()), before)


def test_four_bit_floats_are_written_and_read_as_their_bytes(tmp_path):
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no float4_e2m1fn_x2")
    bits = torch.arange(256, dtype=torch.uint8)
    tensors = {
        "rows": bits.view(torch.float4_e2m1fn_x2).view(16, 16),
        "columns": bits.view(torch.float4_e2m1fn_x2).view(16, 16).t(),
    }
    flashpack.pack_to_file(tensors, tmp_path / "a.flashpack")
    loaded = flashpack.load_file(tmp_path / "a.flashpack")
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))
