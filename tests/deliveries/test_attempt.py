"""`adapter.deliveries.attempt` without a ledger: one attempt, from its claim to its result."""

import asyncio
import threading
from collections.abc import AsyncIterator
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
from adapter.plugin import Done, NoSettings, Reject, Secret, Unknown
from adapter.routing.routes import Callback, Route
from adapter.routing.runner import Runner
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import Blocks, LooksUp, Plain, Repeatable, wait_forever

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


def told(ended: AttemptResult) -> tuple[type, str, str]:
    assert isinstance(ended.result, Unknown)
    return type(ended.result), ended.result.code, ended.kind


# --- complete attempts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "handler", "calls"),
    [
        pytest.param(CLAIM, Plain, ["deliver"], id="first"),
        pytest.param(IN_DOUBT, LooksUp, ["lookup"], id="in doubt: looked up"),
        pytest.param(IN_DOUBT, Repeatable, ["deliver"], id="in doubt: repeated"),
    ],
)
@asynchronous
async def test_a_claim_is_delivered_or_looked_up(claim: Claim, handler: type[Plain], calls: list[str]) -> None:
    tried = handler(Done("shop-7"))
    async with trying() as trial:
        ended = await trial.run(claim, queue(tried))

    assert (ended.result, ended.kind, outcome_name(ended.result)) == (Done("shop-7"), calls[0], "done")
    assert tried.calls == calls


@asynchronous
async def test_an_attempt_in_doubt_without_lookup_is_interrupted_without_a_call() -> None:
    handler = Plain(Done("shop-7"))
    async with trying() as trial:
        ended = await trial.run(IN_DOUBT, queue(handler))

    assert told(ended) == (Interrupted, "in-doubt", "deliver")
    assert (handler.calls, outcome_name(ended.result)) == ([], "unknown")


@pytest.mark.parametrize("body", [None, b"{", b"[]"], ids=["pruned", "malformed", "no object"])
@asynchronous
async def test_a_body_without_an_order_is_rejected_without_a_call(body: bytes | None) -> None:
    handler = Plain(Done("shop-7"))
    async with trying() as trial:
        ended = await trial.run(replace(CLAIM, body=body), queue(handler))

    assert isinstance(ended.result, Reject)
    assert handler.calls == []


@asynchronous
async def test_no_handler_starts_while_the_service_stops() -> None:
    handler = LooksUp(Done("shop-7"))
    async with trying() as trial:
        trial.attempts.stopping = True

        assert await trial.run(CLAIM, queue(handler)) == AttemptResult(result=Ending.RELEASED)
        assert await trial.run(IN_DOUBT, queue(handler)) == AttemptResult(result=Ending.RELEASED, kind="lookup")
        assert handler.calls == []


@asynchronous
async def test_no_handler_starts_whose_deadline_is_later_than_the_doubt_of_its_claim() -> None:
    handler = Plain(Done("shop-7"))
    async with trying() as trial:
        trial.now = CLAIM.doubt_ends_at - 30_000 + 1

        assert await trial.run(CLAIM, queue(handler)) == AttemptResult(result=Ending.RELEASED)
        trial.now -= 1
        assert (await trial.run(CLAIM, queue(handler))).result == Done("shop-7")


class Reader:
    """A client for Norce that remembers the threads on which it reads and decodes."""

    def for_handlers(self, channel: Channel) -> "Reader":
        return self

    async def read_bytes(self, order_id: str) -> bytes:
        self.read_on = threading.get_ident()
        return b'{"id": "order-1", "currency": "SEK"}'

    def parse(self, content: bytes, order_id: str) -> Order:
        self.parsed_on = threading.get_ident()
        return read_order(content)


@asynchronous
async def test_an_order_is_decoded_on_the_handlers_thread() -> None:
    """An order of 4 MiB takes up to a second, which no verdict on the service's loop can wait for."""
    reader, handler = Reader(), Plain(Done("shop-7"))
    async with trying() as trial:
        trial.attempts = Attempts(runner=trial.runner, norce=cast("Any", reader), clock=lambda: NOON)
        await trial.run(CLAIM, queue(handler, refetch=True))

    assert reader.read_on == threading.get_ident()
    assert [reader.parsed_on] == handler.threads
    ((notification, _),) = handler.seen
    assert (notification.order.currency, notification.received.currency) == ("SEK", None)


