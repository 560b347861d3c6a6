"""A site for the flows: the service as a process, and Norce and the shop as servers in threads of the test.

A service gets everything through files and its environment, and is killed by its pid. Nothing waits for a fixed time:
`wait_until` checks a condition again and again.
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
import time
import tomllib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.ledger.queries import DeliveryFilter, Overview, Queries
from adapter.sandbox.jetshop_stand_in import JetshopStandIn
from adapter.sandbox.norce import Simulator
from tests import ORDERS, PATIENCE, ROOT
from tests.databases import reading_engine
from tests.flows import service_process
from tests.simulators import in_thread

COMPLETED = json.loads((ORDERS / "order-completed.json").read_text())
URL_KEY = "a key of the flows, for signing URLs"
NORCE_TOKEN = "a token of the flows"
PASSWORD = "a password of the flows"

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, what: str = "") -> T:
    """Return the value of `condition` once it is true. Fail after `PATIENCE` seconds and name `what` is missing."""
    ends = time.monotonic() + PATIENCE
    pause = 0.01
    while not (value := condition()):
        assert time.monotonic() < ends, f"not within {PATIENCE:g} s: {what or condition}; last: {value!r}"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)  # a condition reads a log or a ledger, and eight flows may wait
    return value


def make_order(name: str, *, merchant: str = "fjallboden", channel: str = "se-b2c", **changed: Any) -> dict[str, Any]:
    """Return a completed order that has `name` as its id and as its reference."""
    return {
        **copy.deepcopy(COMPLETED),
        "id": name,
        "reference": name,
        "merchant": merchant,
        "channel": channel,
    } | changed


def in_envelope(body: dict[str, Any], notification_id: str = "n1") -> dict[str, Any]:
    """Return the order in the other form of a notification that Norce documents."""
    return {"notification": {"id": notification_id, "reference": "export"}, "order": body}


def signed_url(address: str, callback: str, body: dict[str, Any]) -> str:
    """Return the URL of a registration, signed as the documentation says and without the code of the service."""
    signed = [body["merchant"], body["channel"], body["id"], callback]
    text = json.dumps(["v1", *signed], separators=(",", ":"), ensure_ascii=False).encode()
    digest = hmac.new(URL_KEY.encode(), text, hashlib.sha256).digest()
    signature = urlsafe_b64encode(digest).decode().rstrip("=")
    query = urlencode({"merchant": signed[0], "channel": signed[1], "key": "k1", "sig": signature})
    return f"{address}/api/v1/callbacks/orders/{body['id']}/{callback}?{query}"


# --- Norce and the shop ---------------------------------------------------------------------------------------------


class Norce(Simulator):
    """Norce Checkout. It records which orders are read, and does not answer for the orders in `held`."""

    def __init__(self) -> None:
        super().__init__(token=NORCE_TOKEN)
        self.reads: list[str] = []
        self.held: set[str] = set()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        order_id = scope["path"].rpartition("/")[2]
        self.reads.append(order_id)
        disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
        while order_id in self.held and not disconnected.done():  # noqa: ASYNC110 - another thread ends it
            await asyncio.sleep(0.01)
        if not disconnected.done():
            disconnected.cancel()
            await self.app(scope, receive, send)


class ReceivedRequest(NamedTuple):
    method: str
    order_key: str
    at: float  # time.monotonic


class Shop(JetshopStandIn):
    """The shop. It records every request that arrives completely, also those that it does not answer."""

    def __init__(self) -> None:
        super().__init__(username="flows", password=PASSWORD)
        self.received: list[ReceivedRequest] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:  # the service was killed while it sent the request
            return
        self.received.append(ReceivedRequest(scope["method"], scope["path"].split("/")[-2], time.monotonic()))
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Message:
            return next(whole, None) or await receive()

        await super().__call__(scope, receive_again, send)

    def forget_faults(self) -> None:
        """Drop the scripted faults that no request has met yet."""
        self._script.clear()

    def requests_for(self, order_key: str) -> list[ReceivedRequest]:
        return [each for each in self.received if each.order_key == order_key]

    def methods(self, order_key: str) -> list[str]:
        return [each.method for each in self.requests_for(order_key)]

    def count_puts(self, order_key: str) -> int:
        """Count the PUTs that changed the order or found it unchanged. More than one is a repetition."""
        return sum(entry.order_key == order_key for entry in list(self.journal))


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ExternalServices(JetshopStandIn):
    """All servers that the service calls, behind one port. The first step of the path selects the server.

    The base class is there for its server, which can break a connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self.url = ""
        self._apps: list[ASGIApp] = []

    def __enter__(self) -> "ExternalServices":
        self._listening = in_thread(self.serve())
        self.url = self._listening.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._listening.__exit__(*failure)

    def add(self, app: ASGIApp) -> str:
        """Add a server and return its URL."""
        self._apps.append(app)
        return f"{self.url}/{len(self._apps) - 1}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = scope["path"].split("/")[1]
        moved = {name: scope[name][len(number) + 1 :] for name in ("path", "raw_path")}
        await self._apps[int(number)]({**scope, **moved}, receive, send)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --- the service ----------------------------------------------------------------------------------------------------


