"""A file system that takes a time for each read that depends on its size alone, as stores over a network do.

usage: python tools/far_fs.py FOLDER MOUNTPOINT [--mb_per_s 25]

MOUNTPOINT has the files of FOLDER until the program ends or it is unmounted. Needs /dev/fuse, libfuse3 and the package
mfusepy. The kernel asks for at most 1 MiB at a time, so that one read of 4 MiB is four requests. In all, the program
reaches about 1 GB/s with two cores, because it is one process of Python.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import mfusepy

MOST_REQUESTS = 256
"""More at a time wait. So many have a file of 256 MiB in flight; a larger one would wait for some of them."""


class FarFiles(mfusepy.Operations):
    """The files of a folder; what is not here is refused as not implemented."""

    use_ns = True

    def __init__(self, folder: Path, bytes_per_s: float) -> None:
        self._folder, self._bytes_per_s = folder, bytes_per_s

    def init_with_config(self, connection: Any, config: Any) -> None:
        del config
        connection.max_background = MOST_REQUESTS

    def _here(self, path: str) -> Path:
        return self._folder / path.lstrip("/")

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        del fh
        found = self._here(path).lstat()
        times = {f"st_{each}time": getattr(found, f"st_{each}time_ns") for each in "acm"}
        return times | {name: getattr(found, name) for name in ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")}

    def readdir(self, path: str, fh: int) -> list[str]:
        del fh
        return [".", "..", *os.listdir(self._here(path))]

    def open(self, path: str, flags: int) -> int:
        return os.open(self._here(path), flags & ~os.O_DIRECT)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        del fi
        return os.open(self._here(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        del path
        time.sleep(size / self._bytes_per_s)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        del path
        return os.pwrite(fh, data, offset)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        del path, datasync
        os.fsync(fh)

    def release(self, path: str, fh: int) -> None:
        del path
        os.close(fh)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        del fh
        os.truncate(self._here(path), length)

    def rename(self, old: str, new: str) -> None:
        self._here(old).rename(self._here(new))

    def unlink(self, path: str) -> None:
        self._here(path).unlink()

    def mkdir(self, path: str, mode: int) -> None:
        self._here(path).mkdir(mode)

    def rmdir(self, path: str) -> None:
        self._here(path).rmdir()

    def chmod(self, path: str, mode: int) -> None:
        self._here(path).chmod(mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--mb_per_s", type=float, default=25)
    options = parser.parse_args()
    mfusepy.FUSE(
        FarFiles(options.folder.resolve(), options.mb_per_s * 1e6),
        str(options.mountpoint),
        foreground=True,
        max_threads=MOST_REQUESTS,
        max_idle_threads=MOST_REQUESTS,
        kernel_cache=True,
        hard_remove=True,
    )


if __name__ == "__main__":
    main()
