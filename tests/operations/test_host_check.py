"""`adapter.operations.host_check`: the names by which the operations port may be called."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter.ledger.commands import Commands
from adapter.ledger.store import Store
from adapter.metrics import Metrics
from adapter.operations.application import OperationsEndpoints
from adapter.operations.health import Health
from adapter.operations.host_check import HostCheck

PATHS = ("/livez", "/readyz", "/startupz", "/metrics", "/nothing")


def status(hosts: list[str], names: tuple[str, ...] = ("Scraper.Example", "0.0.0.0")) -> int:
    """Return the status of a request with these `Host` headers."""
    sent: list[int] = []

    async def app(scope: object, receive: object, send: object) -> None:
        sent.append(200)

    async def receive() -> dict[str, object]:
        return {}

    async def send(message: object) -> None:
        sent.append(dict(message)["status"]) if "status" in dict(message) else None  # type: ignore[call-overload]

    scope = {"type": "http", "method": "GET", "path": "/livez", "headers": [(b"host", each.encode()) for each in hosts]}
    asyncio.run(HostCheck(app, names)(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:8081", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.1:8081", "10.244.1.7:8081",
        "192.0.2.1", "[::1]", "[::1]:8081", "[fe80::1%eth0]:8081", "scraper.example", "SCRAPER.example.:8081",
    ],
)  # fmt: skip
def test_addresses_and_the_given_names_are_answered(host: str) -> None:
    assert status([host]) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8081", "localhost.evil.example", "127.0.0.1.evil.example",
        "127.0.0.1@evil.example", "evil.example#localhost", "0x7f.1", "2130706433", "::1", "[localhost]", "[::1", "[]",
        "", ":8081", "localhost:x", "localhost evil.example", "scraper.example.evil", "xscraper.example", "localhost..",
    ],
)  # fmt: skip
def test_other_names_are_refused(host: str) -> None:
    assert status([host]) == 421


def test_of_two_hosts_both_must_be_known() -> None:
    assert status(["localhost", "evil.example"]) == status(["evil.example", "localhost"]) == 421


def test_a_probe_without_a_host_is_answered() -> None:
    """A load balancer may speak HTTP/1.0. Every browser sends the header."""
    assert status([]) == 200


@pytest.fixture
def endpoints(tmp_path: Path) -> OperationsEndpoints:
    store = Store.open(f"sqlite:///{tmp_path}/ledger.db")
    try:
        parts: Any = {"commands": Commands(store), "reconcile": None, "backfill": None, "reconcile_orders": None}
        return OperationsEndpoints(Health(started=True), Metrics("1"), store, **parts)
    finally:
        store.close()


@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_the_port_has_the_check(endpoints: OperationsEndpoints, path: str) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(endpoints.for_port(None))
        async with httpx.AsyncClient(transport=transport, base_url="http://evil.example") as http:
            return await http.get(path)

    answer = asyncio.run(ask())

    assert (answer.status_code, answer.json()["code"]) == (421, "host-not-allowed")
    assert "operations.hosts" in answer.json()["message"]


def test_commands_have_the_check_before_the_token(endpoints: OperationsEndpoints) -> None:
    async def ask() -> int:
        transport = httpx.ASGITransport(endpoints.for_port(None))
        async with httpx.AsyncClient(transport=transport, base_url="http://evil.example") as http:
            return (await http.post("/commands/pause")).status_code

    assert asyncio.run(ask()) == 421


def test_the_unix_socket_has_no_check(endpoints: OperationsEndpoints) -> None:
    async def ask() -> int:
        transport = httpx.ASGITransport(endpoints.for_socket())
        async with httpx.AsyncClient(transport=transport, base_url="http://operations") as http:
            return (await http.get("/livez")).status_code

    assert asyncio.run(ask()) == 200
