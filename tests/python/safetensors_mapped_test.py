"""flashpack.safetensors with backend="mmap": what is shared with the page cache, and what is read."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import struct
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flashpack import _mapped_tensors
from flashpack.safetensors import load_file, safe_open
from page_cache import drop_from_page_cache, resident_fraction
from safetensors.torch import save_file
from support import bits, random_tensor, run_python, unprivileged

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {name: random_tensor((2048, 1024), seed=seed) for seed, name in enumerate("abc")}
    save_file({**tensors, "small": random_tensor((3,))}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def engine_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors of which parts are read by the engine."""
    read: list[str] = []
    original = _mapped_tensors.TensorSlice.__getitem__

    def noted(part: Any, index: Any) -> torch.Tensor:
        read.append(part._entry.name)
        return original(part, index)

    monkeypatch.setattr(_mapped_tensors.TensorSlice, "__getitem__", noted)
    return read


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that are to be read ahead, as (offset, size)."""
    ranges: list[tuple[int, int]] = []
    original = _mapped_tensors._ReadAhead.want

    def noted(ahead: Any, offset_bytes: int, size_bytes: int) -> None:
        ranges.append((offset_bytes, size_bytes))
        original(ahead, offset_bytes, size_bytes)

    monkeypatch.setattr(_mapped_tensors._ReadAhead, "want", noted)
    return ranges


def test_what_is_mapped_needs_no_module_that_reads_in_other_ways_or_writes(path):
    code = f"""
import sys
from flashpack.safetensors import safe_open
with safe_open({str(path)!r}, "pt", backend="mmap") as file:
    assert file.get_slice("a")[...].shape == (2048, 1024)
    file.get_tensors()
