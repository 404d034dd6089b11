import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import tune_slow
from tune_slow import HELD, NOT_HELD, NOT_RUN, CannotMakeError, Place, Run, Speeds

DEFAULT = {"chunk_bytes": 4 << 20, "queue_depth": 8, "workers": 0, "staging_bytes": 64 << 20, "backend": "auto"}
OTHER = DEFAULT | {"chunk_bytes": 16 << 20, "queue_depth": 2}
SAME = Speeds(0.99, 1.0, 1.01)
FASTER = Speeds(1.08, 1.1, 1.12)
SLOWER = Speeds(0.88, 0.9, 0.92)
NOISY = Speeds(0.7, 0.9, 1.1)


def report(is_default, *speeds):
    cells = [
        DEFAULT | {"gb_per_s": 1.0},
        *(OTHER | {"queue_depth": 2 + i, "gb_per_s": s} for i, s in enumerate(speeds)),
    ]
    return {"default": DEFAULT, "best": DEFAULT if is_default else OTHER, "is_default": is_default, "disk": cells}


def turns(ratio):
    return {state: [(1.0, ratio)] * 9 for state in ("disk", "page_cache")}


def test_a_pick_that_is_slower_in_one_of_both_ways_is_found_and_noise_is_not():
    assert Run(OTHER, True, FASTER, SLOWER).slower
    assert Run(OTHER, True, SLOWER, FASTER).slower
    assert not Run(OTHER, True, SAME, NOISY).slower
    assert not Run(OTHER, False, SLOWER, SLOWER).slower


def test_a_default_beside_something_faster_is_a_miss_unless_that_is_slower_elsewhere():
    assert Run(OTHER, False, FASTER, SAME).missed
    assert not Run(OTHER, False, FASTER, SLOWER).missed
    assert not Run(OTHER, False, SAME, NOISY).missed
    assert not Run(OTHER, True, FASTER, SAME).missed


def test_the_speeds_of_pairs_are_relative_to_the_default():
    speeds = Speeds.of_pairs([(2.0, 1.0), (1.0, 1.0), (1.0, 3.0), (1.0, 2.0), (2.0, 2.0)])
    assert speeds.median == 1
    assert speeds.low < 1 < speeds.high


def test_a_kept_default_is_compared_with_the_fastest_other_setting_of_the_search():
    assert tune_slow.other_setting(report(True, 0.8, 0.9, 0.7))["queue_depth"] == 3
    assert tune_slow.other_setting(report(False, 0.8, 2.0)) == OTHER
    assert tune_slow.other_setting(report(True) | {"page_cache": []}) == DEFAULT


def test_a_partition_is_limited_by_its_disk(tmp_path):
    number = tmp_path.stat().st_dev
    disk = tmp_path / "disks" / "sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (disk / "sda1" / "dev").write_text("8:1\n")
    block = tmp_path / f"{os.major(number)}:{os.minor(number)}"
    with pytest.raises(CannotMakeError, match="is on no disk"):
        tune_slow.disk_of(tmp_path, tmp_path)
    block.symlink_to(disk / "sda1")
    assert tune_slow.disk_of(tmp_path, tmp_path) == "8:1"
    (disk / "sda1" / "partition").write_text("1\n")
    assert tune_slow.disk_of(tmp_path, tmp_path) == "8:0"


@pytest.mark.parametrize(
    ("kind", "options", "controllers", "version"),
    [
        ("cgroup", "rw,blkio", "", 1),
        ("cgroup2", "rw", "cpu io", 2),
        ("cgroup2", "rw", "cpu", 0),
        ("cgroup", "rw", "", 0),
    ],
)
def test_the_controller_of_either_version_is_found(tmp_path, kind, options, controllers, version):
    (tmp_path / "cgroup.controllers").write_text(controllers)
    mounts = tmp_path / "mounts"
    mounts.write_text(f"proc /proc proc rw 0 0\n{kind} {tmp_path} {kind} {options} 0 0\n")
    if version:
        assert tune_slow.io_controller(mounts) == (tmp_path, version)
        return
    with pytest.raises(CannotMakeError, match="no cgroup controller"):
        tune_slow.io_controller(mounts)


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A folder in place of the cgroups; as there, removing a cgroup removes what the kernel has put in it."""
    (tmp_path / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(tune_slow, "disk_of", lambda folder: "8:0")
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["cgroup.subtree_control"]


@pytest.mark.parametrize(
    ("version", "file", "text"),
    [(1, "blkio.throttle.read_iops_device", "8:0 100"), (2, "io.max", "8:0 riops=100")],
)
def test_a_limit_is_set_in_a_cgroup_of_its_own_which_goes_away(cgroups, monkeypatch, version, file, text):
    monkeypatch.setattr(tune_slow, "io_controller", lambda: (cgroups, version))
    with pytest.raises(KeyError), tune_slow.throttled(cgroups, "iops", 100) as place:
        assert place.cgroup.parent == cgroups
        assert (place.cgroup / file).read_text() == text
        assert (cgroups / "cgroup.subtree_control").read_text() == ("+io" if version == 2 else "")
        raise KeyError
    assert (cgroups / "cgroup.subtree_control").read_text() == ("-io" if version == 2 else "")


def loop_devices_of(folder):
    """The files below the folder that loop devices have, because others may use such devices at the same time."""
    if shutil.which("losetup") is None:
        return []
    list_files = ["losetup", "--list", "--noheadings", "--output", "BACK-FILE"]
    files = subprocess.run(list_files, check=True, capture_output=True, text=True).stdout.splitlines()
    return [file for file in files if file.startswith(f"{folder}/")]


def processes_about(folder):
    """The command lines that name the folder."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.append(file.read_bytes())
    return [command for command in commands if bytes(folder) in command]


