"""Share the CPU cores among engines, so that their threads do not wait for each other's cores."""

from collections.abc import Mapping


def share_cores(cores: int, engines: Mapping[str, int | None]) -> dict[str, int]:
    """Return the number of threads of each engine; at least 1 each.

    engines: the number of threads that the user requested, by engine id; None: no request. Requested numbers are kept. The
    other engines get equal shares of the remaining cores, and the first of them get one thread more if the cores do not
    divide evenly. Training and inference engines are treated equally.
    The threads add up to at most `cores`, unless the user requested more or there are more engines than cores.
    """
    requested = {engine: threads for engine, threads in engines.items() if threads is not None}
    others = [engine for engine in engines if engine not in requested]
    share, rest = divmod(max(0, cores - sum(requested.values())), max(1, len(others)))
    shares = {engine: max(1, share + (place < rest)) for place, engine in enumerate(others)}
    return {engine: {**requested, **shares}[engine] for engine in engines}
