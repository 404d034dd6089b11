"""FORMAT.md, held against the files that the package reads and writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import flashpack
import pytest
import torch
from flashpack import _native
from support import DTYPE_NAMES, GOLDEN_FILES, assert_bit_equal, bits, crc32c, footer_bytes

PAGE = (Path(__file__).parent.parent.parent / "torch_binding" / "format" / "FORMAT.md").read_text()


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return text


@pytest.fixture
def example(tmp_path) -> Path:
    content = bytearray()
    for line in block("text").splitlines():
        assert int(line[:8], 16) == len(content)
        content += bytes.fromhex(line[10:49])
    path = tmp_path / "example.flashpack"
    path.write_bytes(content)
    return path


@pytest.fixture
def read():
    """The reader of the page: {name: (dtype, shape, bytes)}."""
    names: dict[str, object] = {}
    exec(compile(block("python"), "FORMAT.md", "exec"), names)
    return names["read"]


def test_the_example_holds_what_the_page_says(example, read, tmp_path):
    tensors = flashpack.load_file(example, verify="always")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == json.loads(block("json"))
    assert flashpack.get_flashpack_file_metadata(example)["metadata"] == {"license": "MIT"}
    flashpack.pack_to_file(tensors, tmp_path / "again", align_bytes=16, metadata={"license": "MIT"})
    assert (tmp_path / "again").read_bytes() == example.read_bytes()
    assert {name: bits(tensor) for name, tensor in tensors.items()} == {
        name: content for name, (_, _, content) in read(example).items()
    }


def test_the_numbers_of_the_example_are_those_in_its_bytes(example):
    content, footer = example.read_bytes(), footer_bytes(example)
    assert f"J = {len(footer):#x} = {len(footer)}, so P = {len(content)} - 16 - {len(footer)} = 40" in PAGE
    digits = f"{crc32c(footer[: footer.rindex(b':') + 2]):08x}"
    assert footer.endswith(f',"footer_crc32c":"{digits}"}}'.encode())
    assert f"`{digits}`" in PAGE
    assert f"`{crc32c(content[:40]):08x}`" in PAGE
    assert f"`123456789` is `{crc32c(b'123456789'):08x}`" in PAGE


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_the_reader_of_the_page_reads_golden_files(path, read):
    expected = flashpack.load_file(path)
    tensors = {
        name: torch.frombuffer(bytearray(content), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
        if content
        else torch.empty(shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape, content) in read(path).items()
    }
    assert list(tensors) == list(expected)
    assert_bit_equal(tensors, expected)


def test_the_table_of_dtypes_has_all_of_them_and_their_sizes(read):
    sizes = {}
    for names, widths in re.findall(r"^\| (`[a-z0-9_` ]+`) \| ([0-9, ]+) \|", PAGE, re.MULTILINE):
        names, widths = re.findall(r"`(.*?)`", names), [int(width) for width in widths.split(", ")]
        sizes |= dict(zip(names, widths if len(widths) > 1 else widths * len(names), strict=True))
    assert (
        sizes
        == {name: _native.element_bytes(name) for name in [*DTYPE_NAMES, "float4_e2m1fn_x2"]}
        == read.__globals__["SIZES"]
    )
