"""Modules whose tensors other libraries keep elsewhere."""

from __future__ import annotations

import flashpack
import pytest
import torch
from support import assert_bit_equal

accelerate = pytest.importorskip("accelerate")


def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))


def offloaded_to_the_cpu(tmp_path):
    return accelerate.cpu_offload(model(), execution_device=torch.device("cpu"))


def offloaded_to_disk(tmp_path):
    return accelerate.disk_offload(model(), str(tmp_path / "offload"), execution_device=torch.device("cpu"))


def offloaded_with_another_hook(tmp_path):
    offloaded = offloaded_to_the_cpu(tmp_path)
    accelerate.hooks.add_hook_to_module(offloaded[0], accelerate.hooks.ModelHook(), append=True)
    return offloaded


@pytest.mark.parametrize("make", [offloaded_to_the_cpu, offloaded_to_disk, offloaded_with_another_hook])
def test_modules_that_accelerate_has_offloaded_are_refused_by_name(make, tmp_path, pack):
    source = model()
    path = pack(source)
    offloaded = make(tmp_path)
    x = torch.ones(1, 3)
    before = offloaded(x)
    with pytest.raises(flashpack.FlashPackError, match="module '0' is offloaded by accelerate"):
        flashpack.assign_from_file(offloaded, path)
    assert torch.equal(offloaded(x), before)
    with pytest.raises(flashpack.FlashPackError, match=r"'0\.weight': it is on the meta device"):
        flashpack.pack_to_file(offloaded, tmp_path / "again")
    accelerate.hooks.remove_hook_from_module(offloaded, recurse=True)
    flashpack.assign_from_file(offloaded, path, device="cpu")
    assert torch.equal(offloaded(x), source(x))


def test_a_model_that_accelerate_moves_as_a_whole_loads(pack):
    source, moved = model(), model()
    moved, _ = accelerate.cpu_offload_with_hook(moved, execution_device="cpu")
    flashpack.assign_from_file(moved, pack(source))
    assert_bit_equal(moved.state_dict(), source.state_dict())


def test_groups_that_diffusers_has_offloaded_are_refused_by_name(pack):
    hooks = pytest.importorskip("diffusers.hooks")
    group = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    offloaded = model()
    try:
        hooks.apply_group_offloading(offloaded, offload_type="leaf_level", **group)
    except RuntimeError as error:
        pytest.skip(f"this diffusers offloads only beside an accelerator: {error}")
    with pytest.raises(flashpack.FlashPackError, match="module '0' is offloaded by diffusers"):
        flashpack.assign_from_file(offloaded, pack(model()))
