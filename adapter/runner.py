"""
Runs a handler under its deadline, on one of the plugins' own event loops.

There are two such loops, each in a thread of its own: one for answers, one for deliveries. A handler that blocks its
thread delays other plugins of its kind, never the intake, a `no_answer` or a shutdown. What a reader would get wrong:
a deadline that has passed does not mean that the handler has stopped. Python cannot interrupt a thread, so a `Run`
tells the two apart: `result` gives up at the deadline, `ended` waits until the coroutine is really over.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, NoReturn, TypeVar

import httpx
import structlog

from adapter.norce.client import Norce
from adapter.outgoing import Outgoing
from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    Notification,
    NotificationHandler,
    Order,
    Orders,
    Previous,
    Problem,
    Settings,
    Skip,
    ValidationHandler,
)

T = TypeVar("T")
Clock = Callable[[], datetime]


class DeadlinePassed(Exception):
    """The handler had not ended at its deadline. It may still be running."""


@dataclass(frozen=True, slots=True)
class _End(Generic[T]):
    value: T | None = None
    error: BaseException | None = None


class Run(Generic[T]):
    """One call of a handler, seen from the loop that asked for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> None:
        self._caller = asyncio.get_running_loop()
        self._loop = loop
        self._end: asyncio.Future[_End[T]] = self._caller.create_future()
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin, coroutine)

    async def result(self, within: timedelta) -> T:
        """What the handler returned or raised. Raises `DeadlinePassed` where it is still running after `within`."""
        await asyncio.wait((self._end,), timeout=max(within.total_seconds(), 0))
        if not self._end.done():
            raise DeadlinePassed
        return self._outcome()

    async def ended(self) -> T:
        """What it returned or raised, however long it takes; `asyncio.CancelledError` where it was cancelled."""
        await asyncio.wait((self._end,))
        return self._outcome()

    def cancel(self) -> None:
        """Asks the coroutine to stop at its next await; one that blocks its thread hears of it when it lets go."""
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def _outcome(self) -> T:
        end = self._end.result()
        if end.error is not None:
            raise end.error
        return end.value  # type: ignore[return-value]

    # --- on the plugins' loop ---

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(coroutine)
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            end: _End[T] = _End(error=asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            end = _End(error=error)
        else:
            end = _End(value=task.result())
        try:
            self._caller.call_soon_threadsafe(self._tell, end)
        except RuntimeError:  # the caller's loop has been closed: nobody is waiting any more
            return

    def _tell(self, end: _End[T]) -> None:
        if not self._end.done():
            self._end.set_result(end)


class PluginLoop:
    """An event loop in a daemon thread: a handler that never returns does not keep the process alive."""

    def __init__(self, name: str, make_norce: Callable[[], Norce], make_outgoing: Callable[[], Outgoing]) -> None:
        self.loop = asyncio.new_event_loop()
        self.norce = make_norce()
        self.outgoing = make_outgoing()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Run[T]:
        return Run(self.loop, coroutine)

    async def stop(self, within: timedelta) -> bool:
        """Closes the connections and ends the thread; False where a handler holds it."""
        run = self.run(self._close())
        try:
            await run.result(within)
        except DeadlinePassed:
            return False
        self.loop.call_soon_threadsafe(self.loop.stop)
        await asyncio.to_thread(self._thread.join, 1.0)
        return not self._thread.is_alive()

    async def _close(self) -> None:
        await self.norce.aclose()
        await self.outgoing.aclose()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a context is made of, apart from the loop that it will live on."""

    route: str
    settings: Settings
    merchant: str
    channel: str
    order_id: str
    identity: str
    deadline: datetime
    first_attempt_at: datetime
    attempt: int = 1
    previous: Previous | None = None


class Runner:
    """The plugins' loops. Make it on the service's own loop; `stop` when done."""

    def __init__(
        self,
        *,
        make_norce: Callable[[], Norce],
        make_outgoing: Callable[[], Outgoing] = Outgoing,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._answers = PluginLoop("plugins-answers", make_norce, make_outgoing)
        self._deliveries = PluginLoop("plugins-deliveries", make_norce, make_outgoing)
        # For handlers that compute: one for all calls, for making a client costs more than a small rule.
        self._nothing_outside: tuple[httpx.AsyncClient, Orders] = (
            httpx.AsyncClient(transport=_NoNetwork()),
            _NoOrders(),
        )

    def deliver(self, handler: NotificationHandler[Any], notification: Notification, call: Call) -> Run[Done | Skip]:
        """Starts `deliver` on the deliveries' loop."""
        context = self._context(self._deliveries, call)
        return self._deliveries.run(_called(lambda: handler.deliver(notification, context)))

    def lookup(self, handler: NotificationHandler[Any], notification: Notification, call: Call) -> Run[Done | None]:
        """Starts `lookup` on the deliveries' loop."""
        context = self._context(self._deliveries, call)
        return self._deliveries.run(_called(lambda: handler.lookup(notification, context)))

    async def validate(self, handler: ValidationHandler[Any], order: Order, call: Call) -> list[Problem]:
        """
        What a validation handler says: run in place where it computes, else on the answers' loop.

        Raises what the handler raises. The caller keeps the deadline: a hop may not come back in time.
        """
        context = self._context(None if handler.computes else self._answers, call)
        called = _called(lambda: handler.validate(order, context))
        if handler.computes:
            return await called
        run = self._answers.run(called)
        try:
            return await run.ended()
        except asyncio.CancelledError:
            run.cancel()
            raise

    async def stop(self, within: timedelta) -> None:
        """Ends both loops. A thread that a handler blocks is left behind, for the process to take with it."""
        await asyncio.gather(self._answers.stop(within), self._deliveries.stop(within))

    def _context(self, loop: PluginLoop | None, call: Call) -> Context[Any]:
        log = structlog.get_logger("plugin", route=call.route, order_id=call.order_id, attempt=call.attempt)
        http, orders = self._nothing_outside
        if loop is not None:
            http = loop.outgoing.client(call.settings, call.deadline, self._clock)
            orders = loop.norce.for_handlers(call.merchant, call.channel)
        return Context(
            settings=call.settings,
            log=log,
            http=http,
            orders=orders,
            clock=self._clock,
            identity=call.identity,
            route=call.route,
            deadline=call.deadline,
            attempt=call.attempt,
            first_attempt_at=call.first_attempt_at,
            previous=call.previous,
        )


async def _called(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """
    One call of a plugin's method, made where it is to run: one that is no coroutine must not block the service's loop.

    A plugin that tries to end the process would end the loop for all of them; that is a bug of its own alone.
    """
    try:
        return await call()
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError("the handler tried to end the process") from error


class _NoNetwork(httpx.AsyncBaseTransport):
    async def handle_async_request(self, _request: httpx.Request) -> NoReturn:
        raise Misconfigured("computes-only", "a handler that declares computes may not call anybody")


class _NoOrders:
    async def read(self, _order_id: str) -> NoReturn:
        raise Misconfigured("computes-only", "a handler that declares computes may not call anybody")
