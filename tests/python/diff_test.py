"""flashpack diff: what differs between two checkpoints."""

from __future__ import annotations

import os

import flashpack
import pytest
import safetensors.torch
import torch
from checkpoints import save_index
from click.testing import CliRunner
from flashpack.__main__ import main
from support import DTYPES, random_tensor

STATE = {
    "layers.10.weight": torch.arange(12.0).view(3, 4),
    "layers.2.weight": torch.tensor([1.0, float("nan")]),
    "count": torch.tensor(7),
    "none": torch.empty(0, 3),
}


def diff(*paths):
    result = CliRunner().invoke(main, ["diff", *map(os.fspath, paths)])
    assert result.exit_code == (0 if result.output.startswith("the same") else 1), result.output
    return result.output.splitlines()


@pytest.fixture
def path(pack):
    return pack(STATE)


def test_checkpoints_of_any_format_are_the_same_if_all_bits_are(path, pack, tmp_path):
    same = ["the same: 4 tensors, 64 B"]
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    first, second = dict(list(STATE.items())[:2]), dict(list(STATE.items())[2:])
    index = save_index(tmp_path / "m.safetensors.index.json", {"b.safetensors": first, "c.safetensors": second})
    for other in (path, pack(dict(reversed(STATE.items()))), tmp_path / "a.safetensors", index):
        assert diff(path, other) == same
        assert diff(other, path) == same


def test_each_kind_of_difference_has_a_sign_and_names_are_in_order(path, pack):
    other = {
        "layers.10.weight": STATE["layers.10.weight"] + torch.tensor([0, 0, 0.5, 0]),
        "layers.2.weight": STATE["layers.2.weight"].bfloat16(),
        "count": torch.tensor(8),
        "new": torch.ones(1),
    }
    assert diff(path, pack(other)) == [
        "~ layers.2.weight float32 [2] -> bfloat16 [2]",
        "+ new float32 [1]",
        "- none float32 [0, 3]",
        "! layers.10.weight float32 [3, 4]: 3 of 12 elements differ, by at most 0.5",
        "! count int64 []: 1 of 1 elements differ",
        "5 differences",
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bit_is_found_in_every_dtype(dtype, pack):
    a = random_tensor((5, 3), dtype)
    b = a.clone()
    b.view(torch.uint8)[3, -1] ^= 1
    assert diff(pack({"w": a}), pack({"w": a})) == [f"the same: 1 tensor, {15 * dtype.itemsize} B"]
    found, count = diff(pack({"w": a}), pack({"w": b}))
    assert found.startswith("! w ")
    assert "1 of 15 elements differ" in found
    assert count == "1 difference"


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("a", "b", "how"),
    [
        ([0.0, NAN, INF], [-0.0, NAN, INF], "1 of 3 elements differ, in the sign of zero"),
        ([1.0, NAN, INF], [1.5, NAN, INF], "1 of 3 elements differ, by at most 0.5"),
        ([0.0, 1.0, INF], [-0.0, 3.0, INF], "2 of 3 elements differ, by at most 2"),
        ([1.0, 2.0, 3.0], [NAN, 2.5, 3.0], "2 of 3 elements differ, by at most 0.5 and 1 of them in NaN"),
        ([1.0, 2.0, INF], [NAN, 2.0, NAN], "2 of 3 elements differ, 2 of them in NaN"),
        ([1.0, INF, INF], [1.0, -INF, INF], "1 of 3 elements differ, by at most inf"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("piece", [1, 2, 1 << 20])
def test_the_distance_is_that_of_the_elements_that_differ(a, b, how, dtype, piece, pack, monkeypatch):
    monkeypatch.setattr("flashpack._diff._PIECE", piece)
    found, _ = diff(pack({"w": torch.tensor(a, dtype=dtype)}), pack({"w": torch.tensor(b, dtype=dtype)}))
    assert found.endswith(f" [3]: {how}")


def test_names_cannot_drive_the_terminal(path, pack):
    assert "+ a\\x1b[2J float32 [1]" in diff(path, pack(STATE | {"a\x1b[2J": torch.ones(1)}))


def test_what_is_no_checkpoint_is_an_error(path, tmp_path):
    (tmp_path / "notes").write_text("notes of a meeting")
    result = CliRunner().invoke(main, ["diff", os.fspath(path), os.fspath(tmp_path / "notes")])
    assert result.exit_code == 1
    assert "it is a text" in result.stderr
    assert flashpack.is_flashpack_file(path)
