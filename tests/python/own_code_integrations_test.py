"""Models of transformers and diffusers that load in a way of their own."""

from __future__ import annotations

import flashpack
import pytest
import torch

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

from diffusers.configuration_utils import register_to_config  # noqa: E402
from flashpack.integrations.diffusers import FlashPackDiffusersModelMixin  # noqa: E402
from flashpack.integrations.transformers import FlashPackTransformersModelMixin  # noqa: E402
from transformers_models import repack  # noqa: E402


class Halved(torch.nn.Module):
    """Is saved as twice what it is, with a state that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))
        self.amax = torch.zeros(2)

    def get_extra_state(self):
        return self.amax

    def set_extra_state(self, state):
        self.amax = state

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "w"] = destination[prefix + "w"] * 2

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict = {**state_dict, prefix + "w": state_dict[prefix + "w"] / 2}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Config(transformers.PretrainedConfig):
    model_type = "flashpack-own-code"


class TransformersModel(FlashPackTransformersModelMixin):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.inner = Halved()
        self.post_init()

    def _init_weights(self, module):
        pass


class DiffusersModel(FlashPackDiffusersModelMixin, diffusers.ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.inner = Halved()


def seven(model):
    model.inner.w.data.fill_(7)
    model.inner.amax = torch.tensor([1.0, 2.0])
    return model


@pytest.mark.parametrize(
    "kind", [lambda: TransformersModel(Config()), DiffusersModel], ids=["transformers", "diffusers"]
)
@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.bfloat16}], ids=str)
def test_a_model_comes_back_as_it_was(kind, options, tmp_path):
    model = seven(kind())
    model.save_pretrained_flashpack(tmp_path)
    loaded = type(model).from_pretrained_flashpack(tmp_path, **options)
    assert loaded.inner.w.tolist() == [7, 7, 7]
    assert loaded.inner.amax.tolist() == [1, 2]
    assert loaded.inner.w.dtype is options.get("torch_dtype", torch.float32)


def test_names_that_transformers_would_have_to_convert_are_refused_and_the_code_named(tmp_path):
    seven(TransformersModel(Config())).save_pretrained_flashpack(tmp_path)
    repack(tmp_path, lambda tensors: tensors.update({"other.w": tensors.pop("inner.w")}))
    # Before version 5 transformers hands such code single tensors, without what their names begin with.
    stumbled_over = "cannot be used: KeyError: 'w'"
    reason = f"passes over _load_from_state_dict of module 'inner'|{stumbled_over}"
    with pytest.raises(flashpack.FlashPackError, match=reason):
        TransformersModel.from_pretrained_flashpack(tmp_path, strict=False)
