"""One attempt, from a claim to how it ended, without a ledger: what is cut short, and with which reason."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import httpx
import pytest

from adapter.deliveries.attempt import AttemptResult, Attempts, Queue
from adapter.identifiers import Channel
from adapter.ledger.claims import Claim
from adapter.ledger.settlement import Ending, Interrupted, outcome_name
from adapter.moments import to_datetime
from adapter.norce.client import Account, Norce
from adapter.orders import Order, read_order
from adapter.plugin import (
    Context,
    Done,
    NoSettings,
    Notification,
    NotificationHandler,
    Reject,
    Secret,
    Skip,
    Unknown,
)
from adapter.routing.routes import Callback, Route
from adapter.routing.runner import Runner
from tests import PATIENCE

NOON = 1_770_120_000_000
SECOND = timedelta(seconds=1)
SHORTLY = timedelta(milliseconds=500)  # long enough for a handler to begin

CLAIM = Claim(
    lane_id=1, holder=1, number=1, in_doubt=False, doubt_ends_at=NOON + 60_000, queue_id=1, delivery_id=1, attempt=1,
    first_attempt_at=NOON, claimed_at=NOON, notification_id=1, callback="order-status",
    channel=Channel("fjallboden", "1"),
    order_id="order-1", identity=b"a", received_at=NOON, body=b'{"id": "order-1"}', previous=None,
)  # fmt: skip
IN_DOUBT = replace(CLAIM, number=2, in_doubt=True)

Does = Callable[[], Coroutine[Any, Any, Any]]


class Plain(NotificationHandler[NoSettings]):
    """Does what it is given, and remembers the calls."""

    def __init__(self, does: Does) -> None:
        self._does = does
        self.calls: list[str] = []
        self.seen: list[Notification] = []
        self.began = threading.Event()

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        self.seen.append(notification)
        return await self._called("deliver")  # type: ignore[no-any-return]

    async def _called(self, kind: str) -> Any:
        self.calls.append(kind)
        self.thread = threading.get_ident()
        self.began.set()
        return await self._does()

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.began.wait, PATIENCE)


class Asking(Plain):
    async def lookup(self, notification: Notification, context: Context[NoSettings]) -> Done | None:
        return await self._called("lookup")  # type: ignore[no-any-return]


class Repeating(Plain):
    repeatable = True


async def done() -> Done:
    return Done("shop-7")


async def for_ever() -> Done:
    await asyncio.Event().wait()
    raise AssertionError


def queue(handler: Plain, *, timeout: timedelta = 30 * SECOND, refetch: bool = False) -> Queue:
    route = Route(
        name="export",
        callback=Callback(name="order-status", kind="notification"),
        when=None,
        handler_name="shop",
        handler=handler,
        settings={Channel("fjallboden", "1"): NoSettings()},
        refetch=refetch,
        no_answer=None,
        timeout=timeout,
        schedule=(5 * SECOND,),
        concurrency=4,
    )
    return Queue(route=route, channel=Channel("fjallboden", "1"))


@dataclass
class Trying:
    attempts: Attempts
    runner: Runner
    now: int = NOON

    def begin(self, claim: Claim, queue: Queue) -> "asyncio.Task[AttemptResult]":
        return asyncio.create_task(self.attempts.run(claim, queue))

    async def run(self, claim: Claim, queue: Queue) -> AttemptResult:
        return await asyncio.wait_for(self.attempts.run(claim, queue), PATIENCE)


@asynccontextmanager
async def trying(patience: timedelta = PATIENCE * SECOND) -> AsyncIterator[Trying]:
    def norce() -> Norce:
        account = Account(base_url="https://norce.example/checkout", tokens=(Secret("token"),))
        transport = httpx.MockTransport(lambda _request: httpx.Response(404))
        return Norce({"fjallboden": account}, adapter_id="test", timeout=60 * SECOND, transport=transport)

    def clock() -> int:
        return made.now

    runner = Runner(make_norce=norce, clock=lambda: to_datetime(clock()), patience=patience)
    reader = norce()
    made = Trying(Attempts(runner=runner, norce=reader, clock=clock), runner)
    watching = asyncio.create_task(runner.watch(every=timedelta(milliseconds=10)))
    try:
        yield made
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await runner.stop(timedelta(seconds=PATIENCE))
        await reader.aclose()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def told(ended: AttemptResult) -> tuple[type, str, str]:
    assert isinstance(ended.result, Unknown)
    return type(ended.result), ended.result.code, ended.kind


# --- what is tried at all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "handler", "calls"),
    [
        pytest.param(CLAIM, Plain, ["deliver"], id="first"),
        pytest.param(IN_DOUBT, Asking, ["lookup"], id="in doubt: looked up"),
        pytest.param(IN_DOUBT, Repeating, ["deliver"], id="in doubt: repeated"),
    ],
)
def test_a_claim_is_delivered_or_looked_up(claim: Claim, handler: type[Plain], calls: list[str]) -> None:
    async def test() -> None:
        tried = handler(done)
        async with trying() as trial:
            ended = await trial.run(claim, queue(tried))

        assert (ended.result, ended.kind, outcome_name(ended.result)) == (Done("shop-7"), calls[0], "done")
        assert tried.calls == calls

    run(test)


def test_what_can_neither_be_looked_up_nor_repeated_asks_nobody_and_blames_nobody() -> None:
    async def test() -> None:
        handler = Plain(done)
        async with trying() as trial:
            ended = await trial.run(IN_DOUBT, queue(handler))

        assert told(ended) == (Interrupted, "in-doubt", "deliver")
        assert (handler.calls, outcome_name(ended.result)) == ([], "unknown")

    run(test)


@pytest.mark.parametrize("body", [None, b"{", b"[]"], ids=["pruned", "malformed", "no object"])
def test_a_body_that_holds_no_order_is_rejected_unasked(body: bytes | None) -> None:
    async def test() -> None:
        handler = Plain(done)
        async with trying() as trial:
            ended = await trial.run(replace(CLAIM, body=body), queue(handler))

        assert isinstance(ended.result, Reject)
        assert handler.calls == []

    run(test)


def test_nothing_is_begun_while_the_service_stops() -> None:
    async def test() -> None:
        handler = Asking(done)
        async with trying() as trial:
            trial.attempts.stopping = True

            assert await trial.run(CLAIM, queue(handler)) == AttemptResult(result=Ending.RELEASED)
            assert await trial.run(IN_DOUBT, queue(handler)) == AttemptResult(result=Ending.RELEASED, kind="lookup")
            assert handler.calls == []

    run(test)


def test_nothing_is_begun_that_would_not_end_before_the_doubt_about_its_claim() -> None:
    async def test() -> None:
        handler = Plain(done)
        async with trying() as trial:
            trial.now = CLAIM.doubt_ends_at - 30_000 + 1

            assert await trial.run(CLAIM, queue(handler)) == AttemptResult(result=Ending.RELEASED)
            trial.now -= 1
            assert (await trial.run(CLAIM, queue(handler))).result == Done("shop-7")

    run(test)


class Reader:
    """A client for Norce that notes on which thread it reads and decodes."""

    def for_handlers(self, channel: Channel) -> "Reader":
        return self

    async def read_bytes(self, order_id: str) -> bytes:
        self.read_on = threading.get_ident()
        return b'{"id": "order-1", "currency": "SEK"}'

    def parse(self, content: bytes, order_id: str) -> Order:
        self.parsed_on = threading.get_ident()
        return read_order(content)


def test_an_order_is_decoded_on_the_handlers_thread() -> None:
    """An order of 4 MiB takes up to a second, which no verdict on the service's loop can wait for."""

    async def test() -> None:
        reader, handler = Reader(), Plain(done)
        async with trying() as trial:
            trial.attempts = Attempts(runner=trial.runner, norce=cast("Any", reader), clock=lambda: NOON)
            await trial.run(CLAIM, queue(handler, refetch=True))

        assert reader.read_on == threading.get_ident()
        assert reader.parsed_on == handler.thread
        (notification,) = handler.seen
        assert (notification.order.currency, notification.received.currency) == ("SEK", None)

    run(test)


