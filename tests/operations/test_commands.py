"""Commands over HTTP: authorization, refusals, answers and log lines."""

import http.client
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from adapter import logs
from adapter.callbacks.server import http_server, listen
from adapter.deliveries.backfill import BackfillResult
from adapter.ledger.backfill import BackfillStep
from adapter.ledger.commands import Commands
from adapter.ledger.inbox import Inbox
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.store import Store
from adapter.metrics import Metrics
from adapter.norce.client import NorceUnavailable
from adapter.operations import application
from adapter.operations.application import OperationsEndpoints
from adapter.operations.health import Health
from adapter.operations.unix_socket import listening_at
from adapter.plugin import Secret
from adapter.reconciliation.events import LogProgress
from adapter.reconciliation.orders import OrdersProgress
from tests import PATIENCE
from tests.ledgers import EXPORT, POLICY, receipt

pytestmark = pytest.mark.usefixtures("logging_as_before")

TOKEN = "canary-token-å"
BY = {"who": "anna", "why": "the shop is mended"}
PAUSE = {"route": "export", "by": BY}
RETRY = {"matching": {"route": "export"}, "by": BY}


class Port:
    """The operations application on a port and a Unix socket, in a thread of its own."""

    def __init__(self, folder: Path, token: str | None) -> None:
        self.woken = 0
        self.log = io.StringIO()
        logs.configure(stream=self.log)
        self._folder, self._token = folder, token
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self._serving()))
            self._stack = stack.pop_all()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        self.store = Store.open(f"sqlite:///{self._folder}/ledger.db")
        lease = Lease(self.store, version="test")
        await lease.enter()
        queues = await Lanes(self.store, lease, policy=POLICY).open_queues([EXPORT])
        await Inbox(self.store).receive(receipt("canary-order", 1, wanted=[(queues[EXPORT], True)]))
        token = None if self._token is None else Secret(self._token)
        self.pages: list[LogProgress] = []
        endpoints = OperationsEndpoints(
            Health(started=True),
            Metrics("0"),
            self.store,
            commands=Commands(self.store),
            reconcile=self._reconcile,
            reconcile_orders=self._reconcile_orders,
            backfill=self._backfill,
            wake=self._wake,
        )
        listening, self.socket = listen("127.0.0.1", 0), self._folder / "operations.sock"
        self.port = listening.getsockname()[1]
        with listening_at(self.socket) as on_socket:
            async with (
                http_server(endpoints.for_port(token), listening),
                http_server(endpoints.for_socket(), on_socket),
            ):
                yield
        self.store.close()

    async def _reconcile(self, **_: Any) -> AsyncIterator[LogProgress]:
        for page in self.pages:
            yield page
        if self.pages and self.pages[-1].error:
            raise NorceUnavailable(self.pages[-1].error)

    async def _reconcile_orders(self, **given: Any) -> AsyncIterator[OrdersProgress]:
        self.asked = given
        yield OrdersProgress(merchant="norce", channel="1", missing=2, ids=["order-1", "order-2"])
        yield OrdersProgress(merchant="norce", channel="1", missing=2, brought=2 if given["by"] else 0)

    async def _backfill(self, step: BackfillStep) -> BackfillResult:
        if step.route != "export":
            raise ValueError(f"there is no notification route {step.route}")
        return BackfillResult(changed=3, read=5, after="17", action=1)

    def _wake(self) -> None:
        self.woken += 1

    def close(self) -> None:
        self._stack.close()

    def post(
        self, path: str, body: Any = PAUSE, *, method: str = "POST", authorization: bytes | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        given = f"Bearer {TOKEN}".encode() if authorization is None else authorization
        headers = {"Authorization": given} if given else {}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            raw = answer.read()
        finally:
            connection.close()
        try:
            decoded = json.loads(raw)
        except ValueError:
            decoded = raw.decode()
        return answer.status, decoded, {name.lower(): value for name, value in answer.getheaders()}

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path, TOKEN)
    yield made
    made.close()


def test_a_command_is_run_answered_and_logged_and_wakes_the_dispatcher(port: Port) -> None:
    status, answer, _ = port.post("/commands/pause")

    assert (status, answer) == (200, 1)
    assert port.woken == 1
    [line] = port.lines()
    assert (line["event"], line["command"], line["count"]) == ("command_done", "pause", 1)


def test_the_answer_of_a_step_contains_nothing_of_an_order(port: Port) -> None:
    status, answer, _ = port.post("/commands/retry", RETRY)

    assert (status, answer) == (200, {"changed": 0, "after": None, "action": 1})
    assert "canary" not in port.log.getvalue()


