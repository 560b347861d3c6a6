"""Runs of a function that callers with the same key share, such as reads of one order.

A caller never gets the result of a run that started before it asked. So a change that was made before the call is
always seen, and no result is kept.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SharedRuns(Generic[K, T]):
    """Runs of a function, at most `at_once` for each key at a time.

    Callers that wait share the next run.

    Args:
        run: Called with the key, and the time that it may take, or None if its callers watch the time.
    """

    def __init__(self, run: Callable[[K, timedelta | None], Coroutine[Any, Any, T]], *, at_once: int) -> None:
        self._run = run
        self._at_once = at_once
        self._lines: dict[K, _Line[T]] = {}  # of the keys with a run

    async def get(self, key: K, within: timedelta | None = None) -> T:
        """Return the result of a run that starts now or later, or raise its error.

        Raises:
            TimeoutError: The caller had to wait, and its run has not ended `within` this time.
        """
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        if line.running < self._at_once:
            line.running += 1
            try:
                return await self._run(key, within)
            finally:
                self._ended(key, line)
        return await self._next(line, within)

    async def _next(self, line: "_Line[T]", within: timedelta | None) -> T:
        shared = line.next
        if shared is None:
            shared = line.next = _Shared(asyncio.get_running_loop().create_future())
        shared.callers += 1
        try:
            await asyncio.wait((shared.result,), timeout=None if within is None else within.total_seconds())
            if not shared.result.done():
                raise TimeoutError
            return shared.result.result()
        finally:
            shared.callers -= 1
            if shared.callers == 0:
                if shared.task is not None:
                    shared.task.cancel()  # nothing, if it has ended
                elif line.next is shared:
                    line.next = None

    def _ended(self, key: K, line: "_Line[T]") -> None:
        line.running -= 1
        if (shared := line.next) is not None:
            line.next = None  # a caller that comes from now on waits for another run
            line.running += 1
            shared.task = asyncio.get_running_loop().create_task(self._run(key, None))
            # Not in the task itself: one that is cancelled before it begins runs nothing.
            shared.task.add_done_callback(partial(self._shared_ended, key, line, shared))
        elif line.running == 0:
            del self._lines[key]

    def _shared_ended(self, key: K, line: "_Line[T]", shared: "_Shared[T]", task: "asyncio.Task[T]") -> None:
        if task.cancelled():
            shared.result.cancel()
        elif (error := task.exception()) is not None:
            shared.result.set_exception(error)
            shared.result.exception()  # marks it as retrieved: perhaps no caller is left
        else:
            shared.result.set_result(task.result())
        self._ended(key, line)


class _Line(Generic[T]):
    """The runs of one key."""

    __slots__ = ("next", "running")

    def __init__(self) -> None:
        self.running = 0
        self.next: _Shared[T] | None = None  # only while as many run as may


class _Shared(Generic[T]):
    """A run that several callers share, and that starts later than they asked."""

    __slots__ = ("callers", "result", "task")

    def __init__(self, result: "asyncio.Future[T]") -> None:
        self.result = result
        self.callers = 0
        self.task: asyncio.Task[T] | None = None  # None until it starts