# --- interrupted attempts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [CLAIM, IN_DOUBT], ids=["deliver", "lookup"])
@asynchronous
async def test_a_passed_deadline_is_unknown_and_a_cancellation_is_interrupted(claim: Claim) -> None:
    kind = "lookup" if claim.in_doubt else "deliver"
    async with trying() as trial:
        late = await trial.run(claim, queue(LooksUp(wait_forever), timeout=SHORTLY))
        handler = LooksUp(wait_forever)
        cancelled = trial.begin(claim, queue(handler))
        await handler.has_begun()
        trial.attempts.cancel("shutdown")

        assert told(late) == (Unknown, "deadline-passed", kind)
        assert told(await cancelled) == (Interrupted, "shutdown", kind)


@asynchronous
async def test_a_cancellation_gives_its_reason_only_to_handlers_that_run() -> None:
    async with trying() as trial:
        handler = LooksUp(wait_forever)
        before = trial.begin(CLAIM, queue(handler))
        await handler.has_begun()
        trial.attempts.cancel("lease-lost")
        assert told(await before) == (Interrupted, "lease-lost", "deliver")

        after = await trial.run(CLAIM, queue(LooksUp(wait_forever), timeout=SHORTLY))

        assert told(after) == (Unknown, "deadline-passed", "deliver")


@asynchronous
async def test_the_outcome_of_a_cancelled_handler_counts() -> None:
    async def hurries(*_: Any) -> Done:
        try:
            return await wait_forever()
        except asyncio.CancelledError:
            return Done("just-in-time")

    async with trying() as trial:
        handler = Plain(hurries)
        ends = trial.begin(CLAIM, queue(handler))
        await handler.has_begun()
        trial.attempts.cancel("shutdown")

        assert (await ends).result == Done("just-in-time")


@pytest.mark.parametrize("claim", [CLAIM, IN_DOUBT], ids=["deliver", "lookup"])
@asynchronous
async def test_a_handler_that_blocks_far_past_its_deadline_still_runs(claim: Claim) -> None:
    holds = Blocks()
    async with trying(patience=2 * SHORTLY) as trial:
        ended = await trial.run(claim, queue(LooksUp(holds), timeout=SHORTLY))

        assert (ended.result, outcome_name(ended.result)) == (Ending.BLOCKED, "blocked")
        assert ended.still_runs is not None
        holds.go_on.set()
        await asyncio.wait_for(ended.still_runs.stopped.wait(), PATIENCE)
        await holds.ends()


@asynchronous
async def test_other_attempts_on_an_abandoned_loop_are_interrupted_or_released() -> None:
    holds, beside, behind = Blocks(), LooksUp(wait_forever), LooksUp(Done("shop-7"))
    async with trying(patience=2 * SHORTLY) as trial:
        begun = trial.begin(CLAIM, queue(beside))
        await beside.has_begun()
        holding = Plain(holds)
        held = trial.begin(CLAIM, queue(holding, timeout=SHORTLY))
        await holding.has_begun()
        waits = trial.begin(CLAIM, queue(behind))
        too_late = trial.begin(
            CLAIM, queue(behind, timeout=timedelta(0))
        )  # its deadline passes while it waits for the thread

        assert told(await begun) == (Interrupted, "loop-abandoned", "deliver")
        assert await waits == await too_late == AttemptResult(result=Ending.RELEASED)
        assert (await held).result is Ending.BLOCKED
        await holds.ends()
        assert behind.calls == []


@asynchronous
async def test_an_attempt_that_never_began_before_its_deadline_is_released() -> None:
    holds, behind = Blocks(), Plain(Done("shop-7"))
    async with trying() as trial:
        holding = Plain(holds)
        held = trial.begin(CLAIM, queue(holding))
        await holding.has_begun()
        too_late = trial.begin(CLAIM, queue(behind, timeout=SHORTLY))
        await asyncio.wait((too_late,), timeout=2 * SHORTLY.total_seconds())
        assert not too_late.done()

        holds.go_on.set()

        assert await too_late == AttemptResult(result=Ending.RELEASED)
        assert (await held).result == Done("late")
        assert behind.calls == []