def test_a_step_of_a_backfill_is_run_answered_and_logged_and_wakes_the_dispatcher(port: Port) -> None:
    status, answer, _ = port.post("/commands/backfill", {"route": "export", "by": BY})

    assert (status, answer["changed"], answer["after"]) == (200, 3, "17")
    assert port.woken == 1
    assert [(line["command"], line["count"]) for line in port.lines()] == [("backfill", 3)]


@pytest.mark.parametrize(
    ("given", "words"), [({"route": "no-such"}, "no-such"), ({}, "route"), ({"route": "export", "most": 501}, "most")]
)
def test_a_backfill_that_cannot_be_done_is_400(port: Port, given: dict[str, Any], words: str) -> None:
    status, answer, _ = port.post("/commands/backfill", given | {"by": BY})

    assert (status, port.woken) == (400, 0)
    assert words in answer["message"]


def test_commands_on_the_socket_need_no_token(tmp_path: Path) -> None:
    with closing(Port(tmp_path, None)) as port:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(port.socket)), base_url="http://operations") as client:
            answer = client.post("/commands/pause", json=PAUSE)

        assert (answer.status_code, answer.json(), port.woken) == (200, 1, 1)


@pytest.mark.parametrize(
    ("dry_run", "error", "count"),
    [(False, None, 5), (True, None, 0), (False, "Norce answered 500", 5)],
    ids=["all", "dry run", "an error at the end"],
)
def test_reconciliation_is_logged_when_it_ends_with_its_count(
    port: Port, dry_run: bool, error: str | None, count: int
) -> None:
    port.pages = [
        LogProgress(merchant="norce", missed=1),
        LogProgress(merchant="norce", missed=3),
        LogProgress(merchant="other", missed=2, error=error),
    ]

    status, answer, _ = port.post("/commands/reconcile", {"dry_run": dry_run})

    lines = [json.loads(line) for line in answer.splitlines()]
    assert (status, [line.get("missed") for line in lines[:3]]) == (200, [1, 3, 2])
    assert [line["error"] for line in lines[3:]] == ([error] if error else [])
    assert [(line["event"], line["command"], line["count"]) for line in port.lines()] == [
        ("command_done", "reconcile", count)
    ]


@pytest.mark.parametrize(("by", "brought"), [({}, 0), ({"by": BY}, 2)], ids=["compare", "bring"])
def test_a_comparison_of_orders_is_logged_when_it_ends(port: Port, by: dict[str, Any], brought: int) -> None:
    status, answer, _ = port.post("/commands/reconcile-orders", {"since": "2026-02-03T12:00:00Z", **by})

    lines = [json.loads(line) for line in answer.splitlines()]
    assert (status, lines[0]["ids"], lines[1]["brought"]) == (200, ["order-1", "order-2"], brought)
    assert port.asked["since"].isoformat() == "2026-02-03T12:00:00+00:00"
    assert [(line["command"], line["count"]) for line in port.lines()] == [("reconcile-orders", brought)]


WRONG = {
    "none": b"",
    "another": b"Bearer other",
    "a prefix": f"Bearer {TOKEN}".encode()[:-1],
    "one more": f"Bearer {TOKEN}x".encode(),
    "no scheme": TOKEN.encode(),
    "another scheme": f"Basic {TOKEN}".encode(),
    "other case": f"bearer {TOKEN}".encode(),
    "other bytes": f"Bearer {TOKEN}".encode("latin-1"),
    "no text": b"Bearer \xff\xfe",
}


@pytest.mark.parametrize("authorization", WRONG.values(), ids=WRONG)
def test_a_command_without_the_token_is_401(port: Port, authorization: bytes) -> None:
    status, answer, headers = port.post("/commands/pause", authorization=authorization)

    assert (status, answer["code"], headers["www-authenticate"]) == (401, "unauthorized", "Bearer")
    assert "operations.token" in answer["message"]
    assert "canary" not in json.dumps(answer) + port.log.getvalue()
    assert port.woken == 0
    assert [line["event"] for line in port.lines()] == ["command_refused"]


def test_an_unknown_command_without_the_token_is_401_too(port: Port) -> None:
    assert port.post("/commands/nothing", authorization=b"")[0] == 401