# --- what is cut short ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [CLAIM, IN_DOUBT], ids=["deliver", "lookup"])
def test_a_deadline_speaks_for_the_destination_and_a_cancellation_of_ours_does_not(claim: Claim) -> None:
    async def test() -> None:
        kind = "lookup" if claim.in_doubt else "deliver"
        async with trying() as trial:
            late = await trial.run(claim, queue(Asking(for_ever), timeout=SHORTLY))
            handler = Asking(for_ever)
            cancelled = trial.begin(claim, queue(handler))
            await handler.has_begun()
            trial.attempts.cancel("shutdown")

            assert told(late) == (Unknown, "deadline-passed", kind)
            assert told(await cancelled) == (Interrupted, "shutdown", kind)

    run(test)


def test_the_reason_for_a_cancellation_is_that_of_the_handlers_that_ran_then() -> None:
    async def test() -> None:
        async with trying() as trial:
            handler = Asking(for_ever)
            before = trial.begin(CLAIM, queue(handler))
            await handler.has_begun()
            trial.attempts.cancel("lease-lost")
            assert told(await before) == (Interrupted, "lease-lost", "deliver")

            after = await trial.run(CLAIM, queue(Asking(for_ever), timeout=SHORTLY))

            assert told(after) == (Unknown, "deadline-passed", "deliver")

    run(test)


