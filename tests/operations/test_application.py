"""`adapter.operations.application`: the probes and the metrics."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapter.identifiers import Channel
from adapter.ledger.claims import QueueKey
from adapter.ledger.commands import Commands
from adapter.ledger.inbox import Inbox, ReceivedNotification, Wanted
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.settlement import FOR_EVER
from adapter.ledger.store import Store, StoreUnavailable
from adapter.metrics import Metrics
from adapter.operations.application import OperationsEndpoints
from adapter.operations.health import Health
from adapter.reconciliation.events import LogProgress
from tests.databases import rows
from tests.ledgers import POLICY


class Site:
    """The operations application over a real ledger, without a service."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store.open(url)
        self.health = Health(started=True)
        self.health.checks["store"] = lambda: not self.store.failing
        self.metrics = Metrics("1.2.3")
        self.app = self.application()

    def application(self, reconcile: Any = None) -> Any:
        parts: Any = {"commands": Commands(self.store), "backfill": None, "reconcile_orders": None}
        endpoints = OperationsEndpoints(self.health, self.metrics, self.store, reconcile=reconcile, **parts)
        return endpoints.for_socket()

    async def get(self, path: str, method: str = "GET") -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://operations") as http:
            return await http.request(method, path)

    def get_sync(self, path: str, method: str = "GET") -> httpx.Response:
        return asyncio.run(self.get(path, method))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(f"sqlite:///{tmp_path}/ledger.db")
    yield made
    made.store.close()


@pytest.fixture
def each_site(store_url: str) -> Iterator[Site]:
    """A site on each kind of store, for tests that read the ledger."""
    made = Site(store_url)
    yield made
    made.store.close()


