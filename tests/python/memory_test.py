from __future__ import annotations

import mmap
import sys
from contextlib import nullcontext

import flashpack
import pytest
import safetensors.torch
import torch
from flashpack import _memory, _tensors, _transfers
from flashpack._checkpoint import open_checkpoint
from flashpack._device import CPU, Side
from flashpack._engine import engine
from flashpack._under_way import UnderWay
from support import assert_bit_equal, bits, random_tensor, write_file
from torch._subclasses.fake_tensor import FakeTensorMode

MIB = 1 << 20


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (12345, 100_000), (0, 3 * MIB), (5 * MIB + 128, 3 * MIB + 7)])
def test_memory_has_the_phase_of_its_file_offset(offset, size):
    block = _memory.allocate_block(offset, size)
    phase = 2 * MIB if size >= 2 * MIB else mmap.PAGESIZE
    assert block.address % phase == offset % phase
    tensor = block.tensor(torch.uint8, (size,), 0)
    assert tensor.data_ptr() == block.address
    tensor.fill_(1)


def test_memory_lives_as_long_as_its_last_tensor():
    block = _memory.allocate_block(0, 3 * MIB)
    tensor = block.tensor(torch.int32, (2, 3), 64)
    tensor.copy_(torch.arange(6).view(2, 3))
    del block
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.fixture
def blocks(monkeypatch):
    """The blocks that the engine fills, which are also those of the plan."""
    made, allocate = [], _transfers.allocate
    monkeypatch.setattr(_transfers, "allocate", lambda *arguments: made.extend(allocate(*arguments)) or made)
    return made


def is_in(block, tensor):
    return block.address <= tensor.data_ptr() < block.address + block.size_bytes


def test_small_tensors_do_not_keep_the_block_of_large_ones(pack, blocks):
    source = {"first": random_tensor((3,)), "large": random_tensor((3 * MIB,)), "none": torch.empty(0)}
    for i in range(40):
        source |= {f"{i}.bias": random_tensor((9000 + i,), seed=i), f"{i}.weight": random_tensor((16384 + i,), seed=i)}
    loaded = flashpack.load_file(pack(source, name_order=list(source)))
    assert_bit_equal(loaded, source)
    [block] = blocks
    small = {"first", *(f"{i}.bias" for i in range(40))}
    assert {name for name, tensor in loaded.items() if tensor.numel() and not is_in(block, tensor)} == small
    assert all(loaded[name].data_ptr() % 64 == 0 for name in small)


