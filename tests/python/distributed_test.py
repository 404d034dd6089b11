"""Loading on several ranks at once. The ranks are two processes that live as long as this module's tests."""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import flashpack
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from flashpack import _distributed, _transfers, utils
from flashpack.deserialization import resolve_shard_strategy
from support import DTYPES, assert_bit_equal, bits, random_tensor, state_of

SECONDS_TO_ANSWER = 120
NOWHERE = "/nowhere/model.flashpack"


def rank_main(rank, count, meeting_point, pipe):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=count)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send(function(rank, *arguments))
        except Exception as error:
            pipe.send(error)
    dist.destroy_process_group()


class RankProcesses:
    def __init__(self, count, meeting_point):
        context = multiprocessing.get_context("spawn")
        self.pipes, ends = zip(*(context.Pipe() for _ in range(count)), strict=True)
        self.processes = [
            context.Process(target=rank_main, args=(rank, count, meeting_point, end), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments):
        """What function(rank, *arguments) returns or raises on each rank."""
        assert all(process.is_alive() for process in self.processes), "an earlier test has ended the ranks"
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS_TO_ANSWER):
                self.end()
                pytest.fail(f"rank {rank} hangs")
            answers.append(pipe.recv())
        return answers

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[RankProcesses]:
    processes = RankProcesses(2, tmp_path_factory.mktemp("ranks") / "meeting_point")
    yield processes
    processes.end()


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def every_kind():
    """Tensors of all dtypes, one of them larger than a window, and of all degenerate shapes."""
    tensors = {str(dtype): random_tensor((17, 3), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    degenerate = {"scalar": random_tensor(()), "empty": torch.empty(0, 4), "empty_block": torch.empty(0).char()}
    return tensors | degenerate | {"large": random_tensor((50_000,), torch.bfloat16)}


class Model(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.a = torch.nn.Parameter(random_tensor((5, 7), torch.float32, seed))
        self.b = torch.nn.Parameter(random_tensor((300,), torch.float16, seed))
        self.register_buffer("count", random_tensor((), torch.int64, seed))


class PackableModel(Model, flashpack.FlashPackMixin):
    pass


def plain(tensors):
    """What crosses a pipe without torch's shared memory."""
    return {name: (str(tensor.dtype), tuple(tensor.shape), bits(tensor.cpu())) for name, tensor in tensors.items()}


@contextlib.contextmanager
def replaced(owner, name, value):
    saved = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, saved)


def read_windowed(rank, paths, options):
    """Passes blocks on in small windows, while others are still being read."""
    names = ("_SEGMENT_BYTES", "_BATCH_BYTES", "_BATCH_BORDER_BYTES")
    with contextlib.ExitStack() as small:
        small.enter_context(replaced(_distributed, "_WINDOW_BYTES", 4096))
        for name in names:
            small.enter_context(replaced(_transfers, name, 4096))
        storage, metadata = flashpack.read_flashpack_file_distributed(paths[rank], **options)
    return plain(dict(flashpack.iterate_from_flash_tensor(storage, metadata)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("src", [0, 1])
def test_every_rank_gets_the_bytes_of_a_file_that_only_one_sees(ranks, pack, device, src):
    source = every_kind()
    paths = [NOWHERE, NOWHERE]
    paths[src] = str(pack(source))
    answers = ranks(read_windowed, paths, {"device": device, "src": src})
    assert answers == [plain(source)] * 2


def assign(rank, paths, options, seeds=(1, 2)):
    model = Model(seeds[rank])
    before = state_of(model)
    try:
        flashpack.assign_from_file(model, paths[rank], use_distributed_loading=True, **options)
    except Exception:
        assert state_of(model) == before
        raise
    return plain(model.state_dict())


def test_modules_of_all_ranks_get_what_the_first_reads(ranks, pack):
    source = Model()
    assert ranks(assign, [str(pack(source)), NOWHERE], {}) == [plain(source.state_dict())] * 2


@pytest.mark.parametrize("suffix", ["flashpack", "safetensors"])
def test_the_index_decides_on_all_ranks_which_of_several_files_has_a_tensor(ranks, tmp_path, suffix):
    source = Model()
    chosen = {"a": 0, "b": 1, "count": 0}
    for i in range(2):
        state = {name: t if chosen[name] == i else t + 1 for name, t in source.state_dict().items()}
        if suffix == "flashpack":
            flashpack.pack_to_file(state, tmp_path / f"{i}.flashpack")
        else:
            safetensors.torch.save_file(state, tmp_path / f"{i}.safetensors")
    index = tmp_path / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{i}.{suffix}" for name, i in chosen.items()}}))
    assert ranks(assign, [str(index), NOWHERE], {}) == [plain(source.state_dict())] * 2


def assign_from_list(rank, names, options):
    return assign(rank, [names, names], options)


@pytest.mark.parametrize("is_list", [True, False])
def test_all_ranks_load_a_list_of_files_and_a_directory_whose_index_lists_some_of_them(ranks, tmp_path, is_list):
    source = Model()
    state = source.state_dict()
    parts = ({"a": state["a"]}, {name: tensor for name, tensor in state.items() if name != "a"})
    files = [tmp_path / f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for file, part in zip(files, (*parts, {"a": state["a"] + 1, "more": state["a"]}), strict=True):
        safetensors.torch.save_file(part, file)
    listed = {name: file.name for file, part in zip(files, parts, strict=False) for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    path = [str(file) for file in files[:2]] if is_list else str(tmp_path)
    assert ranks(assign_from_list, path, {}) == [plain(state)] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"distributed_sharded": True},
        {"distributed_sharded": True, "distributed_shard_strategy": "Windows"},
        {"keep_flash_ref_on_model": True},
        {"rank": 0, "world_size": 0},
    ],
)
def test_every_way_to_load_gives_the_same_bytes(ranks, pack, options):
    source = Model()
    assert ranks(assign, [str(pack(source)), NOWHERE], options) == [plain(source.state_dict())] * 2


def load_with_mixin(rank, paths):
    model = PackableModel.from_flashpack(paths[rank], use_distributed_loading=True, silent=True)
    return plain(model.state_dict())


def test_the_mixin_loads_on_all_ranks(ranks, pack):
    source = Model()
    assert ranks(load_with_mixin, [str(pack(source)), NOWHERE]) == [plain(source.state_dict())] * 2


def with_large_a(seed):
    """What is wanted of it is not read by the way with something else."""
    model = Model(seed)
    model.a = torch.nn.Parameter(random_tensor((1 << 20,), torch.float32, seed))
    return model


def assign_ignoring(rank, path, ignored):
    model = with_large_a(rank + 1)
    untouched = {name: plain({name: tensor})[name] for name, tensor in model.state_dict().items()}
    flashpack.assign_from_file(model, path, use_distributed_loading=True, ignore_names=ignored[rank])
    loaded = plain(model.state_dict())
    assert all(loaded[name] == untouched[name] for name in ignored[rank])
    return {name: value for name, value in loaded.items() if name not in ignored[rank]}


def test_ranks_may_want_different_tensors_of_the_file(ranks, pack):
    source = plain(with_large_a(0).state_dict())
    first, second = ranks(assign_ignoring, str(pack(with_large_a(0))), [["a"], ["b", "count"]])
    assert first == {"b": source["b"], "count": source["count"]}
    assert second == {"a": source["a"]}


def assert_both_raise(answers, failing, kind, reason):
    """The failing rank raises its own error, the other says whose it was."""
    own, others = answers[failing], answers[1 - failing]
    assert type(own) is kind, own
    assert reason in str(own)
    assert type(others) is RuntimeError, others
    assert f"failed on another rank, {failing}: {kind.__name__}: " in str(others)
    assert reason in str(others)


def test_a_file_that_cannot_be_read_is_an_error_on_all_ranks(ranks):
    answers = ranks(read_windowed, [NOWHERE, NOWHERE], {"device": "cpu"})
    assert_both_raise(answers, 0, FileNotFoundError, "No such file")
    answers = ranks(assign, [NOWHERE, NOWHERE], {})
    assert_both_raise(answers, 0, FileNotFoundError, "No such file")


def assign_to_another_model(rank, path, misfit, options):
    model = Model()
    if rank == misfit:
        model.a = torch.nn.Parameter(torch.zeros(3))
    before = state_of(model)
    try:
        flashpack.assign_from_file(model, path, use_distributed_loading=True, **options)
    finally:
        assert state_of(model) == before


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("misfit", [0, 1])
def test_a_model_that_does_not_fit_on_one_rank_is_an_error_on_all_and_no_module_changes(ranks, pack, keep, misfit):
    answers = ranks(assign_to_another_model, str(pack(Model(9))), misfit, {"keep_flash_ref_on_model": keep})
    assert_both_raise(answers, misfit, flashpack.FlashPackError, "shape mismatch for 'a'")


def assign_strictly_on_one(rank, path, strict):
    model = Model()
    model.register_buffer("extra", torch.zeros(1))
    flashpack.assign_from_file(model, path, use_distributed_loading=True, strict_buffers=rank == strict)


def test_a_strictness_that_fails_on_one_rank_is_an_error_on_all(ranks, pack):
    answers = ranks(assign_strictly_on_one, str(pack(Model())), 1)
    assert_both_raise(answers, 1, flashpack.FlashPackError, "Missing 1 buffers")


def fail(*args, **kwargs):
    raise OSError(5, "Input/output error")


def assign_with_fault(rank, paths, failing, where):
    owner, name = {
        "read": (_distributed, "fill"),
        "memory": (_distributed, "allocate"),
        "tensors": (flashpack._loading, "tensors_of"),
        "commit": (flashpack._loading, "commit"),
    }[where]
    model = Model()
    before = state_of(model)
    try:
        with replaced(owner, name, fail) if rank == failing else contextlib.nullcontext():
            flashpack.assign_from_file(model, paths[rank], use_distributed_loading=True)
    finally:
        # Each rank commits by itself, after all have agreed on everything before.
        assert state_of(model) == before or (where == "commit" and rank != failing)


@pytest.mark.parametrize(
    ("failing", "where"), [(0, "read"), (1, "memory"), (0, "tensors"), (1, "tensors"), (0, "commit"), (1, "commit")]
)
def test_whatever_fails_on_one_rank_is_an_error_on_all_and_the_group_goes_on(ranks, pack, failing, where):
    source = Model()
    paths = [str(pack(source)), NOWHERE]
    assert_both_raise(ranks(assign_with_fault, paths, failing, where), failing, OSError, "Input/output error")
    assert ranks(assign, paths, {}) == [plain(source.state_dict())] * 2


def read_with(rank, path, options_of):
    return read_windowed(rank, [path, path], {"device": "cpu"} | options_of[rank])


def test_arguments_that_cannot_be_are_an_error_on_all_ranks(ranks, pack):
    path = str(pack(Model()))
    answers = ranks(read_with, path, [{}, {"sharded": True, "shard_strategy": "sideways"}])
    assert_both_raise(answers, 1, flashpack.FlashPackError, "unknown shard strategy 'sideways'")
    answers = ranks(read_with, path, [{}, {"metadata": {"index": []}}])
    assert_both_raise(answers, 1, flashpack.FlashPackError, "not that of this file")
    answers = ranks(read_with, path, [{}, {"device": "mps"}])
    assert_both_raise(answers, 1, flashpack.FlashPackError, "Unsupported device")
    for answer in ranks(assign, [path, path], {"mmap": True}):
        assert "maps the file on every rank" in str(answer)
    for answer in ranks(read_windowed, [path, path], {"device": "cpu", "src": 2}):
        assert "src must be a rank below 2" in str(answer)


def load_to_two_kinds_of_device(rank, path):
    ours = _distributed.ranks_of_group("cpu" if rank == 0 else "cuda")
    with ours.together(), ours.checkpoint(path):
        pass


def test_ranks_that_load_to_different_kinds_of_device_do_not_wait_for_each_other(ranks, pack):
    answers = ranks(load_to_two_kinds_of_device, str(pack(Model())))
    assert_both_raise(answers, 1, flashpack.FlashPackError, "different devices")


def read_without_pickle(rank, path):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    with contextlib.ExitStack() as stack:
        for name in ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"):
            stack.enter_context(replaced(dist, name, refuse))
        return read_windowed(rank, [path, path], {"device": "cpu"})


def test_ranks_do_not_unpickle_what_others_send(ranks, pack):
    source = every_kind()
    assert ranks(read_without_pickle, str(pack(source))) == [plain(source)] * 2


def test_a_given_footer_comes_back_as_it_was(alone, pack):
    path = pack({"a": torch.ones(3), "b": torch.ones(3)})
    metadata = flashpack.get_flashpack_file_metadata(path)
    assert flashpack.read_flashpack_file_distributed(path, "cpu", metadata=metadata)[1] is metadata


def test_a_group_of_one_loads_as_if_there_were_none(alone, pack):
    source = Model()
    path = pack(source)
    model = Model(1)
    flashpack.assign_from_file(model, path, use_distributed_loading=True, mmap=True)
    assert_bit_equal(model.state_dict(), source.state_dict())
    storage, metadata = flashpack.read_flashpack_file_distributed(path, "cpu", sharded=True)
    assert_bit_equal(dict(flashpack.iterate_from_flash_tensor(storage, metadata)), source.state_dict())
    assert storage.stats["requested_bytes"] >= sum(block.nbytes for block in storage.blocks)


def test_nccl_alone_moves_nothing_but_cuda_memory(alone, pack, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(ValueError, match="NCCL backend needs a cuda device, got cpu"):
        flashpack.read_flashpack_file_distributed(pack(Model()), device="cpu")
    with pytest.raises(ValueError, match="NCCL backend needs a cuda device, got cpu"):
        flashpack.assign_from_file(Model(), pack(Model()), use_distributed_loading=True)


def test_arguments_come_in_the_order_that_positional_callers_rely_on():
    parameters = inspect.signature(flashpack.read_flashpack_file_distributed).parameters
    assert " ".join(parameters) == "path device src chunk_bytes num_streams silent metadata sharded shard_strategy"
    assert parameters["device"].default == "cuda"


def test_without_a_process_group_there_is_no_distributed_read(pack):
    with pytest.raises(RuntimeError, match="process group"):
        flashpack.read_flashpack_file_distributed(pack(Model()), device="cpu")


@pytest.fixture
def launch(monkeypatch):
    """Sets what torchrun would, and records what is done to make a group."""
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))

    def launched(cuda, **environment):
        calls.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return calls

    return launched


@pytest.mark.parametrize("places", [{}, {"world_size": 1}, {"rank": 0, "local_rank": 0, "world_size": 1}])
def test_a_world_of_one_needs_no_group(launch, pack, places):
    calls = launch(False)
    source, model = Model(), Model(1)
    flashpack.assign_from_file(model, pack(source), use_distributed_loading=True, **places)
    assert_bit_equal(model.state_dict(), source.state_dict())
    assert calls == []


def test_a_group_is_made_from_the_environment_after_its_device_was_chosen(launch):
    calls = launch(True, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
    utils.maybe_init_distributed()
    device = torch.device("cuda", 1)
    options = {"init_method": "env://", "rank": 5, "world_size": 8, "device_id": device}
    assert calls == [("set_device", device), ("nccl", options)]


def test_without_cuda_the_group_is_made_with_gloo(launch):
    calls = launch(False, RANK="1", WORLD_SIZE="2")
    utils.maybe_init_distributed()
    assert calls == [("gloo", {"init_method": "env://", "rank": 1, "world_size": 2})]


def test_a_rank_or_world_size_of_zero_is_a_value_and_goes_before_the_environment(launch):
    calls = launch(True, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
    utils.maybe_init_distributed(rank=0, local_rank=0)
    assert calls[0] == ("set_device", torch.device("cuda", 0))
    assert calls[1][1]["rank"] == 0
    calls.clear()
    utils.maybe_init_distributed(world_size=0)
    assert calls == []


def test_assign_from_file_makes_the_group_that_its_arguments_tell_of(launch, pack):
    calls = launch(False)
    flashpack.assign_from_file(Model(), pack(Model()), use_distributed_loading=True, rank=1, world_size=2)
    assert calls == [("gloo", {"init_method": "env://", "rank": 1, "world_size": 2})]


def test_a_group_that_is_there_is_used(alone, launch):
    calls = launch(True, RANK="1", WORLD_SIZE="2")
    utils.maybe_init_distributed()
    assert calls == []


def test_a_rank_beyond_the_world_is_an_error(launch):
    launch(False, WORLD_SIZE="2")
    with pytest.raises(flashpack.FlashPackError, match="rank must be below the world size of 2, got 2"):
        utils.maybe_init_distributed(rank=2)
    launch(False, WORLD_SIZE="two")
    with pytest.raises(flashpack.FlashPackError, match="WORLD_SIZE in the environment is not a number: 'two'"):
        utils.maybe_init_distributed()


def test_a_shard_strategy_is_known_in_any_case_and_what_is_given_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("FLASHPACK_SHARD_STRATEGY", " WINDOWS ")
    assert resolve_shard_strategy() == "windows"
    assert resolve_shard_strategy("Contiguous") == "contiguous"
    with pytest.raises(ValueError, match="unknown shard strategy 'sideways'"):
        resolve_shard_strategy("sideways")
    monkeypatch.setenv("FLASHPACK_SHARD_STRATEGY", "sideways")
    assert resolve_shard_strategy() == "contiguous"


def test_a_session_of_one_says_nothing_to_anybody(monkeypatch):
    monkeypatch.setattr(_distributed, "dist", SimpleNamespace())
    with pytest.raises(KeyError), _distributed.Ranks().together():
        raise KeyError
    assert _distributed.Ranks().wanted_by_any(SimpleNamespace(path=Path()), []) == []
