"""The client's requests, tokens and repetitions, and the meaning of every answer."""

import asyncio
import contextlib
import gzip
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from adapter.identifiers import Channel
from adapter.norce.api import OPERATIONS, Operation, schema
from adapter.norce.client import (
    MAX_ERROR_BYTES,
    MAX_ORDER_BYTES,
    MAX_PAGES,
    MAX_REQUESTS_AT_ONCE,
    MAX_REQUESTS_OF_AN_ORDER,
    Account,
    HandlerOrders,
    Norce,
    NorceBusy,
    NorceError,
    NorceRefused,
    NorceRejected,
    NorceTooLarge,
    NorceUnavailable,
    NorceUnclear,
    OrderNotFound,
    base_url,
)
from adapter.orders import Order
from adapter.outgoing import Traffic
from adapter.plugin import Misconfigured, Outcome, Reject, Retry, Secret, Unknown
from adapter.testing import virtual_time
from tests.asynchronous import asynchronous
from tests.scripted_server import Script, ScriptedServer, without_end

CHANNEL = Channel("fjallboden", "1")
T = TypeVar("T")

ORDER = {"id": "order-1", "total": {"includingVat": 1499.0}}


class FakeNorce(httpx.AsyncBaseTransport):
    """A Norce that gives these answers in turn and records the requests.

    None is an answer that never comes. An exception is raised for this request and all later ones.
    """

    def __init__(self, *answers: httpx.Response | Exception | None) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers[0] if isinstance(self._answers[0], Exception) else self._answers.pop(0)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer

    async def aclose(self) -> None:
        self.closed = True


def read(
    transport: FakeNorce,
    order_id: str = "order-1",
    *,
    tokens: tuple[str, ...] = ("token-1",),
    timeout: timedelta = timedelta(minutes=1),
    within: timedelta | None = None,
    as_handler: bool = False,
) -> Order:
    async def work() -> Order:
        account = Account(
            base_url="https://shop.api-se.norce.tech/checkout", tokens=tuple(Secret(token) for token in tokens)
        )
        norce = Norce({"fjallboden": account}, adapter_id="our_adapter", timeout=timeout, transport=transport)
        try:
            if as_handler:
                return await norce.for_handlers(Channel("fjallboden", "se-b2c")).read(order_id)
            return await norce.order(Channel("fjallboden", "se-b2c"), order_id, within=within)
        finally:
            await norce.aclose()

    return asyncio.run(work())


def test_an_order_is_requested_with_its_address_merchant_and_channel() -> None:
    norce = FakeNorce(httpx.Response(200, json=ORDER))

    order = read(norce)

    (request,) = norce.requests
    assert str(request.url) == "https://shop.api-se.norce.tech/checkout/order/api/v0/checkout/orders/order-1"
    assert request.method == "GET"
    expected = {
        "authorization": "Bearer token-1",
        "x-merchant": "fjallboden",
        "x-channel": "se-b2c",
        "x-adapterid": "our_adapter",
    }
    assert {name: request.headers[name] for name in expected} == expected
    assert (order.id, order.data) == ("order-1", ORDER)
    assert norce.closed


def test_the_view_of_an_order_is_decoded_on_first_use() -> None:
    """Decoding 4 MiB takes up to two seconds, and this loop answers the shoppers of all merchants."""

    async def seen(norce: Norce) -> bool:
        return "view" in (await norce.order(CHANNEL, "order-1")).__dict__

    assert not ask(FakeNorce(httpx.Response(200, json=ORDER)), seen)
    assert read(FakeNorce(httpx.Response(200, json=ORDER))).total.including_vat == Decimal("1499.0")


@pytest.mark.parametrize(
    ("order_id", "path"), [("a/../b", b"a%2F..%2Fb"), ("a?b#c", b"a%3Fb%23c"), ("å", b"%C3%A5"), ("a b", b"a%20b")]
)
def test_an_order_id_stays_one_segment_of_the_address(order_id: str, path: bytes) -> None:
    norce = FakeNorce(httpx.Response(200, json={"id": order_id}))

    read(norce, order_id)

    assert norce.requests[0].url.raw_path == b"/checkout/order/api/v0/checkout/orders/" + path


@pytest.mark.parametrize("step", ["..", ".", ""])
def test_no_id_leads_to_another_operation(step: str) -> None:
    """`DELETE …/orders/order-1/hooks/..` would delete the order."""
    norce = FakeNorce(httpx.Response(204))

    with pytest.raises(OrderNotFound):
        ask(
            norce,
            lambda norce: norce.call(CHANNEL, "remove_hook", path={"order_id": "order-1", "hook_id": step}),
        )

    assert norce.requests == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("production", "https://shop.api-se.norce.tech/checkout"),
        ("playground", "https://shop.api-se.playground.norce.tech/checkout"),
        ("stage", "https://shop.api-se.stage.norce.tech/checkout"),
    ],
)
def test_production_has_no_environment_in_its_address(environment: str, expected: str) -> None:
    assert base_url(environment, "shop") == expected


@pytest.mark.parametrize("status", [401, 403])
def test_a_second_token_is_tried_where_the_first_is_refused(status: int) -> None:
    norce = FakeNorce(httpx.Response(status), httpx.Response(200, json=ORDER))

    order = read(norce, tokens=("old", "new"))

    assert order.id == "order-1"
    assert [request.headers["authorization"] for request in norce.requests] == ["Bearer old", "Bearer new"]


def test_a_second_token_is_not_tried_for_any_other_answer() -> None:
    norce = FakeNorce(httpx.Response(500))

    with pytest.raises(NorceUnavailable):
        read(norce, tokens=("old", "new"))

    assert len(norce.requests) == 1


