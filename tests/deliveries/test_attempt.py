"""`adapter.deliveries.attempt` without a ledger: one attempt, from its claim to its result."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, cast

import httpx
import pytest
from structlog.testing import capture_logs

from adapter.deliveries.attempt import AttemptResult, Attempts, Queue
from adapter.identifiers import Channel
from adapter.ledger.claims import Claim
from adapter.ledger.settlement import Broken, Ending, Interrupted, outcome_name
from adapter.moments import to_datetime
from adapter.norce.client import Account, Norce
from adapter.orders import Order, read_order
from adapter.outgoing import Outgoing
from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    Notification,
    NotificationHandler,
    OAuth2,
    Outcome,
    Reject,
    Retry,
    Secret,
    Settings,
    Skip,
    Unknown,
    Url,
)
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


class ShopSettings(Settings, frozen=True, kw_only=True):
    url: Url = Url("https://shop.example")


def queue(handler: NotificationHandler[Any], *, timeout: timedelta = 30 * SECOND, refetch: bool = False) -> Queue:
    route = Route(
        name="export",
        callback=Callback(name="order-status", kind="notification"),
        when=(),
        handler_name="shop",
        handler=handler,
        settings={Channel("fjallboden", "1"): ShopSettings()},
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
async def trying(
    patience: timedelta = PATIENCE * SECOND, *, shop: Callable[[httpx.Request], Any] | None = None
) -> AsyncIterator[Trying]:
    def norce() -> Norce:
        account = Account(base_url="https://norce.example/checkout", tokens=(Secret("token"),))
        transport = httpx.MockTransport(lambda _request: httpx.Response(404))
        return Norce({"fjallboden": account}, adapter_id="test", timeout=60 * SECOND, transport=transport)

    def clock() -> int:
        return made.now

    def outgoing() -> Outgoing:
        return Outgoing(httpx.MockTransport(shop or (lambda _request: httpx.Response(200))))

    runner = Runner(make_norce=norce, make_outgoing=outgoing, clock=lambda: to_datetime(clock()), patience=patience)
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
async def test_a_route_that_reads_the_order_again_needs_no_body() -> None:
    handler = Plain(Done("shop-7"))
    async with trying() as trial:
        trial.attempts = Attempts(runner=trial.runner, norce=cast("Any", Reader()), clock=lambda: NOON)
        ended = await trial.run(replace(CLAIM, body=None), queue(handler, refetch=True))

    assert ended.result == Done("shop-7")
    ((notification, _),) = handler.seen
    assert (notification.order.currency, notification.received, notification.raw) == ("SEK", None, None)


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


# --- doubt: the outcome depends on what was sent --------------------------------------------------------------------

Http = httpx.AsyncClient
INVOICES = "https://shop.example/invoices"


class Sends(NotificationHandler[ShopSettings]):
    """Does what a test wants with `context.http`."""

    def __init__(self, work: Callable[[Http], Awaitable[Any]]) -> None:
        self._work = work

    async def deliver(self, notification: Notification, context: Context[ShopSettings]) -> Done | Skip:
        return await self._work(context.http)  # type: ignore[no-any-return]


class SendsElsewhere(Sends):
    other_clients = True


class NeverDoneAt503(Sends):
    not_done = frozenset({503})


class Takes:
    """A shop that answers each path with the status in its query, or never."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request.method)
        status = int(request.url.params.get("status", 200))
        if not status:
            await asyncio.Event().wait()
        return httpx.Response(status, text=request.url.params.get("text", "{}"))


async def get(http: Http, status: int = 200, **more: Any) -> httpx.Response:
    return (await http.get(INVOICES, params={"status": status, **more})).raise_for_status()


async def post(http: Http, status: int = 200, **more: Any) -> httpx.Response:
    return (await http.post(INVOICES, params={"status": status}, **more)).raise_for_status()


async def bug(http: Http) -> None:
    raise KeyError("payments")


async def get_html(http: Http) -> None:
    (await get(http, text="<html>Maintenance</html>")).json()


