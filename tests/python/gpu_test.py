"""Loads to and saves from a real CUDA device."""

import os
import threading

import flashpack
import pytest
import torch
from flashpack import _native, _transfers
from gpu_support import DEVICE, MIB, SIZES, load, on_host, state_dict
from support import DTYPES, assert_bit_equal, random_tensor

pytestmark = pytest.mark.gpu


def drop_from_page_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "model.flashpack"
    tensors = state_dict()
    flashpack.pack_to_file(tensors, path, target_dtype=None)
    return tensors, path


@pytest.mark.parametrize("device", ["cuda", "cuda:0", DEVICE])
@pytest.mark.parametrize("cold", [True, False])
def test_a_load_brings_the_bits_through_locked_memory(packed, cold, device):
    tensors, path = packed
    if cold:
        drop_from_page_cache(path)
    storage, loaded = load(path, device)
    assert storage.device == DEVICE
    assert all(tensor.device == DEVICE for tensor in loaded.values())
    assert_bit_equal(on_host(loaded), tensors)
    assert storage.stats["pinned"]
    assert storage.stats["staged_bytes"] > 0


def test_every_dtype_arrives_with_its_bits(pack):
    tensors = {str(dtype): random_tensor((1001,), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    assert_bit_equal(on_host(load(pack(tensors, target_dtype=None))[1]), tensors)


def test_a_module_is_filled_in_place_or_not_at_all(pack):
    source = torch.nn.Sequential(torch.nn.Linear(513, 1027), torch.nn.BatchNorm1d(1027))
    path = pack(source)
    module = torch.nn.Sequential(torch.nn.Linear(513, 1027), torch.nn.BatchNorm1d(1027)).to(DEVICE)
    flashpack.assign_from_file(module, path, device="cuda")
    assert all(tensor.device == DEVICE for tensor in module.state_dict().values())
    assert_bit_equal(on_host(module.state_dict()), source.state_dict())
    with pytest.raises(ValueError):
        flashpack.assign_from_file(torch.nn.Linear(2, 2).to(DEVICE), path, device="cuda", strict=True)


def test_what_the_current_stream_does_with_the_memory_before_and_after_is_kept_in_order(packed):
    tensors, path = packed
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        # The block comes back to the allocator while the stream still writes to it.
        scratch = torch.empty(sum(t.nbytes for t in tensors.values()) + MIB, dtype=torch.uint8, device=DEVICE)
        torch.cuda._sleep(200_000_000)
        scratch.fill_(0xAB)
        del scratch
        loaded = load(path)[1]
        copies = {name: tensor.clone() for name, tensor in loaded.items()}
    stream.synchronize()
    assert_bit_equal(on_host(copies), tensors)


def test_loads_from_several_threads_do_not_disturb_each_other(tmp_path):
    sources, results = [state_dict([5 * MIB + 3, 20 * MIB, *SIZES[2:]], seed=1000 * n) for n in range(4)], {}
    for n, source in enumerate(sources):
        flashpack.pack_to_file(source, tmp_path / f"{n}.flashpack", target_dtype=None)

    def loads(n):
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            for _ in range(3):
                results[n] = on_host(load(tmp_path / f"{n}.flashpack")[1])

    threads = [threading.Thread(target=loads, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, source in enumerate(sources):
        assert_bit_equal(results[n], source)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_loads_to_two_devices_are_both_under_way_before_either_is_waited_for(packed, monkeypatch):
    tensors, path = packed
    done = []
    side_of, finish_loads = _transfers.side_of, _native.finish_loads

    class Spy:
        def __init__(self, device, engine):
            self._device, self._engine = device, engine

        def start_load(self, *args, **options):
            done.append(f"start {self._device.index}")
            return self._engine.start_load(*args, **options)

    def spied(device, file):
        side = side_of(device, file)
        return side._replace(engine=Spy(side.device, side.engine))

    def finish(loads, progress):
        done.append(f"finish {len(loads)}")
        return finish_loads(loads, progress)

    monkeypatch.setattr(_transfers, "side_of", spied)
    monkeypatch.setattr(_native, "finish_loads", finish)
    halves = {name: index % 2 for index, name in enumerate(tensors)}
    loaded = flashpack.load_file(path, device_map=halves)
    assert_bit_equal(on_host(loaded), tensors)
    assert (sorted(done[:2]), done[2:]) == (["start 0", "start 1"], ["finish 2"])


def test_a_save_from_the_device_writes_what_a_save_from_the_host_writes(packed, tmp_path):
    tensors, path = packed
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        on_device = {name: tensor.to(DEVICE, non_blocking=True) for name, tensor in tensors.items()}
        flashpack.pack_to_file(on_device, tmp_path / "from_device.flashpack", target_dtype=None)
    assert (tmp_path / "from_device.flashpack").read_bytes() == path.read_bytes()


def test_a_device_that_is_not_there_is_a_clear_error(packed):
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)device|ordinal"):
        load(packed[1], f"cuda:{torch.cuda.device_count()}")


def test_buffers_that_no_file_has_end_on_the_device_of_the_weights(tmp_path):
    class Model(torch.nn.Module, flashpack.FlashPackMixin):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.register_buffer("positions", torch.arange(4) * 2, persistent=False)

    Model().save_flashpack(tmp_path / "a", silent=True)
    loaded = Model.from_flashpack(tmp_path / "a", device=DEVICE, silent=True)
    assert loaded.positions.device == loaded.linear.weight.device == DEVICE
    assert loaded.positions.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("name", ["llama", "clip", "mixtral"])
def test_all_of_a_transformers_model_ends_on_the_device(name, tmp_path):
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    import transformers_models as models

    model = models.make(name)
    model.save_pretrained(tmp_path)
    model_class = type(model)
    checkpoint = safetensors.load_file(tmp_path / "model.safetensors")
    for tensors in model.state_dict(), checkpoint:
        flashpack.pack_to_file(tensors, tmp_path / "model.flashpack")
        loaded = models.with_mixin(model_class).from_pretrained_flashpack(tmp_path, device_map={"": DEVICE})
        assert {tensor.device for tensor in models.tensors_of(loaded).values()} == {DEVICE}
        models.assert_same_model(loaded.cpu(), model)