def test_a_cookie_of_one_merchant_is_not_sent_for_another() -> None:
    """A cookie may be a session. Cookies for each order would also slow down every request."""
    transport = FakeNorce(*(httpx.Response(200, json=ORDER, headers={"set-cookie": "session=canary"}) for _ in "12"))

    async def work() -> None:
        account = Account(base_url="https://norce.example/checkout", tokens=(Secret("token-1"),))
        norce = Norce(
            {"fjallboden": account, "annan": account},
            adapter_id="our_adapter",
            timeout=timedelta(minutes=1),
            transport=transport,
        )
        await norce.order(CHANNEL, "order-1")
        await norce.order(Channel("annan", "1"), "order-1")
        await norce.aclose()

    asyncio.run(work())

    assert ["cookie" in request.headers for request in transport.requests] == [False, False]


def test_compressed_answers_are_not_requested() -> None:
    """60 kB of gzip can hold an order of 60 MB, which is unpacked before its size is known."""
    transport = FakeNorce(httpx.Response(200, json=ORDER))

    read(transport)

    assert transport.requests[0].headers["accept-encoding"] == "identity"


def test_errors_contain_no_token() -> None:
    with pytest.raises(NorceRefused) as raised:
        read(FakeNorce(httpx.Response(401)), tokens=("canary-token",))

    assert "canary-token" not in repr(raised.value)


LARGE = b'{"id": "order-1", "filler": "' + b"x" * MAX_ORDER_BYTES + b'"}'


