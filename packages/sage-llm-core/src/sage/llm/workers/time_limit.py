"""Set a time limit for Python code that can run forever, such as a model's chat template."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TimeLimitExceeded(BaseException):
    """A function took too long. This is a BaseException, so that `except Exception` in the function does not catch it."""


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call `function` and return its result. After `seconds`, raise TimeLimitExceeded inside the function.

    The exception is raised between two Python instructions. A call into C code is not interrupted.
    """
    thread, turn, is_over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def interrupt() -> None:
        with turn:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeLimitExceeded))

    timer = threading.Timer(seconds, interrupt)
    timer.start()
    try:
        return function()
    finally:
        with turn:
            is_over = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # cancel a scheduled exception that is not yet raised
        timer.cancel()