async def get_within_a_time_limit(http: Http) -> None:
    async with asyncio.timeout(0):
        await get(http, status=0)


async def get_refused_in_a_group(http: Http) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(get(http, status=503))
        group.create_task(get(http, status=0))


async def post_bytes(http: Http) -> None:
    await http.post(INVOICES, json={"total": b"12.10"})


async def get_a_token(http: Http) -> None:
    await post(http, status=502, extensions={"write": False})


async def cancel_itself(http: Http) -> None:
    raise asyncio.CancelledError


async def raise_base_exceptions(http: Http) -> None:
    raise BaseExceptionGroup("", [KeyboardInterrupt()])


def then(*steps: Callable[[Http], Awaitable[Any]]) -> Callable[[Http], Awaitable[Any]]:
    async def work(http: Http) -> Any:
        for step in steps:
            result = await step(http)
        return result

    return work


async def nothing(http: Http) -> None:
    return None


def raising(error: BaseException) -> Callable[[Http], Awaitable[Any]]:
    async def step(http: Http) -> None:
        raise error

    return step


BEFORE_A_WRITE: dict[str, tuple[Callable[[Http], Awaitable[Any]], type, str]] = {
    "a bug": (bug, Broken, "handler-failed"),
    "a result that is none": (nothing, Broken, "handler-failed"),
    "a refused GET in a group": (get_refused_in_a_group, Retry, "destination-busy"),
    "a time limit around a GET": (get_within_a_time_limit, Retry, "timed-out"),
    "bytes as JSON": (post_bytes, Broken, "handler-failed"),
    "a page in place of JSON": (get_html, Retry, "destination-no-answer"),
    "a token that is not given": (get_a_token, Retry, "destination-error"),
    "a cancellation": (cancel_itself, Retry, "deadline-passed"),
    "exceptions that end processes": (raise_base_exceptions, Broken, "handler-failed"),
    "a host that is not allowed": (lambda http: http.post("https://other.example"), Misconfigured, "host-not-allowed"),
}


@pytest.mark.parametrize(("work", "kind", "code"), BEFORE_A_WRITE.values(), ids=BEFORE_A_WRITE)
@asynchronous
async def test_a_failure_before_any_write_is_no_doubt(
    work: Callable[[Http], Awaitable[Any]], kind: type[Outcome], code: str
) -> None:
    async with trying(shop=Takes()) as trial:
        before = (await trial.run(CLAIM, queue(Sends(work)))).result
        after = (await trial.run(CLAIM, queue(Sends(then(post, work))))).result
        elsewhere = (await trial.run(CLAIM, queue(SendsElsewhere(work)))).result

    assert isinstance(before, kind)
    assert isinstance(before, Outcome)
    assert before.code == code
    assert isinstance(after, Unknown)
    assert isinstance(elsewhere, Unknown if kind is Broken or code in ("timed-out", "deadline-passed") else kind)


AFTER_A_SUCCESS = {
    "retry": (Retry("busy", after=7 * SECOND), Unknown, 7 * SECOND),
    "misconfigured": (Misconfigured("no-credentials"), Unknown, None),
    "reject": (Reject("refused"), Reject, None),
}


@pytest.mark.parametrize(("raised", "kind", "after"), AFTER_A_SUCCESS.values(), ids=AFTER_A_SUCCESS)
@asynchronous
async def test_another_attempt_after_a_successful_write_would_do_it_twice(
    raised: Outcome, kind: type[Outcome], after: timedelta | None
) -> None:
    async with trying(shop=Takes()) as trial:
        result = (await trial.run(CLAIM, queue(Sends(then(post, raising(raised)))))).result

    assert isinstance(result, Outcome)
    assert (type(result), result.code, getattr(result, "after", None)) == (kind, raised.code, after)


async def post_in_a_group_with_a_refusal(http: Http) -> None:
    async def refused() -> None:
        for _ in range(20):  # the other task sends meanwhile
            await asyncio.sleep(0)
        await get(http, status=429)

    async with asyncio.TaskGroup() as group:
        group.create_task(post(http, status=0))
        group.create_task(refused())


