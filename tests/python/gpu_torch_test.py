"""How loads to a real CUDA device get on with what torch does there: its allocator, streams, graphs, devices."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading

import flashpack
import pytest
import torch
from flashpack import _engine, _into, _transfers
from gpu_support import DEVICE, MIB, load, nbytes, on_host, state_dict
from support import DTYPES, assert_bit_equal, random_tensor, state_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "model.flashpack"
    tensors = state_dict([40 * MIB, 5 * MIB + 3, 1, 0, *range(1000, 3000, 17)])
    flashpack.pack_to_file(tensors, path, target_dtype=None)
    return tensors, path


def requested_bytes():
    """The bytes that torch's allocator was asked for and has not got back, without what it rounds up."""
    gc.collect()
    return torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]


@contextlib.contextmanager
def added_peak():
    """Gives a function that says how many bytes more than at the begin of the block were asked for at any moment."""
    start_bytes = requested_bytes()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    yield lambda: torch.cuda.memory_stats(DEVICE)["requested_bytes.all.peak"] - start_bytes


@pytest.fixture(params=["expandable_segments:False", "expandable_segments:True"])
def allocator(request):
    set_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", torch.cuda.memory._set_allocator_settings)
    torch.cuda.init()
    torch.cuda.empty_cache()
    set_allocator(request.param)
    yield request.param
    torch.cuda.empty_cache()
    set_allocator("expandable_segments:False")


