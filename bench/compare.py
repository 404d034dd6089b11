"""Loads of one checkpoint into memory of the host, by this library and its peers, as their users meet them.

Every sample is a process of its own, which loads twice: the first load takes fresh memory, and the second comes after
the first one's tensors are gone. All tensors own their memory in the end, but for those of a map. Contenders take
turns, the file is dropped from the page cache before each cold load, and that is verified. Before a load of half of it,
the first half of each file is read, and that is verified, too. Every load's bytes are checked. tools/save_bench.py
compares durable saves.

Peers are taken from PyPI into .cache/peers when they are not there. One that cannot be had, or fails, is named with its
reason. The roofline of the page cache is plain reads, by the better of one thread and all, into huge pages that have
been touched. engine_bench and tools/fio_compare.sh measure that of the disk, which threads of Python do not reach:
eight of them with O_DIRECT had 1.7 to 2.9 GB/s where second loads had 2.5 to 3.1.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from contenders import Contender, Tensors, checksum, decoder_tensors, publish, serve  # noqa: E402
from page_cache import drop_from_page_cache, resident_fraction, warm, warm_first_half  # noqa: E402

PEERS = ROOT / ".cache" / "peers"
MIB = 1 << 20
PART_BYTES = 4 * MIB
SHARDS = 4
INDEX = "model.safetensors.index.json"
STATES = ("cold", "half cached", "page cache")
WIDTH = 4 * len(STATES)
LIMIT_S = 300.0


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def by_flashpack(folder: Path, file: str, **options: Any) -> Tensors:
    import flashpack

    return flashpack.load_file(folder / file, **options)


class Streamed(dict[str, Any]):
    """Tensors, with the time after which the first was there."""

    first_seconds = 0.0


def by_stream(folder: Path) -> Tensors:
    import flashpack

    tensors, started = Streamed(), time.perf_counter()
    for name, tensor in flashpack.stream_tensors(folder / INDEX):
        tensors.first_seconds = tensors.first_seconds or time.perf_counter() - started
        tensors[name] = tensor
    return tensors


def by_reference(folder: Path) -> Tensors:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    storage, metadata = read_flashpack_file(str(folder / "model.flashpack"), "cpu")
    tensors = dict(iterate_from_flash_tensor(storage, metadata))
    if os.environ.get("FLASHPACK_CPU_PARALLEL_READ") == "1":
        return tensors
    return {name: tensor.clone() for name, tensor in tensors.items()}  # The default is a map of the file.


def by_safetensors(folder: Path) -> Tensors:
    from safetensors import safe_open

    tensors = {}
    for path in shards_of(folder):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors


def by_map(folder: Path) -> Tensors:
    """As most people call it. A page of a mapped file is read when it is touched, so all of them are touched here."""
    import torch
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in shards_of(folder):
        tensors |= load_file(path)
    for tensor in tensors.values():
        tensor.flatten().view(torch.uint8)[::4096].sum()
    return tensors


def by_pread(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in shards_of(folder):
        tensors |= load_file(path, backend="pread")
    return tensors


def by_fastsafetensors(folder: Path) -> Tensors:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[str(path) for path in shards_of(folder)], nogds=True, device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def by_runai(folder: Path) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in shards_of(folder)])
        return dict(streamer.get_tensors())  # One buffer has all of them, by default.


def by_tensorizer(folder: Path) -> Tensors:
    from tensorizer import TensorDeserializer

    with TensorDeserializer(str(folder / "model.tensors"), device="cpu") as file:
        return dict(file.items())


def by_torch(folder: Path) -> Tensors:
    import torch

    loaded: Tensors = torch.load(folder / "model.pt", weights_only=True)
    return loaded


class Loader(NamedTuple):
    load: Callable[[Path], Tensors]
    packages: tuple[str, ...] = ()
    """What is taken from PyPI; nothing for what the environment has."""
    environment: dict[str, str] = {}  # noqa: RUF012  A tuple's default is not changed.
    ours: bool = False


TENSORIZER = "tensorizer 2.12.1"
LOADERS = {
    "flashpack": Loader(partial(by_flashpack, file=INDEX), ours=True),
    "flashpack, stream": Loader(by_stream, ours=True),
    "flashpack, file of its own": Loader(partial(by_flashpack, file="model.flashpack", verify="never"), ours=True),
    "flashpack, file of its own, verified": Loader(partial(by_flashpack, file="model.flashpack"), ours=True),
    "safetensors 0.8.0, mapped, all pages touched": Loader(by_map, ("safetensors==0.8.0",)),
    "safetensors 0.8.0 + clone": Loader(by_safetensors, ("safetensors==0.8.0",)),
    "safetensors 0.9.0rc1, pread": Loader(by_pread, ("safetensors==0.9.0rc1",)),
    "flashpack 0.4.5 + clone": Loader(by_reference, ("flashpack==0.4.5",)),
    "flashpack 0.4.5, parallel": Loader(by_reference, ("flashpack==0.4.5",), {"FLASHPACK_CPU_PARALLEL_READ": "1"}),
    "Run:ai 0.17.0": Loader(by_runai, ("runai-model-streamer==0.17.0",)),
    "fastsafetensors 0.5.0": Loader(by_fastsafetensors, ("fastsafetensors==0.5.0",)),
    TENSORIZER: Loader(by_tensorizer, ("tensorizer==2.12.1",)),
    "torch.load": Loader(by_torch),
}
ROOFLINE = "roofline"
GAPS = {
    "DeepSpeed 0.19.8, DeepNVMe": "moves raw files and has no reader of checkpoints; needs libaio-dev, and minutes to "
    "compile itself at its first use"
}


def folder_of(loader: Loader) -> Path:
    return PEERS / loader.packages[0].replace("==", "-")


def install(loader: Loader) -> str | None:
    """Takes a peer from PyPI, without torch and numpy, which are there. Returns why that failed, if it did."""
    folder = folder_of(loader)
    if folder.exists():
        return None
    part = folder.with_name(folder.name + ".part")
    without = PEERS / "without.txt"
    without.write_text("".join(f"{name}; sys_platform == 'none'\n" for name in ("torch", "numpy", "triton")))
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    command += ["--override", str(without), "--target", str(part), *loader.packages]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        return f"cannot be installed: {done.stderr.strip().splitlines()[-1]}"
    part.rename(folder)
    return None


def make_files(folder: Path, size_gib: float) -> None:
    """Makes the same checkpoint in every format, unless it is there."""
    done = folder / "complete.json"
    if done.exists() and json.loads(done.read_text()) == size_gib:
        return
    import flashpack
    import torch
    from safetensors.torch import save_file

    tensors = decoder_tensors(size_gib)
    names = list(tensors)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    flashpack.pack_to_file(tensors, folder / "model.flashpack", silent=True)
    torch.save(tensors, folder / "model.pt")
    if folder_of(LOADERS[TENSORIZER]).exists():
        subprocess.run([sys.executable, __file__, "--worker", "serialize", "--dir", str(folder)], check=False)
    done.write_text(json.dumps(size_gib))


def serialize(folder: Path) -> None:
    """Makes tensorizer's file, where it is installed."""
    sys.path.insert(0, str(folder_of(LOADERS[TENSORIZER])))
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(folder / "model.tensors"))
    serializer.write_state_dict(by_safetensors(folder))
    serializer.close()


