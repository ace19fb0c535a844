"""How the CPU cores are shared among engines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.llm.control_plane.cores import share_cores


@pytest.mark.parametrize(
    ("cores", "requested", "expected"),
    [
        (8, [], []),
        (8, [None], [8]),
        (8, [None, None], [4, 4]),
        (8, [None, None, None], [3, 3, 2]),
        (8, [2, None], [2, 6]),
        (8, [None, 3, None], [3, 3, 2]),
        (8, [8, None], [8, 1]),
        (8, [16], [16]),
        (2, [None, None, None], [1, 1, 1]),
        (2, [4, None, None], [4, 1, 1]),
        (1, [None], [1]),
    ],
)
def test_engines_share_the_cores_equally_and_keep_the_threads_that_a_user_requested(
    cores: int, requested: list[int | None], expected: list[int]
) -> None:
    engines = {f"engine-{number}": threads for number, threads in enumerate(requested)}
    assert list(share_cores(cores, engines).values()) == expected


@given(st.integers(1, 256), st.lists(st.none() | st.integers(1, 64), max_size=40))
def test_the_threads_add_up_to_the_cores_if_there_are_enough_cores(cores: int, requested: list[int | None]) -> None:
    engines = {f"engine-{number}": threads for number, threads in enumerate(requested)}
    shared = share_cores(cores, engines)
    assert all(shared[engine] == threads for engine, threads in engines.items() if threads)
    assert all(threads >= 1 for threads in shared.values())
    least = sum(threads or 1 for threads in requested)
    if least <= cores:
        expected = cores if None in requested else least
        assert sum(shared.values()) == expected
