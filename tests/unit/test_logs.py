import asyncio
from pathlib import Path

import pytest

from sage.common.logs import tail_lines
from sage.llm.control_plane.logfile import follow, tail_offset


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_a_tail_begins_at_its_first_line(tmp_path: Path, count: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(20_000)))
    wanted = path.read_bytes().splitlines(keepends=True)[20_000 - count :]
    assert path.read_bytes()[tail_offset(path, count) :] == b"".join(wanted)
    assert tail_lines(path, count) == [line.decode().rstrip() for line in wanted]


def test_a_log_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert tail_offset(tmp_path / "none", 5) == 0
    assert tail_lines(tmp_path / "none", 5) == []


def test_following_ends_after_the_last_word(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\n")
    asked = 0

    async def has_ended() -> bool:
        nonlocal asked
        asked += 1
        with path.open("a") as log:
            log.write(f"more {asked}\n")  # it says more until it ends, and once more as it ends
        return asked >= 3

    async def read() -> bytes:
        seen = b""
        async for chunk in follow(path, 0, has_ended):
            seen += chunk
            if asked >= 4:
                break
        return seen

    assert asyncio.run(read()).startswith(b"one\nmore 1\nmore 2\nmore 3\n")
