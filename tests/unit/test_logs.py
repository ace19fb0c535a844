import asyncio
import os
import random
import threading
from pathlib import Path

import pytest

from sage.common.logs import LogFile, tail_lines
from sage.llm.control_plane.logfile import follow


@pytest.mark.parametrize("count", [0, 1, 3, 100, 10_000, 20_000, 30_000])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_offset_of_a_tail_is_the_start_of_its_first_line(tmp_path: Path, count: int, end: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(b"line %d" % i for i in range(20_000)) + end)
    wanted = path.read_bytes().splitlines(keepends=True)[max(0, 20_000 - count) :]
    assert path.read_bytes()[LogFile(path).tail_offset(count) :] == b"".join(wanted)
    assert tail_lines(path, count) == [line.decode().rstrip() for line in wanted]


def test_only_the_last_state_of_a_progress_bar_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a\r\nLoading:  0%\rLoading: 50%\rLoading: 100%\nready\n\nx\r")
    assert tail_lines(tmp_path / "log", 4) == ["Loading: 100%", "ready", "", "x"]


def test_a_log_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    assert LogFile(tmp_path / "none").tail_offset(5) == 0
    assert LogFile(tmp_path / "none").range() == (0, 0)
    assert tail_lines(tmp_path / "none", 5) == []


def test_offsets_stay_valid_after_a_log_is_cut(tmp_path: Path) -> None:
    log, chance, everything = LogFile(tmp_path / "log"), random.Random(1), b""
    with log.path.open("ab", buffering=0) as writer:  # an engine's process opens its log in the same way
        for number in range(2000):
            line = b"line %d %s\n" % (number, b"x" * chance.randrange(80))
            everything += line
            writer.write(line)
            if number % 50 == 0:
                log.cut(10_000)
            start, end = log.range()
            assert end == len(everything)
            offset = chance.randrange(end)
            assert log.read(offset, 500) == everything[max(start, offset) :][:500]
    assert start > 0
    assert (
        sum(path.stat().st_size for path in tmp_path.iterdir()) <= 25_000
    )  # twice the limit, and the lines since the last cut
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("log.*")} == {0o600}
    assert log.read(0) == everything[start:]
    assert tail_lines(log.path, 150) == everything.decode().splitlines()[-150:]


def test_a_reader_during_a_cut_gets_the_complete_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, seen, replace = LogFile(tmp_path / "log"), list[object](), os.replace
    log.path.write_bytes(b"one\ntwo\nthree\n")

    def look() -> None:
        seen.extend((log.range(), log.read(4), tail_lines(log.path, 2)))

    reader = threading.Thread(target=look)

    def replaced(*paths: Path) -> None:
        reader.start()  # the log is empty, and the file with its tail does not have its final name yet
        reader.join(0.2)
        replace(*paths)

    monkeypatch.setattr(os, "replace", replaced)
    assert log.cut(10)
    reader.join()
    assert seen == [(4, 14), b"two\nthree\n", ["two", "three"]]


def test_a_log_below_the_limit_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 100)
    assert not LogFile(tmp_path / "log").cut(100)
    assert not LogFile(tmp_path / "none").cut(100)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


async def everything_after(path: Path, offset: int) -> bytes:
    async def has_ended() -> bool:
        return True

    return b"".join([chunk async for chunk in follow(path, offset, has_ended)])


@pytest.mark.parametrize("offset", [4, 2**63 - 1, 10**30])
def test_reading_from_an_offset_beyond_the_end_starts_at_the_end(tmp_path: Path, offset: int) -> None:
    (tmp_path / "log").write_bytes(b"one\n")
    assert asyncio.run(everything_after(tmp_path / "log", offset)) == b""


def test_a_follower_skips_the_part_that_was_cut_off(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    for content in (b"first\n", b"second\n", b"third\n"):
        with log.path.open("ab") as file:
            file.write(content)
        log.cut(5)
    assert asyncio.run(everything_after(log.path, 0)) == b"hird\n"


def test_following_a_log_ends_after_the_last_line_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\n")
    asked = 0

    async def has_ended() -> bool:
        nonlocal asked
        asked += 1
        with path.open("a") as log:
            log.write(f"more {asked}\n")  # the process writes a line before each check, and also before its end
        if asked == 2:
            LogFile(path).cut(12)
        return asked >= 3

    async def read() -> bytes:
        seen = b""
        async for chunk in follow(path, 0, has_ended):
            seen += chunk
            if asked >= 4:
                break
        return seen

    assert asyncio.run(read()).startswith(b"one\nmore 1\nmore 2\nmore 3\n")
