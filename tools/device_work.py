"""The work of one process of device_bench.py: loads by one of the contenders, the parts of a load alone, or engines."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import Tensors, checksum, serve

DEVICE = "cuda:0"
MIB = 1 << 20
PART_BYTES = 4 * MIB

Pairs = Iterator[tuple[str, torch.Tensor]]


@contextmanager
def by_load_file(folder: Path, file: str = "model.flashpack", **options: Any) -> Iterator[Pairs]:
    import flashpack

    yield iter(flashpack.load_file(folder / file, DEVICE, **options).items())


@contextmanager
def by_block(folder: Path) -> Iterator[Pairs]:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    storage, metadata = read_flashpack_file(str(folder / "model.flashpack"), DEVICE)
    yield iterate_from_flash_tensor(storage, metadata)


@contextmanager
def by_safetensors(folder: Path) -> Iterator[Pairs]:
    from safetensors.torch import load_file

    yield iter(load_file(folder / "model.safetensors", DEVICE).items())


@contextmanager
def by_prefetch(folder: Path) -> Iterator[Pairs]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt", DEVICE) as file, file.prefetch() as loader:
        yield iter(loader)


@contextmanager
def by_fastsafetensors(folder: Path) -> Iterator[Pairs]:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[str(folder / "model.safetensors")], nogds=True, device=DEVICE) as file:
        yield ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


@contextmanager
def by_instanttensor(folder: Path) -> Iterator[Pairs]:
    from instanttensor import safe_open

    with safe_open(str(folder / "model.safetensors"), framework="pt", device=0) as file:
        yield iter(file.tensors())


@contextmanager
def by_runai(folder: Path) -> Iterator[Pairs]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(folder / "model.safetensors"), device=DEVICE)
        yield ((name, tensor.to(DEVICE)) for name, tensor in streamer.get_tensors())


class Loader(NamedTuple):
    package: str
    """Its folder among the carried packages; without one, an installed package of that name."""
    load: Callable[[Path], Any]
    file: str = "model.safetensors"


LOADERS = {
    "flashpack": Loader("flashpack", by_load_file, "model.flashpack"),
    "flashpack, not verified": Loader("flashpack", partial(by_load_file, verify="never"), "model.flashpack"),
    "flashpack, safetensors file": Loader("flashpack", partial(by_load_file, file="model.safetensors")),
    "safetensors": Loader("safetensors", by_safetensors),
    "safetensors-0.9.0rc1 prefetch": Loader("safetensors-0.9.0rc1", by_prefetch),
    "instanttensor": Loader("instanttensor", by_instanttensor),
    "fastsafetensors": Loader("fastsafetensors", by_fastsafetensors),
    "runai-model-streamer": Loader("runai-model-streamer", by_runai),
    "flashpack-0.4.5": Loader("flashpack-0.4.5", by_block, "model.flashpack"),
}


def status_mib(key: str) -> float:
    """A line of /proc/self/status that is in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def cpu_of_threads(prefix: str) -> dict[str, float]:
    """Seconds on a CPU by the names of those of this process's threads that begin with `prefix`."""
    seconds: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            spent = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:  # The thread has ended, or the kernel does not count.
            continue
        if name.startswith(prefix):
            seconds[name] = seconds.get(name, 0.0) + spent
    return seconds


