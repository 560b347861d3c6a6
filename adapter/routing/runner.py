"""
Runs a handler under its deadline, on one of the plugins' own event loops.

Each has a thread of its own: one for answers, one for deliveries, and one for shadows where there are any. A handler
that blocks its thread delays other plugins of its kind, never the intake, a `no_answer` or a shutdown. One that only
computes is called in place, which costs less than a hop; it may not wait for anything. What a reader would get wrong:
a deadline that has passed does not mean that the handler has stopped. Python cannot interrupt a thread, so a `Run`
tells the two apart: `result` gives up at the deadline, `ended` waits until the coroutine is really over. A loop that is
held far past a deadline is abandoned and replaced: its runs end with `LoopAbandoned`, whatever their thread still does.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, NoReturn, TypeVar

import httpx
import msgspec
import structlog

from adapter.identifiers import Channel
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
    Settings,
    Skip,
)

log = structlog.get_logger(__name__)

STUBBORN_SECONDS = 0.5  # for what does not end though it was cancelled
ANSWERS_PATIENCE = timedelta(seconds=2)  # the answers behind it are late as long as it lasts

T = TypeVar("T")
Clock = Callable[[], datetime]
Asking = Callable[[Order, Context[Any]], Coroutine[Any, Any, T]]  # a handler's `validate` or `change`


class DeadlinePassed(Exception):
    """The handler had not ended at its deadline. It may still be running."""


class LoopAbandoned(Exception):
    """
    The loop was given up, for the run `blocked_by` (None where something else holds it) does not let go of it. A
    coroutine that had not `begun` by then never will.
    """

    def __init__(self, blocked_by: "Run[Any] | None", *, begun: bool) -> None:
        super().__init__("the plugins' loop was abandoned")
        self.blocked_by = blocked_by
        self.begun = begun


class HandlerWaits(Exception):
    """A handler that declares that it computes waited for something. Take `computes` away, or the waiting."""


@dataclass(frozen=True, slots=True)
class _End(Generic[T]):
    value: T | None = None
    error: BaseException | None = None


class Run(Generic[T]):
    """
    One call of a handler, seen from the loop that asked for it. `name` is its route; `begun` says whether the handler
    has been called. Moments are monotonic; `ended_at` is when it ended in its own thread, whenever that is told.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], *, name: str, deadline: float
    ) -> None:
        self.name = name
        self.deadline = deadline
        self.begun = False
        self.abandoned = False
        self.made_at = time.monotonic()
        self.ended_at = float("inf")
        self._caller = asyncio.get_running_loop()
        self._loop = loop
        self.ending: asyncio.Future[_End[T]] = self._caller.create_future()
        self._is_over = False
        self._when_over: list[Callable[[], None]] = []
        self.task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin, coroutine)

    async def result(self, within: timedelta) -> T:
        """
        What the handler returned or raised. Raises `DeadlinePassed` where it is still running after `within`, and
        `LoopAbandoned`.
        """
        await asyncio.wait((self.ending,), timeout=max(within.total_seconds(), 0))
        if not self.ending.done():
            raise DeadlinePassed
        return self.outcome()

    async def ended(self) -> T:
        """
        What it returned or raised, however long it takes; `asyncio.CancelledError` where it was cancelled. Raises
        `LoopAbandoned`.
        """
        await asyncio.wait((self.ending,))
        return self.outcome()

    @property
    def was_cancelled(self) -> bool:
        return self.ending.done() and isinstance(self.ending.result().error, asyncio.CancelledError)

    def outcome(self) -> T:
        """The same, once `ending` is done."""
        end = self.ending.result()
        if end.error is not None:
            raise end.error
        return end.value  # type: ignore[return-value]

    async def over(self) -> None:
        """Returns when the coroutine has really ended, abandoned or not."""
        if not self._is_over:
            over = asyncio.Event()
            self.when_over(over.set)
            await over.wait()

    def cancel(self) -> None:
        """Asks the coroutine to stop at its next await; one that blocks its thread hears of it when it lets go."""
        self._loop.call_soon_threadsafe(lambda: self.task and self.task.cancel())

    def abandon(self, blocked_by: "Run[Any] | None") -> None:
        """Nobody waits for it any more; should it ever go on, it is cancelled before it does anything more."""
        self.abandoned = True
        begun = self.begun
        self.cancel()
        if not self.ending.done():
            self.ended_at = time.monotonic()
            self.ending.set_result(_End(error=LoopAbandoned(blocked_by, begun=begun)))

    def when_over(self, told: Callable[[], None]) -> None:
        self._when_over.append(told)

    # --- on the plugins' loop ---

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.task = self._loop.create_task(_Steps(self, coroutine))
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        ended_at = time.monotonic()
        if task.cancelled():
            end: _End[T] = _End(error=asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            end = _End(error=error)
        else:
            end = _End(value=task.result())
        try:
            self._caller.call_soon_threadsafe(self._tell, end, ended_at)
        except RuntimeError:  # the caller's loop has been closed: nobody is waiting any more
            return

    def _tell(self, end: _End[T], ended_at: float) -> None:
        self._is_over = True
        if not self.ending.done():
            self.ended_at = ended_at
            self.ending.set_result(end)
        for told in self._when_over:
            told()


class _Steps(Coroutine[Any, Any, T]):
    """
    A run's coroutine, which looks before every step whether the run has been abandoned: to be told by the loop would be
    too late for what is ready to go on when the thread lets go.
    """

    def __init__(self, run: Run[T], coroutine: Coroutine[Any, Any, T]) -> None:
        self._run = run
        self._coroutine = coroutine
        self._told = False

    def send(self, value: Any) -> Any:
        self._run.begun = True  # before it is looked: `abandon` does it the other way round
        if self._run.abandoned and not self._told:
            return self.throw(asyncio.CancelledError())
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        self._told = self._run.abandoned
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._coroutine.__await__()


class PluginLoop:
    """An event loop in a daemon thread: a handler that never returns does not keep the process alive."""

    def __init__(self, name: str, make_norce: Callable[[], Norce], make_outgoing: Callable[[], Outgoing]) -> None:
        self.name = name
        self.loop = asyncio.new_event_loop()
        self.norce = make_norce()
        self.outgoing = make_outgoing()
        self._runs: set[Run[Any]] = set()
        self._asked_at: float | None = None  # when it was asked for a sign of life that has not come yet
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], *, name: str = "", within: timedelta = timedelta.max) -> Run[T]:
        run = Run(self.loop, coroutine, name=name, deadline=time.monotonic() + within.total_seconds())
        self._runs.add(run)
        run.when_over(lambda: self._runs.discard(run))
        return run

    def is_held(self, patience: timedelta) -> bool:
        """
        Whether the loop has shown no sign of life for so long, and the run that has it is as far past its deadline.
        Asks for the next sign.
        """
        now, asked_at = time.monotonic(), self._asked_at
        if asked_at is None:
            self._asked_at = now
            self.loop.call_soon_threadsafe(self._alive)
            return False
        holding = self.holding()
        late_since = asked_at if holding is None else max(asked_at, holding.deadline)
        return now - late_since > patience.total_seconds()

    def holding(self) -> Run[Any] | None:
        """The run that the thread is in at this moment."""
        task = asyncio.current_task(self.loop)
        return next((run for run in self._runs if task is not None and run.task is task), None)

    def abandon(self) -> Run[Any] | None:
        """Gives the loop up with all its runs; answers the one that holds it. Its thread ends when that lets go."""
        holding = self.holding()
        for run in tuple(self._runs):
            run.abandon(holding)
        asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        return holding

    async def stop(self, within: timedelta) -> bool:
        """Cancels what still runs, closes the connections and ends the thread; False where a handler holds it."""
        run = self.run(self._stop())
        try:
            await run.result(within)
        except DeadlinePassed:
            return False
        self.loop.call_soon_threadsafe(self.loop.stop)
        await asyncio.to_thread(self._thread.join, 1.0)
        return not self._thread.is_alive()

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=STUBBORN_SECONDS)
        await self._close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=5)
        await self._close()
        self.loop.stop()

    async def _close(self) -> None:
        await self.norce.aclose()
        await self.outgoing.aclose()

    def _alive(self) -> None:
        self._asked_at = None

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()


