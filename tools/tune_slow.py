"""Runs flashpack_tune where loads are slow, and checks by loads of its own that what it picks is never slower.

usage: .cache/venv/bin/python tools/tune_slow.py FOLDER [--places NAME ...] [--runs 10] [--budget 30s]

FOLDER is on the disk to slow down, and gets files of up to 2.5 GiB, which are removed. The places are:

  fast         the disk as it is
  reads        a cgroup whose processes may read the disk 100 times a second
  bytes        a cgroup whose processes may read 300 MB a second
  one_cpu      one CPU
  no_io_uring  io_uring is refused, as containers do, so that workers read: two by default on two CPUs
  loop         an ext4 in a file on a loop device, which reads through the page cache of the file
  loop_direct  the same, past the page cache of the file
  far          a file system that answers each request at 25 MB/s, as a store over a network does (far_fs.py)

Needs root, losetup and mkfs.ext4, for `far` libfuse3 and the package mfusepy, the installed Python package, and
build/release/tools/flashpack_tune. A place that cannot be made is named, with the reason, and so is one where a run
fails, whose other runs are left out. All of it is removed in the end, also when a signal ends the program.

After each run, what was picked and the default take turns (load_turns.py). If the default was kept, the fastest other
setting of the search takes them, because a better one may have been missed.

Exit codes: 0 all places were made, nothing picked was slower than the default beyond noise, and nothing faster was
missed; 1 otherwise; 2 wrong usage, or something could not be made or run.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from ctypes import c_uint8, c_uint16, c_uint32
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HELD, NOT_HELD, NOT_RUN = 0, 1, 2

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
NOISE = 0.03
"""A median that differs by less says nothing."""

Setting = dict[str, Any]


class CannotMakeError(Exception):
    """A place that this machine does not have; the text is the reason."""


class Instruction(ctypes.Structure):
    """A step of a filter of system calls: struct sock_filter of linux/filter.h."""

    _fields_ = (("code", c_uint16), ("if_true", c_uint8), ("if_false", c_uint8), ("value", c_uint32))


class Filter(ctypes.Structure):
    """The whole filter: struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", c_uint16), ("instructions", ctypes.POINTER(Instruction)))


def refuse_io_uring() -> None:
    """Makes io_uring_setup fail with EPERM in this process and its children, by a filter of seccomp(2)."""
    load_number, jump_if_equal, answer = 0x20, 0x15, 0x06
    io_uring_setup, fail, allow = 425, 0x50000, 0x7FFF0000
    instructions = (Instruction * 4)(
        (load_number, 0, 0, 0),
        (jump_if_equal, 0, 1, io_uring_setup),
        (answer, 0, 0, fail | errno.EPERM),
        (answer, 0, 0, allow),
    )
    program = Filter(len(instructions), instructions)
    set_no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(set_no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "prctl")


