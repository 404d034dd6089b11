"""Reading tensors by name, and parts of them."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import re
from functools import partial

import flashpack
import numpy as np
import pytest
import torch
from flashpack import _file
from support import DTYPES, assert_bit_equal, bits, random_tensor

MIB = 1 << 20


@pytest.fixture
def tensors():
    return {
        "encoder.weight": random_tensor((MIB,), seed=1),
        "encoder.layers.1.weight": random_tensor((300, 1000), torch.bfloat16, 2),
        "decoder.weight": random_tensor((50, 7, 30), torch.float16, 3),
        "decoder.ids": random_tensor((9,), torch.int64, 4),
        "scale": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def path(pack, tensors):
    return pack(tensors)


def test_all_tensors_come_in_file_order_each_with_memory_of_its_own(path, tensors):
    loaded = flashpack.load_file(path)
    assert_bit_equal(loaded, tensors)
    assert list(loaded) == [record["name"] for record in flashpack.get_flashpack_file_metadata(path)["index"]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values() if tensor.numel()}) == 5


def test_only_what_is_named_and_not_ignored_is_read(path, tensors):
    told = []
    loaded = flashpack.load_file(
        path,
        names=["decoder.weight", "decoder.ids", "encoder.weight", "scale"],
        ignore_names=["scale"],
        ignore_prefixes=["encoder"],
        progress=lambda done, total: told.append((done, total)),
    )
    assert_bit_equal(loaded, {name: tensors[name] for name in ("decoder.weight", "decoder.ids")})
    wanted_bytes = sum(tensor.nbytes for tensor in loaded.values())
    assert told[-1] == (wanted_bytes, wanted_bytes)
    assert told == sorted(told)


def test_opening_a_file_of_many_tensors_never_has_the_garbage_collector_walk_through_them(pack):
    path = pack({"w": torch.ones(1)} | {f"layers.{i}": torch.empty(0) for i in range(20_000)})
    rounds = []
    gc.callbacks.append(lambda phase, info: rounds.append(phase))
    try:
        file = flashpack.open_file(path)
        walked = len(rounds)
    finally:
        gc.callbacks.pop()
    assert len(file) == 20_001
    assert walked <= 2
    assert gc.isenabled()


def test_what_is_done_to_the_metadata_of_an_open_file_does_not_matter_to_it(path, tensors):
    with flashpack.open_file(path) as file:
        for record in file.metadata["index"]:
            record.update(offset=10**9, length=10**9, shape=[10**9], macroblock=7)
        assert_bit_equal({name: file.get(name) for name in file}, tensors)


def test_a_name_that_the_file_lacks_is_an_error_that_names_it(path):
    with pytest.raises(flashpack.FlashPackError, match=r"no tensors \['absent'\]"):
        flashpack.load_file(path, names=["scale", "absent"])


def test_dtype_casts_what_is_floating_point(path, tensors):
    loaded = flashpack.load_file(path, dtype=torch.float64, names=["scale", "decoder.ids"])
    assert_bit_equal(loaded, {"scale": tensors["scale"].double(), "decoder.ids": tensors["decoder.ids"]})


def test_a_mapped_file_is_read_when_it_is_touched_and_written_to_privately(path, tensors):
    before = path.read_bytes()
    loaded = flashpack.load_file(path, mmap=True)
    assert_bit_equal(loaded, tensors)
    loaded["scale"].fill_(7)
    assert path.read_bytes() == before
    with pytest.raises(flashpack.FlashPackError, match="mmap=True"):
        flashpack.load_file(path, "cuda", mmap=True)
    with pytest.raises(flashpack.FlashPackError, match="nothing to verify"):
        flashpack.load_file(path, mmap=True, verify="always")


def test_the_longest_module_name_that_fits_decides_on_the_device(path):
    with flashpack._checkpoint.open_checkpoint(path) as checkpoint:
        entries = list(checkpoint.entries())
    device_map = {"": "cpu", "encoder": "cuda:0", "encoder.layers.1": 1, "decoder.weight": "cuda:2", "scal": "cuda:3"}

    def names(device_map):
        places = _file.places_of(entries, "cuda:7", device_map, _file.ReadOptions())
        return {str(place): [entry.name for entry in here] for place, here in places.items()}

    assert names(device_map) == {
        "cuda:0": ["encoder.weight"],
        "cuda:1": ["encoder.layers.1.weight"],
        "cuda:2": ["decoder.weight"],
        "cpu": ["scale", "none", "decoder.ids"],
    }
    assert "scale" in names({"encoder": "cpu"})["cuda:7"]
    assert names({})["cuda:7"] == [entry.name for entry in entries]


def test_tensors_come_in_file_order_from_several_loads_too(path, tensors):
    loaded = flashpack.load_file(path, device_map={"encoder.layers": "cpu:0", "": "cpu"})
    assert_bit_equal(loaded, tensors)
    assert list(loaded) == flashpack.open_file(path).keys()
    assert flashpack.load_file(path, names=[], device_map={"": "cpu"}) == {}


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("there", [True, False])
def test_an_open_device_map_means_one_device(path, tensors, device_map, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    with flashpack._checkpoint.open_checkpoint(path) as checkpoint:
        places = _file.places_of(list(checkpoint.entries()), "cpu", device_map, _file.ReadOptions())
    assert [place.type for place in places] == ["cuda" if there else "cpu"]
    if not there:
        assert_bit_equal(flashpack.load_file(path, device_map=device_map), tensors)


@pytest.mark.parametrize("key", [0, None, b"encoder", ("encoder",)])
def test_a_device_map_with_a_key_that_no_module_can_have_is_an_error_that_names_it(path, key):
    for load in (flashpack.load_file, flashpack.stream_tensors):
        with pytest.raises(flashpack.FlashPackError, match=f"device_map has the key {re.escape(repr(key))}, a "):
            load(path, device_map={"": "cpu", key: "cpu"})


@pytest.mark.parametrize("device", ["mps", "nonsense", object(), 10**30])
def test_devices_that_cannot_be_read_to_are_errors(path, device):
    with pytest.raises(flashpack.FlashPackError, match="Unsupported device"):
        flashpack.load_file(path, device)
    with pytest.raises(flashpack.FlashPackError, match="Unsupported device"):
        flashpack.load_file(path, device_map={"": device})
    with pytest.raises(flashpack.FlashPackError, match="Unsupported device"):
        flashpack.load_file(path, device_map=device)
    with pytest.raises(flashpack.FlashPackError, match="Unsupported device"):
        flashpack.open_file(path, device)


def test_a_progress_function_that_raises_ends_the_load(path):
    def tell(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        flashpack.load_file(path, progress=tell)


def test_an_open_file_gives_tensors_by_name(path, tensors):
    with flashpack.open_file(path) as file:
        assert set(file.keys()) == set(file) == set(tensors)
        assert len(file) == len(tensors)
        assert "scale" in file
        assert "absent" not in file
        assert_bit_equal({name: file.get(name) for name in file.keys()}, tensors)  # noqa: SIM118
        assert bits(file["scale"]) == bits(tensors["scale"])
        with pytest.raises(KeyError, match="absent"):
            file.get("absent")
        with pytest.raises(KeyError, match="absent"):
            file.get_slice("absent")
        assert file.metadata == flashpack.get_flashpack_file_metadata(path)
        assert file.path == str(path)


SLICES = [
    slice(None),
    slice(2, 5),
    slice(-3, None),
    slice(1, None, 3),
    slice(4, 4),
    slice(5, 2),
    slice(0, 1000),
    0,
    -1,
]


def takes(tensor, index) -> bool:
    """Whether this version of torch takes the index: older ones refuse some with dots twice."""
    try:
        tensor[index]
    except IndexError:
        return False
    return True


def test_slices_are_what_torch_gives_in_memory_of_their_own(pack):
    source = random_tensor((6, 5, 4), torch.int16, 1)
    part = flashpack.open_file(pack({"pad": torch.ones(1, dtype=torch.int16), "t": source})).get_slice("t")
    assert part.shape == source.shape
    assert part.dtype is source.dtype
    for index in itertools.chain(SLICES, itertools.product(SLICES, repeat=2), itertools.product(SLICES, repeat=3)):
        assert part[index].equal(source[index]), index
    with_dots = [(..., 2), (1, ...), (1, ..., slice(2)), (slice(2), ..., slice(3), 1), (0, 0, 0, ...)]
    with_dots_twice = [(..., ...), (..., 0, ...), (1, ..., ...), (..., 0, 1, ...), (..., ..., slice(None))]
    for index in (..., (), *with_dots, *filter(partial(takes, source), with_dots_twice)):
        assert part[index].equal(source[index]), index
        assert part[index].untyped_storage().nbytes() == part[index].nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_every_dtype_and_of_scalars_and_empty_tensors(pack, dtype):
    source = {"m": random_tensor((5, 3), dtype), "s": random_tensor((), dtype), "e": random_tensor((0, 3), dtype)}
    file = flashpack.open_file(pack(source))
    assert bits(file.get_slice("m")[1:4, ::2]) == bits(source["m"][1:4, ::2])
    assert bits(file.get_slice("s")[...]) == bits(source["s"])
    assert file.get_slice("e")[:, 1:].shape == (0, 2)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (6, IndexError),
        ((0, -6), IndexError),
        ((0, 0, 0), IndexError),
        ((..., ..., 0), IndexError),
        (slice(None, None, -1), ValueError),
        (True, TypeError),
        (None, TypeError),
        ([0, 1], TypeError),
        ("a", TypeError),
    ],
)
def test_what_is_no_part_is_refused(pack, index, error):
    with pytest.raises(error):
        flashpack.open_file(pack({"t": torch.ones(6, 5)})).get_slice("t")[index]


@pytest.mark.parametrize(
    ("window_bytes", "gap_bytes", "dense_bytes"),
    [(1, 0, 1000), (64, 20, 1000), (300, 64 << 10, 1000), (32 << 20, 64 << 10, 1000), (300, 64 << 10, 0)],
)
def test_boxes_are_right_whether_they_are_read_by_runs_or_by_rows(
    pack, monkeypatch, window_bytes, gap_bytes, dense_bytes
):
    monkeypatch.setattr(_file, "_WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(_file, "_DENSE_BYTES", dense_bytes)
    monkeypatch.setattr(_file, "_SHORT_GAP_BYTES", gap_bytes)
    tensor = random_tensor((5, 4, 6, 3), torch.int16)
    part = flashpack.open_file(pack({"x": random_tensor((7,)), "t": tensor, "y": random_tensor((9,))})).get_slice("t")
    spans = [slice(None), slice(1, 3), slice(0, 1), slice(2, 2), slice(None, None, 2), slice(1, None, 3), -1]
    for index in itertools.product(spans, repeat=4):
        assert torch.equal(part[index], tensor[index]), index


@pytest.mark.parametrize("integer", [np.int64(2), np.uint8(2), torch.tensor(2)])
def test_whatever_is_an_integer_is_an_index(pack, integer):
    tensor = random_tensor((5, 6), torch.int32)
    part = flashpack.open_file(pack({"t": tensor})).get_slice("t")
    for index in (
        integer,
        (integer, integer),
        slice(integer, None),
        (..., integer),
        (slice(None), slice(None, integer)),
    ):
        assert torch.equal(part[index], tensor[index])


@pytest.mark.parametrize(
    "index",
    [
        *(None, True, np.bool_(True), torch.tensor(True), 1.0),
        *([0, 1], np.arange(2), torch.tensor([1]), torch.tensor([[1]]), np.array([1]), (0, torch.tensor([1]))),
    ],
)
def test_what_no_slice_of_safetensors_takes_is_a_clear_error(pack, index):
    part = flashpack.open_file(pack({"t": torch.ones(5, 6)})).get_slice("t")
    with pytest.raises(TypeError, match="parts of a tensor are read by"):
        part[index]


def test_of_a_slice_only_its_bytes_are_read(path, monkeypatch):
    requested = []
    side_of = _file.side_of

    class Spy:
        def load(self, *args, **kwargs):
            stats = side_of(torch.device("cpu")).engine.load(*args, **kwargs)
            requested.append(stats["requested_bytes"])
            return stats

    monkeypatch.setattr(_file, "side_of", lambda device, file: side_of(device, file)._replace(engine=Spy()))
    file = flashpack.open_file(path)
    part = file.get_slice("encoder.layers.1.weight")
    part[10:20]
    part[3, 5:7]
    part[10:20, 100:200]
    part[7:7]
    part[::7, :2]
    file.get_slice("decoder.weight")[:, :, 3:5]
    assert requested == [
        20_000,
        4,
        2000,
        43 * 4,
        50 * 7 * 60 - 56,  # The bytes between runs are read along where they follow each other closely.
    ]


@pytest.mark.parametrize(
    ("shape", "index"),
    [
        ((5000,), slice(None, None, 2)),
        ((600, 9), slice(1, None, 2)),
        ((5000, 1), slice(None, None, 3)),
        ((3, 4000), (slice(None, None, 2), slice(None, None, 2))),
        ((400, 700), (slice(None), slice(4))),
    ],
)
def test_a_slice_of_many_runs_is_read_in_few(pack, monkeypatch, shape, index):
    monkeypatch.setattr(_file, "_WINDOW_BYTES", 4096)
    monkeypatch.setattr(_file, "_MOST_RUNS", 100)
    runs = []
    load = _file.TensorSlice._load

    def count(self, extents, side, repeats=()):
        runs.append(len(extents) * math.prod(count for count, _ in repeats))
        load(self, extents, side, repeats)

    monkeypatch.setattr(_file.TensorSlice, "_load", count)
    tensor = random_tensor(shape, torch.int32)
    assert torch.equal(flashpack.open_file(pack({"t": tensor})).get_slice("t")[index], tensor[index])
    assert max(runs) <= 100


def test_a_part_without_elements_costs_nothing_whatever_its_shape_says(pack):
    path = pack({"t": torch.empty(0, 1 << 40, dtype=torch.int8), "u": torch.ones(2)})
    assert flashpack.open_file(path).get_slice("t")[:, ::2].shape == (0, 1 << 39)


def test_a_slice_of_distant_runs_is_read_into_its_memory_and_not_copied(pack, monkeypatch):
    tensor = random_tensor((2048, 4096), torch.int16)
    part = flashpack.open_file(pack({"pad": random_tensor((3,)), "t": tensor})).get_slice("t")
    read = []
    boxes = _file.TensorSlice._read
    monkeypatch.setattr(_file.TensorSlice, "_read", lambda *args: read.append(boxes(*args)) or read[-1])
    for index in ((slice(None), slice(1024)), (slice(1, None), 5), slice(100, 2000, 3), (7, slice(3, None))):
        result = part[index]
        assert torch.equal(result, tensor[index])
        assert result.data_ptr() == read.pop().data_ptr()
        assert result.untyped_storage().nbytes() == result.nbytes
        assert result.is_contiguous()


def test_a_corrupt_tensor_is_found_when_it_is_read_and_always_finds_it_in_a_part(path, tensors):
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(flashpack.FlashPackError, match="checksum"):
        flashpack.open_file(path).get("encoder.weight")
    assert bits(flashpack.open_file(path, verify="never").get("scale")) == bits(tensors["scale"])
    flashpack.open_file(path).get_slice("encoder.weight")[:3]
    with pytest.raises(flashpack.FlashPackError, match="checksum"):
        flashpack.open_file(path, verify="always").get_slice("encoder.weight")[:3]


def test_handles_refuse_to_be_pickled(path):
    file = flashpack.open_file(path)
    for handle in (file, file.get_slice("scale")):
        for refuse in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot pickle or copy"):
                refuse(handle)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}])
def test_load_file_tells_what_it_did(path, tensors, options):
    stats: dict[str, object] = {}
    flashpack.load_file(path, stats=stats, **options)
    assert stats["requested_bytes"] >= sum(tensor.nbytes for tensor in tensors.values())
    assert stats["seconds"] > 0
    assert stats["backend"]


def test_a_mapped_file_has_no_figures(path):
    stats: dict[str, object] = {}
    flashpack.load_file(path, mmap=True, stats=stats)
    assert stats == {}
