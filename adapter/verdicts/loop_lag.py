"""The lateness of the event loop that answers callbacks."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

TICK_SECONDS = 0.05


class LoopLag:
    """The time by which an event loop was late, in all since it is watched.

    A verdict that is missing after the loop was late says nothing about its handler or about Norce: the process was
    too busy to ask them in time.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._total = 0.0
        self._due = math.inf

    def seconds(self) -> float:
        """Return the lateness until now. It never falls."""
        return self._total + max(self._clock() - self._due, 0.0)

    async def watch(self) -> None:
        """Measure the running loop, for ever."""
        while True:
            self._due = self._clock() + TICK_SECONDS
            await self._sleep(TICK_SECONDS)
            self._total = self.seconds()
