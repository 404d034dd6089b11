"""Names of flashpack 0.4.5 that others may use, beside its main ones."""

from __future__ import annotations

import os

import flashpack
import torch
from flashpack import _engine, constants, utils
from flashpack.parallel_read import release_pinned_pool
from support import assert_bit_equal, run_python


def test_numbers_of_sharded_loads_are_those_of_the_reference():
    assert (constants.SHARD_ALIGN_BYTES, constants.DEFAULT_SHARD_BYTES) == (4096, 256 << 20)
    assert constants.SHARD_STRATEGIES == ("contiguous", "windows")
    assert constants.SHARD_STRATEGIES == (constants.SHARD_STRATEGY_CONTIGUOUS, constants.SHARD_STRATEGY_WINDOWS)
    assert constants.DEFAULT_SHARD_STRATEGY == "contiguous"


def test_threads_are_bounded_by_processors_or_a_floor_above_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    assert [utils.effective_read_threads(requested) for requested in (-4, 0, 1, 4, 64)] == [1, 1, 1, 4, 4]
    assert [utils.effective_read_threads(requested, floor=16) for requested in (8, 16, 64)] == [8, 16, 16]
    assert utils.effective_read_threads(64, floor=2) == 4


def test_whether_a_library_is_there_is_found_without_importing_it(monkeypatch):
    code = """
import sys
from flashpack import utils
print(utils.diffusers_is_available(), utils.transformers_is_available())
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    answers = run_python(code).split()
    assert set(answers) <= {"True", "False"}
    monkeypatch.setattr(utils, "find_spec", lambda name: None)
    assert not utils.diffusers_is_available()
    assert not utils.transformers_is_available()


def test_a_torch_without_its_newest_dtypes_is_good_for_all_others(tmp_path):
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file({"a": torch.arange(4), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    code = f"""
import torch
for name in ("float8_e8m0fnu", "float4_e2m1fn_x2"):
    if hasattr(torch, name):
        delattr(torch, name)
import flashpack
from flashpack import utils
tensors = flashpack.revert_from_file({os.fspath(path)!r})
assert tensors["a"].tolist() == [0, 1, 2, 3] and tensors["b"].dtype is torch.bfloat16
flashpack.pack_to_file(tensors, {os.fspath(path)!r})
try:
    utils.string_to_dtype("float8_e8m0fnu")
except flashpack.FlashPackError as error:
    print(error)
"""
    assert run_python(code) == "Unsupported dtype string in metadata: float8_e8m0fnu\n"


def test_released_memory_is_made_anew_by_the_next_load(pack):
    source = {"a": torch.arange(1000)}
    path = pack(source)
    before = _engine.engine()
    release_pinned_pool()
    assert_bit_equal(flashpack.revert_from_file(path), source)
    assert _engine.engine() is not before
