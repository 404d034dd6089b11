#!/usr/bin/env python3
"""Checks what the compiler and the build cannot: who includes whom, sizes, leftovers, README against the tree.

usage: tools/tidy.py [ROOT]

Prints one line per finding, `file:line: rule`, and exits 1 if there is any. Needs only the standard library; formatting
is checked when the pinned clang-format (tools/requirements.txt) is on PATH or beside the running Python.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cpp_text import cpp_functions, types_in_namespaces, without_comments_and_strings

MAX_FUNCTION_LINES = 40
MAX_TEST_FUNCTION_LINES = 60
# Docstrings do not count.
MAX_PYTHON_FUNCTION_LINES = 50
MAX_FILE_LINES = {"README.md": 300}
MAX_CODE_FILE_LINES = 500
CLANG_FORMAT_MAJOR = 19

CPP = {".h", ".cc", ".c"}
SCRIPTS = {".py", ".pyi", ".sh", ".cmake"}
TEXT = CPP | SCRIPTS | {".md", ".txt", ".toml", ".in", ".json", ".yml", ".yaml", ""}
# Bytes that are compared, never edited.
DATA = ("tests/golden/", "tests/fuzz/corpus/")
IGNORED_DIRS = {"build", "dist", "__pycache__", ".git", ".cache", ".venv"}

# The rooms that a path in the README can name.
ROOMS = ("include/", "engine/", "torch_binding/", "tests/", "bench/", "tools/", ".ci/")

# The floors of the engine, from the ground up. A header and its source include only headers of the engine that are on
# lower floors.
ENGINE_FLOORS = (
    "cuda_handles failure file_system io_queue mounts plan residency staging stripe_sums temp_file thread way",
    "byte_work file handover landing pool ring tracer",
    "copier file_table router work_queue",
    "gate_cuda part workers",
    "open_part transfer_state",
    "gates inbox jobs open_parts profiler_ranges",
    "file_tasks prepare steps",
    "schedule",
    "transfers",
    "pipeline",
    "engine_impl",
)

# Sources that are tested under another name, and where.
TESTED_BY = {
    "tools/cpp_text.py": "tests/tools/tidy_test.py",
    "tools/quickstart.py": "tools/quickstart.sh",
    "tools/sglang_load.py": "tools/sglang_load.sh",
    "tools/vllm_generate.py": "tools/vllm_generate.sh",
    "engine/json/boost_json.cc": "tests/format/footer_test.cc",
    "torch_binding/format/footer_json.cc": "tests/format/footer_test.cc",
    "torch_binding/format/footer_rules.cc": "tests/format/footer_test.cc",
    "torch_binding/format/format_rules.cc": "tests/format/footer_test.cc",
}

# The libraries, and where they may own something by hand, each because of somebody who knows no smart pointer.
LIBRARIES = ("engine/", "include/", "torch_binding/")
OWN_BY_HAND = (
    "engine/cuda_handles.h",  # A handle is forgotten with its context.
    "engine/file_table.h",  # A file counts its users.
    "engine/ground/immortal.h",  # Never destroyed.
    "engine/ground/owner_process.cc",  # In a page that a fork empties.
    "engine/ring.cc",  # The kernel may still write there.
    "include/flashpack/async.h",  # A mutex stays locked over a fork.
    "include/flashpack/detail/owner_process.h",  # A forked child destroys nothing of its parent's.
    "torch_binding/c/",  # C has plain pointers.
    "torch_binding/libtorch/tensors.cc",  # torch has plain pointers with deleters.
    "torch_binding/python/bind_memory.cc",  # In the memory of a Python object.
)


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


@dataclass(frozen=True)
class Source:
    path: str
    text: str

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix

    @property
    def is_cpp(self) -> bool:
        return self.suffix in CPP

    @property
    def is_script(self) -> bool:
        return self.suffix in SCRIPTS or Path(self.path).name == "CMakeLists.txt" or self.path == ".ci/run"

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def code(self) -> str:
        return without_comments_and_strings(self.text)

    @cached_property
    def includes(self) -> list[tuple[int, str]]:
        found = ((n, re.match(r'\s*#\s*include\s*["<]([^">]+)[">]', line)) for n, line in enumerate(self.lines, 1))
        return [(n, m.group(1)) for n, m in found if m]

    def under(self, *folders: str) -> bool:
        return self.path.startswith(folders)

    def search(self, pattern: str, text: str | None = None) -> Iterator[tuple[int, str]]:
        """Every match in `text` (the whole file by default) and its line."""
        text = self.text if text is None else text
        for match in re.finditer(pattern, text, re.MULTILINE):
            yield text.count("\n", 0, match.start()) + 1, match.group()


Tree = dict[str, Source]


def list_files(root: Path) -> list[str]:
    """Tracked and new files; every file where there is no git, as in an unpacked archive."""
    if (root / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(git, check=False, capture_output=True, text=True).stdout
        if listed:
            return [p for p in listed.split("\0") if p and (root / p).is_file()]
    found = []
    for folder, dirs, files in os.walk(root):
        dirs[:] = sorted(set(dirs) - IGNORED_DIRS)
        found += [(Path(folder) / f).relative_to(root).as_posix() for f in sorted(files)]
    return found


def read_tree(root: Path) -> Tree:
    paths = [p for p in list_files(root) if Path(p).suffix in TEXT and not p.startswith(DATA)]
    return {p: Source(p, (root / p).read_text(encoding="utf-8", errors="replace")) for p in paths}


IncludeRule = tuple[str, Callable[[str], bool], Callable[[Source], bool], str]


def _header(*prefixes: str) -> Callable[[str], bool]:
    return lambda included: included.startswith(prefixes)


def _is_cuda(included: str) -> bool:
    return re.match(r"(cuda|cufile|cub/|crt/)", included) is not None


def _nobody(_: Source) -> bool:
    return False


def _only(*paths: str) -> Callable[[Source], bool]:
    return lambda source: source.path.startswith(paths)


def room_rules() -> list[IncludeRule]:
    """The arrows between the rooms: who knows nothing of whom."""
    machines = _header("engine/ring.h", "engine/workers.h", "engine/staging.h")
    machinists = _only("engine/engine.cc", "engine/probe.cc", "engine/ring", "engine/workers", "engine/staging")
    c_api = "flashpack/flashpack"  # Each of its headers begins so.
    names_of_formats = ("checkpoint", "format", "mixin", "name_filter", "torch", "verify")
    formats = _header("torch_binding/", c_api, *(f"flashpack/{name}.h" for name in names_of_formats))
    return [
        ("engine/", formats, _nobody, "the engine knows nothing of formats and tensors"),
        ("engine/", machines, machinists, "only engine.cc and probe.cc choose queues and memory"),
        ("", _header("tests/"), _only("tests/"), "tests/ is for tests"),
        ("", _header("bench/"), _only("bench/", "tests/", "tools/"), "no library includes bench/"),
        ("torch_binding/format/", _header("torch_binding/libtorch/"), _nobody, "the format knows nothing of LibTorch"),
        ("", _header("torch_binding/c/"), _only("torch_binding/c/"), "torch_binding/c/ is private to the C API"),
        ("torch_binding/c/", _header("torch_binding/libtorch/"), _nobody, "the C API knows nothing of LibTorch"),
        ("torch_binding/", _header(c_api), _only("torch_binding/c/"), "the C API is above the libraries"),
        ("torch_binding/", _header("torch_binding/python/"), _only("torch_binding/python/"), "python/ is above all"),
        ("torch_binding/python/", _header("torch_binding/libtorch/"), _nobody, "LibTorch in the Python module"),
    ]


def include_rules() -> list[IncludeRule]:
    """(who, which headers, who may, finding): headers that only some rooms may include."""
    is_torch = _header("torch/", "ATen/", "c10/")

    def speaks_cuda(source: Source) -> bool:
        return "cuda" in Path(source.path).name

    torch_headers = _only("include/flashpack/torch.h", "include/flashpack/mixin.h")
    timed_alone = ("bench/support/engine_parts.cc", "bench/support/instant_pipeline.cc")
    engine_rooms = _only("engine/", "tests/engine/", "tests/support/", *timed_alone)
    libraries = ("engine/", "torch_binding/c/", "torch_binding/format/", "torch_binding/libtorch/")
    ground_users = _only(*libraries, "bench/", "tools/", "tests/")
    profile_users = _only("engine/tuning/", "tools/", "tests/c/", "tests/engine/", "tests/tools/")

    def is_above_ground(included: str) -> bool:
        return included.startswith("engine/") and not included.startswith(("engine/ground/", "engine/tuning/"))

    return [
        ("include/", _header("liburing"), _nobody, "liburing in a public header"),
        ("", _header("isa-l"), _only("engine/stripe_sums"), "ISA-L outside of engine/stripe_sums"),
        ("include/", _is_cuda, _nobody, "CUDA in a public header"),
        ("include/", _header("boost/"), _only("include/flashpack/async.h"), "Boost outside flashpack/async.h"),
        ("include/", is_torch, torch_headers, "LibTorch outside flashpack/torch.h and mixin.h"),
        ("engine/ground/", is_above_ground, _nobody, "the ground floor knows nothing above it"),
        ("", is_above_ground, engine_rooms, "engine/ is private to the engine"),
        ("", _header("engine/ground/"), ground_users, "engine/ground/ is private to the libraries, bench and tools"),
        ("", _header("liburing"), _only("engine/", "tests/engine/", "bench/"), "liburing outside the engine"),
        ("", _header("engine/tuning/"), profile_users, "engine/tuning/ is private to profiles and the tools"),
        ("engine/", _header("boost/"), _only("engine/json/", "engine/tuning/"), "Boost in the engine"),
        ("engine/", is_torch, _nobody, "LibTorch in the engine"),
        ("engine/", _is_cuda, speaks_cuda, "CUDA outside *_cuda and cuda_handles"),
        ("torch_binding/python/", is_torch, _nobody, "LibTorch in the Python module"),
        ("torch_binding/c/", is_torch, _nobody, "LibTorch in the C API"),
        ("torch_binding/format/", is_torch, _nobody, "LibTorch in the torch-free format"),
    ]


def check_includes(tree: Tree) -> Iterator[Finding]:
    rules = include_rules() + room_rules()
    for source in filter(lambda s: s.is_cpp, tree.values()):
        for line, included in source.includes:
            broken = [
                text for who, what, may, text in rules if source.under(who) and what(included) and not may(source)
            ]
            # One include is one finding, however many rules it breaks.
            yield from (Finding(source.path, line, f"{text}: {included}") for text in broken[:1])


def check_engine_floors(tree: Tree) -> Iterator[Finding]:
    floor_of = {f"engine/{name}.h": floor for floor, names in enumerate(ENGINE_FLOORS) for name in names.split()}
    for source in tree.values():
        if not re.fullmatch(r"engine/\w+\.(h|cc)", source.path):
            continue
        header = re.sub(r"\.cc$", ".h", source.path)
        if header not in floor_of:
            if source.path == header:
                yield Finding(source.path, 1, "header of the engine without a floor in tools/tidy.py")
            continue
        for line, included in source.includes:
            if included != header and floor_of.get(included, -1) >= floor_of[header]:
                yield Finding(source.path, line, f"includes a header that is not on a lower floor: {included}")


def check_one_definition(tree: Tree) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for source in sorted(tree.values(), key=lambda s: s.path):
        if source.is_cpp and source.under("engine/", "include/", "torch_binding/"):
            for line, name in types_in_namespaces(source.code):
                if name in first:
                    yield Finding(source.path, line, f"{name} is also defined in {first[name]}")
                first.setdefault(name, source.path)


def check_headers(tree: Tree) -> Iterator[Finding]:
    for source in tree.values():
        if source.suffix == ".h":
            if not re.search(r"^#pragma once$", source.text, re.MULTILINE):
                yield Finding(source.path, 1, "header without #pragma once")
            for line, _ in source.search(r"^\s*using\s+namespace\b", source.code):
                yield Finding(source.path, line, "using namespace in a header")


def check_threads(tree: Tree) -> Iterator[Finding]:
    rule = r"(?i)\bthread[- ]safe|\b(?:any|one|driver) thread\b(?!')|\bGIL\b"
    for source in tree.values():
        code = re.sub(r"^\s*#.*", "", source.code, flags=re.MULTILINE)
        declares = source.suffix == ".h" and re.search(r"(?<!enum )\b(?:class|struct)\s+\w|\w\(", code)
        comments = " ".join(re.findall(r"//[/<]* ?(.*)", source.text))
        if declares and source.under(*LIBRARIES) and not re.search(rule, comments):
            yield Finding(source.path, 1, "header that does not say which threads may call")


def check_owners(tree: Tree) -> Iterator[Finding]:
    by_hand = r"\bnew\b(?!>)|(?<!= )\bdelete\b|\.release\(\)"
    for source in tree.values():
        if source.is_cpp and source.under(*LIBRARIES) and not source.under(*OWN_BY_HAND):
            for line, what in source.search(by_hand, source.code):
                yield Finding(source.path, line, f"owns by hand, and is not listed in tools/tidy.py: {what}")


def check_sharing(tree: Tree) -> Iterator[Finding]:
    member_or_alias = r"(?:\s*using\s+\w+\s*=)?[^=()]*\bshared_ptr<[^=()]*;"
    for source in tree.values():
        comments = ""  # On the line, and on those before it that are nothing but comments.
        for number, line in enumerate(source.lines if source.is_cpp and source.under(*LIBRARIES) else [], 1):
            code, _, comment = line.partition("//")
            comments += comment
            if re.match(member_or_alias, code) and not re.search(r"\b[Ss]hared\b", comments):
                yield Finding(source.path, number, "shared_ptr without a comment that says why it is shared")
            comments = comments if not code.strip() and comment else ""


def check_library_manners(tree: Tree) -> Iterator[Finding]:
    printing = r"\b(?:v?f?printf|f?puts|putchar|perror)\s*\(|\bstd::(?:cout|cerr|clog)\b"
    for source in tree.values():
        library = source.under("engine/", "include/", "torch_binding/") and not source.under("torch_binding/python/")
        if source.is_cpp and library:
            for line, what in source.search(printing, source.code):
                yield Finding(source.path, line, f"a library does not print: {what.strip('( ')}")
            # The profiles of the user are where the environment says, and are read only for a caller who asks.
            environment = "" if source.path == "engine/tuning/tuning.cc" else source.code
            for line, _ in source.search(r"\b(?:secure_)?getenv\b", environment):
                yield Finding(source.path, line, "a library does not read the environment")


def python_functions(text: str) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            docstring_lines = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
            yield node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines


def functions(source: Source) -> Iterator[tuple[int, int]]:
    if source.is_cpp:
        yield from cpp_functions(source.code)
    elif source.suffix == ".py":
        yield from python_functions(source.text)


def check_lengths(tree: Tree) -> Iterator[Finding]:
    for source in tree.values():
        code = source.is_cpp or source.is_script
        limit = MAX_FILE_LINES.get(source.path, MAX_CODE_FILE_LINES if code else sys.maxsize)
        lines = len(source.text.splitlines())
        if lines > limit:
            yield Finding(source.path, limit + 1, f"file of {lines} lines (at most {limit})")
        longest = MAX_TEST_FUNCTION_LINES if source.under("tests/") else MAX_FUNCTION_LINES
        longest = MAX_PYTHON_FUNCTION_LINES if source.suffix == ".py" else longest
        for line, length in functions(source):
            if length > longest:
                yield Finding(source.path, line, f"function of {length} lines (at most {longest})")


def check_leftovers(tree: Tree) -> Iterator[Finding]:
    # Written so that this file does not match itself.
    unfinished = r"\b(?:TO[D]O|FIX[M]E|XX[X]|HAC[K])\b"
    banner = r"^\s*(?://|/\*|#)+\s*([-=*#~_+/])\1{3,}.*$"
    for source in tree.values():
        if source.is_cpp or source.is_script:
            yield from (Finding(source.path, line, f"unfinished: {what}") for line, what in source.search(unfinished))
            yield from (Finding(source.path, line, "banner comment") for line, _ in source.search(banner))
        yield from (Finding(source.path, line, "tab") for line, _ in source.search(r"^.*\t"))
        yield from (Finding(source.path, line, "trailing whitespace") for line, _ in source.search(r"[ \t\r]+$"))
        if source.text and not source.text.endswith("\n"):
            yield Finding(source.path, len(source.lines), "no newline at the end of the file")


def check_machine_paths(tree: Tree) -> Iterator[Finding]:
    for source in tree.values():
        places = "work|home|root|opt" if source.under("tests/") else "work|home|root|opt|tmp"
        for line, what in source.search(rf"(?<![\w.$}}/-])/(?:{places})/[\w.]+"):
            yield Finding(source.path, line, f"path of one machine: {what}")


def check_tests_mirror(tree: Tree) -> Iterator[Finding]:
    for path in tree:
        stem = Path(path).stem
        if path.startswith("engine/") and path.endswith(".cc"):
            wanted = [f"tests/engine/{stem}_test.cc"]
        elif room := re.fullmatch(r"torch_binding/(format|libtorch)/\w+\.cc", path):
            wanted = [f"tests/{room[1]}/{stem}_test.cc"]
        elif re.fullmatch(r"tools/\w+\.py", path):
            wanted = [f"tests/tools/{stem}_test.py"]
        else:
            continue
        wanted = [TESTED_BY[path]] if path in TESTED_BY else wanted
        if not any(w in tree for w in wanted):
            yield Finding(path, 1, f"no test: {' or '.join(wanted)}")


def _named_paths(readme: Source) -> Iterator[tuple[int, str]]:
    """Paths of the tree that the README names: in links, in backticks, and in fenced commands."""
    quoted = r"`([^`\n]+)`|\]\(([^)#\s]+)[^)]*\)"
    fenced = False
    for number, line in enumerate(readme.lines, 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        texts = [line] if fenced else [a or b for a, b in re.findall(quoted, line)]
        for word in (w for text in texts for w in re.split(r"[\s=,;()\"']+", text)):
            yield number, word.removeprefix("./").rstrip(".:")


def check_readme(tree: Tree, root: Path) -> Iterator[Finding]:
    readme = tree.get("README.md")
    if readme is None:
        return
    cmake = "\n".join(s.text for s in tree.values() if s.path.endswith("CMakeLists.txt"))
    for line, word in _named_paths(readme):
        built = re.match(r"build/[\w-]+/(?:[\w-]+/)*([\w.-]+)$", word)
        if built and not re.search(rf"\b{re.escape(built.group(1))}\b", cmake):
            yield Finding(readme.path, line, f"names a program that nothing builds: {word}")
        # A pattern such as tests/*_test.cc is held if it matches anything; {a,b} is left to the reader.
        if word.startswith(ROOMS) and "{" not in word and not any(root.glob(word)):
            yield Finding(readme.path, line, f"names a file that is not there: {word}")


def find_clang_format() -> str | None:
    beside = Path(sys.executable).with_name("clang-format")
    for candidate in (str(beside), f"clang-format-{CLANG_FORMAT_MAJOR}", "clang-format"):
        binary = shutil.which(candidate)
        if binary:
            version = subprocess.run([binary, "--version"], check=False, capture_output=True, text=True).stdout
            if f"version {CLANG_FORMAT_MAJOR}." in version:
                return binary
    return None


def check_format(tree: Tree, root: Path, clang_format: str) -> Iterator[Finding]:
    files = [s.path for s in tree.values() if s.is_cpp]
    jobs = os.cpu_count() or 1
    batches = [batch for i in range(jobs) if (batch := files[i::jobs])]

    def run(batch: list[str]) -> str:
        command = [clang_format, "--dry-run", "--style=file", *batch]
        return subprocess.run(command, check=False, cwd=root, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(jobs) as pool:
        output = "\n".join(pool.map(run, batches))
    found = re.findall(r"^(\S+?):(\d+):\d+: warning: code should be clang-formatted", output, re.MULTILINE)
    # One per file: `clang-format -i FILE` mends all of them.
    first = {path: int(line) for path, line in reversed(found)}
    yield from (Finding(path, line, "not as clang-format writes it") for path, line in first.items())


CHECKS = (
    check_includes,
    check_engine_floors,
    check_one_definition,
    check_headers,
    check_threads,
    check_owners,
    check_sharing,
    check_library_manners,
    check_lengths,
    check_leftovers,
    check_machine_paths,
    check_tests_mirror,
)


def findings(root: Path, clang_format: str | None = None) -> list[Finding]:
    tree = read_tree(root)
    found = [finding for check in CHECKS for finding in check(tree)]
    found += check_readme(tree, root)
    if clang_format:
        found += check_format(tree, root, clang_format)
    return sorted(found, key=lambda f: (f.path, f.line, f.rule))


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0 if len(arguments) == 1 else 2
    root = Path(arguments[0] if arguments else __file__).resolve()
    root = root if arguments else root.parent.parent
    clang_format = find_clang_format()
    found = findings(root, clang_format)
    for finding in found:
        print(finding)
    if not clang_format:
        print(f"tidy: 1 skipped: formatting (no clang-format {CLANG_FORMAT_MAJOR})")
    print(f"tidy: {len(found)} finding{'' if len(found) == 1 else 's'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