def many(value: bytes, size: int = 4_000_000) -> bytes:
    """Return an order of this size that consists of these values."""
    return b'{"id": "order-1", "x": [%s]}' % b",".join([value] * (size // (len(value) + 1)))


DEEP = b'{"id": "order-1", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"  # beyond the decoder of every Python
ANSWERS: list[Any] = [
    pytest.param(httpx.Response(404), OrderNotFound, Reject, id="404"),
    pytest.param(httpx.Response(404, json={"code": "order-not-found"}), OrderNotFound, Reject, id="404 of v0"),
    pytest.param(httpx.Response(404, json={"type": "about:blank", "status": 404}), OrderNotFound, Reject, id="of v1"),
    pytest.param(httpx.Response(404, html="<html>"), NorceUnavailable, Retry, id="404, a page of a proxy's"),
    pytest.param(httpx.Response(404, text="default backend"), NorceUnavailable, Retry, id="404, a text of a proxy's"),
    pytest.param(httpx.Response(404, json={"statusCode": 404}), NorceUnavailable, Retry, id="404 of a gateway"),
    pytest.param(httpx.Response(401), NorceRefused, Misconfigured, id="401"),
    pytest.param(httpx.Response(403), NorceRefused, Misconfigured, id="403"),
    pytest.param(httpx.Response(429), NorceUnavailable, Retry, id="429"),
    pytest.param(httpx.Response(400), NorceUnavailable, Retry, id="400"),
    pytest.param(httpx.Response(500), NorceUnavailable, Retry, id="500"),
    pytest.param(httpx.Response(503), NorceUnavailable, Retry, id="503"),
    pytest.param(httpx.Response(204), NorceUnavailable, Retry, id="204"),
    pytest.param(httpx.Response(302, headers={"location": "https://x"}), NorceUnavailable, Retry, id="a redirect"),
    pytest.param(httpx.Response(200, text="<html>"), NorceUnavailable, Retry, id="a page"),
    pytest.param(httpx.Response(200, json=[ORDER]), NorceUnavailable, Retry, id="a list"),
    pytest.param(httpx.Response(200, json={}), NorceUnavailable, Retry, id="an empty object"),
    pytest.param(httpx.Response(200, json={"id": "order-2"}), NorceUnavailable, Retry, id="another order"),
    pytest.param(httpx.Response(200, content=LARGE), NorceUnavailable, Retry, id="too large"),
    pytest.param(httpx.Response(200, content=DEEP), NorceUnavailable, Retry, id="nested too deeply"),
    pytest.param(httpx.Response(200, content=many(b"[]")), NorceUnavailable, Retry, id="many lists"),
    pytest.param(httpx.Response(200, content=many(b"{}")), NorceUnavailable, Retry, id="many objects"),
    pytest.param(httpx.Response(200, content=many(b"1")), NorceUnavailable, Retry, id="many numbers"),
    pytest.param(httpx.ConnectError("canary"), NorceUnavailable, Retry, id="no connection"),
    pytest.param(httpx.ReadError("canary"), NorceUnavailable, Retry, id="broken off"),
    pytest.param(httpx.ReadTimeout("canary"), NorceUnavailable, Retry, id="no answer"),
]


@pytest.mark.parametrize(("answer", "error", "_outcome"), ANSWERS)
def test_an_answer_that_is_not_the_order_raises_one_of_three_errors(
    answer: httpx.Response | Exception, error: type[Exception], _outcome: type[Outcome]
) -> None:
    with pytest.raises(error) as raised:
        read(FakeNorce(answer))

    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(("answer", "_error", "outcome"), ANSWERS)
def test_a_handler_gets_the_errors_as_outcomes(
    answer: httpx.Response | Exception, _error: type[Exception], outcome: type[Outcome]
) -> None:
    with pytest.raises(outcome) as raised:
        read(FakeNorce(answer), as_handler=True)

    assert type(raised.value) is outcome


def test_a_handler_reads_the_order_itself() -> None:
    order = read(FakeNorce(httpx.Response(200, json=ORDER)), as_handler=True)

    assert order.id == "order-1"


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_of_norce_is_kept(status: int) -> None:
    with pytest.raises(Retry) as raised:
        read(FakeNorce(httpx.Response(status, headers={"retry-after": "120"})), as_handler=True)

    assert raised.value.after == timedelta(seconds=120)


NOW = timedelta(milliseconds=10)


@pytest.mark.parametrize(
    ("timeout", "within"),
    [(NOW, None), (timedelta(hours=1), NOW), (NOW, timedelta(hours=1))],
    ids=["configured", "shorter than configured", "never longer than configured"],
)
def test_reading_an_order_ends_at_the_timeout(timeout: timedelta, within: timedelta | None) -> None:
    with pytest.raises(NorceUnavailable):
        read(FakeNorce(None), timeout=timeout, within=within)


def test_the_timeout_covers_both_tokens() -> None:
    norce = FakeNorce(httpx.Response(401), None)

    with pytest.raises(NorceUnavailable):
        read(norce, tokens=("old", "new"), timeout=timedelta(milliseconds=500))

    assert len(norce.requests) == 2


def test_requests_of_a_merchant_are_limited_and_leave_others_alone() -> None:
    async def work() -> tuple[int, Order]:
        silent = [None] * MAX_REQUESTS_AT_ONCE
        transport = FakeNorce(*silent, httpx.Response(200, json=ORDER))
        account = Account(base_url="https://shop.api-se.norce.tech/checkout", tokens=(Secret("token-1"),))
        accounts = {"fjallboden": account, "annan": account}
        norce = Norce(accounts, adapter_id="our_adapter", timeout=timedelta(minutes=1), transport=transport)
        reads = [
            asyncio.create_task(norce.order(Channel("fjallboden", "se-b2c"), f"order-{number}"))
            for number in range(3 * MAX_REQUESTS_AT_ONCE)
        ]
        for _ in range(10):
            await asyncio.sleep(0)

        beside = await norce.order(Channel("annan", "1"), "order-1")

        asked = len(transport.requests)
        for each in reads:
            each.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await norce.aclose()
        return asked, beside

    asked, beside = asyncio.run(work())

    assert asked == MAX_REQUESTS_AT_ONCE + 1
    assert beside.id == "order-1"


class Holding(httpx.AsyncBaseTransport):
    """A Norce whose answers come when the test says so. Remembers the orders that are being read."""

    def __init__(self) -> None:
        self.reading: list[tuple[str, asyncio.Future[None]]] = []
        self.read: list[str] = []  # in the order of the requests

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        order_id = request.url.path.rpartition("/")[2]
        self.read.append(order_id)
        held = order_id, asyncio.get_running_loop().create_future()
        self.reading.append(held)
        try:
            await held[1]
        finally:
            self.reading.remove(held)
        return httpx.Response(200, json={"id": order_id})

    def answer(self, order_id: str | None = None) -> None:
        """Answer the first request that is being read, or the first of an order."""
        next(held for name, held in self.reading if order_id in (None, name) and not held.done()).set_result(None)


class Readers:
    """Reads of orders of one merchant."""

    def __init__(self, timeout: timedelta = timedelta(minutes=1)) -> None:
        self.at_norce = Holding()
        account = Account(base_url="https://shop.api-se.norce.tech/checkout", tokens=(Secret("token-1"),))
        self.norce = Norce({"fjallboden": account}, adapter_id="our_adapter", timeout=timeout, transport=self.at_norce)
        self.tasks: list[asyncio.Task[Order]] = []

    async def read(self, *order_ids: str) -> list[asyncio.Task[Order]]:
        tasks = [asyncio.create_task(self.norce.order(CHANNEL, each)) for each in order_ids]
        self.tasks += tasks
        await self.settle()
        return tasks

    async def answer(self, order_id: str | None = None) -> None:
        self.at_norce.answer(order_id)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def close(self) -> None:
        for each in self.tasks:
            each.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.norce.aclose()


def reading(play: Callable[[Readers], Awaitable[None]]) -> None:
    async def work() -> None:
        readers = Readers()
        try:
            await play(readers)
        finally:
            await readers.close()

    virtual_time.run(work())


FULL = [f"full-{number}" for number in range(MAX_REQUESTS_AT_ONCE)]


def test_a_flood_of_one_order_leaves_reads_to_the_others() -> None:
    async def play(readers: Readers) -> None:
        await readers.read(*["flooded"] * 200)

        await readers.read(*FULL[: MAX_REQUESTS_AT_ONCE - MAX_REQUESTS_OF_AN_ORDER])

        assert readers.at_norce.read.count("flooded") == MAX_REQUESTS_OF_AN_ORDER
        assert len(readers.at_norce.read) == MAX_REQUESTS_AT_ONCE

    reading(play)


def test_reads_that_wait_begin_in_turn_order_by_order() -> None:
    async def play(readers: Readers) -> None:
        await readers.read(*FULL)
        await readers.read(*["a"] * 5, "b", "b", "c")
        for full in FULL[:8]:
            await readers.answer(full)

        assert readers.at_norce.read[MAX_REQUESTS_AT_ONCE:] == ["a", "b", "c", "a", "b", "a", "a", "a"]

    reading(play)


def test_a_read_that_waits_for_its_own_order_delays_no_other() -> None:
    async def play(readers: Readers) -> None:
        await readers.read(*["flooded"] * 50, *FULL[: MAX_REQUESTS_AT_ONCE - MAX_REQUESTS_OF_AN_ORDER])
        await readers.read("a", "b")
        await readers.answer(FULL[0])
        await readers.answer(FULL[1])
        assert readers.at_norce.read[-2:] == ["a", "b"]

        await readers.answer("flooded")

        assert readers.at_norce.read[-1] == "flooded"

    reading(play)


def test_reads_that_leave_give_their_turn_to_the_others() -> None:
    async def play(readers: Readers) -> None:
        running = await readers.read(*FULL)
        left, stays = await readers.read("left", "stays")
        left.cancel()
        running[5].cancel()
        await readers.settle()

        assert readers.at_norce.read[MAX_REQUESTS_AT_ONCE:] == ["stays"]
        # In one step a read gets its turn and leaves.
        more = await readers.read("late", "later")
        readers.at_norce.answer()
        turns = readers.norce._turns["fjallboden"]
        for _ in range(20):
            if turns._waiting.keys() == {"late", "later"}:
                await asyncio.sleep(0)
        assert turns._waiting.keys() == {"later"}
        assert "late" not in readers.at_norce.read
        more[0].cancel()
        await readers.settle()
        assert readers.at_norce.read[-1] == "later"
        assert not stays.done()

    reading(play)


def test_a_read_that_was_delayed_by_others_says_so_when_its_time_is_up() -> None:
    async def play(readers: Readers) -> None:
        await readers.read(*FULL)
        with pytest.raises(NorceBusy):
            await readers.norce.order(CHANNEL, "waits", within=timedelta(seconds=1))

        late = asyncio.create_task(readers.norce.order(CHANNEL, "begins-late", within=timedelta(seconds=1)))
        await asyncio.sleep(0.5)
        await readers.answer()
        assert readers.at_norce.read[-1] == "begins-late"
        await asyncio.wait((late,))
        assert isinstance(late.exception(), NorceBusy)

    reading(play)


def test_a_read_that_norce_does_not_answer_was_not_delayed_by_others() -> None:
    async def play(readers: Readers) -> None:
        with pytest.raises(NorceUnavailable) as raised:
            await readers.norce.order(CHANNEL, "waits", within=timedelta(seconds=1))

        assert not isinstance(raised.value, NorceBusy)

    reading(play)


TURNS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 12), st.integers(1, 30)),
        st.tuples(st.just("answer"), st.integers(0, 200), st.integers(1, 10)),
        st.tuples(st.just("leave"), st.integers(0, 200), st.integers(1, 10)),
        st.tuples(st.just("let steps pass"), st.integers(1, 3), st.none()),
    ),
    max_size=40,
)


