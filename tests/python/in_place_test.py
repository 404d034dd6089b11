"""assign_from_file(in_place=True): reading into the memory that a module has."""

from __future__ import annotations

import errno

import flashpack
import pytest
import torch
from flashpack import _engine, _into, _loading
from support import assert_bit_equal, state_of

MIB = 1 << 20


def random_values(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = torch.nn.Linear(300, 500, dtype=dtype)
        self.turned = torch.nn.Parameter(torch.zeros(200, 300, dtype=dtype).t())
        self.norm = torch.nn.BatchNorm1d(500)
        self.tied = self.first.weight


@pytest.fixture
def source():
    shapes = {"first.weight": (500, 300), "first.bias": (500,), "turned": (300, 200)}
    tensors = {name: random_values(shape, seed=len(name)) for name, shape in shapes.items()}
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensors[f"norm.{name}"] = random_values((500,), seed=len(name))
    return tensors | {"norm.num_batches_tracked": torch.tensor(7)}


@pytest.fixture
def in_small_steps(monkeypatch):
    for name in ("_FULL_BYTES", "_STEP_BORDER_BYTES"):
        monkeypatch.setattr(_into, name, MIB)


def values_of(model):
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "tied"}


def places_of(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for name, tensor in named}


def test_tensors_keep_their_memory_and_get_the_values_of_the_file(pack, source, in_small_steps):
    model = Model()
    before = places_of(model)
    report = flashpack.assign_from_file(model, pack(source), in_place=True)
    assert places_of(model) == before
    assert_bit_equal(values_of(model), source)
    assert set(report.assigned) == set(source)
    assert report.stats["requested_bytes"] >= sum(tensor.nbytes for tensor in source.values())


def test_they_keep_their_dtype_too(pack, source, in_small_steps):
    model = Model(torch.bfloat16)
    before = places_of(model)
    flashpack.assign_from_file(model, pack(source), in_place=True)
    assert places_of(model) == before
    cast = {name: source[name].bfloat16() for name in ("first.weight", "first.bias", "turned")}
    assert_bit_equal(values_of(model), source | cast)


def test_what_the_memory_can_take_as_it_is_goes_through_no_window(pack, monkeypatch):
    steps, start = [], _into._Run.start
    monkeypatch.setattr(_into._Run, "start", lambda run, step, n: steps.append(step) or start(run, step, n))
    model = torch.nn.Linear(500, 500)
    path = pack({"weight": random_values((500, 500)), "bias": random_values((500,))})
    flashpack.assign_from_file(model, path, in_place=True)
    [step] = steps
    assert {address for *_, address in step.straight} == {model.weight.data_ptr(), model.bias.data_ptr()}
    assert step.window_bytes < 4096


