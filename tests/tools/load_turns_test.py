import argparse
import re
from itertools import pairwise
from pathlib import Path

import flashpack
import load_turns
import page_cache
import pytest
import torch
from load_turns import Loads, engine_of, in_turns

MIB = 1 << 20
DEFAULT = {"chunk_bytes": 4 * MIB, "queue_depth": 8, "workers": 0, "staging_bytes": 64 * MIB, "backend": "auto"}


class Recorded:
    """Notes which engine loads, and says that the second one is twice as fast."""

    def __init__(self):
        self.turns = []

    def check(self, engine, prepare):
        self.turns.append(f"first {engine}")

    def gb_per_s(self, engine, prepare):
        prepare(Path("file"))
        self.turns.append(engine)
        return {"a": 1.0, "b": 2.0}[engine]


def test_who_begins_changes_and_the_first_loads_do_not_count():
    loads = Recorded()
    assert in_turns(loads, ("a", "b"), 3, lambda path: None) == [(1.0, 2.0)] * 3
    assert loads.turns == ["first a", "first b", "a", "b", "b", "a", "a", "b"]


def test_the_memory_may_be_on_huge_pages():
    memory = load_turns.touched_memory(4 * MIB)
    begin = load_turns.address_of(memory)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    for mapping, flags in pairwise(mappings):
        first, last = re.search(r"^([0-9a-f]+)-([0-9a-f]+) ", mapping, re.MULTILINE).groups()
        if int(first, 16) <= begin < int(last, 16):
            # Those of MADV_HUGEPAGE, and not of shared memory, which has a setting of its own.
            assert "hg" in (flags := flags.splitlines()[0].split())
            assert "sh" not in flags
            return
    pytest.fail("the memory is in no mapping")


def test_an_engine_has_the_options_of_its_setting(tmp_path):
    flashpack.pack_to_file({"a": torch.zeros(16 * MIB, dtype=torch.uint8)}, tmp_path / "file", target_dtype=None)
    loads = Loads(tmp_path / "file", 0)
    page_cache.drop_from_page_cache(tmp_path / "file")
    stats = {chunk: loads.once(engine_of(DEFAULT | {"chunk_bytes": chunk * MIB})) for chunk in (1, 4)}
    assert stats[1]["operations"] > 2 * stats[4]["operations"]
    by_workers = loads.once(engine_of(DEFAULT | {"backend": "workers", "workers": 1}))
    assert by_workers["backend"] == "workers"


def test_an_engine_that_loads_other_bytes_is_found_out_although_the_memory_had_the_right_ones(tmp_path):
    content = torch.arange(4 * MIB, dtype=torch.int64)
    flashpack.pack_to_file({"a": content}, tmp_path / "file", target_dtype=None)
    loads, engine = Loads(tmp_path / "file", 0), engine_of(DEFAULT)
    loads.check(engine, page_cache.drop_from_page_cache)
    loads.once = lambda engine: None
    with pytest.raises(RuntimeError, match="other bytes"):
        loads.check(engine, lambda path: None)


def test_a_file_that_stays_in_the_page_cache_is_not_measured_as_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(page_cache, "drop_from_page_cache", lambda path: 0.02)
    with pytest.raises(RuntimeError, match=r"2% of .* stayed in the page cache"):
        load_turns.measure(tmp_path, (DEFAULT, DEFAULT), argparse.Namespace(size_gib=0.01, pairs=1, seconds=0.001))


def test_both_states_of_the_page_cache_are_measured_and_the_file_is_removed(tmp_path):
    options = argparse.Namespace(size_gib=0.01, pairs=3, seconds=0.001)
    speeds = load_turns.measure(tmp_path, (DEFAULT, DEFAULT | {"queue_depth": 2}), options)
    assert list(speeds) == ["disk", "page_cache"]
    for pairs in speeds.values():
        assert len(pairs) == 3
        assert all(speed > 0 for pair in pairs for speed in pair)
    assert list(tmp_path.iterdir()) == []