class Meter:
    """Measures what this process spends between its making and result()."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # The peak of memory begins anew.
        self.memory_mib = status_mib("VmRSS")
        self.threads = cpu_of_threads("flashpack")
        self.cpu = time.process_time()
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def result(self) -> dict[str, Any]:
        seconds, cpu = self.elapsed(), time.process_time() - self.cpu
        threads = {name: spent - self.threads.get(name, 0.0) for name, spent in cpu_of_threads("flashpack").items()}
        peak = max(0.0, status_mib("VmHWM") - self.memory_mib)
        driver = threads.get("flashpack-drive")  # A peer has none.
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "driver_seconds": driver,
            "thread_seconds": threads,
            "host_peak_mib": peak,
        }


def timed_load(loader: Loader, folder: Path) -> dict[str, Any]:
    torch.cuda.synchronize()
    tensors: Tensors = {}
    first = None
    meter = Meter()
    with loader.load(folder) as pairs:
        for name, tensor in pairs:
            if first is None:
                torch.cuda.current_stream().synchronize()
                first = meter.elapsed()
            tensors[name] = tensor
        torch.cuda.synchronize()
        result = meter.result()
        result |= {"bytes": sum(tensor.nbytes for tensor in tensors.values()), "first_tensor_seconds": first}
        result["checksum"] = checksum(tensors)
        tensors.clear()
    torch.cuda.empty_cache()
    return result


def seconds_of(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Parts:
    """The least that has to be done for a load, each part by itself: bytes and seconds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.flashpack"

    def answer(self, job: str) -> dict[str, Any]:
        part, *numbers = job.split()
        size_bytes, seconds = getattr(self, part)(*map(int, numbers))
        return {"bytes": size_bytes, "seconds": seconds}

    def disk(self, threads: int) -> tuple[int, float]:
        """That many direct reads at a time, of 4 MiB."""
        with mmap.mmap(-1, threads * PART_BYTES) as memory, memoryview(memory) as view:
            return self._read(os.O_DIRECT, [view[i * PART_BYTES : (i + 1) * PART_BYTES] for i in range(threads)])

    def memcpy(self, threads: int) -> tuple[int, float]:
        """Out of the page cache into page-locked memory."""
        view = memoryview(torch.zeros(threads * PART_BYTES, dtype=torch.uint8).pin_memory().numpy())
        return self._read(0, [view[i * PART_BYTES : (i + 1) * PART_BYTES] for i in range(threads)])

    def _read(self, flags: int, buffers: list[memoryview]) -> tuple[int, float]:
        size_bytes = self.path.stat().st_size // PART_BYTES * PART_BYTES
        descriptor = os.open(self.path, os.O_RDONLY | flags)

        def read(index: int) -> None:
            for offset in range(index * PART_BYTES, size_bytes, len(buffers) * PART_BYTES):
                if os.preadv(descriptor, [buffers[index]], offset) != PART_BYTES:
                    raise OSError(f"short read of {self.path} at {offset}")

        try:
            with ThreadPoolExecutor(len(buffers)) as pool:
                return size_bytes, seconds_of(lambda: list(pool.map(read, range(len(buffers)))))
        finally:
            for buffer in buffers:
                buffer.release()
            os.close(descriptor)

    def h2d(self, mib: int, streams: int) -> tuple[int, float]:
        """Copies of that size out of page-locked memory, taking turns on so many streams."""
        host = torch.zeros(256 * MIB, dtype=torch.uint8).pin_memory().split(mib * MIB)
        device = torch.empty(256 * MIB, dtype=torch.uint8, device=DEVICE).split(mib * MIB)
        lanes = [torch.cuda.Stream() for _ in range(streams)]

        def copy(rounds: int) -> None:
            for i in range(rounds * len(host)):
                with torch.cuda.stream(lanes[i % streams]):
                    device[i % len(host)].copy_(host[i % len(host)], non_blocking=True)
            torch.cuda.synchronize()

        copy(1)
        return 8 * 256 * MIB, seconds_of(partial(copy, 8))


class Engines:
    """Loads by engines with options of their own: a job is these options as JSON, and may say how to `verify`."""

    def __init__(self, folder: Path) -> None:
        from flashpack._native import open_checkpoint

        self.checkpoint = open_checkpoint(folder / "model.flashpack")
        self.size_bytes = self.checkpoint.payload_bytes
        self.target = torch.empty(self.size_bytes, dtype=torch.uint8, device=DEVICE)

    def answer(self, job: str) -> dict[str, Any]:
        from flashpack._native import Engine

        options = json.loads(job)
        verify = options.pop("verify", "never")
        engine = Engine(0, **options)
        reads = [(0, 0, self.size_bytes, self.target.data_ptr())]
        stream = torch.cuda.current_stream().cuda_stream
        meter = Meter()
        stats = engine.load(self.checkpoint, reads, verify, stream=stream)
        return {**meter.result(), "bytes": self.size_bytes, "stats": stats}


def start_engine(context: bool) -> dict[str, Any]:
    """In a process that has made no engine; with or without a CUDA context."""
    if context:
        torch.ones(1, device=DEVICE)
        torch.cuda.synchronize()
    from flashpack._native import Engine

    engines = []
    first = seconds_of(lambda: engines.append(Engine(0)))
    following = [seconds_of(lambda: Engine(0)) for _ in range(5)]
    # An engine locks its pages when it is made, so that its growth of VmRSS includes them.
    before_mib = status_mib("VmRSS")
    engines.append(Engine(0))
    engine_mib = status_mib("VmRSS") - before_mib
    return {"bytes": 0, "seconds": first, "next_seconds": following, "engine_mib": engine_mib}


def work(name: str, folder: Path) -> None:
    """Does what it reads on standard input, a line each."""
    if name.startswith("start"):
        return serve(lambda job: start_engine(name == "start in a context"))
    torch.cuda.init()
    torch.ones(1, device=DEVICE)
    if name in LOADERS:
        return serve(lambda job: timed_load(LOADERS[name], folder / job))
    return serve(lambda job: made_for(name, folder / job.split(maxsplit=1)[0]).answer(job.split(maxsplit=1)[1]))


def made_for(name: str, folder: Path) -> Parts | Engines:
    return Parts(folder) if name == "parts" else Engines(folder)
