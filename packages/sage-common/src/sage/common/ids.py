"""Generate the random suffix of an id."""

import secrets
import string

_ALPHABET = string.ascii_lowercase + string.digits


def random_suffix() -> str:
    """Return 10 random characters of [a-z0-9], used as the suffix of the ids of tasks, engines and servers."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(10))
