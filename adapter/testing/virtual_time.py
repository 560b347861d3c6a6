"""An event loop whose time moves only when nothing else is left to do.

It then moves as far as the next timer. Threads of executors and sockets need real time: while one is in use, time
passes as usual.
"""

import asyncio
import selectors
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """The event loop. `now` is its time, in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.threads_at_work = 0  # of executors
        self._strangers = {*threading.enumerate()}
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, *arguments: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        future = super().run_in_executor(*arguments)
        self.threads_at_work += 1
        future.add_done_callback(self._end_thread)
        return future

    @property
    def needs_real_time(self) -> bool:
        """True while a thread of an executor or of `context.thread` works."""
        of_routes = (each for each in threading.enumerate() if is_of_route(each) and each not in self._strangers)
        return self.threads_at_work > 0 or any(of_routes)

    def _end_thread(self, _future: object) -> None:
        self.threads_at_work -= 1


def is_of_route(thread: threading.Thread) -> bool:
    """Return whether `context.thread` started a thread."""
    return thread.name.startswith("route-")


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self._loop.needs_real_time or len(self.get_map()) > 1:  # one socket is the loop's own
            began = time.monotonic()
            ready = super().select(timeout)
            self._loop.now += time.monotonic() - began
        else:
            assert timeout is not None, "everything waits, and no timer is left"
            self._loop.now += timeout
        return ready


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run work that waits for nothing outside its loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
