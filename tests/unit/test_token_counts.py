"""Token counts are read from the metrics of real HTTP servers on loopback."""

import asyncio

from aiohttp import web
from engine_views import engine_view
from http_servers import listening
from support import free_port

from sage.common.server_keys import server_key
from sage.llm.control_plane.executors.base import Tokens
from sage.llm.control_plane.token_counts import read_token_counts

METRICS = """# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 12
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 34
"""


def test_token_counts_are_read_with_the_server_s_key_from_engines_that_answer() -> None:
    async def answer(request: web.Request) -> web.Response:
        is_allowed = request.headers["Authorization"] == f"Bearer {server_key('engine-0123456789')}"
        return web.Response(text=METRICS) if is_allowed else web.Response(status=401)

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/metrics", answer)
        async with listening(app) as port:
            llama = {"kind": "llm", "backend": "llamacpp", "server_id": "server-0123456789", "address": f"127.0.0.1:{port}"}
            engines = [
                engine_view(**llama, id="engine-a"),
                engine_view(**llama | {"server_id": "server-9999999999"}, id="engine-b"),
                engine_view(**llama | {"address": f"127.0.0.1:{free_port()}"}, id="engine-c"),
                engine_view(**llama, id="engine-d", state="starting"),
                engine_view(**llama | {"backend": "transformers"}, id="engine-e"),
                engine_view(id="engine-f"),
            ]
            assert await read_token_counts(engines) == {"engine-a": Tokens(12, 34)}

    asyncio.run(asyncio.wait_for(main(), 60))
