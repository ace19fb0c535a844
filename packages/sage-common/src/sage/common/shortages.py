"""Recognize errors that are caused by a temporary shortage of file descriptors, processes or memory."""

import errno

_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})


def is_shortage(error: BaseException | None) -> bool:
    """Return whether an error, or an error in its chain of causes, reports a shortage.

    After a shortage, a retry of the failed call can succeed.
    """
    while error:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        error = error.__cause__
    return False
