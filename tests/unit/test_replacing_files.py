"""Files that are replaced atomically, also by several threads at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sage.common.files import replace_file


def test_threads_that_replace_one_file_at_the_same_time_leave_a_whole_one(tmp_path: Path) -> None:
    contents = [bytes([number]) * 5000 for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(50):
            list(threads.map(lambda content: replace_file(tmp_path / "file", content), contents))
            assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