class Place(NamedTuple):
    """A place where loads are measured."""

    folder: Path
    cgroup: Path | None = None
    cpus: frozenset[int] | None = None
    refuses_io_uring: bool = False
    size_gib: float = 1

    def enter(self) -> None:
        """Moves the calling process there, which then ends by signals as any other."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.refuses_io_uring:
            refuse_io_uring()
        if self.cgroup is not None:
            (self.cgroup / "cgroup.procs").write_text("0")
        if self.cpus is not None:
            os.sched_setaffinity(0, self.cpus)

    def run(self, command: list[Any]) -> str:
        """Returns what the command prints. Raises CalledProcessError with what it says of an error."""
        pipe = subprocess.PIPE
        # A signal waits until the child is known, because one that is not known would not be ended with this program.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            child = subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, preexec_fn=self.enter)
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                output, errors = child.communicate()
            finally:
                child.kill()
                child.wait()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if child.returncode != 0:
            raise subprocess.CalledProcessError(child.returncode, command, output, errors)
        return output


def disk_of(folder: Path, block_devices: Path = Path("/sys/dev/block")) -> str:
    """MAJOR:MINOR of the whole disk, because limits do not apply to partitions."""
    number = os.stat(folder).st_dev
    block = block_devices / f"{os.major(number)}:{os.minor(number)}"
    if not block.exists():
        raise CannotMakeError(f"{folder} is on no disk")
    block = block.resolve()
    return ((block.parent if (block / "partition").exists() else block) / "dev").read_text().strip()


def io_controller(mounts: Path = Path("/proc/self/mounts")) -> tuple[Path, int]:
    """The folder where the cgroups that can limit block devices are mounted, and their version."""
    for line in mounts.read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and "blkio" in options.split(","):
            return Path(folder), 1
        if kind == "cgroup2" and "io" in Path(folder, "cgroup.controllers").read_text().split():
            return Path(folder), 2
    raise CannotMakeError("no cgroup controller of block devices is mounted")


@contextmanager
def throttled(folder: Path, limit: str, most: int) -> Iterator[Place]:
    """A new cgroup whose processes may read `most` times ("iops") or bytes ("bps") a second from the disk."""
    device = disk_of(folder)
    root, version = io_controller()
    cgroup = root / f"flashpack_tune_slow.{os.getpid()}"
    with ExitStack() as undo:
        if version == 2 and "io" not in (control := root / "cgroup.subtree_control").read_text().split():
            undo.callback(control.write_text, "-io")
            control.write_text("+io")
        undo.callback(lambda: cgroup.rmdir() if cgroup.exists() else None)
        cgroup.mkdir()
        if version == 1:
            (cgroup / f"blkio.throttle.read_{limit}_device").write_text(f"{device} {most}")
        else:
            (cgroup / "io.max").write_text(f"{device} r{limit}={most}")
        yield Place(folder, cgroup=cgroup)


def run(*command: Any) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


def detach(image: Path) -> None:
    for device in run("losetup", "--associated", image, "--noheadings", "--output", "NAME").split():
        run("losetup", "--detach", device)


@contextmanager
def on_loop_device(folder: Path, direct: bool) -> Iterator[Place]:
    """A new ext4 in a file on a loop device, which reads past the page cache of the file if `direct`."""
    # The undoing of each step is registered before it, so that a signal in between leaves nothing behind.
    with ExitStack() as undo:
        image, mounted = folder / "image", folder / "mounted"
        undo.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 5 << 29)
        run("mkfs.ext4", "-q", "-F", image)
        undo.callback(detach, image)
        device = run("losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", image)
        mounted.mkdir()
        # Reads of a program that was killed may still hold it for a moment. Without --lazy that would be an error.
        undo.callback(lambda: run("umount", "--lazy", mounted) if mounted.is_mount() else None)
        run("mount", "-t", "ext4", device, mounted)
        yield Place(mounted)


@contextmanager
def far(folder: Path) -> Iterator[Place]:
    """A FUSE file system over `folder`, whose files can be read at once by many requests, each of which takes long."""
    with ExitStack() as undo:
        behind, mounted, errors = folder / "behind", folder / "mounted", folder / "errors"
        behind.mkdir()
        mounted.mkdir()
        # Its messages go to a file, because a pipe that nobody reads would stop it in the end.
        log = undo.enter_context(errors.open("w"))
        # A signal waits until the undoing is registered.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            command = [sys.executable, ROOT / "tools/far_fs.py", behind, mounted]
            server = subprocess.Popen(command, stderr=log, preexec_fn=Place(folder).enter)
            undo.callback(server.wait)
            undo.callback(server.kill)
            unmount = ["umount", "--lazy", mounted]
            undo.callback(subprocess.run, unmount, check=False, capture_output=True)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        end = time.monotonic() + 30
        while not mounted.is_mount():
            if server.poll() is not None or time.monotonic() > end:
                raise CannotMakeError(f"far_fs.py: {errors.read_text().strip() or 'it does not mount'}")
            time.sleep(0.01)
        yield Place(mounted, size_gib=0.25)  # A reader that asks for little at a time takes 10 s for it.


PLACES: dict[str, Callable[[Path], AbstractContextManager[Place]]] = {
    "fast": lambda folder: nullcontext(Place(folder)),
    "reads": lambda folder: throttled(folder, "iops", 100),
    "bytes": lambda folder: throttled(folder, "bps", 300_000_000),
    "one_cpu": lambda folder: nullcontext(Place(folder, cpus=frozenset({max(os.sched_getaffinity(0))}))),
    "no_io_uring": lambda folder: nullcontext(Place(folder, refuses_io_uring=True)),
    "loop": lambda folder: on_loop_device(folder, direct=False),
    "loop_direct": lambda folder: on_loop_device(folder, direct=True),
    "far": far,
}


class Speeds(NamedTuple):
    """The speeds of a setting relative to the default, from pairs of turns."""

    low: float
    """A quarter of the pairs is below."""
    median: float
    high: float
    """A quarter of the pairs is above."""

    @classmethod
    def of_pairs(cls, pairs: list[tuple[float, float]]) -> Speeds:
        return cls(*statistics.quantiles([other / usual for usual, other in pairs], n=4))

    @property
    def slower(self) -> bool:
        return self.median < 1 - NOISE and self.high < 1

    @property
    def faster(self) -> bool:
        return self.median > 1 + NOISE and self.low > 1

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Run(NamedTuple):
    """One run of flashpack_tune, and the turns after it."""

    setting: Setting
    """The pick, else the fastest other one of the search."""
    picked: bool
    disk: Speeds
    page_cache: Speeds

    @property
    def slower(self) -> bool:
        return self.picked and (self.disk.slower or self.page_cache.slower)

    @property
    def missed(self) -> bool:
        """Whether the default was kept although the other setting is faster beyond noise, and nowhere slower."""
        better = self.disk.faster or self.page_cache.faster
        return not self.picked and better and not (self.disk.slower or self.page_cache.slower)

    def __str__(self) -> str:
        name = text_of(self.setting)
        what = f"picked {name}" if self.picked else f"kept the default; beside it {name}"
        verdict = "  SLOWER" if self.slower else "  MISSED" if self.missed else ""
        return f"{what}: disk {self.disk}, page cache {self.page_cache}{verdict}"


def text_of(setting: Setting) -> str:
    workers = setting["workers"] or "default"
    return f"{setting['chunk_bytes'] >> 20} MiB x {setting['queue_depth']}, {workers} workers"


def other_setting(report: dict[str, Any]) -> Setting:
    """The setting to compare with the default."""
    if not report["is_default"]:
        return dict(report["best"])
    others = report["disk"][1:] or report["page_cache"][1:]  # The default is first.
    # Where the budget was too short for any, the default takes turns with itself, which the output shows.
    return dict(max(others or [report["default"]], key=lambda cell: cell.get("gb_per_s", 0)))


def tune_once(place: Place, options: argparse.Namespace) -> Run:
    tune = [options.program, "--dry_run", "--json", "--budget", options.budget, "--size_gib", str(place.size_gib)]
    report = json.loads(place.run([*tune, place.folder]))
    other = other_setting(report)
    settings = [json.dumps(setting) for setting in (report["default"], other)]
    turns = json.loads(place.run([sys.executable, ROOT / "tools/load_turns.py", place.folder, *settings]))
    speeds = (Speeds.of_pairs(turns[state]) for state in ("disk", "page_cache"))
    return Run(other, not report["is_default"], *speeds)


def summary(name: str, runs: list[Run]) -> str:
    count = len(runs)
    picked, slower, missed = (sum(getattr(run, what) for run in runs) for what in ("picked", "slower", "missed"))
    return (
        f"{name}: picked another setting in {picked} of {count}, never slower beyond noise in {count - slower} of "
        f"{count}, missed nothing faster in {count - missed} of {count}"
    )


def try_place(name: str, options: argparse.Namespace) -> int:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder, prefix="tune_slow."))
        try:
            place = stack.enter_context(PLACES[name](Path(folder)))
        except (CannotMakeError, OSError, subprocess.SubprocessError) as error:
            print(f"{name}: CANNOT BE MADE HERE: {reason_of(error)}", flush=True)
            return NOT_RUN
        runs: list[Run] = []
        status = HELD
        try:
            for number in range(1, options.runs + 1):
                runs.append(tune_once(place, options))
                print(f"{name} {number}: {runs[-1]}", flush=True)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"{name} {number}: COULD NOT RUN: {reason_of(error)}", flush=True)
            status = NOT_RUN
        print(summary(name, runs), flush=True)
        return NOT_HELD if any(run.slower or run.missed for run in runs) else status


def reason_of(error: Exception) -> str:
    return str(getattr(error, "stderr", None) or error).strip()


def end(number: int, frame: object) -> None:
    """Ends the program by an exception, so that all is removed. A second signal must not disturb that."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--budget", default="30s", help="of flashpack_tune")
    parser.add_argument("--program", type=Path, default=ROOT / "build/release/tools/flashpack_tune")
    options = parser.parse_args()
    for number in SIGNALS:
        signal.signal(number, end)
    statuses = []
    try:
        for name in options.places:
            statuses.append(try_place(name, options))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"tune_slow: could not run: {reason_of(error)}", file=sys.stderr)
        return NOT_RUN
    return NOT_HELD if NOT_HELD in statuses else max(statuses)


if __name__ == "__main__":
    sys.exit(main())