class Call(msgspec.Struct, frozen=True, kw_only=True):
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
    """
    The plugins' loops. Make it on the service's own loop; `stop` when done. `patience` is how long a handler may hold
    its loop past its deadline, that of answers at most `ANSWERS_PATIENCE`; `replaced` is told which loop was then
    replaced, and the route that held it.
    """

    def __init__(
        self,
        *,
        make_norce: Callable[[], Norce],
        make_outgoing: Callable[[], Outgoing] = Outgoing,
        clock: Clock,
        patience: timedelta = timedelta(seconds=10),
        replaced: Callable[[str, str], None] = lambda _loop, _route: None,
    ) -> None:
        self._clock = clock
        self._patience = patience
        self._replaced = replaced
        self._make_norce = make_norce
        self._make_outgoing = make_outgoing
        self._loops: dict[str, PluginLoop] = {}
        for name in ("answers", "deliveries"):
            self.open(name)
        # For handlers that compute: one for all calls, for making a client costs more than a small rule.
        self._nothing_outside: tuple[httpx.AsyncClient, Orders] = (
            httpx.AsyncClient(transport=_NoNetwork()),
            _NoOrders(),
        )

    def open(self, name: str) -> None:
        """A loop of this name, in place of the one that there may be. Shadows have one where somebody opens it."""
        self._loops[name] = PluginLoop(f"plugins-{name}", self._make_norce, self._make_outgoing)

    async def watch(self, every: timedelta = timedelta(seconds=1)) -> None:
        """Replaces a loop that a handler holds far past its deadline; until cancelled."""
        while True:
            await asyncio.sleep(every.total_seconds())
            for name, loop in self._loops.items():
                if loop.is_held(min(self._patience, ANSWERS_PATIENCE) if name == "answers" else self._patience):
                    self._replace(name, loop)

    def _replace(self, name: str, held: PluginLoop) -> None:
        route = getattr(held.abandon(), "name", "unknown")
        log.error("plugins_loop_replaced", loop=held.name, route=route)
        self._replaced(held.name, route)
        self.open(name)

    def deliver(self, handler: NotificationHandler[Any], notification: Notification, call: Call) -> Run[Done | Skip]:
        """Starts `deliver` on the deliveries' loop."""
        loop = self._loops["deliveries"]
        context = self._context(loop, call)
        return loop.run(
            _called(lambda: handler.deliver(notification, context)), name=call.route, within=self._left(call)
        )

    def lookup(self, handler: NotificationHandler[Any], notification: Notification, call: Call) -> Run[Done | None]:
        """Starts `lookup` on the deliveries' loop."""
        loop = self._loops["deliveries"]
        context = self._context(loop, call)
        return loop.run(
            _called(lambda: handler.lookup(notification, context)), name=call.route, within=self._left(call)
        )

    def compute(self, ask: Asking[T], order: Order, call: Call) -> T:
        """
        What a handler that computes answers, in place. Raises what it raises, and `HandlerWaits`.
        """
        try:
            coroutine = ask(order, self._context(None, call))
            coroutine.send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError("the handler tried to end the process") from error
        coroutine.close()
        raise HandlerWaits("the handler declares that it computes, and waits")

    def ask(self, ask: Asking[T], order: Order, call: Call, *, computes: bool = False, shadow: bool = False) -> Run[T]:
        """Starts the same on the answers' loop, or on that of shadows; a handler that computes gets nothing more."""
        loop = self._loops["shadows" if shadow else "answers"]
        context = self._context(None if computes else loop, call)
        return loop.run(_called(lambda: ask(order, context)), name=call.route, within=self._left(call))

    def holding_answers(self) -> Run[Any] | None:
        """The run that the answers' thread is in at this moment: one that does not let go of it blocks all others."""
        return self._loops["answers"].holding()

    async def stop(self, within: timedelta) -> None:
        """Ends all loops. A thread that a handler blocks is left behind, for the process to take with it."""
        await asyncio.gather(*(loop.stop(within) for loop in self._loops.values()))

    def _left(self, call: Call) -> timedelta:
        return call.deadline - self._clock()

    def _context(self, loop: PluginLoop | None, call: Call) -> Context[Any]:
        log = structlog.get_logger("plugin", route=call.route, order_id=call.order_id, attempt=call.attempt)
        http, orders = self._nothing_outside
        if loop is not None:
            http = loop.outgoing.client(call.settings, call.deadline, self._clock)
            orders = loop.norce.for_handlers(Channel(call.merchant, call.channel))
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
    async def call(self, *_: Any, **__: Any) -> NoReturn:
        raise Misconfigured("computes-only", "a handler that declares computes may not call anybody")

    read = set_reference = set_attributes = call
