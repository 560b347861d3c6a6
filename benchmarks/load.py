"""HTTP loads, closed and open.

Closed: each of a number of connections sends its next request when it has the last answer. Open: requests are due at a
fixed rate, and each is timed from the moment at which it was due, not from the moment at which it could be sent.

Requests are prepared as bytes. Answers are read only as far as their status and their length. The generator sleeps
until a request is due; if it span, it would take the core that the threads of the disk need.
"""

import asyncio
import ctypes
import gc
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")
HOST = "127.0.0.1"
PATIENCE_SECONDS = 30
UNANSWERED = 0
FINEST_TICK_SECONDS = 0.00025
COARSEST_TICK_SECONDS = 0.002  # a request waits so long for the generator, however low the rate is


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The result of a load: each request as (due or sent, answered, status), in the order of the answers."""

    answers: list[tuple[float, float, int]]
    seconds: float
    late_p99_ms: float = 0.0  # how late the open generator was when a connection was free

    @property
    def per_second(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for _, _, status in self.answers)

    def percentile_ms(self, percent: float, status: int | None = None) -> float:
        times = sorted(end - begin for begin, end, answered in self.answers if status in (None, answered))
        return percentile(times, percent) * 1000


def percentile(ordered: list[float], percent: float) -> float:
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else 0.0


def closed(port: int, requests: Iterable[bytes], *, connections: int, seconds: float = 600.0) -> Load:
    """Send until the requests or the seconds are used up, and wait for the last answers."""
    return _quietly(lambda: _closed(port, iter(requests), connections, seconds))


def open_loop(port: int, requests: list[bytes], *, per_second: float, connections: int) -> Load:
    """Send every request when it is due. Open a new connection if none is free, up to `connections`."""
    return _quietly(lambda: _Open(port, requests, per_second, connections).run())


def open_loops(port: int, *loads: tuple[Sequence[bytes], float], connections: int) -> list[Load]:
    """Run several open loads at once. Each is given as its requests and their rate per second."""

    async def together() -> list[Load]:
        return await asyncio.gather(*(_Open(port, requests, rate, connections).run() for requests, rate in loads))

    return _quietly(together)


def beside(
    port: int,
    requests: list[bytes],
    *,
    per_second: float,
    connections: int,
    beside: Iterator[bytes],
    beside_connections: int,
) -> tuple[Load, Load]:
    """Run an open load and, for the same time, a closed one beside it."""

    async def both() -> tuple[Load, Load]:
        seconds = len(requests) / per_second
        opened, closed = await asyncio.gather(
            _Open(port, requests, per_second, connections).run(),
            _closed(port, beside, beside_connections, seconds),
        )
        return opened, closed

    return _quietly(both)


def _quietly(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    gc.collect()
    gc.disable()  # a collection would count as latency of the server
    try:
        return uvloop.run(make())
    finally:
        gc.enable()


class _Connection(asyncio.Protocol):
    """One HTTP connection with one request at a time. It calls `answered` with a status or with UNANSWERED."""

    def __init__(self, answered: Callable[["_Connection", int], None]) -> None:
        self._answered = answered
        self._buffer = b""
        self.transport: asyncio.WriteTransport | None = None
        self.begun: float | None = None
        self.is_ending = False  # the answer says that the server closes the connection

    def send(self, request: bytes, begun: float) -> None:
        self.begun = begun
        self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = buffer[: end + 2].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 : head.find(b"\r\n", at)]) if at >= 0 else 0
        if len(buffer) < end + 4 + length:
            return
        self._buffer = b""
        self.is_ending = b"\r\nconnection: close\r\n" in head
        self._answered(self, int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self._answered(self, UNANSWERED)


async def _closed(port: int, requests: Iterator[bytes], connections: int, seconds: float) -> Load:
    loop = asyncio.get_running_loop()
    answers: list[tuple[float, float, int]] = []
    working = connections
    finished = loop.create_future()

    def answered(connection: _Connection, status: int) -> None:
        nonlocal working
        now = time.perf_counter()
        if connection.begun is None:  # an idle connection was closed
            return
        answers.append((connection.begun, now, status))
        connection.begun = None
        request = next(requests, None) if status != UNANSWERED and now < ends else None
        if request is not None:
            connection.send(request, now)
            return
        connection.transport.close()
        working -= 1
        if not working and not finished.done():
            finished.set_result(None)

    opened = [(await loop.create_connection(lambda: _Connection(answered), HOST, port))[1] for _ in range(connections)]
    started = time.perf_counter()
    ends = started + seconds
    for connection in opened:
        request = next(requests, None)
        if request is None:
            raise ValueError("fewer requests than connections")
        connection.send(request, time.perf_counter())
    async with asyncio.timeout(seconds + PATIENCE_SECONDS):
        await finished
    return Load(answers=answers, seconds=time.perf_counter() - started)


class _Open:
    def __init__(self, port: int, requests: Sequence[bytes], per_second: float, connections: int) -> None:
        self._port = port
        self._requests = requests
        self._interval = 1 / per_second
        self._most = connections
        self._opened = 0
        self._idle: list[_Connection] = []
        self._waiting: deque[tuple[bytes, float]] = deque()
        self._next = 0
        self._answers: list[tuple[float, float, int]] = []
        self._late: list[float] = []
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self) -> Load:
        loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = loop.create_future()
        tick = min(max(self._interval, FINEST_TICK_SECONDS), COARSEST_TICK_SECONDS)
        timer = _timer(tick)
        self._started = time.perf_counter() + 0.05
        loop.add_reader(timer, self._tick, timer)
        seconds = len(self._requests) * self._interval
        try:
            async with asyncio.timeout(seconds + PATIENCE_SECONDS):
                await self._finished
        except TimeoutError:
            self._give_up()
        finally:
            loop.remove_reader(timer)
            os.close(timer)
            for task in self._opening:
                task.cancel()
        return Load(
            answers=self._answers, seconds=seconds, late_p99_ms=percentile(sorted(self._late), 99) * 1000
        )  # fmt: skip

    def _tick(self, timer: int) -> None:
        os.read(timer, 8)
        now = time.perf_counter()
        while self._next < len(self._requests):
            due = self._started + self._next * self._interval
            if due > now:
                return
            request, self._next = self._requests[self._next], self._next + 1
            if self._idle:
                self._late.append(now - due)
                self._idle.pop().send(request, due)
            elif self._opened < self._most:
                self._opened += 1
                task = asyncio.create_task(self._open(request, due))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            else:
                self._waiting.append((request, due))

    async def _open(self, request: bytes, due: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: _Connection(self._answered), HOST, self._port)
        except OSError:
            self._opened -= 1
            self._note(due, UNANSWERED)
        else:
            connection.send(request, due)

    def _answered(self, connection: _Connection, status: int) -> None:
        begun, connection.begun = connection.begun, None
        if begun is not None:
            self._note(begun, status)
        if status == UNANSWERED:
            self._opened -= 1
            if connection in self._idle:
                self._idle.remove(connection)
        elif connection.is_ending:
            connection.transport.close()
        elif self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _note(self, begun: float, status: int) -> None:
        self._answers.append((begun, time.perf_counter(), status))
        if len(self._answers) == len(self._requests) and not self._finished.done():
            self._finished.set_result(None)

    def _give_up(self) -> None:
        """Count the requests without an answer, with the time for which they have waited."""
        now = time.perf_counter()
        answered = {begun for begun, _, _ in self._answers}
        every = (self._started + number * self._interval for number in range(len(self._requests)))
        self._answers += [(due, now, UNANSWERED) for due in every if due not in answered]


def _timer(seconds: float) -> int:
    """Return a file descriptor that becomes readable at this interval.

    The timers of the event loops have a resolution of a millisecond.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    timer = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if timer < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    interval = (int(seconds), int(seconds % 1 * 1e9))
    libc.timerfd_settime(timer, 0, ctypes.byref((ctypes.c_long * 4)(*interval, *interval)), None)
    return int(timer)
