"""Distribute the requests for a route over the engines of the route, in proportion to the engines' weights."""

import hashlib
import math
import secrets
from collections.abc import Sequence

from sage.llm.client.types import RouteTarget


def in_order_of_preference(route: str, targets: Sequence[RouteTarget], client: str | None) -> list[str]:
    """Return the engines of a route in order of preference. A request is sent to the first engine that answers.

    client: identifies the sender of the request. A client always gets the same order. For None, the order is random.
    If the weights change or an engine does not answer, as few clients as possible get another engine.
    Source: weighted rendezvous hashing, Schindelhauer and Schomaker 2005, "Weighted distributed hash tables".
    """
    if len(targets) == 1:
        return [targets[0].engine]
    key = secrets.token_bytes(16) if client is None else hashlib.blake2b(f"{route}\0{client}".encode()).digest()
    return [target.engine for target in sorted(targets, key=lambda target: _distance(key, target))]


def _distance(key: bytes, target: RouteTarget) -> float:
    """Return a sample of the exponential distribution with rate `weight`.

    The probability that a target has the smallest sample is the target's weight divided by the sum of all weights.
    """
    digest = hashlib.blake2b(target.engine.encode(), key=key, digest_size=8).digest()
    uniform = ((int.from_bytes(digest) >> 12) + 0.5) / 2**52  # above 0 and below 1
    return -math.log(uniform) / target.weight
