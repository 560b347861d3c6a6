"""`adapter.routing.norce_settings`: good documents take effect, and otherwise the last good one holds."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from adapter import config as configuration
from adapter.identifiers import Channel
from adapter.ledger.key_values import StoredDocuments
from adapter.ledger.store import Store, StoreUnavailable
from adapter.metrics import Metrics
from adapter.orders import Order
from adapter.plugin import Context, Problem, Secret, Settings, Url, ValidationHandler
from adapter.routing.from_config import norce_client
from adapter.routing.norce_settings import NorceSettings, published_schema
from adapter.routing.routes import build
from adapter.sandbox.norce import Simulator
from tests import PATIENCE
from tests.simulators import TOKEN

CHANNEL = Channel("norce", "1")
TREE: dict[str, Any] = {
    "adapter": {"id": "our_adapter", "public_url": "http://127.0.0.1:8080"},
    "norce": {"base_url": "http://127.0.0.1:1/checkout"},
    "store": {"url": "sqlite:///unused.db"},
    "merchants": {
        "norce": {
            "tokens": ["${env:TOKEN}"],
            "channels": {"1": {"routes": {"limit": {"settings": {"most": 5}}}}, "2": {}},
        }
    },
    "senders": {"header_secrets": [{"header": "x-secret", "values": ["${env:STATIC}"]}]},
    "callbacks": {
        "order-status": {"kind": "notification", "scope": "/state/currentStatus", "schema": {"const": "completed"}},
        "order-rules": {"kind": "validation"},
    },
    "routes": {
        "limit": {
            "callback": "order-rules",
            "handler": "limit",
            "no_answer": "approve",
            "settings": {"most": 10, "url": "https://limits.example", "password": "${env:STATIC}"},
        }
    },
}


BEGUN, GO_ON = threading.Event(), threading.Event()


class Limits(Settings, frozen=True, kw_only=True):
    url: Url
    password: Secret
    most: Annotated[int, msgspec.Meta(ge=1)]
    names: dict[str, str] = {}  # noqa: RUF012 - a struct copies it

    def __post_init__(self) -> None:
        if self.most == 13:
            raise ValueError("canary-13 brings bad luck")
        if self.most == 14:
            raise KeyError("canary: a mistake of the handler's author")
        if self.most == 15:
            BEGUN.set()
            GO_ON.wait(timeout=PATIENCE)


class Limit(ValidationHandler[Limits]):
    async def validate(self, _order: Order, _context: Context[Limits]) -> list[Problem]:
        return []


class Point:
    name = "limit"

    def load(self) -> Any:
        return Limit


class Line(httpx.AsyncBaseTransport):
    """A transport to the simulator, or with a fixed answer."""

    def __init__(self, simulator: Simulator) -> None:
        self._inner = httpx.ASGITransport(simulator.app)
        self.instead: httpx.Response | Exception | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if isinstance(self.instead, Exception):
            raise self.instead
        return self.instead or await self._inner.handle_async_request(request)


class SilentFor(httpx.AsyncBaseTransport):
    """A transport to a Norce that never answers one merchant."""

    def __init__(self, merchant: str, inner: httpx.AsyncBaseTransport) -> None:
        self._merchant, self._inner = merchant, inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.headers["x-merchant"] == self._merchant:
            await asyncio.Event().wait()
        return await self._inner.handle_async_request(request)


class House:
    """The simulator, and a process that reads its documents and can be restarted on its ledger."""

    def __init__(self, folder: Path, **changed: Any) -> None:
        self.store = Store.open(f"sqlite:///{folder / 'ledger.db'}")
        self.loop = asyncio.Runner()
        path = folder / "config.yaml"
        path.write_text(json.dumps(TREE | changed))
        self.config = configuration.load(path, {"TOKEN": TOKEN, "STATIC": "a secret & more"})
        self.routes = build(self.config, [Point()])  # type: ignore[list-item]
        self.metrics = Metrics("0")
        self.changed = 0
        self.loop.run(self._open())

    async def _open(self) -> None:
        self.simulator = Simulator(token=TOKEN, transport=httpx.MockTransport(self._ours))
        self.line = Line(self.simulator)
        self.norce = norce_client(self.config, self.metrics, transport=self.line)
        self.schema = published_schema(self.config, self.routes)
        self.settings = self.reader(StoredDocuments(self.store))

    def reader(self, stored: StoredDocuments) -> NorceSettings:
        return NorceSettings(
            self.config, self.routes, self.norce, self.schema, stored=stored, metrics=self.metrics, changed=self._count
        )

    def restart(self) -> None:
        """Start a new process, which has not read from Norce yet."""
        self.routes = build(self.config, [Point()])  # type: ignore[list-item]
        self.settings = self.reader(StoredDocuments(self.store))
        self.loop.run(self.settings.restore())

    def _ours(self, request: httpx.Request) -> httpx.Response:
        """Answer Norce's requests to our address."""
        assert request.url.path == "/openapi/v1/schemas/our_adapter.json"
        return httpx.Response(200, json=self.schema)

    def _count(self) -> None:
        self.changed += 1

    def put(self, document: Any, *, channel: str = "1", name: str = "our_adapter") -> None:
        """Store a document, as in the admin UI, without the simulator's checks."""
        self.simulator.records.documents["norce", channel, name] = document

    def refresh(self) -> None:
        self.loop.run(self.settings.refresh())

    def limits(self, channel: str = "1") -> Any:
        return self.routes.all[0].settings[Channel("norce", channel)]

    def value(self, name: str, *labels: str) -> float | None:
        metric: Any = getattr(self.metrics, name)
        return float(metric.labels(*labels)._value.get())


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with opened(tmp_path) as made:
        yield made


