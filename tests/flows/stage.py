"""
The stage for the stories: the service as a process of its own, Norce and the shop as threads of the test.

A process is told everything by files and by its environment, and is killed by its pid. Nothing waits for a fixed time:
`until` asks again and again, and fails at its deadline.
"""

import asyncio
import contextlib
import copy
import hashlib
import hmac
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.ledger.queries import DeliveryFilter, Overview, Queries
from adapter.ledger.store import open_for_reading
from adapter.sandbox.jetshop_stand_in import JetshopStandIn
from tests import ORDERS, ROOT
from tests.norce_stand_in import NorceStandIn

COMMAND = Path(sysconfig.get_path("scripts")) / "norce-adapter"
COMPLETED = json.loads((ORDERS / "order-completed.json").read_text())
URL_KEY = "a key of the stories, for signing URLs"
NORCE_TOKEN = "a token of the stories"
PASSWORD = "a password of the stories"

T = TypeVar("T")


def until(asked: Callable[[], T], *, within: float = 30.0, what: str = "") -> T:
    """What `asked` answers once it is true. Fails after `within` seconds, saying `what` was waited for."""
    ends = time.monotonic() + within
    while True:
        answer = asked()
        if answer:
            return answer
        if time.monotonic() > ends:
            raise AssertionError(f"not within {within:g} s: {what or asked}; last: {answer!r}")
        time.sleep(0.02)


def order(name: str, *, merchant: str = "fjallboden", channel: str = "se-b2c", **changed: Any) -> dict[str, Any]:
    """A completed order, with `name` for its id and its reference at the shop."""
    return {
        **copy.deepcopy(COMPLETED),
        "id": name,
        "reference": name,
        "merchant": merchant,
        "channel": channel,
    } | changed


def enveloped(body: dict[str, Any], notification_id: str = "n1") -> dict[str, Any]:
    """The same order in the other form that Norce documents."""
    return {"notification": {"id": notification_id, "reference": "export"}, "order": body}


def signed_url(address: str, callback: str, body: dict[str, Any]) -> str:
    """The address that a registration would carry: signed as the documentation says, with nothing of ours."""
    whose = [body["merchant"], body["channel"], body["id"], callback]
    text = json.dumps(["v1", *whose], separators=(",", ":"), ensure_ascii=False).encode()
    digest = hmac.new(URL_KEY.encode(), text, hashlib.sha256).digest()
    shown = urlsafe_b64encode(digest).decode().rstrip("=")
    query = urlencode({"merchant": whose[0], "channel": whose[1], "key": "k1", "sig": shown})
    return f"{address}/api/v1/callbacks/orders/{body['id']}/{callback}?{query}"


# --- Norce and the shop ---------------------------------------------------------------------------------------------


class Norce(NorceStandIn):
    """Norce Checkout, which remembers who asked for which order and keeps those in `held` waiting for the answer."""

    def __init__(self) -> None:
        super().__init__(NORCE_TOKEN)
        self.reads: list[str] = []
        self.held: set[str] = set()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        order_id = scope["path"].rpartition("/")[2]
        self.reads.append(order_id)
        leaving = asyncio.ensure_future(_left(receive))
        while order_id in self.held and not leaving.done():  # noqa: ASYNC110 - let go by another thread
            await asyncio.sleep(0.01)
        if not leaving.done():
            leaving.cancel()
            await self.app(scope, receive, send)


class Seen(NamedTuple):
    method: str
    order_key: str
    at: float  # time.monotonic


