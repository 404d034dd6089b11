"""`from_pretrained` of unmodified transformers and diffusers, with and without `flashpack.accelerate()`.

Models of random weights are saved as safetensors by their own `save_pretrained`. Every sample is a process of its own,
which imports what it needs, and then loads once. The two ways take turns; files are dropped from the page cache before
each cold load, and that is verified. The bytes of every parameter and buffer are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

from compare import MIB, status_mib  # noqa: E402
from contenders import Contender, checksum, publish, serve  # noqa: E402
from page_cache import make_cold, warm  # noqa: E402

WAYS = ("as it is", "accelerate()")
STATES = ("cold", "page cache")
TEXT = {"vocab_size": 32000, "hidden_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 12}


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(intermediate_size=4096, num_key_value_heads=4, **TEXT)
    return transformers.LlamaForCausalLM(config)


def mixture() -> Any:
    import transformers

    sizes = TEXT | {"num_hidden_layers": 4}
    config = transformers.MixtralConfig(intermediate_size=2048, num_key_value_heads=4, num_local_experts=8, **sizes)
    return transformers.MixtralForCausalLM(config)


def t5() -> Any:
    import transformers

    return transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=1024, d_ff=2816, num_layers=12))


def pipeline() -> Any:
    import diffusers

    unet = diffusers.UNet2DModel(sample_size=32, block_out_channels=(320, 640, 960, 960), layers_per_block=2)
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())


class Model(NamedTuple):
    make: Callable[[], Any]
    loader: str
    """The module and class whose `from_pretrained` is called."""


MODELS = {
    "Llama": Model(llama, "transformers.LlamaForCausalLM"),
    "T5": Model(t5, "transformers.T5ForConditionalGeneration"),
    "mixture of experts": Model(mixture, "transformers.MixtralForCausalLM"),
    "diffusers pipeline": Model(pipeline, "diffusers.DDPMPipeline"),
}


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def make_files(folder: Path, name: str) -> None:
    """Saves the model, unless it is there."""
    if folder.exists():
        return
    import torch

    torch.manual_seed(0)
    part = folder.with_name(folder.name + ".part")
    MODELS[name].make().to(torch.bfloat16).save_pretrained(part)
    part.rename(folder)


def tensors_of(loaded: Any) -> dict[str, Any]:
    """Parameters and buffers, those that no checkpoint has included."""
    model = getattr(loaded, "unet", loaded)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def work(name: str, way: str, folder: Path) -> None:
    """The process of one sample."""
    import torch

    module, _, class_name = MODELS[name].loader.rpartition(".")
    loader = getattr(importlib.import_module(module), class_name)
    around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if way == "accelerate()":
        import flashpack

        around = flashpack.accelerate()

    def load(state: str) -> dict[str, Any]:
        for path in files_of(folder):
            if state == "cold":
                make_cold(path)
        Path("/proc/self/clear_refs").write_text("5")  # The peak of memory begins anew.
        before_mib, cpu, started = status_mib("VmRSS"), time.process_time(), time.perf_counter()
        with around:
            loaded = loader.from_pretrained(folder, dtype=torch.bfloat16)
            tensors = tensors_of(loaded)
            # A map of a file has read nothing: what is mapped is there once somebody has touched it.
            for tensor in tensors.values():
                tensor.detach().reshape(-1).view(torch.uint8)[:: os.sysconf("SC_PAGESIZE")].sum()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        peak_mib = status_mib("VmHWM") - before_mib
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "peak_of_bytes": peak_mib * MIB / size_bytes,
            "bytes": size_bytes,
            "checksum": checksum(tensors),
        }

    serve(load)


def sample(name: str, way: str, state: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, way, "--dir", str(folder)]
    # Installed packages have their bytecode. Without it every process would compile this one again, for 40 ms.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    contender = Contender(f"{name}, {way}", command, environment, ours=True, limit_s=300)
    try:
        return contender.ask(state)
    finally:
        contender.close()


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """The samples of one model, by state and way. Raises RuntimeError if two loads differ in a bit."""
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {state: {way: [] for way in WAYS} for state in STATES}
    found: set[int] = set()
    for state in STATES:
        if state == "page cache":
            for path in files_of(folder):
                warm(path)
        for turn in range(rounds):
            for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
                answer = sample(name, way, state, folder)
                found.add(answer["checksum"])
                samples[state][way].append(answer)
    if len(found) != 1:
        raise RuntimeError(f"{name}: the two ways loaded different bytes")
    return samples


def median(answers: list[dict[str, Any]], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def as_markdown(result: dict[str, Any]) -> str:
    lines = ["| from_pretrained | GB |" + "".join(f" {state}, s | CPU, s | peak |" for state in STATES)]
    lines.append("|---|---|" + "---|---|---|" * len(STATES))
    for name, samples in result.items():
        for way in WAYS:
            cells = [f"{samples[STATES[0]][way][0]['bytes'] / 1e9:.2f}"]
            for state in STATES:
                cells += [
                    f"{median(samples[state][way], key):.2f}" for key in ("seconds", "cpu_seconds", "peak_of_bytes")
                ]
            lines.append(f"| {name}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("from_pretrained"), help="folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--out", type=Path, help="for OUT.json and OUT.md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.dir)
        return 0
    options.dir.mkdir(parents=True, exist_ok=True)
    result = {}
    for name in options.only:
        folder = options.dir / name.replace(" ", "_")
        make_files(folder, name)
        result[name] = measure(name, folder, options.rounds)
        publish(result, as_markdown({name: result[name]}), options.out)
    publish(result, as_markdown(result), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
