"""The keys of inference servers."""

import stat
from pathlib import Path

from sage.common import server_keys
from sage.common.server_keys import server_key


def test_a_server_keeps_its_key_after_a_restart_of_the_gateway_and_no_other_server_has_it(sage_home: Path) -> None:
    key = server_key("engine-a")
    server_keys._secret.cache_clear()
    assert server_key("engine-a") == key
    assert server_key("engine-b") != key


def test_only_the_user_can_read_the_secret(sage_home: Path) -> None:
    server_key("engine-a")
    assert stat.S_IMODE((sage_home / "state" / "servers.key").stat().st_mode) == 0o600