class Shop(JetshopStandIn):
    """The shop, which remembers every request that arrives in one piece, whatever became of it."""

    def __init__(self) -> None:
        super().__init__(username="stories", password=PASSWORD)
        self.seen: list[Seen] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:  # killed in the middle of its request: nothing that anybody could act on
            return
        self.seen.append(Seen(scope["method"], scope["path"].split("/")[-2], time.monotonic()))
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(whole, None) or await receive()

        await super().__call__(scope, again, send)

    def behaves(self) -> None:
        """Whatever was scripted and has not been met yet is forgotten."""
        self._script.clear()

    def met(self, order_key: str) -> list[Seen]:
        return [each for each in self.seen if each.order_key == order_key]

    def methods(self, order_key: str) -> list[str]:
        return [each.method for each in self.met(order_key)]

    def taken(self, order_key: str) -> int:
        """How many PUTs had an effect or found it there: more than one is a repetition, even where it did no harm."""
        return sum(entry.order_key == order_key for entry in list(self.journal))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Neighbours(JetshopStandIn):
    """
    Everybody whom the service calls, behind one port that listens for all stories: the first step of a path says who
    is meant. Made of the stand-in for what its server can do: break a connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self.url = ""
        self._apps: list[ASGIApp] = []

    def __enter__(self) -> "Neighbours":
        self._listening = self.serving()
        self.url = self._listening.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._listening.__exit__(*failure)

    def add(self, app: ASGIApp) -> str:
        """The URL of one more."""
        self._apps.append(app)
        return f"{self.url}/{len(self._apps) - 1}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = scope["path"].split("/")[1]
        moved = {name: scope[name][len(number) + 1 :] for name in ("path", "raw_path")}
        await self._apps[int(number)]({**scope, **moved}, receive, send)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --- the service ----------------------------------------------------------------------------------------------------


class Service:
    """`norce-adapter serve` as a process. What it logs is in a file, line by line."""

    def __init__(self, config_path: Path, environ: dict[str, str], log_path: Path) -> None:
        self.log_path = log_path
        self.started_at = time.monotonic()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [COMMAND, "serve", "--config", config_path], stdout=log, stderr=log, env=environ, cwd=config_path.parent
            )
        self.address = self.operations_address = ""

    def serving(self) -> "Service":
        """Itself, once it listens."""
        said = until(lambda: self.said("serving") or self.process.poll() is not None, what="a service that listens")
        assert said is not True, f"the service ended with {self.process.returncode}:\n{self.log_path.read_text()}"
        self.address, self.operations_address = said[0]["address"], said[0]["operations_address"]
        return self

    def events(self) -> list[dict[str, Any]]:
        lines = self.log_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def said(self, event: str, **facts: Any) -> list[dict[str, Any]]:
        """The log's events of this name with these facts."""
        return [each for each in self.events() if each["event"] == event and facts.items() <= each.items()]

    def complaints(self) -> list[str]:
        """What a healthy service never says: errors, and anything that is no event, such as a warning of Python's."""
        lines = self.log_path.read_text().splitlines()
        return [line for line in lines if not line.startswith("{") or json.loads(line)["level"] == "error"]

    def kill(self) -> None:
        """As a power cut would: kill -9, to this process alone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def told_to_stop(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)

    def exit_code(self, *, within: float) -> int:
        """How it ended, which it does within that many seconds."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within:g} s:\n{self.log_path.read_text()}") from None

    def stop(self, *, within: float = 10.0) -> int:
        self.told_to_stop()
        return self.exit_code(within=within)


