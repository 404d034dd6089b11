"""Loads a file with two settings of an engine in turns, and prints the speed of the second against the first.

usage: python tools/load_turns.py FOLDER SETTING SETTING [--size_gib 0.25] [--pairs 21] [--seconds 0.25]

A setting is a JSON object as in the report of flashpack_tune, such as its "default" and its "best". The file is made in
FOLDER, and removed in the end. Each turn loads it again and again until --seconds have passed, to memory on huge pages
that was used before, first past a page cache that has nothing of it and then from one that has all, which is verified.
The bytes of each engine's first load are compared with the file. Prints one JSON object: for "disk" and "page_cache"
the GB/s of each turn of both settings, in pairs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashpack
import torch
from flashpack._native import Engine, open_checkpoint
from page_cache import make_cold, make_warm

Pair = tuple[float, float]


def engine_of(setting: dict[str, Any]) -> Engine:
    return Engine(
        chunk_bytes=setting["chunk_bytes"],
        queue_depth=setting["queue_depth"],
        staging_bytes=setting["staging_bytes"],
        workers=setting["workers"] or None,
        backend=setting["backend"],
    )


def touched_memory(size_bytes: int) -> mmap.mmap:
    """Memory on huge pages where the system gives some, all of which are present."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    fill(memory)
    return memory


def fill(memory: mmap.mmap) -> None:
    ctypes.memset(address_of(memory), 0xA5, len(memory))


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Loads:
    """Loads of a whole file to the same memory."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._checkpoint = open_checkpoint(path)
        self._memory = touched_memory(self._checkpoint.payload_bytes)
        self._reads = [(0, 0, self._checkpoint.payload_bytes, address_of(self._memory))]

    def gb_per_s(self, engine: Engine, prepare: Callable[[Path], object]) -> float:
        """The speed of as many loads as take `seconds`, each after `prepare`, whose time does not count."""
        took = moved_bytes = 0.0
        while took < self.seconds:
            prepare(self.path)
            began = time.perf_counter()
            self.once(engine)
            took += time.perf_counter() - began
            moved_bytes += self._checkpoint.payload_bytes
        return moved_bytes / took / 1e9

    def check(self, engine: Engine, prepare: Callable[[Path], object]) -> None:
        """Loads once, and raises RuntimeError if the memory does not have the file's bytes then."""
        prepare(self.path)
        fill(self._memory)
        self.once(engine)
        loaded, at = memoryview(self._memory), 0
        with self.path.open("rb") as file:
            while at < len(loaded):
                part = file.read(min(len(loaded) - at, 64 << 20))
                if not part or loaded[at : at + len(part)] != part:
                    raise RuntimeError(f"other bytes than those of {self.path} were loaded")
                at += len(part)

    def once(self, engine: Engine) -> dict[str, Any]:
        """Returns the transfer's statistics."""
        return engine.load(self._checkpoint, self._reads, "never")


def in_turns(loads: Loads, engines: tuple[Engine, Engine], pairs: int, prepare: Callable[[Path], object]) -> list[Pair]:
    """The GB/s of both engines; who begins changes from pair to pair."""
    for engine in engines:
        loads.check(engine, prepare)  # An engine takes its staging memory at its first load.
    measured = []
    for pair in range(pairs):
        speeds = {turn: loads.gb_per_s(engines[turn], prepare) for turn in (pair % 2, 1 - pair % 2)}
        measured.append((speeds[0], speeds[1]))
    return measured


def measure(folder: Path, settings: tuple[dict[str, Any], dict[str, Any]], options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory(dir=folder, prefix="load_turns.") as temporary:
        path = Path(temporary, "file.flashpack")
        content = bytearray(os.urandom(max(1, int(options.size_gib * (1 << 30)))))
        flashpack.pack_to_file({"bytes": torch.frombuffer(content, dtype=torch.uint8)}, path, target_dtype=None)
        del content
        loads = Loads(path, options.seconds)
        engines = (engine_of(settings[0]), engine_of(settings[1]))
        return {
            "disk": in_turns(loads, engines, options.pairs, make_cold),
            "page_cache": in_turns(loads, engines, options.pairs, make_warm),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads, nargs=2, metavar="SETTING")
    parser.add_argument("--size_gib", type=float, default=0.25)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.25)
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, tuple(options.settings), options)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
