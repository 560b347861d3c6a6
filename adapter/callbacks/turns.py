"""
Lets shoppers through a crowd of notifications: so many of them a turn of the event loop, and the rest in the next.

Without it a hook that comes while 64 notifications are ready waits for all of them. Whoever waits here waits in order;
nothing is refused and nobody is asked twice.
"""

import asyncio
from collections import deque

MOST_A_TURN = 4


class Turns:
    """`taken` returns when its caller's turn has come. Use from one event loop."""

    def __init__(self, most: int = MOST_A_TURN) -> None:
        self._most = most
        self._left = most
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_due = False

    async def taken(self) -> None:
        if self._left:
            self._left -= 1
            self._next_turn()
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        self._next_turn()
        await turn

    def _next_turn(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._is_due = False
        self._left = self._most
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its caller has gone
                self._left -= 1
                turn.set_result(None)
        if self._waiting:
            self._next_turn()