class Stage:
    """
    One service with its folder, between Norce and a shop.

    `config` is what the next process is started with, `environ` what it finds in its environment; both may be changed
    between two starts. At the end every process is gone, and has complained of nothing but what is in `expected`.
    """

    def __init__(self, folder: Path, neighbours: Neighbours, store_url: str | None = None) -> None:
        self.folder = folder
        self.neighbours = neighbours
        self.kept: dict[str, Any] = {}  # by the story, for its tests
        self.norce = Norce()
        self.shop = Shop()
        self.services: list[Service] = []
        self.expected: set[str] = set()  # names of error events
        self._open = contextlib.ExitStack()
        self.http = self._open.enter_context(httpx.Client(trust_env=False, timeout=20))
        (folder / "norce-token").write_text(NORCE_TOKEN)
        self.environ = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONWARNINGS": "error",
            "URL_KEY": URL_KEY,
            "SHOP_PASSWORD": PASSWORD,
            "WRONG_PASSWORD": "of another shop",
        }
        self.config: dict[str, Any] = {
            "adapter": {"id": "jetshop_adapter", "public_url": "http://127.0.0.1:8080"},
            "server": {"host": "127.0.0.1", "port": 0},
            "operations": {"port": 0, "socket": None},
            "store": {"url": store_url or f"sqlite:///{folder / 'ledger.db'}"},
            "norce": {"base_url": neighbours.add(self.norce.serve), "timeout": "1s"},
            "dispatcher": {"grace": "5s"},
            "merchants": {
                "fjallboden": {"tokens": ["${file:norce-token}"], "channels": {"se-b2c": {}}},
                "norce": {"tokens": ["${file:norce-token}"], "channels": {"1": {}}},
            },
            "senders": {"signed_urls": {"keys": {"k1": "${env:URL_KEY}"}}},
            "callbacks": {
                "order-status": {"kind": "notification", "scope": "/state/currentStatus"},
                "order-rules": {"kind": "validation", "deadline": "1s"},
            },
            "routes": {
                "export-payment": {
                    "callback": "order-status",
                    "when": {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
                    "handler": "jetshop",
                    "timeout": "1s",
                    "retry": {"schedule": ["200ms"] * 40},
                    "settings": {
                        "base_url": neighbours.add(self.shop),
                        "shop_id": "1",
                        "auth": {"type": "basic", "username": "stories", "password": "${env:SHOP_PASSWORD}"},
                        "unmapped": "passthrough",
                    },
                }
            },
        }

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        for service in self.services:
            service.kill()
        self.norce.held.clear()
        self._open.close()
        if failure is None:
            for service in self.services:
                unexpected = [c for c in service.complaints() if not any(f'"{name}"' in c for name in self.expected)]
                assert not unexpected, unexpected
            assert not self.shop.violations

    def write(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(self.config, indent=2))  # JSON is YAML 1.2
        return path

    def launch(self) -> Service:
        """A process that may not listen yet."""
        log_path = self.folder / f"service-{len(self.services)}.log"
        service = Service(self.write(), self.environ, log_path)
        self.services.append(service)
        return service

    def start(self) -> Service:
        return self.launch().serving()

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """A command of `norce-adapter` that ends by itself."""
        return subprocess.run(
            [COMMAND, *arguments],
            env=self.environ | {"NORCE_ADAPTER_CONFIG": str(self.write())},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    # --- what Norce does ---

    def notify(self, service: Service, body: dict[str, Any], sent: bytes | None = None) -> int:
        """Norce has this order now, and tells the service so; the status of the answer."""
        return self.answer(service, body, sent).status_code

    def answer(self, service: Service, body: dict[str, Any], sent: bytes | None = None) -> httpx.Response:
        """The same, and all of the answer."""
        self.norce.orders[body["id"]] = body
        content = json.dumps(body).encode() if sent is None else sent
        url = signed_url(service.address, "order-status", body)
        return self.http.post(url, content=content, headers={"content-type": "application/json"})

    def validate(self, service: Service, body: dict[str, Any], callback: str = "order-rules") -> httpx.Response:
        self.norce.orders[body["id"]] = body
        return self.http.post(signed_url(service.address, callback, body))

    def ready(self, service: Service) -> bool:
        return self.http.get(f"{service.operations_address}/readyz").status_code == 200

    # --- what the ledger says ---

    def query(self, ask: Callable[[Queries], T]) -> T:
        with open_for_reading(self.config["store"]["url"]).connect() as connection:
            return ask(Queries(connection))

    def deliveries(self, order_id: str | None = None, *, state: str | None = None) -> list[dict[str, Any]]:
        return self.query(
            lambda queries: queries.deliveries(DeliveryFilter(order_id=order_id, state=state), limit=100_000)
        )

    def delivery(self, order_id: str) -> dict[str, Any]:
        """The one delivery of an order, with its attempts."""
        (only,) = self.deliveries(order_id)
        return self.query(lambda queries: queries.delivery(only["id"])) or {}

    def ended(self, order_id: str, *, within: float = 60.0) -> dict[str, Any]:
        """The one delivery of an order, once it waits no more."""
        what = f"the end of the delivery of {order_id}"
        until(lambda: self.delivery(order_id)["state"] != "waiting", within=within, what=what)
        return self.delivery(order_id)

    def overview(self) -> Overview:
        return self.query(lambda queries: queries.overview(time.time_ns() // 1_000_000))


Story = Callable[[Stage], None]
Told = Callable[[Story], Stage]  # the stage of a story, after the story
Everywhere = Callable[[Story, str], Stage]  # the same, on that kind of store


# --- somebody else's package ----------------------------------------------------------------------------------------


def install_sample_plugin(folder: Path) -> Path:
    """Builds the sample plugin and installs it in a folder, which on PYTHONPATH makes its entry points visible."""
    source, target = folder / "source", folder / "installed"
    shutil.copytree(ROOT / "tests" / "sample_plugin", source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target
