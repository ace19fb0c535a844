"""The memory that the control plane reserved for a run. This module does not import torch."""

import os

#: Environment variable of a worker: the number of bytes that are reserved for the run on each device of the run.
RESERVED_VARIABLE = "SAGE_RUN_MEMORY_BYTES"
#: A run may use this multiple of its reservation, because the estimate of its memory can be 15 % too low.
TOLERANCE = 1.15


def reserved_bytes() -> int | None:
    """Return the memory that is reserved for the run of this process; None if there is no reservation."""
    value = os.environ.get(RESERVED_VARIABLE, "")
    return int(value) if value.isdecimal() else None
