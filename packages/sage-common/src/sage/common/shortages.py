"""Recognize errors that a temporary shortage of file descriptors, processes or memory causes."""

import errno

_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})


def is_shortage(error: BaseException | None) -> bool:
    """Return whether a shortage caused an error, or one of the causes of the error. The failed call can succeed later."""
    while error:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        error = error.__cause__
    return False
