"""The circuit breaker of validation and hook routes."""

import time
from collections.abc import Callable
from datetime import timedelta

from adapter.identifiers import Channel

Key = tuple[str, Channel]  # a route and the channel that it is asked for


class CircuitBreaker:
    """A circuit breaker for each route and channel.

    It opens when more than half of the last `orders` different orders missed their deadline.

    While it is open the route is not asked. After `open_for` one call tries the route again, for an order that has not
    missed; the others wait for its result or for another `open_for`. So a single order can neither open it nor keep it
    open. The state is in memory, for this process alone. With 0 `orders` it never opens.
    """

    def __init__(self, *, orders: int, open_for: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._orders = orders
        self._open_for = open_for.total_seconds()
        self._clock = clock
        self._last: dict[Key, dict[str, bool]] = {}  # the last orders, the oldest first, and whether each missed
        self._open_until: dict[Key, float] = {}

    def is_open(self, key: Key, order_id: str) -> bool:
        """Return True if the route must not be asked now.

        After `open_for` the first caller gets False, and must `record` its result.
        """
        until = self._open_until.get(key)
        if until is None:
            return False
        now = self._clock()
        if now < until or self._last[key].get(order_id):
            return True
        self._open_until[key] = now + self._open_for  # no second try meanwhile, even if this one never ends
        return False

    def record(self, key: Key, order_id: str, *, missed: bool) -> None:
        """Record whether the route missed the deadline. The last result of an order counts."""
        last = self._last.setdefault(key, {})
        if not missed and self._open_until.pop(key, None) is not None:
            last.clear()
        last.pop(order_id, None)
        last[order_id] = missed
        if len(last) > self._orders:
            del last[next(iter(last))]
        if missed and 2 * sum(last.values()) > self._orders > 0:
            self._open_until[key] = self._clock() + self._open_for
