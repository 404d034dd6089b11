import os
import tempfile
from pathlib import Path

import page_cache
import pytest
from page_cache import PageCacheError


def is_cached_after(warm, path):
    """Whether the file is in the page cache then. A kernel that is short of memory takes some pages back before they
    are counted, or many, so that one time of several counts.
    """

    def is_cached():
        warm(path)
        return page_cache.resident_fraction(path) >= 0.9

    return any(is_cached() for _ in range(20))


@pytest.fixture
def path():
    # Not below /tmp, which may be memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "file"
        path.write_bytes(os.urandom(1 << 20))
        yield path


def test_a_file_is_dropped_and_warmed(path):
    assert page_cache.drop_from_page_cache(path) == page_cache.resident_fraction(path) == 0
    assert is_cached_after(page_cache.warm, path)
    page_cache.make_cold(path)
    assert page_cache.resident_fraction(path) == 0
    assert is_cached_after(page_cache.make_warm, path)


def test_pages_that_are_busy_for_a_while_are_dropped_in_the_end(path, monkeypatch):
    counted = iter([0.5] * (2 * page_cache.FEW_PASSES) + [0.0])
    monkeypatch.setattr(page_cache, "resident_fraction", lambda path: next(counted))
    assert page_cache.drop_from_page_cache(path) == 0


@pytest.mark.parametrize("left", [0.5, 1.0])
def test_what_stays_is_returned_and_is_an_error_where_the_file_must_be_cold(path, monkeypatch, left):
    monkeypatch.setattr(page_cache, "LONGEST_WAIT_S", 0)
    monkeypatch.setattr(page_cache, "resident_fraction", lambda path: left)
    assert page_cache.drop_from_page_cache(path) == left
    with pytest.raises(PageCacheError, match=f"{left:.0%} of .* stayed in the page cache"):
        page_cache.make_cold(path)


def test_a_file_that_is_taken_back_at_once_is_read_until_it_is_there(path, monkeypatch):
    counted = iter([0.0, 0.5, 0.98, 0.99])
    monkeypatch.setattr(page_cache, "resident_fraction", lambda path: next(counted))
    page_cache.make_warm(path)
    assert list(counted) == []
