"""One flipped bit in the payload of a legal file, for every way of reading it.

With verify="always" a file gives the bytes that were written or an error. With "auto" it may also say that it has not
held all of what it read against the checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flashpack
import pytest
import torch
from flashpack import FlashPackError, FlashPackMixin
from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file
from support import GOLDEN_FILES, bits, crc32c, footer_bytes, random_tensor, write_file

MIB = 1 << 20
TORN_BYTES = MIB + 77_777

Bytes = dict[str, bytes]


class Case(NamedTuple):
    """A file without checksums."""

    footer: dict[str, Any]
    payload: bytes
    names: list[str]


def payload_of(size: int) -> bytes:
    return bits(random_tensor((size,), torch.uint8, size)) if size else b""


def blocks_case(*blocks: tuple[str, int, list[int]], align: int = 0, trailing: int = 0) -> Case:
    """A file of (dtype, file offset, numbers of elements), the tensors of a block one after the other."""
    macroblocks, index, end = [], [], 0
    for number, (dtype, offset, counts) in enumerate(blocks):
        width, elems = getattr(torch, dtype).itemsize, 0
        for count in counts:
            record = {"name": f"{number}_{len(index)}", "shape": [count], "offset": elems, "length": count}
            index.append({**record, "macroblock": number})
            elems += count
        macroblocks.append(
            {"dtype": dtype, "offset_bytes": offset, "length_bytes": elems * width, "length_elems": elems}
        )
        end = max(end, offset + elems * width)
    footer = {"format": "flashpack_v4", "align_bytes": align, "macroblocks": macroblocks, "index": index}
    return Case(footer, payload_of(end + trailing), [record["name"] for record in index])


def of_file(path: Path, trailing: int = 0) -> Case:
    footer = json.loads(footer_bytes(path))
    payload = path.read_bytes()[: -len(footer_bytes(path)) - 16] + payload_of(trailing)
    return Case(footer, payload, [record["name"] for record in footer["index"]])


LAID_OUT: dict[str, Callable[[], Case]] = {
    "one byte": lambda: blocks_case(("uint8", 0, [1])),
    "a MiB": lambda: blocks_case(("uint8", 0, [MIB])),
    "dense": lambda: blocks_case(("int8", 0, [TORN_BYTES, 3, 0, MIB, 5])),
    "an empty block in the middle": lambda: blocks_case(
        ("uint8", 0, [TORN_BYTES]), ("int64", TORN_BYTES + 7, [0]), ("int16", TORN_BYTES + 7, [TORN_BYTES])
    ),
    "an empty block behind all": lambda: blocks_case(
        ("uint8", 0, [TORN_BYTES]), ("int64", TORN_BYTES + 2 * MIB + 7, [0])
    ),
    "empty blocks with gaps": lambda: blocks_case(("int64", 0, [0]), ("uint8", 3 * MIB + 5, [9]), ("int32", MIB, [0])),
    "the payload begins late": lambda: blocks_case(("float32", 4096 + 4, [9, MIB // 4])),
    "a gap of more than a MiB": lambda: blocks_case(("uint8", 5, [MIB, 9]), ("float64", 3 * MIB + 8, [7, 1])),
    "blocks against the order of the file": lambda: blocks_case(("float16", MIB, [8, 3]), ("int8", 11, [MIB - 20])),
    "a few bytes behind the last block": lambda: blocks_case(("uint8", 0, [TORN_BYTES]), trailing=5),
    "more than a MiB behind the last block": lambda: blocks_case(("uint8", 0, [TORN_BYTES]), trailing=TORN_BYTES),
}


@pytest.fixture(
    params=[*LAID_OUT, "tied", *GOLDEN_FILES, "a golden file with bytes behind it"], ids=lambda p: Path(p).stem
)
def case(request, pack) -> Case:
    if request.param in LAID_OUT:
        return LAID_OUT[request.param]()
    if request.param == "tied":
        weight = torch.nn.Parameter(random_tensor((700, 500)))
        model = torch.nn.ModuleDict({name: torch.nn.Linear(500, 700) for name in ("a", "b")})
        model["a"].weight = model["b"].weight = weight
        return of_file(pack(model, checksum=False))
    if isinstance(request.param, Path):
        return of_file(request.param)
    return of_file(GOLDEN_FILES[3], trailing=5)


def with_checksums(case: Case) -> dict[str, Any]:
    stripes = [case.payload[begin : begin + MIB] for begin in range(0, len(case.payload), MIB)]
    return {**case.footer, "crc32c_per_mib": "".join(f"{crc32c(stripe):08x}" for stripe in stripes)}


def as_bytes(tensors: Any) -> Bytes:
    return {name: bits(tensor) for name, tensor in dict(tensors).items()}


class Net(torch.nn.Module, FlashPackMixin):
    """Has the tensors of a file as buffers."""

    def __init__(self, shapes: dict[str, tuple[torch.dtype, list[int]]]) -> None:
        super().__init__()
        for name, (dtype, shape) in shapes.items():
            module = self
            *outer, last = name.split(".")
            for part in outer:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_buffer(last, torch.empty(shape, dtype=dtype))


def shapes_of(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    with flashpack.open_file(path) as file:
        slices = {name: file.get_slice(name) for name in file}
        return {name: (each.dtype, list(each.shape)) for name, each in slices.items()}


def assigned(path: Path, **options: Any) -> Bytes:
    net = Net(shapes_of(path))
    flashpack.assign_from_file(net, path, strict=True, verify="always", **options)
    return as_bytes(net.named_buffers())


def constructed(path: Path) -> Bytes:
    return as_bytes(Net.from_flashpack(path, shapes=shapes_of(path), verify="always").named_buffers())


def one_by_one(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with flashpack.open_file(path, verify="always") as file:
        for name in file:
            yield name, file[name]


def in_slices(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Halves, so that no slice is the whole tensor."""
    with flashpack.open_file(path, verify="always") as file:
        for name in file:
            part = file.get_slice(name)
            half = len(torch.empty(part.shape, device="meta")) // 2 if part.shape else 0
            yield name, torch.cat([part[:half], part[half:]]) if part.shape else part[...]


