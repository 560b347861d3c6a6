"""The runner: runs handlers under a deadline, on the plugins' event loops.

One loop runs answers (validations and hooks), one runs deliveries, and one runs shadows if there are any. Each has its
own thread. A handler that blocks its thread delays other handlers of its kind, but never the intake, a `no_answer` or a
shutdown. A handler that only computes is called on the service's loop, which costs less than a change of thread.

A deadline that has passed does not mean that the handler has stopped: Python cannot interrupt a thread. `Run.wait`
gives up at the deadline, and `Run.stopped` is set when the coroutine has really ended. A loop that is blocked far past
a deadline is abandoned and replaced. Its runs then end with `LoopAbandoned`, even if their thread still runs.
"""

import asyncio
import contextlib
import contextvars
import socket
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Generic, Literal, NoReturn, ParamSpec, TypeVar

import httpx
import structlog

from adapter.identifiers import Channel
from adapter.logs import HandlerLog
from adapter.norce.client import Norce
from adapter.oauth2 import AccessTokens, TokenStore
from adapter.outgoing import MAX_ANSWER_BYTES, Outgoing, Traffic
from adapter.plugin import Context, InThread, Misconfigured, OAuth2, Orders, Previous, Retry, Settings

log = structlog.get_logger(__name__)

CLOSING_TIME = timedelta(milliseconds=500)  # for tasks that do not end although they were cancelled
ABANDONED_CLOSING_TIME = timedelta(seconds=5)
ANSWERS_PATIENCE = timedelta(seconds=2)  # while the answers' loop is blocked, every answer on it is late

RESOLVER_THREADS = 16

P = ParamSpec("P")
T = TypeVar("T")
Handle = Callable[[Context[Any]], Coroutine[Any, Any, T]]  # one call of a handler, given its context
LoopName = Literal["answers", "deliveries", "shadows"]


class DeadlinePassed(Exception):
    """The handler had not ended at its deadline. It may still be running."""


class LoopAbandoned(Exception):
    """The loop of this run was abandoned because something blocks it.

    `blocked_by` is the run that blocks it, or None if it is not a run (a task that a plugin started, for example).
    If the coroutine had not `begun`, it never will.
    """

    def __init__(self, blocked_by: "Run[Any] | None", *, begun: bool) -> None:
        super().__init__("the plugins' loop was abandoned")
        self.blocked_by = blocked_by
        self.begun = begun


class HandlerWaits(Exception):
    """A handler declares `computes` but waits. Remove one of these."""


class Run(Generic[T]):
    """One call of a handler. Its caller, on another loop, waits for it and may cancel it.

    `name` is the handler's route. `ended` is done when the result is known: the coroutine has ended, or its loop was
    abandoned. `stopped` is set when the coroutine has really ended. All times are monotonic seconds.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T],
        *,
        name: str,
        deadline: float,
        runs: "set[Run[Any]]",
    ) -> None:
        self.name = name
        self.deadline = deadline
        self.begun = False  # the handler has been called
        self.abandoned = False
        self.started_at = time.monotonic()
        self.ended_at = float("inf")  # measured in the handler's thread
        self.task: asyncio.Task[T] | None = None
        self._caller = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._caller.create_future()
        self.stopped = asyncio.Event()
        self._error: LoopAbandoned | None = None
        self._loop = loop
        self._runs = runs  # all runs of the loop that have not stopped
        runs.add(self)
        loop.call_soon_threadsafe(self._begin, coroutine)

    async def wait(self, within: timedelta | None = None) -> T:
        """Return what the handler returned, or raise what it raised.

        Raises:
            DeadlinePassed: The handler still runs after `within`.
            LoopAbandoned: Its loop was abandoned.
            asyncio.CancelledError: The run was cancelled.
        """
        await asyncio.wait((self.ended,), timeout=None if within is None else max(within.total_seconds(), 0))
        if not self.ended.done():
            raise DeadlinePassed
        return self.result()

    def result(self) -> T:
        """Return the handler's result or raise its error. Only for a run that has ended."""
        if self._error is not None:
            raise self._error
        assert self.task is not None
        return self.task.result()

    @property
    def was_cancelled(self) -> bool:
        """True if the coroutine ended because it was cancelled."""
        return self.ended.done() and self._error is None and self.task is not None and self.task.cancelled()

    def cancel(self) -> None:
        """Cancel the coroutine at its next await. A blocked thread reaches it later."""
        self._loop.call_soon_threadsafe(lambda: self.task and self.task.cancel())

    def abandon(self, blocked_by: "Run[Any] | None") -> None:
        """End the run for its caller.

        If the coroutine ever continues, it is cancelled before it does anything.
        """
        self.abandoned = True
        begun = self.begun  # read after `abandoned` is set; `_Steps.send` sets `begun`, then reads `abandoned`
        self.cancel()
        self._end(time.monotonic(), LoopAbandoned(blocked_by, begun=begun))

    def _end(self, at: float, error: LoopAbandoned | None = None) -> None:
        if not self.ended.done():
            self.ended_at = at
            self._error = error
            self.ended.set_result(None)

    def _stop(self, at: float) -> None:
        self._runs.discard(self)
        self._end(at)
        self.stopped.set()

    # --- on the plugins' loop ---

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.task = self._loop.create_task(_Steps(self, coroutine))
        self.task.add_done_callback(self._report)

    def _report(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # marks it as retrieved: the caller may never read it
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            self._caller.call_soon_threadsafe(self._stop, time.monotonic())


class _Steps(Coroutine[Any, Any, T]):
    """The coroutine of a run, cancelled before its next step if the run has been abandoned.

    A cancellation through the loop would come too late for a coroutine that is ready to continue when the thread is
    free again.
    """

    def __init__(self, run: Run[T], coroutine: Coroutine[Any, Any, T]) -> None:
        self._run = run
        self._coroutine = coroutine
        self._cancelled = False

    def send(self, value: Any) -> Any:
        self._run.begun = True  # set before `abandoned` is read; `Run.abandon` sets `abandoned`, then reads `begun`
        if self._run.abandoned and not self._cancelled:
            return self.throw(asyncio.CancelledError())
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        self._cancelled = self._run.abandoned
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._coroutine.__await__()


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that resolves names in threads of its own.

    A plugin may keep all threads of `asyncio.to_thread` busy, and then no other plugin could resolve a name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resolver = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="names")

    async def getaddrinfo(self, host: Any, port: Any, **hints: int) -> Any:
        return await self.run_in_executor(self._resolver, partial(socket.getaddrinfo, host, port, **hints))

    def close(self) -> None:
        self._resolver.shutdown(wait=False)
        super().close()


