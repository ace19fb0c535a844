"""Compute the keys that the gateway sends to inference servers. A server rejects requests without its key.

Without keys, a web page in a browser could send requests to the servers.
"""

import functools
import hmac
import secrets
from pathlib import Path

from sage.common.files import replace_file
from sage.common.paths import get_user_paths, private_folder
from sage.common.processes import held_lock

#: Name of the environment variable that contains the key of a server.
KEY_VARIABLE = "SAGE_SERVER_KEY"


def server_key(token: str) -> str:
    """Return the key of a server, computed from the server's token and a secret in the state folder."""
    return hmac.new(_secret(get_user_paths().state_dir), token.encode(), "sha256").hexdigest()


@functools.cache
def _secret(folder: Path) -> bytes:
    path = private_folder(folder) / "servers.key"
    with held_lock(folder / "servers.key.lock"):
        if not path.is_file():
            replace_file(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()