def in_loads_of_one(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name in flashpack.load_file(path, mmap=True):
        yield from flashpack.load_file(path, names=[name], verify="always").items()


ALWAYS: dict[str, Callable[[Path], Bytes]] = {
    "load_file": lambda path: as_bytes(flashpack.load_file(path, verify="always")),
    "load_file, by name": lambda path: as_bytes(in_loads_of_one(path)),
    "read_flashpack_file": lambda path: as_bytes(
        iterate_from_flash_tensor(*read_flashpack_file(path, verify="always"))
    ),
    "open_file": lambda path: as_bytes(one_by_one(path)),
    "get_slice": lambda path: as_bytes(in_slices(path)),
    "assign_from_file": assigned,
    "assign_from_file, blocks": lambda path: assigned(path, keep_flash_ref_on_model=True),
    "from_flashpack": constructed,
}
AUTO: dict[str, Callable[[Path], Bytes]] = {
    "load_file": lambda path: as_bytes(flashpack.load_file(path)),
    "revert_from_file": lambda path: as_bytes(flashpack.revert_from_file(path)),
    "read_flashpack_file": lambda path: as_bytes(iterate_from_flash_tensor(*read_flashpack_file(path))),
}


def places_to_flip(case: Case, path: Path) -> list[int]:
    """The ends of the payload, of tensors, of what lies between them, and of stripes."""
    ends = {0, len(case.payload)}
    with flashpack.open_file(path, verify="never") as file:
        for entry in file._entries.values():
            ends |= {entry.offset_bytes, entry.offset_bytes + entry.size_bytes}
    ends |= set(range(0, len(case.payload), MIB))
    return sorted({place for end in ends for place in (end - 1, end) if 0 <= place < len(case.payload)})


def flips(case: Case, path: Path, footer: dict[str, Any]) -> Iterator[int]:
    for place in places_to_flip(case, path):
        damaged = bytearray(case.payload)
        damaged[place] ^= 1 << place % 8
        write_file(path, footer, bytes(damaged))
        yield place


def is_sound(case: Case, path: Path, sound: Bytes) -> bool:
    """Whether the file can be read at all, and then every reader says what was written."""
    if len(case.payload) > end_of_blocks(case):
        for read in [*ALWAYS.values(), *AUTO.values(), flashpack.verify_file]:
            with pytest.raises(FlashPackError, match="belong to no macroblock"):
                read(path)
        return False
    for read in [*ALWAYS.values(), *AUTO.values()]:
        assert read(path) == sound
    assert flashpack.verify_file(path)["verified_bytes"] == len(case.payload)
    return True


def end_of_blocks(case: Case) -> int:
    if "macroblocks" in case.footer:
        return max(block["offset_bytes"] + block["length_bytes"] for block in case.footer["macroblocks"])
    return case.footer["total_elems"] * getattr(torch, case.footer["target_dtype"]).itemsize


def test_with_checksums_every_reader_gives_what_was_written_or_an_error(case, tmp_path, caplog):
    path = write_file(tmp_path / "a", case.footer, case.payload)
    sound = as_bytes(flashpack.load_file(path))
    footer = with_checksums(case)
    if not is_sound(case, write_file(path, footer, case.payload), sound):
        return
    caplog.set_level("INFO", logger="flashpack")
    for place in flips(case, path, footer):
        ((begin, size, _),) = flashpack.verify_file(path)["corrupt"]
        assert begin <= place < begin + size
        for name, read in ALWAYS.items():
            assert not given(read, path, sound), f"{name}: byte {place}"
        for name, read in AUTO.items():
            caplog.clear()
            if wrong := given(read, path, sound):
                (said,) = re.findall(r": (\d+) bytes in .* (\d+) verified", caplog.text)
                assert int(said[1]) < int(said[0]), f"{name}: byte {place}, in {wrong}"


def given(read: Callable[[Path], Bytes], path: Path, sound: Bytes) -> list[str]:
    """The tensors that a reader gave with other bytes than those that were written, none when it refused."""
    try:
        tensors = read(path)
    except FlashPackError as error:
        assert "checksum" in str(error), error
        return []
    assert tensors.keys() == sound.keys()
    return [name for name, each in tensors.items() if each != sound[name]]


def test_without_checksums_every_reader_says_that_it_cannot_verify(case, tmp_path):
    path = write_file(tmp_path / "a", case.footer, case.payload)
    if not sum(map(len, as_bytes(flashpack.load_file(path)).values())):
        pytest.skip("nothing is read of this file")
    for read in [*ALWAYS.values(), flashpack.verify_file]:
        with pytest.raises(FlashPackError, match="no checksums"):
            read(path)
