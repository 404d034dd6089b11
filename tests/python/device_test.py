"""Loads to CUDA devices as far as they can be told without one: memory of the CPU stands in for that of devices."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterator

import flashpack
import pytest
import torch
from flashpack import _device, _distributed, _engine, _file, _native, _tensors, _transfers
from flashpack._checkpoint import open_checkpoint
from flashpack._device import CPU, Side, captures_undisturbed, side_of
from support import DTYPES, assert_bit_equal, random_tensor

MIB = 1 << 20
DEVICES = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each device has an engine of its own, and the CPU's memory. Lists what is done with all of them."""
    done: list[str] = []
    engines = [_native.Engine(), _native.Engine()]
    finish_loads = _native.finish_loads

    class Spy:
        def __init__(self, index: int) -> None:
            self._index = index

        def start_load(self, *args, **kwargs) -> _native.Load:
            done.append(f"start {self._index}")
            return engines[self._index].start_load(*args, **kwargs)

    def finish(loads, progress):
        done.append(f"finish {len(loads)}")
        return finish_loads(loads, progress)

    monkeypatch.setattr(_transfers, "side_of", lambda device, file: Side(CPU, Spy(device.index), 0))
    monkeypatch.setattr(_native, "finish_loads", finish)
    return done


def read(path, wanted, **options):
    """Reads to each of DEVICES the tensors that `wanted` names for it."""
    with open_checkpoint(path) as checkpoint:
        entries = {entry.name: entry for entry in checkpoint.entries()}
        chosen = {device: [entries[name] for name in names] for device, names in zip(DEVICES, wanted, strict=False)}
        tensors, _ = _tensors.read_to_devices(checkpoint, chosen, _transfers.ReadOptions(**options))
        return tensors


def block_offset(tensor: torch.Tensor) -> int:
    return tensor.storage_offset() * tensor.element_size()


