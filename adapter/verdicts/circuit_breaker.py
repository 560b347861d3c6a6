"""The circuit breaker of validation and hook routes."""

import time
from collections.abc import Callable
from datetime import timedelta

from adapter.identifiers import Channel

Key = tuple[str, Channel]  # a route and the channel that it is asked for


class CircuitBreaker:
    """Opens for a route that misses its deadline `failures` times in a row.

    While it is open the route is not asked. After `open_for` one call tries the route again; the others wait for its
    result or for another `open_for`. The state is in memory, for this process alone. With 0 `failures` it never opens.
    """

    def __init__(self, *, failures: int, open_for: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._open_for = open_for.total_seconds()
        self._clock = clock
        self._missed: dict[Key, int] = {}
        self._open_until: dict[Key, float] = {}

    def is_open(self, key: Key) -> bool:
        """Return True if the route must not be asked now.

        After `open_for` the first caller gets False, and must `record` its result.
        """
        until = self._open_until.get(key)
        if until is None:
            return False
        now = self._clock()
        if now < until:
            return True
        self._open_until[key] = now + self._open_for  # no second try meanwhile, even if this one never ends
        return False

    def record(self, key: Key, *, missed: bool) -> None:
        if missed:
            self._missed[key] = self._missed.get(key, 0) + 1
            if 0 < self._failures <= self._missed[key]:
                self._open_until[key] = self._clock() + self._open_for
        elif key in self._missed:
            del self._missed[key]
            self._open_until.pop(key, None)
