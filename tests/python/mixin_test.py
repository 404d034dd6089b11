from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import flashpack
import pytest
import torch
from flashpack import FlashPackMixin
from flashpack._meta_init import meta_parameters
from support import assert_bit_equal, state_of


class Model(torch.nn.Module, FlashPackMixin):
    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(features, features)
        self.dropout = torch.nn.Dropout()
        self.register_buffer("positions", torch.arange(features) * 2, persistent=False)


def test_a_saved_model_returns_in_eval_mode_with_the_buffers_of_its_constructor(tmp_path):
    model = Model(4)
    model.save_flashpack(tmp_path / "a", silent=True)
    loaded = Model.from_flashpack(tmp_path / "a", 4, silent=True)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert loaded.positions.tolist() == [0, 2, 4, 6]
    assert not loaded.dropout.training
    assert loaded.linear.weight.requires_grad


def test_no_memory_is_taken_for_parameters_while_building(tmp_path):
    Model(4).save_flashpack(tmp_path / "a", silent=True)
    seen = []

    def build() -> Model:
        model = Model(4)
        seen.extend(parameter.is_meta for parameter in model.parameters())
        return model

    Model.from_flashpack(tmp_path / "a", init_fn=build, silent=True)
    assert seen == [True, True]
    assert not Model(4).linear.weight.is_meta


class TiedByObject(torch.nn.Module, FlashPackMixin):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.nn.Parameter(torch.randn(3, 3))
        self.a, self.b = torch.nn.Module(), torch.nn.Module()
        self.a.weight = weight
        self.b.weight = weight


class TiedByAttribute(torch.nn.Module, FlashPackMixin):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("kind", [TiedByObject, TiedByAttribute])
def test_ties_survive_a_build_without_memory(kind, tmp_path):
    model = kind()
    model.save_flashpack(tmp_path / "a", silent=True)
    loaded = kind.from_flashpack(tmp_path / "a", silent=True)
    assert loaded.a.weight is loaded.b.weight
    assert_bit_equal(loaded.state_dict(), model.state_dict())


def test_other_threads_build_real_models_meanwhile():
    built = []
    with meta_parameters():
        thread = threading.Thread(target=lambda: built.append(Model(2)))
        thread.start()
        thread.join()
        mine = Model(2)
    assert mine.linear.weight.is_meta
    assert not built[0].linear.weight.is_meta


def test_a_new_parameter_with_the_id_of_a_dead_one_is_another_parameter():
    with meta_parameters():
        metas = []
        for _ in range(50):
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(torch.ones(1))
            metas.append(module.weight)
    assert len({id(meta) for meta in metas}) == 50


def test_meta_parameters_keep_gradient_flags_attributes_and_other_classes():
    class Special(torch.nn.Parameter):
        pass

    module = torch.nn.Module()
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    frozen.tag = "kept"
    with meta_parameters():
        module.frozen = frozen
        module.special = Special(torch.ones(2))
        module.register_parameter("none", None)
    assert module.frozen.is_meta
    assert not module.frozen.requires_grad
    assert module.frozen.tag == "kept"
    assert not module.special.is_meta


def test_an_init_method_builds_the_instance_and_init_fn_goes_before_it(tmp_path):
    class Built(Model):
        flashpack_init_method = "build"
        how = "constructor"

        @classmethod
        def build(cls, features: int) -> Built:
            model = cls(features)
            model.how = "method"
            return model

    Built(4).save_flashpack(tmp_path / "a", silent=True)
    assert Built.from_flashpack(tmp_path / "a", features=4, silent=True).how == "method"
    assert Built.from_flashpack(tmp_path / "a", 4, init_fn=Built, silent=True).how == "constructor"


def test_arguments_that_the_constructor_does_not_take_are_dropped_with_a_log_line(tmp_path, caplog):
    Model(4).save_flashpack(tmp_path / "a", silent=True)
    Model.from_flashpack(tmp_path / "a", features=4, nonsense=1, silent=True)
    assert "nonsense" in caplog.text


def test_a_constructor_of_any_keywords_gets_them_and_its_rank(tmp_path):
    class Open(Model):
        def __init__(self, rank: int | None, **options: int) -> None:
            super().__init__(options["features"])
            self.rank = rank

    Model(4).save_flashpack(tmp_path / "a", silent=True)
    assert Open.from_flashpack(tmp_path / "a", features=4, rank=0, silent=True).rank == 0
    assert Open.from_flashpack(tmp_path / "a", features=4, silent=True).rank is None


def test_places_that_are_not_given_leave_the_defaults_of_the_constructor(tmp_path):
    class Placed(Model):
        def __init__(self, rank: int = 7, local_rank: int = 8, world_size: int = 9) -> None:
            super().__init__(4)
            self.places = (rank, local_rank, world_size)

    Model(4).save_flashpack(tmp_path / "a", silent=True)
    assert Placed.from_flashpack(tmp_path / "a", silent=True).places == (7, 8, 9)
    assert Placed.from_flashpack(tmp_path / "a", local_rank=0, silent=True).places == (7, 0, 9)
    assert Placed.from_flashpack(tmp_path / "a", 1, rank=2, world_size=3, silent=True).places == (1, 8, 3)


