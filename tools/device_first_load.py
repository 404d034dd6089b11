"""One load to a CUDA device, followed at once by a kernel on another stream; what that has seen is compared."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from contenders import checksum, decoder_tensors, small_tensors

DEVICE = "cuda:0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(), help="folder on the disk to read from")
    parser.add_argument("--size_gib", type=float, default=1)
    options = parser.parse_args()
    import flashpack
    from flashpack.deserialization import read_flashpack_file

    tensors = {**small_tensors(options.size_gib / 8), **decoder_tensors(options.size_gib)}
    expected = checksum({name: tensor.view(torch.int16) ^ -1 for name, tensor in tensors.items()})
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder) / "model.flashpack"
        flashpack.pack_to_file(tensors, path, target_dtype=None)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        started = time.perf_counter()
        loaded = flashpack.load_file(path, DEVICE)
        seconds = time.perf_counter() - started
        with torch.cuda.stream(stream):
            inverted = {name: tensor.view(torch.int16) ^ -1 for name, tensor in loaded.items()}
            found = checksum(inverted)
        stats = read_flashpack_file(path, DEVICE)[0].stats
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{torch.cuda.get_device_name(0)}: {size_bytes / 1e9:.2f} GB in {seconds:.2f} s, the first load of a process")
    print(json.dumps(stats))
    print("the bits are right" if found == expected else "WRONG BITS")
    return int(found != expected)


if __name__ == "__main__":
    sys.exit(main())
