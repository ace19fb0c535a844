"""Check whether a request is allowed to use the gateway.

If an API key is set, a request must send the key. If no API key is set, the gateway accepts only requests from this machine,
and rejects requests that web pages of other sites send.
"""

import functools
import hmac
from urllib.parse import urlsplit

from sage.common.errors import ConfigError, Unauthorized
from sage.common.settings import Settings
from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.headers import RawHeaders, value

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_OPEN_PATHS = frozenset({"/health"})


def key_of(settings: Settings) -> str | None:
    """Return the API key that requests must send; None if no API key is set."""
    return (settings.api_key.get_secret_value() if settings.api_key else "") or None


def check_exposure(settings: Settings) -> None:
    """Raise ConfigError if the gateway would listen on the network without an API key."""
    if settings.gateway_host not in LOOPBACK and key_of(settings) is None:
        raise ConfigError(
            code="api_key_needed",
            message=f"Without an API key, everyone who can connect to {settings.gateway_host} could start engines.",
            hint="Set SAGE_API_KEY, or listen on 127.0.0.1.",
            param="gateway_host",
        )


def check_access(path: str, headers: RawHeaders, key: str | None) -> None:
    """Check a request's headers. Raises Unauthorized if the API key is missing or wrong.

    Raises Refusal if a web page of another site sent the request, and no API key is set.
    """
    if key is None:
        _refuse_pages(headers)
    elif path not in _OPEN_PATHS:
        scheme, _, given = value(headers, b"authorization").partition(b" ")
        if not hmac.compare_digest(given.strip(), key.encode()) or scheme.lower() != b"bearer":
            raise Unauthorized(
                code="invalid_api_key",
                message="The API key is missing or wrong.",
                hint="Send the header 'Authorization: Bearer KEY'; for `sage` commands, set SAGE_API_KEY.",
            )


def _refuse_pages(headers: RawHeaders) -> None:
    """Raise Refusal if a web page of another site sent the request.

    The header Host is also checked, because the host name of a site can resolve to the loopback address (DNS rebinding).
    """
    hint = "If SAGE_API_KEY is not set, the gateway answers only requests from and to localhost."
    for name, content in headers:
        if name == b"host" and _host_name(b"//" + content) not in LOOPBACK:
            raise Refusal(403, "host_not_allowed", "The Host header does not name this machine.", hint)
        if name == b"origin" and _host_name(content) not in LOOPBACK:
            raise Refusal(403, "origin_not_allowed", "The Origin header names another site.", hint)


@functools.lru_cache(maxsize=100)
def _host_name(url: bytes) -> str | None:
    try:
        return urlsplit(url.decode("latin-1")).hostname
    except ValueError:
        return None
