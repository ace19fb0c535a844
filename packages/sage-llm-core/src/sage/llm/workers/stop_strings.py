"""Ending a text at a stop string."""

from collections.abc import Generator, Iterator


def until_stop(pieces: Iterator[str], stops: tuple[str, ...]) -> Generator[str, None, bool]:
    """Yield text up to the first stop string, holding back what may become the beginning of one.

    Returns whether a stop string was met.
    """
    held = ""
    longest = max(map(len, stops), default=0)
    for piece in pieces:
        held += piece
        found = min((at for stop in stops if (at := held.find(stop)) >= 0), default=-1)
        if found >= 0:
            yield held[:found]
            return True
        ready = max(0, len(held) - longest + 1) if longest else len(held)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held
    return False
