from __future__ import annotations

import flashpack
import pytest
import torch
from flashpack import commands
from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file
from support import DTYPES, assert_bit_equal, random_tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_returns_bit_for_bit(dtype, pack):
    source = {
        "m": random_tensor((37, 5), dtype),
        "zero_dim": random_tensor((), dtype, 1),
        "none": random_tensor((0, 3), dtype),
    }
    path = pack(source)
    assert_bit_equal(flashpack.revert_from_file(path), source)
    assert_bit_equal(dict(iterate_from_flash_tensor(*read_flashpack_file(path))), source)


@pytest.mark.parametrize("align_bytes", [0, 1, 24, 128, 4096])
def test_all_dtypes_share_a_file_at_any_alignment(align_bytes, pack):
    source = {str(dtype): random_tensor((11, 3), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    assert_bit_equal(flashpack.revert_from_file(pack(source, align_bytes=align_bytes)), source)


def test_megabytes_of_odd_sizes_return_bit_for_bit(pack):
    sizes = [3_000_001, 1_048_576, 524_287, 4096, 1]
    source = {str(size): random_tensor((size,), torch.float32, size) for size in sizes}
    path = pack(source)
    assert_bit_equal(flashpack.revert_from_file(path), source)
    assert_bit_equal(dict(iterate_from_flash_tensor(*read_flashpack_file(path))), source)


def test_what_is_not_contiguous_is_written_as_its_values(pack):
    base = torch.randn(4, 6, 2, 2)
    source = {
        "transposed": base.transpose(0, 1),
        "channels_last": base.to(memory_format=torch.channels_last),
        "strided": base[::2, ::3],
        "expanded": torch.randn(1, 3).expand(5, 3),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "with_grad": torch.randn(3, requires_grad=True),
    }
    expected = {name: tensor.detach().resolve_conj().resolve_neg().contiguous() for name, tensor in source.items()}
    assert_bit_equal(flashpack.revert_from_file(pack(source)), expected)


@pytest.mark.parametrize("name", ["", "\0", "ключ.重み.🔑", 'quote"\\slash/\b\f\n\r\t\x7f', "a" * 10_000])
def test_any_text_can_be_a_name(name, pack):
    assert list(flashpack.revert_from_file(pack({name: torch.ones(1)}))) == [name]


@pytest.mark.parametrize(
    "tensors",
    [{"a": torch.empty(0)}, {"a": torch.empty(2, 0), "b": torch.empty(0, dtype=torch.int64)}],
    ids=["one dtype", "two dtypes"],
)
def test_tensors_that_are_all_empty_are_written_and_read_in_every_way(tensors, tmp_path):
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file(tensors, path)
    for read in (
        flashpack.load_file,
        lambda path: flashpack.load_file(path, mmap=True),
        lambda path: flashpack.load_file(path, verify="always"),
        flashpack.revert_from_file,
        lambda path: dict(flashpack.stream_tensors(path)),
        lambda path: {name: flashpack.open_file(path).get(name) for name in tensors},
        lambda path: dict(iterate_from_flash_tensor(*read_flashpack_file(path))),
    ):
        assert_bit_equal(read(path), tensors)
    assert flashpack.verify_file(path)["corrupt"] == []
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, torch.empty_like(tensor))
    assert flashpack.assign_from_file(model, path).assigned == tuple(tensors)
    reverted = commands.revert_from_flashpack(path)
    path.unlink()
    assert_bit_equal(flashpack.load_file(commands.convert_to_flashpack(reverted)), tensors)
