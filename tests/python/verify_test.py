"""Bytes that are not those that were written."""

from __future__ import annotations

import contextlib
import random

import flashpack
import pytest
import torch
from flashpack._checkpoint import open_checkpoint
from flashpack._engine import engine
from flashpack.deserialization import read_flashpack_file
from support import assert_bit_equal, bits, footer_bytes, random_tensor, state_of

MIB = 1 << 20


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


@pytest.fixture
def tensors():
    return {
        "large": random_tensor((MIB,), torch.float32, 1),
        "middle": random_tensor((1000, 999), torch.bfloat16, 2),
        "small": random_tensor((7,), torch.int64, 3),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(True),
    }


@pytest.fixture
def path(pack, tensors):
    return pack(tensors, align_bytes=24)


def payload_bytes(path):
    return path.stat().st_size - len(footer_bytes(path)) - 16


@pytest.mark.parametrize("segment_bytes", [MIB + 4096, 1 << 30])
def test_every_byte_of_a_whole_load_is_verified(path, tensors, segment_bytes, monkeypatch, caplog):
    monkeypatch.setattr("flashpack._transfers._SEGMENT_BYTES", segment_bytes)
    with caplog.at_level("INFO", logger="flashpack"):
        assert_bit_equal(flashpack.revert_from_file(path), tensors)
    assert f"{payload_bytes(path)} verified" in caplog.text
    storage, _ = read_flashpack_file(path)
    assert storage.stats["verified_bytes"] == payload_bytes(path)


def test_a_flipped_bit_anywhere_in_the_payload_is_found_by_every_way_of_reading(path):
    end = 8 * payload_bytes(path)
    for bit in [0, end - 1, *random.Random(5).choices(range(end), k=20)]:
        flip(path, bit)
        stripe = bit // 8 // MIB * MIB
        with pytest.raises(flashpack.FlashPackError, match=rf"{path.name} at {stripe}\+.*checksum"):
            flashpack.revert_from_file(path)
        with pytest.raises(flashpack.FlashPackError, match="checksum"):
            read_flashpack_file(path)
        assert [offset for offset, _, _ in flashpack.verify_file(path)["corrupt"]] == [stripe]
        flip(path, bit)
    assert flashpack.verify_file(path)["corrupt"] == []


def test_a_flipped_bit_anywhere_in_the_footer_is_found_or_harmless(pack):
    source = {"a": random_tensor((3,), seed=1), "b": random_tensor((2, 2), torch.float16, 2)}
    path = pack(source)
    begin = payload_bytes(path)
    for bit in range(8 * begin, 8 * path.stat().st_size):
        flip(path, bit)
        with contextlib.suppress(flashpack.FlashPackError):
            assert_bit_equal(flashpack.revert_from_file(path), source)
        flip(path, bit)


def test_the_error_names_the_tensors_that_lie_in_the_stripe(path):
    flip(path, 8 * payload_bytes(path) - 1)
    with pytest.raises(flashpack.FlashPackError, match='"scalar"') as caught:
        flashpack.revert_from_file(path)
    assert str(path) in str(caught.value)
    ((_, size, names),) = flashpack.verify_file(path)["corrupt"]
    assert "scalar" in names
    assert 0 < size <= MIB


def test_nothing_is_assigned_from_a_corrupt_file(pack):
    model = torch.nn.Linear(700, 700)
    path = pack(torch.nn.Linear(700, 700))
    flip(path, 8 * MIB)
    before = state_of(model)
    with pytest.raises(flashpack.FlashPackError, match="checksum"):
        flashpack.assign_from_file(model, path)
    assert state_of(model) == before


def test_never_reads_what_is_there(path, tensors):
    flip(path, 0)
    model = torch.nn.Module()
    model.large = torch.nn.Parameter(torch.zeros(MIB))
    flashpack.assign_from_file(model, path, strict=False, verify="never")
    assert bits(model.large) == bytes([bits(tensors["large"])[0] ^ 1]) + bits(tensors["large"])[1:]


def test_a_part_is_verified_where_it_is_read_in_whole_stripes_and_always_means_all_of_it(path, tensors):
    model = torch.nn.Module()
    model.middle = torch.nn.Parameter(torch.zeros(1000, 999))
    with open_checkpoint(path) as checkpoint:
        entry = next(entry for entry in checkpoint.entries() if entry.name == "middle")
    begin, size = entry.offset_bytes, entry.size_bytes
    last = 8 * (begin + size - 1)
    assert (begin + size) % MIB
    flip(path, last)
    flashpack.assign_from_file(model, path, strict_params=False)
    with pytest.raises(flashpack.FlashPackError, match="checksum"):
        flashpack.assign_from_file(model, path, strict_params=False, verify="always")
    flip(path, last)
    flashpack.assign_from_file(model, path, strict_params=False, verify="always")
    assert bits(model.middle) == bits(tensors["middle"])


@pytest.mark.parametrize("segment_bytes", [8, 1 << 30])
def test_always_reads_to_the_borders_of_stripes_without_overlaps(pack, segment_bytes, monkeypatch):
    monkeypatch.setattr("flashpack._transfers._SEGMENT_BYTES", segment_bytes)
    source = {f"{i:02}": random_tensor((200 + 1000 * i,), seed=i) for i in range(60)}
    path = pack(source)
    model = torch.nn.Module()
    for name in list(source)[::3]:
        model.register_buffer(name, torch.zeros_like(source[name]))
    flashpack.assign_from_file(model, path, strict=False, verify="always")
    assert_bit_equal(dict(model.named_buffers()), {name: source[name] for name in list(source)[::3]})


def test_always_never_takes_bytes_that_could_not_be_verified(path):
    memory = torch.empty(10, dtype=torch.uint8)
    with open_checkpoint(path) as checkpoint:
        reads = [(0, 3, 10, memory.data_ptr())]
        assert engine().load(checkpoint.native, reads)["verified_bytes"] == 0
        with pytest.raises(flashpack.FlashPackError, match=f"{path.name}: only 0 of the 10 bytes that were read"):
            engine().load(checkpoint.native, reads, "always")


def test_always_refuses_a_file_without_checksums_and_auto_takes_it(pack, tensors):
    path = pack(tensors, checksum=False)
    model = torch.nn.Module()
    model.large = torch.nn.Parameter(torch.zeros(MIB))
    with pytest.raises(flashpack.FlashPackError, match="no checksums"):
        flashpack.assign_from_file(model, path, strict=False, verify="always")
    with pytest.raises(flashpack.FlashPackError, match="no checksums"):
        flashpack.verify_file(path)
    flashpack.assign_from_file(model, path, strict=False)
    assert bits(model.large) == bits(tensors["large"])


def test_verify_takes_three_words(path):
    with pytest.raises(flashpack.FlashPackError, match="auto, always or never"):
        read_flashpack_file(path, verify="yes")
    with pytest.raises(flashpack.FlashPackError, match="nothing to verify"):
        read_flashpack_file(path, mmap=True, verify="always")


@pytest.mark.parametrize("verify", [None, True, False, "sometimes", b"auto"])
def test_what_is_no_way_to_verify_is_refused(verify, pack):
    path = pack({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    for use in (
        lambda: flashpack.load_file(path, verify=verify),
        lambda: flashpack.open_file(path, verify=verify),
        lambda: flashpack.assign_from_file(torch.nn.Linear(2, 2), path, verify=verify),
        lambda: flashpack.read_flashpack_file(path, verify=verify),
    ):
        with pytest.raises(flashpack.FlashPackError, match="verify must be auto, always or never"):
            use()
