"""A load that fails or is interrupted while it changes the model."""

from __future__ import annotations

import flashpack
import pytest
import torch
from flashpack import _assign
from support import random_tensor, state_of


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
        self.register_buffer("scale", torch.full((8,), 2.0))


def other_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: random_tensor(tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fatal_step", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_commit_that_fails_half_way_puts_back_what_was_there(fatal_step, error, pack, monkeypatch):
    model = Model()
    model.register_parameter("ghost", torch.nn.Parameter(torch.empty(2, device="meta")))
    model.linear(torch.ones(1, 8)).sum().backward()
    gradient = model.linear.weight.grad
    source = other_values(Model()) | {"linear.weight": torch.ones(8, 8, dtype=torch.int64), "ghost": torch.ones(2)}
    path = pack(source)
    before = state_of(model)
    set_data, steps = _assign._set_data, []

    def fatal(*args):
        set_data(*args)
        steps.append(None)
        if len(steps) == fatal_step:
            raise error

    monkeypatch.setattr(_assign, "_set_data", fatal)
    with pytest.raises(error):
        flashpack.assign_from_file(model, path, device="cpu")
    assert len(steps) == fatal_step
    assert state_of(model) == before
    assert model.linear.weight.grad is gradient


def test_an_interrupt_while_a_model_is_put_back_leaves_nothing_of_the_load(pack, monkeypatch):
    model = Model()
    path = pack(other_values(Model()))
    before = state_of(model)
    set_data, put_back, steps = _assign._set_data, _assign._put_back, []

    def fatal(*args):
        set_data(*args)
        steps.append(None)
        if len(steps) == 2:
            raise RuntimeError

    def interrupted(*args):
        monkeypatch.setattr(_assign, "_put_back", put_back)
        raise KeyboardInterrupt

    monkeypatch.setattr(_assign, "_set_data", fatal)
    monkeypatch.setattr(_assign, "_put_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flashpack.assign_from_file(model, path, device="cpu")
    assert state_of(model) == before


def test_what_cannot_be_put_back_leaves_the_rest_put_back(pack, monkeypatch):
    model = Model()
    path = pack(other_values(Model()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_data, put_back, assigned = _assign._set_data, _assign._put_back, []

    def fatal(parameter, new):
        set_data(parameter, new)
        assigned.append(parameter)
        if len(assigned) == 2:
            raise RuntimeError

    def broken(entry):
        if entry.parameter is assigned[-1]:
            raise ValueError("it cannot be put back")
        put_back(entry)

    monkeypatch.setattr(_assign, "_set_data", fatal)
    monkeypatch.setattr(_assign, "_put_back", broken)
    with pytest.raises(ValueError, match="it cannot be put back"):
        flashpack.assign_from_file(model, path, device="cpu")
    left = [parameter for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert [id(parameter) for parameter in left] == [id(assigned[-1])]
