"""Show a table that is refreshed until Ctrl-C."""

import time
from collections.abc import Callable
from typing import NoReturn

from rich.live import Live
from rich.table import Table

from sage.cli import render

_SECONDS = 1.0


def watch(table: Callable[[], Table]) -> NoReturn:
    """Print a table and replace it once a second."""
    with Live(table(), console=render.stdout(), auto_refresh=False) as live:
        while True:
            time.sleep(_SECONDS)
            live.update(table(), refresh=True)