@contextmanager
def opened(folder: Path, **changed: Any) -> Iterator[House]:
    made = House(folder, **changed)
    try:
        yield made
    finally:
        made.loop.run(made.norce.aclose())
        made.loop.run(made.simulator.__aexit__(None, None, None))
        made.loop.close()
        made.store.close()


def document(settings: Any = None, **members: Any) -> dict[str, Any]:
    routes = {} if settings is None else {"routes": {"limit": {"settings": settings}}}
    return (
        {"$schema": "http://127.0.0.1:8080/openapi/v1/schemas/our_adapter.json", "id": "our_adapter"} | routes | members
    )


def test_without_a_document_the_settings_of_the_file_hold(house: House) -> None:
    house.refresh()

    assert (house.limits("1").most, house.limits("2").most) == (5, 10)
    assert house.settings.switched_off == set()
    assert house.value("configuration_valid", *CHANNEL) == 1


def test_a_document_overrides_the_settings_of_its_channel(house: House) -> None:
    house.put(document({"most": 3, "names": {"a": "b"}}))

    house.refresh()

    assert (house.limits("1").most, house.limits("1").names) == (3, {"a": "b"})
    assert house.limits("1").url == "https://limits.example"
    assert house.limits("2").most == 10


def test_a_merchant_whose_norce_is_silent_delays_no_other(tmp_path: Path) -> None:
    """The start waits five seconds for documents, and then deliveries begin."""
    silent = {"tokens": ["${env:TOKEN}"], "channels": {f"c{number}": {} for number in range(20)}}
    merchants = {"silent": silent} | TREE["merchants"]
    with opened(tmp_path, merchants=merchants, norce=TREE["norce"] | {"timeout": "1m"}) as house:
        house.put(document(active=False))
        house.norce._client._transport = SilentFor("silent", house.line)

        async def begin() -> None:
            reading = asyncio.create_task(house.settings.refresh())
            await asyncio.wait([reading], timeout=1)
            reading.cancel()
            await asyncio.wait([reading])

        house.loop.run(begin())

        assert house.settings.switched_off == {CHANNEL}


def test_a_setting_removed_from_a_document_is_as_in_the_file(house: House) -> None:
    house.put(document({"most": 3}))
    house.refresh()

    house.put(document())
    house.refresh()

    assert house.limits().most == 5


def test_a_deleted_document_has_no_effect(house: House) -> None:
    house.put(document({"most": 3}, active=False))
    house.refresh()

    house.simulator.records.documents.pop((*CHANNEL, "our_adapter"), None)
    house.refresh()

    assert house.limits().most == 5
    assert house.settings.switched_off == set()


WRONG: dict[str, tuple[Any, str]] = {
    "a host": (document({"url": "https://canary.example"}), "$.routes.limit.settings"),
    "a credential": (document({"password": "canary"}), "$.routes.limit.settings"),
    "another kind": (document({"most": "canary"}), "$.routes.limit.settings.most"),
    "out of bounds": (document({"most": 0}), "$.routes.limit.settings.most"),
    "not together": (document({"most": 13}), "$.routes.limit.settings"),
    "an unknown route": (document(routes={"canary": {}}), "$.routes"),
    "of another adapter": (document() | {"id": "canary"}, "$.id"),
    "no object": (["canary"], "$"),
    "too large": (document(filler="canary" * 200_000), "$"),
}


