"""Tensors that are yielded while the rest is being read."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import flashpack
import pytest
import safetensors.torch
import torch
from flashpack import _file, _native, _stream
from flashpack.safetensors import safe_open
from support import assert_bit_equal, bits, random_tensor

MIB = 1 << 20
COUNT = 12
SIZES = {"small": 2, "large": MIB // 2}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"{i:02}": random_tensor((MIB // 4 + i,), seed=i) for i in range(COUNT)}


@pytest.fixture(params=["safetensors", "flashpack"])
def path(request, tensors, tmp_path) -> Path:
    file = tmp_path / f"a.{request.param}"
    if request.param == "flashpack":
        flashpack.pack_to_file(tensors, file)
    else:
        safetensors.torch.save_file(tensors, file)
    return file


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(_stream, "_GROUP_BYTES", 2 * MIB + MIB // 2)


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Lists the transfers as they are started and finished."""
    done: list[str] = []
    start, finish = _stream.start, _native.finish_loads
    monkeypatch.setattr(_stream, "start", lambda *args: done.append("start") or start(*args))
    monkeypatch.setattr(_native, "finish_loads", lambda *args: done.append("finish") or finish(*args))
    return done


def in_file_order(path: Path) -> list[str]:
    with flashpack.open_file(path) as file:
        return file.keys()


def test_every_tensor_comes_once_with_its_bits_in_file_order(path, tensors):
    streamed = list(flashpack.stream_tensors(path))
    assert [name for name, _ in streamed] == in_file_order(path)
    assert_bit_equal(dict(streamed), tensors)


def test_the_first_tensor_comes_before_the_last_is_asked_for(path, loads):
    stream = flashpack.stream_tensors(path)
    assert loads == []
    next(stream)
    assert loads.count("finish") == 1
    assert loads.count("start") <= 1 + _stream.AT_ONCE


def test_a_tensor_of_a_stream_is_never_written_again(path, tensors):
    stream = flashpack.stream_tensors(path, window_bytes=3 * MIB)
    for name, tensor in stream:
        assert bits(tensor) == bits(tensors[name])
        tensor.fill_(7)
        gc.collect()
    # Whoever keeps all of them has all of them.
    assert_bit_equal(dict(flashpack.stream_tensors(path, window_bytes=1)), tensors)


@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: stream.__exit__(None, None, None)])
def test_a_stream_that_is_left_reads_nothing_more(path, tensors, loads, leave: Callable):
    stream = flashpack.stream_tensors(path)
    name, tensor = next(stream)
    leave(stream)
    started = loads.count("start")
    assert list(stream) == []
    assert loads.count("start") == started
    assert bits(tensor) == bits(tensors[name])


def test_what_is_kept_is_counted_and_told_once_and_the_rest_is_read_two_at_a_time(path, loads, caplog):
    with caplog.at_level(logging.WARNING, "flashpack"):
        kept = list(flashpack.stream_tensors(path, window_bytes=4 * MIB))
    assert len(kept) == COUNT
    assert [record.message.split(" of the tensors")[0] for record in caplog.records] == [
        f"TensorStream({path}): more than window_bytes={4 * MIB}"
    ]
    assert "".join("s" if each == "start" else "f" for each in loads).endswith("fsfsff")


def test_a_loop_over_tensors_larger_than_the_window_keeps_nothing_and_has_two_alive(tmp_path, loads, caplog):
    safetensors.torch.save_file({f"{i}": random_tensor((MIB,), seed=i) for i in range(6)}, tmp_path / "a.safetensors")
    for _, tensor in flashpack.stream_tensors(tmp_path / "a.safetensors", window_bytes=MIB):
        assert tensor.numel() == MIB
    assert caplog.records == []
    assert loads == ["start", "finish"] * 6


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "keep", [lambda tensor: tensor[:1], lambda tensor: tensor.data, lambda tensor: tensor.view(-1)]
)
def test_what_a_slice_keeps_alive_is_counted(path, caplog, keep, dtype):
    kept = [keep(tensor) for _, tensor in flashpack.stream_tensors(path, window_bytes=4 * MIB, dtype=dtype)]
    assert len(kept) == COUNT
    assert len(caplog.records) == 1


