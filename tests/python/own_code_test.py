"""Modules that save and load in a way of their own: what torch does with them is what has to be done."""

from __future__ import annotations

import copy
import os

import flashpack
import pytest
import torch
from flashpack import FlashPackMixin
from support import bits, state_of


class Weight(torch.nn.Module, FlashPackMixin):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2, 3))


class SavedInAnotherUnit(Weight):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "w"] = destination[prefix + "w"] * 2

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict = dict(state_dict)
        state_dict[prefix + "w"] = state_dict[prefix + "w"] / 2
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.saved = state_dict[prefix + "w"] * 2


class CopiesByHand(Weight):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.w.data.copy_(state_dict[prefix + "w"] + 1)
        self.raw = state_dict[prefix + "w"].clone()


class SavedTransposed(Weight):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "w"] = self.w.detach().t()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict({prefix + "w": state_dict[prefix + "w"].t()}, prefix, *rest)


class SavedByAnotherName(Weight):
    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(self.rename)
        self._register_load_state_dict_pre_hook(self.rename_back)

    @staticmethod
    def rename(module, state_dict, prefix, local_metadata):
        state_dict[prefix + "old_w"] = state_dict.pop(prefix + "w")

    @staticmethod
    def rename_back(state_dict, prefix, *rest):
        state_dict[prefix + "w"] = state_dict.pop(prefix + "old_w")


class ChangesInPlace(Weight):
    def __init__(self) -> None:
        super().__init__()
        self._register_load_state_dict_pre_hook(lambda state_dict, prefix, *rest: state_dict[prefix + "w"].mul_(3))


class DerivesAfterwards(Weight):
    def __init__(self) -> None:
        super().__init__()
        self.cache = self.w.detach() * 10
        self.register_load_state_dict_post_hook(self.derive)

    @staticmethod
    def derive(module, incompatible_keys):
        module.cache = module.w.detach() * 10


class HasExtraState(Weight):
    def __init__(self) -> None:
        super().__init__()
        self.amax = torch.zeros(4)

    def get_extra_state(self):
        return self.amax.clone()

    def set_extra_state(self, state):
        self.amax = state.clone()


class LoadsByRenaming(Weight):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        renamed = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)

    def state_dict(self, *args, **kwargs):
        return {"module." + name: tensor for name, tensor in super().state_dict(*args, **kwargs).items()}


class ConvertsOldVersions(Weight):
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            state_dict = {prefix + "w": state_dict[prefix + "w"] * 100}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Tied(torch.nn.Module, FlashPackMixin):
    def __init__(self, first=SavedInAnotherUnit, second=SavedInAnotherUnit) -> None:
        super().__init__()
        self.first, self.second = first(), second()
        self.second.w = self.first.w


class TiedToPlain(Tied):
    def __init__(self) -> None:
        super().__init__(SavedInAnotherUnit, Weight)


class Nested(torch.nn.Module, FlashPackMixin):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(3, 3)
        self.inner = torch.nn.ModuleList([SavedInAnotherUnit(), SavedByAnotherName(), HasExtraState()])
        self.norm = torch.nn.BatchNorm1d(3)


class WeightNorm(torch.nn.Module, FlashPackMixin):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))


KINDS = [
    SavedInAnotherUnit,
    CopiesByHand,
    SavedTransposed,
    SavedByAnotherName,
    ChangesInPlace,
    DerivesAfterwards,
    HasExtraState,
    LoadsByRenaming,
    ConvertsOldVersions,
    Tied,
    TiedToPlain,
    Nested,
    WeightNorm,
]


def filled(kind):
    torch.manual_seed(1)
    model = kind()
    for parameter in model.parameters():
        parameter.data.normal_()
    for module in model.modules():
        if isinstance(module, HasExtraState):
            module.amax.normal_()
    return model


