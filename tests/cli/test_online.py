"""`check --online`: the database, Norce, the destinations and the public address."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from adapter import config as configuration
from adapter.cli.online import Trial, try_everything
from adapter.plugin import Context, Done, Notification, NotificationHandler, Settings
from adapter.routing.routes import build
from adapter.sandbox.jetshop_stand_in import JetshopStandIn
from tests.cli.test_cli import FAILED, OK, Serving, run, write
from tests.flows.site import free_port
from tests.routing.test_routes import Point
from tests.simulators import Served, in_thread

pytestmark = pytest.mark.usefixtures("logging_as_before")

CONFIG = """\
adapter: {id: an_adapter, public_url: "@PUBLIC@"}
server: {host: 127.0.0.1, port: @PORT@}
operations: {port: 0, socket: "@FOLDER@/operations.sock"}
store: {url: "@STORE@"}
norce: {base_url: "@NORCE@", refresh: 0s}
merchants:
  norce: {tokens: ["${env:TOKEN}", "${env:OTHER}"], channels: {"1": {}, "2": {}}}
senders: {signed_urls: {keys: {k1: "${env:URL_KEY}"}}}
callbacks: {order-status: {kind: notification, scope: /state/currentStatus}}
routes:
  seen: {callback: order-status, handler: log}
  export: {callback: order-status, handler: @HANDLER@, settings: @SETTINGS@}
