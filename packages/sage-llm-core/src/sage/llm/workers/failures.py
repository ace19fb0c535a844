"""Report and log unexpected exceptions without text from the request."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator

from sage.common.errors import Overloaded, SageError
from sage.libs.models.memory import is_out_of_memory

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """If the block raises a SageError, print the error as the last line of the log, and exit with code 1."""
    try:
        yield
    except SageError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


def is_device_lost(error: BaseException) -> bool:
    """Return whether a GPU has reported an error after which this process cannot use the GPU any more."""
    is_named = isinstance(error, RuntimeError) and "CUDA error" in str(error)
    return (is_named or type(error).__name__ == "AcceleratorError") and not is_out_of_memory(error)


def internal_error(error: BaseException, doing: str) -> SageError:
    """Return the error for the client, and log the traceback of an unexpected exception.

    The error and the log do not contain the exception's message, because the message can quote text from the request.
    """
    if isinstance(error, SageError):
        return error
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed with %s\n%s", doing, type(error).__name__, frames)
    if is_out_of_memory(error):
        message = "The engine ran out of memory on this request."
        return Overloaded(code="out_of_memory", message=message, hint="Send a shorter prompt, or ask for fewer tokens.")
    message = f"{doing} failed ({type(error).__name__})."
    return SageError(code="internal_error", message=message, hint="The engine's log has the traceback.")
