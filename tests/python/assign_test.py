from __future__ import annotations

import copy
import io
import threading

import flashpack
import pytest
import torch
from flashpack import _assign, _plan
from support import assert_bit_equal, bits, random_tensor, state_of


class Model(torch.nn.Module):
    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(features, features)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
        self.register_buffer("scale", torch.full((features,), 2.0))
        self.register_buffer("positions", torch.arange(features), persistent=False)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def changed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for `model` with other values."""
    return {
        name: random_tensor(tuple(tensor.shape), tensor.dtype, seed)
        for seed, (name, tensor) in enumerate(model.state_dict().items())
    }


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"keep_flash_ref_on_model": True}], ids=str)
def test_every_parameter_and_buffer_takes_the_bits_of_the_file(options, pack):
    model = Model()
    source = changed(model)
    flashpack.assign_from_file(model, pack(source), **options)
    assert_bit_equal(model.state_dict(), source)
    assert model.logit_scale.shape == ()


def test_parameters_stay_the_objects_that_optimizers_and_hooks_know(pack):
    model = Model()
    source = changed(model)
    weight = model.linear.weight
    called = []
    weight.register_hook(called.append)
    flashpack.assign_from_file(model, pack(source))
    assert model.linear.weight is weight
    model.linear(torch.ones(1, 8)).sum().backward()
    assert len(called) == 1
    assert bits(weight) == bits(source["linear.weight"])


def test_parameters_take_the_dtype_of_the_file(pack):
    model = Model()
    flashpack.assign_from_file(
        model, pack({**model.state_dict(), "linear.weight": torch.ones(8, 8, dtype=torch.bfloat16)})
    )
    assert model.linear.weight.dtype is torch.bfloat16
    assert model.linear.weight.requires_grad


def test_coerce_dtype_keeps_the_dtypes_of_the_model(pack):
    model = Model()
    flashpack.assign_from_file(model, pack(Model(), target_dtype=torch.float64), coerce_dtype=True)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_integer_parameters_load_and_need_no_gradient(pack):
    model = torch.nn.Linear(4, 2, bias=False)
    flashpack.assign_from_file(model, pack({"weight": torch.ones(2, 4, dtype=torch.int8)}))
    assert model.weight.dtype is torch.int8
    assert not model.weight.requires_grad


def test_gradients_of_another_dtype_are_dropped_and_others_stay(pack):
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    bias_gradient = model.bias.grad
    flashpack.assign_from_file(model, pack({"weight": torch.ones(2, 2, dtype=torch.float64), "bias": torch.ones(2)}))
    assert model.weight.grad is None
    assert model.bias.grad is bias_gradient


def test_meta_parameters_become_real_and_keep_what_was_hung_on_them(pack):
    with torch.device("meta"):
        model = torch.nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    model.weight.tag = "kept"
    flashpack.assign_from_file(model, pack(torch.nn.Linear(3, 3)), device="cpu")
    assert type(model.weight) is torch.nn.Parameter
    assert not model.weight.requires_grad
    assert model.bias.requires_grad
    assert model.weight.tag == "kept"
    model(torch.ones(1, 3))


def test_a_meta_model_goes_to_the_cpu(pack):
    with torch.device("meta"):
        model = torch.nn.Linear(3, 3)
    source = torch.nn.Linear(3, 3)
    flashpack.assign_from_file(model, pack(source))
    assert_bit_equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("source", [torch.nn.Linear(3, 3), {"weight": torch.ones(3, 3, dtype=torch.int32)}], ids=type)
def test_parameters_made_in_inference_mode_stay_usable(source, pack):
    with torch.inference_mode():
        model = torch.nn.Linear(3, 3)
    weight = model.weight
    path = pack(source)
    flashpack.assign_from_file(model, path, strict=False)
    assert model.weight is weight
    assert "Parameter" in str(model.weight)
    assert_bit_equal({"weight": model.weight}, {"weight": flashpack.revert_from_file(path)["weight"]})
    with torch.inference_mode():
        model.weight.add_(1)
    if weight.is_floating_point():
        with torch.no_grad():
            model(torch.ones(1, 3))
        with torch.inference_mode():
            model(torch.ones(1, 3))


def test_a_failed_commit_puts_back_parameters_made_in_inference_mode(pack, monkeypatch):
    with torch.inference_mode():
        model = Model()
    before = state_of(model)
    path = pack(changed(model))

    def failing_put(self, value):
        monkeypatch.undo()
        raise RuntimeError("put")

    monkeypatch.setattr(_plan.Slot, "put", failing_put)
    with pytest.raises(RuntimeError, match="put"):
        flashpack.assign_from_file(model, path)
    assert state_of(model) == before
    assert "Parameter" in str(model.linear.weight)


@pytest.mark.parametrize("names", [["embed.weight", "head.weight"], ["embed.weight"], ["head.weight"]], ids=str)
@pytest.mark.parametrize("on_meta", [False, True])
def test_tied_weights_stay_tied_whichever_names_the_file_has(names, on_meta, pack):
    model = Tied()
    if on_meta:
        model.to("meta")
        model.head.weight = model.embed.weight
    weight = random_tensor((10, 4))
    flashpack.assign_from_file(model, pack(dict.fromkeys(names, weight)), device="cpu")
    assert model.head.weight is model.embed.weight
    assert bits(model.head.weight) == bits(weight)


def test_tied_weights_are_read_once(pack, caplog):
    path = pack(Tied())
    with caplog.at_level("INFO", logger="flashpack"):
        flashpack.assign_from_file(Tied(), path)
    assert "160 bytes in" in caplog.text


def test_one_name_of_a_tie_can_be_ignored_without_untying(pack):
    model = Tied()
    flashpack.assign_from_file(model, pack({"embed.weight": torch.ones(10, 4)}), ignore_names=["head.weight"])
    assert model.head.weight is model.embed.weight
    assert model.head.weight.eq(1).all()


def test_tied_names_of_different_shape_or_dtype_are_an_error(pack):
    path = pack({"embed.weight": torch.ones(10, 4), "head.weight": torch.ones(10, 4, dtype=torch.float64)})
    with pytest.raises(flashpack.FlashPackError, match="are one tensor in the model"):
        flashpack.assign_from_file(Tied(), path)


def test_a_module_used_twice_is_loaded_once_under_both_names(pack):
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"a": shared, "b": shared})
    flashpack.assign_from_file(model, pack(torch.nn.ModuleDict({"a": shared, "b": shared})))
    assert model["a"].weight is model["b"].weight


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        (
            {"linear.weight": torch.ones(4, 16)},
            {},
            "Error while assigning to Model .*shape mismatch for 'linear.weight'",
        ),
        ({"logit_scale": torch.ones(1)}, {}, "shape mismatch for 'logit_scale'"),
        ({"scale": torch.ones(2, 4)}, {}, "shape mismatch for 'scale'"),
        (
            {"scale": torch.ones(8, dtype=torch.float64)},
            {},
            "Error while assigning.*dtype mismatch for buffer 'scale': .*; coerce_dtype=True casts",
        ),
        ({"extra": torch.ones(1)}, {}, r"Could not assign 1 names: \['extra'\]"),
        ({"extra": torch.ones(1)}, {"strict_params": False, "strict_buffers": True}, "Could not assign 1 names"),
        ({"linear.bias": None}, {}, r"Missing 1 parameters: \['linear.bias'\]"),
        ({"scale": None}, {"strict_buffers": True}, r"Missing 1 buffers: \['scale'\]"),
        ({"scale": None, "linear.bias": None}, {"strict": True}, "Missing 1 parameters and 1 buffers: .*bias.*scale"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_before_any_reading(entries, options, message, pack, monkeypatch):
    model = Model()
    path = pack({n: t for n, t in {**model.state_dict(), **entries}.items() if t is not None})
    monkeypatch.setattr(flashpack._loading.Ranks, "read_blocks", None)
    before = state_of(model)
    with pytest.raises(flashpack.FlashPackError, match=message) as caught:
        flashpack.assign_from_file(model, path, **options)
    assert str(path) in str(caught.value)
    assert state_of(model) == before


def test_the_cause_of_a_dtype_mismatch_is_a_type_error(pack):
    with pytest.raises(flashpack.FlashPackError) as caught:
        flashpack.assign_from_file(Model(), pack({**Model().state_dict(), "scale": torch.ones(8, dtype=torch.int64)}))
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("options", [{"strict": False}, {"strict_params": False}], ids=str)
def test_not_strict_loads_what_there_is(options, pack):
    model = Model()
    old_bias = bits(model.linear.bias)
    flashpack.assign_from_file(model, pack({"linear.weight": torch.zeros(8, 8), "extra": torch.ones(3)}), **options)
    assert not model.linear.weight.any()
    assert bits(model.linear.bias) == old_bias


@pytest.mark.parametrize("options", [{"strict": True}, {"strict_buffers": True}], ids=str)
def test_strictness_does_not_ask_for_buffers_that_no_file_can_have(options, pack):
    flashpack.assign_from_file(Model(), pack(Model()), **options)


def test_ignored_names_are_neither_assigned_nor_required(pack):
    model = Model()
    old = bits(model.linear.bias), bits(model.scale)
    source = changed(model)
    source["extra.bias"] = torch.ones(1)
    flashpack.assign_from_file(model, pack(source), strict=True, ignore_suffixes=[".bias"], ignore_names=["scale"])
    assert (bits(model.linear.bias), bits(model.scale)) == old
    assert bits(model.linear.weight) == bits(source["linear.weight"])


def failing_load(*args, **kwargs):
    raise OSError(5, "read x at 0+4: Input/output error", "x")


def test_a_read_that_fails_leaves_the_module_as_it_was(pack, monkeypatch):
    model = Model()
    path = pack(changed(model))
    before = state_of(model)
    monkeypatch.setattr(flashpack._device, "engine", lambda *_: type("Engine", (), {"start_load": failing_load})())
    with pytest.raises(OSError, match="Input/output error"):
        flashpack.assign_from_file(model, path, keep_flash_ref_on_model=True)
    assert state_of(model) == before


class InPlaceBuffer(torch.nn.Module):
    """Counts in one buffer while autograd keeps another, and a parameter, for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.weight * self.table
        self.calls.add_(1)
        return y


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"keep_flash_ref_on_model": True}], ids=str)
def test_backward_works_through_a_model_that_writes_to_a_buffer(options, pack):
    model = InPlaceBuffer()
    flashpack.assign_from_file(model, pack(InPlaceBuffer()), **options)
    x = torch.ones(4, requires_grad=True)
    (model(x) + model(x)).sum().backward()
    assert model.weight.grad is not None