async def give_up_a_post(http: Http) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(SHORTLY.total_seconds()):
            await post(http, status=0)


async def ignore_the_outcome_of_a_post(http: Http) -> None:
    with suppress(Unknown):
        await post(http, status=502)


async def follow_a_redirect_that_fails(http: Http) -> None:
    await http.post(INVOICES, params={"status": 303})
    await get(http, status=503)


UNANSWERED = {
    "a redirect to a page that cannot be read": follow_a_redirect_that_fails,
    "cancelled in a group": post_in_a_group_with_a_refusal,
    "given up, then a retry": then(give_up_a_post, raising(Retry("busy"))),
    "given up, then no credentials": then(give_up_a_post, raising(Misconfigured("no-credentials"))),
    "given up, then a refusal": then(give_up_a_post, raising(Reject("refused"))),
    "a gateway's answer, then a refused read": then(ignore_the_outcome_of_a_post, partial(get, status=503)),
}


@pytest.mark.parametrize("work", UNANSWERED.values(), ids=UNANSWERED)
@asynchronous
async def test_a_write_without_an_answer_is_a_doubt_whatever_is_raised_later(
    work: Callable[[Http], Awaitable[Any]],
) -> None:
    async with trying(shop=Takes()) as trial:
        result = (await trial.run(CLAIM, queue(Sends(work)))).result

    assert type(result) is Unknown


@asynchronous
async def test_a_retry_after_a_refused_write_is_a_retry() -> None:
    async def refused(http: Http) -> None:
        await http.post(INVOICES, params={"status": 429})

    async with trying(shop=Takes()) as trial:
        result = (await trial.run(CLAIM, queue(Sends(then(refused, raising(Retry("busy"))))))).result

    assert type(result) is Retry


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
@asynchronous
async def test_a_write_that_a_gateway_answers_is_unknown_unless_declared_otherwise(status: int) -> None:
    async with trying(shop=Takes()) as trial:
        result = (await trial.run(CLAIM, queue(Sends(lambda http: post(http, status=status))))).result
        declared = (await trial.run(CLAIM, queue(NeverDoneAt503(lambda http: post(http, status=status))))).result

    assert (type(result), type(declared)) == (Unknown, Retry if status == 503 else Unknown)
    assert isinstance(result, Unknown)
    assert result.message == f"POST /invoices was answered {status}"


@asynchronous
async def test_a_deadline_or_shutdown_is_a_doubt_only_after_a_write() -> None:
    reads, writes = Sends(lambda http: get(http, 0)), Sends(lambda http: post(http, 0))
    shop = Takes()
    async with trying(shop=shop) as trial:
        late = [(await trial.run(CLAIM, queue(each, timeout=SHORTLY))).result for each in (reads, writes)]
        ends = [trial.begin(CLAIM, queue(each)) for each in (reads, writes)]
        while len(shop.requests) < 4:  # noqa: ASYNC110 - it runs on another loop
            await asyncio.sleep(0.01)
        trial.attempts.cancel("shutdown")
        read, written = [await each for each in ends]

    assert [type(result) for result in late] == [Retry, Unknown]
    assert read.result is Ending.RELEASED
    assert told(written) == (Interrupted, "shutdown", "deliver")


@asynchronous
async def test_a_task_that_a_handler_left_behind_sends_nothing_after_its_attempt() -> None:
    shop, left = Takes(), []
    go_on = threading.Event()

    async def later(http: Http) -> httpx.Response:
        await asyncio.to_thread(go_on.wait, PATIENCE)
        return await http.post(INVOICES)

    async def work(http: Http) -> None:
        left.append(asyncio.create_task(later(http)))
        raise KeyError

    async with trying(shop=shop) as trial:
        assert isinstance((await trial.run(CLAIM, queue(Sends(work)))).result, Broken)
        go_on.set()
        while not left[0].done():  # noqa: ASYNC110 - it runs on another loop
            await asyncio.sleep(0.01)

    assert shop.requests == []
    assert isinstance(left[0].exception(), Retry)


