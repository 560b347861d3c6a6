"""`context.thread`: blocking functions of handlers, in threads that hold the lane and keep the doubt."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from adapter.deliveries.attempt import AttemptResult
from adapter.moments import to_datetime
from adapter.plugin import Context, Done, Misconfigured, Notification, NotificationHandler, Reject, Retry, Skip, Unknown
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.deliveries.test_attempt import CLAIM, SHORTLY, ShopSettings, Trying, queue, trying

Work = Callable[[Context[ShopSettings]], Awaitable[Any]]


class Threads(NotificationHandler[ShopSettings]):
    """Does what a test wants with `context.thread`."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def deliver(self, notification: Notification, context: Context[ShopSettings]) -> Done | Skip:
        return await self._work(context)  # type: ignore[no-any-return]


class Gate:
    """A function that blocks until the test opens it, and counts how many threads are in it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.threads: list[threading.Thread] = []
        self.inside = self.most = 0
        self._lock = threading.Lock()
        self._entered = threading.Semaphore(0)

    def __call__(self, value: Any = None) -> Any:
        with self._lock:
            self.threads.append(threading.current_thread())
            self.inside += 1
            self.most = max(self.most, self.inside)
        self._entered.release()
        assert self.open.wait(PATIENCE)
        with self._lock:
            self.inside -= 1
        return value

    async def is_entered(self) -> None:
        assert await asyncio.to_thread(self._entered.acquire, timeout=PATIENCE)


def raises(error: Exception) -> None:
    raise error


@asynchronous
async def test_a_thread_returns_or_raises_to_the_handler() -> None:
    seen: list[threading.Thread] = []

    async def work(context: Context[ShopSettings]) -> Done:
        seen.append(await context.thread(threading.current_thread))
        with pytest.raises(KeyError):
            await context.thread(raises, KeyError())
        with pytest.raises(RuntimeError, match="StopIteration"):
            await context.thread(next, iter(()))
        return Done(await context.thread("{}-{n}".format, "shop", n=7))

    async with trying() as trial:
        assert (await trial.run(CLAIM, queue(Threads(work)))).result == Done("shop-7")

    assert seen[0].name == "route-export"
    assert seen[0].daemon  # a client that hangs does not keep the process alive


@asynchronous
async def test_a_route_has_as_many_threads_as_its_concurrency() -> None:
    gate = Gate()

    async def work(context: Context[ShopSettings]) -> Done:
        await asyncio.gather(*(context.thread(gate) for _ in range(6)))
        return Done()

    async with trying() as trial:
        trying_it = trial.begin(CLAIM, queue(Threads(work)))  # its concurrency is 4
        for _ in range(4):
            await gate.is_entered()
        gate.open.set()

        assert (await trying_it).result == Done()

    assert (len(gate.threads), gate.most) == (6, 4)


async def cancelled(context: Context[ShopSettings], gate: Gate) -> Any:
    return await context.thread(gate)


async def given_up(context: Context[ShopSettings], gate: Gate) -> Any:
    try:
        await asyncio.wait_for(context.thread(gate), 0.01)
    except TimeoutError:
        raise Retry("too-slow") from None


async def left_behind(context: Context[ShopSettings], gate: Gate) -> Any:
    asyncio.get_running_loop().left = asyncio.create_task(context.thread(gate))  # type: ignore[attr-defined]
    while not gate.threads:  # noqa: ASYNC110 - it runs in another thread
        await asyncio.sleep(0.001)
    raise Reject("not-wanted")


@pytest.mark.parametrize(
    ("work", "limit", "code"),
    [
        (cancelled, SHORTLY, "deadline-passed"),
        (given_up, timedelta(seconds=30), "too-slow"),
        (left_behind, timedelta(seconds=30), "not-wanted"),
    ],
    ids=["cancelled at the deadline", "given up by the handler", "left behind by the handler"],
)
@asynchronous
async def test_the_lane_is_held_until_the_thread_ends_and_its_effect_is_in_doubt(
    work: Callable[[Context[ShopSettings], Gate], Awaitable[Any]], limit: timedelta, code: str
) -> None:
    gate = Gate()
    async with trying() as trial:
        trying_it = trial.begin(CLAIM, queue(Threads(lambda context: work(context, gate)), timeout=limit))
        await gate.is_entered()
        await has_run_its_course(trial)
        trial.attempts.cancel("shutdown")
        await has_run_its_course(trial)
        assert not trying_it.done()
        gate.open.set()
        result = (await trying_it).result

    assert isinstance(result, Unknown)
    assert result.code in (code, "shutdown")  # a cancellation that comes first gives its own reason


async def has_run_its_course(trial: Trying) -> None:
    """Let the plugins' loop turn long enough for everything that needs no thread."""
    for _ in range(20):
        await trial.runner.start("deliveries", _nothing, _context(trial)).wait()


async def _nothing(_context: Context[Any]) -> None:
    await asyncio.sleep(0.001)


def _context(trial: Trying) -> Context[Any]:
    now = to_datetime(trial.now)
    return trial.runner.context(
        "deliveries",
        route="other",
        settings=ShopSettings(),
        channel=CLAIM.channel,
        order_id="",
        identity="",
        deadline=now + timedelta(minutes=1),
        first_attempt_at=now,
    )


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(Reject("no"), Reject), (Retry("later"), Retry), (Misconfigured("who"), Misconfigured), (KeyError(), Unknown)],
    ids=["reject", "retry", "misconfigured", "a bug"],
)
@asynchronous
async def test_an_outcome_of_the_handler_counts_after_a_thread_and_a_bug_is_a_doubt(
    raised: Exception, kind: type[Exception]
) -> None:
    async def from_the_thread(context: Context[ShopSettings]) -> Any:
        await context.thread(raises, raised)

    async def after_the_thread(context: Context[ShopSettings]) -> Any:
        await context.thread(int)
        raise raised

    results: list[AttemptResult] = []
    async with trying() as trial:
        results.extend([await trial.run(CLAIM, queue(Threads(each))) for each in (from_the_thread, after_the_thread)])

    assert [type(each.result) for each in results] == [kind, kind]


@asynchronous
async def test_no_thread_starts_after_the_deadline() -> None:
    called: list[str] = []

    async def too_late(context: Context[ShopSettings]) -> Any:
        trial.now += 31_000
        await context.thread(called.append, "too late")

    async with trying() as trial:
        result = (await trial.run(CLAIM, queue(Threads(too_late)))).result

    assert (type(result), result.code) == (Retry, "no-time-left")  # type: ignore[union-attr]
    assert called == []


@asynchronous
async def test_names_are_resolved_although_plugins_keep_the_threads_of_asyncio_busy() -> None:
    gate = Gate()

    async def resolve(_context: Context[ShopSettings]) -> Done:
        busy = [asyncio.create_task(asyncio.to_thread(gate)) for _ in range(40)]
        await asyncio.sleep(0)
        found = await asyncio.get_running_loop().getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
        gate.open.set()
        await asyncio.gather(*busy)
        return Done(str(found[0][4][1]))

    async with trying() as trial:
        assert (await trial.run(CLAIM, queue(Threads(resolve)))).result == Done("80")


@asynchronous
async def test_a_handler_that_computes_has_no_threads() -> None:
    async with trying() as trial:
        context = trial.runner.context(
            None,
            route="rule",
            settings=ShopSettings(),
            channel=CLAIM.channel,
            order_id="",
            identity="",
            deadline=_context(trial).deadline,
            first_attempt_at=_context(trial).deadline,
        )
        with pytest.raises(Misconfigured, match="computes-only"):
            await context.thread(int)