def everything(model):
    """The values of a model's parameters and buffers, and of other tensors that are attributes."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for prefix, module in model.named_modules():
        named += [(f"{prefix}.{name}", value) for name, value in vars(module).items() if torch.is_tensor(value)]
    return {name: (tensor.dtype, tuple(tensor.shape), bits(tensor)) for name, tensor in named}


def loaded_by_torch(kind, source):
    model = kind()
    model.load_state_dict(copy.deepcopy(source.state_dict()))
    return everything(model)


@pytest.mark.parametrize("options", [{}, {"keep_flash_ref_on_model": True}, {"mmap": True}, {"strict": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_with_loading_code_of_its_own_becomes_what_torch_makes_of_it(kind, options, pack):
    source = filled(kind)
    model = kind()
    parameters = dict(model.named_parameters())
    report = flashpack.assign_from_file(model, pack(source), **options)
    assert everything(model) == loaded_by_torch(kind, source)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in parameters.items()
    }
    assert (report.missing, report.unexpected, report.left_on_meta) == ((), (), ())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_built_without_memory_becomes_what_torch_makes_of_it(kind, tmp_path):
    source = filled(kind)
    source.save_flashpack(tmp_path / "a", silent=True)
    model = kind.from_flashpack(tmp_path / "a", silent=True)
    assert everything(model) == loaded_by_torch(kind, source)
    assert all(type(parameter) is torch.nn.Parameter and parameter.requires_grad for parameter in model.parameters())


def test_ties_survive_code_of_a_modules_own(pack):
    model = Tied()
    flashpack.assign_from_file(model, pack(filled(Tied)))
    assert model.first.w is model.second.w


def test_what_a_hook_does_to_one_name_of_a_tie_is_not_done_again_by_the_other(pack):
    source, model = filled(Weight), Tied(ChangesInPlace, ChangesInPlace)
    flashpack.assign_from_file(model, pack({"first.w": source.w.detach()}))
    assert model.first.w is model.second.w
    assert torch.equal(model.first.w, source.w * 3)


def test_old_names_of_torchs_own_parametrizations_load(pack):
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(torch.nn.Linear(3, 3))
    old.weight_g.data.mul_(2)
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))
    path = pack(old)
    report = flashpack.assign_from_file(model, path)
    x = torch.ones(1, 3)
    assert torch.equal(model(x), old(x))
    assert set(report.assigned) == set(model.state_dict())


@pytest.mark.parametrize("state", [{"amax": [1.0]}, None, b"bytes"], ids=type)
def test_extra_state_that_is_no_tensor_is_refused_by_name_before_anything_is_saved(state, tmp_path):
    class Other(HasExtraState):
        def get_extra_state(self):
            return state

    model = torch.nn.ModuleDict({"inner": Other()})
    with pytest.raises(flashpack.FlashPackError, match=r"'inner\._extra_state'.*get_extra_state"):
        flashpack.pack_to_file(model, tmp_path / "new" / "a")
    assert os.listdir(tmp_path) == []


def test_extra_state_keeps_its_dtype_whatever_the_weights_become(pack):
    source, model = filled(HasExtraState), HasExtraState()
    flashpack.assign_from_file(model, pack(source), dtype=torch.float16)
    assert model.w.dtype is torch.float16
    assert bits(model.amax) == bits(source.amax)


@pytest.mark.parametrize(
    ("options", "fails"), [({}, False), ({"strict": True}, True), ({"strict_buffers": True}, True)]
)
def test_extra_state_that_the_file_lacks_is_missing_as_a_buffer_is(options, fails, pack):
    path = pack(Weight())
    if fails:
        with pytest.raises(flashpack.FlashPackError, match=r"Missing 1 buffers: \['_extra_state'\]"):
            flashpack.assign_from_file(HasExtraState(), path, **options)
    else:
        assert flashpack.assign_from_file(HasExtraState(), path, **options).missing == ("_extra_state",)


def test_extra_state_for_a_module_that_has_none_is_unexpected(pack):
    path = pack(filled(HasExtraState))
    with pytest.raises(flashpack.FlashPackError, match=r"Could not assign 1 names: \['_extra_state'\]"):
        flashpack.assign_from_file(Weight(), path)
    assert flashpack.assign_from_file(Weight(), path, strict=False).unexpected == ("_extra_state",)


class Fails(Nested):
    """Changes all that it can, and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown = torch.nn.Parameter(torch.ones(2))
        self.tied = self.plain
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.notes, self.counts, self.names = ["old"], {"loads": 0}, {"old"}
        self.scratch = torch.zeros(2)
        self.register_load_state_dict_post_hook(self.spoil)

    @staticmethod
    def spoil(module, incompatible_keys):
        for tensor in (*module.parameters(), *module.buffers(), module.scratch):
            tensor.data.fill_(1)
        module.table.resize_(7)
        module.notes.append("new")
        module.counts["loads"] += 1
        module.names.add("new")
        module.inner[0].new_attribute = 1
        module.register_buffer("new_buffer", torch.ones(1))
        raise KeyError("spoilt")


