"""Reading into the memory of tensors, and casting while reading."""

from __future__ import annotations

import json
import struct
import sys

import flashpack
import pytest
import torch
from flashpack import _into
from flashpack._checkpoint import open_checkpoint
from flashpack._device import CPU
from flashpack._memory import allocate_block
from flashpack._transfers import ReadOptions
from support import DTYPES, assert_bit_equal, bits, random_tensor

MIB = 1 << 20


@pytest.fixture
def in_small_steps(monkeypatch):
    """Makes each transfer read a few MiB."""
    for name in ("_FULL_BYTES", "_STEP_BORDER_BYTES"):
        monkeypatch.setattr(_into, name, MIB)
    for name in ("_LARGE_BYTES", "_BLOCK_BYTES"):
        monkeypatch.setattr(_into, name, MIB // 2)


@pytest.fixture
def windows(monkeypatch):
    """The windows that have been made."""
    made, start = [], _into._Run.start

    def note(run, step, number):
        load = start(run, step, number)
        made.extend(window for window in run._windows if window is not None and window not in made)
        return load

    monkeypatch.setattr(_into._Run, "start", note)
    return made


@pytest.fixture
def started(monkeypatch):
    """The steps that have been started, in their order."""
    steps, start = [], _into._Run.start

    def note(run, step, number):
        steps.append(step)
        load = start(run, step, number)
        assert step.window_bytes == 0 or step.window_bytes <= run._windows[number].memory.numel()
        return load

    monkeypatch.setattr(_into._Run, "start", note)
    return steps


def random_values(shape, dtype=torch.float32, seed=0):
    """Without NaNs, because torch casts their bits in more than one way."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors_of_all_kinds():
    tensors = {
        "large": random_values((700, 1000), seed=1),
        "row": random_values((1_100_000,), torch.float64, seed=2),
        "halves": random_values((300, 1000, 3), torch.float16, seed=3),
        "kept": random_tensor((900, 900), torch.int32, seed=4),
        "quantised": random_tensor((2 * MIB,), torch.float8_e4m3fn, seed=5),
        "spectrum": random_tensor((100, 50), torch.complex64, seed=6),
        "scale": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "ids": random_tensor((5,), torch.int64, seed=7),
    }
    return tensors | {f"small.{i}": random_values((i % 70 + 1,), seed=i) for i in range(2000)}


def in_bfloat16(tensors):
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {name: tensor.bfloat16() if tensor.dtype in plain else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("how", [{}, {"verify": "always"}, {"verify": "never"}, {"ignore_names": ["large", "small.9"]}])
def test_what_is_cast_while_it_is_read_has_the_values_of_a_cast_after_it(pack, in_small_steps, started, how):
    source = tensors_of_all_kinds()
    path = pack(source)
    expected = in_bfloat16({name: source[name] for name in source if name not in how.get("ignore_names", ())})
    loaded = flashpack.load_file(path, dtype=torch.bfloat16, **how)
    assert_bit_equal(loaded, expected)
    assert list(loaded) == list(flashpack.load_file(path, **how))
    assert len(started) > 5


def test_so_it_has_with_as_few_transfers_as_there_need_be(pack, started):
    source = tensors_of_all_kinds()
    assert_bit_equal(flashpack.load_file(pack(source), dtype="bfloat16"), in_bfloat16(source))
    assert len(started) == 1


def test_so_it_has_when_tensors_are_at_no_multiples_of_their_size(tmp_path, in_small_steps):
    source = {
        "odd": random_tensor((7,), torch.uint8),
        "large": random_values((1000, 1100)),
        "odd_too": random_tensor((2,), torch.uint8),
        "scale": torch.tensor(0.5),
        "double": random_values((300_000,), torch.float64),
        "tail": random_values((3, 5)),
    }
    header, payload = {}, b""
    for name, tensor in source.items():
        header[name] = {
            "dtype": {torch.uint8: "U8", torch.float32: "F32", torch.float64: "F64"}[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(payload), len(payload) + tensor.nbytes],
        }
        payload += bits(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    assert_bit_equal(flashpack.load_file(path, dtype=torch.bfloat16), in_bfloat16(source))


def test_so_it_has_when_the_tensors_are_in_several_files(pack, in_small_steps):
    parts = [{f"{part}.{i}": random_values((300_000 + i,), seed=i) for i in range(3)} for part in range(3)]
    loaded = flashpack.load_file([pack(part) for part in parts], dtype=torch.bfloat16)
    assert_bit_equal(loaded, in_bfloat16(parts[0] | parts[1] | parts[2]))


def test_every_tensor_has_memory_of_its_own(pack, in_small_steps):
    loaded = flashpack.load_file(pack(tensors_of_all_kinds()), dtype=torch.bfloat16)
    storages = {tensor.untyped_storage().data_ptr() for tensor in loaded.values() if tensor.numel()}
    assert len(storages) == len(loaded) - 1
    assert not any(tensor._is_view() or tensor.is_inference() for tensor in loaded.values())


def test_large_tensors_that_keep_their_dtype_go_through_no_window(pack, started):
    source = {"kept": random_tensor((3 * MIB,), torch.uint8), "cast": torch.ones(10)}
    assert_bit_equal(flashpack.load_file(pack(source), dtype="bfloat16"), in_bfloat16(source))
    [step] = started
    assert sum(size for _, _, size, _ in step.straight) == 3 * MIB
    assert step.window_bytes < 4096


def targets_for(checkpoint, memories):
    return [_into.Target(e, CPU, memories[e.name].dtype, memories[e.name]) for e in checkpoint.entries()]


@pytest.mark.parametrize("step_bytes", [MIB, 12 * MIB])
def test_every_stripe_is_verified_in_one_transfer_also_if_most_bytes_go_straight_to_tensors(
    pack, monkeypatch, step_bytes
):
    monkeypatch.setattr(_into, "_FULL_BYTES", step_bytes)
    monkeypatch.setattr(_into, "_STEP_BORDER_BYTES", MIB)
    files = [{f"{part}.{i}": random_values((400_000 + i,), seed=i) for i in range(4)} for part in range(2)]
    files[0] |= {f"small.{i}": random_values((i % 300 + 1,), seed=i) for i in range(4000)}
    source = files[0] | files[1]
    memories = {name: torch.empty_like(tensor) for name, tensor in source.items()}
    for name in ("0.3", "1.0", "small.7"):
        memories[name] = torch.empty_like(source[name], dtype=torch.bfloat16)
    with open_checkpoint(list(map(pack, files))) as checkpoint:
        _, stats = _into.read_into(checkpoint, targets_for(checkpoint, memories), ReadOptions(verify="always"))
        payload_bytes = checkpoint.native.payload_bytes
    assert stats["requested_bytes"] == stats["verified_bytes"] == payload_bytes
    assert_bit_equal(memories, {name: tensor.to(memories[name].dtype) for name, tensor in source.items()})


def test_a_wrong_bit_in_any_stripe_is_an_error(pack, in_small_steps):
    path = pack({str(i): random_tensor((400_000 + i,), seed=i) for i in range(8)})
    raw = bytearray(path.read_bytes())
    for at in range(MIB // 2, 12 * MIB, MIB):
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(flashpack.FlashPackError, match="do not match their checksum"):
            flashpack.load_file(path, dtype=torch.bfloat16)
        raw[at] ^= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_shape_and_strides_gets_the_values(pack, in_small_steps, dtype):
    source = {
        "whole": random_tensor((300, 700), dtype, 1),
        "columns": random_tensor((700, 300), dtype, 2),
        "permuted": random_tensor((40, 50, 60), dtype, 3),
        "every_second": random_tensor((90_000,), dtype, 4),
        "scalar": random_tensor((), dtype, 5),
        "none": random_tensor((0, 3), dtype, 6),
    }
    memories = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in source.items()}
    memories["columns"] = torch.zeros((300, 700), dtype=dtype).t()
    memories["permuted"] = torch.zeros((60, 40, 50), dtype=dtype).permute(1, 2, 0)
    memories["every_second"] = torch.zeros((180_000,), dtype=dtype)[::2]
    with open_checkpoint(pack(source)) as checkpoint:
        assert _into.read_into(checkpoint, targets_for(checkpoint, memories), ReadOptions())[0] == {}
    assert_bit_equal(memories, source)


def test_memory_that_stands_for_conjugates_gets_the_values(pack):
    source = {"w": torch.tensor([1 + 2j, 3 - 4j])}
    memories = {"w": torch.zeros(2, dtype=torch.complex64).conj()}
    with open_checkpoint(pack(source)) as checkpoint:
        _into.read_into(checkpoint, targets_for(checkpoint, memories), ReadOptions())
    assert torch.equal(memories["w"], source["w"])


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4), (3, 1, 2, 2)])
def test_a_range_of_elements_is_cut_into_views_that_have_all_of_it_once(shape):
    whole = torch.zeros(shape[::-1], dtype=torch.int64).permute(*reversed(range(len(shape))))
    numbers = torch.arange(whole.numel()).view(shape)
    whole.copy_(numbers)
    for begin in range(whole.numel() + 1):
        for end in range(begin, whole.numel() + 1):
            parts = list(_into._parts_of(whole, begin, end))
            assert [int(each) for part in parts for each in part.reshape(-1)] == list(range(begin, end))
            assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)


def test_windows_do_not_grow_with_the_file(pack, in_small_steps, started):
    flashpack.load_file(pack({str(i): random_tensor((400_000,), seed=i) for i in range(30)}), dtype="float16")
    assert len(started) > 20
    assert max(step.window_bytes for step in started) <= 2 * MIB


def test_gaps_for_alignment_count_so_that_no_window_is_larger_than_a_full_one_and_a_border(
    pack, in_small_steps, started
):
    files = [{str(elems): random_values((elems,))} for elems in (786_432, 125_000, 136_250, 400_000)]
    source = files[0] | files[1] | files[2] | files[3]
    assert_bit_equal(flashpack.load_file(list(map(pack, files)), dtype=torch.bfloat16), in_bfloat16(source))
    assert len(started) > 4
    assert max(step.window_bytes for step in started) <= 2 * MIB


def test_what_needs_no_window_is_one_transfer_however_its_memory_is_aligned(pack, in_small_steps, started):
    source = {str(i): random_tensor((400_000,), seed=i) for i in range(8)}
    with open_checkpoint(pack(source)) as checkpoint:
        for shift_bytes in (0, 64):
            block = allocate_block(0, checkpoint.native.payload_bytes + shift_bytes)
            targets = [
                _into.Target(entry, CPU, torch.float32, block.tensor(torch.float32, entry.shape, at + shift_bytes))
                for entry in checkpoint.entries()
                for at in [entry.offset_bytes]
            ]
            started.clear()
            _into.read_into(checkpoint, targets, ReadOptions())
            assert_bit_equal({target.entry.name: target.memory for target in targets}, source)
            assert len(started) == 1


@pytest.mark.parametrize(("order", "reads"), [([0, 1, 2, 3], 1), ([1, 0, 2, 3], 3), ([3, 2, 1, 0], 4)])
def test_neighbours_in_the_file_that_are_neighbours_in_memory_are_one_read(pack, started, order, reads):
    source = {str(i): random_tensor((1024,), seed=i) for i in range(4)}
    block = allocate_block(0, 4 * 4096)
    memories = {str(i): block.tensor(torch.float32, (1024,), place * 4096) for i, place in enumerate(order)}
    with open_checkpoint(pack(source)) as checkpoint:
        _into.read_into(checkpoint, targets_for(checkpoint, memories), ReadOptions())
    assert [len(step.straight) for step in started] == [reads]
    assert_bit_equal(memories, source)


def test_only_as_many_transfers_are_under_way_as_there_are_windows(pack, in_small_steps, started, monkeypatch):
    finish, ended = _into._native.finish_loads, []

    def note(loads, tell):
        assert len(started) <= len(ended) + _into._WINDOWS
        ended.append(loads)
        return finish(loads, tell)

    monkeypatch.setattr(_into._native, "finish_loads", note)
    flashpack.load_file(pack({str(i): random_tensor((400_000,), seed=i) for i in range(30)}), dtype="float16")
    assert len(ended) == len(started) > _into._WINDOWS


def test_progress_rises_to_the_end(pack, in_small_steps):
    told = []
    path = pack({str(i): random_tensor((400_000 + i,), seed=i) for i in range(8)})
    total_bytes = sum(4 * (400_000 + i) for i in range(8))
    flashpack.load_file(path, dtype="float16", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (total_bytes, total_bytes)
    assert len({done for done, _ in told}) > 5


def test_a_progress_function_that_raises_ends_all_loads_also_while_somebody_keeps_the_error(
    pack, in_small_steps, windows
):
    path = pack({str(i): random_tensor((400_000 + i,), seed=i) for i in range(8)})

    def stop(done, total):
        if done > 2 * MIB:
            raise InterruptedError

    with pytest.raises(InterruptedError) as kept:
        flashpack.load_file(path, dtype="float64", progress=stop)
    assert len(windows) == _into._WINDOWS
    # A load owns the window that it fills. Here and in the traceback there is one owner each.
    assert max(map(sys.getrefcount, windows)) <= 4
    assert kept.value is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_assign_gives_a_dtype_while_it_reads(pack, in_small_steps, started, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(600, 700), torch.nn.BatchNorm1d(700))
    path = pack(model)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = flashpack.assign_from_file(model, path, dtype=dtype)
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in source.items()}
    assert_bit_equal(dict(model.state_dict()), expected)
    assert report.stats["requested_bytes"] >= 600 * 700 * 4
    assert started


def test_coercing_casts_while_it_reads_where_no_value_can_be_lost(pack, started):
    model = torch.nn.Module()
    model.register_buffer("weight", torch.zeros(3, dtype=torch.float16))
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    flashpack.assign_from_file(model, pack({"weight": torch.ones(3), "count": torch.ones(3)}), coerce_dtype=True)
    assert_bit_equal(
        dict(model.state_dict()), {"weight": torch.ones(3).half(), "count": torch.ones(3, dtype=torch.int64)}
    )
    assert len(started) == 1