others = ("serialization", "_into", "_stream", "_prefetch_loader")
print([name for name in others if f"flashpack.{{name}}" in sys.modules])
from flashpack.safetensors import PrefetchLoader
print(PrefetchLoader.__module__)
"""
    assert run_python(code) == "[]\nflashpack._prefetch_loader\n"


def test_a_whole_slice_of_a_mapped_file_is_the_mapping_and_no_view_of_a_tensor(path):
    with safe_open(path, "pt", backend="mmap") as file:
        whole, again = file.get_slice("a")[...], file.get_slice("a")[...]
        assert whole.data_ptr() == again.data_ptr() == file.get_slice("a")[:].data_ptr()
    whole.add_(1)
    assert (whole._base, whole._version, again._version) == (None, 1, 0)


def test_reading_ahead_ends_when_the_mapping_is_gone(path, monkeypatch):
    entered, gate = threading.Event(), threading.Event()
    read: list[int] = []

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        read.append(offset)
        entered.set()
        assert gate.wait(60)
        return len(buffers[0])

    monkeypatch.setattr(_mapped_tensors.os, "preadv", preadv)
    monkeypatch.setattr(_mapped_tensors, "_STREAMS", 1)
    mapping = mmap.mmap(-1, mmap.PAGESIZE)
    with path.open("rb") as file:
        ahead = _mapped_tensors._ReadAhead(file.fileno(), mapping)
    before = set(threading.enumerate())
    ahead.want(0, MIB)
    ahead.want(MIB, MIB)
    (thread,) = set(threading.enumerate()) - before
    assert entered.wait(60)
    del mapping
    gate.set()
    thread.join(60)
    assert read == [0]


def evict(path: Path) -> None:
    if drop_from_page_cache(path) > 0:
        pytest.skip("this file system keeps its pages")


def finish_reading_ahead() -> None:
    for thread in threading.enumerate():
        if thread.name == "flashpack-read-ahead":
            thread.join()


def test_what_is_cached_is_neither_read_nor_read_ahead(path, engine_reads, wanted):
    expected = load_file(path)
    path.read_bytes()
    with safe_open(path, "pt", backend="mmap") as file:
        for name in file.keys():  # noqa: SIM118
            assert bits(file.get_slice(name)[1:3]) == bits(expected[name][1:3])
            assert bits(file.get_tensor(name)) == bits(expected[name])
        file.get_tensors()
    assert engine_reads == []
    assert wanted == []


def test_a_whole_tensor_that_is_not_cached_is_read_ahead_and_nothing_before_it_is_asked_for(path, wanted):
    expected = load_file(path)["b"]
    evict(path)
    with safe_open(path, "pt", backend="mmap") as file:
        meta = file.get_tensor_meta("b")
        part = file.get_slice("b")
        assert wanted == []
        tensor = part[...]
    header = path.stat().st_size - 3 * 8 * MIB - 12
    assert sum(size for _, size in wanted) == 8 * MIB
    assert wanted[0][0] == header + meta.data_offsets[0]
    finish_reading_ahead()
    assert bits(tensor) == bits(expected)


def test_a_part_that_is_not_cached_is_read_alone(path, engine_reads, wanted):
    expected = load_file(path)["b"]
    evict(path)
    with safe_open(path, "pt", backend="mmap") as file:
        for _ in range(3):  # That somebody looked whether it is cached has not brought it there.
            assert bits(file.get_slice("b")[512:1024]) == bits(expected[512:1024])
    assert engine_reads == ["b"] * 3
    assert wanted == []
    assert resident_fraction(path) < 0.1


def test_a_part_with_a_dim_more_is_the_same_whether_it_is_cached_or_not(path):
    expected = load_file(path)["b"][None, 512:1024]
    evict(path)
    with safe_open(path, "pt", backend="mmap") as file:
        assert bits(file.get_slice("b")[None, 512:1024]) == bits(expected)
        finish_reading_ahead()
        assert bits(file.get_slice("b")[None, 512:1024]) == bits(expected)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a file that others may not write")
def test_the_kernel_tells_what_is_cached_of_files_that_are_own_or_may_be_written(path):
    with path.open("rb") as file:
        assert _mapped_tensors._is_told_what_is_cached(file.fileno())
        with unprivileged():
            assert not _mapped_tensors._is_told_what_is_cached(file.fileno())
        os.fchown(file.fileno(), 65534, -1)
        with unprivileged():
            assert _mapped_tensors._is_told_what_is_cached(file.fileno())


def test_of_a_file_of_others_what_is_not_cached_is_read_ahead_and_what_is_cached_is_not(path, wanted, monkeypatch):
    monkeypatch.setattr(_mapped_tensors, "_is_told_what_is_cached", lambda fd: False)
    monkeypatch.setattr(_mapped_tensors._native, "is_cached", lambda *_: True)
    expected = load_file(path)["b"]
    evict(path)
    with safe_open(path, "pt", backend="mmap") as file:
        tensor = file.get_tensor("b")
        assert wanted
        assert wanted[0][1] == 8 * MIB
        finish_reading_ahead()
        path.read_bytes()
        wanted.clear()
        assert bits(file.get_tensor("b")) == bits(tensor) == bits(expected)
        assert wanted == []


def test_nothing_of_a_mapped_file_is_left_to_be_closed_by_the_garbage_collector(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensors = load_file(path, backend="mmap")
        finish_reading_ahead()
        del tensors
        gc.collect()
    assert [str(each.message) for each in caught if each.category is ResourceWarning] == []


def test_all_tensors_are_read_ahead_together(path, wanted):
    expected = load_file(path)
    evict(path)
    tensors = load_file(path, backend="mmap")
    # Only the first range is certain: the kernel may read beyond it before the next one is looked at.
    assert wanted[0] == (path.stat().st_size - 3 * 8 * MIB - 12, 8 * MIB)
    finish_reading_ahead()
    assert resident_fraction(path) > 0.3
    assert {name: bits(tensor) for name, tensor in tensors.items()} == {n: bits(t) for n, t in expected.items()}


def test_nothing_is_read_ahead_when_mapped_files_would_fill_the_memory(path, wanted, monkeypatch):
    monkeypatch.setattr(_mapped_tensors, "_memory_bytes", lambda: 2 * path.stat().st_size)
    evict(path)
    tensors = load_file(path, backend="mmap")
    assert wanted == []
    assert bits(tensors["a"]) == bits(load_file(path)["a"])


def test_a_mapping_that_is_gone_no_longer_counts(path):
    before = sum(_mapped_tensors._mapped_bytes.values())
    tensors = load_file(path, backend="mmap")
    assert sum(_mapped_tensors._mapped_bytes.values()) == before + path.stat().st_size
    del tensors
    assert sum(_mapped_tensors._mapped_bytes.values()) == before


def test_a_tensor_at_an_odd_place_is_a_copy_that_is_aligned(tmp_path):
    header = (
        b'{"u":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"f":{"dtype":"F32","shape":[4],"data_offsets":[3,19]}}'
    )
    payload = bytes([1, 2, 3]) + struct.pack("<4f", 0, 1, 2, 3)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + payload)
    with safe_open(path, "pt", backend="mmap") as file:
        for tensor in (file.get_tensor("f"), file.get_slice("f")[...], file.get_tensors()["f"]):
            assert tensor.tolist() == [0, 1, 2, 3]
            assert tensor.data_ptr() % 4 == 0
        assert file.get_slice("f")[1:3].tolist() == [1, 2]


def test_a_file_that_is_gone_from_its_path_can_still_be_mapped(path):
    expected = load_file(path)["a"]
    with safe_open(path, "pt", backend="mmap") as file:
        path.unlink()
        assert bits(file.get_tensor("a")) == bits(expected)


def test_tensors_are_there_where_nothing_can_be_read_ahead(path, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    expected = load_file(path)
    drop_from_page_cache(path)
    monkeypatch.setattr(_mapped_tensors, "_is_cached", lambda *_: False)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with safe_open(path, backend="mmap") as file:
        mapped = file.get_tensors()
        assert file._map._maps[0].ahead._threads == 0
    assert {name: bits(tensor) for name, tensor in mapped.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }


def test_tensors_are_there_where_the_file_cannot_be_opened_again(path, monkeypatch):
    def refuse(_: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    expected = load_file(path)
    monkeypatch.setattr(_mapped_tensors, "open_again", refuse)
    with safe_open(path, backend="mmap") as file:
        assert bits(file.get_tensor("a")) == bits(expected["a"])
