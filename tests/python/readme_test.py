"""What the READMEs and the pages beside them say can be run as it stands, and their links lead to files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support import run_python

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / "torch_binding" / "python"
PAGES = [ROOT / "README.md", PYTHON / "README.md", *sorted((PYTHON / "docs").glob("*.md"))]
WITH_EXAMPLES = [page for page in PAGES if "```python" in page.read_text()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def links_in(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)#\s]+)", page.read_text())


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_the_python_examples_of_a_page_run_one_after_the_other(page, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    # In a process of its own, because examples patch other libraries.
    place = f"import os, sys\nsys.path[:] = {sys.path!r}\nos.chdir({str(tmp_path)!r})\n"
    run_python(place + "\n".join(blocks))


def test_the_readmes_and_the_guide_have_examples():
    assert {ROOT / "README.md", PYTHON / "README.md", PYTHON / "docs" / "guide.md"} <= {*WITH_EXAMPLES}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    links = [link for link in links_in(page) if "://" not in link]
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_the_readme_of_the_package_index_has_no_links_into_the_tree():
    assert [link for link in links_in(PYTHON / "README.md") if "://" not in link] == []


def test_the_pages_that_it_names_are_there():
    named = re.findall(r"`(\w+\.md)`", (PYTHON / "README.md").read_text())
    assert "guide.md" in named
    assert [name for name in named if not (PYTHON / "docs" / name).is_file()] == []
