"""`adapter.callbacks.endpoints`: the answers to Norce, for good and bad requests and for faults inside the service."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import itertools
import json
import logging
import queue
import re
import resource
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import httpx
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, event, select, text
from starlette.applications import Starlette
from starlette.routing import Route
from structlog.testing import capture_logs

from adapter import config as configuration
from adapter import logs
from adapter.app import running
from adapter.callbacks import endpoints
from adapter.callbacks.endpoints import CallbackEndpoint
from adapter.callbacks.intake import Intake
from adapter.callbacks.limits import MOST_AT_ONCE, ByteLimit, CallLimit, Load
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import CALLBACK_PATH, http_server, listen
from adapter.ledger.inbox import Inbox
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.names import Names
from adapter.ledger.schema import deliveries, notifications
from adapter.ledger.store import Store, StoreBusy, StoreUnavailable
from adapter.ledger.uses import Uses
from adapter.ledger.verdict_log import LoggedVerdict
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import Norce
from adapter.orders import Order
from adapter.plugin import (
    Context,
    Done,
    HookHandler,
    Notification,
    NotificationHandler,
    Patch,
    Problem,
    Refuse,
    Settings,
    ValidationHandler,
)  # fmt: skip
from adapter.routing.from_config import norce_accounts, queue_keys
from adapter.routing.routes import build
from adapter.routing.runner import Runner
from adapter.sandbox.norce import Simulator
from adapter.verdicts.circuit_breaker import CircuitBreaker
from adapter.verdicts.verdicts import OrderBusy, Verdicts
from tests import ORDERS, PATIENCE
from tests.databases import KINDS, Server, database_of, rows
from tests.ledgers import POLICY

MODIFIED = "2026-02-03T08:16:35.870Z"
ENVIRON = {
    "TOKEN": "canary-token-at-norce-0123456789",
    "NEW_KEY": "canary-new-url-key-0123456789abcd",
    "OLD_KEY": "canary-old-url-key-0123456789abcd",
    "FIRST": "Bearer canary-first-header-secret",
    "SECOND": "Bearer canary-second-header-secret",
    "BOUND": "canary-secret-of-other-only",
    "FIRST_STATIC": "canary-first-url-secret",
    "SECOND_STATIC": "canary-second-url-secret",
}
CONFIG = """\
adapter: {id: an_adapter, public_url: "http://127.0.0.1:1"}
server: {host: 127.0.0.1, port: 0, receive_timeout: 5s}
operations: {port: 0, socket: null}
store: {url: "@STORE@"}
norce: {base_url: "@NORCE@", timeout: 2s}
dispatcher: {grace: 10s}
merchants:
  norce: {tokens: ["${env:TOKEN}"], channels: {"1": {}, "2": {}}}
  other: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
senders:
  signed_urls: {keys: {new: "${env:NEW_KEY}", old: "${env:OLD_KEY}"}}
  header_secrets:
    - {header: Authorization, values: ["${env:FIRST}", "${env:SECOND}"]}
    - {header: x-bound, values: ["${env:BOUND}"], merchants: [other]}
  url_secrets:
    - {parameter: secret, values: ["${env:FIRST_STATIC}", "${env:SECOND_STATIC}"], merchants: [norce]}
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus, schema: {enum: [accepted, completed]}}
  order-total: {kind: notification, scope: /total}
  order-paid: {kind: notification, scope: /payments}
  order-cart: {kind: notification, scope: /total}
  order-shipped: {kind: notification, scope: /total}
  order-rules: {kind: validation, deadline: 2s}
  order-free: {kind: validation}
  cart-changed: {kind: hook, watch: /cart}
routes:
  export: {callback: order-status, handler: remember, refetch: false}
  completed-only:
    {callback: order-status, handler: remember, refetch: false,
     when: {scope: /state/currentStatus, schema: {const: completed}}}
  totals: {callback: order-total, handler: remember, refetch: false}
  paid: {callback: order-paid, handler: remember}
  cart-in-shadow: {callback: order-cart, handler: remember, mode: shadow,
    when: {scope: /state/currentStatus, schema: {const: completed}}}
  shipped: {callback: order-shipped, handler: remember}
  shipped-in-shadow: {callback: order-shipped, handler: remember, mode: shadow,
    when: {scope: /state/currentStatus, schema: {const: completed}}}
  slow: {callback: cart-changed, handler: slow, no_answer: reject}
  first: {callback: order-rules, handler: deny, no_answer: approve, settings: {codes: [a-first, a-second]}}
  second: {callback: order-rules, handler: deny, no_answer: approve, settings: {codes: []}}
  third: {callback: order-rules, handler: deny, no_answer: approve, settings: {codes: [b-first]}}
"""


class Remember(NotificationHandler[Settings]):
    """Remembers what it was given."""

    repeatable = True
    given: list[Notification] = []  # noqa: RUF012

    async def deliver(self, notification: Notification, _context: Context[Settings]) -> Done:
        self.given.append(notification)
        return Done()


class Codes(Settings, frozen=True, kw_only=True):
    codes: tuple[str, ...]


class Deny(ValidationHandler[Codes]):
    """Denies orders that are not approved, with its codes."""

    async def validate(self, order: Order, context: Context[Codes]) -> list[Problem]:
        if order.data.get("approved"):
            return []
        return [Problem(code, f"No: {code}.") for code in context.settings.codes]


class Slow(HookHandler[Settings]):
    """Refuses when the test says so."""

    begun: "queue.SimpleQueue[str]" = queue.SimpleQueue()
    may_end = threading.Event()

    async def change(self, order: Order, context: Context[Settings]) -> list[Patch]:
        self.begun.put(str(order.id))
        await asyncio.to_thread(self.may_end.wait, PATIENCE)
        raise Refuse("slow", "No.")


class Point:
    """An entry point without an installed package."""

    def __init__(self, name: str, class_: Any) -> None:
        self.name = name
        self._class = class_

    def load(self) -> Any:
        return self._class


POINTS: Any = [Point("remember", Remember), Point("deny", Deny), Point("slow", Slow)]


class Answer:
    def __init__(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self.headers = {name.decode().lower(): value.decode() for name, value in headers}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def encoded(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def scope_of(method: str, target: str, headers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode("latin-1"),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }


async def asked(asgi: Any, scope: dict[str, Any], receive: Callable[[], Any]) -> Answer:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await asgi(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(sent[0]["status"], sent[0]["headers"], body)


class House:
    """The intake with a real ledger but without a dispatcher: ASGI in, rows on disk."""

    def __init__(self, folder: Path, store_url: str = "") -> None:
        self.runner = asyncio.Runner()
        self.config = loaded(folder, store_url)
        self.routes = build(self.config, POINTS)
        self.woken = 0
        self.norce: dict[str, Any] = {}  # order id -> what Norce answers
        self.read: list[str] = []
        self.logged: list[LoggedVerdict] = []
        self.runner.run(self._open())

    async def _open(self) -> None:
        def make_norce() -> Norce:
            return Norce(
                norce_accounts(self.config),
                adapter_id="an_adapter",
                timeout=timedelta(minutes=1),
                transport=httpx.MockTransport(self._norce),
            )

        self.store = Store.open(self.config.store.url)
        self.metrics = Metrics("0")
        self._handlers = Runner(make_norce=make_norce, clock=lambda: to_datetime(self.store.clock()))
        self._reader = make_norce()
        lanes = Lanes(self.store, Lease(self.store, version="0"), policy=POLICY)
        queues = await lanes.open_queues(queue_keys(self.config))
        self.names, self.uses = Names(self.store), Uses(self.store)
        await self.names.add({name: each.kind for name, each in self.config.callbacks.items()}, self.config.channels)
        self.endpoint = CallbackEndpoint(
            routes=self.routes,
            senders=Senders(self.config.senders),
            channels=frozenset(self.config.channels),
            intake=Intake(
                self.routes,
                Inbox(self.store),
                queue_ids=queues,
                metrics=self.metrics,
                wake=self._wake,
            ),
            verdicts=Verdicts(
                self.routes,
                runner=self._handlers,
                norce=self._reader,
                metrics=self.metrics,
                clock=self.store.clock,
                circuit_breaker=CircuitBreaker(orders=20, open_for=timedelta(seconds=30)),
                lag=lambda: 0.0,
                record=self.logged.append,
            ),
            metrics=self.metrics,
            adapter_id="an_adapter",
            max_body_bytes=1024 * 1024,
            load=Load(),
            clock=self.store.clock,
            names=self.names,
            uses=self.uses,
        )
        self.app = Starlette(routes=[Route(CALLBACK_PATH, self.endpoint)])

    def close(self) -> None:
        async def end() -> None:
            await self._handlers.stop(timedelta(seconds=5))
            await self._reader.aclose()
            self.store.close()

        self.runner.run(end())
        self.runner.close()

    def _wake(self) -> None:
        self.woken += 1

    def _norce(self, request: httpx.Request) -> httpx.Response:
        order_id = unquote(request.url.raw_path.decode().rpartition("/")[2])
        self.read.append(order_id)
        if order_id not in self.norce:
            return httpx.Response(404, json={"code": "order-not-found", "message": "No."})
        return httpx.Response(200, json=self.norce[order_id])

    def ask(
        self,
        order_id: str,
        callback: str = "order-status",
        body: Any = b"",
        *,
        method: str = "POST",
        headers: Sequence[tuple[str, str]] | None = None,
        query: str = "",
        chunks: Sequence[bytes] | None = None,
    ) -> Answer:
        """By the first header secret, unless other headers are given."""
        return self.asks(
            f"/api/v1/callbacks/orders/{quote(order_id, safe='')}/{quote(callback, safe='')}?{query}",
            chunks if chunks is not None else [encoded(body)],
            method=method,
            headers=BY_HEADER if headers is None else headers,
        )

    def asks(self, target: str, chunks: Sequence[bytes], *, method: str, headers: Sequence[tuple[str, str]]) -> Answer:
        return self.asks_in(scope_of(method, target, headers), chunks)

    def asks_in(self, scope: dict[str, Any], chunks: Sequence[bytes]) -> Answer:
        messages = iter([{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks])

        async def receive() -> dict[str, Any]:
            return next(messages, {"type": "http.request", "body": b"", "more_body": False})

        return self.runner.run(asked(self.app, scope, receive))

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"norce_adapter_{name}", labels) or 0.0

    def stored(self, order_id: str) -> list[Any]:
        """The notifications of an order, each with the number of its deliveries."""
        with self.store.read_connection() as connection:
            rows = connection.execute(
                select(notifications).where(notifications.c.order_id == order_id).order_by(notifications.c.id)
            ).all()
            owed = [
                connection.execute(select(deliveries).where(deliveries.c.notification_id == row.id)).all()
                for row in rows
            ]
        return list(zip(rows, owed, strict=True))


def loaded(
    folder: Path, store_url: str = "", *, norce: str = "http://127.0.0.1:1", text: str = CONFIG
) -> configuration.Config:
    path = folder / "config.yaml"
    store_url = store_url or f"sqlite:///{folder}/ledger.db"
    path.write_text(text.replace("@STORE@", store_url).replace("@NORCE@", norce))
    return configuration.load(path, ENVIRON)


BY_HEADER = (
    ("content-type", "application/json"), ("x-merchant", "norce"), ("x-channel", "1"),
    ("authorization", ENVIRON["FIRST"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """On a file, unless the test is about what is stored: then once on each store."""
    url = ""
    if getattr(request, "param", "sqlite") == "postgresql":
        server: Server = request.getfixturevalue("postgres")
        url = server.fresh()
    made = House(tmp_path_factory.mktemp("house"), url)
    yield made
    made.close()
    if url:
        server.drop(url)


on_both_stores = pytest.mark.parametrize("house", KINDS, indirect=True, scope="module")


_numbers = itertools.count(1)


@pytest.fixture
def order() -> dict[str, Any]:
    """Return an order with a new id."""
    return new_order()


def new_order(**members: Any) -> dict[str, Any]:
    return {
        "id": f"order-{next(_numbers)}",
        "merchant": "norce",
        "channel": "1",
        "lastModified": MODIFIED,
        "state": {"currentStatus": "completed"},
        "total": {"includingVat": 1878.1},
    } | members


def is_a_refusal(answer: Answer, status: int, code: str, inner: str | None = None) -> bool:
    """Norce's form of an error: `{code, message, innerErrorCode?}`, codes in kebab-case."""
    body = answer.json
    expected = {"code": code, "message": body["message"]} | ({"innerErrorCode": inner} if inner else {})
    assert (answer.status, body) == (status, expected)
    assert answer.headers["content-type"] == "application/json"
    assert body["message"]
    return all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", each) for each in (code, inner or code))