def status_mib(key: str) -> float:
    """Returns a line of /proc/self/status that is in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def prepare(folder: Path, state: str) -> None:
    if state == "page cache":
        return
    for path in folder.iterdir():
        if (left := drop_from_page_cache(path)) > 0.01:
            raise RuntimeError(f"{left:.0%} of {path} stayed in the page cache")
        if state == "half cached":
            warm_first_half(path)
            # The index is a page or two, which are whole or not at all.
            if path.stat().st_size > MIB and abs((got := resident_fraction(path)) - 0.5) > 0.02:
                raise RuntimeError(f"{got:.0%} of {path} is in the page cache, and half was wanted")


def timed_load(loader: Loader, folder: Path, state: str) -> tuple[dict[str, Any], Tensors]:
    prepare(folder, state)
    Path("/proc/self/clear_refs").write_text("5")  # The peak of memory begins anew.
    before_mib, cpu, started = status_mib("VmRSS"), time.process_time(), time.perf_counter()
    tensors = loader.load(folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    peak_mib = max(0.0, status_mib("VmHWM") - before_mib)
    answer = {"seconds": seconds, "cpu_seconds": cpu, "bytes": size_bytes, "peak_mib": peak_mib}
    if isinstance(tensors, Streamed):
        answer["first_tensor_of_time"] = tensors.first_seconds / seconds
    return answer, tensors


def load_twice(loader: Loader, folder: Path, state: str) -> dict[str, Any]:
    answers = {}
    for turn in ("first", "second"):
        answer, tensors = timed_load(loader, folder, state)
        answers[turn] = answer | {"checksum": checksum({name: tensors[name] for name in sorted(tensors)})}
        del tensors
    return answers


def read_all(paths: Iterable[Path], threads: int, memory: memoryview) -> float:
    """Returns the seconds for reading the files into memory that is as large as all of them."""
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    jobs = [
        (descriptor, offset)
        for descriptor in descriptors
        for offset in range(0, os.fstat(descriptor).st_size, PART_BYTES)
    ]

    def work(thread: int) -> None:
        for number in range(thread, len(jobs), threads):
            at = number * PART_BYTES
            os.preadv(jobs[number][0], [memory[at : at + PART_BYTES]], jobs[number][1])

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    seconds = time.perf_counter() - started
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def roofline(folder: Path) -> dict[str, Any]:
    """Reads the page cache with one thread, and with one for each CPU."""
    paths = shards_of(folder)
    size_bytes = sum(path.stat().st_size for path in paths)
    mapping = mmap.mmap(-1, size_bytes + len(paths) * PART_BYTES)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(mapping)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
    seconds = min(read_all(paths, threads, memory) for threads in (1, os.cpu_count() or 1))
    return {"first": {"seconds": seconds, "cpu_seconds": 0.0, "bytes": size_bytes, "peak_mib": 0.0, "checksum": None}}


def work(name: str, folder: Path) -> None:
    """The process of one sample: imports what it needs before the clock runs."""
    if name == ROOFLINE:
        return serve(lambda state: roofline(folder))
    import torch

    torch.zeros(1)
    return serve(lambda state: load_twice(LOADERS[name], folder, state))


def sample(name: str, folder: Path, state: str) -> dict[str, Any]:
    """Runs one process. Raises RuntimeError if it fails."""
    environment = dict(os.environ)
    if name != ROOFLINE:
        loader = LOADERS[name]
        environment |= loader.environment
        if loader.packages:
            environment["PYTHONPATH"] = str(folder_of(loader))
    command = [sys.executable, __file__, "--worker", name, "--dir", str(folder)]
    contender = Contender(name, command, environment, limit_s=LIMIT_S)
    try:
        return contender.ask(state)
    finally:
        contender.close()


class Results:
    """Samples by contender and state, and the reasons of those that are out."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        self.samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.expected: int | None = None

    def take(self, name: str, state: str, folder: Path) -> None:
        if name in self.reasons:
            return
        try:
            answer = sample(name, folder, state)
            for load in answer.values():
                self._check(name, load["checksum"])
        except (RuntimeError, OSError) as error:
            if name == ROOFLINE or LOADERS[name].ours:
                raise
            self.reasons[name] = str(error)
            return
        self.samples.setdefault((name, state), []).append(answer)

    def _check(self, name: str, found: int | None) -> None:
        if found is None:
            return
        self.expected = found if self.expected is None else self.expected
        if found != self.expected:
            raise RuntimeError(f"{name} loaded other bytes")

    def median(self, name: str, state: str, turn: str, of: Callable[[dict[str, Any]], float]) -> float | None:
        answers = [answer[turn] for answer in self.samples.get((name, state), []) if turn in answer]
        return statistics.median(map(of, answers)) if answers else None


