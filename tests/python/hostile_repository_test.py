"""Directories as somebody would make them who wants to run code here, or to be where he should not be.

Every one is given to all that reads such a directory. Nothing may run, and what is raised is what the documentation
names. A directory may also load, where what is hostile about it is passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from flashpack import FlashPackError, commands  # noqa: E402
from flashpack._parts import OPTIONS  # noqa: E402
from flashpack.integrations.diffusers import AutoFlashPackModel, FlashPackDiffusionPipeline  # noqa: E402
from transformers_models import with_mixin  # noqa: E402

CODE = """
import pathlib
pathlib.Path({canary!r}).touch()
from diffusers import AutoencoderKL, DDPMPipeline, UNet2DModel
from transformers import BertConfig, BertModel
class Evil(UNet2DModel): pass
class EvilPipeline(DDPMPipeline): pass
class EvilBert(BertModel): pass
class EvilConfig(BertConfig): pass
"""
TRAPS = ("evil.py", "pipeline.py", "unet.py")
NESTED: Any = json.loads("[" * 200 + "]" * 200)
WRONG: list[Any] = [7, True, 1.5, [], {}, [[]], [None], {"a": {"b": []}}, "", "\0", "../..", "é\ud800", NESTED]
UNET = ["diffusers", "UNet2DModel"]


def make_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    )


def make_bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return transformers.BertModel(config)


@pytest.fixture(scope="session")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and a model of transformers, with all weights in two formats."""
    directory = tmp_path_factory.mktemp("harmless")
    pipeline = diffusers.DDPMPipeline(unet=make_unet(), scheduler=diffusers.DDPMScheduler())
    pipeline.save_pretrained(directory / "pipeline")
    commands.convert_to_flashpack(directory / "pipeline")
    make_bert().save_pretrained(directory / "bert")
    commands.convert_to_flashpack(directory / "bert")
    transformers.GenerationConfig().save_pretrained(directory / "bert")
    return directory


class Repository:
    """A copy of them, full of code that leaves a trace when it is run."""

    def __init__(self, directory: Path, harmless: Path) -> None:
        self.root = directory / "repository"
        shutil.copytree(harmless, self.root)
        self.outside = directory / "outside"
        shutil.copytree(harmless / "pipeline" / "unet", self.outside)
        self.canary = directory / "canary"
        self.pipeline, self.bert = self.root / "pipeline", self.root / "bert"
        folders = (self.pipeline, self.pipeline / "unet", self.pipeline / "scheduler", self.bert, self.outside)
        for folder in (*folders, directory / "path"):
            folder.mkdir(exist_ok=True)
            for name in TRAPS:
                (folder / name).write_text(CODE.format(canary=os.fspath(self.canary)))
        (directory / "path" / "payload_module.py").write_text(CODE.format(canary=os.fspath(self.canary)))
        for trap in TRAPS[1:]:
            (directory / "path" / trap).unlink()

    def edit(self, file: str, /, **fields: Any) -> None:
        path = self.root / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def without_flashpack(self) -> None:
        """Leaves the loading of the model to diffusers."""
        (self.pipeline / "unet" / "model.flashpack").unlink()

    def link(self, file: str, target: Path) -> None:
        path = self.root / file
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target)

    def fifo(self, file: str) -> None:
        path = self.root / file
        path.unlink(missing_ok=True)
        os.mkfifo(path)


Change = Callable[[Repository], object]


def index(**fields: Any) -> Change:
    return lambda repository: repository.edit("pipeline/model_index.json", **fields)


def index_text(text: str | bytes) -> Change:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda repository: (repository.pipeline / "model_index.json").write_bytes(content)


def left_to_diffusers(**fields: Any) -> Change:
    def change(repository: Repository) -> None:
        repository.without_flashpack()
        repository.edit("pipeline/model_index.json", **fields)

    return change


def unet_config(**fields: Any) -> Change:
    return lambda repository: repository.edit("pipeline/unet/config.json", **fields)


def bert_config(**fields: Any) -> Change:
    return lambda repository: repository.edit("bert/config.json", **fields)


def file_text(file: str, text: str) -> Change:
    return lambda repository: (repository.root / file).write_text(text)