# --- a notification ---------------------------------------------------------------------------------------------------


@on_both_stores
def test_a_notification_is_stored_byte_for_byte_and_answered_200_without_a_body(
    house: House, order: dict[str, Any]
) -> None:
    body = json.dumps(order, indent=3).encode() + b"\r\n"
    answer = house.ask(order["id"], body=body)

    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
    [(row, owed)] = house.stored(order["id"])
    assert row.body == body
    assert (row.merchant, row.channel, row.callback, row.source) == ("norce", "1", "order-status", "callback")
    assert [delivery.state for delivery in owed] == ["waiting", "waiting"]


@on_both_stores
def test_a_body_that_arrives_in_pieces_is_stored_whole(house: House, order: dict[str, Any]) -> None:
    body = encoded(order)
    answer = house.ask(order["id"], chunks=[body[:1], b"", body[1:50], body[50:]])

    assert answer.status == 200
    assert house.stored(order["id"])[0][0].body == body


@on_both_stores
def test_the_same_event_again_does_nothing_more(house: House, order: dict[str, Any]) -> None:
    respelt = {**order, "lastModified": "2026-02-03T09:16:35.87+01:00", "total": {"includingVat": 1878.10}}
    statuses = [
        house.ask(order["id"], body=body).status
        for body in (order, order, json.dumps(order, indent=1).encode(), {"notification": {}, "order": order}, respelt)
    ]

    assert statuses == [200] * 5
    assert len(house.stored(order["id"])[0][1]) == 2


@on_both_stores
def test_a_repeat_does_not_wake_the_dispatcher(house: House, order: dict[str, Any]) -> None:
    house.ask(order["id"], body=order)
    before = house.woken

    house.ask(order["id"], body=order)

    assert house.woken == before


@on_both_stores
def test_the_same_identity_with_other_order_content_starts_the_routes_that_read_the_order_again(
    house: House, order: dict[str, Any]
) -> None:
    other = {**order, "total": {"includingVat": 1}}
    before = house.woken

    answers = [house.ask(order["id"], body=body).status for body in (order, other, other)]

    assert answers == [200, 200, 200]
    (first, _), (conflict, owed) = house.stored(order["id"])
    assert (conflict.conflicts_with, conflict.body) == (first.id, encoded(other))
    assert len(owed) == sum(route.refetch for route in house.routes.of("order-status"))
    assert house.woken == before + 2


@on_both_stores
def test_a_shadow_records_the_events_that_it_wants_and_nothing_is_read(house: House) -> None:
    wanted, unwanted = new_order(), new_order(state={"currentStatus": "accepted"})
    before = house.counted("deliveries_shadow_total", route="cart-in-shadow")

    for order in (wanted, wanted, unwanted):
        assert ask_signed(house, order["id"], "order-cart", order).status == 200

    [(row, [delivery])] = house.stored(wanted["id"])
    assert (delivery.state, delivery.reason, delivery.attempts) == ("done", "shadow", 0)
    assert row.body == encoded(wanted)  # kept for a backfill
    assert [owed for _, owed in house.stored(unwanted["id"])] == [[]]
    assert house.counted("deliveries_shadow_total", route="cart-in-shadow") == before + 1
    assert not {wanted["id"], unwanted["id"]} & set(house.read)


@on_both_stores
@pytest.mark.parametrize(("status", "reasons"), [("completed", ["shadow"]), ("accepted", [])])
def test_a_conflict_starts_the_other_route_and_is_recorded_by_the_shadow_that_wants_it(
    house: House, order: dict[str, Any], status: str, reasons: list[str]
) -> None:
    other = order | {"state": {"currentStatus": status}, "note": "another"}

    for body in (order, other):
        assert ask_signed(house, order["id"], "order-shipped", body).status == 200

    (_, first), (conflict, second) = house.stored(order["id"])
    assert conflict.conflicts_with is not None
    assert {each.reason for each in first} == {"superseded", "shadow"}
    assert [each.state for each in second if each.reason is None] == ["waiting"]
    assert [each.reason for each in second if each.reason is not None] == reasons


@on_both_stores
def test_a_new_last_modified_is_a_new_event_though_nothing_else_changed(house: House, order: dict[str, Any]) -> None:
    house.ask(order["id"], body=order)
    house.ask(order["id"], body={**order, "lastModified": "2026-02-03T08:16:36Z"})

    assert len(house.stored(order["id"])) == 2


@on_both_stores
def test_only_routes_that_want_a_notification_get_a_delivery(house: House, order: dict[str, Any]) -> None:
    house.ask(order["id"], body={**order, "state": {"currentStatus": "accepted"}})

    [(_, owed)] = house.stored(order["id"])
    assert len(owed) == 1


@on_both_stores
def test_a_notification_that_does_not_match_its_callbacks_condition_is_stored_and_counted(
    house: House, order: dict[str, Any]
) -> None:
    before = sample(house, "norce_adapter_notifications_not_matched_total", callback="order-status")

    answer = house.ask(order["id"], body={**order, "state": {"currentStatus": "declined"}})

    assert answer.status == 200
    [(_, owed)] = house.stored(order["id"])
    assert owed == []
    assert sample(house, "norce_adapter_notifications_not_matched_total", callback="order-status") == before + 1


@on_both_stores
def test_a_hostile_schema_in_the_body_is_never_evaluated(house: House, order: dict[str, Any]) -> None:
    schema: dict[str, Any] = {"$ref": "http://127.0.0.1:9/x.json", "$schema": "http://127.0.0.1:9/y.json"}
    schema["allOf"] = [{"$ref": "#"}, {"pattern": "(a+)+$"}, {"$dynamicRef": "#nowhere"}]
    envelope = {"notification": {"scope": "/nowhere/-/x", "schema": schema, "invoke": "http://127.0.0.1:9/"}}

    answer = house.ask(order["id"], body=envelope | {"order": order | {"notifications": [envelope["notification"]]}})

    assert answer.status == 200
    [(_, owed)] = house.stored(order["id"])
    assert len(owed) == 2


@on_both_stores
def test_an_order_without_last_modified_is_stored_once(house: House, order: dict[str, Any]) -> None:
    del order["lastModified"]
    for body in (order, {"order": order, "notification": {}}, {**order, "total": {"includingVat": 1878.10}}):
        assert house.ask(order["id"], body=body).status == 200

    assert len(house.stored(order["id"])) == 1


@on_both_stores
def test_the_sample_of_the_api_reference_is_accepted(house: House) -> None:
    sample_order = json.loads((ORDERS / "order-api-request-sample.json").read_text())

    assert house.ask("o_yClTSySjyAuuBjmiBlHCjuEcTf", body=sample_order).status == 200


def sample(house: House, name: str, **labels: str) -> float:
    return house.metrics.registry.get_sample_value(name, labels) or 0.0


# --- a validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_rejected_purchase_is_400_with_the_problems_of_all_routes_in_their_order(
    house: House, order: dict[str, Any], method: str
) -> None:
    house.norce[order["id"]] = order

    answer = house.ask(order["id"], "order-rules", method=method)

    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == [
        {"adapterId": "an_adapter", "code": code, "message": f"No: {code}."}
        for code in ("a-first", "a-second", "b-first")
    ]


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_an_approved_purchase_is_200_without_a_body(house: House, order: dict[str, Any], method: str) -> None:
    house.norce[order["id"]] = order | {"approved": True}

    answer = house.ask(order["id"], "order-rules", method=method)

    assert (answer.status, answer.body) == (200, b"")


@pytest.fixture
def switched_off(house: House) -> Iterator[None]:
    """Norce's configuration has us switched off where the house's orders are."""
    house.endpoint.switched_off = {("norce", "1")}
    yield
    house.endpoint.switched_off = ()


@pytest.mark.usefixtures("switched_off")
def test_a_switched_off_channel_approves_every_purchase_without_a_call_to_norce(
    house: House, order: dict[str, Any]
) -> None:
    house.norce[order["id"]] = order
    house.read.clear()

    answer = house.ask(order["id"], "order-rules")

    assert (answer.status, answer.body, house.read) == (200, b"", [])


