"""`try`: a handler runs once, and its requests are shown without secrets."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import pytest
from msgspec import Meta

from adapter.cli.masks import Masker
from adapter.plugin import (
    Context,
    Done,
    HookHandler,
    Notification,
    NotificationHandler,
    Order,
    Patch,
    Problem,
    Refuse,
    Secret,
    Settings,
    Skip,
    Url,
    ValidationHandler,
)
from adapter.routing import routes
from tests.cli.test_cli import FAILED, OK, USAGE, run, write

pytestmark = pytest.mark.usefixtures("logging_as_before")

SECRET = 'canary/"token"'
ENVIRON = {"TOKEN": SECRET, "URL_KEY": "canary-url-key-0123456789"}
CONFIG = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
store: {url: "sqlite:///@FOLDER@/ledger.db"}
merchants:
  norce: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
senders: @SENDERS@
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus}
  order-rules: {kind: validation}
  cart-changed: {kind: hook, watch: /cart, target: /cart}
routes:
  export:
    callback: order-status
    when: {scope: /never}
    handler: export
    settings: {url: "https://erp.example/api", token: "${env:TOKEN}"}
  check: {callback: order-rules, handler: check, no_answer: approve}
  change: {callback: cart-changed, handler: change, no_answer: approve}
"""
ORDER: dict[str, Any] = {"id": "o1", "merchant": "norce", "channel": "1", "country": "SE", "reference": "deliver"}


class ErpSettings(Settings, frozen=True, kw_only=True):
    url: Annotated[Url, Meta(description="Where the ERP is.")]
    token: Annotated[Secret, Meta(description="Its token.")]


class Export(NotificationHandler[ErpSettings]):
    """Does what the order's reference says."""

    async def deliver(self, notification: Notification, context: Context[ErpSettings]) -> Done | Skip:
        settings, order = context.settings, notification.order
        token = settings.token.reveal()
        if order.reference == "skip":
            return Skip("nothing-changed")
        if order.reference == "bug":
            raise ValueError(f"a bug near {token}")
        if order.reference == "write back":
            await context.orders.set_reference(order.id, "N-1")
            return Done("N-1")
        headers = {"authorization": f"Bearer {token}", "x-shop-key": "derived-credential"}
        answer = await context.http.put(
            f"{settings.url}/{order.reference}", json={"id": order.id, "note": token}, headers=headers,
            params={"api_key": "in-the-query"},
        )  # fmt: skip
        return Done(answer.raise_for_status().json()["number"], {"lines": 2})

    async def lookup(self, notification: Notification, context: Context[ErpSettings]) -> Done | None:
        return None


class Check(ValidationHandler[Settings]):
    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        if order.reference == "bug":
            raise ValueError("a bug in a check")
        return [] if order.country == "NO" else [Problem("not-norwegian", "Only in Norway.")]


class Change(HookHandler[Settings]):
    async def change(self, order: Order, context: Context[Settings]) -> list[Patch]:
        if order.reference == "refuse":
            raise Refuse("no-more", "Enough.")
        return [Patch.add("/cart/attributes", {"a": 1}), *([Patch.remove("/id")] if order.reference == "id" else ())]


class Erp(BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, bytes, str]]] = []

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append((self.path, body, self.headers["host"]))
        status = 503 if "busy" in self.path else 422 if "bad" in self.path else 200
        answer = json.dumps({"number": "N-1", "access_token": "a-token-of-the-answer", "echo": SECRET}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.send_header("set-cookie", "session=a-cookie")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def erp() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Erp) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    handlers = {"export": Export, "check": Check, "change": Change}
    points = {name: SimpleNamespace(name=name, load=lambda class_=class_: class_) for name, class_ in handlers.items()}
    monkeypatch.setattr(routes, "installed", lambda _points=None: points)
    return write(tmp_path, text=CONFIG)


def try_(config: Path, route: str, *options: str, **members: Any) -> Any:
    file = config.with_name("order.json")
    file.write_text(json.dumps(ORDER | members))
    return run("try", file, "--route", route, *options, config=config, env=ENVIRON)


def test_it_shows_each_request_and_answer_and_the_outcome(config: Path, erp: str) -> None:
    result = try_(config, "export", "--against", erp)

    assert (result.exit_code, result.stderr) == (OK, "")
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("    date", "    server"))]
    assert lines[0] == "→ PUT https://erp.example/api/deliver?api_key=***"
    assert lines[lines.index("    {") : lines.index("← 200") + 1] == [
        "    {",
        '      "id": "o1",',
        '      "note": "***"',
        "    }",
        "← 200",
    ]
    assert "    content-type: application/json" in lines
    assert lines[-2:] == ["deliver: Done N-1 {'lines': 2}", "the delivery ends as: delivered"]
    path, body, host = Erp.seen[-1]
    assert path == "/api/deliver?api_key=in-the-query"
    assert json.loads(body) == {"id": "o1", "note": SECRET}
    assert erp.endswith(host)
    assert not config.with_name("ledger.db").exists()