class Service:
    """A process of `norce-adapter serve`. Its log is a file of JSON lines."""

    def __init__(
        self,
        config_path: Path,
        environ: dict[str, str],
        log_path: Path,
        *options: str,
        command: Sequence[Path | str] = (),
    ) -> None:
        self.log_path = log_path
        self.started_at = time.monotonic()
        log_path.touch()
        self._process = service_process.start(config_path, environ, log_path, *options, command=command)
        self.pid: int = self._process.pid or 0
        self.address = self.operations_address = ""

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def wait_until_serving(self) -> "Service":
        """Wait until the service listens, and return it."""
        wait_until(lambda: self.logged("serving") or not self.is_running, what="a service that listens")
        events = self.logged("serving")
        assert events, f"the service ended with {self._process.exitcode}:\n{self.log_path.read_text()}"
        self.address, self.operations_address = events[0]["address"], events[0]["operations_address"]
        return self

    def read_log(self) -> list[dict[str, Any]]:
        lines = self.log_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def logged(self, event: str, **facts: Any) -> list[dict[str, Any]]:
        """Return the log events with this name and these facts."""
        return [each for each in self.read_log() if each["event"] == event and facts.items() <= each.items()]

    def error_lines(self) -> list[str]:
        """Return the lines that a healthy service does not write: errors, and lines that are no log events."""
        lines = self.log_path.read_text().splitlines()
        return [line for line in lines if not line.startswith("{") or json.loads(line)["level"] == "error"]

    def kill(self) -> None:
        """Kill the process with SIGKILL, as a power cut would."""
        self._process.kill()
        self._process.join()

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait_for_exit(self) -> int:
        """Wait for the end of the process and return its exit code."""
        self._process.join(PATIENCE)
        assert not self.is_running, f"still running after {PATIENCE:g} s:\n{self.log_path.read_text()}"
        return int(self._process.exitcode or 0)

    def stop(self) -> int:
        """Send SIGTERM, wait for the end and return the exit code."""
        self.terminate()
        return self.wait_for_exit()


