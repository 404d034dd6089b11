import json
import math
import os
import re
import shutil
import stat
import subprocess

import bench_gate
import pytest
from bench_gate import BELOW, NOT_RUN, PASSED, ROOT, bounds_of, compare, exit_code, rows_of

ROW = "load/cold/touched_memory"
GATE = {
    "size_gib": 1,
    "rounds": 3,
    "tolerance": {"least": 0.1, "most": 0.5},
    "rows": {ROW: {"least": {"of_roof": 1.0}, "most": {"cpu_s/GB": 0.02}}},
}


def report(**figures):
    row = {"name": f"{ROW}/iterations:3/manual_time", "of_roof": 1.0, "cpu_s/GB": 0.01, "roof_GB/s": 2.0}
    return json.dumps({"context": {}, "benchmarks": [row | figures]})


def results_of(text, gate=GATE):
    return compare(rows_of(text), bounds_of(gate))


def test_rows_within_the_tolerance_pass():
    assert exit_code(results_of(report(of_roof=0.91, **{"cpu_s/GB": 0.029}))) == PASSED


@pytest.mark.parametrize("figures", [{"of_roof": 0.89}, {"cpu_s/GB": 0.031}])
def test_a_figure_beyond_the_tolerance_fails_and_is_named(figures):
    results = results_of(report(**figures))
    assert exit_code(results) == BELOW
    (missed,) = [result for result in results if result.missed]
    assert {missed.bound.figure: missed.figure} == figures
    text = bench_gate.table(results, {ROW})
    assert f"{next(iter(figures.values())):.3f}" in text
    assert "MISSED, measured twice" in text


def test_a_row_may_have_a_tolerance_of_its_own():
    gate = GATE | {"rows": {ROW: {"least": {"of_roof": 1.0}, "tolerance": 0.3}}}
    assert exit_code(results_of(report(of_roof=0.71), gate)) == PASSED
    assert exit_code(results_of(report(of_roof=0.69), gate)) == BELOW


def test_a_row_may_have_a_tolerance_of_its_own_for_what_it_has_to_reach_alone():
    gate = GATE | {"rows": {ROW: GATE["rows"][ROW] | {"tolerance": {"least": 0.3}}}}
    assert exit_code(results_of(report(of_roof=0.71, **{"cpu_s/GB": 0.029}), gate)) == PASSED
    assert exit_code(results_of(report(of_roof=0.69), gate)) == BELOW
    assert exit_code(results_of(report(**{"cpu_s/GB": 0.031}), gate)) == BELOW


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"name": "load/other/iterations:3/manual_time"}, "no such row"),
        ({"roof_GB/s": 0.0, "of_roof": math.inf}, "roofline is 0.0"),
        ({"roof_GB/s": math.nan}, "roofline is nan"),
        ({"roof_GB/s": math.inf}, "roofline is inf"),
        ({"of_roof": math.nan, "cpu_s/GB": math.inf}, "is nan"),
        ({"of_roof": None, "cpu_s/GB": "much"}, "is None"),
        ({"error_occurred": True, "error_message": "wrong bytes in a"}, "wrong bytes in a"),
    ],
)
def test_what_was_not_measured_does_not_pass(figures, says):
    results = results_of(report(**figures))
    assert exit_code(results) == NOT_RUN
    assert says in results[0].verdict


def test_a_row_that_is_below_outweighs_one_that_was_not_measured():
    gate = GATE | {"rows": GATE["rows"] | {"load/other": {"least": {"of_roof": 1.0}}}}
    assert exit_code(results_of(report(of_roof=0.5), gate)) == BELOW


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"benchmarks": [{}]}', '{"benchmarks": [1]}', report()[:-9]])
def test_a_damaged_report_is_an_error(text):
    with pytest.raises(ValueError, match="not a report"):
        rows_of(text)