@given(TURNS)
@settings(deadline=None)
def test_no_read_waits_that_might_run_whatever_comes_and_ends(steps: list[Any]) -> None:
    async def play(readers: Readers) -> None:
        at_norce = readers.at_norce

        def running(order_id: str) -> int:
            return sum(name == order_id for name, _ in at_norce.reading)

        for what, first, second in steps:
            match what:
                case "read":
                    wanted = (readers.norce.order(CHANNEL, f"o{first}") for _ in range(second))
                    readers.tasks += map(asyncio.create_task, wanted)
                case "answer" | "leave":
                    for number in range(first, first + second):
                        if what == "leave" and readers.tasks:
                            readers.tasks[number % len(readers.tasks)].cancel()
                        held = [each for _, each in at_norce.reading if not each.done()]
                        if what == "answer" and held:
                            held[number % len(held)].set_result(None)
                case "let steps pass":
                    for _ in range(first):
                        await asyncio.sleep(0)
            assert len(at_norce.reading) <= MAX_REQUESTS_AT_ONCE
        await readers.settle()
        unended = sum(not each.done() for each in readers.tasks)
        may_run = {name for name, _ in at_norce.reading if running(name) < MAX_REQUESTS_OF_AN_ORDER}
        assert all(running(name) <= MAX_REQUESTS_OF_AN_ORDER for name, _ in at_norce.reading)
        turns = readers.norce._turns["fjallboden"]
        assert unended == len(at_norce.reading) + sum(map(len, turns._waiting.values()))
        assert len(at_norce.reading) == MAX_REQUESTS_AT_ONCE or not may_run & turns._waiting.keys()
        while at_norce.reading:
            await readers.answer()
        assert all(each.done() for each in readers.tasks)
        assert (turns._free, turns._running, turns._waiting) == (MAX_REQUESTS_AT_ONCE, {}, {})

    reading(play)


def ask(transport: httpx.AsyncBaseTransport, work: Callable[[Norce], Awaitable[T]], **given: Any) -> T:
    async def asked() -> T:
        account = Account(base_url="https://shop.api-se.norce.tech/checkout", tokens=(Secret("token-1"), Secret("t-2")))
        norce = Norce(
            {"fjallboden": account},
            adapter_id="our_adapter",
            timeout=timedelta(minutes=1),
            transport=transport,
            **given,
        )
        try:
            return await work(norce)
        finally:
            await norce.aclose()

    return asyncio.run(asked())


def change(norce: Norce) -> Awaitable[bytes]:
    return norce.call(CHANNEL, "add_hook", body={"adapterId": "our_adapter"}, path={"order_id": "o"})


