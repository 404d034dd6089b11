"""Parameters and buffers of classes that are not torch's own, and what is hung on parameters."""

from __future__ import annotations

import flashpack
import pytest
import torch
from flashpack import FlashPackMixin
from support import assert_bit_equal, random_tensor, state_of


class Marked(torch.nn.Parameter):
    """Nothing but another name, and an attribute, as many libraries have them."""

    def __new__(cls, data, mark="none"):
        parameter = super().__new__(cls, data)
        parameter.mark = mark
        return parameter


class MarkedTensor(torch.Tensor):
    pass


class Quantised(torch.nn.Parameter):
    """Means something else by its bytes."""

    def to(self, *args, **kwargs):
        raise AssertionError("moved")


class FullyShardedDataParallel(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 2.0))


def with_subclass(model):
    model.linear.weight = Quantised(model.linear.weight.data)
    return "parameter 'linear.weight' is a Quantised"


def with_buffer_subclass(model):
    model.scale = model.scale.as_subclass(type("Scaled", (torch.Tensor,), {"cuda": lambda self: None}))
    return "buffer 'scale' is a Scaled"


def with_fsdp(model):
    model.linear = FullyShardedDataParallel(model.linear)
    return "'linear' is wrapped in FullyShardedDataParallel"


@pytest.mark.parametrize("change", [with_subclass, with_buffer_subclass, with_fsdp])
def test_tensors_of_other_classes_are_refused_by_name(change, pack):
    model = Model()
    path = pack(model)
    message = change(model)
    before = state_of(model)
    with pytest.raises(flashpack.FlashPackError, match=message):
        flashpack.assign_from_file(model, path)
    assert state_of(model) == before


def lazy():
    return torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d())


@pytest.fixture
def trained(pack):
    """A model of lazy modules that has run, and its file."""
    model = lazy()
    model(random_tensor((4, 3)))
    return model.eval(), pack(model)


def test_lazy_modules_that_have_never_run_take_the_shapes_of_the_file(trained):
    model, path = trained
    loaded = lazy().eval()
    weight = loaded[0].weight
    assert flashpack.assign_from_file(loaded, path, strict=True).assigned
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert loaded[0].weight is weight
    assert type(weight) is torch.nn.Parameter
    x = random_tensor((5, 3), seed=7)
    assert torch.equal(loaded(x), model(x))
    assert type(loaded[0]) is torch.nn.Linear


def test_a_load_that_fails_leaves_lazy_modules_lazy(trained):
    model = lazy()
    before = [*model.parameters(), *model.buffers()]
    classes = [type(tensor) for tensor in before]

    def fail(*args):
        raise RuntimeError("refused")

    hook = model.register_load_state_dict_post_hook(fail)
    with pytest.raises(flashpack.FlashPackError, match="refused"):
        flashpack.assign_from_file(model, trained[1])
    assert all(a is b for a, b in zip(before, [*model.parameters(), *model.buffers()], strict=True))
    assert [type(tensor) for tensor in before] == classes
    assert model[0].has_uninitialized_params()
    hook.remove()
    flashpack.assign_from_file(model, trained[1])
    assert_bit_equal(model.state_dict(), trained[0].state_dict())


class Special(torch.nn.Module, FlashPackMixin):
    def __init__(self) -> None:
        super().__init__()
        self.marked = Marked(torch.ones(2, 2), mark="kept")
        self.register_buffer("as_parameter", torch.nn.Parameter(torch.ones(3), requires_grad=False))
        self.register_buffer("as_tensor", torch.ones(3).as_subclass(MarkedTensor))


def source_for(model):
    return {name: random_tensor(tuple(each.shape), seed=i) for i, (name, each) in enumerate(model.state_dict().items())}