class RouteThreads:
    """The threads of one route on one loop: at most so many at a time.

    They do not keep the process alive, unlike those of an executor of the standard library.
    """

    def __init__(self, route: str, most: int) -> None:
        self._name = f"route-{route}"
        self._free = asyncio.Semaphore(most)

    async def run(self, traffic: Traffic, is_late: Callable[[], bool], call: Callable[[], T]) -> T:
        """Call a function in a thread, as a write that is unanswered until its result is seen."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[T] = loop.create_future()

        def end(error: BaseException | None, result: Any) -> None:
            traffic.threads.discard(ended)
            self._free.release()
            if error is None:
                ended.set_result(result)
            else:
                ended.set_exception(error)
                ended.exception()  # marks it as retrieved: its caller may have been cancelled

        def work() -> None:
            error, result = None, None
            try:
                result = call()
            except BaseException as raised:  # noqa: BLE001 - it is raised to the caller
                error = RuntimeError("StopIteration in a thread") if isinstance(raised, StopIteration) else raised
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(end, error, result)

        try:
            if is_late():
                raise Retry("no-time-left", "the deadline came before the thread was started")
            traffic.begin_write()
        except Retry:
            self._free.release()
            raise
        traffic.threads.add(ended)
        threading.Thread(target=contextvars.copy_context().run, args=(work,), name=self._name, daemon=True).start()
        await asyncio.wait((ended,))  # does not cancel it, if it is cancelled
        traffic.unanswered -= 1
        return ended.result()


class PluginLoop:
    """An event loop in a daemon thread, which does not keep the process alive."""

    def __init__(self, name: str, make_norce: Callable[[], Norce], make_outgoing: Callable[[], Outgoing]) -> None:
        self.name = name
        self.loop = _Loop()
        self.threads: dict[str, RouteThreads] = {}  # by route
        self.norce = make_norce()
        self.outgoing = make_outgoing()
        self._runs: set[Run[Any]] = set()
        self._pinged_at: float | None = None  # None if the last ping was answered
        self._thread = threading.Thread(target=self._run_loop, name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str = "", within: timedelta = timedelta.max) -> Run[T]:
        deadline = time.monotonic() + within.total_seconds()
        return Run(self.loop, coroutine, name=name, deadline=deadline, runs=self._runs)

    def is_blocked(self, patience: timedelta) -> bool:
        """Return True if the loop has not answered its last ping for `patience`.

        The run that occupies the loop must be past its deadline by `patience`, too. Sends a ping if none is under way.
        """
        now, pinged_at = time.monotonic(), self._pinged_at
        if pinged_at is None:
            self._pinged_at = now
            self.loop.call_soon_threadsafe(self._pong)
            return False
        current = self.current_run()
        blocked_since = pinged_at if current is None else max(pinged_at, current.deadline)
        return now - blocked_since > patience.total_seconds()

    def current_run(self) -> Run[Any] | None:
        """Return the run that the thread executes at this moment."""
        task = asyncio.current_task(self.loop)
        return next((run for run in self._runs if task is not None and run.task is task), None)

    def abandon(self) -> Run[Any] | None:
        """Abandon the loop with all its runs and return the run that blocks it.

        The thread ends when that run no longer blocks it.
        """
        current = self.current_run()
        for run in tuple(self._runs):
            run.abandon(current)
        asyncio.run_coroutine_threadsafe(self._close(ABANDONED_CLOSING_TIME), self.loop)
        return current

    async def stop(self, within: timedelta) -> bool:
        """Cancel all runs, close the connections and end the thread.

        Returns False if a handler blocks the thread.
        """
        run = self.start(self._cancel_all())
        try:
            await run.wait(within)
        except DeadlinePassed:
            return False
        self.loop.call_soon_threadsafe(self.loop.stop)
        await asyncio.to_thread(self._thread.join, 1.0)
        return not self._thread.is_alive()

    # --- on the plugins' loop ---

    async def _cancel_all(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self._close_connections(CLOSING_TIME)

    async def _close(self, within: timedelta) -> None:
        await self._close_connections(within)
        self.loop.stop()

    async def _close_connections(self, within: timedelta) -> None:
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=within.total_seconds())
        await self.norce.aclose()
        await self.outgoing.aclose()

    def _pong(self) -> None:
        self._pinged_at = None

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()


class Runner:
    """The plugins' loops. Create it on the service's own loop, and call `stop` at the end.

    Args:
        make_norce: Creates a client for Norce, for one loop.
        make_outgoing: Creates the connections of `context.http`, for one loop.
        clock: Returns the time that the deadlines refer to.
        tokens: The tokens of OAuth2 that all nodes share.
        patience: How long a handler may block its loop past its deadline; for answers at most `ANSWERS_PATIENCE`.
        replaced: Called with the name of a loop that was replaced and the route that blocked it.
    """

    def __init__(
        self,
        *,
        make_norce: Callable[[], Norce],
        make_outgoing: Callable[[], Outgoing] = Outgoing,
        clock: Callable[[], datetime],
        tokens: TokenStore | None = None,
        patience: timedelta = timedelta(seconds=10),
        replaced: Callable[[str, str], None] = lambda _loop, _route: None,
    ) -> None:
        self._clock = clock
        self._patience = patience
        self._replaced = replaced
        self._make_norce = make_norce
        self._make_outgoing = make_outgoing
        self._tokens = AccessTokens(tokens, make_outgoing, clock)
        self._loops: dict[LoopName, PluginLoop] = {}
        self.open("answers")
        self.open("deliveries")
        # Shared by all handlers that compute: creating a client costs more than a small rule.
        self._no_network = httpx.AsyncClient(transport=_NoNetwork())

    def open(self, name: LoopName) -> None:
        """Open a loop, which replaces an earlier one of this name.

        The loop for shadows is opened only if a route needs it.
        """
        self._loops[name] = PluginLoop(f"plugins-{name}", self._make_norce, self._make_outgoing)

    async def watch(self, every: timedelta = timedelta(seconds=1)) -> None:
        """Until cancelled, replace each loop that a handler blocks far past its deadline."""
        while True:
            await asyncio.sleep(every.total_seconds())
            for name, loop in self._loops.items():
                if loop.is_blocked(min(self._patience, ANSWERS_PATIENCE) if name == "answers" else self._patience):
                    self._replace(name, loop)

    def _replace(self, name: LoopName, blocked: PluginLoop) -> None:
        route = getattr(blocked.abandon(), "name", "unknown")
        log.error("plugins_loop_replaced", loop=blocked.name, route=route)
        self._replaced(blocked.name, route)
        self.open(name)

    def context(
        self,
        on: LoopName | None,
        *,
        route: str,
        settings: Settings,
        channel: Channel,
        order_id: str,
        identity: str,
        deadline: datetime,
        first_attempt_at: datetime,
        attempt: int = 1,
        previous: Previous | None = None,
        is_resend: bool = False,
        traffic: Traffic | None = None,
        concurrency: int = 8,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        log_fields: Collection[str] = (),
    ) -> Context[Any]:
        """Build the context of a call on a loop. With None, the handler only computes.

        Its clients count what they send in `traffic`. The caller chooses the `deadline`: `deliveries.attempt` by the
        route, `verdicts.verdicts` by the callback.
        """
        http: httpx.AsyncClient = self._no_network
        orders: Orders = _NO_ORDERS
        in_thread: InThread = _no_thread
        auth_by: Callable[[OAuth2], httpx.Auth] | None = None
        if on is not None:
            traffic = traffic or Traffic()
            http = self._loops[on].outgoing.client(
                settings, deadline, self._clock, traffic, max_answer_bytes=max_answer_bytes
            )
            orders = self._loops[on].norce.for_handlers(channel, traffic)
            auth_by = partial(self._tokens.auth, channel.merchant, settings)
            threads = self._loops[on].threads.setdefault(route, RouteThreads(route, concurrency))
            in_thread = _in_thread(threads, traffic, lambda: self._clock() >= deadline)
        return Context(
            settings=settings,
            log=HandlerLog(
                log_fields,
                merchant=channel.merchant,
                channel=channel.name,
                route=route,
                order_id=order_id,
                attempt=attempt,
            ),
            http=http,
            orders=orders,
            clock=self._clock,
            identity=identity,
            route=route,
            deadline=deadline,
            attempt=attempt,
            first_attempt_at=first_attempt_at,
            previous=previous,
            is_resend=is_resend,
            in_thread=in_thread,
            auth_by=auth_by,
        )

    def start(self, on: LoopName, handle: Handle[T], context: Context[Any]) -> Run[T]:
        """Start a call of a handler on one of the loops."""
        return self._loops[on].start(
            _guarded(handle, context), name=context.route, within=context.deadline - self._clock()
        )

    async def compute(self, handle: Handle[T], context: Context[Any]) -> Callable[[], T]:
        """Call a handler that only computes, on the caller's loop.

        It may let other tasks of the loop run with `asyncio.sleep(0)`. The deadline is checked then.

        Returns:
            A function that returns what the handler returned or raises what it raised, `DeadlinePassed` if it had not
            ended at its deadline, or `HandlerWaits` if it awaited something else.
        """
        coroutine = _guarded(handle, context)
        try:
            while (error := _step(coroutine)) is None:
                await asyncio.sleep(0)
                if self._clock() > context.deadline:
                    error = DeadlinePassed()
                    break
        finally:
            coroutine.close()
        return partial(_outcome, error)

    def current_answer(self) -> Run[Any] | None:
        """Return the run that occupies the answers' thread now. All other answers wait for it."""
        return self._loops["answers"].current_run()

    async def stop(self, within: timedelta) -> None:
        """Stop all loops. A thread that a handler blocks is left behind and ends with the process."""
        await asyncio.gather(*(loop.stop(within) for loop in self._loops.values()))
        await self._tokens.aclose()


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, or the errors inside an exception group."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


