"""Requests (SIGTERM or Ctrl-C) to stop a run at its next safe point."""

import signal


class StopRequested(Exception):
    """Raised at a safe point of a run if a stop was requested."""


class StopRequest:
    """A flag that a signal sets, and that the run checks at safe points."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Install signal handlers: SIGTERM and SIGINT request a stop.

        SIGTERM is also unblocked, so that a SIGTERM that has already arrived is delivered.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.request())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def request(self) -> None:
        """Request a stop."""
        self.requested = True

    def check(self) -> None:
        """Raise StopRequested if a stop was requested."""
        if self.requested:
            raise StopRequested
