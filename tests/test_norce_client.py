"""Reading one order from Norce: what is asked, which token, and what every answer means."""

import asyncio
from datetime import timedelta
from typing import Any

import httpx
import pytest

from adapter.norce.client import (
    LARGEST_ORDER_BYTES,
    MOST_READS_AT_ONCE,
    Account,
    Norce,
    NorceRefused,
    NorceUnavailable,
    OrderNotFound,
    base_url,
)
from adapter.orders import Order
from adapter.plugin import Misconfigured, Outcome, Reject, Retry, Secret

ORDER = {"id": "order-1", "total": {"includingVat": 1499.0}}


class FakeNorce(httpx.AsyncBaseTransport):
    """Answers in turn, and remembers the requests; an answer may be a reason to wait for ever."""

    def __init__(self, *answers: httpx.Response | Exception | None) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
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
    timeout: timedelta = timedelta(seconds=5),
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
                return await norce.for_handlers("fjallboden", "se-b2c").read(order_id)
            return await norce.order("fjallboden", "se-b2c", order_id, within=within)
        finally:
            await norce.aclose()

    return asyncio.run(work())


def test_the_order_is_asked_for_at_its_address_as_its_merchant_and_channel() -> None:
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


@pytest.mark.parametrize(
    ("order_id", "path"), [("a/../b", b"a%2F..%2Fb"), ("a?b#c", b"a%3Fb%23c"), ("å", b"%C3%A5"), ("a b", b"a%20b")]
)
def test_an_order_id_stays_one_segment_of_the_address(order_id: str, path: bytes) -> None:
    norce = FakeNorce(httpx.Response(200, json={"id": order_id}))

    read(norce, order_id)

    assert norce.requests[0].url.raw_path == b"/checkout/order/api/v0/checkout/orders/" + path


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


def test_a_token_is_in_no_error() -> None:
    with pytest.raises(NorceRefused) as raised:
        read(FakeNorce(httpx.Response(401)), tokens=("canary-token",))

    assert "canary-token" not in repr(raised.value)


LARGE = b'{"id": "order-1", "filler": "' + b"x" * LARGEST_ORDER_BYTES + b'"}'
DEEP = b'{"id": "order-1", "a": ' + b"[" * 5000 + b"]" * 5000 + b"}"
ANSWERS: list[Any] = [
    pytest.param(httpx.Response(404), OrderNotFound, Reject, id="404"),
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
    pytest.param(httpx.ConnectError("canary"), NorceUnavailable, Retry, id="no connection"),
    pytest.param(httpx.ReadError("canary"), NorceUnavailable, Retry, id="broken off"),
    pytest.param(httpx.ReadTimeout("canary"), NorceUnavailable, Retry, id="no answer"),
]


@pytest.mark.parametrize(("answer", "error", "_outcome"), ANSWERS)
def test_an_answer_that_is_not_the_order_is_one_of_three_facts(
    answer: httpx.Response | Exception, error: type[Exception], _outcome: type[Outcome]
) -> None:
    with pytest.raises(error) as raised:
        read(FakeNorce(answer))

    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(("answer", "_error", "outcome"), ANSWERS)
def test_a_handler_sees_the_facts_as_outcomes(
    answer: httpx.Response | Exception, _error: type[Exception], outcome: type[Outcome]
) -> None:
    with pytest.raises(outcome) as raised:
        read(FakeNorce(answer), as_handler=True)

    assert type(raised.value) is outcome


def test_a_handler_reads_the_order_itself() -> None:
    assert read(FakeNorce(httpx.Response(200, json=ORDER)), as_handler=True).id == "order-1"


@pytest.mark.parametrize("status", [429, 503])
def test_norce_says_when_to_come_again(status: int) -> None:
    with pytest.raises(Retry) as raised:
        read(FakeNorce(httpx.Response(status, headers={"retry-after": "120"})), as_handler=True)

    assert raised.value.after == timedelta(seconds=120)


NOW = timedelta(milliseconds=10)


@pytest.mark.parametrize(
    ("timeout", "within"),
    [(NOW, None), (timedelta(hours=1), NOW), (NOW, timedelta(hours=1))],
    ids=["configured", "shorter than configured", "never longer than configured"],
)
def test_an_order_that_does_not_come_in_time_is_given_up(timeout: timedelta, within: timedelta | None) -> None:
    with pytest.raises(NorceUnavailable):
        read(FakeNorce(None), timeout=timeout, within=within)


def test_the_time_is_for_both_tokens_together() -> None:
    norce = FakeNorce(httpx.Response(401), None)

    with pytest.raises(NorceUnavailable):
        read(norce, tokens=("old", "new"), timeout=timedelta(milliseconds=50))

    assert len(norce.requests) == 2


def test_so_many_orders_of_a_merchant_are_read_at_once_and_those_of_others_beside_them() -> None:
    async def work() -> tuple[int, Order]:
        silent = [None] * MOST_READS_AT_ONCE
        transport = FakeNorce(*silent, httpx.Response(200, json=ORDER))
        account = Account(base_url="https://shop.api-se.norce.tech/checkout", tokens=(Secret("token-1"),))
        accounts = {"fjallboden": account, "annan": account}
        norce = Norce(accounts, adapter_id="our_adapter", timeout=timedelta(seconds=5), transport=transport)
        reads = [
            asyncio.create_task(norce.order("fjallboden", "se-b2c", f"order-{number}"))
            for number in range(3 * MOST_READS_AT_ONCE)
        ]
        for _ in range(10):
            await asyncio.sleep(0)

        beside = await norce.order("annan", "1", "order-1")

        asked = len(transport.requests)
        for each in reads:
            each.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await norce.aclose()
        return asked, beside

    asked, beside = asyncio.run(work())

    assert asked == MOST_READS_AT_ONCE + 1
    assert beside.id == "order-1"
