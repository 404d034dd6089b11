"""Damaged checkpoints of every format: each is an error that names the file, or gives the bytes that it should.

FLASHPACK_MUTATIONS says how many of each are tried; a failure says the seed of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import flashpack
import pytest
import safetensors.torch
import torch
from flashpack import FlashPackError, commands
from support import bits, random_tensor

COUNT = int(os.environ.get("FLASHPACK_MUTATIONS", "100"))
STATE = {
    "layer.weight": random_tensor((7, 5), seed=1),
    "layer.bias": random_tensor((5,), seed=2),
    "half": random_tensor((9, 3), torch.bfloat16, 3),
    "count": torch.tensor(7),
    "empty": torch.empty(0, 3),
}


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 1, 3))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def overwrite(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, ord('"'), ord("."), data[chance.randrange(len(data))]))


def change_a_number(data: bytearray, chance: random.Random) -> None:
    digits = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
    if digits:
        data[chance.choice(digits)] = ord(chance.choice("0123456789"))


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def drop_or_repeat(data: bytearray, chance: random.Random) -> None:
    begin = chance.randrange(len(data))
    stripe = data[begin : begin + chance.randrange(1, 64)]
    data[begin : begin + len(stripe) * chance.randrange(2)] = stripe * chance.randrange(2)


MUTATIONS = (flip, flip, overwrite, overwrite, change_a_number, cut, drop_or_repeat)


def save_old(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def converted(path: Path) -> dict[str, torch.Tensor]:
    result = path.with_suffix(".flashpack")
    result.unlink(missing_ok=True)
    return flashpack.load_file(commands.convert_to_flashpack(path, result))


def what_was_saved(path: Path) -> Mapping[str, torch.Tensor]:
    """For a format with checksums. A name may have been damaged; nothing says so."""
    return {name: STATE.get(name, tensor) for name, tensor in flashpack.load_file(path).items()}


Load = Callable[[Path], Mapping[str, torch.Tensor]]
FORMATS: dict[str, tuple[Callable[[dict[str, torch.Tensor], Path], None], Load, Load]] = {
    "old.pt": (save_old, converted, load_torch),
    "new.pt": (torch.save, converted, load_torch),
    "a.safetensors": (safetensors.torch.save_file, converted, safetensors.torch.load_file),
    "a.flashpack": (flashpack.pack_to_file, flashpack.load_file, what_was_saved),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_checkpoint_is_an_error_that_names_it_or_gives_the_right_bytes(tmp_path, name):
    save, load, reference = FORMATS[name]
    path = tmp_path / name
    save(STATE, path)
    sound = path.read_bytes()
    counts = {"refused": 0, "loaded": 0}
    for seed in range(COUNT):
        chance = random.Random(seed)
        data = bytearray(sound)
        chance.choice(MUTATIONS)(data, chance)
        path.write_bytes(data)
        try:
            loaded = load(path)
        except FlashPackError as error:
            assert str(path) in str(error), f"seed {seed}"
            counts["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        expected = reference(path)
        assert loaded.keys() == expected.keys(), f"seed {seed}"
        for key, tensor in expected.items():
            assert (bits(loaded[key]), loaded[key].shape) == (bits(tensor), tensor.shape), f"seed {seed}: {key}"
        counts["loaded"] += 1
    print(f"{name}: seeds 0 to {COUNT - 1}: {counts}")
    assert counts["refused"]