class Once(FakeNorce):
    """Fails once, and then answers."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except httpx.TransportError:
            self._answers.pop(0)
            raise


@pytest.mark.parametrize("error", [httpx.ReadError(""), httpx.RemoteProtocolError(""), httpx.ConnectError("")])
def test_a_read_without_an_answer_is_repeated_once(error: httpx.TransportError) -> None:
    transport = Once(error, httpx.Response(200, json=ORDER))

    assert ask(transport, lambda norce: norce.order(CHANNEL, "order-1")).id == "order-1"
    assert len(transport.requests) == 2


@pytest.mark.parametrize("error", [httpx.ReadError(""), httpx.ReadTimeout(""), httpx.RemoteProtocolError("")])
def test_a_change_without_an_answer_is_not_repeated(error: httpx.TransportError) -> None:
    transport = FakeNorce(error)

    with pytest.raises(NorceUnclear):
        ask(transport, change)

    assert len(transport.requests) == 1


@pytest.mark.parametrize("error", [httpx.ConnectError(""), httpx.ConnectTimeout(""), httpx.PoolTimeout("")])
def test_a_change_that_could_not_be_sent_is_repeated_and_not_in_doubt(error: httpx.TransportError) -> None:
    transport = FakeNorce(error)

    with pytest.raises(NorceUnavailable) as raised:
        ask(transport, change)

    assert len(transport.requests) == 2
    assert type(raised.value) is NorceUnavailable


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, NorceUnclear) for status in (408, 500, 502, 503, 504, 599)),
        *((status, NorceUnavailable) for status in (425, 429)),
    ],
)
def test_a_change_that_failed_at_norce_may_have_been_made_unless_norce_has_not_tried_it(
    status: int, kind: type[NorceUnavailable]
) -> None:
    with pytest.raises(NorceUnavailable) as raised:
        ask(FakeNorce(httpx.Response(status, headers={"retry-after": "120"})), change)

    assert (type(raised.value), raised.value.after) == (kind, timedelta(seconds=120))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"code": "order-validation", "message": "canary"}, "order-validation"),
        ([{"adapterId": "x", "code": "item-out-of-stock"}], "item-out-of-stock"),
        ({"type": "https://norce.example/problems/order-conflict", "title": "canary"}, "order-conflict"),
        ({"type": "about:blank", "title": "canary"}, None),
        ({"type": "https://tools.ietf.org/html/rfc7231#section-6.5.1"}, None),
        ({"code": "Tove canary Testsson"}, None),
        ({"code": 7}, None),
        ([], None),
        ("canary", None),
    ],
)
def test_an_error_shows_only_the_code(body: Any, code: str | None) -> None:
    with pytest.raises(NorceRejected) as raised:
        ask(FakeNorce(httpx.Response(400, json=body)), change)

    assert raised.value.code == code
    assert "canary" not in str(raised.value)


class Listing(httpx.AsyncBaseTransport):
    """A list with a wrong `size` and an optional total."""

    def __init__(self, count: int, *, total: bool, most: int) -> None:
        self._count, self._total, self._most = count, total, most
        self.asked: list[tuple[str, str]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        query = request.url.params
        self.asked.append((query["offset"], query["limit"]))
        offset = int(query["offset"])
        data = [{"id": f"o-{number}"} for number in range(offset, min(offset + self._most, self._count))]
        pagination = {"offset": 0, "limit": 1, "size": 1} | ({"totalSize": self._count} if self._total else {})
        return httpx.Response(200, json={"data": data, "pagination": pagination})


@given(
    count=st.integers(min_value=0, max_value=40),
    total=st.booleans(),
    most=st.integers(min_value=1, max_value=10),
    limit=st.integers(min_value=1, max_value=10),
)
def test_a_list_is_read_to_its_end_with_any_page_size(count: int, *, total: bool, most: int, limit: int) -> None:
    async def work(norce: Norce) -> list[str]:
        pages = norce.order_pages(CHANNEL, limit=limit)
        return [order["id"] async for page in pages for order in page.items]

    transport = Listing(count, total=total, most=most)

    assert ask(transport, work) == [f"o-{number}" for number in range(count)]
    assert len(transport.asked) <= count + 1


def test_the_number_of_the_used_token_is_reported() -> None:
    told: list[tuple[str, int, int]] = []
    transport = FakeNorce(httpx.Response(401), httpx.Response(200, json=ORDER))

    ask(transport, lambda norce: norce.order(CHANNEL, "order-1"), used=lambda *each: told.append(each))

    assert told == [("fjallboden", 1, 401), ("fjallboden", 2, 200)]


@pytest.mark.parametrize(("version", "expected"), [("v0", "/order/api/v0/"), ("v1", "/order/api/v1/")])
def test_the_version_of_the_order_api_is_a_setting(version: str, expected: str) -> None:
    transport = FakeNorce(httpx.Response(200, json=ORDER))

    ask(transport, lambda norce: norce.order(CHANNEL, "order-1"), version=version)

    assert expected in str(transport.requests[0].url)


BODIES: dict[str, Any] = {
    "order-create": {"cart": {"items": []}, "customer": {"type": "person"}},
    "cart": {"items": [], "total": {"includingVat": 0.0, "excludingVat": 0.0}},
    "address": {"city": "Provstad"},
    "attributes": {"our_adapter": "1"},
    "reference": "100245",
    "state": {"currentStatus": "processing"},
    "consent": {"id": "terms", "checked": True},
    "consents": [{"id": "terms", "checked": True}],
    "validation": {"adapterId": "our_adapter", "url": "https://adapter.example/x"},
    "hook": {"adapterId": "our_adapter", "subscribeTo": "/cart", "invoke": "https://adapter.example/x"},
    "notification": {"adapterId": "our_adapter", "scope": "/cart", "invoke": "https://adapter.example/x"},
    "payment": {"adapterId": "our_adapter", "amount": 1.0, "state": "intent"},
    "actions": [{"adapterId": "our_adapter", "type": "capture", "url": "https://adapter.example/x"}],
    "transaction": {"event": "open", "amount": 1.0, "isSuccess": True},
    "shipping": {"adapterId": "our_adapter", "total": {"includingVat": 1.0, "excludingVat": 0.8}, "vatRate": 0.25},
    "configurations": [{"$schema": "https://adapter.example/s.json", "id": "our_adapter"}],
    "adapter-configuration": {"$schema": "https://adapter.example/s.json", "id": "our_adapter"},
    "basket": {"cartReference": 7, "culture": "sv-SE"},
    "quantity": {"quantity": 2},
    "discount": {"code": "SUMMER"},
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_every_operation_is_requested_as_declared(operation: Operation) -> None:
    ids = set(re.findall(r"{(\w+)}", operation.path)) - {"version", "merchant", "channel"}
    path = {name: f"{name} å/1" for name in ids}
    body = None if operation.body is None else BODIES[operation.body]
    transport = FakeNorce(httpx.Response(200, json={}))

    ask(transport, lambda norce: norce.call(CHANNEL, operation.name, body=body, path=path))

    (request,) = transport.requests
    assert request.method == operation.method
    given = {"merchant": "fjallboden", "channel": "1", "version": operation.versions[0], **path}
    expected = operation.path.format_map({name: quote(value, safe="") for name, value in given.items()})
    assert request.url.raw_path.decode() == f"/checkout/{operation.service}{expected}"
    for header in operation.headers:
        assert request.headers[header]
    assert ("x-adapterid" in request.headers) == ("x-adapterid" in operation.optional_headers)
    if operation.body is None:
        assert request.content == b""
    else:
        assert request.headers["content-type"] == "application/json"
        Draft202012Validator(schema(operation.body)).validate(json.loads(request.content))


def as_handler(transport: FakeNorce, work: Callable[[HandlerOrders], Awaitable[Any]]) -> Any:
    return ask(transport, lambda norce: work(norce.for_handlers(CHANNEL)))


def test_a_handler_sets_reference_and_attributes() -> None:
    transport = FakeNorce(httpx.Response(200), httpx.Response(200))

    as_handler(transport, lambda orders: orders.set_reference("o", "100245"))
    as_handler(transport, lambda orders: orders.set_attributes("o", {"jetshop": "7"}))

    assert [json.loads(request.content) for request in transport.requests] == ["100245", {"jetshop": "7"}]


def test_an_undeclared_body_in_the_answer_to_a_change_is_ignored() -> None:
    assert (
        as_handler(FakeNorce(httpx.Response(200, text="OK")), lambda orders: orders.call("add_hook", "o", {})) is None
    )


def test_a_handler_may_call_any_operation_on_the_order() -> None:
    transport = FakeNorce(httpx.Response(200, json=[{"id": "p"}]))

    assert as_handler(transport, lambda orders: orders.call("list_payments", "o")) == [{"id": "p"}]


CHANGES: list[Any] = [
    pytest.param("put_payment", httpx.ReadError(""), Retry, id="a PUT without answer may be made again"),
    pytest.param("add_payment", httpx.ReadError(""), Unknown, id="a POST without answer is in doubt"),
    pytest.param("add_payment", httpx.ConnectError(""), Retry, id="a POST that never went out"),
    pytest.param("add_payment", httpx.Response(500), Unknown, id="a POST that failed at Norce"),
    pytest.param("add_payment", httpx.Response(503), Unknown, id="a POST that a gateway answered"),
    pytest.param("add_payment", httpx.Response(408), Unknown, id="a POST that took too long"),
    pytest.param("add_payment", httpx.Response(429), Retry, id="a POST that came too often"),
    pytest.param("put_payment", httpx.Response(503), Retry, id="a PUT that a gateway answered"),
    pytest.param("list_payments", httpx.Response(408), Retry, id="a GET that took too long"),
    pytest.param("add_payment", httpx.Response(201, text="p-1"), Unknown, id="a POST that was made, and what of it"),
    pytest.param("put_payment", httpx.Response(200, text="p-1"), Retry, id="a PUT that was made may be made again"),
    pytest.param("add_payment", httpx.Response(409, json={"code": "order-conflict"}), Reject, id="a conflict"),
    pytest.param("put_payment", httpx.Response(400), Reject, id="refused by a hook"),
    pytest.param("put_payment", httpx.Response(404, json={"code": "payment-not-found"}), Reject, id="no payment"),
]


@pytest.mark.parametrize(("operation", "answer", "outcome"), CHANGES)
def test_a_failed_change_raises_its_outcome_for_a_handler(
    operation: str, answer: httpx.Response | Exception, outcome: type[Outcome]
) -> None:
    path = {"payment_id": "p"} if operation == "put_payment" else {}

    with pytest.raises(outcome) as raised:
        as_handler(FakeNorce(answer), lambda orders: orders.call(operation, "o", {}, **path))

    assert type(raised.value) is outcome


def test_a_handler_learns_when_norce_wants_the_next_attempt() -> None:
    with pytest.raises(Unknown) as raised:
        as_handler(
            FakeNorce(httpx.Response(503, headers={"retry-after": "120"})),
            lambda orders: orders.call("add_payment", "o", {}),
        )

    assert raised.value.after == timedelta(seconds=120)


def test_a_message_names_the_operation_and_the_status_but_no_value() -> None:
    with pytest.raises(Reject) as raised:
        as_handler(
            FakeNorce(httpx.Response(400)), lambda orders: orders.call("put_payment", "o", {}, payment_id="canary")
        )

    path = "/checkout/orders/{order_id}/payments/{payment_id}"
    assert raised.value.message == f"Norce answered 400 to PUT {path}"


WRITES: list[Any] = [
    pytest.param("list_payments", httpx.Response(200, json=[]), False, False, id="a read"),
    pytest.param("put_payment", httpx.Response(200, json={}), False, False, id="a change that may be repeated"),
    pytest.param("add_payment", httpx.Response(201, json={}), True, True, id="an addition"),
    pytest.param("add_payment", httpx.Response(400), True, False, id="an addition that was rejected"),
    pytest.param("add_payment", httpx.ReadError(""), True, False, id="an addition without an answer"),
    pytest.param("add_payment", httpx.ConnectError(""), False, False, id="an addition that was not sent"),
]


@pytest.mark.parametrize(("operation", "answer", "went_out", "succeeded"), WRITES)
def test_an_attempt_knows_whether_an_addition_went_out(
    operation: str, answer: httpx.Response | Exception, went_out: bool, succeeded: bool
) -> None:
    path = {"payment_id": "p"} if operation == "put_payment" else {}
    traffic = Traffic()

    with contextlib.suppress(Outcome):
        ask(
            FakeNorce(answer),
            lambda norce: norce.for_handlers(CHANNEL, traffic).call(operation, "o", {}, **path),
        )

    assert (traffic.close(), traffic.succeeded) == (went_out, succeeded)


def test_nothing_is_added_at_norce_after_the_attempt_has_been_judged() -> None:
    traffic, transport = Traffic(), FakeNorce()
    traffic.close()

    with pytest.raises(Retry, match="attempt-ended"):
        ask(transport, lambda norce: norce.for_handlers(CHANNEL, traffic).call("add_payment", "o", {}))

    assert transport.requests == []


def event(number: int, **given: Any) -> dict[str, Any]:
    return {
        "id": f"event-{number}",
        "createdAt": "2026-02-03T10:00:00.1234567Z",
        "merchant": "fjallboden",
        "channel": "se-b2c",
        "orderId": "order-1",
        "payload": {"notification": {}, "order": {"id": "order-1", "total": 12.10}},
        **given,
    }


def test_events_are_filtered_by_adapter_and_keep_their_payload() -> None:
    raw = json.dumps({"data": [event(1, reference=None, attempts=[])], "pagination": {"totalSize": 9}})
    transport = FakeNorce(httpx.Response(200, text=raw))

    page = ask(transport, lambda norce: norce.events("fjallboden", offset=20, limit=10))

    (request,) = transport.requests
    assert dict(request.url.params) == {"adapter_id": "our_adapter", "offset": "20", "limit": "10"}
    assert "x-channel" not in request.headers
    assert (page.offset, page.total) == (20, 9)
    assert bytes(page.items[0].payload) == json.dumps(event(1)["payload"]).encode()


class Endless(httpx.AsyncBaseTransport):
    """Answers without an end."""

    def __init__(self) -> None:
        self.sent = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            while True:
                self.sent += 1024 * 1024
                yield b" " * 1024 * 1024

        return httpx.Response(200, content=body())


def test_an_endless_answer_is_broken_off() -> None:
    transport = Endless()

    with pytest.raises(NorceUnavailable):
        ask(transport, lambda norce: norce.order(CHANNEL, "order-1"))

    assert transport.sent <= 2 * MAX_ORDER_BYTES


def encoded(status: int, coding: str, body: bytes) -> httpx.Response:
    return httpx.Response(status, headers={"content-encoding": coding}, stream=httpx.ByteStream(body))


UNREADABLE = {
    "br": ("br", b"\x0b\x02\x80"),
    "not gzip": ("gzip", b"{}"),
    "cut off": ("gzip", gzip.compress(json.dumps(ORDER).encode())[:-4]),
    "a bomb": ("gzip", gzip.compress(bytes(50_000_000))),
}


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "identity", "utf-8", ""])
def test_an_order_is_read_though_it_is_compressed_unasked(coding: str) -> None:
    body = json.dumps(ORDER).encode()
    answer = encoded(200, coding, gzip.compress(body) if coding.lower() == "gzip" else body)

    assert read(FakeNorce(answer)).id == "order-1"


@pytest.mark.parametrize(("coding", "body"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_that_cannot_be_read_keeps_its_status_unless_it_is_a_success(coding: str, body: bytes) -> None:
    def read_ends(status: int) -> tuple[type[NorceError], int | None]:
        with pytest.raises(NorceError) as raised:
            read(FakeNorce(encoded(status, coding, body)), tokens=("one",))
        return type(raised.value), raised.value.status

    def change_ends(status: int) -> tuple[type[NorceError], int | None]:
        with pytest.raises(NorceError) as raised:
            ask(FakeNorce(*(encoded(status, coding, body) for _ in range(2))), change)
        return type(raised.value), raised.value.status

    assert read_ends(200) == (NorceTooLarge if body == UNREADABLE["a bomb"][1] else NorceUnavailable, 200)
    assert change_ends(200) == (NorceUnclear, 200)
    assert read_ends(401) == change_ends(401) == (NorceRefused, 401)
    assert read_ends(404) == change_ends(404) == (NorceUnavailable, 404)  # perhaps a proxy's
    assert change_ends(409) == (NorceRejected, 409)
    assert (read_ends(503), change_ends(503)) == ((NorceUnavailable, 503), (NorceUnclear, 503))


@pytest.mark.parametrize("size", [10, MAX_ERROR_BYTES])
def test_a_long_error_counts_without_its_body(size: int) -> None:
    with pytest.raises(NorceRejected) as raised:
        ask(FakeNorce(httpx.Response(409, json={"code": "order-conflict", "message": "x" * size})), change)

    assert raised.value.code == ("order-conflict" if size == 10 else None)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (httpx.Response(503), 503),
        (httpx.Response(401), 401),
        (httpx.Response(400), 400),
        (httpx.Response(200, text="<html>"), 200),
        (httpx.ReadTimeout(""), None),
        (httpx.ConnectError(""), None),
    ],
    ids=["503", "401", "400", "a page", "no answer", "no connection"],
)
def test_an_error_and_its_outcome_name_host_and_status(answer: httpx.Response | Exception, status: int | None) -> None:
    with pytest.raises(NorceError) as error:
        read(FakeNorce(answer))
    with pytest.raises(Outcome) as outcome:
        read(FakeNorce(answer), as_handler=True)

    expected = ("shop.api-se.norce.tech", status)
    assert (error.value.host, error.value.status) == (outcome.value.host, outcome.value.status) == expected


HOSTILE = {
    "1xx answers": without_end(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "trailers": without_end(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
    "a head, byte by byte": without_end(b"HTTP/1.1 200 ", b"O"),
    "a body, byte by byte": without_end(b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n", b" "),
    "an error, byte by byte": without_end(b"HTTP/1.1 409 No\r\ncontent-length: 30000\r\n\r\n", b" "),
}


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
@asynchronous
async def test_an_answer_without_end_is_no_answer_by_the_timeout(script: Script) -> None:
    async with ScriptedServer(script).listening() as server:
        account = Account(base_url=server.url, tokens=(Secret("token-1"),))
        norce = Norce({"fjallboden": account}, adapter_id="our_adapter", timeout=timedelta(milliseconds=300))
        with pytest.raises(NorceUnavailable):
            await norce.order(CHANNEL, "order-1")
        with pytest.raises(NorceUnclear):
            await change(norce)
        await norce.aclose()


class CountingExecutor(ThreadPoolExecutor):
    """The threads of a loop. Counts the calls that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        return super().submit(function, *arguments, **named)


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1"])
def test_an_order_of_the_largest_accepted_size_is_read_whatever_it_consists_of(value: bytes) -> None:
    order = ask(
        FakeNorce(httpx.Response(200, content=many(value, 1024 * 1024))), lambda norce: norce.order(CHANNEL, "order-1")
    )

    assert order.id == "order-1"


