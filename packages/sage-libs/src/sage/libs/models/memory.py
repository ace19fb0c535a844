"""Recognize errors that were caused by insufficient memory. This module does not import torch."""

#: Parts of error messages after failed allocations in CUDA, torch (CPU), C++ and oneDNN.
_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "could not create a primitive",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error was caused by insufficient memory."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch.OutOfMemoryError
    return is_named or any(words in str(error) for words in _MESSAGES)
