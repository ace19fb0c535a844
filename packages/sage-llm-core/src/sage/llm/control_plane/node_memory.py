"""Measure the memory of the node's devices, at most once a second."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from sage.llm.control_plane.admission import DeviceMemory
from sage.llm.control_plane.queueing import Memory

logger = logging.getLogger(__name__)
_SECONDS = 1.0


class NodeMemory:
    """The last measurement of the devices' memory."""

    def __init__(self, measure: Callable[[Mapping[str, int]], Sequence[DeviceMemory]]) -> None:
        """measure: blocking function that returns the memory of the devices. Its argument maps server ids to PIDs."""
        self._measure = measure
        self._devices: Sequence[DeviceMemory] | None = None
        self._measured_at_seconds = 0.0

    async def look(self, pids: Mapping[str, int]) -> Memory | None:
        """Return the newest measurement of the devices, or None if no measurement has succeeded yet.

        pids: maps the id of each server of this node to the PID of its process.
        """
        if self._devices is None or time.monotonic() - self._measured_at_seconds >= _SECONDS:
            try:
                self._devices = await asyncio.to_thread(self._measure, pids)
            except Exception as error:
                logger.warning("the memory of the devices cannot be measured, retrying", exc_info=error)
            self._measured_at_seconds = time.monotonic()
        return None if self._devices is None else Memory(self._devices, datetime.now(UTC))
