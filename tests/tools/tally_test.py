"""The count at the end of tools/test.sh says what happened, whatever broke on the way."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location("tally", ROOT / "tools/tally.py")
tally = importlib.util.module_from_spec(spec)
sys.modules["tally"] = tally
spec.loader.exec_module(tally)


def outcome(folder: Path, capsys, steps: str, **reports: str) -> tuple[int, list[str]]:
    (folder / "steps.tsv").write_text(steps)
    for name, cases in reports.items():
        (folder / f"{name}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    status = tally.main([str(folder)])
    return status, capsys.readouterr().out.splitlines()


PASSED = '<testcase name="good"/>'
FAILED = '<testcase name="bad"><failure message="no"/></testcase>'
BROKEN = '<testcase name="broken"><error message="no"/></testcase>'
SKIPPED = '<testcase name="gone"><skipped message="no GPU"/></testcase>'
CTEST_SKIPPED = '<testcase name="later" status="notrun"><skipped message="SKIP_REGULAR_EXPRESSION_MATCHED"/></testcase>'
CTEST_UNBUILT = '<testcase name="unbuilt" status="notrun"><skipped message="Unable to find executable"/></testcase>'


def test_suites_and_checks_add_up_and_builds_count_nothing(tmp_path, capsys):
    steps = "build\tpackages\t0\nsuite\ta\t0\nsuite\tb\t0\ncheck\ttidy\t0\n"
    status, lines = outcome(tmp_path, capsys, steps, a=PASSED * 2, b=PASSED)
    assert (status, lines) == (0, ["4 passed, 0 failed"])


def test_failures_are_named_above_the_count_and_fail_the_run(tmp_path, capsys):
    status, lines = outcome(tmp_path, capsys, "suite\ta\t8\n", a=PASSED + FAILED + BROKEN)
    assert (status, lines) == (1, ["FAILED   a: bad", "FAILED   a: broken", "1 passed, 2 failed"])


def test_skips_are_counted_and_named_and_do_not_fail_the_run(tmp_path, capsys):
    status, lines = outcome(tmp_path, capsys, "suite\ta\t0\n", a=PASSED + SKIPPED + CTEST_SKIPPED)
    assert (status, lines) == (0, ["skipped  a: gone", "skipped  a: later", "1 passed, 0 failed, 2 skipped"])


def test_a_test_whose_program_is_missing_is_a_failure_and_not_a_skip(tmp_path, capsys):
    status, lines = outcome(tmp_path, capsys, "suite\ta\t8\n", a=PASSED + CTEST_UNBUILT)
    assert (status, lines[-1]) == (1, "1 passed, 1 failed")


def test_a_broken_build_is_a_failure(tmp_path, capsys):
    status, lines = outcome(tmp_path, capsys, "build\tasan-build\t1\nsuite\ta\t0\n", a=PASSED)
    assert (status, lines) == (1, ["FAILED   asan-build: ended with status 1", "1 passed, 1 failed"])


def test_a_runner_that_crashed_after_its_tests_passed_is_a_failure(tmp_path, capsys):
    status, lines = outcome(tmp_path, capsys, "suite\ta\t139\n", a=PASSED)
    assert (status, lines) == (1, ["FAILED   a: ended with status 139", "1 passed, 1 failed"])


def test_a_runner_that_left_no_report_is_a_failure(tmp_path, capsys):
    status, lines = outcome(tmp_path, capsys, "suite\ta\t0\ncheck\ttidy\t0\n")
    assert status == 1 and lines[-1] == "1 passed, 1 failed"


def test_a_run_without_any_test_is_not_a_success(tmp_path, capsys):
    assert outcome(tmp_path, capsys, "build\tpackages\t0\n") == (1, ["0 passed, 0 failed"])
