"""Tensors as people read them, in a terminal, an interpreter or a notebook."""

from __future__ import annotations

import json
import os

import flashpack
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from flashpack import _listing
from flashpack.__main__ import main
from flashpack._checkpoint import Entry
from flashpack._listing import lines_of
from flashpack.deserialization import read_flashpack_file
from flashpack.safetensors import safe_open

STATE = {
    "layers.10.weight": torch.ones(64, 64),
    "layers.2.weight": torch.ones(3, dtype=torch.bfloat16),
    "bias": torch.ones(()),
}


def run(*arguments):
    return CliRunner().invoke(main, [os.fspath(argument) for argument in arguments])


@pytest.fixture
def path(tmp_path):
    flashpack.pack_to_file(STATE, tmp_path / "model.flashpack")
    return tmp_path / "model.flashpack"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (24_210, "24.2 kB"),
        (999_499, "999 kB"),
        (999_999, "1.00 MB"),
        (16_060_000_000, "16.1 GB"),
        (5 * 10**15, "5.00 PB"),
    ],
)
def test_sizes_have_three_digits_and_a_fitting_unit(size_bytes, text):
    assert _listing.human_bytes(size_bytes) == text


def test_ls_lists_tensors_by_name_in_columns(path, tmp_path):
    lines = [
        "bias              float32   []            4 B",
        "layers.2.weight   bfloat16  [3]           6 B",
        "layers.10.weight  float32   [64, 64]  16.4 kB",
        "3 tensors, 16.4 kB",
    ]
    assert run("ls", path).output.splitlines() == lines
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    assert run("ls", tmp_path / "a.safetensors").output.splitlines() == lines
    assert run("ls", tmp_path).output.splitlines() == lines  # The directory of a model has this file.
    assert json.loads(run("ls", path, "--json").output)[1] == {
        "name": "layers.2.weight",
        "dtype": "bfloat16",
        "shape": [3],
        "size_bytes": 6,
    }


def test_ls_of_no_tensors_and_of_hostile_names(tmp_path, pack):
    safetensors.torch.save_file({}, tmp_path / "none.safetensors")
    assert run("ls", tmp_path / "none.safetensors").output == "0 tensors, 0 B\n"
    output = run("ls", pack({"a\x1b[2J\nb": torch.ones(1)})).output
    assert output == "a\\x1b[2J\\nb  float32  [1]  4 B\n1 tensor, 4 B\n"
    result = run("ls", tmp_path / "none.safetensors", "--json")
    assert json.loads(result.output) == []


def test_handles_say_what_they_are(path):
    about = f"'{path}', 3 tensors, 16.4 kB, on cpu"
    file = flashpack.open_file(path)
    assert repr(file) == f"FlashPackFile({about})"
    assert repr(file.get_slice("layers.2.weight")) == "TensorSlice('layers.2.weight', bfloat16, [3])"
    with safe_open(path, "pt") as opened:
        assert repr(opened) == f"safe_open({about})"
        assert repr(opened.get_slice("layers.2.weight")) == "PySafeSlice('layers.2.weight', bfloat16, [3])"
        with opened.prefetch() as loader:
            assert repr(loader) == "PrefetchLoader(3 tensors)"
    assert repr(opened) == "safe_open(closed)"
    assert opened._repr_html_() == "safe_open(closed)"
    assert repr(flashpack.stream_tensors(path)) == f"TensorStream({path})"
    assert repr(flashpack.stream_tensors([path, "b"])) == f"TensorStream({path}, b)"
    prefetch = flashpack.prefetch_flashpack_file(path)
    prefetch.wait()
    assert repr(prefetch) == f"Prefetch('{path}', 16.5 kB of 16.5 kB)"
    assert repr(read_flashpack_file(path)[0]) == "FlashTensorStorage(2 blocks, 16.4 kB, on cpu)"


def test_in_a_notebook_an_open_file_is_a_table_that_no_name_can_break(pack):
    path = pack({"<script>": torch.ones(2), "b.10": torch.ones(1), "b.9": torch.ones(1)})
    table = flashpack.open_file(path)._repr_html_()
    assert "<td>&lt;script&gt;</td><td>float32</td><td>[2]</td><td>8 B</td>" in table
    assert "<script>" not in table
    assert table.index("b.9") < table.index("b.10")
    with safe_open(path, "pt") as opened:
        assert opened._repr_html_() == table


def test_a_long_table_is_cut(pack):
    table = flashpack.open_file(pack({f"t{i}": torch.ones(1) for i in range(520)}))._repr_html_()
    assert table.count("<td>float32</td>") == 500
    assert "and 20 more" in table


def test_one_long_name_does_not_widen_the_rows_of_all_others():
    entries = [_entry("a" * 3000), *(_entry(f"{i}") for i in range(3))]
    assert [len(line) < 200 for line in lines_of(entries)] == [False, True, True, True]


def _entry(name):
    return Entry(name, "float32", (2,), 0, 8, 0, 0)
