"""What to do where memory does not suffice."""

#: How allocators say it: CUDA's, torch's on the CPU, C++'s, oneDNN's.
_WORDS = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive", "could not create a memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory was asked for that is not there."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS)
