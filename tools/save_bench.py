"""Durable saves of a checkpoint, beside fio and peers, each at its default and, where it has a setting, at its best.

Every contender has a process of its own, kept alive, and they take turns, each with a new file in the same folder. The
clock stops after fsync of the file and of the folder. Tensors are made anew for each turn and freed after it, so that
only one contender holds a model. What was written is loaded again, in the first round, and compared with a checksum of
the tensors. Peers are taken from PyPI into .cache/peers when they are not there. A contender that is missing is named,
with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, Tensors, checksum, decoder_tensors, in_turns, publish, serve
from peers import environment_with, install, load_tensorizer, save_tensorizer


def pack(tensors: Tensors, path: Path, target_dtype: torch.dtype | None = None, **options: Any) -> None:
    import flashpack

    # The reference takes paths as strings only.
    flashpack.pack_to_file(tensors, str(path), target_dtype, **options)


def pack_as_safetensors(tensors: Tensors, path: Path) -> None:
    import flashpack

    flashpack.save_file(tensors, path)


def unpack(path: Path) -> Tensors:
    from flashpack.deserialization import revert_from_file

    return revert_from_file(str(path))


def save_safetensors(tensors: Tensors, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def load_safetensors(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


def save_torch_without_crc(tensors: Tensors, path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(before)


def load_torch(path: Path) -> Tensors:
    loaded: Tensors = torch.load(path)
    return loaded


def as_they_are(tensors: Tensors, folder: Path) -> Tensors:
    return tensors


def in_float32(tensors: Tensors, folder: Path) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


def loaded_before(tensors: Tensors, folder: Path) -> Tensors:
    path = folder / "save_bench.loaded"
    try:
        pack(tensors, path)
        return unpack(path)
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Saver:
    save: Callable[[Tensors, Path], None]
    load: Callable[[Path], Tensors] = unpack
    source: Callable[[Tensors, Path], Tensors] = as_they_are
    """(a model's tensors in bfloat16, folder) -> what is saved."""
    package: str = ""
    """The release that is taken from PyPI; nothing for what the environment has."""


SAVERS = {
    "flashpack": Saver(pack),
    "flashpack, no checksums": Saver(lambda tensors, path: pack(tensors, path, checksum=False)),
    "flashpack, loaded before, no checksums": Saver(
        lambda tensors, path: pack(tensors, path, checksum=False), source=loaded_before
    ),
    "flashpack, a safetensors file, no checksums": Saver(pack_as_safetensors, load_safetensors),
    "flashpack, float32 to bfloat16": Saver(
        lambda tensors, path: pack(tensors, path, torch.bfloat16), source=in_float32
    ),
    "flashpack, float32 to bfloat16, no checksums": Saver(
        lambda tensors, path: pack(tensors, path, torch.bfloat16, checksum=False), source=in_float32
    ),
    "flashpack 0.4.5": Saver(pack, package="flashpack==0.4.5"),
    "flashpack 0.4.5, 4 workers": Saver(partial(pack, num_workers=4), package="flashpack==0.4.5"),
    "safetensors 0.8.0": Saver(save_safetensors, load_safetensors, package="safetensors==0.8.0"),
    "safetensors 0.9.0rc1": Saver(save_safetensors, load_safetensors, package="safetensors==0.9.0rc1"),
    "tensorizer 2.12.1": Saver(save_tensorizer, load_tensorizer, package="tensorizer==2.12.1"),
    "torch.save": Saver(torch.save, load_torch),
    "torch.save, no CRC-32": Saver(save_torch_without_crc, load_torch),
}
FIO = ("fio 4M x 8", "fio 4M x 16")
OURS = [name for name in SAVERS if name.split(",")[0] == "flashpack"]


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def new_file(folder: Path) -> Iterator[Path]:
    """A name that is free; nothing is left of the file afterwards for others to wait for."""
    path = folder / "save_bench.saved"
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        sync(folder)


def save_once(saver: Saver, folder: Path, size_gib: float, check: bool) -> dict[str, Any]:
    """Bytes are counted as they are written: in bfloat16."""
    tensors = saver.source(decoder_tensors(size_gib), folder)
    result: dict[str, Any] = {"bytes": sum(tensor.numel() * torch.bfloat16.itemsize for tensor in tensors.values())}
    if check:
        result["expected"] = checksum({name: tensor.bfloat16() for name, tensor in tensors.items()})
    with new_file(folder) as path:
        started, cpu_before = time.perf_counter(), cpu_seconds()
        saver.save(tensors, path)
        sync(path)
        sync(folder)
        result |= {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_before}
        if check:
            del tensors
            result["checksum"] = checksum(saver.load(path))
    return result


def run_fio(name: str, folder: Path, size_gib: float, huge_pages: bool) -> dict[str, Any]:
    """One write of a new file that has been allocated before the clock starts and is synced before it stops."""
    block_size, depth = name.removeprefix("fio ").split(" x ")
    with new_file(folder) as path, tempfile.NamedTemporaryFile() as output:
        job = {
            "name": "write", "filename": path, "rw": "write", "size": f"{max(1, round(size_gib * 256)) * 4}M",
            "direct": 1, "fallocate": "native", "end_fsync": 1, "scramble_buffers": 0,
            "ioengine": "io_uring", "fixedbufs": 1, "registerfiles": 1, "bs": block_size, "iodepth": depth,
            "iomem": "mmaphuge" if huge_pages else "malloc", "output-format": "json", "output": output.name,
        }  # fmt: skip
        subprocess.run(["fio", *(f"--{key}={value}" for key, value in job.items())], check=True, stdout=sys.stderr)
        (report,) = json.loads(Path(output.name).read_text())["jobs"]
    seconds = report["write"]["io_bytes"] / report["write"]["bw_bytes"]
    share = (report["usr_cpu"] + report["sys_cpu"]) / 100
    return {"bytes": report["write"]["io_bytes"], "seconds": seconds, "cpu_seconds": share * seconds}


@contextmanager
def huge_pages() -> Iterator[bool]:
    """Whether fio can have them: with small pages it shows half of the disk."""
    reserved = Path("/proc/sys/vm/nr_hugepages")
    before = int(reserved.read_text())
    wanted = before + 48  # 16 blocks of 4 MiB, and some for alignment.
    try:
        try:
            reserved.write_text(f"{wanted}\n")
        except OSError:
            yield False
            return
        yield int(reserved.read_text()) >= wanted
    finally:
        if os.access(reserved, os.W_OK):
            reserved.write_text(f"{before}\n")


def work(name: str, folder: Path, size_gib: float, huge: bool) -> None:
    """The process of one contender."""

    def answer(job: str) -> dict[str, Any]:
        if name in FIO:
            return run_fio(name, folder, size_gib, huge)
        return save_once(SAVERS[name], folder, size_gib, job == "check")

    serve(answer)


class Writer(Contender):
    def __init__(self, name: str, arguments: list[str]) -> None:
        self.samples: list[dict[str, float]] = []
        environment = environment_with("" if name in FIO else SAVERS[name].package)
        super().__init__(name, [sys.executable, __file__, "--worker", name, *arguments], environment, name in OURS)


def missing(name: str) -> str | None:
    """Why it cannot take part."""
    if name in FIO:
        return None if shutil.which("fio") else "fio is not installed"
    package = SAVERS[name].package
    return install(package) if package else None


def verify(name: str, answer: dict[str, Any]) -> None:
    if answer.get("checksum") != answer.get("expected"):
        raise RuntimeError(f"{name} wrote wrong bytes")


def measure(writers: list[Writer], rounds: int) -> None:
    for writer, counts in in_turns(writers, rounds):
        answer = writer.attempt("save" if counts else "check", lambda answer, name=writer.name: verify(name, answer))
        if counts and answer is not None:
            writer.samples.append(answer)


def report(writers: list[Writer], absent: dict[str, str]) -> dict[str, Any]:
    rates = {w.name: [sample["bytes"] / sample["seconds"] / 1e9 for sample in w.samples] for w in writers}
    medians = {w.name: statistics.median(rates[w.name]) for w in writers if w.failure is None}
    return {
        "kernel": platform.release(),
        "torch": torch.__version__,
        "fio_gb_per_s": max((medians[name] for name in FIO if name in medians), default=None),
        "saves_gb_per_s": medians,
        "cpu_s_per_gb": {
            w.name: statistics.median(sample["cpu_seconds"] / sample["bytes"] * 1e9 for sample in w.samples)
            for w in writers
            if w.failure is None
        },
        "missing": absent | {w.name: w.failure for w in writers if w.failure is not None},
        "rounds": rates,
    }


def as_markdown(result: dict[str, Any], command: str) -> str:
    lines = [
        f"Linux {result['kernel']}, torch {result['torch']}. Medians, in turns, by `{command}`. Every file is new, and "
        "fsync of file and folder is in the clock. Bytes were checked.",
        "",
        "| durable save | GB/s | of fio | CPU s/GB |",
        "|---|---|---|---|",
    ]
    fio = result["fio_gb_per_s"]
    for name, rate in result["saves_gb_per_s"].items():
        share = f"{rate / fio:.2f}" if fio else ""
        lines.append(f"| {name} | {rate:.2f} | {share} | {result['cpu_s_per_gb'][name]:.3f} |")
    lines += [f"| {name} | {reason} | | |" for name, reason in result["missing"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(), help="folder on the disk to measure")
    parser.add_argument("--size_gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    names = [*FIO, *SAVERS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path, help="for OUT.json and OUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--huge_pages", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.dir, options.size_gib, options.huge_pages)
        return 0
    reasons = {name: missing(name) for name in options.only}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    with huge_pages() as huge:
        arguments = ["--dir", str(options.dir), "--size_gib", str(options.size_gib)] + ["--huge_pages"] * huge
        writers = [Writer(name, arguments) for name in reasons if name not in absent]
        try:
            measure(writers, options.rounds)
        finally:
            for writer in writers:
                writer.close()
    command = f"tools/save_bench.py --size_gib {options.size_gib:g} --rounds {options.rounds}"
    result = report(writers, absent)
    publish(result, as_markdown(result, command), options.out)
    if not huge:
        print("no huge pages could be reserved: fio shows less than the disk can do", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