def blocks_of(tensors: dict[str, torch.Tensor]) -> dict[int, int]:
    """The sizes of the memory behind `tensors`, by address."""
    storages = [tensor.untyped_storage() for tensor in tensors.values() if tensor.numel()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def mixed_tensors() -> dict[str, torch.Tensor]:
    tensors = {f"{dtype}": random_tensor((999,), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {f"large {n}": random_tensor((MIB + 77 + n,), torch.bfloat16, n) for n in range(3)}
    return tensors | {"empty": torch.empty(0, 3), "scalar": torch.tensor(True)}


@pytest.mark.parametrize("align_bytes", [128, 0, 24, 4096])
@pytest.mark.parametrize("verify", ["auto", "always", "never"])
@pytest.mark.parametrize("every", [1, 3])
def test_tensors_begin_at_multiples_of_256_bytes_whatever_the_file_has(pack, stand_ins, align_bytes, verify, every):
    tensors = mixed_tensors()
    path = pack(tensors, align_bytes=align_bytes)
    names = list(tensors)[::every]
    loaded = read(path, [names], verify=verify)
    assert_bit_equal(loaded, {name: tensors[name] for name in names})
    assert [name for name, tensor in loaded.items() if block_offset(tensor) % 256] == []
    assert not any(tensor._is_view() for tensor in loaded.values())


def test_the_checksums_of_a_file_are_looked_at_wherever_its_tensors_go(pack, stand_ins, caplog):
    path = pack(mixed_tensors())
    with open_checkpoint(path) as checkpoint:
        payload_bytes = checkpoint.native.payload_bytes
    with caplog.at_level("INFO", logger="flashpack"):
        read(path, [list(mixed_tensors())])
    assert f"{payload_bytes} verified" in caplog.text


def test_what_devices_read_of_one_stripe_is_verified_by_each_of_them(pack, stand_ins):
    tensors = mixed_tensors()
    path = pack(tensors)
    halves = [list(tensors)[::2], list(tensors)[1::2]]
    assert_bit_equal(read(path, halves, verify="always"), tensors)
    with open_checkpoint(path) as checkpoint:
        last = max((entry for entry in checkpoint.entries() if entry.size_bytes), key=lambda entry: entry.offset_bytes)
    raw = bytearray(path.read_bytes())
    raw[last.offset_bytes] ^= 1
    path.write_bytes(raw)
    for half in halves:
        with pytest.raises(flashpack.FlashPackError, match="checksum"):
            read(path, [half], verify="always")
    with pytest.raises(flashpack.FlashPackError, match="checksum"):
        read(path, halves, verify="always")


@pytest.mark.parametrize("elems", [1000, 100_000, 300_000])
def test_a_load_takes_no_memory_beside_that_of_its_tensors(pack, stand_ins, monkeypatch, elems):
    tensors = {str(n): random_tensor((elems,), seed=n) for n in range(60)}
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **options: allocated.append(size) or empty(size, **options))
    loaded = read(pack(tensors), [list(tensors)])
    monkeypatch.undo()
    assert sum(blocks_of(loaded).values()) == sum(allocated)
    assert sum(allocated) <= sum(tensor.nbytes + 256 for tensor in tensors.values())


def test_a_small_tensor_that_outlives_the_rest_keeps_little(pack, stand_ins):
    tensors = {f"{n}": random_tensor((3 * MIB if n % 2 else 49_152,), seed=n) for n in range(30)}
    loaded = read(pack(tensors, name_order=list(tensors)), [list(tensors)])
    assert len(blocks_of(loaded)) == 3
    assert all(size <= 2 * MIB for size in blocks_of({name: loaded[name] for name in list(tensors)[::2]}).values())


def test_what_nobody_wants_takes_no_memory(pack, stand_ins):
    tensors = {f"{n}": random_tensor((MIB // 8,), seed=n) for n in range(30)}
    path = pack(tensors, name_order=list(tensors))
    wanted = list(tensors)[::2]
    loaded = read(path, [wanted])
    assert_bit_equal(loaded, {name: tensors[name] for name in wanted})
    assert sum(blocks_of(loaded).values()) <= sum(tensors[name].nbytes + 256 for name in wanted)


def test_all_devices_are_loaded_to_at_the_same_time(pack, stand_ins):
    tensors = {str(n): random_tensor((200_000 + n,), seed=n) for n in range(20)}
    names = list(tensors)
    assert_bit_equal(read(pack(tensors), [names[::2], names[1::2]]), tensors)
    assert stand_ins == ["start 0", "start 1", "finish 2"]


def test_the_loads_of_a_device_map_are_those_of_all_its_devices(pack, monkeypatch):
    tensors = {"a.weight": random_tensor((1000,)), "b.weight": random_tensor((999,), seed=1), "c": torch.empty(0)}
    given = []
    read_to_devices = _file.read_to_devices

    def to_the_cpu(checkpoint, wanted, options):
        given.append({device: [entry.name for entry in entries] for device, entries in wanted.items()})
        return read_to_devices(checkpoint, {CPU: [entry for entries in wanted.values() for entry in entries]}, options)

    monkeypatch.setattr(_file, "read_to_devices", to_the_cpu)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, dtype: tensor)
    loaded = flashpack.load_file(pack(tensors), device_map={"a": 0, "b": 1})
    monkeypatch.undo()
    assert_bit_equal(loaded, tensors)
    assert given == [{DEVICES[0]: ["a.weight"], DEVICES[1]: ["b.weight"], CPU: ["c"]}]


def test_progress_counts_all_devices_up_to_the_bytes_that_are_wanted(pack):
    tensors = {str(n): random_tensor((100_001 + n,), seed=n) for n in range(20)}
    told = []
    flashpack.load_file(pack(tensors), progress=lambda done, total: told.append((done, total)))
    wanted_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert told == sorted(told)
    assert told[-1] == (wanted_bytes, wanted_bytes)


@pytest.mark.parametrize("verify", ["auto", "always"])
def test_all_ranks_have_the_same_places_in_memory_whatever_they_verify(pack, stand_ins, monkeypatch, verify):
    """One rank reads, and the others get its blocks whole."""
    path = pack(mixed_tensors(), align_bytes=24)
    monkeypatch.setattr(_distributed.Ranks, "_agree", lambda ranks, failure: None)
    sent: list[torch.Tensor] = []
    messages: list[str] = []

    def send(ranks, message, sender):
        if ranks.rank == sender:
            messages.append(json.dumps(message))
        return json.loads(messages[-1] if ranks.rank == sender else messages.pop(0))

    monkeypatch.setattr(_distributed.Ranks, "_send", send)
    monkeypatch.setattr(_distributed.Ranks, "_broadcast", lambda ranks, memory, window: sent.append(memory))
    elsewhere = torch.device("meta", 0)  # A device that every machine has.
    with open_checkpoint(path) as checkpoint:
        wanted = _transfers.Wanted(checkpoint, checkpoint.entries()[::3])
        reads, receives = (
            _distributed.Ranks(rank, 2, 0, elsewhere).read_blocks(
                wanted, elsewhere, _transfers.ReadOptions(verify=verify if rank == 0 else "never")
            )
            for rank in range(2)
        )
    assert [(block.numel(), block.device.type) for block in sent] == [
        (block.numel(), device) for device in ("cpu", "meta") for block in sent[: len(sent) // 2]
    ]
    assert reads.places == receives.places


@pytest.fixture
def two_loads(pack) -> Iterator[tuple[list[_native.Load], list[torch.Tensor]]]:
    """Loads of one file by two engines, and the memory that they fill."""
    path = pack({"a": random_tensor((4 * MIB,))})
    memory = [torch.zeros(16 * MIB, dtype=torch.uint8) for _ in range(2)]
    with open_checkpoint(path) as checkpoint:
        loads = [
            _native.Engine().start_load(checkpoint.native, [(0, 0, 16 * MIB, each.data_ptr())], each) for each in memory
        ]
    yield loads, memory


def test_loads_that_were_started_are_finished_together(two_loads):
    loads, memory = two_loads
    told = []
    assert [stats["requested_bytes"] for stats in _native.finish_loads(loads, told.append)] == [16 * MIB] * 2
    assert told == sorted(told)
    assert told[-1] == 32 * MIB
    assert torch.equal(memory[0], memory[1])
    assert _native.finish_loads([]) == []
    with pytest.raises((TypeError, RuntimeError)):
        _native.finish_loads([None])


def test_progress_that_raises_ends_all_loads(two_loads):
    loads, memory = two_loads

    def fail(done_bytes):
        raise ZeroDivisionError(done_bytes)

    with pytest.raises(ZeroDivisionError):
        _native.finish_loads(loads, fail)
    for each in memory:
        each.fill_(0xAB)
    loads.clear()
    assert all(bool((each == 0xAB).all()) for each in memory)


def test_a_load_that_is_dropped_has_ended_before_its_memory_goes(two_loads):
    loads, memory = two_loads
    del loads[0]
    memory[0].fill_(0xAB)
    _native.finish_loads(loads)
    assert bool((memory[0] == 0xAB).all())


def test_one_load_that_fails_ends_the_others_and_says_why(pack, stand_ins):
    path = pack({"a": random_tensor((MIB,)), "b": random_tensor((MIB,), seed=1)}, name_order=["a", "b"])
    raw = bytearray(path.read_bytes())
    raw[5 * MIB] ^= 1
    path.write_bytes(raw)
    with pytest.raises(flashpack.FlashPackError, match=r'"b" lies: the bytes do not match their checksum'):
        read(path, [["a"], ["b"]])
    read(path, [["a"], []])


def test_a_load_that_cannot_be_started_ends_those_that_have_been(pack, monkeypatch):
    path = pack({"a": random_tensor((4 * MIB,)), "b": random_tensor((MIB,), seed=1)}, name_order=["a", "b"])
    engine = _native.Engine()
    blocks = []

    class First:
        def start_load(self, checkpoint, reads, memory, *args, **kwargs):
            blocks.extend(memory)
            return engine.start_load(checkpoint, reads, memory, *args, **kwargs)

    class Second:
        def start_load(self, *args, **kwargs):
            raise RuntimeError("no such stream")

    engines = {DEVICES[0]: First(), DEVICES[1]: Second(), CPU: engine}
    monkeypatch.setattr(_transfers, "side_of", lambda device, file: Side(CPU, engines[device], 0))
    with pytest.raises(RuntimeError, match="no such stream") as caught:
        read(path, [["a"], ["b"]])
    blocks[0].memory.fill_(0xAB)
    assert flashpack.load_file(path)["a"].numel() == 4 * MIB
    assert bool((blocks[0].memory == 0xAB).all())
    del caught


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, as torch tells of them, and the engine's part of them."""
    current = threading.local()

    class Guard:
        def __init__(self, index: int) -> None:
            self._index = index

        def __enter__(self) -> None:
            self._before = getattr(current, "index", 0)
            current.index = self._index

        def __exit__(self, *error: object) -> None:
            current.index = self._before

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.cuda_stream = 100 + device.index

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: torch.cuda.current_device() == 1)
    host = _engine.engine()
    monkeypatch.setattr(
        _device, "engine", lambda index=None, file=None: host if index is None else f"engine of {index}"
    )


def test_the_current_device_and_its_stream_are_meant_where_no_number_is_given(two_devices):
    for device in ("cuda", "cuda:0"):
        assert side_of(torch.device(device)) == (DEVICES[0], "engine of 0", 100)
    assert torch.cuda.current_device() == 0


def test_a_device_that_is_not_there_is_an_error_before_anything_is_read(two_devices, pack):
    with pytest.raises(flashpack.FlashPackError, match=r"cuda:2; there are 2"):
        flashpack.load_file(pack({"a": torch.ones(3)}), "cuda:2")


def test_a_stream_that_is_being_captured_is_an_error_before_memory_is_taken(two_devices, pack, tmp_path):
    path = pack({"a": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"cuda:1 is being captured into a CUDA graph"):
        flashpack.load_file(path, "cuda:1")
    with torch.cuda.device(1), pytest.raises(RuntimeError, match=r"cuda:1 is being captured"):
        flashpack.assign_from_file(torch.nn.Module(), path, "cuda", strict=False)
    assert torch.cuda.current_device() == 0


@pytest.fixture
def capture_mode(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The modes that this thread has had in the driver's eyes; the last one is the current."""
    modes = [0]

    def exchange(reference) -> int:
        mode = ctypes.cast(reference, ctypes.POINTER(ctypes.c_int)).contents
        modes.append(mode.value)
        mode.value = modes[-2]
        return 0

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(_device, "_exchange_capture_mode", lambda: exchange)
    return modes


def test_what_is_asked_of_cuda_in_a_load_or_save_does_not_end_captures_of_other_threads(pack, capture_mode, tmp_path):
    path = pack({"a": torch.ones(3)})
    assert capture_mode == [0, 2, 0]
    with flashpack.open_file(path) as file:
        for call in (
            lambda: flashpack.load_file(path, progress=lambda *_: capture_mode.append(capture_mode[-1])),
            lambda: flashpack.assign_from_file(torch.nn.Module(), path, strict=False),
            lambda: flashpack.read_flashpack_file(path),
            lambda: file.get("a"),
            lambda: file.get_slice("a")[1:],
        ):
            capture_mode[:] = [0]
            call()
            assert set(capture_mode[1:-1]) == {2}
            assert capture_mode[-1] == 0
    with pytest.raises(flashpack.FlashPackError):
        flashpack.load_file(path, names=["absent"])
    assert capture_mode[-1] == 0


def test_captures_are_no_matter_where_the_driver_does_not_know_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for exchange in (None, lambda mode: 3):
        monkeypatch.setattr(_device, "_exchange_capture_mode", lambda exchange=exchange: exchange)
        with captures_undisturbed():
            pass


def test_running_out_of_memory_in_code_of_the_models_own_is_told_by_its_class(pack):
    class Hungry(torch.nn.Linear):
        def _load_from_state_dict(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = Hungry(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        flashpack.assign_from_file(model, pack(torch.nn.Linear(2, 2)))
    assert torch.equal(model.weight, before)


def test_an_engine_of_its_own_serves_each_device():
    assert _engine.engine() is _engine.engine()
    assert side_of(CPU) == (CPU, _engine.engine(), 0)