@pytest.mark.parametrize(("wrong", "place"), WRONG.values(), ids=WRONG)
def test_a_wrong_document_is_reported_and_the_last_good_one_holds(house: House, wrong: Any, place: str) -> None:
    house.put(document({"most": 3}, active=False))
    house.refresh()

    house.put(wrong)
    with capture_logs() as told:
        house.refresh()
        house.refresh()

    assert house.limits().most == 3
    assert house.settings.switched_off == {CHANNEL}
    [line] = told
    assert (line["event"], line["log_level"], line["places"]) == ("configuration_refused", "error", [place])
    assert "canary" not in json.dumps(told)
    assert house.value("configuration_valid", *CHANNEL) == 0
    house.put(document({"most": 4}))
    house.refresh()
    assert house.limits().most == 4
    assert house.value("configuration_valid", *CHANNEL) == 1


@pytest.mark.parametrize(
    "instead",
    [httpx.ConnectError("down"), httpx.Response(500), httpx.Response(401), httpx.Response(429)],
    ids=["down", "500", "401", "429"],
)
def test_a_norce_that_does_not_answer_changes_nothing_and_is_logged_once(
    house: House, instead: httpx.Response | Exception
) -> None:
    house.put(document({"most": 3}, active=False))
    house.refresh()

    house.line.instead = instead
    with capture_logs() as told:
        house.refresh()
        house.refresh()

    assert house.limits().most == 3
    assert house.settings.switched_off == {CHANNEL}
    assert [(line["event"], line["channel"]) for line in told] == [
        ("configuration_unreadable", "1"),
        ("configuration_unreadable", "2"),
    ]


def test_the_last_good_document_holds_after_a_restart(house: House) -> None:
    house.put(document({"most": 3}, active=False, callbacks={"secret": "canary"}))
    house.refresh()
    house.put(document({"most": 0}, active=True))

    house.restart()
    assert house.settings.switched_off == {CHANNEL}
    house.line.instead = httpx.ConnectError("down")
    house.refresh()
    assert (house.limits().most, house.settings.switched_off) == (3, {CHANNEL})
    house.line.instead = None
    house.refresh()

    assert (house.limits().most, house.settings.switched_off) == (3, {CHANNEL})
    assert b"canary" not in house.loop.run(StoredDocuments(house.store).all())[CHANNEL]


def test_a_switch_is_restored_before_documents_are_checked(house: House) -> None:
    """Checking ten documents took 26 s at a start, in which no lease is renewed and no signal handled."""
    stored = StoredDocuments(house.store)
    BEGUN.clear()
    GO_ON.clear()

    async def begin() -> set[Channel]:
        await stored.keep(CHANNEL, json.dumps(document({"most": 15})).encode())
        await stored.keep(Channel("norce", "2"), json.dumps(document(active=False)).encode())
        reader = house.reader(stored)
        await reader.restore()
        known = set(reader.switched_off)
        house.line.instead = httpx.ConnectError("down")
        checking = asyncio.create_task(reader.refresh())
        await asyncio.to_thread(BEGUN.wait, 10)
        checking.cancel()  # the start does not wait longer
        GO_ON.set()
        await asyncio.wait([checking])
        assert house.limits().most == 5
        await reader.refresh()
        return known

    assert house.loop.run(begin()) == {("norce", "2")}
    assert house.limits().most == 15


def test_a_deleted_document_has_no_effect_after_a_restart(house: House) -> None:
    house.put(document({"most": 3}, active=False))
    house.refresh()
    house.simulator.records.documents.pop((*CHANNEL, "our_adapter"), None)
    house.refresh()

    house.restart()

    assert (house.limits().most, house.settings.switched_off) == (5, set())


def test_a_restored_document_that_a_new_version_refuses_keeps_its_switch(house: House) -> None:
    stored = StoredDocuments(house.store)
    house.loop.run(stored.keep(CHANNEL, json.dumps(document({"fewest": 3}, active=False)).encode()))
    house.loop.run(stored.keep(Channel("gone", "1"), b"{}"))

    house.restart()
    house.line.instead = httpx.ConnectError("down")
    house.refresh()

    assert (house.limits().most, house.settings.switched_off) == (5, {CHANNEL})
    assert house.value("configuration_valid", *CHANNEL) == 0


