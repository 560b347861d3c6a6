"""
A closed-loop HTTP load: so many connections, each sends its next prepared request when the last answer is in.

Requests are prepared as bytes beforehand, so that the generator costs little; answers are read just far enough to know
their status and where they end.
"""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LONGEST_SECONDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a load met: answers a second, latencies in milliseconds, answers by status."""

    per_second: float
    p50_ms: float
    p99_ms: float
    statuses: dict[int, int]


class _Connection(asyncio.Protocol):
    def __init__(self, requests: Iterator[bytes], statuses: Counter[int], latencies: list[float]) -> None:
        self._requests = requests
        self._statuses = statuses
        self._latencies = latencies
        self._buffer = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport
        self._next()

    def _next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 : (head.find(b"\r\n", at) + 1 or len(head) + 1) - 1]) if at >= 0 else 0
        if len(self._buffer) < end + 4 + length:
            return
        self._latencies.append(time.perf_counter() - self._sent)
        self._statuses[int(head[9:12])] += 1
        self._buffer = b""
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))


async def drive(host: str, port: int, requests: Sequence[bytes], connections: int) -> Load:
    """Sends every request once over `connections` connections."""
    pending, statuses, latencies = iter(requests), Counter[int](), list[float]()
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    opened = [
        await loop.create_connection(lambda: _Connection(pending, statuses, latencies), host, port)
        for _ in range(connections)
    ]
    async with asyncio.timeout(LONGEST_SECONDS):
        await asyncio.gather(*(connection.done for _, connection in opened))
    seconds = time.perf_counter() - started
    latencies.sort()
    return Load(
        per_second=len(latencies) / seconds,
        p50_ms=statistics.median(latencies) * 1000,
        p99_ms=latencies[int(len(latencies) * 0.99)] * 1000,
        statuses=dict(statuses),
    )
