"""Who may speak to the gateway: everyone on this machine, or whoever has the key."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sage.common.errors import ConfigError, Unauthorized
from sage.common.settings import Settings
from sage.llm.gateway.errors import error_response

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN_PATHS = ("/health", "/ready")


class ApiKeyMiddleware:
    """Refuses a request without the key; probes need none."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "")
            if not hmac.compare_digest(given.encode(), self._expected.encode()):
                refused = Unauthorized(
                    code="invalid_api_key",
                    message="The API key is missing or wrong.",
                    hint="Send it as 'Authorization: Bearer KEY'; the command line takes it from SAGE_API_KEY.",
                )
                await error_response(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_exposure(settings: Settings) -> None:
    """Raise ConfigError where the gateway would be open to the network without a key."""
    if settings.gateway_host not in LOOPBACK and settings.api_key is None:
        raise ConfigError(
            code="api_key_needed",
            message=f"The gateway would listen on {settings.gateway_host} for everyone: whoever reaches it can run engines.",
            hint="Set SAGE_API_KEY, or listen on 127.0.0.1.",
            param="gateway_host",
        )