def test_what_autograd_has_saved_of_a_tensor_is_known_to_be_gone(pack):
    model = torch.nn.Linear(3, 3)
    path = pack(model)
    loss = model(torch.ones(2, 3, requires_grad=True)).sum()
    flashpack.assign_from_file(model, path, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(torch.ones(2, 3)).sum().backward()
    assert model.weight.grad is not None


def test_gradients_and_optimizers_stay_valid(pack):
    model = torch.nn.Linear(3, 3)
    path = pack({"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 3)).sum().backward()
    grad = model.weight.grad
    flashpack.assign_from_file(model, path, in_place=True)
    assert model.weight.grad is grad
    optimizer.step()
    assert torch.equal(model.weight.detach(), torch.zeros(3, 3))


def test_tensors_without_memory_get_new_memory(pack, source):
    model = Model(torch.bfloat16)
    with torch.device("meta"):
        model.first = torch.nn.Linear(300, 500)
    model.tied = model.first.weight
    flashpack.assign_from_file(model, pack(source), in_place=True)
    assert model.tied is model.first.weight
    assert_bit_equal(values_of(model), source | {"turned": source["turned"].bfloat16()})


def test_so_do_parameters_that_are_lazy(pack):
    model = torch.nn.Module()
    model.weight = torch.nn.UninitializedParameter()
    flashpack.assign_from_file(model, pack({"weight": torch.ones(4, 3)}), in_place=True)
    assert type(model.weight) is torch.nn.Parameter
    assert_bit_equal(dict(model.state_dict()), {"weight": torch.ones(4, 3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_that_were_made_in_inference_mode_can_be_read_into(pack, dtype):
    with torch.inference_mode():
        model = torch.nn.Linear(3, 3, dtype=dtype)
    before = places_of(model)
    flashpack.assign_from_file(model, pack({"weight": torch.ones(3, 3), "bias": torch.ones(3)}), in_place=True)
    assert places_of(model) == before
    assert torch.equal(model.weight, torch.ones(3, 3, dtype=dtype))


def test_a_parameter_that_another_thread_gives_a_smaller_size_meanwhile_is_an_error(pack, monkeypatch):
    model = torch.nn.Linear(300, 500)
    path = pack({"weight": random_values((500, 300)), "bias": random_values((500,))})
    make_targets = _loading.targets_in_place

    def late(*arguments):
        model.weight.data = torch.zeros(3)
        return make_targets(*arguments)

    monkeypatch.setattr(_loading, "targets_in_place", late)
    with pytest.raises(ValueError, match=r"shape mismatch for 'weight': model=\[3\]"):
        flashpack.assign_from_file(model, path, in_place=True)


def test_a_parameter_that_another_thread_gives_other_memory_meanwhile_keeps_it(pack, monkeypatch):
    model = torch.nn.Linear(300, 500)
    expected = {"weight": random_values((500, 300)), "bias": random_values((500,))}
    old, new = model.weight.detach(), torch.zeros(3)
    load = _loading.load_in_place

    def late(*arguments):
        model.weight.data = new
        return load(*arguments)

    monkeypatch.setattr(_loading, "load_in_place", late)
    flashpack.assign_from_file(model, pack(expected), in_place=True)
    assert_bit_equal({"weight": old, "bias": model.bias.detach()}, expected)
    assert model.weight.data_ptr() == new.data_ptr()
    assert torch.equal(new, torch.zeros(3))


def test_what_the_file_lacks_stays_as_it_is(pack, source):
    model = Model()
    turned = model.turned.detach().clone()
    del source["turned"]
    report = flashpack.assign_from_file(model, pack(source), in_place=True, strict=False)
    assert report.missing == ("turned",)
    assert torch.equal(model.turned.detach(), turned)


def shares_memory(model):
    model.first.weight.data = torch.zeros(600, 300)[:500]
    model.norm.bias.data = model.first.weight.data.view(-1)[300:800]


def shares_memory_with_a_view(model):
    model.first.weight.data = torch.zeros(600, 300)[:500]
    model.turned.data = model.first.weight.data[:300, :200]


def shares_memory_of_two_views(model):
    both = torch.zeros(500, 4)
    model.norm.weight.data, model.norm.bias.data = both[:, 1], both[:, 2]


def is_expanded(model):
    model.norm.weight.data = torch.zeros(1).expand(500)


def overlaps_itself(model):
    model.turned.data = torch.zeros(499).unfold(0, 200, 1)


def is_too_short(model):
    model.first.bias.untyped_storage().resize_(8)


def has_integers(model):
    model.first.bias = torch.nn.Parameter(torch.zeros(500, dtype=torch.int64), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shares_memory, "'first.weight' and 'norm.bias' share memory"),
        (shares_memory_with_a_view, "'turned' and 'first.weight' share memory"),
        (shares_memory_of_two_views, "'norm.weight' and 'norm.bias' share memory"),
        (overlaps_itself, "'turned' has one memory for several of its elements"),
        (is_expanded, "'norm.weight' has one memory for several of its elements"),
        (has_integers, "dtype mismatch for 'first.bias': model=torch.int64 vs flash=torch.float32"),
        (lambda model: setattr(model, "first", torch.nn.Linear(300, 501)), "shape mismatch for 'first.weight'"),
        (lambda model: setattr(model, "more", torch.nn.Linear(1, 1)), "Missing 2 parameters"),
        (
            lambda model: model.norm.register_load_state_dict_post_hook(lambda *_: None),
            "module 'norm' has loading code",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_written(pack, source, change, message):
    model, path = Model(), pack(source)
    change(model)
    before = state_of(model)
    with pytest.raises(flashpack.FlashPackError, match=message) as caught:
        flashpack.assign_from_file(model, path, in_place=True)
    assert "in place" not in str(caught.value) or "no load in place" in str(caught.value)
    assert state_of(model) == before


def test_memory_that_is_too_small_is_an_error_before_anything_is_written(pack, source):
    model = Model()
    is_too_short(model)
    weight = model.first.weight.detach().clone()
    with pytest.raises(flashpack.FlashPackError, match=r"'first\.bias' has less memory than its shape needs"):
        flashpack.assign_from_file(model, pack(source), in_place=True)
    assert torch.equal(model.first.weight.detach(), weight)


@pytest.mark.parametrize(
    "other",
    [{"mmap": True}, {"keep_flash_ref_on_model": True}, {"use_distributed_loading": True}, {"dtype": torch.float16}],
    ids=lambda other: next(iter(other)),
)
def test_options_that_it_cannot_have_are_refused(pack, source, other):
    with pytest.raises(flashpack.FlashPackError, match=f"in_place=True and {next(iter(other))} exclude each other"):
        flashpack.assign_from_file(Model(), pack(source), in_place=True, **other)


def test_an_error_in_reading_says_that_the_module_may_be_mixed(pack, source):
    path = pack(source)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        flashpack.FlashPackError, match=r"do not match their checksum.*was loaded in place, and may have"
    ):
        flashpack.assign_from_file(Model(), path, in_place=True)


def test_so_does_an_error_of_the_system(pack, source, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "a.flashpack")

    monkeypatch.setattr(_into._native, "finish_loads", fail)
    with pytest.raises(OSError, match="Input/output error; the module was loaded in place") as caught:
        flashpack.assign_from_file(Model(), pack(source), in_place=True)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "a.flashpack")


def test_so_does_the_log_if_the_caller_interrupts(pack, source, monkeypatch, caplog):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_into._native, "finish_loads", interrupt)
    with pytest.raises(KeyboardInterrupt):
        flashpack.assign_from_file(Model(), pack(source), in_place=True)
    assert "was loaded in place, and may have" in caplog.text


def test_an_error_before_anything_is_read_leaves_the_module_and_says_nothing_of_mixed_values(
    pack, source, monkeypatch, caplog
):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files", "a.flashpack")

    path, model = pack(source), Model()
    before = {name: (value.clone(), value._version) for name, value in values_of(model).items()}
    _engine.release_engines()
    monkeypatch.setattr(_engine, "Engine", fail)
    with pytest.raises(OSError, match="Too many open files") as caught:
        flashpack.assign_from_file(model, path, in_place=True)
    assert "in place" not in str(caught.value)
    assert "in place" not in caplog.text
    assert_bit_equal(values_of(model), {name: value for name, (value, _) in before.items()})
    assert {name: value._version for name, value in values_of(model).items()} == {
        name: version for name, (_, version) in before.items()
    }


def test_a_module_without_memory_is_all_or_nothing(pack, source):
    path = pack(source)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with torch.device("meta"):
        model = Model()
    with pytest.raises(flashpack.FlashPackError, match="do not match their checksum") as caught:
        flashpack.assign_from_file(model, path, in_place=True)
    assert "in place" not in str(caught.value)
    assert all(parameter.is_meta for parameter in model.parameters())