def test_a_large_order_is_decoded_beside_the_loop() -> None:
    async def turns_while_reading(norce: Norce) -> list[int]:
        turns = [0, 0]

        async def count(read: int) -> None:
            while True:
                turns[read] += 1
                await asyncio.sleep(0)

        for read in (0, 1):
            counting = asyncio.create_task(count(read))
            await norce.order(CHANNEL, "order-1")
            counting.cancel()
        return turns

    large = ORDER | {"cart": {"items": [{"name": "x" * 100}] * 10_000}}
    small, other = ask(FakeNorce(httpx.Response(200, json=ORDER), httpx.Response(200, json=large)), turns_while_reading)

    assert other > small


def test_pages_are_decoded_in_a_thread() -> None:
    """One of 16 MiB takes half a second, and the loop answers shoppers."""
    threads = CountingExecutor()

    async def both_lists(norce: Norce) -> None:
        asyncio.get_running_loop().set_default_executor(threads)
        await norce.events("fjallboden")
        await norce.order_pages(CHANNEL).__anext__()

    page = {"data": [event(1)], "pagination": {"totalSize": 1}}
    ask(FakeNorce(httpx.Response(200, json=page), httpx.Response(200, json=page)), both_lists)

    assert threads.calls == 2


def test_undocumented_items_of_a_page_are_counted_and_left_out() -> None:
    data = [event(1), {"id": "event-2"}, event(3)]
    transport = FakeNorce(httpx.Response(200, json={"data": data, "pagination": {"totalSize": 3}}))

    page = ask(transport, lambda norce: norce.events("fjallboden"))

    assert ([each.id for each in page.items], page.count) == (["event-1", "event-3"], 3)


