"""The file system of tools/far_fs.py, mounted."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

try:
    import far_fs
except OSError as error:
    pytest.skip(f"no libfuse3: {error}", allow_module_level=True)


@pytest.fixture
def mounted(tmp_path):
    """The folder behind, and the folder where the file system is."""
    behind, at = tmp_path / "behind", tmp_path / "at"
    behind.mkdir()
    at.mkdir()
    command = [sys.executable, far_fs.__file__, behind, at, "--mb_per_s", "100000"]
    with (tmp_path / "errors").open("w") as errors:
        server = subprocess.Popen(command, stderr=errors)
    try:
        while not at.is_mount():
            if server.poll() is not None:
                pytest.skip(f"FUSE cannot be mounted here: {(tmp_path / 'errors').read_text()}")
            time.sleep(0.01)
        yield behind, at
    finally:
        server.terminate()
        server.wait()
    assert not at.is_mount()


def test_it_has_the_files_of_the_folder_and_writes_go_there(mounted):
    behind, at = mounted
    content = os.urandom((5 << 20) + 123)
    (at / "new").write_bytes(content)
    assert (behind / "new").read_bytes() == content
    assert (at / "new").read_bytes() == content
    (at / "folder").mkdir()
    (at / "new").rename(at / "folder/moved")
    assert (behind / "folder/moved").stat().st_size == len(content)
    assert os.listdir(at / "folder") == ["moved"]
    os.truncate(at / "folder/moved", 5)
    assert (behind / "folder/moved").read_bytes() == content[:5]
    (at / "folder/moved").unlink()
    (at / "folder").rmdir()
    assert list(behind.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        (at / "new").stat()


def test_each_read_takes_the_time_of_its_bytes(monkeypatch, tmp_path):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    (tmp_path / "file").write_bytes(b"abcdef")
    files = far_fs.FarFiles(Path(tmp_path), 2)
    opened = files.open("/file", os.O_RDONLY)
    assert files.read("/file", 4, 1, opened) == b"bcde"
    assert slept == [2]
    files.release("/file", opened)
