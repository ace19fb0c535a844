"""A request to stop, as the operating system delivers it: SIGTERM or Ctrl-C, once, kept until there is time for it."""

import signal


class StopRequested(Exception):
    """Work outside the training loop was cut short."""


class StopRequest:
    """Set by a signal, read at the next safe point."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """From now on SIGTERM and SIGINT only set the request, those included that were held back so far."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.request())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def request(self) -> None:
        """Ask for a stop."""
        self.requested = True

    def check(self) -> None:
        """Raise StopRequested where a stop is asked for."""
        if self.requested:
            raise StopRequested