@pytest.mark.usefixtures("switched_off")
def test_a_switched_off_channel_still_stores_notifications(house: House, order: dict[str, Any]) -> None:
    assert house.ask(order["id"], body=order).status == 200

    with house.store.read_connection() as connection:
        owed = "SELECT count(*) FROM deliveries d JOIN notifications n ON n.id = d.notification_id WHERE order_id = :o"
        assert connection.execute(text(owed), {"o": order["id"]}).scalar() == 2


def test_a_validation_decides_on_norces_order_and_ignores_the_body(house: House, order: dict[str, Any]) -> None:
    house.norce[order["id"]] = order

    answer = house.ask(order["id"], "order-rules", body=order | {"approved": True})

    assert answer.status == 400


@on_both_stores
def test_a_repeated_validation_has_the_same_answer_and_stores_nothing(house: House, order: dict[str, Any]) -> None:
    house.norce[order["id"]] = order
    with house.store.read_connection() as connection:
        before = connection.execute(text("SELECT count(*), (SELECT count(*) FROM lanes) FROM notifications")).one()

    answers = [house.ask(order["id"], "order-rules").body for _ in range(3)]

    assert answers[0] == answers[1] == answers[2]
    with house.store.read_connection() as connection:
        after = connection.execute(text("SELECT count(*), (SELECT count(*) FROM lanes) FROM notifications")).one()
    assert after == before


class Busy:
    """Verdicts without room for another call of the order."""

    async def answer(self, _request: Any) -> Any:
        raise OrderBusy("order-reads")


def test_a_validation_that_others_delay_until_its_deadline_is_503(house: House, order: dict[str, Any]) -> None:
    verdicts, house.endpoint.verdicts = house.endpoint.verdicts, Busy()  # type: ignore[assignment]
    try:
        answer = house.ask(order["id"], "order-rules")
    finally:
        house.endpoint.verdicts = verdicts

    assert is_a_refusal(answer, 503, "order-busy")
    assert int(answer.headers["retry-after"]) > 0
    assert house.counted("limits_reached_total", limit="order-reads") == 1


def test_a_validation_without_routes_is_200_without_a_call_to_norce(house: House, order: dict[str, Any]) -> None:
    answer = house.ask(order["id"], "order-free")

    assert (answer.status, answer.body) == (200, b"")
    assert order["id"] not in house.read


# --- the error list, over HTTP ----------------------------------------------------------------------------------------


class Listening:
    """The whole service on loopback, in a thread of its own, with a stand-in for Norce."""

    def __init__(self, folder: Path, text: str = CONFIG, *, store_url: str = "", points: Any = POINTS) -> None:
        self._folder = folder
        self._points = points
        self._store_url = store_url
        self._text = text
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="service")
        self._thread.start()
        self._up.wait(30)
        if self._failed:
            raise self._failed

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001 - told to the test, in its own thread
            self._failed = error
            self._up.set()
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            self.norce = Simulator(token=ENVIRON["TOKEN"])
            address = await stack.enter_async_context(on_loopback(self.norce.app))
            self.config = loaded(self._folder, self._store_url, norce=f"{address}/checkout", text=self._text)
            self.service = await stack.enter_async_context(running(self.config, build(self.config, self._points)))
            self.address = self.service.public_address
            self._up.set()
            await self._stop.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def post(self, target: str, **given_: Any) -> httpx.Response:
        given_ = {"headers": dict(BY_HEADER)} | given_
        return httpx.request(given_.pop("method", "POST"), f"{self.address}{target}", trust_env=False, **given_)

    def ready(self) -> httpx.Response:
        return httpx.get(f"{self.service.operations_address}/readyz", trust_env=False)

    def raw(self, *pieces: bytes) -> bytes:
        """Send raw bytes and return the answer, until the service closes the connection."""
        parts = urlsplit(self.address)
        with socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE) as connection:
            for piece in pieces:
                connection.sendall(piece)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := connection.recv(65536):
                    received += chunk
        return received


def head_of(target: str, *fields: str, by: Sequence[tuple[str, str]] | None = None) -> bytes:
    """The head of a POST, with the first header secret unless other headers are given."""
    lines = [f"POST {target} HTTP/1.1", "host: x", *(": ".join(pair) for pair in (BY_HEADER if by is None else by))]
    return "\r\n".join([*lines, *fields, "", ""]).encode()


@contextlib.asynccontextmanager
async def on_loopback(asgi: Any) -> AsyncIterator[str]:
    listening = listen("127.0.0.1", 0)
    async with http_server(asgi, listening):
        yield "http://{}:{}".format(*listening.getsockname())


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    service = Listening(tmp_path_factory.mktemp("listening"))
    yield service
    service.close()


ROOT = "/api/v1/callbacks/orders"
STATUS_OF = f"{ROOT}/o1/order-status"
RULES_OF = f"{ROOT}/o1/order-rules"
RULES_FREE = f"{ROOT}/o1/order-free"
ORDER = b'{"id":"o1","merchant":"norce","channel":"1","lastModified":"2026-02-03T08:16:35Z"}'
MIB = 1024 * 1024


def but(**changes: str | None) -> dict[str, str]:
    """The usual headers, with others in place of some or without them."""
    headers: dict[str, str | None] = dict(BY_HEADER)
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    return {name: value for name, value in headers.items() if value is not None}


def in_chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 65536):
        yield b" " * 65536