@pytest.mark.parametrize("name", tune_slow.PLACES)
def test_a_place_can_be_used_and_leaves_nothing_behind(name, tmp_path):
    with ExitStack() as stack:
        try:
            place = stack.enter_context(tune_slow.PLACES[name](tmp_path))
        except (CannotMakeError, OSError, subprocess.CalledProcessError) as error:
            assert loop_devices_of(tmp_path) == []
            pytest.skip(tune_slow.reason_of(error))
        if name.startswith("loop"):
            assert loop_devices_of(tmp_path) == [str(tmp_path / "image")]
        assert place.run(["sh", "-c", 'echo "$(pwd)" >"$0/file"; cat "$0/file"', place.folder])
        (place.folder / "file").unlink()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert processes_about(tmp_path) == []
    assert place.cgroup is None or not place.cgroup.exists()
    assert not (tmp_path / "image").exists()
    assert loop_devices_of(tmp_path) == []


def test_a_place_may_refuse_io_uring_to_what_runs_there(tmp_path):
    script = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.syscall(425, 0, 0); print(ctypes.get_errno())"
    )
    with tune_slow.PLACES["no_io_uring"](tmp_path) as place:
        assert int(place.run([sys.executable, "-c", script])) == errno.EPERM


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """Runs the script on one place, where the tools answer what they are told."""

    def run(answers, *places):
        remaining = iter(answers)

        def answer(self, command):
            text = json.dumps(next(remaining))
            if text == "null":
                raise subprocess.CalledProcessError(1, command, "", "it stayed in the page cache\n")
            return text

        monkeypatch.setattr(Place, "run", answer)
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        monkeypatch.setattr(sys, "argv", ["tune_slow", str(tmp_path), "--runs", "2", "--places", *places])
        status = tune_slow.main()
        assert list(tmp_path.iterdir()) == []
        return status, capsys.readouterr()

    return run


def test_the_summary_counts_and_the_status_says_whether_all_held(run_main):
    picked, kept = report(False, 1.2), report(True, 0.9)
    status, output = run_main([picked, turns(1.2), kept, turns(0.9)], "fast")
    assert status == HELD
    assert "picked 16 MiB x 2, default workers: disk 1.20 (1.20 to 1.20)" in output.out
    assert "fast: picked another setting in 1 of 2, never slower beyond noise in 2 of 2, missed nothing" in output.out
    status, output = run_main([picked, turns(0.9), kept, turns(1.2)], "fast")
    assert status == NOT_HELD
    assert "slower beyond noise in 1 of 2, missed nothing faster in 1 of 2" in output.out


def test_a_place_that_cannot_be_made_is_named_and_the_others_are_measured(run_main, monkeypatch):
    @contextmanager
    def missing(folder):
        raise CannotMakeError("no such thing")
        yield

    monkeypatch.setitem(tune_slow.PLACES, "loop", missing)
    status, output = run_main([report(True, 0.9), turns(1.0)] * 2, "loop", "fast")
    assert status == NOT_RUN
    assert "loop: CANNOT BE MADE HERE: no such thing" in output.out
    assert "fast: picked another setting in 0 of 2" in output.out


def test_a_place_where_a_run_fails_is_named_with_what_was_found_and_the_others_are_measured(run_main):
    picked, kept = report(False, 1.2), report(True, 0.9)
    status, output = run_main([picked, turns(1.2), kept, None, *[kept, turns(1.0)] * 2], "fast", "one_cpu")
    assert status == NOT_RUN
    assert "fast 2: COULD NOT RUN: it stayed in the page cache\n" in output.out
    assert "fast: picked another setting in 1 of 1" in output.out
    assert "one_cpu: picked another setting in 0 of 2" in output.out
    status, output = run_main([picked, turns(0.9), None], "fast")
    assert status == NOT_HELD


@pytest.mark.parametrize("name", ["reads", "loop", "far"])
def test_a_signal_ends_it_and_leaves_nothing_behind(name, tmp_path):
    program, folder = tmp_path / "tune", tmp_path / "folder"
    program.write_text("#!/bin/sh\nkill -TERM $PPID\nexec sleep 600\n")
    program.chmod(0o755)
    folder.mkdir()
    command = [sys.executable, tune_slow.__file__, folder, "--program", program, "--places", name]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = script.communicate()
    if "CANNOT BE MADE" in output:
        pytest.skip(output)
    assert script.returncode == 128 + signal.SIGTERM, errors
    assert list(folder.iterdir()) == []
    assert loop_devices_of(folder) == []
    assert not list(Path("/sys/fs/cgroup").glob(f"**/flashpack_tune_slow.{script.pid}"))
