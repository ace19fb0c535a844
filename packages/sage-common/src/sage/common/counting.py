"""Write counts with nouns."""


def counted(count: int, noun: str) -> str:
    """Return a count with a regular noun in the right number, for example `1 fault` or `2 faults`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