ERRORS = [
    pytest.param(STATUS_OF, {"content": b"{"}, 400, "order-bad-request", "malformed-json", id="malformed JSON"),
    pytest.param(STATUS_OF, {"content": b""}, 400, "order-bad-request", "malformed-json", id="no body"),
    pytest.param(STATUS_OF, {"content": b"[]"}, 400, "order-bad-request", "malformed-json", id="no object"),
    pytest.param(STATUS_OF, {"content": b'{"id":"o2"}'}, 400, "order-bad-request", "order-id-differs", id="other id"),
    pytest.param(f"{ROOT}/{'x' * 65}/order-status", {"content": b"{}"}, 400, "order-bad-request", "order-id",
                 id="order id too long"),
    pytest.param(f"{ROOT}/{'x' * 65}/order-rules", {}, 400, "order-bad-request", "order-id", id="the same, validation"),
    pytest.param(f"{ROOT}/{'x' * 65}/nothing", {}, 400, "order-bad-request", "order-id", id="the same, no callback"),
    pytest.param(f"{ROOT}/o%0a1/order-status", {"content": b"{}"}, 400, "order-bad-request", "order-id",
                 id="control character"),
    pytest.param(f"{ROOT}/o%00/order-rules", {}, 400, "order-bad-request", "order-id", id="nul"),
    pytest.param(STATUS_OF, {"content": ORDER, "headers": but(x_merchant="other")}, 400, "order-bad-request",
                 "merchant-unclear", id="merchant differs"),
    pytest.param(STATUS_OF, {"content": ORDER, "headers": but(x_channel="2")}, 400, "order-bad-request",
                 "channel-unclear", id="channel differs"),
    pytest.param(STATUS_OF, {"content": b"{}", "headers": but(x_merchant=None)}, 400, "order-bad-request",
                 "merchant-unclear", id="no merchant"),
    pytest.param(RULES_OF, {"headers": but(x_channel=None)}, 400, "order-bad-request", "channel-unclear",
                 id="no channel"),
    pytest.param(RULES_OF, {"headers": [*BY_HEADER, ("x-merchant", "other")]}, 404, "configuration-not-found",
                 "merchant-or-channel", id="two merchants in headers"),
    pytest.param(STATUS_OF, {"content": ORDER, "headers": but(authorization="Bearer wrong")}, 401, "unauthorized", None,
                 id="not authenticated"),
    pytest.param(f"{ROOT}/{{order_id}}/order-status", {"content": b"{}"}, 404, "order-not-found",
                 "unresolved-placeholder", id="literal braces"),
    pytest.param(f"{ROOT}/%7Border.id%7D/order-rules", {}, 404, "order-not-found", "unresolved-placeholder",
                 id="literal braces, validation"),
    pytest.param(f"{ROOT}/{{order_id}}/nothing", {}, 404, "order-not-found", "unresolved-placeholder",
                 id="literal braces, no callback"),
    pytest.param(RULES_OF, {}, 404, "order-not-found", None, id="Norce has no such order"),
    pytest.param(f"{ROOT}/o1/No-Name", {"content": ORDER}, 404, "callback-not-found", None, id="no name of a callback"),
    pytest.param(STATUS_OF, {"content": b"{}", "headers": but(x_merchant="no name")}, 404, "configuration-not-found",
                 "merchant-or-channel", id="no name of a merchant"),
    pytest.param(STATUS_OF, {"content": b"{}", "headers": but(x_channel="x" * 65)}, 404, "configuration-not-found",
                 "merchant-or-channel", id="no name of a channel"),
    pytest.param(RULES_OF, {"headers": but(x_merchant="no name")}, 404, "configuration-not-found",
                 "merchant-or-channel", id="no name of a merchant, validation"),
    pytest.param(STATUS_OF, {"method": "GET"}, 405, "method-not-allowed", None, id="GET of a notification"),
    pytest.param(STATUS_OF, {"method": "PUT", "content": ORDER}, 405, "method-not-allowed", None, id="PUT"),
    pytest.param(RULES_OF, {"method": "DELETE"}, 405, "method-not-allowed", None, id="DELETE of a validation"),
    pytest.param(STATUS_OF, {"content": b" " * (MIB + 1)}, 413, "payload-too-large", None, id="a byte too many"),
    pytest.param(STATUS_OF, {"content": in_chunks(2 * MIB)}, 413, "payload-too-large", None, id="too many, chunked"),
    pytest.param(STATUS_OF, {"content": ORDER, "headers": but(content_type="text/plain")}, 415,
                 "unsupported-media-type", "content-type", id="not JSON"),
    pytest.param(STATUS_OF, {"content": ORDER, "headers": but(content_type=None)}, 415, "unsupported-media-type",
                 "content-type", id="of no type"),
    *(pytest.param(STATUS_OF, {"content": b"x", "headers": but(content_encoding=coding)}, 415,
                   "unsupported-media-type", "content-encoding", id=f"compressed: {coding}")
      for coding in ("gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "identity, gzip", "br ,")),
]  # fmt: skip


@pytest.mark.parametrize(("target", "given_", "status", "code", "inner"), ERRORS)
def test_an_error_has_its_status_and_norces_form(
    listening: Listening, target: str, given_: dict[str, Any], status: int, code: str, inner: str | None
) -> None:
    answer = listening.post(target, **given_)

    assert is_a_refusal(Answer(answer.status_code, answer.headers.raw, answer.content), status, code, inner)


def test_every_error_in_the_table_has_a_test() -> None:
    in_the_list = {(row.values[2], row.values[3]) for row in ERRORS}
    by_themselves = {
        (408, "request-timeout"), (429, "too-many-requests"), (503, "order-busy"), (503, "overloaded"),
        (503, "store-unavailable"),
    }  # fmt: skip

    assert {(status, code) for status, code, _ in endpoints.STATUS.values()} == in_the_list | by_themselves


@pytest.mark.parametrize(
    "target", ["/", "/nothing", f"{STATUS_OF}/", f"{ROOT}/o%2F1/order-status", f"{ROOT}//order-status", "/readyz"]
)
def test_another_address_is_404_in_the_same_form_and_never_a_redirect(listening: Listening, target: str) -> None:
    answer = listening.post(target, content=ORDER)

    assert is_a_refusal(Answer(answer.status_code, answer.headers.raw, answer.content), 404, "not-found")


@pytest.mark.parametrize("coding", ["identity", "Identity", "", "utf-8", "UTF-8", "none"])
def test_other_content_codings_are_ignored(listening: Listening, coding: str) -> None:
    answer = listening.post(STATUS_OF, content=ORDER, headers=but(content_encoding=coding))

    assert answer.status_code == 200


def test_a_415_for_a_compressed_body_says_what_is_accepted(listening: Listening) -> None:
    answer = listening.post(STATUS_OF, content=b"x", headers=but(content_encoding="gzip"))

    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("name", ["content-type", "authorization", "x-merchant", "x-channel"])
def test_equal_values_of_a_doubled_header_are_one_value(listening: Listening, name: str) -> None:
    value = dict(BY_HEADER)[name]

    answer = listening.post(STATUS_OF, content=ORDER, headers=[*BY_HEADER, (name, value), (name, value)])

    assert answer.status_code == 200


@pytest.mark.parametrize("content", [b" " * (2 * MIB), in_chunks(3 * MIB)], ids=["length", "chunked"])
def test_the_body_of_a_validation_is_discarded_whatever_its_size(listening: Listening, content: Any) -> None:
    with httpx.Client(base_url=listening.address, headers=dict(BY_HEADER), trust_env=False) as http:
        large = http.post(RULES_OF, content=content)
        next_on_the_connection = http.post(STATUS_OF, content=ORDER)

    assert (large.status_code, large.json()["code"]) == (404, "order-not-found")  # Norce has been asked
    assert next_on_the_connection.status_code == 200


def test_a_compressed_body_of_a_validation_is_discarded(listening: Listening) -> None:
    answer = listening.post(RULES_OF, content=b"x", headers=but(content_encoding="gzip"))

    assert answer.json()["code"] == "order-not-found"


@pytest.mark.parametrize(
    ("target", "allowed"), [("/api/v1/orders/o1/registrations", "DELETE, POST"), ("/docs/v1/openapi.yaml", "GET, HEAD")]
)
def test_a_405_beside_the_callbacks_has_norces_form(listening: Listening, target: str, allowed: str) -> None:
    answer = listening.post(target, method="PATCH")

    assert is_a_refusal(Answer(answer.status_code, answer.headers.raw, answer.content), 405, "method-not-allowed")
    assert sorted(answer.headers["allow"].split(", ")) == allowed.split(", ")


@pytest.mark.parametrize(("target", "allowed"), [(STATUS_OF, "POST"), (RULES_OF, "POST, GET")])
def test_a_405_lists_the_allowed_methods(listening: Listening, target: str, allowed: str) -> None:
    answer = listening.post(target, method="PATCH", content=ORDER)

    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_head_of_a_validation_is_405(listening: Listening) -> None:
    answer = listening.post(RULES_OF, method="HEAD")

    assert (answer.status_code, answer.content) == (405, b"")


def test_the_largest_body_is_accepted_and_the_connection_stays_open(listening: Listening) -> None:
    body = b'{"id":"large","merchant":"norce","channel":"1","x":"' + b"x" * (MIB - 60)
    body += b"y" * (MIB - len(body) - 2) + b'"}'
    with httpx.Client(base_url=listening.address, headers=dict(BY_HEADER), trust_env=False) as http:
        first = http.post(f"{ROOT}/large/order-status", content=body)
        second = http.post(f"{ROOT}/large/order-status", content=iter([body[:1000], body[1000:]]))

    assert len(body) == MIB
    assert (first.status_code, second.status_code) == (200, 200)


def test_a_body_that_is_longer_than_it_says_is_cut_off_before_it_is_sent(listening: Listening) -> None:
    answer = listening.raw(head_of(STATUS_OF, "content-length: 999999999"), b" " * (MIB + 1))

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


def test_a_body_that_is_shorter_than_it_says_stores_nothing(listening: Listening) -> None:
    head = head_of(f"{ROOT}/short/order-status", "content-length: 500")
    body = b'{"id":"short"}'
    parts = urlsplit(listening.address)
    with socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE) as connection:
        connection.sendall(head + body)
    after = listening.post(f"{ROOT}/after/order-status", content=b"{}")

    assert after.status_code == 200
    assert rows(listening.config.store.url, "SELECT order_id FROM notifications WHERE order_id = 'short'") == []


@pytest.mark.parametrize("length", ["1", "999999999", "-1", "abc", None], ids=str)
def test_the_size_limit_counts_received_bytes_and_not_the_header(house: House, length: str | None) -> None:
    small, big = new_order(), new_order()
    headers = [*BY_HEADER, *([("content-length", length)] if length else [])]

    assert house.ask(small["id"], body=small, headers=headers).status == 200
    answer = house.ask(big["id"], chunks=[encoded(big), *[b" " * 65536] * 17], headers=headers)
    assert is_a_refusal(answer, 413, "payload-too-large")
    assert answer.headers["connection"] == "close"
    assert house.stored(big["id"]) == []


def test_a_body_that_is_too_large_is_not_read_to_its_end(house: House) -> None:
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 65536
        return {"type": "http.request", "body": b" " * 65536, "more_body": True}

    answer = house.runner.run(asked(house.app, scope_of("POST", STATUS_OF, BY_HEADER), receive))

    assert answer.status == 413
    assert read <= MIB + 65536


# --- slow and vanished callers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [STATUS_OF, RULES_OF, f"{ROOT}/o1/nothing"], ids=["order", "validation", "unknown"])
@pytest.mark.parametrize(
    ("headers", "query"),
    [((), ""), ([("authorization", "Bearer wrong")], ""), ((), "secret=wrong"), ((), "key=new&sig=x")],
    ids=["nothing", "header", "secret", "signature"],
)
def test_an_unknown_caller_is_refused_before_its_body_is_read(
    house: House, target: str, headers: Sequence[tuple[str, str]], query: str
) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is not read")

    answer = house.runner.run(asked(house.app, scope_of("POST", f"{target}?{query}", headers), receive))

    assert is_a_refusal(answer, 401, "unauthorized")
    assert answer.headers["connection"] == "close"


def test_a_known_caller_beyond_the_limit_is_refused_before_its_body_is_read(house: House) -> None:
    house.endpoint.load.running = MOST_AT_ONCE

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is not read")

    try:
        answer = house.runner.run(asked(house.app, scope_of("POST", STATUS_OF, BY_HEADER), receive))
        unknown = house.runner.run(asked(house.app, scope_of("POST", STATUS_OF, ()), receive))
    finally:
        house.endpoint.load.running = 0

    assert is_a_refusal(answer, 503, "overloaded")
    assert int(answer.headers["retry-after"]) > 0
    assert is_a_refusal(unknown, 401, "unauthorized")


@pytest.mark.parametrize("target", [STATUS_OF, RULES_OF], ids=["notification", "validation"])
def test_a_request_counts_for_the_limit_until_it_is_answered(house: House, target: str) -> None:
    running = []

    async def receive() -> dict[str, Any]:
        running.append(house.endpoint.load.running)
        return {"type": "http.request", "body": ORDER}

    house.runner.run(asked(house.app, scope_of("POST", target, BY_HEADER), receive))
    house.runner.run(asked(house.app, scope_of("POST", target, ()), receive))

    assert running == ([1] if target == STATUS_OF else [])
    assert house.endpoint.load.running == 0


def test_an_unknown_caller_that_sends_no_body_is_answered_and_cut_off(listening: Listening) -> None:
    answer = listening.raw(head_of(STATUS_OF, "content-length: 100", "expect: 100-continue", by=()))

    assert answer.startswith(b"HTTP/1.1 401 ")


@on_both_stores
def test_a_caller_that_disconnects_during_its_body_stores_nothing(house: House) -> None:
    pieces = iter([{"type": "http.request", "body": b'{"id":"gone"}', "more_body": True}])

    async def receive() -> dict[str, Any]:
        return next(pieces, {"type": "http.disconnect"})

    answer = house.runner.run(asked(house.app, scope_of("POST", f"{ROOT}/gone/order-status", BY_HEADER), receive))

    assert answer.status == 408
    assert house.stored("gone") == []


def test_a_slow_body_over_http_is_answered_408_and_cut_off(tmp_path: Path) -> None:
    service = Listening(tmp_path, CONFIG.replace("receive_timeout: 5s", "receive_timeout: 100ms"))
    try:
        answer = service.raw(head_of(STATUS_OF, "content-length: 100") + b"{")
    finally:
        service.close()

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


# --- a store that fails -----------------------------------------------------------------------------------------------


class Failing:
    """An inbox that cannot write now."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def receive(self, _receipt: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    "error", [StoreUnavailable("disk full at /var/x"), StoreBusy("too much")], ids=["full", "busy"]
)
def test_a_store_that_cannot_write_is_503_with_retry_after(
    house: House, order: dict[str, Any], error: Exception
) -> None:
    inbox, house.endpoint.intake.inbox = house.endpoint.intake.inbox, Failing(error)  # type: ignore[assignment]
    try:
        answer = house.ask(order["id"], body=order)
    finally:
        house.endpoint.intake.inbox = inbox

    assert is_a_refusal(answer, 503, "store-unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert b"/var/x" not in answer.body
    assert house.ask(order["id"], body=order).status == 200


def test_a_full_database_is_503_and_recovers_without_a_restart(tmp_path: Path) -> None:
    full = False
    made = House(tmp_path)

    def limit(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages if full else 1_000_000}")

    event.listen(made.store.engine, "begin", limit)
    try:
        before = [made.ask(order["id"], body=order).status for order in [new_order()]]
        full = True
        lost = [new_order(x="x" * 50_000) for _ in range(3)]
        meanwhile = [made.ask(order["id"], body=order) for order in lost]
        failing = made.store.failing
        left = [made.stored(order["id"]) for order in lost]
        full = False
        after = [made.ask(order["id"], body=order).status for order in lost]

        assert before == [200]
        assert all(is_a_refusal(answer, 503, "store-unavailable") for answer in meanwhile)
        assert failing
        assert left == [[], [], []]
        assert after == [200, 200, 200]
        assert not made.store.failing
        assert all(len(made.stored(order["id"])) == 1 for order in lost)
    finally:
        made.close()


def test_a_running_service_on_a_full_disk_refuses_notifications_and_recovers(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: the same error from the same system call."""
    service = Listening(tmp_path)
    database = Path(service.config.store.url.removeprefix("sqlite:///"))
    written = Path(f"{database}-wal")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        assert service.post(f"{ROOT}/before/order-status", content=b'{"id":"before"}').status_code == 200
        size = max(database.stat().st_size, written.stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            body = b'{"id":"lost","x":"' + b"x" * 500_000 + b'"}'
            refused = service.post(f"{ROOT}/lost/order-status", content=body)
            meanwhile = service.ready()
            validation = service.post(f"{ROOT}/before/order-free")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        again = service.post(f"{ROOT}/lost/order-status", content=body)
        ready = service.ready()
    finally:
        service.close()

    assert (refused.status_code, refused.json()["code"]) == (503, "store-unavailable")
    assert int(refused.headers["retry-after"]) > 0
    assert (meanwhile.status_code, meanwhile.json()["checks"]["store"]) == (200, False)  # it also answers validations
    assert validation.status_code == 200
    assert again.status_code == 200
    assert (ready.status_code, ready.json()["ready"]) == (200, True)


def test_a_moved_ledger_refuses_notifications_and_answers_validations(tmp_path: Path) -> None:
    service = Listening(tmp_path)
    database = Path(service.config.store.url.removeprefix("sqlite:///"))
    try:
        before = service.post(f"{ROOT}/before/order-status", content=b'{"id":"before"}')
        database.rename(database.with_name("moved.db"))
        refused = service.post(f"{ROOT}/lost/order-status", content=b'{"id":"lost"}')
        ready = service.ready()
        validation = service.post(f"{ROOT}/before/order-free")
        database.with_name("moved.db").rename(database)
        again = service.post(f"{ROOT}/lost/order-status", content=b'{"id":"lost"}')
        stored = rows(f"sqlite:///{database}", "SELECT order_id FROM notifications ORDER BY id")
    finally:
        service.close()

    assert before.status_code == again.status_code == validation.status_code == 200
    assert (refused.status_code, refused.json()["code"]) == (503, "store-unavailable")
    assert (ready.status_code, ready.json()["checks"]["store"]) == (200, False)
    assert stored == [("before",), ("lost",)]


@contextlib.contextmanager
def away(server: Server, url: str) -> Iterator[None]:
    """The database cannot be reached: its connections end, and it takes no others."""
    name = database_of(url)
    with server.connect("postgres") as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_a_lost_database_is_503_for_notifications_only_and_recovers(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fresh()
    service = Listening(tmp_path, store_url=url)
    body = b'{"id":"lost"}'
    try:
        before = service.post(f"{ROOT}/before/order-status", content=b'{"id":"before"}')
        with away(postgres, url):
            refused = service.post(f"{ROOT}/lost/order-status", content=body)
            meanwhile = service.ready()
            validation = service.post(f"{ROOT}/before/order-free")
        again = service.post(f"{ROOT}/lost/order-status", content=body)
        ready = service.ready()
        stored = rows(url, "SELECT order_id FROM notifications ORDER BY id")
    finally:
        service.close()
        postgres.drop(url)

    assert before.status_code == 200
    assert (refused.status_code, refused.json()["code"]) == (503, "store-unavailable")
    assert int(refused.headers["retry-after"]) > 0
    assert b"test_" not in refused.content
    assert (meanwhile.status_code, meanwhile.json()["checks"]["store"]) == (200, False)  # it also answers validations
    assert validation.status_code == 200
    assert again.status_code == 200
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert stored == [("before",), ("lost",)]


# --- who may call -----------------------------------------------------------------------------------------------------


def signed(key: str, name: str, order_id: str, callback: str, merchant: str = "norce", channel: str = "1") -> str:
    named = json.dumps(["v1", merchant, channel, order_id, callback], separators=(",", ":"), ensure_ascii=False)
    digest = hmac.new(key.encode(), named.encode(), hashlib.sha256).digest()
    sig = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    return urlencode({"merchant": merchant, "channel": channel, "key": name, "sig": sig})


NEW, OLD = ENVIRON["NEW_KEY"], ENVIRON["OLD_KEY"]
UNSIGNED = tuple(pair for pair in BY_HEADER if pair[0] != "authorization")
SIG = signed(NEW, "new", "o1", "CALLBACK")
OK, NO = 200, 401
OK_IF_STORED = 0  # 401 for a validation or a hook

# The query and the header that show who calls; CALLBACK stands for the callback's name.
MATRIX = [
    pytest.param(lambda c: signed(NEW, "new", "o1", c), {}, OK, id="signed: first key"),
    pytest.param(lambda c: signed(OLD, "old", "o1", c), {}, OK, id="signed: second key"),
    pytest.param(lambda c: signed("x" * 32, "new", "o1", c), {}, NO, id="signed: wrong key"),
    pytest.param(lambda c: signed(OLD, "new", "o1", c), {}, NO, id="signed: key under another name"),
    pytest.param(lambda c: signed(NEW, "gone", "o1", c), {}, NO, id="signed: key name unknown"),
    pytest.param(lambda c: signed(NEW, "new", "o2", c), {}, NO, id="signed: another order's"),
    pytest.param(lambda c: signed(NEW, "new", "o1", "nothing"), {}, NO, id="signed: another callback's"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c, "other").replace("other", "norce"), {}, NO,
                 id="signed: another merchant's"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c, channel="2").replace("channel=2", "channel=1"), {}, NO,
                 id="signed: another channel's"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c) + "%3D", {}, NO, id="signed: malformed"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c).partition("sig=")[0] + "sig=", {}, NO, id="signed: empty"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c).partition("sig=")[0] + "sig=%C3%A9", {}, NO,
                 id="signed: non-ASCII"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c).partition("sig=")[0] + "sig=%FF%00", {}, NO,
                 id="signed: not UTF-8"),
    pytest.param(lambda c: (q := signed(NEW, "new", "o1", c)) + "&" + q, {}, NO, id="signed: all repeated"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c) + "&sig=x", {}, NO, id="signed: sig repeated"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c) + "&key=old", {}, NO, id="signed: key repeated"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c) + "&merchant=other", {}, NO, id="signed: merchant repeated"),
    pytest.param(lambda c: signed(NEW, "new", "o1", c) + "&channel=2", {}, NO, id="signed: channel repeated"),
    pytest.param(lambda c: "sig=x&merchant=norce&channel=1&key=new", {"authorization": ENVIRON["FIRST"]}, NO,
                 id="signed: wrong, beside a good header"),
    pytest.param(lambda c: "", {}, NO, id="none"),
    pytest.param(lambda c: "", {"authorization": ENVIRON["FIRST"]}, OK, id="header: first"),
    pytest.param(lambda c: "", {"authorization": ENVIRON["SECOND"]}, OK, id="header: second"),
    pytest.param(lambda c: "", {"AUTHORIZATION": ENVIRON["SECOND"]}, OK, id="header: name in any case"),
    pytest.param(lambda c: "", {"authorization": "Bearer wrong"}, NO, id="header: wrong"),
    pytest.param(lambda c: "", {"authorization": ""}, NO, id="header: empty"),
    pytest.param(lambda c: "", {"authorization": "Bearer"}, NO, id="header: malformed"),
    pytest.param(lambda c: "", {"authorization": "\u00e9\u00ff"}, NO, id="header: non-ASCII"),
    pytest.param(lambda c: "", {"authorization": ENVIRON["FIRST"], "Authorization": ENVIRON["FIRST"]}, OK,
                 id="header: the same twice"),
    pytest.param(lambda c: "", {"authorization": ENVIRON["FIRST"], "Authorization": ENVIRON["SECOND"]}, NO,
                 id="header: two values"),
    pytest.param(lambda c: "", {"authorization": ENVIRON["FIRST_STATIC"]}, NO, id="header: the url's secret"),
    pytest.param(lambda c: "", {"x-bound": ENVIRON["BOUND"]}, NO, id="header: of another merchant"),
    pytest.param(lambda c: "", {"x-bound": ENVIRON["FIRST"]}, NO, id="header: another header's secret"),
    pytest.param(lambda c: f"secret={ENVIRON['FIRST_STATIC']}", {}, OK_IF_STORED, id="url: first"),
    pytest.param(lambda c: f"secret={ENVIRON['SECOND_STATIC']}", {}, OK_IF_STORED, id="url: second"),
    pytest.param(lambda c: f"secret={ENVIRON['SECOND_STATIC']}", {"authorization": ENVIRON["FIRST"]}, OK,
                 id="url, and header"),
    pytest.param(lambda c: "secret=wrong", {}, NO, id="url: wrong"),
    pytest.param(lambda c: "secret", {}, NO, id="url: malformed"),
    pytest.param(lambda c: "secret=%C3%A9%FF", {}, NO, id="url: non-ASCII"),
    pytest.param(lambda c: f"secret={ENVIRON['FIRST_STATIC']}&secret={ENVIRON['FIRST_STATIC']}", {}, NO,
                 id="url: repeated"),
    pytest.param(lambda c: f"Secret={ENVIRON['FIRST_STATIC']}", {}, NO, id="url: another parameter"),
]  # fmt: skip


