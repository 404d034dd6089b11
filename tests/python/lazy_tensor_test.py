from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashpack
import numpy as np
import pytest
import torch
from flashpack import _file
from flashpack.integrations._lazy import LazyTensor
from support import bits, random_tensor

STATE = {
    "matrix": random_tensor((64, 48), torch.bfloat16, 1),
    "experts": torch.randn(4, 6, 10),
    "scale": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is read."""
    shapes: list[tuple[int, ...]] = []
    read = _file.TensorSlice.__getitem__

    def noted(tensor: _file.TensorSlice, index: Any) -> torch.Tensor:
        part = read(tensor, index)
        shapes.append(tuple(part.shape))
        return part

    monkeypatch.setattr(_file.TensorSlice, "__getitem__", noted)
    return shapes


@pytest.fixture
def lazy(tmp_path: Path) -> Callable[[str], LazyTensor]:
    flashpack.pack_to_file(STATE, tmp_path / "a.flashpack")
    file = flashpack.open_file(tmp_path / "a.flashpack")
    return lambda name: LazyTensor.of(file, name, torch.device("cpu"))


def test_what_a_tensor_is_can_be_asked_without_reading_it(lazy, reads):
    for name, tensor in STATE.items():
        asked = lazy(name)
        assert isinstance(asked, torch.Tensor)
        assert (asked.shape, asked.dtype, asked.device) == (tensor.shape, tensor.dtype, tensor.device)
        assert (asked.dim(), asked.numel(), asked.nbytes) == (tensor.dim(), tensor.numel(), tensor.nbytes)
        assert f"shape={list(tensor.shape)}" in repr(asked)
    assert reads == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("matrix", lambda tensor: tensor.narrow(0, 16, 16)),
        ("matrix", lambda tensor: tensor.narrow(1, 8, 8)[3:9]),
        ("matrix", lambda tensor: tensor.narrow(-1, 8, 8)),
        ("matrix", lambda tensor: tensor[-1][::2]),
        ("matrix", lambda tensor: tensor[10:20][2:4].data),
        ("matrix", lambda tensor: tensor.split([16, 48])[1]),
        ("experts", lambda tensor: tensor[2, 1:4]),
        ("experts", lambda tensor: tensor[:, 3].narrow(0, 1, 2)),
        ("experts", lambda tensor: tensor.unbind(1)[5]),
        ("experts", lambda tensor: tensor.chunk(4, dim=1)[2]),
        ("empty", lambda tensor: tensor[:, 1:3]),
        ("empty", lambda tensor: tensor.split(2)[0]),
        ("matrix", lambda tensor: tensor[...]),
        ("scale", lambda tensor: tensor.detach()),
    ],
)
def test_a_part_is_read_alone_and_when_it_is_copied(lazy, reads, name, part):
    expected = part(STATE[name])
    narrowed = part(lazy(name))
    assert reads == []
    assert narrowed.shape == expected.shape
    parameter = torch.nn.Parameter(torch.zeros_like(expected), requires_grad=False)
    parameter.data.copy_(narrowed)
    assert bits(parameter) == bits(expected)
    assert reads == [tuple(expected.shape)]


@pytest.mark.parametrize(
    "operation",
    [
        lambda tensor: tensor.t().contiguous(),
        lambda tensor: tensor.view(-1),
        lambda tensor: tensor.reshape(2, -1),
        lambda tensor: tensor.to(torch.float64),
        lambda tensor: tensor.view(torch.uint8),
        lambda tensor: torch.cat([tensor, tensor[:2]]),
        lambda tensor: torch.stack([tensor[0], tensor[1]]),
        lambda tensor: tensor[torch.tensor([3, 1])],
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor),
        lambda tensor: tensor.clone(),
    ],
)
def test_other_operations_do_with_lazy_tensors_what_they_do_with_others(lazy, operation):
    done = operation(lazy("matrix"))
    assert type(done) is torch.Tensor
    assert bits(done) == bits(operation(STATE["matrix"]))


def test_a_lazy_tensor_can_be_assigned_to_a_part_of_another_tensor(lazy):
    target = torch.zeros(4, 6, 10)
    target[1] = lazy("experts")[3]
    assert torch.equal(target[1], STATE["experts"][3])
    assert not target[0].any()


def test_values_can_be_taken_out(lazy):
    assert lazy("scale").item() == 3.5
    assert lazy("experts").tolist() == STATE["experts"].tolist()
    assert np.array_equal(lazy("experts").numpy(), STATE["experts"].numpy())


def test_bytes_that_are_not_in_memory_have_no_address(lazy):
    with pytest.raises(RuntimeError, match=r"no address: clone\(\)"):
        lazy("matrix").data_ptr()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_each_rank_of_a_tensor_parallel_load_reads_its_part(lazy, reads, ranks, dim):
    size = STATE["matrix"].shape[dim] // ranks
    for rank in range(ranks):
        part = torch.empty_like(STATE["matrix"].narrow(dim, rank * size, size))
        part.copy_(lazy("matrix").narrow(dim, rank * size, size))
        assert bits(part) == bits(STATE["matrix"].narrow(dim, rank * size, size))
    shape = list(STATE["matrix"].shape)
    shape[dim] = size
    assert reads == [tuple(shape)] * ranks


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.mul_(2),
        lambda tensor: tensor.copy_(torch.zeros_like(STATE["matrix"])),
        lambda tensor: tensor[3:5].zero_(),
        lambda tensor: tensor.__setitem__(0, 1.0),
        lambda tensor: tensor.__setitem__(torch.tensor([0, 2]), 1.0),
        lambda tensor: tensor.__iadd__(1),
        lambda tensor: torch.neg(STATE["matrix"], out=tensor),
        lambda tensor: torch._foreach_mul_([torch.ones(2), tensor], 2),
    ],
)
def test_an_operation_that_would_write_to_a_lazy_tensor_is_an_error_and_not_lost(lazy, reads, write):
    with pytest.raises(RuntimeError, match=r"no memory to write to: clone\(\)"):
        write(lazy("matrix"))
    assert reads == []


def test_what_a_lazy_tensor_is_copied_to_can_be_written_to(lazy):
    target = torch.ones(4, 6, 10)
    target.add_(lazy("experts"))
    assert torch.equal(target, STATE["experts"] + 1)
