"""Use a lock to allow only one active gateway per state folder, and publish the active gateway's address for the CLI."""

import asyncio
import json
import logging
import os

from sage.common.errors import Conflict
from sage.common.files import replace_file
from sage.common.paths import get_user_paths
from sage.common.processes import LOCK_FD_VARIABLE, ProcessIdentity, holder, try_lock, write_identity
from sage.common.settings import Settings
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway.access import key_of

logger = logging.getLogger(__name__)
_STANDBY_SECONDS = 1.0


def take_lock() -> None:
    """Take the gateway lock of the state folder, and keep the lock until the process exits.

    Raises Conflict if a gateway is running.
    """
    if LOCK_FD_VARIABLE in os.environ:  # the parent process took the lock, and this process inherited it
        return
    if not _try_lock():
        process = holder(get_user_paths().state_dir / "gateway.lock")
        raise Conflict(
            code="gateway_running",
            message=f"A gateway is already running (PID {process.pid if process and process.pid else 'unknown'}).",
            hint="`sage gateway status` shows the running gateway, `sage gateway stop` stops it. `--standby` starts a "
            "second gateway.",
        )


def publish_address(settings: Settings) -> None:
    """Write address and API key to a file that only this user can read, so that the command line uses this gateway."""
    address = {**vars(ProcessIdentity.of(os.getpid())), "url": settings.gateway_url, "api_key": key_of(settings)}
    replace_file(get_user_paths().state_dir / "gateway.json", json.dumps(address).encode(), 0o600)


async def follow_role(manager: ControlPlaneManager, settings: Settings, *, standby: bool) -> None:
    """Publish the address of this gateway each time the gateway becomes active.

    standby: whether this gateway was started with `--standby`. If so, this gateway takes the gateway lock as soon as the
    lock is free.
    """
    has_lock, was_active = not standby, not standby
    while True:
        is_active = manager.role == "active"
        try:
            has_lock = has_lock or await asyncio.to_thread(_try_lock)
            if is_active and not was_active:
                publish_address(settings)
                logger.info("this gateway is now active")
            was_active = is_active
        except OSError as error:
            logger.warning("the address of this gateway cannot be published, retrying: %s", error)
        await asyncio.sleep(_STANDBY_SECONDS)


def _try_lock() -> bool:
    descriptor = try_lock(get_user_paths().state_dir / "gateway.lock")
    if descriptor is not None:
        write_identity(descriptor)
    return descriptor is not None
