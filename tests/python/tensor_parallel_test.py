"""How many bytes a tensor-parallel load reads, whose ranks each take a slice of every tensor."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

RANKS = 4
# All in one process, because it takes seconds to start one.
ALL_RANKS = """
import os, sys
from flashpack.safetensors import safe_open
for name, dim in (("rows_cached", 0), ("rows", 0), ("columns", 1)):
    for rank in range(int(sys.argv[2])):
        path = f"{sys.argv[1]}/{name}.safetensors"
        with open(path, "rb") as file:
            advice = os.POSIX_FADV_WILLNEED if "cached" in name else os.POSIX_FADV_DONTNEED
            os.posix_fadvise(file.fileno(), 0, 0, advice)
        with safe_open(path, "pt") as file:
            for tensor in file.keys():
                part = file.get_slice(tensor)
                size = part.get_shape()[dim] // int(sys.argv[2])
                wanted = slice(rank * size, (rank + 1) * size)
                part[wanted] if dim == 0 else part[:, wanted]
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Returns the bytes that all ranks have read, over the size of the checkpoint, by what they took of it.

    The checkpoint has four matrices of 4 MiB with rows of 16 KiB.
    """
    folder = tmp_path_factory.mktemp("checkpoint")
    state = {f"layer.{i}": torch.full((256, 4096), i, dtype=torch.float32) for i in range(4)}
    for name in ("rows_cached", "rows", "columns"):
        path = folder / f"{name}.safetensors"
        safetensors.torch.save_file(state, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    trace = folder / "trace.json"
    environment = {**os.environ, "FLASHPACK_TRACE": str(trace)}
    subprocess.run([sys.executable, "-c", ALL_RANKS, folder, str(RANKS)], env=environment, check=True, timeout=120)
    read = dict.fromkeys(("rows_cached", "rows", "columns"), 0)
    for event in json.loads(trace.read_text()):
        if event["name"] in ("read", "read cached"):
            name = os.path.basename(event["args"]["path"]).removesuffix(".safetensors")
            read[name] += event["args"]["bytes"]
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    return {name: number / size_bytes for name, number in read.items()}


def test_ranks_that_take_rows_read_no_more_than_a_twentieth_beside_what_they_need(read):
    assert 1 <= read["rows_cached"] <= 1.05
    assert 1 <= read["rows"] <= 1.05


def test_a_rank_that_takes_columns_reads_short_gaps_between_them_but_nothing_twice(read):
    assert 1 <= read["columns"] <= RANKS * 1.05
