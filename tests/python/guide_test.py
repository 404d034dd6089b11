"""The integration guide of the PyPI package flashpack 0.4.5 runs as written, with real names for its placeholders.

FLASHPACK_REFERENCE_PYTHON names an interpreter that has that package: the guide is in its metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flashpack
import pytest
import torch
from support import assert_bit_equal, needs_reference, run_reference

pytestmark = needs_reference

# The one thing that it leaves to the imagination is how a constructor goes on.
PIPELINE = (
    "super().__init__()",
    "super().__init__(); self.register_modules(my_model=my_model, other_model=other_model)",
)
MODULE = ("        ...\n", "        super().__init__(); self.layer = nn.Linear(some_arg, some_arg)\n")


def example(heading: str) -> str:
    """The first example under a heading of the guide."""
    guide = run_reference("from importlib.metadata import metadata; print(metadata('flashpack').get_payload())")
    found = re.search(rf"^#+ {heading}$.*?^```py\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def run_example(heading: str, substitutes: Mapping[str, str], **names: Any) -> dict[str, Any]:
    code = example(heading)
    for placeholder, real in substitutes.items():
        assert placeholder in code, placeholder
        code = code.replace(placeholder, real)
    names |= {"__name__": "guide", "nn": torch.nn}
    exec(compile(code, "the guide", "exec", dont_inherit=True), names)
    return names


def test_a_pipeline_of_mixed_classes_is_saved_and_loaded(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")

    class MyPipeline(diffusers.DiffusionPipeline):
        pass

    monkeypatch.setattr(diffusers.models, "MyModel", diffusers.UNet2DModel, raising=False)
    monkeypatch.setattr(diffusers.models, "SomeOtherModel", diffusers.AutoencoderKL, raising=False)
    monkeypatch.setattr(diffusers.pipelines, "MyPipeline", MyPipeline, raising=False)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = diffusers.UNet2DModel(sample_size=8, norm_num_groups=4, **blocks)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    unet.save_pretrained(tmp_path / "plain" / "my_model")
    vae.save_pretrained(tmp_path / "plain" / "other_model")
    index = {"my_model": ["diffusers", "UNet2DModel"], "other_model": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "plain" / "model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))

    places = {
        "some/repository": str(tmp_path / "plain"),
        "some_directory": str(tmp_path / "flash"),
        "my/flashpack-repository": str(tmp_path / "flash"),
    }
    pipeline = run_example("Diffusers/Transformers", dict([PIPELINE]) | places)["pipeline"]
    assert (tmp_path / "flash" / "my_model" / "model.flashpack").is_file()
    assert type(pipeline.my_model).__name__ == "FlashPackMyModel"
    assert_bit_equal(dict(pipeline.my_model.state_dict()), dict(unet.state_dict()))
    assert_bit_equal(dict(pipeline.other_model.state_dict()), dict(vae.state_dict()))


def test_a_module_of_ones_own_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_example("Vanilla PyTorch", dict([MODULE]))
    assert Path("model.flashpack").is_file()
    assert names["loaded_module"] is not names["module"]
    assert_bit_equal(dict(names["loaded_module"].state_dict()), dict(names["module"].state_dict()))


def test_a_model_is_packed_and_assigned(tmp_path):
    path = tmp_path / "model.flashpack"
    substitutes = {"/path/to/model.flashpack": str(path), "nn.Module(...)": "nn.Linear(3, 4)"}
    model = run_example("Direct Integration", substitutes)["model"]
    assert_bit_equal(flashpack.revert_from_file(path), dict(model.state_dict()))
