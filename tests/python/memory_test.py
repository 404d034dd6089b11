from __future__ import annotations

import errno
import mmap

import flashpack
import pytest
import torch
from flashpack import _memory
from flashpack._device import CPU, side_of
from flashpack._footer import Entry, open_footer
from support import bits, random_tensor, write_file

MIB = 1 << 20


def entry(name: str, offset_bytes: int, size_bytes: int) -> Entry:
    return Entry(name, "uint8", (size_bytes,), offset_bytes, size_bytes, size_bytes, 0, offset_bytes)


def names_of(runs: list[list[Entry]]) -> list[list[str]]:
    return [[entry.name for entry in run] for run in runs]


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (12345, 100_000), (0, 3 * MIB), (5 * MIB + 128, 3 * MIB + 7)])
def test_memory_has_the_phase_of_its_file_offset(offset, size):
    region = _memory.allocate_region(offset, size)
    phase = 2 * MIB if size >= 2 * MIB else mmap.PAGESIZE
    assert region.address % phase == offset % phase
    tensor = region.tensor("uint8", (size,), size, offset)
    assert tensor.data_ptr() == region.address
    assert not tensor.any()


def test_memory_lives_as_long_as_its_last_tensor():
    region = _memory.allocate_region(0, 3 * MIB)
    tensor = region.tensor("int32", (2, 3), 6, 64)
    tensor.copy_(torch.arange(6).view(2, 3))
    del region
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tensors_of_a_region_are_no_views_and_count_versions_apart():
    region = _memory.allocate_region(0, 4096)
    first, second = region.tensor("float32", (4,), 4, 0), region.tensor("float32", (), 1, 128)
    first.add_(1)
    assert (first._version, second._version) == (1, 0)
    assert not first._is_view()
    assert first.untyped_storage().nbytes() == 16
    assert second.shape == ()


def test_what_does_not_fit_in_memory_is_an_os_error():
    with pytest.raises(OSError, match="allocate"):
        _memory.allocate_region(0, 1 << 60)


def test_a_kernel_without_huge_pages_is_no_error(monkeypatch):
    class NoHugePages(mmap.mmap):
        def madvise(self, *args):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(_memory.mmap, "mmap", NoHugePages)
    assert _memory.allocate_region(0, 3 * MIB).address % (2 * MIB) == 0


def test_one_run_holds_neighbours_in_the_order_of_the_file():
    runs = _memory.plan_runs([entry("b", 128, 10), entry("a", 0, 100)])
    assert names_of(runs) == [["a", "b"]]


def test_a_gap_that_costs_more_to_read_than_to_skip_splits_a_run():
    small = [entry("a", 0, 100), entry("b", 100 + MIB, 100)]
    large = [entry("a", 0, 100), entry("b", 101 + MIB, 100)]
    assert names_of(_memory.plan_runs(small)) == [["a", "b"]]
    assert names_of(_memory.plan_runs(large)) == [["a"], ["b"]]


def test_memory_comes_in_segments_cut_between_tensors():
    third = 400 * MIB
    runs = _memory.plan_runs([entry(str(i), i * third, third) for i in range(5)])
    assert names_of(runs) == [["0", "1"], ["2", "3"], ["4"]]
    assert names_of(_memory.plan_runs([entry("giant", 0, 5 << 30), entry("b", 5 << 30, 1)])) == [["giant"], ["b"]]


def test_bytes_that_nobody_wants_are_not_read(pack):
    source = {name: random_tensor((MIB,), seed=i) for i, name in enumerate("abc")}
    with open_footer(pack(source)) as footer:
        wanted = [entry for entry in footer.entries() if entry.name != "b"]
        runs = _memory.plan_runs(wanted)
        spans = [(run[0].offset_bytes, _memory.stop_of(run[-1])) for run in runs]
        regions = [_memory.allocate_region(begin, end - begin) for begin, end in spans]
        [stats] = _memory.fill(footer, [_memory.Filling(regions, side_of(CPU))], _memory.ReadOptions())
        assert stats["requested_bytes"] == 8 * MIB
        tensors = _memory.read_tensors(footer, wanted, CPU, _memory.ReadOptions())
    assert torch.equal(tensors["a"].view(torch.uint8), source["a"].view(torch.uint8))
    assert torch.equal(tensors["c"].view(torch.uint8), source["c"].view(torch.uint8))


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