@pytest.mark.parametrize("callback", ["order-status", "order-free"])
@pytest.mark.parametrize(("query", "shown", "status"), MATRIX)
def test_callers_are_accepted_or_refused(
    house: House, query: Callable[[str], str], shown: dict[str, str], status: int, callback: str
) -> None:
    headers = [*UNSIGNED, *shown.items()]
    if status == OK_IF_STORED:
        status = OK if callback == "order-status" else NO

    answer = house.ask("o1", callback, ORDER, headers=headers, query=query(callback))

    assert answer.status == status
    if status == NO:
        told = house.ask("o1", "nothing", method="PUT", headers=[])  # the plainest refusal there is
        assert (answer.body, answer.headers) == (told.body, told.headers)
        assert is_a_refusal(answer, 401, "unauthorized")


def test_a_secret_in_a_url_that_is_refused_for_a_validation_is_named_in_log_and_metric(house: House) -> None:
    labels = {"scheme": "url", "key": "secret-1", "result": "refused"}
    before = house.counted("auth_total", **labels)
    with capture_logs() as logged:
        answer = house.ask("o1", "order-free", headers=UNSIGNED, query=f"secret={ENVIRON['FIRST_STATIC']}")

    assert answer.status == 401
    assert [line["reason"] for line in logged] == ["a secret in the URL is valid for notifications only"]
    assert house.counted("auth_total", **labels) == before + 1


