import os
import threading
import time
from pathlib import Path

import device_work
import pytest
import torch


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
    meter = device_work.Meter()
    memory = bytearray(os.urandom(1 << 20) * 64)
    del memory
    result = meter.result()
    assert 60 < result["host_peak_mib"] < 200
    assert result["cpu_seconds"] > 0
    name = Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()
    assert device_work.cpu_of_threads(name)[name] > 0
    assert device_work.cpu_of_threads("no thread has this name") == {}
    assert result["seconds"] <= time.perf_counter() - meter.started


def test_every_loader_has_a_file_that_is_made():
    assert {loader.file for loader in device_work.LOADERS.values()} == {"model.flashpack", "model.safetensors"}
