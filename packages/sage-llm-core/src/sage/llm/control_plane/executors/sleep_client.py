"""Let inference servers release their memory and allocate it again, with the HTTP routes that vLLM has for this purpose."""

import httpx

from sage.common.errors import EngineError
from sage.common.server_keys import server_key
from sage.llm.control_plane.store.records import ServerRecord

#: Seconds until a request times out. A server completes its open requests before it sleeps, so a request to sleep can time
#: out. The caller repeats a request that timed out.
_REQUEST_SECONDS = 10.0
#: The level of vLLM's sleep mode. At level 1, the weights are moved to main memory, and the KV cache is discarded.
_LEVEL = 1


class SleepClient:
    """Sends requests to the routes `/sleep`, `/wake_up` and `/is_sleeping`."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(limits=limits, timeout=_REQUEST_SECONDS, trust_env=False)

    async def sleep(self, server: ServerRecord) -> None:
        """Let a server complete its requests and release its memory. Does nothing if the server already sleeps.

        Raises EngineError if the server cannot sleep, and OSError if the result is not known.
        """
        await self._request(server, "POST", f"sleep?level={_LEVEL}&mode=wait")
        await self._check(server, is_sleeping=True)

    async def wake(self, server: ServerRecord) -> None:
        """Let a server allocate its memory again. Does nothing if the server does not sleep.

        Raises EngineError if the server cannot wake, and OSError if the result is not known.
        """
        await self._request(server, "POST", "wake_up")
        await self._check(server, is_sleeping=False)

    async def _check(self, server: ServerRecord, *, is_sleeping: bool) -> None:
        answer = await self._request(server, "GET", "is_sleeping")
        if answer.json() != {"is_sleeping": is_sleeping}:
            raise EngineError(
                code="engine_unusable", message=f"{server.id} {'does not sleep' if is_sleeping else 'sleeps'}."
            )

    async def _request(self, server: ServerRecord, method: str, route: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {server_key(server.token)}"}
        try:
            answer = await self._http.request(method, f"http://{server.address}/{route}", headers=headers)
        except httpx.HTTPError as error:
            raise OSError(f"{server.id} did not answer the request to {route}: {error!r}") from None
        if answer.is_error:
            raise EngineError(
                code="engine_unusable", message=f"{server.id} answered {route} with status {answer.status_code}."
            )
        return answer
