"""The loaders that compare.py compares: this library, and its peers at their defaults and at the settings that were the
fastest on a machine with two cores and a disk of 3 GB/s. The setting is in the name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from contenders import Tensors, module_of
from peers import PARALLEL, load_tensorizer

INDEX = "model.safetensors.index.json"
OWN_FILE = "model.flashpack"
TENSORIZER_FILE = "model.tensors"


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


class Room(NamedTuple):
    """A model whose memory is there and has been touched."""

    model: Any
    tensors: Tensors


def room_of_flashpack(folder: Path, file: str) -> Room:
    """Makes room of tensors that an earlier load of the file has left, as in a server that takes new weights."""
    import flashpack

    tensors = flashpack.load_file(folder / file)
    for tensor in tensors.values():
        tensor.zero_()
    return Room(module_of(tensors), tensors)


def room_of_torch(folder: Path) -> Room:
    """Makes room of tensors of torch, whose addresses do not agree with the file modulo the page."""
    import torch

    tensors = {name: torch.full_like(tensor, 1) for name, tensor in by_flashpack(folder, INDEX).items()}
    return Room(module_of(tensors), tensors)


def into_room(folder: Path, room: Room, file: str, **options: Any) -> Tensors:
    import flashpack

    flashpack.assign_from_file(room.model, folder / file, in_place=True, **options)
    return room.tensors


def by_reference(folder: Path) -> Tensors:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    storage, metadata = read_flashpack_file(str(folder / OWN_FILE), "cpu")
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


def by_fastsafetensors(folder: Path, **options: Any) -> Tensors:
    """Does what fastsafe_open does, which has no room for options. Its tensors own their buffer together."""
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cpu", nogds=True, **options)
    loader.add_filenames({0: [str(path) for path in shards_of(folder)]})
    buffers = loader.copy_files_to_device()
    tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
    buffers.close()
    loader.close()
    return tensors


def by_runai(folder: Path) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in shards_of(folder)])
        return dict(streamer.get_tensors())  # One buffer has all of them, by default.


def by_tensorizer(folder: Path, **options: Any) -> Tensors:
    return load_tensorizer(folder / TENSORIZER_FILE, **options)


def by_torch(folder: Path) -> Tensors:
    import torch

    loaded: Tensors = torch.load(folder / "model.pt", weights_only=True)
    return loaded


def by_torch_map(folder: Path) -> Tensors:
    import torch

    mapped: Tensors = torch.load(folder / "model.pt", weights_only=True, mmap=True)
    return {name: tensor.clone() for name, tensor in mapped.items()}


class Loader(NamedTuple):
    load: Callable[..., Tensors]
    """(folder) -> tensors; with `room`, (folder, room) -> tensors."""
    package: str = ""
    """The release that is taken from PyPI; nothing for what the environment has."""
    environment: dict[str, str] = {}  # noqa: RUF012  A tuple's default is not changed.
    ours: bool = False
    owns: bool = True
    """Whether the tensors end with memory of their own, and not with pages of the file."""
    room: Callable[[Path], Any] | None = None
    """(folder) -> memory for the tensors, which is made before the clock runs."""


TENSORIZER = "tensorizer==2.12.1"
RUNAI = "runai-model-streamer==0.17.0"
CHUNKS_OF_8_MIB = {"RUNAI_STREAMER_CHUNK_BYTESIZE": str(8 << 20)}
TWO_BUFFERED = {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered", "RUNAI_STREAMER_CONCURRENCY": "2"}
EIGHT_THREADS = {
    "FLASHPACK_READ_THREADS": "8",
    "FLASHPACK_NO_THREAD_CLAMP": "1",  # It would start as many threads as there are CPUs.
    "FLASHPACK_READ_CHUNK_BYTES": str(4 << 20),
    "FLASHPACK_SAMPLE_PROBE": "0",  # It reads 64 MiB through the page cache to see whether the file is there.
}
LOADERS = {
    "flashpack": Loader(partial(by_flashpack, file=INDEX), ours=True),
    "flashpack, stream": Loader(by_stream, ours=True),
    "flashpack, file of its own, not verified": Loader(partial(by_flashpack, file=OWN_FILE, verify="never"), ours=True),
    "flashpack, file of its own, verified": Loader(partial(by_flashpack, file=OWN_FILE), ours=True),
    "flashpack, into tensors that are there": Loader(
        partial(into_room, file=INDEX), ours=True, room=partial(room_of_flashpack, file=INDEX)
    ),
    "flashpack, file of its own, not verified, into tensors that are there": Loader(
        partial(into_room, file=OWN_FILE, verify="never"), ours=True, room=partial(room_of_flashpack, file=OWN_FILE)
    ),
    "flashpack, into tensors that torch made": Loader(partial(into_room, file=INDEX), ours=True, room=room_of_torch),
    "safetensors 0.8.0, mapped, all pages touched": Loader(by_map, "safetensors==0.8.0", owns=False),
    "safetensors 0.8.0 + clone": Loader(by_safetensors, "safetensors==0.8.0"),
    "safetensors 0.8.0, pread": Loader(by_pread, "safetensors==0.8.0"),
    "safetensors 0.9.0rc1 + clone": Loader(by_safetensors, "safetensors==0.9.0rc1"),
    "safetensors 0.9.0rc1, pread": Loader(by_pread, "safetensors==0.9.0rc1"),
    "flashpack 0.4.5 + clone": Loader(by_reference, "flashpack==0.4.5"),
    "flashpack 0.4.5, parallel": Loader(by_reference, "flashpack==0.4.5", PARALLEL),
    "flashpack 0.4.5, parallel, 8 threads, chunks of 4 MiB, no probe": Loader(
        by_reference, "flashpack==0.4.5", PARALLEL | EIGHT_THREADS
    ),
    "Run:ai 0.17.0": Loader(by_runai, RUNAI),
    "Run:ai 0.17.0, chunks of 8 MiB": Loader(by_runai, RUNAI, CHUNKS_OF_8_MIB),
    "Run:ai 0.17.0, sync_buffered, 2 threads, chunks of 8 MiB": Loader(by_runai, RUNAI, CHUNKS_OF_8_MIB | TWO_BUFFERED),
    "fastsafetensors 0.5.0": Loader(by_fastsafetensors, "fastsafetensors==0.5.0"),
    "fastsafetensors 0.5.0, buffered, 4 threads": Loader(
        partial(by_fastsafetensors, max_threads=4), "fastsafetensors==0.5.0", {"FASTSAFETENSORS_ODIRECT": "0"}
    ),
    "tensorizer 2.12.1": Loader(by_tensorizer, TENSORIZER),
    "tensorizer 2.12.1, 4 readers": Loader(partial(by_tensorizer, num_readers=4), TENSORIZER),
    "torch.load": Loader(by_torch),
    "torch.load, mmap=True + clone": Loader(by_torch_map),
}
