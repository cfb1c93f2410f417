"""Fetch many records from a service that allows so many requests a second, and no more.

    python examples/rate_limited_fetcher.py --records 200 --per-second 100 --clients 4

The service is real HTTP over a local socket, in this process: it answers 429 to whoever asks more
often than its limit allows, and counts how often that happens.

The *limiter* is one coroutine actor, a token bucket that all clients share: whoever asks for a
permit waits in its event loop until it is due. *Clients* are coroutine actors: each has many
requests under way at once. One client of the lot is told to give up half-way: its calls are
cancelled as asyncio cancels, and others get what it had left to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import poolray
from poolray.exceptions import TaskCancelledError

#: Requests that the limiter lets through at once after a pause.
BURST = 10
#: What the service allows beyond that, for requests do not arrive evenly.
SLACK = 10


class Service(BaseHTTPRequestHandler):
    """Answers `/record/<number>` with JSON, as long as it is not asked too often."""

    protocol_version = "HTTP/1.1"
    per_second = 0.0
    lock = threading.Lock()
    served: ClassVar[deque[float]] = deque()
    refused = 0

    def do_GET(self) -> None:
        number = int(self.path.rpartition("/")[2])
        if not self.is_allowed():
            self.answer(429, {"error": "too many requests"})
        else:
            self.answer(200, {"record": number, "square": number * number})

    @classmethod
    def is_allowed(cls) -> bool:
        """Whether the last second leaves room for one more request."""
        with cls.lock:
            now = time.monotonic()
            while cls.served and cls.served[0] < now - 1.0:
                cls.served.popleft()
            if len(cls.served) >= cls.per_second + BURST + SLACK:
                cls.refused += 1
                return False
            cls.served.append(now)
            return True

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


@poolray.remote
class Limiter:
    """Permits at an even rate, for whoever waits."""

    def __init__(self, per_second: float) -> None:
        self.interval_s = 1.0 / per_second
        self.next_s = time.monotonic()
        self.turn = asyncio.Lock()

    async def permit(self) -> None:
        """Returns when the caller may go on."""
        async with self.turn:  # first come, first served; who is cancelled in line takes none
            await asyncio.sleep(max(0.0, self.next_s - time.monotonic()))
            oldest_s = time.monotonic() - BURST * self.interval_s
            self.next_s = max(self.next_s, oldest_s) + self.interval_s


@poolray.remote
class Client:
    """Fetches records, many at once."""

    def __init__(self, port: int, limiter: Any) -> None:
        self.port = port
        self.limiter = limiter

    async def fetch(self, number: int) -> dict[str, Any]:
        """A record."""
        await self.limiter.permit.remote()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET /record/{number} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await writer.drain()
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status = int(head.split(maxsplit=2)[1])
        if status != 200:
            raise RuntimeError(f"record {number}: the service answered {status}")
        record: dict[str, Any] = json.loads(body)
        return record


def fetch_all(port: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """All records, and how many of them were taken from the client that gave up."""
    limiter = Limiter.remote(options.per_second)
    clients = [Client.remote(port, limiter) for _ in range(options.clients)]
    refs = [clients[n % len(clients)].fetch.remote(n) for n in range(options.records)]
    poolray.wait(refs, num_returns=(len(refs) + 1) // 2)
    for ref in refs[len(clients) - 1 :: len(clients)]:  # those of the last client
        poolray.cancel(ref)
    moved = 0
    for number, ref in enumerate(refs):
        try:
            poolray.get(ref)
        except TaskCancelledError:
            moved += 1
            refs[number] = clients[0].fetch.remote(number)
    return poolray.get(refs), moved


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch records at a limited rate.")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--per-second", type=float, default=100.0)
    parser.add_argument("--clients", type=int, default=2)
    options = parser.parse_args(arguments)
    if min(options.records, options.clients, options.per_second) < 1:
        parser.error("all numbers must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    poolray.init()  # before there are threads, for it forks
    Service.per_second = options.per_second
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        started = time.perf_counter()
        records, moved = fetch_all(server.server_address[1], options)
        seconds = time.perf_counter() - started
    finally:
        server.shutdown()
        server.server_close()
        poolray.shutdown()
    rate = len(records) / seconds
    print(f"{len(records):,} records in {seconds:.2f} s: {rate:.0f} a second")
    print(f"{moved:,} taken over from a client that gave up, {Service.refused:,} requests refused")
    if records != [{"record": n, "square": n * n} for n in range(options.records)]:
        print("The records are NOT those of the service.", file=sys.stderr)
        return 1
    print("Every record is there.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