def test_a_small_tensor_counts_as_the_memory_that_it_keeps(tmp_path, caplog):
    tensors = {f"{i:02}{kind}": random_tensor((size,), seed=i) for i in range(6) for kind, size in SIZES.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    stream = flashpack.stream_tensors(tmp_path / "a.safetensors", window_bytes=5 * MIB)
    kept = [tensor for name, tensor in stream if name.endswith("small")]
    assert len(kept) == 6
    assert len(caplog.records) == 1
    kept.clear()
    caplog.clear()
    for name, tensor in flashpack.stream_tensors(tmp_path / "a.safetensors", window_bytes=5 * MIB):
        if name.endswith("small"):
            kept.append(tensor.clone())
        del tensor
    assert caplog.records == []


def test_a_stream_is_gone_when_it_is_dropped_whatever_is_kept(path):
    stream = flashpack.stream_tensors(path)
    _, tensor = next(stream)
    gone = weakref.ref(stream)
    reads = weakref.ref(stream._reading)
    gc.disable()  # Nobody waits for it: until it runs, each dropped stream would keep its memory and descriptors.
    try:
        del stream
        assert gone() is None and reads() is None
    finally:
        gc.enable()
    assert tensor.numel()


def test_groups_have_memory_of_one_size_so_that_what_one_gives_back_serves_the_next(tmp_path, monkeypatch):
    largest = _stream._GROUP_BYTES
    sizes = [largest, largest - 4096, largest // 2 + 4096, largest - 1, largest // 2 + 1, 5000]
    tensors = {f"{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    huge, taken, memory = 2 * MIB, [], _native.HostMemory
    monkeypatch.setattr(
        _native, "HostMemory", lambda size, phase: taken.append(size + phase % huge) or memory(size, phase)
    )
    assert_bit_equal(dict(flashpack.stream_tensors(tmp_path / "a.safetensors")), tensors)
    assert taken == [largest + huge] * 5, "the last group has two tensors"
    assert_bit_equal(dict(flashpack.stream_tensors(tmp_path / "a.safetensors", names=["5"])), {"5": tensors["5"]})
    assert taken[-1] < huge, "a little group does not take so much"


@pytest.fixture
def narrow_path(tmp_path) -> Path:
    """A file of six tensors of bfloat16, each of 3 MiB, which make a group each."""
    tensors = {f"{i}": random_tensor((MIB + MIB // 2,), torch.bfloat16, seed=i) for i in range(6)}
    safetensors.torch.save_file(tensors, tmp_path / "narrow.safetensors")
    return tmp_path / "narrow.safetensors"


def test_a_loop_that_keeps_no_wider_cast_gets_no_warning_and_reads_one_at_a_time(narrow_path, loads, caplog):
    for _, tensor in flashpack.stream_tensors(narrow_path, dtype=torch.float32, window_bytes=4 * MIB):
        assert tensor.nbytes == 6 * MIB
    assert caplog.records == []
    assert loads == ["start", "finish"] * 6


def test_whoever_keeps_wider_casts_gets_a_warning(narrow_path, caplog):
    kept = list(flashpack.stream_tensors(narrow_path, dtype=torch.float32, window_bytes=13 * MIB))
    assert len(kept) == 6
    assert len(caplog.records) == 1


def most_under_way(loads: list[str]) -> int:
    return max(itertools.accumulate(1 if each == "start" else -1 for each in loads))


def test_what_is_read_ahead_leaves_room_in_the_window_for_a_cast(narrow_path, loads):
    for _, tensor in flashpack.stream_tensors(narrow_path, dtype=torch.float32, window_bytes=12 * MIB):
        del tensor
    assert most_under_way(loads) == 2, "two groups of 3 MiB and a cast of 6 MiB"


@pytest.fixture
def unusable_device(monkeypatch) -> torch.device:
    """A device that torch can use and the engine cannot, which any other device stands for."""
    device = torch.device("meta")
    monkeypatch.setattr(_file, "supported_device", lambda *_: device)
    return device


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tensors_go_to_the_device_also_where_the_engine_cannot_use_it(path, tensors, unusable_device, dtype):
    for name, tensor in flashpack.stream_tensors(path, "cuda", dtype=dtype):
        expected = tensors.pop(name)
        assert tensor.device == unusable_device
        assert (tensor.shape, tensor.dtype) == (expected.shape, dtype or expected.dtype)
    assert not tensors
    with safe_open(path).prefetch(device="cuda") as loader:
        assert {tensor.device for _, tensor in loader} == {unusable_device}


def test_what_is_read_ahead_leaves_room_for_a_copy_on_a_device_that_the_engine_cannot_use(
    narrow_path, loads, unusable_device
):
    for _, tensor in flashpack.stream_tensors(narrow_path, "cuda", window_bytes=12 * MIB):
        del tensor
    assert most_under_way(loads) == 3, "three groups of 3 MiB and a copy of 3 MiB"


def test_a_loop_has_one_cast_of_a_group_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(_stream, "_GROUP_BYTES", 64 * MIB)
    tensors = {f"{i}": torch.ones(MIB, dtype=torch.bfloat16) for i in range(8)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    alive = []
    stream = flashpack.stream_tensors(tmp_path / "a.safetensors", dtype=torch.float32)
    for _, tensor in stream:
        del tensor
        alive.append(stream._reading._alive.count_bytes())
    assert alive == [16 * MIB] * 7 + [0]


def test_what_is_dropped_makes_room(path, loads, caplog):
    for _, tensor in flashpack.stream_tensors(path, window_bytes=16 * MIB):
        del tensor
    assert caplog.records == []
    assert "sss" in "".join("s" if each == "start" else "f" for each in loads)


def test_names_choose_and_order(path, tensors):
    names = ["07", "03", "11"]
    assert [name for name, _ in flashpack.stream_tensors(path, names=names, order="names")] == names
    assert {name for name, _ in flashpack.stream_tensors(path, names=names)} == set(names)
    assert {name for name, _ in flashpack.stream_tensors(path, names=lambda name: name > "08")} == {"09", "10", "11"}
    with pytest.raises(flashpack.FlashPackError, match="has no tensors"):
        next(flashpack.stream_tensors(path, names=["absent"]))


def test_several_files_are_one_stream_in_the_order_given(tensors, tmp_path):
    files = []
    for name in ("05", "01", "09"):
        files.append(tmp_path / f"{name}.safetensors")
        safetensors.torch.save_file({name: tensors[name]}, files[-1])
    assert [name for name, _ in flashpack.stream_tensors(files)] == ["05", "01", "09"]
    with pytest.raises(flashpack.FlashPackError, match="both have"):
        next(flashpack.stream_tensors([files[0], files[0]]))


def test_tensors_are_cast(path, tensors):
    for name, tensor in flashpack.stream_tensors(path, dtype=torch.bfloat16):
        assert torch.equal(tensor.nan_to_num(), tensors[name].to(torch.bfloat16).nan_to_num())


def test_every_stripe_of_a_file_with_checksums_is_verified(tensors, tmp_path):
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file(tensors, path)
    raw = bytearray(path.read_bytes())
    for at in range(MIB // 2, COUNT * MIB, MIB):
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(flashpack.FlashPackError, match="do not match their checksum"):
            list(flashpack.stream_tensors(path))
        assert len(list(flashpack.stream_tensors(path, verify="never"))) == COUNT
        raw[at] ^= 1
    path.write_bytes(raw)
    stream = flashpack.stream_tensors(path, verify="always")
    assert len(list(stream)) == COUNT
    assert stream.stats["verified_bytes"] == stream.stats["requested_bytes"]


def test_async_for_gets_the_same(path, tensors):
    async def collect() -> dict[str, torch.Tensor]:
        return {name: tensor async for name, tensor in flashpack.stream_tensors(path)}

    assert_bit_equal(asyncio.run(collect()), tensors)


@pytest.fixture
def gates(monkeypatch) -> tuple[threading.Event, threading.Event]:
    """Two events: the first is set once a transfer is waited for, which takes until the second is set."""
    entered, gate = threading.Event(), threading.Event()
    finish = _native.finish_loads
    monkeypatch.setattr(_native, "finish_loads", lambda *args: entered.set() or (gate.wait() and finish(*args)))
    return entered, gate


async def cancelled(waiter: asyncio.Task, entered: threading.Event) -> None:
    await asyncio.to_thread(entered.wait)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


def test_the_tensor_that_a_cancelled_task_waited_for_goes_to_the_next_one(path, tensors, gates):
    async def collect() -> dict[str, torch.Tensor]:
        entered, gate = gates
        stream = flashpack.stream_tensors(path)
        await cancelled(asyncio.create_task(anext(stream)), entered)
        gate.set()
        return {name: tensor async for name, tensor in stream}

    assert_bit_equal(asyncio.run(collect()), tensors)


def test_the_tensor_that_a_cancelled_task_waited_for_goes_to_next_and_to_other_loops(path, tensors, gates):
    entered, gate = gates
    stream = flashpack.stream_tensors(path)

    async def leave() -> None:
        await cancelled(asyncio.create_task(anext(stream)), entered)
        gate.set()

    asyncio.run(leave())
    first = [next(stream)]

    async def one() -> None:
        first.append(await anext(stream))

    asyncio.run(one())
    assert [name for name, _ in first + list(stream)] == in_file_order(path)


def test_the_error_that_a_cancelled_task_waited_for_goes_to_the_next_one(path, gates, monkeypatch):
    entered, gate = gates
    stream = flashpack.stream_tensors(path)

    def fail(*_: object) -> None:
        entered.set()
        gate.wait()
        raise OSError("the disk is gone")

    monkeypatch.setattr(_native, "finish_loads", fail)

    async def leave() -> None:
        await cancelled(asyncio.create_task(anext(stream)), entered)
        gate.set()

    asyncio.run(leave())
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert list(stream) == []


def test_aclose_ends_the_reads_and_drops_what_a_cancelled_task_waited_for(path, loads, gates):
    entered, gate = gates
    stream = flashpack.stream_tensors(path)

    async def leave() -> None:
        async with contextlib.aclosing(stream):
            await cancelled(asyncio.create_task(anext(stream)), entered)
            gate.set()

    asyncio.run(leave())
    started = loads.count("start")
    assert list(stream) == []
    assert loads.count("start") == started


def test_a_task_that_is_cancelled_leaves_its_stream_with_that_error(path, gates):
    entered, gate = gates
    stream = flashpack.stream_tensors(path)
    close = stream.close
    stream.close = lambda: gate.set() or close()

    async def collect() -> None:
        with stream:
            async for _ in stream:
                pass

    async def main() -> None:
        await cancelled(asyncio.create_task(collect()), entered)

    asyncio.run(main())
    assert list(stream) == []


def test_the_modes_of_the_caller_change_nothing(path):
    with torch.inference_mode():
        _, tensor = next(flashpack.stream_tensors(path))
    assert not tensor.is_inference()


def test_an_error_is_raised_once_also_by_async_for(tensors, tmp_path):
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file(tensors, path)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)

    async def collect() -> list[object]:
        stream = flashpack.stream_tensors(path)
        with pytest.raises(flashpack.FlashPackError, match="checksum"):
            await anext(stream)
        return [pair async for pair in stream]

    assert asyncio.run(collect()) == []
    stream = flashpack.stream_tensors(path)
    with pytest.raises(flashpack.FlashPackError, match="checksum"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("is_there", [False, True])
def test_an_interrupt_between_two_tensors_ends_the_stream_so_that_none_is_passed_over(path, is_there):
    class Interrupted(collections.deque):
        """Where a tensor is put when it has been found."""

        def append(self, found: object) -> None:
            if is_there or isinstance(found, BaseException):
                super().append(found)
            if not isinstance(found, BaseException):
                raise KeyboardInterrupt

    stream = flashpack.stream_tensors(path)
    next(stream)
    stream._found = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    stream._found = collections.deque()
    assert list(stream) == []


def test_the_seconds_of_a_stream_are_those_of_its_reads_one_after_the_other(path, monkeypatch):
    seconds = []
    finish = _native.finish_loads

    def finished(*args: object) -> list[dict[str, object]]:
        stats = finish(*args)
        seconds.extend(each["seconds"] for each in stats)
        return stats

    monkeypatch.setattr(_native, "finish_loads", finished)
    stream = flashpack.stream_tensors(path, window_bytes=1)
    for _, tensor in stream:
        del tensor
    assert len(seconds) > 2
    assert stream.stats["seconds"] >= sum(seconds)


def test_the_warning_names_the_files(path, caplog):
    kept = list(flashpack.stream_tensors([path], window_bytes=1))
    assert len(kept) == COUNT
    assert str(path) in caplog.text


def test_small_tensors_that_were_moved_out_of_their_block_count(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(_stream, "_GROUP_BYTES", 64 * MIB)
    tensors = {f"{i:03}": torch.zeros(15 << 10, dtype=torch.uint8) for i in range(64)}
    tensors["large"] = torch.zeros(9 * MIB, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    stream = flashpack.stream_tensors(tmp_path / "a.safetensors")
    kept = {name: tensor for name, tensor in stream if name != "large"}
    assert len(kept) == 64
    assert stream._reading._alive.count_bytes() == sum(tensor.nbytes for tensor in kept.values())


def test_async_for_reads_on_the_cuda_stream_of_the_task(path, tensors, streams_of_threads, monkeypatch):
    seen = set()
    start = _stream.start
    monkeypatch.setattr(_stream, "start", lambda *args: seen.add(torch.cuda.current_stream()) or start(*args))

    async def collect() -> dict[str, torch.Tensor]:
        with torch.cuda.stream("mine"):
            return {name: tensor async for name, tensor in flashpack.stream_tensors(path)}

    assert_bit_equal(asyncio.run(collect()), tensors)
    assert seen == {"mine"}
