"""Requests for a route are split by weight, and a client stays with one engine."""

from collections import Counter

import pytest

from sage.llm.client.types import RouteTarget
from sage.llm.control_plane.splitting import in_order_of_preference


def targets(**weights: int) -> list[RouteTarget]:
    return [RouteTarget(engine=engine, weight=weight) for engine, weight in weights.items()]


def first(client: str | None, **weights: int) -> str:
    return in_order_of_preference("prod", targets(**weights), client)[0]


@pytest.mark.parametrize("weights", [{"a": 90, "b": 10}, {"a": 1, "b": 1, "c": 2}, {"a": 1, "b": 999}])
@pytest.mark.parametrize("has_client", [True, False])
def test_each_engine_gets_the_share_of_its_weight(weights: dict[str, int], has_client: bool) -> None:
    count = 20_000
    found = Counter(first(f"user-{number}" if has_client else None, **weights) for number in range(count))
    for engine, weight in weights.items():
        share = weight / sum(weights.values())
        sigma = (share * (1 - share) / count) ** 0.5
        assert abs(found[engine] / count - share) < 6 * sigma  # fails by chance once in about 10^9 runs


def test_a_client_stays_with_its_engine_whatever_the_order_of_the_engines() -> None:
    for number in range(100):
        client = f"user-{number}"
        assert {first(client, a=3, b=1), first(client, b=1, a=3)} == {first(client, a=3, b=1)}


def test_each_route_distributes_its_clients_independently() -> None:
    split = targets(a=1, b=1)
    other = Counter(
        in_order_of_preference("test", split, f"u{n}")[0] for n in range(1000) if first(f"u{n}", a=1, b=1) == "a"
    )
    assert 0.3 < other["a"] / other.total() < 0.7


def test_a_changed_weight_moves_only_the_clients_of_the_share_that_changed() -> None:
    clients = [f"user-{number}" for number in range(5000)]
    moved = [client for client in clients if first(client, a=90, b=10) != first(client, a=80, b=20)]
    assert {first(client, a=80, b=20) for client in moved} == {"b"}
    assert abs(len(moved) / len(clients) - 0.1) < 0.03


def test_the_clients_of_an_engine_that_does_not_answer_are_split_among_the_others() -> None:
    orders = [in_order_of_preference("prod", targets(a=8, b=1, c=1), f"user-{number}") for number in range(5000)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    second = Counter(order[1] for order in orders if order[0] == "a")
    assert abs(second["b"] / second.total() - 0.5) < 0.05
