"""Limit the nesting of JSON values."""

from typing import Any

#: Maximum number of levels of lists and objects in the body of a request.
MAX_LEVELS = 100


def is_too_deep(content: Any) -> bool:
    """Return whether a parsed JSON value has more than `MAX_LEVELS` levels of lists and objects."""
    level = [content]
    for _ in range(MAX_LEVELS):
        level = [
            child
            for parent in level if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent) if isinstance(child, (dict, list))
        ]  # fmt: skip
        if not level:
            return False
    return True
