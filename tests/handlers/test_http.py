"""The handler `http`: its requests, the meaning of the answers, lookups, and validations."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter.config import load
from adapter.handlers.http import HttpHandler, HttpSettings, HttpSignature
from adapter.plugin import Done, Misconfigured, Notification, Outcome, Previous, Problem, Reject, Retry, Secret, Unknown
from adapter.routing.routes import GROUP, build
from adapter.testing import HandClock, NetworkFault, PlayedDelivery, ask, context, notification, order, play
from adapter.testing.builders import settings_of

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BEARER = {"type": "bearer", "token": "a-token"}
SETTINGS = {"url": "https://erp.example/api", "auth": BEARER}
CANARY = "19811218-9876"
PREVIOUS = Previous(reference=None, facts={}, at=datetime(2026, 2, 3, tzinfo=UTC))
PAGE = httpx.Response(200, html=f"<p>{CANARY}</p>")


class Destination:
    """A destination that stores each request under its key, and answers a GET from what it has."""

    def __init__(self, status: int = 201, body: Any = None) -> None:
        self.status, self.body = status, {"number": "SO-1", "note": CANARY} if body is None else body
        self.effects: list[str] = []  # the addresses of what is there
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.method == "GET":
            return httpx.Response(200 if request.url.path in self.effects else 404, json=self.body)
        if self.status < 300:
            self.effects.append(request.url.path)
        return httpx.Response(self.status, json=self.body)


def deliver(destination: Callable[..., Any], *faults: NetworkFault | None, **given: Any) -> PlayedDelivery:
    keywords = {name: given.pop(name) for name in ("previous", "is_resend") if name in given}
    return play(HttpHandler, None, destination, settings=SETTINGS | given, faults=faults, **keywords)


async def deliver_once(about: Notification, settings: Any, destination: Destination) -> Any:
    given = context(HttpHandler, settings, destination, of=about.order)
    return await HttpHandler().deliver(about, given)


def kinds(played: PlayedDelivery) -> list[str]:
    return [f"{each.kind} {type(each.outcome).__name__}" for each in played.attempts]


# --- the request ----------------------------------------------------------------------------------------------------


def test_the_whole_order_is_sent_with_a_token_and_a_key() -> None:
    destination = Destination()

    played = deliver(destination)

    (sent,) = destination.requests
    assert (sent.method, str(sent.url)) == ("POST", "https://erp.example/api")
    assert json.loads(sent.content) == order().data
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["authorization"] == "Bearer a-token"
    assert len(sent.headers["idempotency-key"]) == 64
    assert played.outcome == Done()


def test_members_are_named_by_pointers_and_left_out_if_the_order_lacks_them() -> None:
    destination = Destination()
    members = {"number": "/reference", "total": "/total/includingVat", "sku": "/cart/items/0/sku"}
    lacking = {"none": "/nothing", "deeper": "/reference/x", "after": "/cart/items/-", "beyond": "/cart/items/9"}

    deliver(destination, members=members | lacking)

    assert json.loads(destination.requests[0].content) == {"number": "100245", "total": 1878.1, "sku": "JKT-1001-L"}


def test_the_address_may_hold_the_order_and_the_key() -> None:
    destination, about = Destination(), notification(order({"/id": "a/b ö"}))
    settings = SETTINGS | {"method": "PUT", "path": "/o/{order_id}/{key}"}

    asyncio.run(deliver_once(about, settings, destination))

    (sent,) = destination.requests
    assert sent.method == "PUT"
    assert sent.url.raw_path.decode() == f"/api/o/a%2Fb%20%C3%B6/{sent.headers['idempotency-key']}"


@pytest.mark.parametrize("order_id", [".", ".."])
def test_an_order_id_that_would_change_the_address_is_not_sent(order_id: str) -> None:
    destination, about = Destination(), notification(order({"/id": order_id}))

    with pytest.raises(Reject, match="/id cannot be part of an address"):
        asyncio.run(deliver_once(about, SETTINGS | {"path": "/orders/{order_id}"}, destination))

    assert destination.requests == []


def test_a_signature_is_that_of_standard_webhooks() -> None:
    """The values are those that the libraries of Standard Webhooks are tested with."""
    sent_at = datetime.fromtimestamp(1614265330, UTC) + timedelta(milliseconds=900)

    headers = HttpSignature(secrets=(Secret(SECRET),)).headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", sent_at, b'{"test": 2432232314}'
    )

    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_signed_request_has_a_signature_for_each_secret_and_the_key_as_its_id() -> None:
    destination = Destination()
    other = "whsec_" + "QUJD" * 8

    deliver(destination, auth={"type": "signature", "secrets": [other, SECRET]})

    (sent,) = destination.requests
    at = datetime.fromtimestamp(int(sent.headers["webhook-timestamp"]), UTC)
    alone = HttpSignature(secrets=(Secret(SECRET),)).headers(sent.headers["webhook-id"], at, sent.content)
    first, second = sent.headers["webhook-signature"].split(" ")
    assert second == alone["webhook-signature"] != first
    assert sent.headers["webhook-id"] == sent.headers["idempotency-key"]
    assert "authorization" not in sent.headers


def test_a_repeated_request_has_the_same_key() -> None:
    destination = Destination()

    played = deliver(destination, NetworkFault.STATUS_503_AFTER, repeatable=True)

    first, second = destination.requests
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert kinds(played) == ["deliver Unknown", "lookup NoneType", "deliver Done"]


# --- the answer -----------------------------------------------------------------------------------------------------

MEANINGS: dict[str, tuple[int, Mapping[str, str], type[Done | Outcome]]] = {
    "409 is rejected": (409, {}, Reject),
    "409 means that it is there": (409, {"409": "done"}, Done),
    "409 is looked up": (409, {"409": "unknown"}, Unknown),
    "404 is retried": (404, {"404": "retry"}, Retry),
    "422 is a mistake in the settings": (422, {"422": "misconfigured"}, Misconfigured),
    "503 is unknown": (503, {"409": "done"}, Unknown),
    "503 never follows an effect": (503, {"503": "retry"}, Retry),
    "500 never follows an effect": (500, {"500": "reject"}, Reject),
    "502 means that it is there": (502, {"502": "done"}, Done),
    "a redirect is not followed": (302, {}, Reject),
    "429 is retried": (429, {}, Retry),
    "401 is a mistake in the settings": (401, {}, Misconfigured),
}


@pytest.mark.parametrize(("status", "statuses", "kind"), MEANINGS.values(), ids=MEANINGS)
def test_a_status_has_its_meaning(status: int, statuses: Mapping[str, str], kind: type[Done | Outcome]) -> None:
    destination = Destination(status)

    played = deliver(destination, statuses=statuses)

    first = played.attempts[0].outcome
    assert type(first) is kind
    assert isinstance(first, Done) or (first.host, first.status) == ("erp.example", status)
    assert {str(each.url) for each in destination.requests} == {"https://erp.example/api"}


def test_a_status_with_a_meaning_keeps_its_retry_after() -> None:
    def busy(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, headers={"retry-after": "90"})

    (first, *_) = deliver(busy, statuses={"503": "retry"}).attempts

    assert isinstance(first.outcome, Retry)
    assert first.outcome.after == timedelta(seconds=90)


@pytest.mark.parametrize(("body", "reference"), [({"order": {"no": 17}}, "17"), ({"order": {"no": "SO-17"}}, "SO-17")])
def test_the_reference_is_the_destinations_number(body: Any, reference: str) -> None:
    assert deliver(Destination(body=body), reference="/order/no").outcome == Done(reference)


@pytest.mark.parametrize("answer", [{}, {"number": None}, {"number": True}, [], PAGE], ids=repr)
def test_an_answer_without_the_reference_is_unknown(answer: Any) -> None:
    app = Destination(body=answer) if answer is not PAGE else lambda _request: PAGE

    (first, *_) = deliver(app, reference="/number").attempts

    assert type(first.outcome) is Unknown
    assert CANARY not in str(first.outcome)


def test_the_body_of_an_answer_is_in_no_message_and_no_line() -> None:
    played = deliver(Destination(422, {"message": CANARY}))

    assert played.reason == "rejected"
    assert str(played.outcome) == "destination-refused: POST /api was answered 422"
    assert CANARY not in json.dumps(played.log)


# --- the lookup -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "sent"), [(NetworkFault.RESET_AFTER, 1), (NetworkFault.RESET_BEFORE, 2)])
@pytest.mark.parametrize("path", ["/orders/{order_id}", "/orders/{key}"])
def test_an_order_in_doubt_is_looked_up(fault: NetworkFault, sent: int, path: str) -> None:
    destination = Destination()

    played = deliver(destination, fault, path=path, lookup_path=path, reference="/number")

    writes = [each for each in played.requests if each.request.method == "POST"]
    assert (len(writes), len(destination.effects), played.outcome) == (sent, 1, Done("SO-1"))


def test_a_lookup_is_signed() -> None:
    destination = Destination()
    auth = {"type": "signature", "secrets": [SECRET]}

    deliver(destination, NetworkFault.RESET_AFTER, path="/{key}", lookup_path="/{key}", auth=auth)

    lookup = destination.requests[-1]
    assert (lookup.method, lookup.headers["webhook-signature"][:3]) == ("GET", "v1,")


@pytest.mark.parametrize("is_later", [{"previous": PREVIOUS}, {"is_resend": True}], ids=["another event", "a resend"])
def test_a_lookup_by_order_is_not_asked_about_a_later_delivery(is_later: dict[str, Any]) -> None:
    """It would find the effect of the first one."""
    destination = Destination()
    destination.effects.append("/api/orders/" + order().id)
    by_order = {"path": "/orders/{order_id}", "lookup_path": "/orders/{order_id}"}

    played = deliver(destination, NetworkFault.RESET_BEFORE, **by_order, **is_later)
    repeated = deliver(destination, NetworkFault.RESET_BEFORE, **by_order, **is_later, repeatable=True)

    assert (played.reason, repeated.reason) == ("unknown", "delivered")
    assert [each.method for each in destination.requests] == ["POST"]


def test_a_lookup_by_key_is_asked_about_a_resend() -> None:
    destination = Destination()

    played = deliver(destination, NetworkFault.RESET_AFTER, path="/{key}", lookup_path="/{key}", is_resend=True)

    assert (played.reason, len(destination.effects)) == ("delivered", 1)


def test_an_order_in_doubt_without_a_lookup_waits_for_a_person() -> None:
    destination = Destination()

    played = deliver(destination, NetworkFault.RESET_AFTER)

    assert (played.reason, len(destination.effects)) == ("unknown", 1)


# --- validations ----------------------------------------------------------------------------------------------------


def validate(answer: httpx.Response) -> Any:
    return ask(HttpHandler, None, lambda _request: answer, settings=SETTINGS, kind="validation")


@pytest.mark.parametrize("answer", [httpx.Response(200), httpx.Response(204), httpx.Response(200, json=[])], ids=repr)
def test_2xx_approves(answer: httpx.Response) -> None:
    asked = validate(answer)

    assert (asked.problems, asked.missing) == ([], None)


def test_400_in_norces_form_refuses() -> None:
    body = [{"adapterId": "erp", "code": "SoldOut", "message": "Sold out."}, {"code": "too-heavy"}]

    asked = validate(httpx.Response(400, json=body))

    assert asked.problems == [Problem("sold-out", "Sold out."), Problem("too-heavy", "")]


BROKEN = {
    "400 without problems": httpx.Response(400, json=[]),
    "400 with an object": httpx.Response(400, json={"code": CANARY}),
    "400 without a code": httpx.Response(400, json=[{"message": CANARY}]),
    "400 with an empty code": httpx.Response(400, json=[{"code": ""}]),
    "400 with a page": httpx.Response(400, html=CANARY),
    "200 with a page": PAGE,
    "another 4xx": httpx.Response(422, json=[{"code": "sold-out"}]),
    "a redirect": httpx.Response(302, headers={"location": "https://erp.example/login"}),
    "503": httpx.Response(503),
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_every_other_answer_to_a_validation_counts_as_none(answer: httpx.Response) -> None:
    asked = validate(answer)

    assert asked.missing is not None
    assert asked.problems == []
    assert len(asked.requests) == 1
    assert CANARY not in json.dumps(asked.log) + str(asked.error)


def test_a_question_is_no_write_and_each_is_another_message() -> None:
    destination, clock = Destination(200), HandClock()

    async def ask_twice() -> None:
        given = context(HttpHandler, SETTINGS, destination, clock=clock)
        for _ in range(2):
            await HttpHandler().validate(order(), given)
            clock.move(timedelta(seconds=1))

    asyncio.run(ask_twice())

    first, second = destination.requests
    assert first.extensions["write"] is False
    assert first.headers["idempotency-key"] != second.headers["idempotency-key"]


# --- the settings ---------------------------------------------------------------------------------------------------

WRONG = {
    "a query": ({"path": "/orders?id={order_id}"}, "path must be a plain path"),
    "no slash": ({"path": "orders"}, "path must be a plain path"),
    "a way up": ({"path": "/orders/../{key}"}, "path must be a plain path"),
    "another placeholder": ({"path": "/{reference}"}, "no placeholder but {order_id} and {key}"),
    "a line break": ({"path": "/orders\n"}, "path must be a plain path"),
    "one address for all lookups": ({"lookup_path": "/orders"}, "a plain path with {order_id} or {key}"),
    "a way up to look": ({"lookup_path": "/orders/{key}/.."}, "lookup_path must be a plain path"),
    "a name for a pointer": ({"members": {"total": "total"}}, "members.total must be a JSON Pointer"),
    "a reference that is no pointer": ({"reference": "number"}, "reference must be a JSON Pointer"),
    "a meaning for 200": ({"statuses": {"200": "retry"}}, "a whole number, at least 300 and at most 599"),
    "another meaning": ({"statuses": {"409": "ignore"}}, "must be done, retry, reject, misconfigured or unknown"),
    "a token of two lines": ({"auth": BEARER | {"token": "a\nb"}}, "token must be plain ASCII text"),
    "a short secret": ({"auth": {"type": "signature", "secrets": ["whsec_QUJD"]}}, "24 to 64 bytes in base64"),
    "a secret that is no base64": ({"auth": {"type": "signature", "secrets": ["!" * 40]}}, "24 to 64 bytes in base64"),
    "no secret": ({"auth": {"type": "signature", "secrets": []}}, "at least 1 item"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings_of(HttpHandler, SETTINGS | changes)


CONFIG = """\
adapter: {id: an_adapter}
merchants: {norce: {tokens: ["${env:SECRET}"], channels: {"1": {}}}}
senders: {header_secrets: [{header: authorization, values: ["${env:SECRET}"]}]}
callbacks: {rules: {kind: validation}, status: {kind: notification, scope: /state/currentStatus}}
routes:
  ask:
    callback: rules
    handler: http
    no_answer: approve
    settings: {url: "https://erp.example", auth: {type: bearer, token: "${env:SECRET}"}}
  send:
    callback: status
    handler: http
    settings: {url: "https://erp.example", auth: {type: bearer, token: "${env:SECRET}"}, statuses: {409: done}}
"""


def test_one_name_serves_notifications_and_validations(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)

    routes = build(load(path, {"SECRET": "canary"}), [EntryPoint("http", "adapter.handlers.http:HttpHandler", GROUP)])

    asks, sends = routes.all
    assert (asks.computes, asks.method.__name__) == (False, "validate")
    assert sends.handling.looks_up
    (settings,) = sends.settings.values()
    assert isinstance(settings, HttpSettings)
    assert settings.statuses == {409: "done"}