class Site:
    """One or more services on one store, between a Norce and a shop.

    The next process starts with `config` and `environ`; a test may change both between two starts. When the context
    ends, every process is killed, and their logs may contain no errors but those named in `expected_errors`.
    """

    def __init__(self, folder: Path, external_services: ExternalServices, store_url: str | None = None) -> None:
        self.folder = folder
        self.external_services = external_services
        self.results: dict[str, Any] = {}  # of a flow, for its tests
        self.norce = Norce()
        self.shop = Shop()
        self.services: list[Service] = []
        self.expected_errors: set[str] = set()  # names of log events
        self._open = contextlib.ExitStack()
        self.http = self._open.enter_context(httpx.Client(trust_env=False, timeout=PATIENCE))
        (folder / "norce-token").write_text(NORCE_TOKEN)
        self.environ = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONWARNINGS": "error",
            "URL_KEY": URL_KEY,
            "SHOP_PASSWORD": PASSWORD,
            "WRONG_PASSWORD": "of another shop",
        }
        # The times are so long that only a test which sets its own depends on them.
        self.config: dict[str, Any] = {
            "adapter": {"id": "jetshop_adapter", "public_url": "http://127.0.0.1:8080"},
            "server": {"host": "127.0.0.1", "port": 0},
            "operations": {"port": 0, "socket": None},
            "store": {"url": store_url or f"sqlite:///{folder / 'ledger.db'}"},
            "norce": {"base_url": f"{external_services.add(self.norce.serve)}/checkout", "timeout": "1m"},
            "dispatcher": {"grace": "30s"},
            "merchants": {
                "fjallboden": {"tokens": ["${file:norce-token}"], "channels": {"se-b2c": {}}},
                "norce": {"tokens": ["${file:norce-token}"], "channels": {"1": {}}},
            },
            "senders": {"signed_urls": {"keys": {"k1": "${env:URL_KEY}"}}},
            "callbacks": {
                "order-status": {"kind": "notification", "scope": "/state/currentStatus"},
                "order-rules": {"kind": "validation", "deadline": "10s"},
            },
            "routes": {
                "export-payment": {
                    "callback": "order-status",
                    "when": {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
                    "handler": "jetshop",
                    "timeout": "5m",
                    "retry": {"schedule": ["200ms"] * 25 + ["1s"] * 25},
                    "settings": {
                        "base_url": external_services.add(self.shop),
                        "shop_id": "1",
                        "auth": {"type": "basic", "username": "flows", "password": "${env:SHOP_PASSWORD}"},
                        "unmapped": "passthrough",
                    },
                }
            },
        }

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        for service in self.services:
            service.kill()
        self.norce.held.clear()
        self._open.close()
        if failure is None:
            for service in self.services:
                unexpected = [
                    line
                    for line in service.error_lines()
                    if not any(f'"{name}"' in line for name in self.expected_errors)
                ]
                assert not unexpected, unexpected
            assert not self.shop.violations

    def write_config(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(self.config, indent=2))  # JSON is YAML 1.2
        return path

    def launch(self, *options: str, command: Sequence[Path | str] = ()) -> Service:
        """Start a process and do not wait until it listens. `[COMMAND]` executes the installed command."""
        log_path = self.folder / f"service-{len(self.services)}.log"
        service = Service(self.write_config(), self.environ, log_path, *options, command=command)
        self.services.append(service)
        return service

    def start(self, *options: str, command: Sequence[Path | str] = ()) -> Service:
        return self.launch(*options, command=command).wait_until_serving()

    def run_command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of `norce-adapter` to its end."""
        environ = self.environ | {"NORCE_ADAPTER_CONFIG": str(self.write_config())}
        return service_process.run_command(arguments, environ, self.folder)

    # --- calls from Norce ---

    def notify(self, service: Service, body: dict[str, Any], sent: bytes | None = None) -> int:
        """Change the order at Norce, notify the service, and return the status of its answer."""
        return self.post_notification(service, body, sent).status_code

    def post_notification(self, service: Service, body: dict[str, Any], sent: bytes | None = None) -> httpx.Response:
        self.norce.put(body)
        content = json.dumps(body).encode() if sent is None else sent
        url = signed_url(service.address, "order-status", body)
        return self.http.post(url, content=content, headers={"content-type": "application/json"})

    def validate(self, service: Service, body: dict[str, Any], callback: str = "order-rules") -> httpx.Response:
        self.norce.put(body)
        return self.http.post(signed_url(service.address, callback, body))

    def is_ready(self, service: Service) -> bool:
        return self.http.get(f"{service.operations_address}/readyz").status_code == 200

    # --- the ledger ---

    def query(self, ask: Callable[[Queries], T]) -> T:
        with reading_engine(self.config["store"]["url"]).connect() as connection:
            return ask(Queries(connection))

    def deliveries(self, order_id: str | None = None, *, state: str | None = None) -> list[dict[str, Any]]:
        return self.query(
            lambda queries: queries.deliveries(DeliveryFilter(order_id=order_id, state=state), limit=100_000)
        )

    def delivery(self, order_id: str) -> dict[str, Any]:
        """Return the only delivery of an order, with its attempts."""
        (only,) = self.deliveries(order_id)
        return self.query(lambda queries: queries.delivery(only["id"])) or {}

    def wait_for_end(self, order_id: str) -> dict[str, Any]:
        """Wait until the only delivery of an order is done or dead, and return it."""
        what = f"the end of the delivery of {order_id}"
        wait_until(lambda: self.delivery(order_id)["state"] != "waiting", what=what)
        return self.delivery(order_id)

    def overview(self) -> Overview:
        return self.query(lambda queries: queries.overview(time.time_ns() // 1_000_000))


Flow = Callable[[Site], None]
RunFlow = Callable[[Flow], Site]
RunFlowOn = Callable[[Flow, str], Site]  # on a kind of store


def install_sample_plugin(folder: Path) -> Path:
    """Make the sample plugin in a folder for the path of a service, as pip installs it (see `test_sample_plugin`)."""
    source = ROOT / "tests" / "sample_plugin"
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "norce_adapter_sample.py", folder)
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    metadata = folder / "norce_adapter_sample-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1\n")
    handlers = [f"{name} = {handler}" for name, handler in project["entry-points"]["norce_adapter.handlers"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[norce_adapter.handlers]", *handlers]))
    return folder
