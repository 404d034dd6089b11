"""A rank passes on bytes that it has read elsewhere than on the device of the process group."""

import flashpack
import pytest
import torch
import torch.distributed as dist
from flashpack import _distributed, _transfers


def test_memory_that_the_engine_could_not_reach_is_moved_on_its_way_to_the_others(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append((tensor.device.type, tensor.numel(), src)))
    monkeypatch.setattr(_distributed, "_WINDOW_BYTES", 64)
    window = torch.empty(64, dtype=torch.uint8, device="meta")  # A device that every machine has.
    memory = flashpack._memory.allocate_block(0, 100).memory
    _distributed.Ranks(rank=1, count=2, src=1)._broadcast(memory, window)
    assert sent == [("meta", 64, 1), ("meta", 36, 1)]


def test_a_rank_that_has_no_memory_for_what_it_passes_on_fails_before_the_others_wait_for_it(tmp_path, monkeypatch):
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file({"a": torch.ones(3)}, path)
    ranks = _distributed.Ranks(rank=1, count=2, src=1)
    agreed = []
    monkeypatch.setattr(ranks, "agree", lambda: agreed.append(True))

    def fail(*shape, **options):
        raise MemoryError

    monkeypatch.setattr(torch, "empty", fail)
    with flashpack._checkpoint.open_checkpoint(path) as checkpoint, pytest.raises(MemoryError):
        wanted = _transfers.Wanted(checkpoint, checkpoint.entries())
        ranks.read_blocks(wanted, torch.device("meta"), _transfers.ReadOptions())
    assert agreed == [True]