def test_what_fails_after_it_has_changed_everything_leaves_the_module_as_it_was(pack):
    model = Fails()
    others = (model.notes, model.counts, model.names, model.scratch)
    before, before_others = (state_of(model), everything(model)), copy.deepcopy(others)
    with pytest.raises(flashpack.FlashPackError, match=r"Error while assigning to Fails from .*spoilt") as caught:
        flashpack.assign_from_file(model, pack(filled(Nested)), strict=False)
    assert isinstance(caught.value.__cause__, KeyError)
    assert (state_of(model), everything(model)) == before
    assert others[:3] == before_others[:3]
    assert torch.equal(others[3], before_others[3])
    assert others[0] is model.notes


def test_names_that_are_found_wanting_by_the_modules_own_code_leave_it_as_it_was(pack):
    model = SavedByAnotherName()
    path = pack({"old_w": torch.zeros(2, 3), "other": torch.zeros(1)})
    before = state_of(model)
    with pytest.raises(flashpack.FlashPackError, match=r"Could not assign 1 names: \['other'\]"):
        flashpack.assign_from_file(model, path)
    assert state_of(model) == before
    with pytest.raises(flashpack.FlashPackError, match="size mismatch for w"):
        flashpack.assign_from_file(model, pack({"old_w": torch.zeros(5)}))
    assert state_of(model) == before


class LoadsSilently(LoadsByRenaming):
    def load_state_dict(self, state_dict, strict=True):
        super().load_state_dict(state_dict, strict)


def test_a_load_state_dict_that_does_not_say_what_is_missing_is_believed_only_if_that_does_not_matter(pack):
    source, model = filled(LoadsSilently), LoadsSilently()
    path = pack(source)
    before = state_of(model)
    with pytest.raises(flashpack.FlashPackError, match="load_state_dict of LoadsSilently does not return"):
        flashpack.assign_from_file(model, path)
    assert state_of(model) == before
    flashpack.assign_from_file(model, path, strict=False)
    assert bits(model.w) == bits(source.w)


class MayLack(SavedByAnotherName):
    def __init__(self) -> None:
        super().__init__()
        self.lacking = torch.nn.Parameter(torch.ones(2))


def test_memory_that_nothing_was_loaded_into_is_not_given_to_the_model(tmp_path):
    filled(SavedByAnotherName).save_flashpack(tmp_path / "a", silent=True)
    with pytest.warns(UserWarning, match=r"meta device.*\['lacking'\]"):
        model = MayLack.from_flashpack(tmp_path / "a", silent=True, strict=False)
    assert model.lacking.is_meta
    assert not model.w.is_meta


def test_the_code_of_the_module_runs_with_the_gradients_of_the_caller(pack):
    modes = []
    model = Weight()
    model.register_load_state_dict_post_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    path = pack(Weight())
    flashpack.assign_from_file(model, path)
    with torch.no_grad():
        flashpack.assign_from_file(model, path)
    assert modes == [True, False]


def test_nothing_is_copied_for_a_module_without_code_of_its_own(pack, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.InstanceNorm1d(3))
    path = pack(model)

    def copied(*args, **kwargs):
        raise AssertionError("copied")

    for name in ("clone", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, copied)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", copied)
    flashpack.assign_from_file(model, path)