@pytest.fixture
def gate_program(tmp_path, monkeypatch, capsys):
    """Runs the gate on a program that writes the reports one after the other; returns its exit code and output."""

    def run(*reports, gate=None):
        for number, text in enumerate(reports):
            (tmp_path / f"report.{number}").write_text(text)
        program = tmp_path / "program"
        program.write_text(
            "#!/bin/bash\n"
            "for word; do case $word in --benchmark_out=*) out=${word#*=} ;; esac; done\n"
            f"cd {tmp_path}; ls run.* >names 2>/dev/null; number=$(wc -l <names); touch run.$number\n"
            'cp report.$number "$out"\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        (tmp_path / "gate.json").write_text(gate or json.dumps(GATE))
        command = ["bench_gate", str(tmp_path), "--gate", str(tmp_path / "gate.json"), "--program", str(program)]
        monkeypatch.setattr("sys.argv", command)
        return bench_gate.main(), capsys.readouterr()

    return run


def test_a_row_that_misses_once_is_measured_again(gate_program):
    code, output = gate_program(report(of_roof=0.5), report(of_roof=1.0))
    assert code == PASSED
    assert "measured twice" in output.out


def test_a_row_that_misses_twice_fails_with_its_name(gate_program):
    code, output = gate_program(report(of_roof=0.5), report(of_roof=0.6))
    assert code == BELOW
    assert f"{ROW}: of_roof is 0.600, below 0.900" in output.err
    assert "0.600" in output.out


def test_figures_of_a_row_that_miss_once_each_hold(gate_program):
    code, _ = gate_program(report(of_roof=0.5), report(**{"cpu_s/GB": 1.0}))
    assert code == PASSED


def test_a_miss_stays_one_when_the_row_cannot_be_measured_again(gate_program):
    code, output = gate_program(report(of_roof=0.5), report(error_occurred=True))
    assert code == BELOW
    assert "of_roof is 0.500" in output.err


def test_a_row_that_holds_is_measured_once(gate_program):
    assert gate_program(report())[0] == PASSED


def test_a_program_that_fails_is_told_from_a_row_that_is_below(gate_program):
    assert gate_program()[0] == NOT_RUN
    assert gate_program("{")[0] == NOT_RUN
    assert gate_program(report(), gate='{"rows": 1}')[0] == NOT_RUN


def write_program(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of what the script needs, with a program that fails and a stand-in for CMake that makes one that works."""
    for name in ("tools/bench_gate.sh", "tools/lib.sh", "bench/bench_gate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bench" / "gate.json").write_text(json.dumps(GATE))
    (tmp_path / "report").write_text(report())
    built = tmp_path / "build" / "release" / "bench" / "engine_bench"
    built.parent.mkdir(parents=True)
    (tmp_path / "build" / "release" / "CMakeCache.txt").touch()
    write_program(built, "exit 1")
    works = f'for word; do case $word in --benchmark_out=*) cp {tmp_path}/report "${{word#*=}}" ;; esac; done'
    write_program(tmp_path / "works", works)
    write_program(tmp_path / "cmake", f'[[ $* == "--build "*" --target engine_bench" ]] && cp {tmp_path}/works {built}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def gate_of(tree, *arguments):
    command = ["bash", str(tree / "tools" / "bench_gate.sh"), str(tree), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_script_builds_the_program_that_it_measures(tree):
    done = gate_of(tree)
    assert done.returncode == PASSED, done.stderr


def test_a_program_that_cannot_be_built_is_not_measured(tree):
    assert gate_of(tree).returncode == PASSED
    write_program(tree / "cmake", "exit 1")
    assert gate_of(tree).returncode == NOT_RUN
    (tree / "build" / "release" / "CMakeCache.txt").unlink()
    done = gate_of(tree)
    assert (done.returncode, "there is no release build" in done.stderr) == (NOT_RUN, True)


def test_a_program_that_is_named_is_measured_as_it_is(tree):
    write_program(tree / "cmake", "exit 1")
    assert gate_of(tree, "--program", str(tree / "works")).returncode == PASSED


def composed_rows():
    """The rows of loads that are outstanding at once, which completion_rows.cc names by its tables."""
    source = (ROOT / "bench" / "completion_rows.cc").read_text()
    sizes = re.findall(r'Size\{"(\w+)"', source)
    forms = re.findall(r'\{"(\w+)", \w+\}', source)
    assert '"load/cold" : "load/page_cache") + "/forms/" + size.name + "/" + name' in source
    return [f"load/{cache}/forms/{size}/{form}" for cache in ("cold", "page_cache") for size in sizes for form in forms]


def test_the_gate_of_this_tree_has_bounds():
    bounds = bounds_of(json.loads((ROOT / "bench" / "gate.json").read_text()))
    assert len({bound.row for bound in bounds}) >= 5
    source = "".join(path.read_text() for path in (ROOT / "bench").glob("*.cc"))
    composed = composed_rows()
    assert [bound.row for bound in bounds if f'"{bound.row}"' not in source and bound.row not in composed] == []