def test_a_refused_caller_learns_nothing_about_the_configuration(house: House) -> None:
    answers = [
        house.ask(*asked_, headers=UNSIGNED)
        for asked_ in [("o1", "order-status", ORDER), ("o1", "nothing"), ("{order_id}", "order-rules"), ("x" * 65,)]
    ]

    assert [answer.status for answer in answers] == [401] * 4
    assert len({answer.body for answer in answers}) == 1


@on_both_stores
def test_a_secret_bound_to_merchants_is_valid_for_these_alone(house: House) -> None:
    """Refused also where the body alone names the other merchant."""
    bound = [("content-type", "application/json"), ("x-bound", ENVIRON["BOUND"])]
    own, foreign = new_order(merchant="other"), new_order(merchant="norce")

    assert house.ask(own["id"], body=own, headers=bound).status == 200
    assert is_a_refusal(house.ask(foreign["id"], body=foreign, headers=bound), 401, "unauthorized")
    assert house.stored(foreign["id"]) == []


# --- limits of an order and of a secret -------------------------------------------------------------------------------


class Minute:
    """A clock that stands still."""

    def __call__(self) -> float:
        return 1000.0


@pytest.fixture
def limited(house: House) -> Iterator[House]:
    """Two calls of an order a minute, and three with a secret in the URL."""
    endpoint = house.endpoint
    before = endpoint.calls_of_order, endpoint.calls_by_url_secret, endpoint.delay_beyond_limits
    endpoint.delay_beyond_limits = 0
    endpoint.calls_of_order = CallLimit("order-calls", at_once=5, a_minute=2, clock=Minute())
    endpoint.calls_by_url_secret = CallLimit("url-secret-calls", at_once=32, a_minute=3, clock=Minute())
    yield house
    endpoint.calls_of_order, endpoint.calls_by_url_secret, endpoint.delay_beyond_limits = before


def ask_signed(house: House, order_id: str, callback: str, body: Any = b"") -> Answer:
    return house.ask(order_id, callback, body, headers=UNSIGNED, query=signed(NEW, "new", order_id, callback))


def test_the_limits_of_an_order_and_of_a_secret(house: House) -> None:
    limits = house.endpoint.calls_of_order, house.endpoint.calls_by_url_secret

    assert [(limit._at_once, limit._a_minute) for limit in limits] == [(32, 600), (250, 6000)]


def test_validations_beyond_the_limit_of_their_order_are_503_and_others_are_answered(limited: House) -> None:
    mine, other = new_order(), new_order()
    limited.norce |= {mine["id"]: mine, other["id"]: other}
    before = limited.counted("limits_reached_total", limit="order-calls")

    answers = [ask_signed(limited, mine["id"], "order-rules") for _ in range(4)]

    assert [answer.status for answer in answers] == [400, 400, 503, 503]
    assert is_a_refusal(answers[3], 503, "order-busy")
    assert int(answers[3].headers["retry-after"]) > 0
    assert ask_signed(limited, other["id"], "order-rules").status == 400
    assert limited.counted("limits_reached_total", limit="order-calls") == before + 2


def test_all_callbacks_of_an_order_count_together(limited: House, order: dict[str, Any]) -> None:
    statuses = [
        ask_signed(limited, order["id"], callback, order).status
        for callback in ("order-free", "order-status", "order-free", "order-status", "order-total")
    ]

    assert statuses == [200, 200, 503, 429, 429]


def test_calls_with_a_header_secret_do_not_count_for_signed_ones(limited: House, order: dict[str, Any]) -> None:
    """A shopper has the signed addresses, and must not use up what Norce may do with the secret."""
    flood = [ask_signed(limited, order["id"], "order-free").status for _ in range(3)]

    assert (flood, limited.ask(order["id"], "order-free").status) == ([200, 200, 503], 200)


def test_calls_count_as_running_while_their_bodies_come(limited: House) -> None:
    house = limited
    house.endpoint.calls_of_order = CallLimit("order-calls", at_once=5, a_minute=100, clock=Minute())
    order_id = new_order()["id"]
    target = f"{ROOT}/{order_id}/order-status?{signed(NEW, 'new', order_id, 'order-status')}"

    async def ask() -> tuple[Answer, Answer, list[Answer]]:
        come = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await come.wait()
            return {"type": "http.request", "body": encoded(new_order(id=order_id)), "more_body": False}

        def call() -> asyncio.Task[Answer]:
            return asyncio.create_task(asked(house.app, scope_of("POST", target, UNSIGNED), receive))

        slow = [call() for _ in range(5)]
        await asyncio.sleep(0)
        refused = await call()
        come.set()
        answers = await asyncio.gather(*slow)
        return refused, await call(), answers

    refused, after, answers = house.runner.run(ask())
    assert is_a_refusal(refused, 429, "too-many-requests")
    assert (after.status, {answer.status for answer in answers}) == (200, {200})


@on_both_stores
def test_a_notification_beyond_the_limit_is_stored_unread_if_its_routes_read_the_order_again(limited: House) -> None:
    order = new_order()
    target = f"{ROOT}/{order['id']}/order-paid?{signed(NEW, 'new', order['id'], 'order-paid')}"
    for _ in range(2):
        assert ask_signed(limited, order["id"], "order-free").status == 200

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is not read")

    async def flood() -> list[Answer]:
        calls = (asked(limited.app, scope_of("POST", target, UNSIGNED), receive) for _ in range(20))
        return await asyncio.gather(*calls)

    answers = limited.runner.run(flood())

    assert [(answer.status, answer.body) for answer in answers] == [(200, b"")] * 20
    [(row, owed)] = limited.stored(order["id"])
    assert (row.body, [delivery.state for delivery in owed]) == (None, ["waiting"])


@on_both_stores
def test_a_notification_beyond_the_limit_is_left_to_the_routes_that_read_the_order_beside_a_shadow(
    limited: House,
) -> None:
    order = new_order()
    before = limited.counted("deliveries_shadow_total", route="shipped-in-shadow")
    for _ in range(2):
        assert ask_signed(limited, order["id"], "order-free").status == 200

    assert ask_signed(limited, order["id"], "order-shipped", order).status == 200

    [(row, owed)] = limited.stored(order["id"])
    assert (row.body, [delivery.state for delivery in owed]) == (None, ["waiting"])
    assert limited.counted("deliveries_shadow_total", route="shipped-in-shadow") == before


def test_a_notification_beyond_the_limit_is_429_if_there_are_only_shadows(limited: House) -> None:
    """A shadow decides on the body, so nothing could be stored before the 200."""
    order = new_order()

    statuses = [ask_signed(limited, order["id"], "order-cart", order | {"note": n}).status for n in range(3)]

    assert statuses == [200, 200, 429]


@on_both_stores
def test_a_notification_beyond_the_limit_is_429_if_a_route_needs_its_body(limited: House) -> None:
    order = new_order()
    answers = [ask_signed(limited, order["id"], "order-status", order | {"note": number}) for number in range(3)]

    assert [answer.status for answer in answers] == [200, 200, 429]
    assert is_a_refusal(answers[2], 429, "too-many-requests")
    assert int(answers[2].headers["retry-after"]) > 0
    assert all(row.body is not None for row, _ in limited.stored(order["id"]))


def test_a_notification_beyond_the_limit_is_429_if_only_its_body_names_the_channel(limited: House) -> None:
    order = new_order()
    headers = [pair for pair in BY_HEADER if pair[0] != "x-channel"]

    statuses = [limited.ask(order["id"], "order-paid", order, headers=headers).status for _ in range(3)]

    assert statuses == [200, 200, 429]


def test_an_invalid_notification_beyond_the_limit_is_refused_as_before(limited: House) -> None:
    order = new_order()
    foreign = [(name, "9" if name == "x-channel" else value) for name, value in BY_HEADER]

    statuses = [limited.ask(order["id"], "order-paid", order, headers=foreign).status for _ in range(2)]
    beyond = limited.ask(order["id"], "order-paid", headers=foreign)

    assert statuses == [400, 400]  # the body names another channel
    assert is_a_refusal(beyond, 404, "configuration-not-found", "merchant-or-channel")
    assert limited.ask(order["id"], "order-paid", method="PUT").status == 405


@pytest.fixture
def small(house: House) -> Iterator[House]:
    """Room for the bodies of three notifications of an order."""
    before = house.endpoint.bytes_of_order
    size = len(encoded(new_order(note=0)))
    house.endpoint.bytes_of_order = ByteLimit("order-bytes", most=size * 3, seconds=60, clock=Minute())
    yield house
    house.endpoint.bytes_of_order = before


def test_an_order_has_20_mib_a_day_for_the_bodies_of_its_notifications(house: House) -> None:
    assert house.endpoint.bytes_of_order._limit == 20 * 1024 * 1024


@on_both_stores
def test_bodies_beyond_the_bytes_of_their_order_are_left_out(small: House) -> None:
    order, other = new_order(), new_order()
    before = small.counted("limits_reached_total", limit="order-bytes")

    sent = [ask_signed(small, order["id"], "order-paid", order | {"note": number}).status for number in range(8)]

    assert sent == [200] * 8
    assert small.counted("limits_reached_total", limit="order-bytes") == before + 5
    bodies = [row.body is not None for row, _ in small.stored(order["id"])]
    assert bodies.count(True) == 3
    assert bodies.count(False) <= 1
    assert ask_signed(small, other["id"], "order-paid", other).status == 200
    assert [row.body for row, _ in small.stored(other["id"])] == [encoded(other)]