def test_a_handler_that_is_cancelled_and_ends_all_the_same_has_the_word() -> None:
    async def test() -> None:
        async def hurries() -> Done:
            try:
                return await for_ever()
            except asyncio.CancelledError:
                return Done("just-in-time")

        async with trying() as trial:
            handler = Plain(hurries)
            ends = trial.begin(CLAIM, queue(handler))
            await handler.has_begun()
            trial.attempts.cancel("shutdown")

            assert (await ends).result == Done("just-in-time")

    run(test)


class Holds:
    """Holds its thread until it is told to let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.thread: threading.Thread | None = None

    async def __call__(self) -> Done:
        self.thread = threading.current_thread()
        self.let_go.wait(PATIENCE)
        return Done("late")

    async def ends(self) -> None:
        self.let_go.set()
        assert self.thread is not None
        await asyncio.to_thread(self.thread.join, PATIENCE)


@pytest.mark.parametrize("claim", [CLAIM, IN_DOUBT], ids=["deliver", "lookup"])
def test_a_handler_that_holds_its_thread_far_past_its_deadline_still_runs(claim: Claim) -> None:
    async def test() -> None:
        holds = Holds()
        async with trying(patience=2 * SHORTLY) as trial:
            ended = await trial.run(claim, queue(Asking(holds), timeout=SHORTLY))

            assert (ended.result, outcome_name(ended.result)) == (Ending.BLOCKED, "blocked")
            assert ended.still_runs is not None
            holds.let_go.set()
            await asyncio.wait_for(ended.still_runs.stopped.wait(), PATIENCE)
            await holds.ends()

    run(test)


def test_what_shares_a_loop_that_is_given_up_is_in_doubt_or_was_never_begun() -> None:
    async def test() -> None:
        holds, beside, behind = Holds(), Asking(for_ever), Asking(done)
        async with trying(patience=2 * SHORTLY) as trial:
            begun = trial.begin(CLAIM, queue(beside))
            await beside.has_begun()
            holding = Plain(holds)
            held = trial.begin(CLAIM, queue(holding, timeout=SHORTLY))
            await holding.has_begun()
            waits = trial.begin(CLAIM, queue(behind))
            too_late = trial.begin(CLAIM, queue(behind, timeout=timedelta(0)))  # its deadline passes behind the other

            assert told(await begun) == (Interrupted, "loop-abandoned", "deliver")
            assert await waits == await too_late == AttemptResult(result=Ending.RELEASED)
            assert (await held).result is Ending.BLOCKED
            await holds.ends()
            assert behind.calls == []

    run(test)


def test_what_never_began_before_its_deadline_is_released_when_the_thread_lets_go() -> None:
    async def test() -> None:
        holds, behind = Holds(), Plain(done)
        async with trying() as trial:
            holding = Plain(holds)
            held = trial.begin(CLAIM, queue(holding))
            await holding.has_begun()
            too_late = trial.begin(CLAIM, queue(behind, timeout=SHORTLY))
            await asyncio.wait((too_late,), timeout=2 * SHORTLY.total_seconds())
            assert not too_late.done()

            holds.let_go.set()

            assert await too_late == AttemptResult(result=Ending.RELEASED)
            assert (await held).result == Done("late")
            assert behind.calls == []

    run(test)