def test_each_channels_last_document_is_stored(empty_url: str) -> None:
    store = Store.open(empty_url)
    stored = StoredDocuments(store)

    async def work() -> dict[Channel, bytes]:
        for merchant, channel, content in (
            ("a", "1", b"{}"),
            ("a", "2", b"{}"),
            ("b", "1", b"{}"),
            ("a", "1", b'{"active":true}'),
            ("a", "2", None),
            ("c", "1", None),
        ):
            await stored.keep(Channel(merchant, channel), content)
        return await stored.all()

    try:
        assert asyncio.run(work()) == {("a", "1"): b'{"active":true}', ("b", "1"): b"{}"}
    finally:
        store.close()


class Stumbling(StoredDocuments):
    """A ledger that fails once."""

    away = True

    async def keep(self, channel: Channel, content: bytes | None) -> None:
        if self.away:
            self.away = False
            raise StoreUnavailable("away")
        await super().keep(channel, content)


@pytest.mark.parametrize("last", [document({"most": 3}), None], ids=["another", "none"])
def test_a_document_that_could_not_be_stored_holds_and_is_stored_later(house: House, last: Any) -> None:
    house.put(document({"most": 4}))
    house.refresh()
    house.settings = house.reader(Stumbling(house.store))
    house.loop.run(house.settings.restore())
    if last is None:
        house.simulator.records.documents.pop((*CHANNEL, "our_adapter"), None)
    else:
        house.put(last)

    house.refresh()
    holds = house.limits().most
    assert holds == (5 if last is None else 3)
    house.refresh()

    house.restart()
    house.line.instead = httpx.ConnectError("down")
    house.refresh()
    assert house.limits().most == holds


@pytest.mark.parametrize(
    "instead",
    [
        httpx.Response(404, text="<h1>Not Found</h1>"),
        httpx.Response(404),
        httpx.Response(404, json={"type": "https://tools.ietf.org/html/rfc9110#section-15.5.5", "title": "Not Found"}),
    ],
    ids=["a page", "nothing", "a problem without a code"],
)
def test_a_404_without_norces_code_removes_no_document(house: House, instead: httpx.Response) -> None:
    house.put(document({"most": 3}, active=False))
    house.refresh()

    house.line.instead = instead
    house.refresh()
    assert (house.limits().most, house.settings.switched_off) == (3, {CHANNEL})
    house.restart()
    house.refresh()
    assert (house.limits().most, house.settings.switched_off) == (3, {CHANNEL})

    house.line.instead = httpx.Response(404, json={"code": "configuration-not-found", "message": "none"})
    house.refresh()
    assert (house.limits().most, house.settings.switched_off) == (5, set())


def test_a_bug_in_a_settings_type_makes_the_document_wrong(house: House) -> None:
    house.put(document({"most": 14}))
    house.put(document({"most": 4}), channel="2")

    with capture_logs() as told:
        house.refresh()

    assert (house.limits().most, house.limits("2").most) == (5, 4)
    assert house.value("configuration_valid", *CHANNEL) == 0
    assert "canary" not in json.dumps(told)


def test_a_document_with_many_mistakes_is_logged_with_a_few(house: House) -> None:
    house.put(document({"names": {"k" * 1000 + str(number): 1 for number in range(100)}}))

    with capture_logs() as told:
        house.refresh()

    [line] = told
    assert len(json.dumps(line)) < 3000


def test_a_check_leaves_the_loop_free_and_is_repeated_if_interrupted(
    house: House,
) -> None:
    house.put(document({"most": 15}))

    async def broken_off() -> None:
        checking = asyncio.create_task(house.settings.refresh())
        await asyncio.to_thread(BEGUN.wait)  # needs a free loop
        checking.cancel()
        GO_ON.set()
        await asyncio.wait([checking])

    house.loop.run(broken_off())
    assert house.limits().most == 5

    house.refresh()

    assert house.limits().most == 15


def test_a_document_that_is_not_json_is_wrong(house: House) -> None:
    house.line.instead = httpx.Response(200, content=b"<html>")

    house.refresh()

    assert house.value("configuration_valid", *CHANNEL) == 0
    assert house.limits().most == 5


def test_a_channel_is_switched_off_and_on_again(house: House) -> None:
    house.put(document(active=False))
    house.refresh()

    assert house.settings.switched_off == {CHANNEL}
    assert house.value("channel_active", *CHANNEL) == 0
    house.put(document(active=True))
    house.refresh()
    assert house.settings.switched_off == set()
    assert house.value("channel_active", *CHANNEL) == 1


def test_an_unchanged_document_is_not_applied_again(house: House) -> None:
    house.put(document({"most": 3}))
    house.refresh()
    changed = house.changed

    house.refresh()

    assert house.changed == changed
