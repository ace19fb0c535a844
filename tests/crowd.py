"""Load test of a gateway: many clients connect, send requests and disconnect at random times.

One more client, the patient client, waits for each of its answers. `python tests/crowd.py --model tiny --seconds 300`
reports the answer times of the patient client at a running gateway.
"""

import argparse
import asyncio
import contextlib
import json
import random
import time
from dataclasses import asdict, dataclass

import aiohttp
import psutil
from yarl import URL

_CLIENTS = 256
#: `max_tokens` of all requests. As all answers are equally long, the time to wait for earlier requests can be computed.
_TOKENS = 16
_LONGEST_PAUSE_SECONDS = 3.0
#: The gateway closes idle connections to engines within this number of seconds.
_IDLE_SECONDS = 20
#: Maximum number of additional descriptors after the test. The database keeps some connections open.
SPARE_DESCRIPTORS = 24


@dataclass
class Report:
    """The measurements of one load test."""

    alone_seconds: float  #: median answer time of the patient client without other clients
    slowest_seconds: float = 0.0
    slowest_ahead: int = 0  #: number of requests in progress when the slowest request was sent
    worst_ratio: float = 0.0  #: maximum of `answer time / ((2 + requests in progress) * alone_seconds)`
    honest_answers: int = 0  #: number of answers to the patient client
    asked: int = 0
    answered: int = 0
    left: int = 0  #: requests whose client disconnected before the answer was complete
    server_errors: int = 0
    failed: int = 0  #: connections that the gateway closed before the answer was complete
    memory_bytes: tuple[int, int] = (0, 0)
    descriptors: tuple[int, int] = (0, 0)


class Crowd:
    """All clients, in one event loop."""

    def __init__(self, base_url: str, model: str, seconds: float, clients: int = _CLIENTS) -> None:
        self._url, self._seconds, self._clients = f"{base_url}/v1/completions", seconds, clients
        self._base_url = base_url
        self._body = {"model": model, "prompt": "Once upon a time", "max_tokens": _TOKENS, "temperature": 0}
        self._random = random.Random(1)
        self._under_way = 0

    async def run(self) -> Report:
        """Run the load test and return its measurements."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            async with session.get(f"{self._base_url}/health") as answer:
                gateway = psutil.Process((await answer.json())["pid"])
            alone = sorted([await self._honest_seconds(session) for _ in range(9)])
            self._report = report = Report(alone_seconds=alone[4])
            before = gateway.memory_info().rss, gateway.num_fds()
            crowd = [asyncio.create_task(self._client()) for _ in range(self._clients)]
            end = time.monotonic() + self._seconds
            while time.monotonic() < end:
                await self._ask_honestly(session)
            for client in crowd:
                client.cancel()
            await asyncio.gather(*crowd, return_exceptions=True)
            await self._honest_seconds(session)  # wait until the remaining requests of the other clients have ended
            report.memory_bytes = before[0], gateway.memory_info().rss
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_SECONDS):
                    while gateway.num_fds() > before[1] + SPARE_DESCRIPTORS:
                        await asyncio.sleep(0.1)
            report.descriptors = before[1], gateway.num_fds()
        return report

    async def _ask_honestly(self, session: aiohttp.ClientSession) -> None:
        report, ahead = self._report, self._under_way
        seconds = await self._honest_seconds(session)
        report.honest_answers += 1
        report.worst_ratio = max(report.worst_ratio, seconds / ((2 + ahead) * report.alone_seconds))
        if seconds > report.slowest_seconds:
            report.slowest_seconds, report.slowest_ahead = seconds, ahead
        await asyncio.sleep(0.2)

    async def _honest_seconds(self, session: aiohttp.ClientSession) -> float:
        begin = time.monotonic()
        async with session.post(self._url, json=self._body) as answer:
            content = await answer.json()
            assert answer.status == 200, content
            assert content["usage"]["completion_tokens"] > 0
        return time.monotonic() - begin

    async def _client(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            while True:
                await asyncio.sleep(self._random.uniform(0, _LONGEST_PAUSE_SECONDS))
                if self._random.random() < 0.1:
                    await self._only_connect()
                    continue
                self._report.asked += 1
                self._under_way += 1
                try:
                    async with asyncio.timeout(self._random.expovariate(1.0)):
                        await self._ask(session, stream=self._random.random() < 0.5)
                except TimeoutError:
                    self._report.left += 1
                except aiohttp.ClientError:
                    self._report.failed += 1
                finally:
                    self._under_way -= 1

    async def _ask(self, session: aiohttp.ClientSession, *, stream: bool) -> None:
        async with session.post(self._url, json={**self._body, "stream": stream}) as answer:
            text = await answer.text()
            self._report.server_errors += answer.status >= 500 or '"error"' in text
            self._report.answered += 1

    async def _only_connect(self) -> None:
        with contextlib.suppress(OSError):
            address = URL(self._base_url)
            _, writer = await asyncio.open_connection(address.host, address.port)
            if self._random.random() < 0.5:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
            await asyncio.sleep(self._random.random())
            writer.close()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--base-url", default="http://127.0.0.1:8889")
    options.add_argument("--model", default="sage-default")
    options.add_argument("--seconds", type=float, default=300)
    options.add_argument("--clients", type=int, default=_CLIENTS)
    given = options.parse_args()
    report = asyncio.run(Crowd(given.base_url, given.model, given.seconds, given.clients).run())
    print(json.dumps(asdict(report), indent=2))