def test_a_body_beyond_the_bytes_of_its_order_is_429_if_a_route_needs_it(small: House) -> None:
    order = new_order()

    answers = [ask_signed(small, order["id"], "order-status", order | {"note": number}) for number in range(4)]

    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert is_a_refusal(answers[3], 429, "too-many-requests")


def test_only_bodies_of_notifications_count_among_the_bytes_of_an_order(small: House) -> None:
    order = new_order()
    for _ in range(5):
        assert ask_signed(small, order["id"], "order-free", order).status == 200

    assert ask_signed(small, order["id"], "order-paid", order).status == 200
    assert [row.body for row, _ in small.stored(order["id"])] == [encoded(order)]


def test_calls_with_a_secret_in_the_url_share_a_limit_and_leave_the_orders_theirs(limited: House) -> None:
    by_url = {"headers": UNSIGNED, "query": f"secret={ENVIRON['FIRST_STATIC']}"}
    orders = [new_order() for _ in range(4)]

    answers = [limited.ask(order["id"], "order-paid", order, **by_url) for order in orders]

    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert is_a_refusal(answers[3], 429, "too-many-requests")
    assert limited.stored(orders[3]["id"]) == []
    assert [ask_signed(limited, orders[0]["id"], "order-paid", orders[0]).status for _ in range(2)] == [200, 200]
    assert limited.counted("limits_reached_total", limit="url-secret-calls") > 0


def test_a_call_beyond_the_limit_waits_and_leaves_the_service_to_the_others(limited: House) -> None:
    limited.endpoint.delay_beyond_limits = PATIENCE
    target = f"{ROOT}/waits/order-free?{signed(NEW, 'new', 'waits', 'order-free')}"
    for _ in range(2):
        assert ask_signed(limited, "waits", "order-free").status == 200
    running = limited.endpoint.load.running

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is not read")

    async def flood() -> list[bool]:
        calls = [
            asyncio.create_task(asked(limited.app, scope_of("POST", target, UNSIGNED), receive)) for _ in range(100)
        ]
        await asyncio.sleep(0)
        assert limited.endpoint.load.running == running
        assert (await asked(limited.app, scope_of("POST", RULES_FREE, BY_HEADER), receive)).status == 200
        done = [call.done() for call in calls]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return done

    assert not any(limited.runner.run(flood()))


def test_an_order_has_few_large_hooks_at_once_and_others_have_room(limited: House) -> None:
    """A decoded order takes nine times the memory of its body."""
    limited.endpoint.calls_of_order = CallLimit("order-calls", at_once=32, a_minute=600, clock=Minute())
    Slow.may_end.clear()

    def call(order_id: str, number: int, size: int) -> "asyncio.Task[Answer]":
        body = encoded(new_order(id=order_id, number=number, text="x" * size))
        target = f"{ROOT}/{order_id}/cart-changed?{signed(NEW, 'new', order_id, 'cart-changed')}"

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        return asyncio.create_task(asked(limited.app, scope_of("POST", target, UNSIGNED), receive))

    async def ask() -> tuple[Answer, list[Answer]]:
        sizes = [MIB - 1000] * 2 + [100_000, 1000]
        large = [call("large", number, size) for number, size in enumerate(sizes)]
        other = call("other", 0, MIB - 1000)
        for _ in range(4):
            await asyncio.to_thread(Slow.begun.get, timeout=PATIENCE)
        refused = await large[2]
        Slow.may_end.set()
        return refused, list(await asyncio.gather(large[0], large[1], large[3], other))

    refused, answered = limited.runner.run(ask())
    assert is_a_refusal(refused, 503, "order-busy")
    assert [answer.json["code"] for answer in answered] == ["slow"] * 4
    assert limited.endpoint.large_hooks._bytes == {}


def test_the_bytes_of_the_hooks_of_an_order_are_limited_and_others_have_room(limited: House) -> None:
    limited.endpoint.calls_of_order = CallLimit("order-calls", at_once=32, a_minute=600, clock=Minute())
    orders = [new_order(id="many", number=number, text="x" * 2000) for number in range(3)]
    limit = limited.endpoint.hook_bytes_of_order
    limited.endpoint.hook_bytes_of_order = ByteLimit(
        "hook-bytes", most=3 * len(encoded(orders[0])) - 1, seconds=600, clock=Minute()
    )
    try:
        answers = [ask_signed(limited, "many", "cart-changed", order) for order in orders]
        other = ask_signed(limited, "another", "cart-changed", new_order(id="another"))
    finally:
        limited.endpoint.hook_bytes_of_order = limit

    assert [answer.status for answer in answers] == [400, 400, 503]
    assert is_a_refusal(answers[2], 503, "order-busy")
    assert other.json["code"] == "slow"
    assert limited.counted("limits_reached_total", limit="hook-bytes") > 0


def test_an_order_may_send_32_mib_of_hooks_in_ten_minutes(limited: House) -> None:
    limit = limited.endpoint.hook_bytes_of_order

    taken = [limit.take("at its limit", MIB) for _ in range(33)]

    assert taken == [True] * 32 + [False]


def test_a_refusal_beyond_the_limit_is_below_the_usual_level_of_the_log(limited: House, order: dict[str, Any]) -> None:
    """A line for each would fill the disk. `limit_reached` comes once a minute."""
    with capture_logs() as logged:
        for _ in range(4):
            ask_signed(limited, order["id"], "order-free")

    answered = [line["log_level"] for line in logged if line["event"] == "callback_answered"]
    assert answered == ["info", "info", "debug", "debug"]


def test_callers_that_are_not_known_use_up_nothing(limited: House) -> None:
    order = new_order()
    for _ in range(5):
        assert limited.ask(order["id"], "order-free", headers=UNSIGNED, query="sig=x").status == 401

    assert len(limited.endpoint.calls_of_order) == 0
    assert ask_signed(limited, order["id"], "order-free").status == 200


# --- nothing that a caller sends is a 500 -----------------------------------------------------------------------------

DOCUMENTED = {200, 400, 401, 404, 405, 413, 415}
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=25,
)
moments = st.one_of(
    st.sampled_from([
        MODIFIED, "2026-02-03T08:16:35.8701234Z", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59.9999999Z", "9999-12-31T23:59:59-14:00", "2026-02-03", "2026-W06-2", "20260203T081635Z",
        "2026-02-03T24:00:00Z", "1969-12-31T23:59:59.999999Z", "2026-02-03T08:16:35+23:59:59.999999",
    ]),
    st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
    json_values,
)  # fmt: skip
order_shaped = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just("o1") | json_values,
        "merchant": st.just("norce") | json_values,
        "channel": st.just("1") | json_values,
        "lastModified": moments,
        "state": st.fixed_dictionaries({}, optional={"currentStatus": st.just("completed") | json_values})
        | json_values,
        "total": json_values,
        "cart": json_values,
        "order": json_values,
        "notification": json_values,
    },
)


def no_500(answer: Answer) -> None:
    assert answer.status in DOCUMENTED, answer.body
    if answer.status == 200:
        assert answer.body in (b"", b"[]")  # the second for a name that was never configured
    else:
        assert is_a_refusal(answer, answer.status, answer.json["code"], answer.json.get("innerErrorCode"))


fuzz = settings()


@fuzz
@given(st.binary(max_size=2000), st.sampled_from(["order-status", "order-total", "order-rules"]))
def test_no_bytes_as_a_body_are_a_500(house: House, body: bytes, callback: str) -> None:
    no_500(house.ask("o1", callback, body))


@on_both_stores
@fuzz
@given(
    json_values | order_shaped | order_shaped.map(lambda order: {"notification": {}, "order": order}),
    st.sampled_from(["order-status", "order-total"]),
    st.booleans(),
)
def test_no_json_is_a_500_nor_is_its_repeat(house: House, body: Any, callback: str, ascii_: bool) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_).encode()
    for _ in range(2):
        no_500(house.ask("o1", callback, raw))


@on_both_stores
@fuzz
@given(
    st.integers(0, 1100),
    st.sampled_from([("[", "]"), ('{"a":', "}"), ('{"items":[', "]}"), ('[{"order":', "}]")]),
    st.sampled_from(['{"total":@}', '{"lastModified":"2026-02-03T08:16:35Z","total":@}', '{"order":{"x":@}}', "@",
                     '{"lastModified":"2026-02-03T08:16:35Z","attributes":@}', '{"state":{"currentStatus":@}}']),
)  # fmt: skip
def test_no_depth_is_a_500_nor_is_its_repeat(house: House, depth: int, brackets: tuple[str, str], around: str) -> None:
    opening, closing = brackets
    order_id = new_order()["id"]
    for leaf in ("1", "1", "2"):  # the last is a conflict where the first was taken
        body = around.replace("@", opening * depth + leaf + closing * depth)
        for callback in ("order-status", "order-total"):
            no_500(house.ask(order_id, callback, body.encode()))


@on_both_stores
@pytest.mark.parametrize(
    "number",
    [
        "9" * 18,
        "9" * 40,
        "-" + "9" * 40,
        "9" * 4300,
        "1e308",
        "1e309",
        "1e-999999",
        "1e999999999",
        "-0",
        "0.1" + "0" * 9999,
    ],
    ids=lambda number: number[:12],
)
@pytest.mark.parametrize("moment", ['"2026-02-03T08:16:35Z"', "null"], ids=["with a moment", "without"])
def test_no_number_is_a_500_nor_is_its_repeat(house: House, number: str, moment: str) -> None:
    for callback in ("order-total", "order-total", "order-status"):
        no_500(house.ask("o1", callback, f'{{"lastModified":{moment},"total":{number}}}'.encode()))


header_values = st.text(st.characters(max_codepoint=255), max_size=60)
SOME_HEADERS = ["authorization", "x-bound", "x-merchant", "x-channel", "content-type", "content-length", "x-other"]


@fuzz
@given(
    st.lists(st.tuples(st.sampled_from(SOME_HEADERS), header_values), max_size=8),
    st.booleans(),
    st.sampled_from(["order-status", "order-free", "nothing"]),
    st.sampled_from(["POST", "GET", "PUT", "OPTIONS", "BREW"]),
)
def test_no_headers_are_a_500(
    house: House, headers: list[tuple[str, str]], identified: bool, callback: str, method: str
) -> None:
    everything = [*headers, ("authorization", ENVIRON["FIRST"])] if identified else headers

    no_500(house.ask("o1", callback, ORDER, headers=everything, method=method))