def test_an_item_that_is_larger_than_any_order_is_left_out() -> None:
    data = [event(1), event(2, payload="x" * MAX_ORDER_BYTES), event(3)]
    transport = FakeNorce(httpx.Response(200, json={"data": data}))

    page = ask(transport, lambda norce: norce.events("fjallboden"))

    assert ([each.id for each in page.items], page.count) == (["event-1", "event-3"], 3)


@given(st.lists(st.sampled_from([r"\\", r"\ud83d", r"\uDE00", r"\n", r"\u0041", r"\"", "u", "d83d"]), max_size=8))
def test_lone_surrogates_in_a_page_are_replaced(parts: list[str]) -> None:
    text = "".join(parts)
    halved = json.dumps({"data": [event(1, description="@"), event(2, description="#")]})
    content = halved.replace('"#"', r'"\ud83d"').replace('"@"', f'"{text}"')

    page = ask(FakeNorce(httpx.Response(200, text=content)), lambda norce: norce.order_pages(CHANNEL).__anext__())

    expected = "".join("\ufffd" if "\ud800" <= each <= "\udfff" else each for each in json.loads(f'"{text}"'))
    assert [each["description"] for each in page.items] == [expected, "\ufffd"]


def test_an_order_of_a_list_has_its_bytes_and_times_and_one_without_a_time_is_left_out() -> None:
    first = {"id": "a", "created": "2026-02-03T12:00:00", "lastModified": None}
    orders = [first, {"id": "b"}, {"id": 7, "created": "2026-02-03"}, "text"]
    answer = httpx.Response(200, json={"data": orders, "pagination": {"totalSize": 9}})

    page = ask(FakeNorce(answer), lambda norce: norce.orders(CHANNEL, offset=5, limit=4))

    (order,) = page.items
    assert (page.offset, page.count, page.total, order.id, order.changed_at) == (5, 4, 9, "a", None)
    assert order.created_at.isoformat() == "2026-02-03T12:00:00+00:00"
    assert json.loads(order.raw) == first


@pytest.mark.parametrize("body", [{}, {"data": 7}, {"data": [], "pagination": {"totalSize": "x"}}, []])
def test_an_undocumented_page_is_an_error(body: Any) -> None:
    with pytest.raises(NorceUnavailable):
        ask(FakeNorce(httpx.Response(200, json=body)), lambda norce: norce.events("fjallboden"))


def test_a_list_of_orders_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PAGES == 100_000  # five million orders of the default page size
    monkeypatch.setattr("adapter.norce.client.MAX_PAGES", 3)
    transport = Listing(10, total=False, most=1)

    async def work(norce: Norce) -> list[str]:
        return [order["id"] async for page in norce.order_pages(CHANNEL) for order in page.items]

    with pytest.raises(NorceUnavailable, match="no end"):
        ask(transport, work)

    assert len(transport.asked) == 3
