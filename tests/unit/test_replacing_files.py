"""Files that are replaced atomically, also by several threads at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sage.common.files import replace_file


def test_if_threads_replace_one_file_at_the_same_time_the_file_is_complete(tmp_path: Path) -> None:
    contents = [bytes([number]) * 5000 for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(50):
            list(threads.map(lambda content: replace_file(tmp_path / "file", content), contents))
            assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
