"""Every rule of tools/tidy.py fires on the smallest tree that breaks it, and a tidy tree passes."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tidy():
    spec = importlib.util.spec_from_file_location("tidy", ROOT / "tools/tidy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tidy"] = module
    spec.loader.exec_module(module)
    return module


tidy = load_tidy()

HEADER = "#pragma once\n"
TIDY_TREE = {
    "README.md": "`engine/plan.cc`, [API](include/flashpack/engine.h)\n```sh\nbuild/release/bench/engine_bench\n```\n",
    "bench/CMakeLists.txt": "add_executable(engine_bench a.cc)\n",
    "engine/plan.cc": '#include "engine/plan.h"\n\nvoid f(int n) {\n  if (n) {\n    n = 0;\n  }\n}\n',
    "engine/plan.h": HEADER + "// Not `using namespace std`, and no printf() either.\n",
    "engine/ground/pages.h": HEADER,
    "include/flashpack/async.h": HEADER + "#include <boost/asio.hpp>\n",
    "include/flashpack/engine.h": HEADER + "#include <vector>\n",
    "include/flashpack/torch.h": HEADER + "#include <ATen/core/Tensor.h>\n",
    "tests/engine/plan_test.cc": '#include "engine/plan.h"\n\n#include <liburing.h>\n',
    "tests/format/layout_test.cc": "",
    "torch_binding/format/layout.cc": '#include "engine/ground/pages.h"\n#include "flashpack/format.h"\n',
}


def rules(tmp_path: Path, **changed: str | None) -> list[str]:
    """What tidy says of the tidy tree with `changed` files (path: content)."""
    for path, content in {**TIDY_TREE, **changed}.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return [str(finding) for finding in tidy.findings(tmp_path)]


def test_a_tidy_tree_has_no_findings(tmp_path):
    assert rules(tmp_path) == []


def long_function(lines: int, head: str = "int f(int n) {") -> str:
    return f"namespace a {{\n{head}\n" + "  n++;\n" * (lines - 2) + "}\n}\n"


BREAKS = {
    "liburing in a public header": ("include/flashpack/engine.h", HEADER + "#include <liburing.h>\n", 2),
    "CUDA in a public header": ("include/flashpack/engine.h", HEADER + "#include <cuda_runtime.h>\n", 2),
    "Boost outside flashpack/async.h": ("include/flashpack/engine.h", HEADER + "#include <boost/asio.hpp>\n", 2),
    "LibTorch outside flashpack/torch.h": ("include/flashpack/engine.h", HEADER + "#include <torch/torch.h>\n", 2),
    "engine/ is private": ("bench/a.cc", '#include "engine/plan.h"\n', 1),
    "engine/ground/ is private": ("torch_binding/python/a.h", HEADER + '#include "engine/ground/pages.h"\n', 2),
    "engine/tuning/ is private": ("torch_binding/python/a.cc", '#include "engine/tuning/profile.h"\n', 1),
    "the ground floor knows nothing": ("engine/ground/pages.h", HEADER + '#include "engine/plan.h"\n', 2),
    "liburing outside the engine": ("tools/a.cc", "#include <liburing.h>\n", 1),
    "Boost in the engine": ("engine/plan.h", HEADER + "#include <boost/json.hpp>\n", 2),
    "LibTorch in the engine": ("engine/plan.h", HEADER + "#include <c10/util/Half.h>\n", 2),
    "CUDA outside": ("engine/plan.h", HEADER + "#include <cuda_runtime.h>\n", 2),
    "the engine knows nothing of formats": ("engine/plan.cc", '#include "torch_binding/format/layout.h"\n', 1),
    "nothing of formats and tensors: flashpack/format.h": ("engine/plan.cc", '#include "flashpack/format.h"\n', 1),
    "only engine.cc and probe.cc choose": ("engine/copier_none.cc", '#include "engine/ring.h"\n', 1),
    "tests/ is for tests": ("bench/a.cc", '#include "tests/support/temp_dir.h"\n', 1),
    "no library includes bench/": ("engine/plan.cc", '#include "bench/support/a.h"\n', 1),
    "the format knows nothing of LibTorch": (
        "torch_binding/format/layout.cc",
        '#include "torch_binding/libtorch/casts.h"\n',
        1,
    ),
    "python/ is above all": ("torch_binding/format/layout.cc", '#include "torch_binding/python/calls.h"\n', 1),
    "torch_binding/c/ is private": ("torch_binding/format/layout.cc", '#include "torch_binding/c/errors.h"\n', 1),
    "the C API knows nothing of LibTorch": ("torch_binding/c/a.cc", '#include "torch_binding/libtorch/casts.h"\n', 1),
    "LibTorch in the C API": ("torch_binding/c/a.cc", "#include <c10/util/Half.h>\n", 1),
    "the C API is above the libraries": ("torch_binding/libtorch/a.cc", '#include "flashpack/flashpack.h"\n', 1),
    "formats and tensors: flashpack/flashpack.h": ("engine/plan.cc", '#include "flashpack/flashpack.h"\n', 1),
    "formats and tensors: flashpack/flashpack_status.h": (
        "engine/plan.cc",
        '#include "flashpack/flashpack_status.h"\n',
        1,
    ),
    "module: torch_binding/libtorch/casts.h": (
        "torch_binding/python/a.cc",
        '#include "torch_binding/libtorch/casts.h"\n',
        1,
    ),
    "a header that is not on a lower floor: engine/file.h": (
        "engine/plan.h",
        HEADER + '#include "engine/ground/pages.h"\n#include "engine/file.h"\n',
        3,
    ),
    "not on a lower floor: engine/pool.h": ("engine/plan.h", HEADER + '#include "engine/pool.h"\n', 2),
    "not on a lower floor: engine/steps.h": ("engine/inbox.cc", '#include "engine/steps.h"\n', 1),
    "without a floor": ("engine/new.h", HEADER, 1),
    "LibTorch in the Python module: torch/torch.h": (
        "torch_binding/python/a.h",
        HEADER + "#include <torch/torch.h>\n",
        2,
    ),
    "LibTorch in the torch-free format": ("torch_binding/format/layout.cc", "#include <ATen/ATen.h>\n", 1),
    "header without #pragma once": ("engine/plan.h", "int a;\n", 1),
    "using namespace in a header": ("engine/plan.h", HEADER + "using namespace std;\n", 2),
    "does not say which threads": ("engine/plan.h", HEADER + "int f();\n", 1),
    "that does not say which threads": ("engine/plan.h", HEADER + "/// Starts threads.\nint f();\n", 1),
    "header that does not say which threads": (
        "engine/plan.h",
        HEADER + "/// The driver thread's name.\nint any_thread();\n",
        1,
    ),
    "owns by hand, and is not listed in tools/tidy.py: new": ("engine/plan.cc", "int* a = new int;\n", 1),
    "owns by hand, and is not listed in tools/tidy.py: delete": ("engine/plan.cc", "void f(int* a) { delete a; }\n", 1),
    "in tools/tidy.py: .release()": ("engine/plan.cc", "std::unique_ptr<int> a;\nint* b = a.release();\n", 2),
    "comment that says why it is shared": ("engine/plan.cc", "using A = std::shared_ptr<int>;\n", 1),
    "without a comment that says why it is shared": (
        "engine/plan.cc",
        "  using A = std::map<int, std::shared_ptr<B>>;\n",
        1,
    ),
    "why it is shared": ("engine/plan.cc", "struct A {\n  // A number.\n  std::shared_ptr<int> a;\n};\n", 3),
    "does not print: printf": ("engine/plan.h", HEADER + 'inline void f() { printf("x"); }  // Any thread.\n', 2),
    "does not print: std::cerr": ("torch_binding/format/layout.cc", "void f() { std::cerr << 1; }\n", 1),
    "does not read the environment": ("engine/plan.h", HEADER + 'auto e = std::getenv("E");  // Any thread.\n', 2),
    "function of 41 lines": ("engine/plan.cc", long_function(41), 2),
    "file of 501 lines": ("tools/a.sh", "true\n" * 501, 501),
    "file of 301 lines": ("README.md", "\n" * 301, 301),
    "unfinished": ("engine/plan.h", HEADER + "// TO" + "DO: later\n", 2),
    "banner comment": ("engine/plan.h", HEADER + "// ---" + "--- plan ------\n", 2),
    "tab": ("engine/plan.h", HEADER + "\tint a;\n", 2),
    "trailing whitespace": ("engine/plan.h", HEADER + "int a; \n", 2),
    "no newline at the end": ("engine/plan.h", HEADER + "int a;", 2),
    "path of one machine": ("README.md", "see /ho" + "me/me/file\n", 1),
    "no test: tests/engine/ring_test.cc": ("engine/ring.cc", "", 1),
    "no test: tests/libtorch/pack_test.cc": ("torch_binding/libtorch/pack.cc", "", 1),
    "no test: tests/tools/a_test.py": ("tools/a.py", "", 1),
    "a file that is not there: engine/gone.cc": ("README.md", "in `engine/gone.cc`\n", 1),
    "a file that is not there: tools/gone.sh": ("README.md", "```sh\nbash tools/gone.sh fast\n```\n", 2),
    "a program that nothing builds": ("README.md", "run `build/release/bench/no_bench`\n", 1),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_the_rule_fires_at_its_line_and_alone(rule, tmp_path):
    path, content, line = BREAKS[rule]
    found = rules(tmp_path, **{path: content})
    # A new source file also lacks its test; that rule has cases of its own.
    found = [f for f in found if "no test" in rule or "no test" not in f]
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:{line}: ") and rule in found[0]


@pytest.mark.parametrize(
    "head",
    [
        "template <class T> int f(T n) {",
        "struct stat f(int n) {",
        "A::A(int n) : a_{n}, b_(n) {",
        "auto f(int n) -> int {",
        "TEST(Plan, CutsOnTheGrid) {",
        'void f(int n) { g("}"); h(\'}\'); k(R"(}})");',
    ],
)
def test_the_length_of_any_kind_of_function_is_seen(head, tmp_path):
    too_long = rules(tmp_path, **{"engine/plan.cc": long_function(41, head)})
    assert [f for f in too_long if "function of 41 lines" in f], too_long
    assert rules(tmp_path, **{"engine/plan.cc": long_function(40, head)}) == []


@pytest.mark.parametrize("head", ["class A {", "struct alignas(64) A : B {", "namespace b {", "enum class E : int {"])
def test_a_scope_may_be_longer_than_a_function(head, tmp_path):
    assert rules(tmp_path, **{"engine/plan.cc": head + "\n" * 100 + "};\n"}) == []


def test_a_type_has_one_definition_in_a_namespace(tmp_path):
    place = "// Any thread.\nnamespace flashpack::internal {\nclass Place;\nstruct Place final : A<int> {};\n}\n"
    nested = (
        "namespace flashpack::internal {\nclass A {\n  struct Place {};\n};\nnamespace {\nenum class Place {};\n}\n}\n"
    )
    elsewhere = "// Any thread.\nnamespace flashpack {\nstruct Place {};\n}\n"
    others = {"engine/plan.cc": nested, "include/flashpack/engine.h": HEADER + elsewhere}
    assert rules(tmp_path, **{"engine/plan.h": HEADER + place, **others}) == []
    found = rules(tmp_path, **{"engine/plan.h": HEADER + place, "engine/ground/pages.h": HEADER + place, **others})
    assert found == ["engine/plan.h:5: flashpack::internal::Place is also defined in engine/ground/pages.h"]


@pytest.mark.parametrize(
    "said",
    [
        "// Any thread.\n#pragma once\nint f();\nstruct A {};\n",
        "#pragma once\n/// Thread safety: as a standard container.\nstruct A {};\n",
        "#pragma once\n/// Only the driver\n/// thread calls it.\nint f();\n",
        "#pragma once\nint f();  ///< Not thread-safe.\n",
        "#pragma once\n/// Requires: the GIL.\nint f();\n",
        "#pragma once\n#define A(x) x\nenum class B { kC };\nconstexpr int kD = 1;\n",
    ],
)
def test_a_header_of_a_library_says_which_threads_may_call_unless_there_is_nothing_to_call(said, tmp_path):
    assert rules(tmp_path, **{"include/flashpack/engine.h": said}) == []
    assert rules(tmp_path, **{"bench/a.h": HEADER + "int f();\n", "include/flashpack/engine.h": said}) == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("engine/plan.cc", "struct A {\n  std::shared_ptr<int> a;  // Shared, because either may end first.\n};\n"),
        (
            "engine/plan.cc",
            "struct A {\n  // Shared with B,\n  // which may end later.\n  std::vector<shared_ptr<int>> a;\n};\n",
        ),
        ("engine/plan.cc", "using A = std::shared_ptr<int>;  // Shared with B.\n"),
        ("engine/plan.cc", "void f(const std::shared_ptr<int>& a) { std::shared_ptr<int> b = a; }\n"),
        ("engine/plan.cc", "// A new one; delete the old.\nstruct A {\n  A(const A&) = delete;\n};\n#include <new>\n"),
        ("engine/ring.cc", "int* a = new int;\n"),
        ("tools/a.cc", "struct A {\n  std::shared_ptr<int> a;\n  int* b = new int;\n};\n"),
    ],
)
def test_libraries_own_by_hand_or_share_only_where_they_say_why(path, code, tmp_path):
    found = rules(tmp_path, **{path: code})
    assert [f for f in found if "no test" not in f] == []


def test_a_python_function_has_fifty_lines_beside_its_docstring(tmp_path):
    docstring = '    """What it\n    does.\n    """\n'
    assert rules(tmp_path, **{"bench/a.py": f"def f():\n{docstring}" + "    pass\n" * 49}) == []
    found = rules(tmp_path, **{"bench/a.py": f"def f():\n{docstring}" + "    pass\n" * 50})
    assert found == ["bench/a.py:1: function of 51 lines (at most 50)"]


def test_a_preprocessor_continuation_does_not_shift_lines(tmp_path):
    found = rules(tmp_path, **{"engine/plan.cc": "#define A(x) \\\n  do { x\n" + long_function(41)})
    assert [f for f in found if f.startswith("engine/plan.cc:4: function of 41")], found


@pytest.mark.skipif(tidy.find_clang_format() is None, reason="no pinned clang-format here")
def test_a_badly_formatted_file_is_one_finding(tmp_path):
    rules(tmp_path, **{".clang-format": "BasedOnStyle: Google\n", "engine/plan.h": HEADER + "int  a ;\n\n\nint  b ;\n"})
    found = [str(f) for f in tidy.findings(tmp_path, tidy.find_clang_format())]
    assert found == ["engine/plan.h:2: not as clang-format writes it"]


def test_the_command_fails_on_findings_and_says_where(tmp_path, capsys):
    rules(tmp_path)
    assert tidy.main([str(tmp_path)]) == 0
    rules(tmp_path, **{"engine/plan.h": ""})
    assert tidy.main([str(tmp_path)]) == 1
    assert "engine/plan.h:1: header without #pragma once" in capsys.readouterr().out
