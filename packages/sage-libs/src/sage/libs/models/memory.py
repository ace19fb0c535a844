"""Recognize errors of failed allocations. It imports no torch."""

#: Error messages of the allocators of CUDA, torch on the CPU, C++ and oneDNN.
_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "could not create a primitive",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that an allocation failed."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _MESSAGES)