def test_saving_one_tensor_writes_that_tensor_alone(pack):
    model = Model(512)
    flashpack.assign_from_file(model, pack(Model(512)))
    file = io.BytesIO()
    torch.save(model.linear.bias, file)
    assert len(file.getvalue()) < 8 * 1024


def test_a_deep_copy_takes_the_memory_of_its_tensors_alone(pack):
    model = Model(512)
    flashpack.assign_from_file(model, pack(Model(512)))
    twin = copy.deepcopy(model)
    for tensor in (*twin.parameters(), *twin.buffers()):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert twin.linear.bias.data_ptr() != model.linear.bias.data_ptr()


def test_safetensors_saves_what_was_loaded(pack, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = Model()
    source = changed(model)
    flashpack.assign_from_file(model, pack(source))
    safetensors.save_model(model, str(tmp_path / "a.safetensors"))
    assert_bit_equal(safetensors.load_file(tmp_path / "a.safetensors"), source)


def test_loaded_tensors_can_be_written_to_and_trained(pack):
    model = Model()
    path = pack(Model())
    before = path.read_bytes()
    flashpack.assign_from_file(model, path)
    model.linear(torch.ones(1, 8)).sum().backward()
    with torch.no_grad():
        model.linear.weight -= model.linear.weight.grad
    model.load_state_dict(Model().state_dict())
    assert path.read_bytes() == before


def test_a_kept_reference_is_the_memory_of_the_parameters(pack):
    model = Model()
    path = pack(Model())
    flashpack.assign_from_file(model, path, keep_flash_ref_on_model=True)
    block = model._flash_shared_storage.block(0)
    assert block.untyped_storage().data_ptr() == model.linear.weight.untyped_storage().data_ptr()
    assert model._flash_shared_storage_meta == flashpack.get_flashpack_file_metadata(path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("target_dtype", [None, torch.float64])
def test_loading_in_inference_mode_leaves_ordinary_parameters(device, target_dtype, pack):
    model = Model()
    model.linear.to(device)
    path = pack(Model(), target_dtype=target_dtype)
    with torch.inference_mode():
        flashpack.assign_from_file(model, path, device="cpu", coerce_dtype=True)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    model.linear(torch.ones(1, 8)).sum().backward()


def test_parameters_that_the_file_lacks_follow_to_the_device():
    kept = torch.nn.Parameter(torch.ones(2))
    module = torch.nn.Module()
    elsewhere, here = torch.device("cuda"), torch.device("cpu")
    plain = _plan.Slot(module, "kept", True, True, kept)
    assert _assign._follows(plain, elsewhere)
    assert not _assign._follows(plain, here)
    assert not _assign._follows(_plan.Slot(module, "other", True, True, torch.nn.UninitializedParameter()), elsewhere)
    on_meta = torch.nn.Parameter(torch.ones(2, device="meta"))
    assert not _assign._follows(_plan.Slot(module, "meta", True, True, on_meta), elsewhere)


def test_a_parameter_that_is_moved_stays_the_same_object_with_its_values_and_its_tie(pack, monkeypatch):
    model = Tied()
    model.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    extra, moved = model.extra, []
    # As if they were on another device, which few machines have.
    monkeypatch.setattr(_assign, "_follows", lambda slot, device: moved.append(slot.attribute) or True)
    flashpack.assign_from_file(model, pack(Tied()), ignore_names=["extra"])
    assert moved == ["extra"]
    assert model.extra is extra
    assert extra.requires_grad
    assert extra.is_leaf
    assert extra.tolist() == [1, 1]
    assert model.head.weight is model.embed.weight


@pytest.mark.gpu
def test_parameters_that_the_file_lacks_end_where_the_others_do(pack):
    model = Model()
    scale = model.logit_scale
    flashpack.assign_from_file(model, pack(Model()), device="cuda", ignore_names=["logit_scale"])
    assert model.logit_scale is scale
    assert scale.device == model.linear.weight.device
    assert scale.item() == 2.5


def test_buffers_that_the_file_lacks_follow_to_the_device(pack, monkeypatch):
    model = torch.nn.Module()
    model.register_buffer("scale", torch.ones(2))
    model.register_buffer("positions", torch.arange(2), persistent=False)
    path = pack(model)
    stand_in = torch.device("meta")  # A device that every machine has.
    monkeypatch.setattr(flashpack._loading, "supported_device", lambda *args: stand_in)
    with pytest.warns(UserWarning, match="meta device"):
        flashpack.assign_from_file(model, path)
    assert model.scale.device == model.positions.device == stand_in


def test_the_device_is_that_of_the_model_then_of_its_parameters(pack):
    class WithDevice(Model):
        device = "mps"

    with pytest.raises(flashpack.FlashPackError, match="Unsupported device: mps"):
        flashpack.assign_from_file(WithDevice(), pack(Model()))
    no_parameters = torch.nn.BatchNorm1d(2, affine=False)
    flashpack.assign_from_file(no_parameters, pack(no_parameters))


def test_many_threads_load_at_once(pack):
    sources = [{"weight": random_tensor((256, 256), seed=i), "bias": random_tensor((256,), seed=i)} for i in range(8)]
    paths = [pack(source) for source in sources]
    models = [torch.nn.Linear(256, 256) for _ in sources]
    threads = [
        threading.Thread(target=flashpack.assign_from_file, args=pair) for pair in zip(models, paths, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, source in zip(models, sources, strict=True):
        assert_bit_equal(model.state_dict(), source)


def test_dtype_casts_what_is_floating_point_and_leaves_the_rest(pack):
    path = pack(torch.nn.BatchNorm1d(3))
    model = torch.nn.BatchNorm1d(3).double()
    flashpack.assign_from_file(model, path, dtype=torch.float16)
    assert {tensor.dtype for tensor in (*model.parameters(), model.running_mean)} == {torch.float16}
    assert model.num_batches_tracked.dtype is torch.int64


def test_dtype_is_no_excuse_for_a_buffer_of_another_kind(pack):
    model = torch.nn.Module()
    model.register_buffer("ids", torch.arange(3))
    path = pack({"ids": torch.ones(3)})
    with pytest.raises(flashpack.FlashPackError, match="dtype mismatch for buffer"):
        flashpack.assign_from_file(model, path, dtype=torch.float16)
    with pytest.raises(flashpack.FlashPackError, match="exclude each other"):
        flashpack.assign_from_file(model, path, dtype=torch.float16, coerce_dtype=True)