"""
JETSHOP = (
    '{base_url: "@SHOP@", shop_id: "1", unmapped: passthrough, '
    'auth: {type: basic, username: stand-in, password: "${env:PASSWORD}"}}'
)
ENVIRON = {
    "TOKEN": "canary-token", "OTHER": "canary-token", "URL_KEY": "canary-url-key-0123456789",
    "PASSWORD": "canary-password", "DATABASE": "postgresql+psycopg://a:canary-database@127.0.0.1:1/adapter",
}  # fmt: skip
NAMES = ["database", "Norce, norce, token 1", "Norce, norce, token 2", "destination of export", "public_url"]


class Site:
    """A configuration whose Norce, shop and service run in threads."""

    def __init__(self, folder: Path, norce: Served, shop: str) -> None:
        self.folder = folder
        self.norce = norce
        self.port = free_port()
        self.values = {
            "PUBLIC": f"http://127.0.0.1:{self.port}", "PORT": str(self.port), "NORCE": norce.url,
            "STORE": f"sqlite:///{folder}/ledger.db", "HANDLER": "jetshop", "SETTINGS": JETSHOP, "SHOP": shop,
        }  # fmt: skip

    def write(self) -> Path:
        text = CONFIG
        for name, value in self.values.items():
            text = text.replace(f"@{name}@", value)
        return write(self.folder, text=text)

    def failures(self, **environ: str) -> dict[str, str]:
        """Run the command and return the problems by the names of the trials."""
        result = run("check", "--online", config=self.write(), env=ENVIRON | environ)
        assert "canary" not in result.output
        lines = result.stdout.splitlines()[1:]
        found = {}
        for line in lines:
            word, _, rest = line.partition(" ")
            name, _, problem = rest.strip().partition(": ")
            assert (word == "ok") is (problem == "")
            if problem:
                found[name] = problem
        assert len(lines) == len(NAMES), result.output
        assert result.exit_code == (FAILED if found else OK)
        return found


@pytest.fixture(scope="module")
def norce() -> Iterator[Served]:
    with closing(Served(ENVIRON["TOKEN"])) as served:
        yield served


@pytest.fixture(scope="module")
def shop() -> Iterator[str]:
    with in_thread(JetshopStandIn(password=ENVIRON["PASSWORD"]).serve()) as url:
        yield url


@pytest.fixture
def site(tmp_path: Path, norce: Served, shop: str) -> Site:
    return Site(tmp_path, norce, shop)


def test_all_is_well_while_the_service_runs(site: Site) -> None:
    with closing(Serving(site.write(), ENVIRON)):
        result = run("check", "--online", config=site.write(), env=ENVIRON)

    assert result.exit_code == OK
    assert result.stdout.splitlines()[1:] == [f"ok      {name}" for name in NAMES]


def test_without_a_service_only_the_public_address_fails(site: Site) -> None:
    failures = site.failures()

    assert list(failures) == ["public_url"]
    assert "start the service" in failures["public_url"]


@pytest.mark.parametrize(
    ("values", "environ", "failed", "said"),
    [
        ({}, {"OTHER": "canary-old-token"}, "Norce, norce, token 2", "correct merchants.norce.tokens[1]"),
        ({}, {"TOKEN": "canary-old-token"}, "Norce, norce, token 1", "correct merchants.norce.tokens[0]"),
        ({}, {"PASSWORD": "canary-wrong"}, "destination of export", "correct routes.export.settings"),
        ({"SHOP": "http://127.0.0.1:1"}, {}, "destination of export", "destination-unreachable"),
        ({"STORE": "sqlite:///@FOLDER@"}, {}, "database", "correct store.url"),
        ({"STORE": "${env:DATABASE}"}, {}, "database", "correct store.url"),
    ],
    ids=["second token", "first token", "credentials", "no shop", "a folder", "no server"],
)
def test_each_failure_has_a_line_with_its_remedy(
    site: Site, values: dict[str, str], environ: dict[str, str], failed: str, said: str
) -> None:
    site.values |= values

    failures = site.failures(**environ)

    assert list(failures) == [failed, "public_url"]
    assert said in failures[failed]


def test_a_norce_that_does_not_answer_fails_each_token(site: Site) -> None:
    site.values["NORCE"] = "http://127.0.0.1:1/checkout"

    failures = site.failures()

    assert list(failures) == [*NAMES[1:3], "public_url"]
    assert "check norce.environment, norce.base_url and merchants.norce.slug" in failures[NAMES[1]]


def test_a_public_address_that_leads_elsewhere_fails(site: Site) -> None:
    site.values["PUBLIC"] = site.norce.url.removesuffix("/checkout")

    failures = site.failures()

    assert "answers 404 for our schema" in failures["public_url"]


def test_different_settings_are_tried_each_once(site: Site) -> None:
    other = '"2": {routes: {export: {settings: {auth: {type: basic, username: other, password: "${env:PASSWORD}"}}}}}'
    path = site.write()
    path.write_text(path.read_text().replace('"2": {}', other))

    result = run("check", "--online", config=path, env=ENVIRON)

    lines = [line for line in result.stdout.splitlines() if "destination" in line]
    assert lines[0] == "ok      destination of export, norce 1"
    assert lines[1].startswith("failed  destination of export, norce 2: ")


# --- handlers that misbehave ------------------------------------------------------------------------------------------


class _Quiet(NotificationHandler[Settings]):
    async def deliver(self, notification: Notification, context: Context[Settings]) -> Done:
        return Done()


class Blocking(_Quiet):
    async def check_credentials(self, context: Context[Settings]) -> None:
        time.sleep(0.5)  # noqa: ASYNC251 - as a plugin may


class Broken(_Quiet):
    async def check_credentials(self, context: Context[Settings]) -> None:
        raise RuntimeError("canary-secret")


class Ending(_Quiet):
    async def check_credentials(self, context: Context[Settings]) -> None:
        raise SystemExit("canary-secret")


class Waiting(_Quiet):
    async def check_credentials(self, context: Context[Settings]) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("handler", "problem"),
    [
        (Blocking, None),
        (Broken, "the handler failed with RuntimeError; ask its author"),
        (Ending, "the handler failed with RuntimeError; ask its author"),
        (Waiting, "no result within 2 s"),
    ],
)
def test_a_handler_may_fail_in_any_way(site: Site, handler: Any, problem: str | None) -> None:
    assert trial_of(site, handler) == [Trial(name="destination of export", problem=problem)]


def test_a_handler_that_does_not_offer_it_is_not_tried(site: Site) -> None:
    assert trial_of(site, _Quiet) == []


def trial_of(site: Site, handler: Any) -> list[Trial]:
    site.values |= {"HANDLER": "mine", "SETTINGS": "{}"}
    config = configuration.load(site.write(), ENVIRON)
    points: Any = [Point("mine", handler), Point("log", _Quiet)]
    trials = asyncio.run(try_everything(config, build(config, points), timedelta(seconds=2)))
    return [each for each in trials if each.name.startswith("destination")]
