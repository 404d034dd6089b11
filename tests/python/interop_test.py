"""Files of the Python reference load here and files written here load there, bit for bit.

FLASHPACK_REFERENCE_PYTHON names an interpreter that has the PyPI package flashpack 0.4.5.
"""

from __future__ import annotations

import flashpack
import pytest
import torch
from packaging.version import Version
from support import DTYPE_NAMES, DTYPES, assert_bit_equal, needs_reference, random_tensor, run_reference

pytestmark = needs_reference

# Packs raw/* to theirs/*, and unpacks ours/* to read/*. Tensors travel as (dtype, shape, bytes).
REFERENCE_JOB = """
import sys, pathlib, torch, flashpack
from flashpack.deserialization import revert_from_file
assert flashpack.__version__ == "0.4.5", flashpack.__version__
root, align_bytes = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for path in (root / "raw").iterdir():
    tensors = {
        name: data.view(getattr(torch, dtype)).view(shape) for name, (dtype, shape, data) in torch.load(path).items()
    }
    flashpack.pack_to_file(tensors, str(root / "theirs" / path.name), target_dtype=None, align_bytes=align_bytes)
for path in (root / "ours").iterdir():
    raw = {
        name: (str(tensor.dtype)[6:], tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).clone())
        for name, tensor in revert_from_file(str(path)).items()
    }
    torch.save(raw, root / "read" / path.name)
"""


def sources(names: list[str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for seed, name in enumerate(names):
        dtype = getattr(torch, name)
        tensors[f"{name}.matrix"] = random_tensor((33, 7), dtype, seed)
        tensors[f"{name}.row"] = random_tensor((5,), dtype, seed + 100)
        tensors[f"{name}.none"] = random_tensor((0, 4), dtype)
    return tensors


@pytest.mark.parametrize("align_bytes", [0, 24, 128])
def test_the_reference_and_this_package_write_the_same_bytes_and_read_each_other(align_bytes, tmp_path):
    assert len(DTYPES) == len(DTYPE_NAMES) or Version(torch.__version__) < Version("2.7")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    packs = {name: sources([name]) for name in names} | {"together": sources(names)}
    for folder in ("raw", "ours", "theirs", "read"):
        (tmp_path / folder).mkdir()
    for stem, tensors in packs.items():
        flashpack.pack_to_file(tensors, tmp_path / "ours" / stem, align_bytes=align_bytes, checksum=False)
        about = {"format": "pt", "title": "\u00e9"}
        flashpack.pack_to_file(tensors, tmp_path / "ours" / f"{stem}.more", align_bytes=align_bytes, metadata=about)
        raw = {n: (str(t.dtype)[6:], tuple(t.shape), t.reshape(-1).view(torch.uint8)) for n, t in tensors.items()}
        torch.save(raw, tmp_path / "raw" / stem)
    run_reference(REFERENCE_JOB, tmp_path, align_bytes)
    for stem, tensors in packs.items():
        theirs = tmp_path / "theirs" / stem
        assert (tmp_path / "ours" / stem).read_bytes() == theirs.read_bytes(), stem
        assert_bit_equal(flashpack.revert_from_file(theirs), tensors)
        for written in (stem, f"{stem}.more"):
            read = torch.load(tmp_path / "read" / written)
            assert_bit_equal(
                {n: data.view(getattr(torch, dtype)).view(shape) for n, (dtype, shape, data) in read.items()}, tensors
            )
