"""A limit of time for Python code that nobody can trust to end, such as a model's chat template."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TimeLimitExceeded(BaseException):
    """Code took too long. No Exception: what is stopped must not take it for an error of its own."""


def within(seconds: float, function: Callable[[], T]) -> T:
    """Return what `function` returns; raise TimeLimitExceeded in it if that takes longer than `seconds`.

    It is raised between two instructions of Python: code that stays inside one call of C is not stopped.
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
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # one that was not raised yet
        timer.cancel()