@pytest.mark.parametrize("authorization", [b"", b"Bearer ", b"Bearer None", b"Bearer"])
def test_every_command_is_403_if_no_token_is_configured(tmp_path: Path, authorization: bytes) -> None:
    with closing(Port(tmp_path, None)) as port:
        status, answer, _ = port.post("/commands/pause", authorization=authorization)

    assert (status, answer["code"]) == (403, "forbidden")
    assert "operations.token" in answer["message"]


def test_an_unknown_command_is_404_and_lists_the_commands(port: Port) -> None:
    status, answer, _ = port.post("/commands/erase")

    assert (status, answer["code"]) == (404, "command-not-found")
    listed = answer["message"].partition("there are: ")[2].rstrip(".").split(", ")
    assert listed == [
        "backfill", "discard", "pause", "reconcile", "reconcile-orders", "record", "resend", "resume", "retry",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_commands_accept_only_post(port: Port, method: str) -> None:
    assert port.post("/commands/pause", b"", method=method)[0] == 405


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", ""),
        (b"\xff\x00", ""),
        (b"null", "object"),
        ({"by": BY}, "route"),
        (PAUSE | {"route": 5}, "$.route"),
        (PAUSE | {"route": None}, "$.route"),
        (PAUSE | {"until": 1e308}, "until"),
        (PAUSE | {"by": {"who": "anna"}}, "why"),
        (PAUSE | {"by": {"who": "anna", "why": " "}}, "must not be blank"),
        (PAUSE | {"by": {"who": "anna", "why": "x" * 1001}}, "$.by.why"),
        (b'{"route": "export", "route": 7, "by": {"who": "a", "why": "b"}}', "$.route"),
        (b"[" * 200_000, "object"),
        (b'{"route": ' + b"9" * 5000 + b"}", "$.route"),
    ],
    ids=["nothing", "no text", "null", "no route", "a number", "no value", "unknown", "no reason", "blank", "long",
         "twice", "deep", "a huge number"],
)  # fmt: skip
def test_an_invalid_body_is_400_with_the_place(port: Port, body: Any, place: str) -> None:
    status, answer, _ = port.post("/commands/pause", body)

    assert (status, answer["code"]) == (400, "bad-request")
    assert place in answer["message"]
    assert port.woken == 0
    assert [line["event"] for line in port.lines()] == ["command_refused"]


@pytest.mark.parametrize(
    "wrong",
    [{"most": 10**40}, {"most": -1}, {"after": 1.5}, {"after": 2**64}, {"action": "1"}, {"matching": {"ids": [2**63]}},
     {"matching": {"since": -(10**400)}}, {"matching": {"code": "\0"}}, {"matching": {"ids": {}}}],
    ids=str,
)  # fmt: skip
def test_values_that_no_database_can_store_are_400(port: Port, wrong: dict[str, Any]) -> None:
    status, answer, _ = port.post("/commands/retry", RETRY | wrong)

    assert (status, answer["code"]) == (400, "bad-request")
    assert "$." in answer["message"]
    assert not port.store.failing


def test_a_body_beyond_the_limit_is_413(port: Port) -> None:
    status, answer, _ = port.post("/commands/pause", b" " * (application.LARGEST_COMMAND_BYTES + 1))

    assert (status, answer["code"]) == (413, "too-large")


def test_a_failing_store_is_503_and_nothing_is_done(port: Port) -> None:
    connection = port.store.engine.connect()
    connection.exec_driver_sql("PRAGMA busy_timeout = 0")
    connection.exec_driver_sql("ALTER TABLE actions RENAME TO elsewhere")
    connection.commit()
    try:
        status, answer, _ = port.post("/commands/pause")
    finally:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO actions")
        connection.commit()
        connection.close()

    assert (status, answer["code"]) == (503, "store-unavailable")
    assert port.post("/commands/pause")[:2] == (200, 1)


def test_the_token_is_compared_in_constant_time(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = application.hmac.compare_digest

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return real(given, known)

    monkeypatch.setattr(application.hmac, "compare_digest", compare)

    port.post("/commands/pause", authorization=b"Bearer guess")

    assert compared == [(b"Bearer guess", f"Bearer {TOKEN}".encode())]


def test_a_caller_that_disconnects_has_no_effect_on_the_next(port: Port) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", port.port)) as raw:
        raw.sendall(
            b"POST /commands/pause HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nAuthorization: Bearer "
            + TOKEN.encode()
            + b'\r\n\r\n{"ro'
        )
    assert port.post("/commands/pause")[0] == 200
    assert {line["event"] for line in port.lines()} <= {"command_done"}