def rate(load: dict[str, Any]) -> float:
    return float(load["bytes"] / load["seconds"] / 1e9)


def report(results: Results) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in [ROOFLINE, *LOADERS]:
        if not any((name, state) in results.samples for state in STATES):
            continue
        rows[name] = {
            state: {
                "first_gb_per_s": results.median(name, state, "first", rate),
                "second_gb_per_s": results.median(name, state, "second", rate),
                "cpu_s_per_gb": results.median(name, state, "first", lambda x: x["cpu_seconds"] / x["bytes"] * 1e9),
                "peak_of_bytes": results.median(name, state, "first", lambda x: x["peak_mib"] * MIB / x["bytes"]),
                "samples": [
                    [round(rate(load), 3) for load in answer.values()] for answer in results.samples[name, state]
                ],
            }
            for state in STATES
            if (name, state) in results.samples
        }
        for state, row in rows[name].items():
            first = results.median(name, state, "first", lambda load: load.get("first_tensor_of_time", 0.0))
            row |= {"first_tensor_of_time": first} if first else {}
    return {"rows": rows, "missing": results.reasons}


def machine(folder: Path) -> dict[str, Any]:
    """Facts that a figure needs to be compared with another one's."""

    def said_by(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"

    models = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "file_system": said_by("findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(folder)),
    }


def as_markdown(result: dict[str, Any], command: str) -> str:
    lines = [
        f"{result['cpus']} cores of {result['cpu']}, {result['file_system']}, Linux {result['kernel']}, commit "
        f"{result['commit']}, {result['date']}. Medians of processes in turns, by `{command}`. First and second load "
        "of a process, GB/s; CPU s/GB and peak memory over the size of the tensors, first load.",
        "",
        "| into memory of their own |" + "".join(f" {state}, first | second | CPU | peak |" for state in STATES),
        "|---|" + "---|" * WIDTH,
    ]
    for name, states in result["rows"].items():
        cells = []
        for state in STATES:
            row = states.get(state, {})
            for key in ("first_gb_per_s", "second_gb_per_s", "cpu_s_per_gb", "peak_of_bytes"):
                value = row.get(key)
                cells.append("" if value is None or (name == ROOFLINE and key[0] in "cp") else f"{value:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | {reason} |{' |' * (WIDTH - 1)}" for name, reason in result["missing"].items()]
    lines.append("")
    lines += [
        f"The first tensor of `{name}`, {state}, is there after {row['first_tensor_of_time']:.1%} of its first load."
        for name, states in result["rows"].items()
        for state, row in states.items()
        if "first_tensor_of_time" in row
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("compare"), help="folder on the disk to measure, for the files"
    )
    parser.add_argument("--size_gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(LOADERS), default=list(LOADERS), metavar="NAME")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), metavar="STATE")
    parser.add_argument("--out", type=Path, help="for OUT.json and OUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "serialize":
        serialize(options.dir)
        return 0
    if options.worker:
        work(options.worker, options.dir)
        return 0
    PEERS.mkdir(parents=True, exist_ok=True)
    reasons = {name: install(LOADERS[name]) for name in options.only if LOADERS[name].packages}
    options.dir.mkdir(parents=True, exist_ok=True)
    make_files(options.dir, options.size_gib)
    where = machine(options.dir)
    results = Results(GAPS | {name: reason for name, reason in reasons.items() if reason is not None})
    for state in options.states:
        for path in options.dir.iterdir():
            if state == "page cache":
                warm(path)
        for turn in range(options.rounds):
            names = [ROOFLINE, *options.only] if state == "page cache" else options.only
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                results.take(name, state, options.dir)
            if options.out is not None:  # A run that is cut short still has figures.
                options.out.with_suffix(".json").write_text(json.dumps(where | report(results), indent=2) + "\n")
    result = where | report(results)
    command = f"bench/compare.py --size_gib {options.size_gib:g} --rounds {options.rounds}"
    publish(result, as_markdown(result, command), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