queries = st.text(st.characters(max_codepoint=255), max_size=200) | st.lists(
    st.tuples(st.sampled_from(["merchant", "channel", "key", "sig", "secret"]), st.text(max_size=50)), max_size=8
).map(urlencode)


@fuzz
@given(queries, st.sampled_from(["order-status", "order-free"]), st.booleans())
def test_no_query_is_a_500(house: House, query: str, callback: str, identified: bool) -> None:
    no_500(house.ask("o1", callback, ORDER, query=query, headers=BY_HEADER if identified else UNSIGNED))


segments = st.text(max_size=80).filter(lambda segment: segment and "/" not in segment)


@on_both_stores
@fuzz
@given(segments, segments | st.sampled_from(["order-status", "order-free", "order-rules"]))
def test_no_path_is_a_500(house: House, order_id: str, callback: str) -> None:
    no_500(house.ask(order_id, callback, b"{}"))


def test_bytes_that_are_not_http_do_not_reach_the_endpoint(listening: Listening) -> None:
    """Bytes that no client of ours would send: the service goes on serving."""
    for nonsense in [
        b"\0\1\2\r\n\r\n",
        b"POST " + b"\xff" * 20 + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        f"POST {STATUS_OF}?sig=\xe9 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode("latin-1"),
        f"POST {STATUS_OF} HTTP/1.1\r\nhost: x\r\nauthorization: \xe9\r\nconnection: close\r\n\r\n".encode("latin-1"),
        f"POST {STATUS_OF} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".encode(),
    ]:
        answer = listening.raw(nonsense)
        assert answer.split(b" ", 2)[1:2] in ([], [b"400"], [b"401"], [b"404"])

    assert listening.post(f"{ROOT}/still/order-free").status_code == 200


@given(st.text("ab=&;%+2é", max_size=20))
def test_a_query_is_read_the_same_way_with_and_without_escapes(query: str) -> None:
    assert endpoints._pairs(query) == parse_qsl(query, keep_blank_values=True)


def test_a_parameter_repeated_very_often_does_not_hold_up_the_service(house: House) -> None:
    """Each is looked at once: the square of this number of steps would take minutes."""
    query = "&".join(["a"] * 400_000)

    assert house.ask("o1", "order-free", query=query).status == 200


# --- our own mistakes -------------------------------------------------------------------------------------------------


def test_an_internal_error_is_a_500_without_details(house: House, order: dict[str, Any]) -> None:
    inbox, house.endpoint.intake.inbox = house.endpoint.intake.inbox, Failing(ZeroDivisionError("canary"))  # type: ignore[assignment]
    try:
        answer = house.ask(order["id"], body=order)
    finally:
        house.endpoint.intake.inbox = inbox

    assert is_a_refusal(answer, 500, "internal-server-error")
    assert b"canary" not in answer.body


# --- logs, metrics and privacy ----------------------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """Everything that the service writes to its log."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers, root.level
    logs.configure(stream=stream, level="debug")
    yield stream
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level


def events(logged: io.StringIO, name: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, logged.getvalue().splitlines()) if line["event"] == name]


@on_both_stores
def test_a_callback_is_one_line_with_its_facts(house: House, order: dict[str, Any], logged: io.StringIO) -> None:
    house.ask(order["id"], body=order)

    [line] = events(logged, "callback_answered")
    told = {name: line[name] for name in ("callback", "kind", "order_id", "status_code", "merchant", "channel")}
    assert told == {
        "callback": "order-status", "kind": "notification", "order_id": order["id"], "status_code": 200,
        "merchant": "norce", "channel": "1",
    }  # fmt: skip
    assert (line["result"], line["routes"], line["scheme"], line["key"]) == ("new", 2, "header", "authorization-1")
    assert len(logged.getvalue().splitlines()) == 1


def test_the_time_that_a_caller_waited_before_it_hung_up_is_counted_and_logged(
    house: House, order: dict[str, Any], logged: io.StringIO
) -> None:
    scope = scope_of("POST", f"{ROOT}/{order['id']}/order-free", BY_HEADER)
    before = sample(house, "norce_adapter_caller_patience_seconds_count", callback="order-free")

    house.asks_in(scope, [b""])
    scope[endpoints.ON_HANG_UP]()

    assert sample(house, "norce_adapter_caller_patience_seconds_count", callback="order-free") == before + 1
    [line] = events(logged, "caller_hung_up")
    assert (line["callback"], line["order_id"], line["level"]) == ("order-free", order["id"], "warning")


def test_a_refusal_is_logged_with_its_reason_and_counted(house: House, logged: io.StringIO) -> None:
    refusals = sample(house, "norce_adapter_auth_total", scheme="none", key="none", result="refused")

    house.ask("o1", body=ORDER, headers=UNSIGNED, query=signed(NEW, "new", "o2", "order-status"))

    [line] = events(logged, "callback_answered")
    assert (line["status_code"], line["level"], line["reason"]) == (401, "warning", "wrong signature")
    assert sample(house, "norce_adapter_auth_total", scheme="none", key="none", result="refused") == refusals + 1


def test_an_operator_sees_which_secret_is_in_use(house: House) -> None:
    house.ask("o1", "order-free", headers=[*UNSIGNED, ("authorization", ENVIRON["SECOND"])])
    house.ask("o1", "order-free", query=signed(OLD, "old", "o1", "order-free"), headers=UNSIGNED)

    for scheme, key in (("header", "authorization-2"), ("signed_url", "old")):
        assert sample(house, "norce_adapter_auth_total", scheme=scheme, key=key, result="identified") > 0


def test_no_signature_and_no_secret_is_logged_or_counted(house: House, logged: io.StringIO) -> None:
    for query, headers in [
        (signed(NEW, "new", "o1", "order-status"), UNSIGNED),
        ("merchant=norce&channel=1&key=canary-key-name&sig=canary-signature", UNSIGNED),
        (f"secret={ENVIRON['FIRST_STATIC']}", UNSIGNED),
        ("secret=canary-wrong-static", UNSIGNED),
        ("", [*UNSIGNED, ("authorization", "Bearer canary-wrong")]),
        ("", BY_HEADER),
        ("", [("x-merchant", "canary-merchant"), ("x-channel", "canary-channel"), *BY_HEADER]),
    ]:
        house.ask("o1", "order-status", ORDER, headers=headers, query=query)
        house.ask("o1", "canary-callback", ORDER, headers=headers, query=query)

    written = logged.getvalue()
    assert len(events(logged, "callback_answered")) == 14
    assert "canary" not in written
    assert signed(NEW, "new", "o1", "order-status")[-43:] not in written
    assert "canary" not in house.metrics.text().decode()


class Shout(NotificationHandler[Settings]):
    """Fails, and quotes the order in the failure."""

    called = threading.Event()

    async def deliver(self, notification: Notification, context: Context[Settings]) -> Done:
        self.called.set()
        local = notification.raw.decode()
        context.log.error("shouted", order=notification.order.data, message=local, customer=notification.order.customer)
        logging.getLogger("a.library").error("cannot post %s", local)
        raise ValueError(local)


class Blurt(ValidationHandler[Settings]):
    """Fails, and quotes the order in the failure."""

    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        context.log.warning("blurted", email=order.customer.billing.email)
        try:
            raise KeyError(order.customer.billing.national_identification_number)
        except KeyError as error:
            raise RuntimeError(order.raw.decode()) from error


PERSONAL = (
    "givenName", "familyName", "careOf", "streetAddress", "streetAddress2", "postalCode", "city", "region", "phone",
    "email", "nationalIdentificationNumber", "organizationIdentificationNumber", "organizationName", "reference",
)  # fmt: skip


def test_no_personal_data_leaves_the_service_in_logs_metrics_or_errors(
    tmp_path: Path, store_url: str, logged: io.StringIO
) -> None:
    address = {name: f"canary-{name}" for name in PERSONAL} | {"attributes": {"canary-name": "canary-value"}}
    person = new_order(
        customer={"type": "person", "billing": address, "shipping": address, "attributes": {"x": "canary-x"}},
        cart={"reference": "1", "items": [{"name": "canary-item", "quantity": "canary-quantity"}]},
        consents=[{"id": "c", "text": "canary-consent"}],
    )
    text_ = CONFIG.partition("routes:")[0] + (
        "routes:\n"
        "  shouting: {callback: order-status, handler: shout, refetch: false}\n"
        "  blurting: {callback: order-rules, handler: blurt, no_answer: reject}\n"
        "  undecided: {callback: order-rules, handler: blurt, no_answer: reject,"
        " when: {scope: /customer/billing/phone/0, schema: {minimum: 1}}}\n"
    )
    told: list[bytes] = []

    async def walk() -> None:
        async with contextlib.AsyncExitStack() as stack:
            norce = Simulator(token=ENVIRON["TOKEN"])
            norce.put(person)
            address = await stack.enter_async_context(on_loopback(norce.app))
            config = loaded(tmp_path, store_url, norce=f"{address}/checkout", text=text_)
            points: Any = [Point("shout", Shout), Point("blurt", Blurt)]
            service = await stack.enter_async_context(running(config, build(config, points)))
            http = await stack.enter_async_context(
                httpx.AsyncClient(base_url=service.public_address, headers=dict(BY_HEADER), trust_env=False)
            )
            for target, body in [
                (f"{ROOT}/{person['id']}/order-rules", b""),
                (f"{ROOT}/{person['id']}/order-status", encoded(person)),
                (f"{ROOT}/{person['id']}/order-status", encoded(person | {"total": {"includingVat": 1}})),
                (f"{ROOT}/{person['id']}/order-status", encoded(person)[:-1]),
                (f"{ROOT}/{person['id']}/order-status", encoded(person | {"id": "canary-id"})),
                (f"{ROOT}/{person['id']}/order-status", encoded(person | {"merchant": "canary-merchant"})),
            ]:
                answer = await http.post(target, content=body)
                told.append(answer.content)
                statuses.append(answer.status_code)
            assert await asyncio.to_thread(Shout.called.wait, 20)
            told.append((await http.get(f"{service.operations_address}/metrics")).content)
            told.append((await http.get(f"{service.operations_address}/readyz")).content)

    statuses: list[int] = []
    Shout.called.clear()
    asyncio.run(walk())

    assert statuses == [400, 200, 200, 400, 400, 400]
    assert {"shouted", "blurted", "handler_failed", "library_logged", "delivery_dead"} <= {
        json.loads(line)["event"] for line in logged.getvalue().splitlines()
    }
    assert "canary" not in logged.getvalue()
    assert not any(b"canary" in each for each in told)
