"""The table of docs/memory.md is measured: what each call takes at its peak, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "torch_binding" / "python" / "docs" / "memory.md"
MIB = 1 << 20
# A call may take this besides, whatever the size of the file: windows, the engine's staging of 64 MiB, threads.
BESIDES_BYTES = 96 * MIB
# A peak so far below what the table says would mean that the table says too much.
LEAST_BELOW_BYTES = 64 * MIB

# Each call has a fork of a process that has imported everything, so that imports do not count.
PROGRAM = r"""
import contextlib, io, json, os, sys, traceback
import flashpack, flashpack.cli, flashpack.commands, flashpack.safetensors.torch, torch

directory, path, safetensors_path, torch_path, mixed_path = sys.argv[1:6]
new_path, new_safetensors_path, new_torch_path = sys.argv[6:9]
calls = json.loads(sys.argv[9])
SHAPES = {"large": (4096, 4096), "larger": (128, 1 << 18)}
SHAPES |= {f"layers.{i}.weight": (512, 512) for i in range(64)} | {f"layers.{i}.bias": (512,) for i in range(64)}


def add_parameters(module, precision=torch.float32):
    for name, shape in SHAPES.items():
        module.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.empty(shape, dtype=precision)))


class Model(torch.nn.Module, flashpack.FlashPackMixin):
    def __init__(self, precision=torch.float32):
        super().__init__()
        add_parameters(self, precision)


if any("Pretrained" in call for call in calls):
    import transformers
    from flashpack.integrations.transformers import FlashPackTransformersModelMixin

    class PretrainedModel(FlashPackTransformersModelMixin):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            add_parameters(self)
            self.post_init()


def filled(model):
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    return model


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def result_bytes(result):
    if isinstance(result, torch.nn.Module):
        result = dict(result.state_dict())
    if isinstance(result, tuple) and hasattr(result[0], "blocks"):
        result = dict(enumerate(result[0].blocks))
    if isinstance(result, torch.Tensor):
        result = {"": result}
    return sum(getattr(each, "nbytes", 0) for each in result.values()) if isinstance(result, dict) else 0


def run(call, names):
    command, *arguments = call.split()
    if command != "flashpack":
        return eval(call, names)
    with contextlib.redirect_stdout(io.StringIO()):
        return flashpack.cli.main([names.get(each, each) for each in arguments], standalone_mode=False)


def measure(call):
    names = dict(globals())
    if "model" in call:
        names["model"] = filled(Model(torch.bfloat16 if "coerce_dtype" in call else torch.float32))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    begin = status("VmRSS")
    result = run(call, names)
    peak = status("VmHWM") - begin
    return peak, result_bytes(names["model"] if "(model, path" in call else result)


def in_a_fork(measured, *arguments):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(measured(*arguments)).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


def make_files():
    flashpack.pack_to_file(filled(Model()), path)
    flashpack.commands.revert_from_flashpack(path, safetensors_path)
    flashpack.commands.revert_from_flashpack(path, torch_path)
    precisions = (torch.bfloat16, torch.float32)
    mixed = {str(i): torch.zeros((16 << 20) // precisions[i % 2].itemsize, dtype=precisions[i % 2]) for i in range(24)}
    flashpack.safetensors.torch.save_file(mixed, mixed_path)
    if any("Pretrained" in call for call in calls):
        transformers.PretrainedConfig().save_pretrained(directory)
        os.link(path, os.path.join(directory, "model.flashpack"))


in_a_fork(make_files)
print(json.dumps({call: in_a_fork(measure, call) for call in calls}))
"""


def rows():
    """The calls and commands of the table, and what it says that each takes."""
    found = re.findall(r"^\| `(.+?)` \| (.+?) \|$", DOCS.read_text(), re.MULTILINE)
    assert len(found) == len(dict(found)) > 10
    return dict(found)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    home = tmp_path_factory.mktemp("peak")
    (home / "pretrained").mkdir()
    files = ("a.flashpack", "a.safetensors", "a.pt", "mixed.safetensors")
    names = ("pretrained", *files, "new.flashpack", "new.safetensors", "new.pt")
    paths = [str(home / name) for name in names]
    has_transformers = importlib.util.find_spec("transformers") is not None
    calls = json.dumps([call for call in rows() if "Pretrained" not in call or has_transformers])
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *paths, calls], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("call", rows())
def test_a_call_takes_as_much_at_its_peak_as_the_table_says(measured, call):
    if "Pretrained" in call:
        pytest.importorskip("transformers")
    peak_bytes, result_bytes = measured[call]
    said = rows()[call]
    expected = {
        "its result": result_bytes,
        "its result and 32 MiB": result_bytes + 32 * MIB,
        "nothing": 0,
        "the tensors of the file": 256 * MIB,
        "64 MiB": 64 * MIB,
        "128 MiB": 128 * MIB,
        "`window_bytes` and the largest tensor": 256 * MIB,
        "`window_bytes`, the largest tensor and its cast": 320 * MIB,
        "128 MiB and the largest tensor": 256 * MIB,
        "up to 512 MiB of each checkpoint, and 64 MiB": 2 * 256 * MIB + 64 * MIB,
        "the same, and the pages of the source, which is mapped": 512 * MIB,
        "the pages of the source, which is mapped": 256 * MIB,
    }[said]
    assert peak_bytes <= expected + BESIDES_BYTES
    assert peak_bytes >= expected - LEAST_BELOW_BYTES
    assert result_bytes >= LEAST_BELOW_BYTES or said != "its result"