async def _guarded(handle: Handle[T], context: Context[Any]) -> T:
    """Call a plugin's method. Raise `RuntimeError` in place of `SystemExit` and the like.

    The method is called when the coroutine runs, so `start` calls it on the plugins' thread: a method that is not a
    coroutine function may block.
    """
    try:
        return await handle(context)
    except (Exception, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError("the handler tried to end the process") from error


def _step(coroutine: Coroutine[Any, Any, Any]) -> BaseException | None:
    """Run a coroutine to its next pause; return the exception that it ends with, if any."""
    try:
        is_pause = coroutine.send(None) is None
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is raised by `_outcome`
        return error
    return None if is_pause else HandlerWaits("the handler declares that it only computes, and awaits something")


def _outcome(ended_with: BaseException) -> Any:
    if isinstance(ended_with, StopIteration):
        return ended_with.value
    raise ended_with


_COMPUTES_ONLY = "a handler that declares that it only computes may not call other systems"


def _in_thread(threads: RouteThreads, traffic: Traffic, is_late: Callable[[], bool]) -> InThread:
    async def in_thread(function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
        return await threads.run(traffic, is_late, partial(function, *arguments, **named))

    return in_thread


async def _no_thread(_function: Callable[..., Any], /, *_: Any, **__: Any) -> NoReturn:
    raise Misconfigured("computes-only", _COMPUTES_ONLY)


class _NoNetwork(httpx.AsyncBaseTransport):
    async def handle_async_request(self, _request: httpx.Request) -> NoReturn:
        raise Misconfigured("computes-only", _COMPUTES_ONLY)


class _NoOrders:
    async def call(self, *_: Any, **__: Any) -> NoReturn:
        raise Misconfigured("computes-only", _COMPUTES_ONLY)

    read = set_reference = set_attributes = call


_NO_ORDERS = _NoOrders()
