"""The file system of tools/far_fs.py, mounted."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import tune_slow

try:
    import far_fs
except OSError as error:
    pytest.skip(f"no libfuse3: {error}", allow_module_level=True)


@pytest.fixture
def mounted(tmp_path):
    """The folder behind, and the folder where the file system is."""
    with ExitStack() as stack:
        try:
            place = stack.enter_context(tune_slow.far(tmp_path))
        except tune_slow.CannotMakeError as error:
            pytest.skip(str(error))
        yield tmp_path / "behind", place.folder
    assert not place.folder.is_mount()


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
