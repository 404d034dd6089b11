from __future__ import annotations

import errno
import mmap

import flashpack
import pytest
import torch
from flashpack import _memory
from flashpack._device import CPU
from flashpack._footer import open_footer
from support import assert_bit_equal, bits, random_tensor, write_file

MIB = 1 << 20


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (12345, 100_000), (0, 3 * MIB), (5 * MIB + 128, 3 * MIB + 7)])
def test_memory_has_the_phase_of_its_file_offset(offset, size):
    block = _memory.allocate_block(offset, size)
    phase = 2 * MIB if size >= 2 * MIB else mmap.PAGESIZE
    assert block.address % phase == offset % phase
    tensor = block.tensor(torch.uint8, (size,), 0)
    assert tensor.data_ptr() == block.address
    assert not tensor.any()


def test_memory_lives_as_long_as_its_last_tensor():
    block = _memory.allocate_block(0, 3 * MIB)
    tensor = block.tensor(torch.int32, (2, 3), 64)
    tensor.copy_(torch.arange(6).view(2, 3))
    del block
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tensors_of_a_block_are_no_views_and_count_versions_apart():
    block = _memory.allocate_block(0, 4096)
    tensors = [block.tensor(torch.float32, shape, 128 * n) for n, shape in enumerate([(4,), (), (2, 2)])]
    tensors[0].add_(1)
    assert [tensor._version for tensor in tensors] == [1, 0, 0]
    assert not any(tensor._is_view() for tensor in tensors)
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [16, 4, 16]
    assert [tensor.shape for tensor in tensors] == [(4,), (), (2, 2)]


def test_what_does_not_fit_in_memory_is_an_os_error():
    with pytest.raises(OSError, match="allocate"):
        _memory.allocate_block(0, 1 << 60)


def test_a_kernel_without_huge_pages_is_no_error(monkeypatch):
    class NoHugePages(mmap.mmap):
        def madvise(self, *args):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(_memory.mmap, "mmap", NoHugePages)
    assert _memory.allocate_block(0, 3 * MIB).address % (2 * MIB) == 0


def test_bytes_that_nobody_wants_are_not_read(pack):
    source = {name: random_tensor((MIB,), seed=i) for i, name in enumerate("abc")}
    with open_footer(pack(source)) as footer:
        wanted = [entry for entry in footer.entries() if entry.name != "b"]
        filled = _memory.read_blocks(footer, _memory.Wanted(footer.native, wanted), CPU, _memory.ReadOptions())
    assert filled.stats["requested_bytes"] == 8 * MIB
    assert_bit_equal(_memory.tensors_of(wanted, filled), {name: source[name] for name in "ac"})


def test_a_small_file_cannot_ask_for_more_memory_than_it_has_bytes(tmp_path):
    place = {"shape": [16], "offset": 0, "length": 16}
    footer = {
        "format": "flashpack_v3",
        "target_dtype": "float32",
        "align_bytes": 0,
        "total_elems": 16,
        "index": [{"name": str(i)} | place for i in range(2000)],
    }
    path = write_file(tmp_path / "a", footer, payload=bytes(64))
    for read in (flashpack.load_file, flashpack.revert_from_file, flashpack.open_file):
        with pytest.raises(flashpack.FlashPackError, match='record 1 "1" overlaps record 0 "0"'):
            read(path)


def test_an_empty_tensor_may_lie_anywhere_in_the_payload(tmp_path):
    records = [
        {"name": "a", "shape": [16], "offset": 0, "length": 16},
        {"name": "none", "shape": [0, 3], "offset": 8, "length": 0},
    ]
    footer = {
        "format": "flashpack_v3",
        "target_dtype": "float32",
        "align_bytes": 0,
        "total_elems": 16,
        "index": records,
    }
    path = write_file(tmp_path / "a", footer, payload=bytes(range(64)))
    tensors = flashpack.revert_from_file(path)
    assert bits(tensors["a"]) == bytes(range(64))
    assert tensors["none"].shape == (0, 3)