@asynchronous
async def test_a_loop_that_another_handler_blocks_is_a_doubt_only_after_a_write() -> None:
    holds, reads, writes = Blocks(), Sends(lambda http: get(http, 0)), Sends(lambda http: post(http, 0))
    shop = Takes()
    async with trying(patience=2 * SHORTLY, shop=shop) as trial:
        begun = [trial.begin(CLAIM, queue(each)) for each in (reads, writes)]
        while len(shop.requests) < 2:  # noqa: ASYNC110 - it runs on another loop
            await asyncio.sleep(0.01)
        held = trial.begin(CLAIM, queue(Plain(holds), timeout=SHORTLY))

        assert (await begun[0]).result is Ending.RELEASED
        assert told(await begun[1]) == (Interrupted, "loop-abandoned", "deliver")
        assert (await held).result is Ending.BLOCKED
        await holds.ends()


@asynchronous
async def test_a_message_names_the_request_without_a_value_of_the_order() -> None:
    async def work(http: Http) -> None:
        (await http.put("https://shop.example/customers/anna/cart?ssn=1", params={"status": 422})).raise_for_status()

    claim = replace(CLAIM, body=b'{"id": "order-1", "customer": {"billing": {"givenName": "Anna"}}}')
    async with trying(shop=Takes()) as trial:
        result = (await trial.run(claim, queue(Sends(work)))).result

    assert isinstance(result, Reject)
    assert result.message == "PUT /customers/…/cart was answered 422"


@asynchronous
async def test_a_doubt_keeps_the_explanation_of_the_refusal() -> None:
    class Explains(Sends):
        def explain(self, answer: httpx.Response) -> str | None:
            return f"status {answer.status_code}"

    async def work(http: Http) -> None:
        with suppress(Outcome):
            (await http.post(INVOICES, params={"status": 503})).raise_for_status()
        (await http.put(INVOICES, params={"status": 422})).raise_for_status()

    async with trying(shop=Takes()) as trial:
        result = (await trial.run(CLAIM, queue(Explains(work)))).result

    assert isinstance(result, Unknown)
    assert (result.status, result.explanation) == (422, "status 422")


@asynchronous
async def test_the_log_of_a_handler_has_its_fields_and_what_the_service_knows() -> None:
    class Logs(NotificationHandler[ShopSettings]):
        log_fields = frozenset({"invoice"})

        async def deliver(self, notification: Notification, context: Context[ShopSettings]) -> Done | Skip:
            context.log.info("order_sent", invoice="INV 7", order_id="another", name="Anna Svensson")
            return Done()

    with capture_logs() as lines:
        async with trying() as trial:
            await trial.run(CLAIM, queue(Logs()))

    (line,) = lines
    assert (line["invoice"], line["name"], line["log_fields"]) == ("INV 7", "[redacted]", {"invoice"})
    assert (line["merchant"], line["channel"], line["route"], line["attempt"]) == ("fjallboden", "1", "export", 1)
    assert line["order_id"] == "order-1"


@asynchronous
async def test_a_handler_sends_with_a_token_and_one_that_computes_has_none() -> None:
    login = OAuth2(token_url=Url("https://shop.example/token"), client_id="a", client_secret=Secret("b"))
    heads: list[str | None] = []

    def shop(request: httpx.Request) -> httpx.Response:
        heads.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"access_token": "first"})

    class LogsIn(NotificationHandler[ShopSettings]):
        async def deliver(self, notification: Notification, context: Context[ShopSettings]) -> Done | Skip:
            await context.http.post(INVOICES, auth=context.auth(login))
            with pytest.raises(Misconfigured, match="no-tokens"):
                replace(context, auth_by=None).auth(login)
            return Done()

    async with trying(shop=shop) as trial:
        assert (await trial.run(CLAIM, queue(LogsIn()))).result == Done()

    assert heads == ["Basic YTpi", "Bearer first"]