def test_they_stay_where_they_are_most_of_a_block_or_the_block_is_small_itself(pack, blocks):
    many = {f"{i}": random_tensor((8000,), seed=i) for i in range(40)}
    for source in (
        {"large": random_tensor((2 * MIB,))} | many,
        {"large": random_tensor((MIB // 2,)), "bias": many["0"]},
    ):
        blocks.clear()
        loaded = flashpack.load_file(pack(source))
        assert_bit_equal(loaded, source)
        assert all(is_in(blocks[0], tensor) for tensor in loaded.values())


def test_tensors_of_a_block_are_no_views_and_count_versions_apart():
    block = _memory.allocate_block(0, 4096)
    tensors = [block.tensor(torch.float32, shape, 128 * n) for n, shape in enumerate([(4,), (), (2, 2)])]
    tensors[0].add_(1)
    assert [tensor._version for tensor in tensors] == [1, 0, 0]
    assert not any(tensor._is_view() for tensor in tensors)
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [16, 4, 16]
    assert [tensor.shape for tensor in tensors] == [(4,), (), (2, 2)]


def test_what_does_not_fit_in_memory_is_an_os_error():
    with pytest.raises(OSError, match="bytes of memory for tensors"):
        _memory.allocate_block(0, 1 << 60)


def test_a_mapped_file_may_be_larger_than_memory(tmp_path):
    size_bytes = 1 << 20
    with open("/proc/meminfo") as lines:
        size_bytes += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal", "SwapTotal")))
    record = {"name": "huge", "shape": [size_bytes], "offset": 0, "length": size_bytes}
    footer = {
        "format": "flashpack_v3",
        "target_dtype": "uint8",
        "align_bytes": 0,
        "total_elems": size_bytes,
        "index": [record],
    }
    path = write_file(tmp_path / "a", footer, payload=b"")
    tail = path.read_bytes()
    with path.open("wb") as file:  # The payload is a hole.
        file.seek(size_bytes)
        file.write(tail)
    huge = flashpack.load_file(path, mmap=True)["huge"]
    huge[-1] = 7
    assert (huge.numel(), int(huge[0]), int(huge[-1])) == (size_bytes, 0, 7)


def test_memory_that_is_gone_serves_the_next_load_unless_it_is_given_back():
    flashpack.release_kept_memory()
    block = _memory.allocate_block(0, 8 * MIB)
    kept_tensor = block.tensor(torch.uint8, (4,), 0).fill_(7)
    del block
    assert flashpack.kept_memory_bytes() == 0
    other = _memory.allocate_block(0, 8 * MIB).memory.fill_(1)
    assert kept_tensor.tolist() == [7] * 4
    address = other.data_ptr()
    del other
    if flashpack.kept_memory_bytes() == 0:
        pytest.skip("the kernel is too old, or the address space is limited")
    assert _memory.allocate_block(0, 8 * MIB).address == address
    flashpack.release_kept_memory()
    assert flashpack.kept_memory_bytes() == 0


def test_bytes_that_nobody_wants_are_not_read(pack):
    source = {name: random_tensor((MIB,), seed=i) for i, name in enumerate("abc")}
    with open_checkpoint(pack(source)) as checkpoint:
        wanted = [entry for entry in checkpoint.entries() if entry.name != "b"]
        filled = _tensors.read_blocks(_transfers.Wanted(checkpoint, wanted), CPU, _transfers.ReadOptions())
    assert filled.stats["requested_bytes"] == 8 * MIB
    assert_bit_equal(_tensors.tensors_of(wanted, filled), {name: source[name] for name in "ac"})


def test_a_stream_is_cut_where_no_stripe_goes_on_and_leaves_nothing_out(monkeypatch):
    monkeypatch.setattr(_transfers, "_BATCH_BYTES", 3 * MIB)
    monkeypatch.setattr(_transfers, "_BATCH_BORDER_BYTES", 2 * MIB)
    reads = [(0, 5, 3 * MIB, 100), (0, 3 * MIB + 5, 6 * MIB, 1 << 40), (0, 20 * MIB, 1, 0), (0, 21 * MIB, MIB, 1)]
    first = [(0, 5, 3 * MIB, 100), (0, 3 * MIB + 5, MIB - 5, 1 << 40)]
    second = [(0, 4 * MIB, 5 * MIB + 5, (1 << 40) + MIB - 5)]
    assert _transfers._batches_of(reads) == [first, second, [(0, 20 * MIB, 1, 0), (0, 21 * MIB, MIB, 1)]]
    assert _transfers._batches_of([]) == [[]]


def test_a_stream_may_go_on_in_the_next_file_wherever_the_last_one_ends(monkeypatch):
    monkeypatch.setattr(_transfers, "_BATCH_BYTES", 3 * MIB)
    reads = [(0, 5, 4 * MIB, 100), (1, 0, MIB, 7), (1, MIB, 2 * MIB, 9), (2, 3, 5, 1)]
    assert _transfers._batches_of(reads) == [[reads[0]], reads[1:3], [reads[3]]]
    assert _transfers._batches_of(reads[1:2] + reads[3:]) == [reads[1:2] + reads[3:]]


@pytest.fixture
def in_small_parts(monkeypatch):
    """Makes loads read a few MiB with each transfer."""
    monkeypatch.setattr(_transfers, "_SEGMENT_BYTES", 3 * MIB)
    for name in ("_BATCH_BYTES", "_BATCH_BORDER_BYTES"):
        monkeypatch.setattr(_transfers, name, MIB)


def several_mib(pack):
    return pack({str(i): random_tensor((400_000 + i,), seed=i) for i in range(8)}, name_order=list("01234567"))


@pytest.mark.parametrize("verify", ["auto", "always"])
def test_blocks_arrive_one_after_the_other_whole_and_every_stripe_verified(pack, in_small_parts, verify):
    path = several_mib(pack)
    raw = path.read_bytes()
    options = _transfers.ReadOptions(verify=verify)
    arrived = []
    with open_checkpoint(path) as checkpoint:
        filling = _transfers.make_room(_transfers.Wanted(checkpoint, checkpoint.entries()), CPU, options)
        for [numbers] in _transfers.fill(checkpoint, [filling], options, as_stream=True):
            arrived.append(numbers)
            for number in numbers:
                size, offset = filling.plan.blocks[number]
                assert bits(filling.blocks[number].memory) == raw[offset : offset + size]
        payload_bytes = checkpoint.native.payload_bytes
    assert sorted(number for numbers in arrived for number in numbers) == list(range(len(filling.blocks)))
    assert len(list(filter(None, arrived))) > 2
    assert filling.stats["requested_bytes"] == filling.stats["verified_bytes"] == payload_bytes


def test_only_a_few_transfers_of_a_stream_are_under_way_at_a_time(pack, in_small_parts, monkeypatch):
    started, start = [], _transfers.start
    monkeypatch.setattr(_transfers, "start", lambda *arguments: started.append(arguments) or start(*arguments))
    options = _transfers.ReadOptions()
    with open_checkpoint(several_mib(pack)) as checkpoint:
        filling = _transfers.make_room(_transfers.Wanted(checkpoint, checkpoint.entries()), CPU, options)
        steps = 0
        for steps, _ in enumerate(_transfers.fill(checkpoint, [filling], options, as_stream=True), 1):
            assert len(started) <= steps + _transfers.AT_ONCE - 1
    assert steps == len(started) > _transfers.AT_ONCE


def test_the_seconds_of_a_stream_are_those_of_its_transfers_one_after_the_other(pack, in_small_parts, monkeypatch):
    seconds, add_stats = [], _transfers.add_stats
    monkeypatch.setattr(_transfers, "AT_ONCE", 1)
    monkeypatch.setattr(
        _transfers, "add_stats", lambda stats, more: seconds.append(more["seconds"]) or add_stats(stats, more)
    )
    options = _transfers.ReadOptions()
    with open_checkpoint(several_mib(pack)) as checkpoint:
        filling = _transfers.make_room(_transfers.Wanted(checkpoint, checkpoint.entries()), CPU, options)
        for _ in _transfers.fill(checkpoint, [filling], options, as_stream=True):
            pass
    assert len(seconds) > 2
    assert filling.stats["seconds"] >= sum(seconds)


def test_statistics_of_several_transfers_have_every_reason_once():
    stats = {}
    for reason in ("", "direct I/O: refused", "page cache: EPERM", "direct I/O: refused", ""):
        _transfers.add_stats(stats, {"operations": 1, "fallback_reason": reason})
    assert stats == {"operations": 5, "fallback_reason": "direct I/O: refused; page cache: EPERM"}


def test_a_load_that_is_no_stream_is_one_transfer(pack, in_small_parts, monkeypatch):
    started, start = [], _transfers.start
    monkeypatch.setattr(_transfers, "start", lambda *arguments: started.append(arguments) or start(*arguments))
    flashpack.load_file(several_mib(pack))
    assert len(started) == 1


@pytest.fixture
def stand_in(monkeypatch):
    """A device whose memory is the host's, and the list of what happens to loads there."""
    happened, start, finish, tensors_of = [], _transfers.start, UnderWay.finish, _tensors.tensors_of

    def told(what, function):
        return lambda *arguments: happened.append(what) or function(*arguments)

    def allocate(plan, *_):
        shared = {}
        return [_memory.DeviceBlock(torch.empty(size, dtype=torch.uint8), shared) for size, _ in plan.blocks]

    monkeypatch.setattr(_transfers, "side_of", lambda *_: Side(torch.device("cpu", 0), engine(), 0))
    monkeypatch.setattr(_transfers, "allocate", allocate)
    monkeypatch.setattr(_transfers, "start", told("start", start))
    monkeypatch.setattr(UnderWay, "finish", told("finish", finish))
    monkeypatch.setattr(_tensors, "tensors_of", told("tensors", tensors_of))
    return torch.device("cuda"), happened


def test_tensors_of_a_device_are_made_while_their_bytes_are_read(pack, stand_in):
    device, happened = stand_in
    tensors = {"a": random_tensor((3 * MIB,)), "empty": torch.empty(0, 3), "b": random_tensor((7,), torch.bfloat16)}
    with open_checkpoint(pack(tensors, target_dtype=None)) as checkpoint:
        loaded = _tensors.read_tensors(
            _transfers.Wanted(checkpoint, checkpoint.entries()), device, _transfers.ReadOptions()
        )
    assert happened == ["start", "tensors", "finish"]
    assert_bit_equal(loaded, tensors)


def test_tensors_of_a_device_that_were_made_of_a_wrong_file_are_given_to_nobody(pack, stand_in):
    device, happened = stand_in
    path = several_mib(pack)
    raw = bytearray(path.read_bytes())
    raw[MIB] ^= 1
    path.write_bytes(raw)
    with open_checkpoint(path) as checkpoint, pytest.raises(flashpack.FlashPackError, match="do not match"):
        _tensors.read_tensors(_transfers.Wanted(checkpoint, checkpoint.entries()), device, _transfers.ReadOptions())
    assert happened == ["start", "tensors", "finish"]


def test_tensors_of_a_device_are_no_inference_tensors_though_others_were():
    block = _memory.DeviceBlock(torch.empty(64, dtype=torch.uint8), {})
    with torch.inference_mode():
        block.tensor(torch.float32, (4,), 0)
    assert not block.tensor(torch.float32, (4,), 16).is_inference()


def read_by_a_stream(path):
    options = _transfers.ReadOptions()
    with open_checkpoint(path) as checkpoint:
        filling = _transfers.make_room(_transfers.Wanted(checkpoint, checkpoint.entries()), CPU, options)
        for _ in _transfers.fill(checkpoint, [filling], options, as_stream=True):
            pass
        return checkpoint.native.payload_bytes


def test_a_wrong_bit_in_any_stripe_ends_a_stream(pack, in_small_parts):
    path = several_mib(pack)
    raw = bytearray(path.read_bytes())
    for at in range(MIB // 2, 12 * MIB, MIB):
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(flashpack.FlashPackError, match="do not match their checksum"):
            read_by_a_stream(path)
        raw[at] ^= 1


def test_a_stream_that_is_left_reads_nothing_more(pack, in_small_parts):
    options = _transfers.ReadOptions()
    with open_checkpoint(several_mib(pack)) as checkpoint:
        filling = _transfers.make_room(_transfers.Wanted(checkpoint, checkpoint.entries()), CPU, options)
        arrivals = _transfers.fill(checkpoint, [filling], options, as_stream=True)
        next(arrivals)
        arrivals.close()
    for block in filling.blocks:
        block.memory.fill_(0xAB)
    assert flashpack.load_file(checkpoint.path).keys() == set("01234567")
    assert all(bool((block.memory == 0xAB).all()) for block in filling.blocks)


def test_a_stream_that_fails_ends_all_of_its_loads_also_while_somebody_keeps_the_error(pack, in_small_parts):
    path = several_mib(pack)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    options = _transfers.ReadOptions()
    with open_checkpoint(path) as checkpoint:
        filling = _transfers.make_room(_transfers.Wanted(checkpoint, checkpoint.entries()), CPU, options)
        owners = sys.getrefcount(filling.blocks)
        with pytest.raises(flashpack.FlashPackError, match="do not match their checksum") as kept:
            list(_transfers.fill(checkpoint, [filling], options, as_stream=True))
    # A load owns the memory that it fills; the one that failed has ended, and may be in the traceback.
    assert sys.getrefcount(filling.blocks) <= owners + 1
    assert kept.value is not None


def test_the_progress_of_a_stream_goes_on_from_transfer_to_transfer(pack, in_small_parts, monkeypatch):
    told = []
    monkeypatch.setattr(_transfers, "progress_bar", lambda *_: nullcontext(told.append))
    payload_bytes = read_by_a_stream(several_mib(pack))
    assert told == sorted(told)
    assert told[-1] == payload_bytes


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


def test_small_tensors_beside_large_ones_are_loaded_within_a_fake_mode_of_torch(tmp_path):
    tensors = {"large": random_tensor((2 << 20,)), "small": random_tensor((64,))}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with FakeTensorMode():  # It would refuse an operation on the memory, and print all of it.
        loaded = flashpack.load_file(tmp_path / "a.safetensors")
    assert_bit_equal(loaded, tensors)