def samples(text: str) -> dict[tuple[str, frozenset[Any]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_service_is_alive_if_it_answers(site: Site) -> None:
    site.health.stopping = True

    answer = site.get_sync("/livez")

    assert (answer.status_code, answer.json()) == (200, {"alive": True})


def test_the_service_is_started_when_every_part_runs(site: Site) -> None:
    site.health.started = False
    before = site.get_sync("/startupz")
    site.health.started = True
    after = site.get_sync("/startupz")

    assert (before.status_code, before.json()) == (503, {"started": False})
    assert (after.status_code, after.json()) == (200, {"started": True})


def test_a_held_service_is_ready_and_reported_as_held(site: Site) -> None:
    site.health.is_held = True

    answer = site.get_sync("/readyz")

    assert (answer.status_code, answer.json()["held"]) == (200, True)


def test_the_service_is_ready_if_every_check_passes(site: Site) -> None:
    answer = site.get_sync("/readyz")

    assert answer.status_code == 200
    assert answer.json() == {
        "ready": True,
        "held": False,
        "checks": {"started": True, "not_stopping": True, "store": True},
    }


@pytest.mark.parametrize(
    ("change", "check"),
    [({"started": False}, "started"), ({"stopping": True}, "not_stopping"), ({}, "store"), ({}, "dispatcher")],
    ids=["not started", "stopping", "store failing", "dispatcher ended"],
)
def test_the_service_is_not_ready_if_one_check_fails(site: Site, change: dict[str, bool], check: str) -> None:
    for name, value in change.items():
        setattr(site.health, name, value)
    if not change:
        site.health.checks[check] = lambda: False

    answer = site.get_sync("/readyz")

    assert answer.status_code == 503
    assert [name for name, well in answer.json()["checks"].items() if not well] == [check]


def test_an_optional_check_is_shown_and_leaves_the_service_ready(site: Site) -> None:
    site.health.checks["store"] = lambda: False
    site.health.optional.add("store")

    answer = site.get_sync("/readyz")

    assert (answer.status_code, answer.json()["ready"], answer.json()["checks"]["store"]) == (200, True, False)


def test_a_failing_store_makes_the_service_unready_until_a_write_succeeds(each_site: Site) -> None:
    def fails(connection: Any, _items: Any) -> list[None]:
        connection.exec_driver_sql("SELECT * FROM no_such_table")
        return [None]

    def works(_connection: Any, items: Any) -> list[None]:
        return [None for _ in items]

    async def run() -> list[int]:
        statuses = [(await each_site.get("/readyz")).status_code]
        with pytest.raises(StoreUnavailable):
            await each_site.store.write(fails, None)
        statuses.append((await each_site.get("/readyz")).status_code)
        statuses.append(
            int(samples((await each_site.get("/metrics")).text)["norce_adapter_store_available", frozenset()])
        )
        await each_site.store.write(works, None)
        statuses.append((await each_site.get("/readyz")).status_code)
        return statuses

    assert asyncio.run(run()) == [200, 503, 0, 200]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/metrics"])
def test_probes_and_metrics_accept_only_get(site: Site, path: str, method: str) -> None:
    assert site.get_sync(path, method).status_code == 405


@pytest.mark.parametrize("path", ["/", "/config", "/api/v1/callbacks/orders/o1/order-status", "/metrics/x"])
def test_other_paths_are_404(site: Site, path: str) -> None:
    assert site.get_sync(path).status_code == 404


def test_metrics_are_prometheus_text_with_every_name(site: Site) -> None:
    answer = site.get_sync("/metrics")

    families = {family.name for family in text_string_to_metric_families(answer.text)}
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert {metric.name for metric in site.metrics.registry.collect()} <= families
    assert all(re.fullmatch(r"norce_adapter_[a-z_]+", name) for name in families)
    assert samples(answer.text)["norce_adapter_build_info", frozenset({("version", "1.2.3")})] == 1


def test_metrics_count_the_waiting_deliveries(each_site: Site) -> None:
    async def run() -> str:
        lanes = Lanes(each_site.store, Lease(each_site.store, version="0"), policy=POLICY)
        queues = await lanes.open_queues([QueueKey("export", Channel("norce", "1"))])
        for number in range(3):
            receipt = ReceivedNotification(
                identity=bytes([number] * 24), channel=Channel("norce", "1"), callback="order-status",
                order_id=f"canary-{number}", snapshot_at=1, source="callback", body=b"{}",
                wanted=tuple(Wanted(queue_id=queue, refetch=True) for queue in queues.values()),
            )  # fmt: skip
            await Inbox(each_site.store).receive(receipt)
        return (await each_site.get("/metrics")).text

    text = asyncio.run(run())

    found = samples(text)
    assert found["norce_adapter_deliveries", frozenset({("route", "export"), ("state", "waiting")})] == 3
    assert found["norce_adapter_oldest_waiting_age_seconds", frozenset({("route", "export")})] >= 0
    assert found["norce_adapter_store_available", frozenset()] == 1
    assert "canary" not in text


def test_metrics_report_paused_queues(each_site: Site) -> None:
    lanes = Lanes(each_site.store, Lease(each_site.store, version="0"), policy=POLICY)
    keys = [QueueKey("export", Channel(merchant, "1")) for merchant in ("norce", "other")]

    async def run() -> str:
        await lanes.open_queues(keys)
        rows(each_site.url, f"UPDATE queues SET paused_until = {FOR_EVER} WHERE merchant = 'norce'")
        rows(each_site.url, "UPDATE queues SET paused_until = 1 WHERE merchant = 'other'")
        return (await each_site.get("/metrics")).text

    found = samples(asyncio.run(run()))

    paused = {labels: value for (name, labels), value in found.items() if name == "norce_adapter_queue_paused"}
    assert paused == {frozenset({("route", "export"), ("merchant", "norce"), ("channel", "1")}): 1}


def test_metrics_are_served_if_the_tables_cannot_be_read(each_site: Site) -> None:
    rows(each_site.url, "ALTER TABLE deliveries RENAME TO elsewhere")
    try:
        answer = each_site.get_sync("/metrics")
    finally:
        rows(each_site.url, "ALTER TABLE elsewhere RENAME TO deliveries")

    assert answer.status_code == 200
    assert samples(answer.text)["norce_adapter_store_available", frozenset()] == 1


def test_metrics_are_served_if_the_ledger_cannot_be_read(site: Site) -> None:
    site.store.failing = True
    path = site.url.removeprefix("sqlite:///")
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(f"{path}{suffix}"):
            os.truncate(f"{path}{suffix}", 0)

    answer = site.get_sync("/metrics")

    assert answer.status_code == 200
    assert samples(answer.text)["norce_adapter_store_available", frozenset()] == 0


def test_a_shutdown_does_not_wait_for_a_long_event_log(site: Site) -> None:
    closed = []

    async def endless(**_: Any) -> AsyncIterator[LogProgress]:
        try:
            while True:
                site.health.stopping = True  # while the first page is read
                yield LogProgress(merchant="norce")
        finally:
            closed.append("the log")

    app = site.application(reconcile=endless)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://operations") as http:
            return await http.post("/commands/reconcile", content=b"{}")

    lines = [json.loads(line) for line in asyncio.run(post()).text.splitlines()]

    assert [("merchant" in line, bool(line["error"])) for line in lines] == [(True, False), (False, True)]
    assert closed == ["the log"]
