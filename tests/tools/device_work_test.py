import json
import os
import threading
import time
from pathlib import Path

import device_work
import flashpack
import pytest
import torch
from flashpack import _native


@pytest.mark.parametrize("job", ["disk 2", "memcpy 3"])
def test_parts_move_the_whole_of_the_file(job, tmp_path, monkeypatch):
    (tmp_path / "model.flashpack").write_bytes(os.urandom(5 * device_work.PART_BYTES + 77))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    answer = device_work.Parts(tmp_path).answer(job)
    assert answer["bytes"] == 5 * device_work.PART_BYTES
    assert answer["seconds"] > 0


def test_a_part_that_reads_too_little_fails(tmp_path, monkeypatch):
    (tmp_path / "model.flashpack").write_bytes(os.urandom(2 * device_work.PART_BYTES))
    monkeypatch.setattr(os, "preadv", lambda *arguments: 5)
    with pytest.raises(OSError, match="short read"):
        device_work.Parts(tmp_path).answer("disk 1")


def test_a_meter_sees_memory_that_has_been_given_back_and_threads_by_their_names():
    before = time.perf_counter()
    meter = device_work.Meter()
    begin = time.perf_counter()
    memory = bytearray(os.urandom(1 << 20) * 64)
    del memory
    end = time.perf_counter()
    result = meter.result()
    assert end - begin <= result["seconds"] <= time.perf_counter() - before
    assert 60 < result["host_peak_mib"] < 200
    assert result["cpu_seconds"] > 0
    name = Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()
    assert device_work.cpu_of_threads(name)[name] > 0
    assert device_work.cpu_of_threads("no thread has this name") == {}


class Stream:
    cuda_stream = 0


@pytest.mark.parametrize(("options", "verified"), [({}, False), ({"verify": "always", "workers": 3}, True)])
def test_an_engine_of_a_sweep_has_its_options_and_verifies_where_it_is_told_to(
    options, verified, tmp_path, monkeypatch
):
    path = tmp_path / "model.flashpack"
    flashpack.pack_to_file({"a": torch.arange(1 << 20)}, path, target_dtype=None)
    made = []
    engine = _native.Engine
    monkeypatch.setattr(_native, "Engine", lambda device, **given: made.append(given) or engine(None, **given))
    monkeypatch.setattr(device_work, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    engines = device_work.Engines(tmp_path)
    answer = engines.answer(json.dumps(options))
    assert made == [{key: value for key, value in options.items() if key != "verify"}]
    assert answer["bytes"] == engines.size_bytes
    assert (answer["stats"]["verified_bytes"] == answer["bytes"]) is verified
    assert 0 <= answer["driver_seconds"] <= answer["cpu_seconds"] + 0.1
    assert torch.equal(engines.target[: 8 << 20].view(torch.int64), torch.arange(1 << 20))


def test_the_start_of_engines_tells_what_memory_each_keeps(monkeypatch):
    engine = _native.Engine
    monkeypatch.setattr(_native, "Engine", lambda device: engine(None, staging_bytes=64 << 20))
    answer = device_work.start_engine(False)
    assert len(answer["next_seconds"]) == 5
    assert answer["engine_mib"] >= 0


def test_every_loader_has_a_file_that_is_made():
    assert {loader.file for loader in device_work.LOADERS.values()} == {"model.flashpack", "model.safetensors"}