def test_class_attributes_are_defaults_that_an_argument_overrides(tmp_path):
    class Partial(Model):
        flashpack_ignore_suffixes = [".bias"]  # noqa: RUF012

    Model(4).save_flashpack(tmp_path / "a", silent=True)
    with pytest.warns(UserWarning, match=r"1 tensors are still on the meta device.*linear\.bias"):
        assert Partial.from_flashpack(tmp_path / "a", 4, silent=True).linear.bias.is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Partial.from_flashpack(tmp_path / "a", 4, ignore_suffixes=[], silent=True).linear.bias.is_meta


def test_a_builder_of_something_else_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match="made a dict, not a module"):
        Model.from_flashpack(tmp_path / "a", init_fn=lambda: {1: 2}, silent=True)


def test_a_mixin_without_a_module_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        FlashPackMixin().save_flashpack(tmp_path / "a")


def test_loading_can_map_the_file(tmp_path):
    model = Model(4)
    model.save_flashpack(tmp_path / "a", silent=True)
    assert_bit_equal(Model.from_flashpack(tmp_path / "a", 4, mmap=True, silent=True).state_dict(), model.state_dict())


def test_what_from_flashpack_raises_is_what_assign_from_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        Model.from_flashpack(tmp_path / "missing", silent=True)
    Model(4).save_flashpack(tmp_path / "a", silent=True)
    with pytest.raises(flashpack.FlashPackError, match="shape mismatch"):
        Model.from_flashpack(tmp_path / "a", 5, silent=True)


def test_called_on_an_instance_it_returns_another_and_leaves_the_instance_alone(tmp_path):
    Model(4).save_flashpack(tmp_path / "a", silent=True)
    instance = Model(4).train()
    before = state_of(instance)
    loaded = instance.from_flashpack(tmp_path / "a", 4, silent=True)
    assert loaded is not instance
    assert state_of(instance) == before
    assert instance.training
    assert not {id(tensor) for tensor in loaded.buffers()} & {id(tensor) for tensor in instance.buffers()}


def test_accelerate_is_neither_needed_nor_imported(tmp_path):
    code = f"""
import sys
sys.modules["accelerate"] = None
import torch
from flashpack import FlashPackMixin
class Model(torch.nn.Linear, FlashPackMixin): pass
Model(2, 2).save_flashpack({str(tmp_path / "a")!r}, silent=True)
print(Model.from_flashpack({str(tmp_path / "a")!r}, 2, 2, silent=True).weight.is_meta)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == "False\n"


def test_buffers_without_memory_that_the_file_lacks_are_named_too(tmp_path):
    class Empty(Model):
        def __init__(self) -> None:
            super().__init__(4)
            self.register_buffer("mask", torch.ones(2, device="meta"), persistent=False)

    Model(4).save_flashpack(tmp_path / "a", silent=True)
    with pytest.warns(UserWarning, match=r"1 tensors are still on the meta device.*\['mask'\]"):
        Empty.from_flashpack(tmp_path / "a", silent=True)


class Orthogonal(torch.nn.Module, FlashPackMixin):
    """Looks at the values of a parameter while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(3, 3))
        torch.nn.init.orthogonal_(self.weight)
        self.gain = self.weight[0].norm().item()


def test_a_constructor_that_looks_at_values_gets_them_when_it_is_told_to(tmp_path):
    model = Orthogonal()
    model.save_flashpack(tmp_path / "a", silent=True)
    with pytest.raises(RuntimeError, match=r"Orthogonal failed while parameters had no memory.*meta_init=False"):
        Orthogonal.from_flashpack(tmp_path / "a", silent=True)
    loaded = Orthogonal.from_flashpack(tmp_path / "a", silent=True, meta_init=False)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert loaded.gain == pytest.approx(1)

    class Always(Orthogonal):
        flashpack_meta_init = False

    assert Always.from_flashpack(tmp_path / "a", silent=True).gain == pytest.approx(1)


def test_errors_of_a_constructor_that_have_nothing_to_do_with_memory_stay_what_they_are(tmp_path):
    def build():
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match=r"^of its own$"):
        Model.from_flashpack(tmp_path / "a", init_fn=build, silent=True)


class TakesOurNames(Model):
    def __init__(self, dtype=None, verify=None, mmap=None, meta_init=None) -> None:
        super().__init__()
        self.given = {"dtype": dtype, "verify": verify, "mmap": mmap, "meta_init": meta_init}


def test_options_that_0_4_5_did_not_have_go_to_a_constructor_that_has_a_parameter_of_that_name(tmp_path):
    Model().save_flashpack(tmp_path / "a", silent=True)
    given = {"dtype": torch.bfloat16, "verify": False, "mmap": "mine", "meta_init": 3}
    loaded = TakesOurNames.from_flashpack(tmp_path / "a", silent=True, **given)
    assert loaded.given == given
    assert loaded.linear.weight.dtype is torch.float32
    assert TakesOurNames.from_flashpack(tmp_path / "a", silent=True).given == dict.fromkeys(given)


def test_options_that_the_constructor_does_not_have_are_those_of_the_load(tmp_path):
    Model().save_flashpack(tmp_path / "a", silent=True)
    loaded = Model.from_flashpack(tmp_path / "a", silent=True, dtype=torch.bfloat16, verify="always", meta_init=False)
    assert loaded.linear.weight.dtype is torch.bfloat16
    with pytest.raises(flashpack.FlashPackError, match="verify"):
        Model.from_flashpack(tmp_path / "a", silent=True, verify="sometimes")