@pytest.mark.parametrize("on_meta", [False, True])
def test_classes_that_change_nothing_of_what_tensors_do_load_and_stay(on_meta, pack):
    model = Special()
    source = source_for(model)
    path = pack(source)
    if on_meta:
        model.marked = torch.Tensor._make_subclass(Marked, torch.empty(2, 2, device="meta"), True)
        model.marked.mark = "kept"
        for name, buffer in model._buffers.items():
            on_device = buffer.to("meta")
            is_parameter = isinstance(buffer, torch.nn.Parameter)
            model._buffers[name] = torch.nn.Parameter(on_device, requires_grad=False) if is_parameter else on_device
    marked, as_parameter = model.marked, model.as_parameter
    flashpack.assign_from_file(model, path, device="cpu")
    assert_bit_equal({name: each.as_subclass(torch.Tensor) for name, each in model.state_dict().items()}, source)
    assert type(model.marked) is Marked
    assert model.marked.mark == "kept"
    assert type(model.as_parameter) is torch.nn.Parameter
    assert type(model.as_tensor) is MarkedTensor
    assert on_meta or (model.marked is marked and model.as_parameter is as_parameter)


def test_a_parameter_that_is_also_a_buffer_stays_one_tensor(pack):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(3))
    model.inner = torch.nn.Module()
    model.inner.register_buffer("view", model.weight)
    weight = model.weight
    source = random_tensor((3,))
    flashpack.assign_from_file(model, pack({"weight": source, "inner.view": source}))
    assert model.weight is weight
    assert model.inner.view is weight


def test_a_buffer_that_is_a_parameter_has_the_rules_of_buffers(pack):
    model = torch.nn.Module()
    model.register_buffer("table", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(flashpack.FlashPackError, match="dtype mismatch for buffer 'table'"):
        flashpack.assign_from_file(model, pack({"table": torch.ones(3).double()}))
    assert flashpack.assign_from_file(model, pack({"other": torch.ones(1)}), strict=False).missing == ("table",)


def test_what_fails_puts_back_classes_and_objects(pack, monkeypatch):
    model = Special()
    path = pack(source_for(model))
    before = state_of(model)

    def failing(*args):
        raise RuntimeError("replaced")

    monkeypatch.setattr(flashpack._assign, "_replacement_of", failing)
    with pytest.raises(RuntimeError, match="replaced"):
        flashpack.assign_from_file(model, path)
    assert state_of(model) == before


class Hooked(torch.nn.Module, FlashPackMixin):
    """Hangs hooks on its parameters: on one before the module knows it, on the other afterwards."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        early = torch.nn.Parameter(torch.ones(3))
        self.handles = [early.register_hook(lambda gradient: calls.append("early"))]
        self.early = early
        self.late = torch.nn.Parameter(torch.ones(3))
        self.handles.append(self.late.register_hook(lambda gradient: gradient * 2))
        self.handles.append(self.late.register_post_accumulate_grad_hook(lambda tensor: calls.append("late")))


def test_hooks_that_a_constructor_puts_on_parameters_survive_a_build_without_memory(tmp_path):
    Hooked([]).save_flashpack(tmp_path / "a", silent=True)
    calls = []
    model = Hooked.from_flashpack(tmp_path / "a", calls, silent=True)
    (model.early + model.late).sum().backward()
    assert sorted(calls) == ["early", "late"]
    assert model.late.grad.tolist() == [2, 2, 2]
    for handle in model.handles:
        handle.remove()
    (model.early + model.late).sum().backward()
    assert len(calls) == 2
    assert model.late.grad.tolist() == [3, 3, 3]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda tensor: torch.nested.nested_tensor([tensor])])
def test_a_tensor_that_is_not_dense_is_refused_by_its_name(make, pack):
    model = torch.nn.Module()
    model.odd = torch.nn.Parameter(make(torch.ones(2, 3)))
    with pytest.raises(flashpack.FlashPackError, match="'odd' is not a dense tensor in the model"):
        flashpack.assign_from_file(model, pack({"odd": torch.ones(2, 3)}))