@pytest.mark.parametrize("reference", ["deliver", "bug", "busy"])
def test_no_secret_and_no_header_that_may_hold_one_is_shown(config: Path, erp: str, reference: str) -> None:
    shown = try_(config, "export", "--against", erp, reference=reference).output

    secrets = ("canary", "derived-credential", "in-the-query", "a-token-of-the-answer", "a-cookie")
    assert [secret for secret in secrets if secret in shown] == []
    assert "***" in shown


@pytest.mark.parametrize(
    ("reference", "status", "says"),
    [
        ("skip", OK, "deliver: Skip nothing-changed"),
        ("bad", FAILED, "deliver: Reject destination-refused: PUT /api/… was answered 422"),
        ("busy", FAILED, "lookup: no effect is there"),
        ("write back", OK, "→ PUT http://norce.test/checkout/order/api/v0/checkout/orders/o1/reference"),
    ],
)
def test_each_outcome_is_shown(config: Path, erp: str, reference: str, status: int, says: str) -> None:
    result = try_(config, "export", "--against", erp, reference=reference)

    assert result.exit_code == status
    assert says in result.stdout.splitlines()


def test_a_destination_without_an_answer_is_an_outcome(config: Path) -> None:
    result = try_(config, "export", "--against", "http://127.0.0.1:1")

    assert result.exit_code == FAILED
    assert "← no answer" in result.stdout
    assert "deliver: Retry destination-unreachable" in result.stdout


@pytest.mark.parametrize(("route", "message"), [("export", "a bug near ***"), ("check", "a bug in a check")])
def test_a_bug_is_shown_with_its_traceback_and_message(config: Path, route: str, message: str) -> None:
    result = try_(config, route, reference="bug")

    assert result.exit_code == FAILED
    assert f"ValueError: {message}" in result.stdout.splitlines()
    assert f'File "{__file__}"' in result.stdout


@pytest.mark.parametrize(
    ("route", "members", "status", "last"),
    [
        ("check", {}, OK, ["problem not-norwegian: Only in Norway.", "rejected"]),
        ("check", {"country": "NO"}, OK, ["approved"]),
        ("change", {"cart": {}}, OK, ['patch add /cart/attributes {"a": 1}', "patched"]),
        ("change", {"reference": "refuse"}, OK, ["refused: Refuse no-more: Enough."]),
    ],
    ids=["problems", "approved", "patches", "refused"],
)
def test_verdicts_are_shown(config: Path, route: str, members: dict[str, Any], status: int, last: list[str]) -> None:
    result = try_(config, route, **members)

    assert (result.exit_code, result.stdout.splitlines()[-len(last) :]) == (status, last)


def test_a_patch_outside_of_the_target_is_no_answer(config: Path) -> None:
    result = try_(config, "change", cart={}, reference="id")

    assert result.exit_code == FAILED
    assert "the patch of /id cannot be used" in result.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--route", "nothing"], "no route nothing is configured; there are: change, check, export"),
        (["--route", "export", "--against", "http://erp.example"], "--against must be an https:// address"),
    ],
)
def test_wrong_options_are_refused(config: Path, options: list[str], says: str) -> None:
    file = config.with_name("order.json")
    file.write_text(json.dumps(ORDER))

    result = run("try", file, *options, config=config, env=ENVIRON)

    assert result.exit_code == USAGE
    assert says in result.stderr


def test_the_settings_are_those_of_the_channel_of_the_order(config: Path) -> None:
    only = try_(config, "check", merchant="another")
    config.write_text(config.read_text().replace('{"1": {}}', '{"1": {}, "2": {}}'))
    several = try_(config, "check", merchant="another")

    assert only.exit_code == OK
    assert (several.exit_code, several.stderr.count("norce 1, norce 2")) == (USAGE, 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key=a%2Fb%22c", "key=***"),
        (r'{"x": "a/b\"c"}', '{"x": "***"}'),
        ('{"accessToken": "x\\"y", "n": 1}', '{"accessToken": "***", "n": 1}'),
        ('{"api-key":12}', '{"api-key":"***"}'),
        ("client_secret=abc&grant=x", "client_secret=***&grant=x"),
        ('{"tokens": ["kept"]}', '{"tokens": ["kept"]}'),
        ("nothing here", "nothing here"),
    ],
)
def test_a_secret_is_masked_in_every_spelling(text: str, shown: str) -> None:
    assert Masker([Secret('a/b"c'), Secret("")])(text) == shown
