"""The process that makes load: `python -m funnel_benchmarks.serve.load_process PORT`.

Every line of its input is a task, a JSON object: `requests`, for each request its texts, and one of

    clients   a *closed loop*: this many clients, each of which sends its next request when it has its last reply
    arrivals  an *open loop*: seconds from the beginning at which each request arrives, whatever the server is doing

The line that answers a task has for each request, in its order, `statuses` (0: no reply), `latencies` (seconds to the
end of the reply: in an open loop from the arrival, else from sending) and `lags` (seconds from the arrival to sending);
then `seconds`, from the beginning to the last reply, and `cpu_seconds` of this process meanwhile.

It shares no interpreter with a server or an engine, and does little for a request: bodies are made before the clock
starts, connections are kept, replies are thrown away. What it does is still done by the same cores, so a large lag or
many `cpu_seconds` mean that the client and not the server was measured.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httptools
import orjson

from funnel_benchmarks.serve.connections import NO_REPLY, allow_many

REPLY_SECONDS = 300.0  # after which a request has no reply
HEAD_START = 0.05  # seconds from the beginning of a task to that of an open loop


class Connection(asyncio.Protocol):
    """A connection that is kept, with one request at a time."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.is_open = True
        self.reply: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.finish(NO_REPLY, keep=False)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.finish(self.parser.get_status_code(), keep=self.parser.should_keep_alive())

    def finish(self, status: int, *, keep: bool) -> None:
        self.is_open = self.is_open and keep
        if self.reply is not None and not self.reply.done():
            self.reply.set_result(status)

    async def ask(self, request: bytes) -> int:
        self.reply = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                return await self.reply
        except TimeoutError:
            self.transport.abort()
            return NO_REPLY


class Client:
    """Sends requests over connections that are idle, or over new ones, and notes what becomes of each.

    Attributes:
        idle: the connections without a request; the last one is taken first.
    """

    def __init__(self, port: int, count: int):
        self.port, self.idle = port, list[Connection]()
        self.statuses, self.latencies, self.lags = [NO_REPLY] * count, [0.0] * count, [0.0] * count

    async def connect(self) -> Connection:
        return (await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port))[1]

    async def ask(self, number: int, request: bytes, arrival: float | None = None) -> None:
        """Sends a request, which arrived at this time on the clock of `time.perf_counter`; None: it does so now."""
        sent = time.perf_counter()
        began = sent if arrival is None else arrival
        while self.idle and not self.idle[-1].is_open:
            self.idle.pop()
        try:
            connection = self.idle.pop() if self.idle else await self.connect()
        except OSError:
            return
        self.statuses[number] = await connection.ask(request)
        self.latencies[number], self.lags[number] = time.perf_counter() - began, sent - began
        if connection.is_open:
            self.idle.append(connection)

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.abort()


async def closed_loop(client: Client, requests: list[bytes], clients: int) -> float:
    """Returns the seconds of all requests."""
    client.idle += await asyncio.gather(*(client.connect() for _ in range(clients)))
    numbered = iter(enumerate(requests))

    async def work() -> None:
        for number, request in numbered:
            await client.ask(number, request)

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return time.perf_counter() - begin


async def open_loop(client: Client, requests: list[bytes], arrivals: list[float]) -> float:
    """Returns the seconds from the beginning to the last reply."""
    begin = time.perf_counter() + HEAD_START
    async with asyncio.TaskGroup() as tasks:
        for number, (request, arrival) in enumerate(zip(requests, arrivals, strict=True)):
            if (early := begin + arrival - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            tasks.create_task(client.ask(number, request, begin + arrival))
    return time.perf_counter() - begin


def make_request(texts: list[str]) -> bytes:
    """The bytes of a request of vectors."""
    body = orjson.dumps({"inputs": texts})
    head = f"POST /embed HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def answer(port: int, task: dict[str, Any]) -> dict[str, Any]:
    requests = [make_request(texts) for texts in task["requests"]]
    client, cpu = Client(port, len(requests)), time.process_time()
    loop: Callable[..., Awaitable[float]] = open_loop if "arrivals" in task else closed_loop
    seconds = await loop(client, requests, task["arrivals"] if "arrivals" in task else task["clients"])
    client.close()
    return {
        "statuses": client.statuses,
        "latencies": client.latencies,
        "lags": client.lags,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
    }


def main() -> None:
    allow_many()
    for line in sys.stdin:
        print(json.dumps(asyncio.run(answer(int(sys.argv[1]), json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
