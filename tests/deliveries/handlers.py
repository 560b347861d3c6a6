"""Handlers that do what a test wants, and remember their calls."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler, Skip
from tests import PATIENCE

Step = Done | Skip | BaseException | Callable[[Notification, Context[NoSettings]], Awaitable[Any]] | None


class Plain(NotificationHandler[NoSettings]):
    """Takes one step for each call, and after the last one is done.

    Its steps stand for requests that the service does not see.
    """

    other_clients = True

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.calls: list[str] = []
        self.seen: list[tuple[Notification, Context[NoSettings]]] = []
        self.threads: list[int] = []
        self._begun = threading.Event()

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        return await self._step("deliver", notification, context)  # type: ignore[no-any-return]

    async def _step(self, kind: str, notification: Notification, context: Context[NoSettings]) -> Any:
        self.calls.append(kind)
        self.seen.append((notification, context))
        self.threads.append(threading.get_ident())
        self._begun.set()
        step = self.steps.pop(0) if self.steps else Done()
        if isinstance(step, BaseException):
            raise step
        return await step(notification, context) if callable(step) else step

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, PATIENCE)


class LooksUp(Plain):
    async def lookup(self, notification: Notification, context: Context[NoSettings]) -> Done | None:
        return await self._step("lookup", notification, context)  # type: ignore[no-any-return]


class Repeatable(Plain):
    repeatable = True


async def wait_forever(*_: Any) -> Done:
    await asyncio.Event().wait()
    raise AssertionError


class Blocks:
    """A step that blocks its thread until the test lets it go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self._begun = threading.Event()
        self._threads: list[threading.Thread] = []

    async def __call__(self, *_: Any) -> Done:
        self._threads.append(threading.current_thread())
        self._begun.set()
        self.go_on.wait(PATIENCE)
        return Done("late")

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, PATIENCE)

    async def ends(self) -> None:
        """Let it go on, and wait until its abandoned loop has ended with everything on it."""
        self.go_on.set()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, PATIENCE)
            assert not thread.is_alive()


class Counting(NotificationHandler[NoSettings]):
    """Keeps every call waiting until `go_on`, and counts how many run at the same time."""

    other_clients = True

    def __init__(self) -> None:
        self.running = self.peak = 0
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        self.running += 1
        self.peak = max(self.peak, self.running)
        self.entered.release()
        try:
            await asyncio.to_thread(self.go_on.wait, PATIENCE)
        finally:
            self.running -= 1
        return Done()

    async def has_begun(self, times: int) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE)
