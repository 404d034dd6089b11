from __future__ import annotations

import json

import flashpack
import pytest
import torch
from support import GOLDEN_FILES, footer_bytes

# How each file was made where that is more than packing its own tensors in their own order.
SOURCES = {
    "v3_f32_align128": lambda t: {name: t[name] for name in "bws"},
    "v3_ties_align0": lambda t: {name: t[name] for name in "cab"},
}


def test_all_fifteen_golden_files_are_here():
    assert len(GOLDEN_FILES) == 15


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_packing_the_tensors_of_a_golden_file_gives_its_bytes(path, tmp_path):
    metadata = flashpack.get_flashpack_file_metadata(path)
    tensors = flashpack.revert_from_file(path)
    again = tmp_path / "again"
    flashpack.pack_to_file(
        tensors, again, name_order=list(tensors), align_bytes=metadata["align_bytes"], checksum=False
    )
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_metadata_is_the_parsed_footer_key_by_key(path):
    expected = json.loads(footer_bytes(path))
    assert json.dumps(flashpack.get_flashpack_file_metadata(path)) == json.dumps(expected)


@pytest.mark.parametrize("stem", SOURCES)
def test_default_order_is_largest_first_and_keeps_ties_in_place(stem, tmp_path):
    path = next(path for path in GOLDEN_FILES if path.stem == stem)
    metadata = flashpack.get_flashpack_file_metadata(path)
    again = tmp_path / "again"
    tensors = SOURCES[stem](flashpack.revert_from_file(path))
    flashpack.pack_to_file(tensors, again, align_bytes=metadata["align_bytes"], checksum=False)
    assert again.read_bytes() == path.read_bytes()


def test_a_target_dtype_makes_the_file_of_tensors_that_had_it_before(tmp_path):
    target, cast = tmp_path / "target", tmp_path / "cast"
    tensors = {"b": torch.linspace(-3, 70001, 35), "a": torch.tensor([[1.5, 0.1]], dtype=torch.float64)}
    flashpack.pack_to_file(tensors, target, torch.float16)
    flashpack.pack_to_file({name: tensor.half() for name, tensor in tensors.items()}, cast)
    assert target.read_bytes() == cast.read_bytes()
