"""Files with tensors at offsets that are no multiples of their element size, as some writers make them."""

from __future__ import annotations

import json
import struct

import flashpack
import pytest
import torch
from flashpack.safetensors import safe_open
from support import assert_bit_equal, bits, random_tensor

# Another odd length before each tensor, and two that are large enough for memory of their own.
TENSORS = {
    "odd": random_tensor((7,), torch.uint8),
    "shifted": random_tensor((3, 5)),
    "pad": random_tensor((2,), torch.uint8),
    "shifted_otherwise": random_tensor((11,), torch.int64),
    "large": random_tensor((4096, 150)),
    "byte": random_tensor((1,), torch.uint8),
    "large_halves": random_tensor((4096, 300), torch.bfloat16),
    "empty": torch.empty(0, 3),
}
NAMES = {torch.uint8: "U8", torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}


@pytest.fixture
def path(tmp_path):
    header, payload = {}, b""
    for name, tensor in TENSORS.items():
        begin = len(payload)
        payload += bits(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(payload)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return tmp_path / "odd.safetensors"


def is_aligned(tensor):
    return tensor.data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("how", [{}, {"mmap": True}, {"names": ["large_halves", "shifted"]}])
def test_every_tensor_is_aligned_and_has_its_bytes(path, how):
    loaded = flashpack.load_file(path, **how)
    assert_bit_equal(loaded, {name: TENSORS[name] for name in how.get("names", TENSORS)})
    assert all(map(is_aligned, loaded.values()))


@pytest.mark.parametrize("index", [..., slice(3, 4000), (slice(None), slice(1, 149)), (slice(None, None, 2), 5)])
def test_so_are_parts_of_them(path, index):
    with flashpack.open_file(path) as file:
        for name in ("large", "large_halves", "shifted"):
            if TENSORS[name].shape[0] < 4000 and index is not ...:
                continue
            part = file.get_slice(name)[index]
            assert bits(part) == bits(TENSORS[name][index].contiguous())
            assert is_aligned(part)


INDICES = [torch.tensor([1]), torch.tensor([[1]]), (slice(None), torch.tensor([2])), (..., ...), (1, ..., ...)]


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_parts_of_them_by_tensors_and_dots_are_what_torch_gives(path, index, backend):
    expected = TENSORS["shifted"][index]
    part = safe_open(path, backend=backend).get_slice("shifted")[index]
    assert part.shape == expected.shape
    assert bits(part) == bits(expected)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_so_are_those_of_empty_tensors(path, backend):
    part = safe_open(path, backend=backend).get_slice("empty")
    assert part[:, torch.tensor([1])].shape == (0, 1)
    assert part[..., ...].shape == (0, 3)
    with pytest.raises(IndexError):
        part[torch.tensor([0])]
