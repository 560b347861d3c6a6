"""Limits of what a caller may cause, and the report that one of them acted.

A limit refuses and never lets through. Everything here is in memory and for this process alone: each node has its own
limits.
"""

import time
from collections.abc import Callable, Hashable

import structlog

from adapter.metrics import Metrics

log = structlog.get_logger(__name__)

MOST_AT_ONCE = 500  # requests of known callers: as many accepts as one core does in a tenth of a second
MOST_WAITING = 2000  # each holds an order
WARN_EVERY_SECONDS = 60
SECONDS_OF_A_WINDOW = 60


class Overloaded(Exception):
    """More requests run than can be served in time. Add a node, or find what they wait for."""


class Load:
    """The requests of known callers that run, and their limits.

    Each request enters it as a context manager.

    Requests that only wait for a plugin or for Norce take no time and count towards `MOST_WAITING` alone, so that a
    slow plugin does not shut out notifications. An unknown caller never counts.

    Args:
        waiting: Returns how many of the running requests only wait.
        on_limit: Called with the name of the limit for each request that is refused.
    """

    def __init__(
        self, waiting: Callable[[], int] = lambda: 0, on_limit: Callable[[str], None] = lambda _: None
    ) -> None:
        self.running = 0
        self.waiting = waiting  # returns how many of the running requests only wait
        self._on_limit = on_limit

    def is_full(self) -> bool:
        running = self.running
        return running >= MOST_AT_ONCE and (running >= MOST_WAITING or running - self.waiting() >= MOST_AT_ONCE)

    def note_refusal(self) -> None:
        self._on_limit("requests")

    def __enter__(self) -> None:
        """Count a request. Raises `Overloaded`."""
        if self.is_full():
            self.note_refusal()
            raise Overloaded
        self.running += 1

    def __exit__(self, *_: object) -> None:
        self.running -= 1


class CallLimit:
    """A limit on the calls of each key: how many run at once, and how many begin in a minute.

    Minutes begin at the same moment for all keys. Then all counts are forgotten, so that a key takes memory for a
    minute after its last call. Refused calls do not count.
    """

    def __init__(self, name: str, *, at_once: int, a_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._at_once = at_once
        self._a_minute = a_minute
        self._clock = clock
        self._running: dict[Hashable, int] = {}
        self._begun: dict[Hashable, int] = {}  # in this minute
        self._minute_ends = clock() + SECONDS_OF_A_WINDOW

    def enter(self, key: Hashable) -> bool:
        """Begin a call unless the limit is reached. After True, call `leave` at its end."""
        now = self._clock()
        if now >= self._minute_ends:
            self._begun = {}
            self._minute_ends = now + SECONDS_OF_A_WINDOW
        running, begun = self._running.get(key, 0), self._begun.get(key, 0)
        if running >= self._at_once or begun >= self._a_minute:
            return False
        self._running[key] = running + 1
        self._begun[key] = begun + 1
        return True

    def leave(self, key: Hashable) -> None:
        """End a call that has entered."""
        running = self._running.pop(key) - 1
        if running:
            self._running[key] = running

    def __len__(self) -> int:
        """Return the number of keys that take memory."""
        return len(self._running.keys() | self._begun.keys())


class LargeBodies:
    """A limit on the bytes of large bodies in evaluation, for each key and in all.

    A decoded order takes nine times the memory of its bytes, and rules on it take turns, so that many would be in
    memory together.
    """

    def __init__(self, name: str, *, least: int, of_key: int, in_all: int) -> None:
        self.name = name
        self.least = least  # the smallest size that counts
        self._of_key = of_key
        self._in_all = in_all
        self._bytes: dict[Hashable, int] = {}

    def enter(self, key: Hashable, size: int) -> bool:
        """Begin with a body unless the limit is reached. After True, call `leave` at its end."""
        before = self._bytes.get(key, 0)
        if before + size > self._of_key or sum(self._bytes.values()) + size > self._in_all:
            return False
        self._bytes[key] = before + size
        return True

    def leave(self, key: Hashable, size: int) -> None:
        """End a body that has entered."""
        left = self._bytes.pop(key) - size
        if left:
            self._bytes[key] = left


class WarningCounter:
    """A counter of events that allows one warning a minute for each key."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._warned_at: dict[Hashable, float] = {}
        self._unreported: dict[Hashable, int] = {}

    def count(self, key: Hashable) -> int | None:
        """Count an event. Return the events since the last warning if a new one is due, else None."""
        count = self._unreported.pop(key, 0) + 1
        now = self._clock()
        if now - self._warned_at.get(key, float("-inf")) < WARN_EVERY_SECONDS:
            self._unreported[key] = count
            return None
        self._warned_at[key] = now
        return count


class LimitReport:
    """The report that a limit acted: a count, and at most one warning a minute for each limit."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._warnings = WarningCounter(clock)

    def acted(self, limit: str) -> None:
        """Report that a limit has acted once. Names have few values: they are labels of a metric."""
        self._metrics.limits_reached.labels(limit).inc()
        if (count := self._warnings.count(limit)) is not None:
            log.warning("limit_reached", limit=limit, count=count)


class ByteLimit:
    """A limit on the bytes that the bodies of each key may have in a period.

    Bytes are forgotten evenly, the whole limit within the period. So a key takes memory only for as long as its bytes
    count: most orders for some minutes.
    """

    def __init__(self, name: str, *, most: int, seconds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._limit = most
        self._seconds = seconds
        self._clock = clock
        self._counted: dict[Hashable, tuple[float, float]] = {}  # bytes, and when they were counted
        self._forgets_at = clock() + SECONDS_OF_A_WINDOW

    def take(self, key: Hashable, size: int) -> bool:
        """Count the bytes of a body unless they exceed the limit. A first body may have any size."""
        now = self._clock()
        if now >= self._forgets_at:
            self._counted = {each: counted for each, counted in self._counted.items() if self._left(counted, now)}
            self._forgets_at = now + SECONDS_OF_A_WINDOW
        before = self._left(self._counted.get(key, (0, now)), now)
        if before and before + size > self._limit:
            return False
        self._counted[key] = before + size, now
        return True

    def _left(self, counted: tuple[float, float], now: float) -> float:
        size, at = counted
        return max(size - (now - at) * self._limit / self._seconds, 0)

    def __len__(self) -> int:
        """Return the number of keys that take memory."""
        return len(self._counted)
