"""Interpreters that end while daemon threads use flashpack."""

from __future__ import annotations

import os
import subprocess
import sys

import flashpack
import pytest
import torch

# Threads go on in a loop, so that at the end of the main thread each is somewhere in the call or, rarely, between two.
DAEMONS = """
import os, sys, threading
import torch, flashpack
from flashpack.mixin import FlashPackMixin

path, folder, call = sys.argv[1:]
# What torch's operations do in threads of its own making is not at issue.
big = {"a": torch.zeros(16 << 20, dtype=torch.uint8), "b": torch.zeros(4 << 20)}
model = torch.nn.Linear(1 << 10, 1 << 10)
rounds = threading.Semaphore(0)
loaded = []

def work(number):
    while True:
        rounds.release()
        if call == "pack":
            flashpack.pack_to_file(big, f"{folder}/{number}.flashpack")
        elif call == "cast":
            flashpack.pack_to_file(big, f"{folder}/{number}.flashpack", target_dtype=torch.float16)
        elif call == "load":
            # torch may abort if the last reference to a tensor goes in a daemon thread while the interpreter ends.
            loaded.append(flashpack.load_file(path))
        elif call == "verify":
            flashpack.verify_file(path)
        else:
            flashpack.get_flashpack_file_metadata(path)

for number in range(3):
    threading.Thread(target=work, args=(number,), daemon=True).start()
for _ in range(3 * 4):
    rounds.acquire()
"""


@pytest.mark.parametrize("call", ["pack", "cast", "load", "verify", "metadata"])
def test_daemon_threads_end_with_the_interpreter_without_a_word_and_leave_nothing_half_done(call, tmp_path, pack):
    path = pack({"a": torch.zeros(64 << 20, dtype=torch.uint8)})
    folder = tmp_path / "folder"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", DAEMONS, path, folder, call], check=False, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert set(os.listdir(folder)) <= {f"{number}.flashpack" for number in range(3)}
    assert all(flashpack.is_flashpack_file(folder / name) for name in os.listdir(folder))


SAVES_AT_EXIT = """
import atexit, sys
atexit.register(lambda: flashpack.pack_to_file(net, sys.argv[1]))
import torch, flashpack
net = torch.nn.Linear(3, 3)
"""


def test_what_the_main_thread_does_in_its_last_moments_is_done(tmp_path):
    path = tmp_path / "a.flashpack"
    subprocess.run([sys.executable, "-c", SAVES_AT_EXIT, path], check=True, timeout=120)
    flashpack.assign_from_file(torch.nn.Linear(3, 3), path)


FORKS_DURING_A_LOAD = """
import os, sys, threading
import flashpack

loading, forked = threading.Event(), threading.Event()

def hold(done_bytes, total_bytes):
    loading.set()
    forked.wait()

thread = threading.Thread(target=flashpack.load_file, args=(sys.argv[1],), kwargs={"progress": hold})
thread.start()
loading.wait()
pid = os.fork()
if pid == 0:
    sys.exit()
status = os.waitpid(pid, 0)[1]
forked.set()
thread.join()
assert os.waitstatus_to_exitcode(status) == 0
"""


def test_a_child_that_is_forked_while_another_thread_loads_does_not_wait_for_it_when_it_ends(pack):
    path = pack({"a": torch.zeros(1 << 20)})
    subprocess.run([sys.executable, "-c", FORKS_DURING_A_LOAD, path], check=True, timeout=120)