def weights_index(weight_map: Any) -> Change:
    """In place of the weights of the model, so that a conversion looks at it."""

    def change(repository: Repository) -> None:
        (repository.bert / "model.safetensors").rename(repository.bert / "shard.safetensors")
        (repository.bert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def nested_pipeline(repository: Repository) -> None:
    shutil.copytree(repository.pipeline, repository.root / "copy")
    shutil.rmtree(repository.pipeline / "unet")
    (repository.root / "copy").rename(repository.pipeline / "unet")
    repository.edit("pipeline/unet/model_index.json", _class_name=["evil", "EvilPipeline"], unet=["evil", "Evil"])
    repository.edit("pipeline/model_index.json", unet=["diffusers", "DDPMPipeline"])


def shadowed_library(repository: Repository) -> None:
    for name in ("diffusers.py", "transformers.py"):
        shutil.copy(repository.pipeline / "evil.py", repository.pipeline / "scheduler" / name)


def versioned_config(repository: Repository) -> None:
    repository.edit("bert/config.json", configuration_files=["config.4.0.0.json"])
    hostile = {"model_type": "bert", "_attn_implementation_internal": "evil/kernel"}
    (repository.bert / "config.4.0.0.json").write_text(json.dumps(hostile))


EVIL_MAP = dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "evil.EvilBert") | {"AutoConfig": "evil.EvilConfig"}
CHANGES: dict[str, Change] = {
    **{f"component called {name}": index(**{name: UNET, "unet": ["evil", "Evil"]}) for name in sorted(OPTIONS)},
    **{f"setting {name}": left_to_diffusers(**{name: True, "unet": ["evil", "Evil"]}) for name in sorted(OPTIONS)},
    **{f"custom_pipeline {value!r}": index(custom_pipeline=value) for value in ("evil", "pipeline", "./evil.py")},
    **{
        f"class {value!r:.40}": index(_class_name=value)
        for value in (*WRONG, ["evil", "EvilPipeline"], ["pipeline", "EvilPipeline"], "__class__", "UNet2DModel", "os")
    },
    **{f"unet is {value!r:.40}": index(unet=value) for value in (*WRONG, None, UNET * 2, ["diffusers"])},
    **{
        f"{who} reads {value!r}": change(unet=value)
        for who, change in (("flashpack", index), ("diffusers", left_to_diffusers))
        for value in (
            *(["evil", "Evil"], ["unet", "Evil"], ["payload_module", "Evil"], ["../evil", "Evil"], ["/evil", "Evil"]),
            *(
                ["os", "system"],
                ["builtins", "exec"],
                ["subprocess", "Popen"],
                ["diffusers", "loaders"],
                ["evil\0", "E"],
            ),
            *(["diffusers", "DDPMPipeline"], ["diffusers", "DDPMScheduler"], ["diffusers.pipelines", "UNet2DModel"]),
            *(["diffusers", None], [None, "UNet2DModel"], [["diffusers"], "UNet2DModel"], ["diffusers", {"a": 1}]),
            *(["diffusers", "__class__"], ["diffusers", "../evil"], ["transformers", "AutoModel"], ["", ""], [1, 2]),
            *(["transformers", "pipeline"], ["flashpack.integrations.os", "system"], ["importlib", "import_module"]),
        )
    },
    **{
        f"component {name!r}": index(**{name: UNET})
        for name in (
            "../outside",
            "/etc",
            "unet\0",
            "unet/../../outside",
            "",
            " ",
            "__class__",
            "kwargs",
            "é\ud800",
            "*",
        )
    },
    **{f"_ignore_files {value!r:.30}": index(_ignore_files=value) for value in WRONG},
    **{f"_diffusers_version {value!r:.30}": index(_diffusers_version=value) for value in WRONG},
    "no JSON": index_text("{"),
    "an array": index_text("[]"),
    "null": index_text("null"),
    "nothing": index_text(""),
    "not UTF-8": index_text(b'{"_class_name": "\xff"}'),
    "UTF-16": index_text('{"_class_name": "DDPMPipeline"}'.encode("utf-16")),
    "nested deeply": index_text("[" * 100_000),
    "objects nested deeply": index_text('{"a":' * 100_000),
    "a number too long": index_text('{"unet": ' + "9" * 10_000 + "}"),
    "infinity": index_text('{"_class_name": "DDPMPipeline", "unet": [Infinity, NaN]}'),
    "twice the same": index_text('{"_class_name": "DDPMPipeline", "_class_name": ["evil", "EvilPipeline"]}'),
    "a pipeline in a pipeline": nested_pipeline,
    "code called like the library": shadowed_library,
    **{
        f"link {file}": lambda repository, file=file, target=target: repository.link(file, repository.outside / target)
        for file, target in (
            ("pipeline/unet", "."),
            ("pipeline/scheduler", "."),
            ("pipeline/unet/config.json", "config.json"),
            ("pipeline/unet/model.flashpack", "model.flashpack"),
            ("pipeline/unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        )
    },
    **{
        f"FIFO {file}": lambda repository, file=file: repository.fifo(file)
        for file in (
            *("pipeline/model_index.json", "pipeline/unet/config.json", "pipeline/unet/model.flashpack"),
            *("pipeline/scheduler/scheduler_config.json", "pipeline/unet/diffusion_pytorch_model.safetensors"),
            *("bert/config.json", "bert/model.flashpack", "bert/model.safetensors", "bert/generation_config.json"),
        )
    },
    **{
        f"unet config {field} {value!r:.30}": unet_config(**{field: value})
        for field in ("_class_name", "auto_map", "block_out_channels", "_use_default_values", "in_channels", "act_fn")
        for value in WRONG
    },
    "unet with code": unet_config(_class_name="Evil", auto_map={"AutoModel": "evil.Evil"}),
    "unet of another kind": unet_config(_class_name="DDPMScheduler"),
    "unet of no class": unet_config(_class_name="os"),
    "unet of gigantic size": unet_config(sample_size=10**30, block_out_channels=[-4, 0]),
    **{
        f"bert config {field} {value!r:.30}": bert_config(**{field: value})
        for field in (
            *("architectures", "auto_map", "model_type", "configuration_files", "hidden_size", "dtype", "torch_dtype"),
            *("id2label", "quantization_config", "num_attention_heads", "hidden_act", "pruned_heads", "problem_type"),
        )
        for value in WRONG
    },
    "bert with code": bert_config(auto_map=EVIL_MAP, architectures=["EvilBert"]),
    "bert with code of its own type": bert_config(auto_map=EVIL_MAP, architectures=["EvilBert"], model_type="evil"),
    "bert with code elsewhere": bert_config(auto_map={"AutoModel": "evil/repository--evil.EvilBert"}),
    "kernels": bert_config(_attn_implementation_internal="evil/kernel"),
    "kernels in public": bert_config(attn_implementation="evil/kernel"),
    "kernels in a part": bert_config(text_config={"_attn_implementation": {"": "evil/kernel@main"}}),
    "kernels of experts": bert_config(experts_implementation="evil/kernel"),
    "configuration elsewhere": bert_config(configuration_files=["../../outside/config.4.0.0.json"]),
    "configuration of a version": versioned_config,
    "dtype that is a function": bert_config(dtype="load", torch_dtype="hub"),
    "pipeline of transformers as architecture": bert_config(architectures=["TextGenerationPipeline"]),
    **{f"generation {text[:20]}": file_text("bert/generation_config.json", text) for text in ("[]", "{", '{"a": {}}')},
    **{
        f"weights {value!r:.40}": weights_index(value)
        for value in (
            *WRONG,
            *({"a": value} for value in WRONG),
            *({"a": "/etc/passwd"}, {"a": "../pipeline/unet/diffusion_pytorch_model.safetensors"}, {"a": "evil.py"}),
        )
    },
}


def load_pipeline(repository: Repository) -> None:
    FlashPackDiffusionPipeline.from_pretrained_flashpack(repository.pipeline)


def load_component(repository: Repository) -> None:
    AutoFlashPackModel.from_pretrained_flashpack(repository.pipeline, subfolder="unet")


def load_unet(repository: Repository) -> None:
    AutoFlashPackModel.from_pretrained_flashpack(repository.pipeline / "unet")


def load_bert(repository: Repository) -> None:
    with_mixin(transformers.BertModel).from_pretrained_flashpack(repository.bert)


def load_auto(repository: Repository) -> None:
    AutoFlashPackModel.from_pretrained_flashpack(repository.bert)


def convert(folder: str, **options: Any) -> Callable[[Repository], None]:
    def run(repository: Repository) -> None:
        commands.convert_to_flashpack(repository.root / folder, repository.root / "out", **options)

    return run


ACTIONS = {
    "pipeline": (load_pipeline, load_component, convert("pipeline"), convert("pipeline", use_diffusers=True)),
    "unet": (load_pipeline, load_unet, convert("pipeline/unet", use_diffusers=True)),
    "bert": (load_bert, load_auto, convert("bert"), convert("bert", use_transformers=True)),
}


def reach_out(*_: object) -> None:
    raise AssertionError("a connection")


@pytest.fixture
def repository(tmp_path: Path, harmless: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    made = Repository(tmp_path, harmless)
    for modules in ("diffusers.utils.dynamic_modules_utils", "transformers.dynamic_module_utils"):
        monkeypatch.setattr(f"{modules}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path"), *sys.path])
    monkeypatch.chdir(tmp_path / "path")
    monkeypatch.setattr("socket.socket.connect", reach_out)
    signal.alarm(60)  # What hangs ends with this process.
    yield made
    signal.alarm(0)
    for name in ("evil", "payload_module"):
        sys.modules.pop(name, None)


@contextlib.contextmanager
def documented_errors() -> Iterator[None]:
    try:
        yield
    except (FlashPackError, OSError, ImportError):
        pass
    except RuntimeError as error:
        assert str(error).startswith("Error loading ")


def actions_of(case: str) -> tuple[Callable[[Repository], None], ...]:
    if any(
        word in case for word in ("bert", "kernels", "configuration", "generation", "weights", "function", "archit")
    ):
        return ACTIONS["bert"]
    return ACTIONS["unet" if "unet config" in case or "unet with" in case or "unet of" in case else "pipeline"]


@pytest.mark.parametrize("case", CHANGES)
def test_a_hostile_repository_runs_no_code_and_raises_what_is_documented(case, repository):
    CHANGES[case](repository)
    for act in actions_of(case):
        with documented_errors():
            act(repository)
        assert not repository.canary.exists(), act.__name__


def test_the_harmless_repository_loads_and_its_code_runs_where_that_is_asked_for(repository):
    for act in {act for acts in ACTIONS.values() for act in acts}:
        shutil.rmtree(repository.root / "out", ignore_errors=True)
        act(repository)
        assert not list(repository.root.glob("out/**/*.py"))
    assert not repository.canary.exists()
    CHANGES["unet with code"](repository)
    AutoFlashPackModel.from_pretrained_flashpack(repository.pipeline / "unet", trust_remote_code=True)
    assert repository.canary.exists()