@pytest.fixture
def leave_memory():
    """A function that leaves so many bytes of the device to torch's allocator, beside what it has now."""

    def leave(size_bytes):
        torch.cuda.empty_cache()
        total_bytes = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(DEVICE) + size_bytes) / total_bytes, DEVICE
        )

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_torchs_allocator_serves_every_byte(packed, allocator):
    tensors, path = packed
    before = requested_bytes()
    loaded = flashpack.load_file(path, DEVICE)
    assert nbytes(tensors) <= requested_bytes() - before <= nbytes(tensors) + MIB
    blocks = [
        (block["address"], block["address"] + block["size"])
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    for name, tensor in loaded.items():
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert tensor.nbytes == 0 or any(first <= begin and end <= last for first, last in blocks), name
    assert_bit_equal(on_host(loaded), tensors)
    del loaded, tensor
    assert requested_bytes() == before


@pytest.mark.parametrize("align_bytes", [128, 0])
def test_tensors_begin_where_memory_of_cuda_does(pack, align_bytes):
    tensors = {f"{dtype}": random_tensor((999,), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {f"large {n}": random_tensor((2 * MIB + 77 + n,), torch.bfloat16, n) for n in range(3)}
    path = pack(tensors, target_dtype=None, align_bytes=align_bytes)
    wanted = [name for n, name in enumerate(tensors) if n % 3]
    for loaded, expected in (
        (flashpack.load_file(path, DEVICE), tensors),
        (flashpack.load_file(path, DEVICE, names=wanted), {name: tensors[name] for name in wanted}),
        (flashpack.load_file(path, DEVICE, verify="always"), tensors),
    ):
        assert [name for name, tensor in loaded.items() if tensor.data_ptr() % 256] == []
        assert_bit_equal(on_host(loaded), expected)
    with flashpack.open_file(path, DEVICE) as file:
        assert all(file.get(name).data_ptr() % 256 == 0 for name in tensors)


@pytest.mark.parametrize("elems", [100_000, 300_000, 8 * MIB])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
def test_a_load_holds_little_more_than_what_it_reads_or_what_it_gives(pack, monkeypatch, elems, dtype):
    monkeypatch.setattr(_transfers, "_SEGMENT_BYTES", 16 * MIB)
    tensors = {str(n): random_tensor((elems,), seed=n) for n in range(64 * MIB // (4 * elems))}
    path = pack(tensors, target_dtype=None)
    result_bytes = nbytes(tensors) * (4 if dtype is None else dtype.itemsize) // 4
    before = requested_bytes()
    with added_peak() as peak:
        loaded = flashpack.load_file(path, DEVICE, dtype=dtype)
    assert len(loaded) == len(tensors)
    assert requested_bytes() - before <= result_bytes + MIB
    # A load that casts reads through three windows of at most 16 MiB, so that it holds no second copy of the file.
    windows_bytes = _into._WINDOWS * (_into._FULL_BYTES + _into._STEP_BORDER_BYTES)
    assert peak() <= max(nbytes(tensors), result_bytes) + MIB + (0 if dtype is None else windows_bytes)


def test_a_model_without_memory_is_filled_on_the_device_and_its_ties_stay(pack):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(40_000, 256)
            self.norm = torch.nn.LayerNorm(256)
            self.head = torch.nn.Linear(256, 40_000, bias=False)
            self.head.weight = self.embed.weight

    source = Tied()
    path = pack(source, target_dtype=None)
    with torch.device("meta"):
        model = Tied()
    with added_peak() as peak:
        flashpack.assign_from_file(model, path, device="cuda")
    assert peak() <= source.embed.weight.nbytes + MIB
    assert model.head.weight is model.embed.weight
    assert_bit_equal(on_host(model.state_dict()), source.state_dict())
    flashpack.assign_from_file(model, path, device="cuda", dtype=torch.bfloat16)
    assert model.head.weight is model.embed.weight
    expected = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    assert_bit_equal(on_host(model.state_dict()), expected)


def test_a_device_map_sends_tensors_to_all_its_devices(packed):
    tensors, path = packed
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    told = []
    loaded = flashpack.load_file(
        path, device_map={"": "cpu", "t0": 0, "t1": last}, progress=lambda done, total: told.append((done, total))
    )
    assert loaded["t0"].device == DEVICE
    assert loaded["t1"].device == last
    assert {tensor.device.type for name, tensor in loaded.items() if name not in ("t0", "t1")} == {"cpu"}
    assert_bit_equal(on_host(loaded), tensors)
    assert told == sorted(told)
    assert told[-1] == (nbytes(tensors), nbytes(tensors))


def test_the_current_device_decides_and_stays_current(pack):
    tensors = {"a": random_tensor((1000,))}
    path = pack(tensors)
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            loaded = flashpack.load_file(path, "cuda")
            assert loaded["a"].device == torch.device("cuda", index)
            assert flashpack.load_file(path, DEVICE)["a"].device == DEVICE
            assert torch.cuda.current_device() == index
            assert_bit_equal(on_host(loaded), tensors)
    assert torch.cuda.current_device() == before
    # A default for constructors of tensors is none for loads, which have an argument for it.
    with torch.device("cuda"):
        assert flashpack.load_file(path)["a"].device.type == "cpu"
        assert flashpack.load_file(path, DEVICE)["a"].device == DEVICE


def test_a_file_on_the_device_can_be_read_in_parts(pack):
    tensors = {"wide": random_tensor((300, 7, 1111), torch.bfloat16), "tall": random_tensor((5000, 33), seed=1)}
    with flashpack.open_file(pack(tensors, target_dtype=None), DEVICE) as file:
        for name, index in (
            ("wide", (slice(3, 290), slice(1, 3), slice(5, 900))),
            ("wide", (slice(None, None, 7), -1)),
            ("wide", 5),
            ("tall", (slice(100, 4000), slice(2, 5))),
            ("tall", (slice(0, 0),)),
        ):
            part = file.get_slice(name)[index]
            assert part.device == DEVICE
            assert_bit_equal({"": part.cpu()}, {"": tensors[name][index]})


def test_bytes_that_are_not_those_of_the_checksums_never_reach_a_module(pack):
    source = torch.nn.Linear(1000, 1000)
    path = pack(source)
    raw = bytearray(path.read_bytes())
    raw[12345] ^= 1
    path.write_bytes(raw)
    module = torch.nn.Linear(1000, 1000).to(DEVICE)
    weight, before = module.weight, module.weight.detach().clone()
    with pytest.raises(flashpack.FlashPackError, match="weight"):
        flashpack.assign_from_file(module, path, device="cuda")
    assert module.weight is weight
    assert torch.equal(module.weight, before)


def interrupt(done_bytes, total_bytes):
    raise KeyboardInterrupt


def test_after_ctrl_c_nothing_is_written_to_the_device_any_more(packed):
    tensors, path = packed
    load(path)
    before = requested_bytes()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            flashpack.load_file(path, DEVICE, progress=interrupt)
        assert requested_bytes() == before
        # This gets the memory that the load had.
        scratch = torch.full((nbytes(tensors),), 0xAB, dtype=torch.uint8, device=DEVICE)
        loaded = flashpack.load_file(path, DEVICE)
        assert bool((scratch == 0xAB).all())
        assert_bit_equal(on_host({"t0": loaded["t0"]}), {"t0": tensors["t0"]})
        del scratch, loaded


def test_running_out_of_memory_leaves_nothing_behind_and_the_next_load_works(pack, monkeypatch, leave_memory):
    monkeypatch.setattr(_transfers, "_SEGMENT_BYTES", 16 * MIB)
    tensors = {str(n): random_tensor((2 * MIB,), seed=n) for n in range(20)}
    path = pack(tensors)
    before = requested_bytes()
    leave_memory(64 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        flashpack.load_file(path, DEVICE)
    assert requested_bytes() == before
    leave_memory(nbytes(tensors) + 64 * MIB)
    assert_bit_equal(on_host(flashpack.load_file(path, DEVICE)), tensors)


def test_a_module_is_what_it_was_when_the_memory_does_not_suffice_for_a_cast(pack, leave_memory):
    module = torch.nn.Module()
    for n in range(8):
        module.register_parameter(str(n), torch.nn.Parameter(random_tensor((2 * MIB,), torch.float16, n)))
    path = pack(module.state_dict())
    before, state = requested_bytes(), state_of(module)
    leave_memory(nbytes(module.state_dict()) + 16 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        flashpack.assign_from_file(module, path, device="cuda", dtype=torch.float64)
    assert state_of(module) == state
    assert requested_bytes() == before
    leave_memory(nbytes(module.state_dict()) + 64 * MIB)
    flashpack.assign_from_file(module, path, device="cuda")
    assert {parameter.device for parameter in module.parameters()} == {DEVICE}


def test_a_forked_child_is_told_that_it_cannot_use_cuda_and_can_load_to_the_cpu(pack):
    tensors = {"a": random_tensor((MIB,))}
    path = pack(tensors)
    load(path)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # A child that hangs dies of it.
        try:
            try:
                load(path)
            except RuntimeError as error:
                os.write(writer, str(error).encode())
            assert_bit_equal(flashpack.load_file(path), tensors)
            flashpack.pack_to_file(tensors, f"{path}.child")
            os._exit(0)
        finally:
            os._exit(2)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    assert "fork" in message
    assert_bit_equal(on_host(load(path)[1]), tensors)


def test_the_engine_can_be_given_back_and_made_again(packed):
    tensors, path = packed
    for _ in range(2):
        loaded = load(path)[1]
        _engine.release_engines()
        assert_bit_equal(on_host({"t0": loaded["t0"]}), {"t0": tensors["t0"]})


def test_locked_memory_goes_to_the_device_and_into_files(packed, tmp_path):
    tensors, path = packed
    loaded = flashpack.load_file(path)
    locked = {name: tensor.pin_memory() if tensor.numel() else tensor for name, tensor in loaded.items()}
    assert locked["t1"].is_pinned()
    on_device = {name: tensor.to(DEVICE, non_blocking=True) for name, tensor in locked.items()}
    assert_bit_equal(on_host(on_device), tensors)
    flashpack.pack_to_file(locked, tmp_path / "locked.flashpack", target_dtype=None)
    assert (tmp_path / "locked.flashpack").read_bytes() == path.read_bytes()


def test_a_save_converts_on_the_device_what_it_would_convert_on_the_host(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "plain": torch.randn(3000, 1000, generator=generator),
        "transposed": torch.randn(700, 2100, generator=generator).t(),
        "strided": torch.randn(4000, 900, generator=generator)[::3, ::2],
        "conjugated": torch.randn(1000, dtype=torch.complex64, generator=generator).conj(),
        "counter": torch.arange(1000),
    }
    mixed = {name: tensor.to(DEVICE) if name != "plain" else tensor for name, tensor in tensors.items()}
    for n, dtype in enumerate((None, torch.float16)):
        flashpack.pack_to_file(tensors, tmp_path / f"host{n}", target_dtype=dtype)
        flashpack.pack_to_file(mixed, tmp_path / f"device{n}", target_dtype=dtype)
        assert (tmp_path / f"device{n}").read_bytes() == (tmp_path / f"host{n}").read_bytes()


def test_a_graph_replays_on_loaded_weights_whatever_is_loaded_meanwhile(packed, pack):
    tensors, path = packed
    weight = flashpack.load_file(pack({"w": torch.randn(512, 512)}), DEVICE)["w"]
    x = torch.randn(8, 512, device=DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        expected = torch.relu(x @ weight)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.relu(x @ weight)
    loaded = load(path)[1]
    for _ in range(2):
        y.zero_()
        graph.replay()
        assert torch.allclose(y, expected, rtol=1e-3, atol=1e-3)
    assert_bit_equal(on_host(loaded), tensors)


def test_a_stream_that_is_being_captured_is_a_clear_error_and_the_capture_goes_on(pack, tmp_path):
    path = pack({"a": random_tensor((MIB,))})
    x = torch.ones(1000, device=DEVICE)
    expected = x * 3
    _engine.release_engines()  # The first time none is there.
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(RuntimeError, match="captur"):
                load(path)
            with pytest.raises(RuntimeError, match="captur"):
                flashpack.pack_to_file({"x": x}, tmp_path / "x.flashpack")
            y = x * 3
        graph.replay()
        assert torch.equal(y, expected)
        assert not (tmp_path / "x.flashpack").exists()
        load(path)


@pytest.mark.parametrize("engine_is_there", [True, False])
@pytest.mark.parametrize("own_stream", [True, False])
def test_a_load_does_not_break_what_another_thread_captures(pack, engine_is_there, own_stream):
    source = {"a": random_tensor((20 * MIB,)), "b": random_tensor((100,))}
    path = pack(source)
    x = torch.ones(1000, device=DEVICE)
    expected = x * 3
    load(path)
    torch.cuda.empty_cache()  # So that the load asks CUDA for memory.
    if not engine_is_there:
        _engine.release_engines()
    loaded, errors = {}, []
    stream = torch.cuda.Stream(DEVICE) if own_stream else torch.cuda.default_stream(DEVICE)

    def load_all():
        try:
            with torch.cuda.stream(stream):
                loaded.update(flashpack.load_file(path, DEVICE))
        except BaseException as error:
            errors.append(error)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        thread = threading.Thread(target=load_all)
        thread.start()
        thread.join()
        y = x * 3
    assert errors == []
    graph.replay()
    assert torch.equal(y, expected)
    assert_bit_equal(on_host(loaded), source)


LOADS = """
import sys, threading, torch, flashpack

path, task = sys.argv[1:]
expected = flashpack.load_file(path)
loaded = flashpack.load_file(path, "cuda")
assert all(tensor.data_ptr() % 256 == 0 for tensor in loaded.values() if tensor.numel())
for name, tensor in loaded.items():
    assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].view(torch.uint8)), name
rounds = threading.Semaphore(0)

def work():
    while True:
        flashpack.load_file(path, "cuda")
        rounds.release()

if task == "exit":
    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    for _ in range(4):
        rounds.acquire()
print(torch.cuda.memory.get_allocator_backend())
"""
PROCESSES = {
    "cached": ("exit", {}, "native"),
    "uncached": ("load", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "native"),
    "stream_ordered": ("load", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "cudaMallocAsync"),
}


def test_other_allocators_of_torch_and_the_end_of_an_interpreter_that_loads(pack):
    path = pack({"a": random_tensor((20 * MIB,)), "b": random_tensor((100,)), "c": random_tensor((3 * MIB,), seed=1)})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    # torch reads its settings once, and takes seconds to start: all at the same time.
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", LOADS, path, task],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (task, variables, _) in PROCESSES.items()
    }
    results = {}
    for name, process in processes.items():
        output, errors = process.communicate(timeout=60)
        # torch warns of some settings.
        results[name] = (process.returncode, output.strip(), errors if process.returncode else "")
    assert results == {name: (0, backend, "") for name, (_, _, backend) in PROCESSES.items()}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A model, and directories with its tensors under their names in the model, and in a checkpoint."""
    t = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    import transformers_models as models

    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 8000}
    torch.manual_seed(0)
    model = t.MixtralForCausalLM(
        t.MixtralConfig(num_key_value_heads=1, num_local_experts=4, **(models.TEXT | sizes))
    ).eval()
    directories = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("checkpoint")
    for directory in directories:
        model.save_pretrained(directory)
        checkpoint = safetensors.load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
    flashpack.pack_to_file(model, directories[0] / "model.flashpack")
    flashpack.pack_to_file(checkpoint, directories[1] / "model.flashpack")
    return model, *directories


@pytest.mark.parametrize("device_map", ["cuda", 0, {"": "cuda:0"}])
@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_from_pretrained_brings_one_model_to_the_device(mixtral, device_map, as_checkpoint):
    import transformers_models as models

    model, directory = mixtral[0], mixtral[1 + as_checkpoint]
    with added_peak() as peak:
        loaded = models.with_mixin(type(model)).from_pretrained_flashpack(directory, device_map=device_map)
    # A tensor that transformers has to convert is there twice.
    assert peak() <= nbytes(model.state_dict()) * (1.5 if as_checkpoint else 1.0) + MIB
    assert {tensor.device for tensor in models.tensors_of(loaded).values()} == {DEVICE}
    models.assert_same_model(loaded.cpu(), model)
