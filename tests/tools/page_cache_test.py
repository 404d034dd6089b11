import os
import tempfile
from pathlib import Path

import page_cache


def test_a_file_is_dropped_and_warmed():
    # Not below /tmp, which may be memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "file"
        path.write_bytes(os.urandom(1 << 20))
        assert page_cache.drop_from_page_cache(path) == page_cache.resident_fraction(path) == 0
        page_cache.warm(path)
        assert page_cache.resident_fraction(path) == 1
        page_cache.make_cold(path)
        assert page_cache.resident_fraction(path) == 0
        page_cache.make_warm(path)
        assert page_cache.resident_fraction(path) == 1
