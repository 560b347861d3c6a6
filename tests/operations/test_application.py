"""`adapter.operations.application`: what the probes and the scraper are told."""

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
from adapter.ledger.inbox import Inbox, ReceivedNotification, Wanted
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.settlement import FOR_EVER, PausePolicy
from adapter.ledger.store import Store, StoreUnavailable
from adapter.metrics import Metrics
from adapter.operations.application import OperationsEndpoints
from adapter.operations.health import Health
from adapter.reconciliation.events import LogProgress
from tests.databases import rows


class Stage:
    """The operations port over a real ledger, without a service."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store.open(url)
        self.health = Health(started=True)
        self.health.checks["store"] = lambda: not self.store.failing
        self.metrics = Metrics("1.2.3")
        self.app = self.application()

    def application(self, reconcile: Any = None) -> Any:
        return OperationsEndpoints(self.health, self.metrics, self.store, reconcile=reconcile).for_socket()

    async def get(self, path: str, method: str = "GET") -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://operations") as http:
            return await http.request(method, path)

    def asks(self, path: str, method: str = "GET") -> httpx.Response:
        return asyncio.run(self.get(path, method))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(f"sqlite:///{tmp_path}/ledger.db")
    yield made
    made.store.close()


@pytest.fixture
def each_stage(store_url: str) -> Iterator[Stage]:
    """For what is read from the ledger: once on each store."""
    made = Stage(store_url)
    yield made
    made.store.close()


def samples(text: str) -> dict[tuple[str, frozenset[Any]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_it_is_alive_where_it_answers(stage: Stage) -> None:
    stage.health.stopping = True

    answer = stage.asks("/livez")

    assert (answer.status_code, answer.json()) == (200, {"alive": True})


def test_it_is_started_once_everything_is_up(stage: Stage) -> None:
    stage.health.started = False
    before = stage.asks("/startupz")
    stage.health.started = True
    after = stage.asks("/startupz")

    assert (before.status_code, before.json()) == (503, {"started": False})
    assert (after.status_code, after.json()) == (200, {"started": True})


def test_a_held_service_is_ready_and_says_that_it_is_held(stage: Stage) -> None:
    stage.health.is_held = True

    answer = stage.asks("/readyz")

    assert (answer.status_code, answer.json()["held"]) == (200, True)


def test_it_is_ready_where_every_check_is_well(stage: Stage) -> None:
    answer = stage.asks("/readyz")

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
def test_it_is_not_ready_where_one_check_is_not_and_says_which(
    stage: Stage, change: dict[str, bool], check: str
) -> None:
    for name, value in change.items():
        setattr(stage.health, name, value)
    if not change:
        stage.health.checks[check] = lambda: False

    answer = stage.asks("/readyz")

    assert answer.status_code == 503
    assert [name for name, well in answer.json()["checks"].items() if not well] == [check]


def test_a_store_that_fails_makes_it_unready_until_the_next_write_is_well(each_stage: Stage) -> None:
    def fails(connection: Any, _items: Any) -> list[None]:
        connection.exec_driver_sql("SELECT * FROM no_such_table")
        return [None]

    def works(_connection: Any, items: Any) -> list[None]:
        return [None for _ in items]

    async def walk() -> list[int]:
        statuses = [(await each_stage.get("/readyz")).status_code]
        with pytest.raises(StoreUnavailable):
            await each_stage.store.write(fails, None)
        statuses.append((await each_stage.get("/readyz")).status_code)
        statuses.append(
            int(samples((await each_stage.get("/metrics")).text)["norce_adapter_store_available", frozenset()])
        )
        await each_stage.store.write(works, None)
        statuses.append((await each_stage.get("/readyz")).status_code)
        return statuses

    assert asyncio.run(walk()) == [200, 503, 0, 200]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/metrics"])
def test_what_only_tells_takes_no_other_method(stage: Stage, path: str, method: str) -> None:
    assert stage.asks(path, method).status_code == 405


@pytest.mark.parametrize("path", ["/", "/config", "/api/v1/callbacks/orders/o1/order-status", "/metrics/x"])
def test_nothing_else_is_there(stage: Stage, path: str) -> None:
    assert stage.asks(path).status_code == 404


def test_the_metrics_are_prometheus_text_with_every_name(stage: Stage) -> None:
    answer = stage.asks("/metrics")

    families = {family.name: family.type for family in text_string_to_metric_families(answer.text)}
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert {f"norce_adapter_{name}" for name in [
        "callbacks", "callback_duration_seconds", "auth", "notifications_received", "notifications_stored",
        "conditions_evaluated", "notifications_disagreed", "verdict_duration_seconds", "delivery_attempts",
        "delivery_attempt_duration_seconds", "delivery_end_to_end_seconds", "deliveries",
        "oldest_waiting_age_seconds", "queue_paused", "store_available", "build_info",
    ]} <= families.keys()  # fmt: skip
    assert all(re.fullmatch(r"norce_adapter_[a-z_]+", name) for name in families)
    assert samples(answer.text)["norce_adapter_build_info", frozenset({("version", "1.2.3")})] == 1


def test_the_metrics_tell_what_waits_in_the_ledger(each_stage: Stage) -> None:
    async def walk() -> str:
        lanes = Lanes(each_stage.store, Lease(each_stage.store, version="0"), policy=PausePolicy())
        queues = await lanes.open_queues([QueueKey("export", Channel("norce", "1"))])
        for number in range(3):
            receipt = ReceivedNotification(
                identity=bytes([number] * 24), channel=Channel("norce", "1"), callback="order-status",
                order_id=f"canary-{number}", snapshot_at=1, source="callback", body=b"{}",
                wanted=tuple(Wanted(queue_id=queue, refetch=True) for queue in queues.values()),
            )  # fmt: skip
            await Inbox(each_stage.store).receive(receipt)
        return (await each_stage.get("/metrics")).text

    text = asyncio.run(walk())

    told = samples(text)
    assert told["norce_adapter_deliveries", frozenset({("route", "export"), ("state", "waiting")})] == 3
    assert told["norce_adapter_oldest_waiting_age_seconds", frozenset({("route", "export")})] >= 0
    assert told["norce_adapter_store_available", frozenset()] == 1
    assert "canary" not in text


def test_the_metrics_tell_which_queues_are_paused(each_stage: Stage) -> None:
    lanes = Lanes(each_stage.store, Lease(each_stage.store, version="0"), policy=PausePolicy())
    keys = [QueueKey("export", Channel(merchant, "1")) for merchant in ("norce", "other")]

    async def walk() -> str:
        await lanes.open_queues(keys)
        rows(each_stage.url, f"UPDATE queues SET paused_until = {FOR_EVER} WHERE merchant = 'norce'")
        rows(each_stage.url, "UPDATE queues SET paused_until = 1 WHERE merchant = 'other'")
        return (await each_stage.get("/metrics")).text

    told = samples(asyncio.run(walk()))

    paused = {labels: value for (name, labels), value in told.items() if name == "norce_adapter_queue_paused"}
    assert paused == {frozenset({("route", "export"), ("merchant", "norce"), ("channel", "1")}): 1}


def test_the_metrics_are_still_told_where_the_tables_cannot_be_read(each_stage: Stage) -> None:
    rows(each_stage.url, "ALTER TABLE deliveries RENAME TO elsewhere")
    try:
        answer = each_stage.asks("/metrics")
    finally:
        rows(each_stage.url, "ALTER TABLE elsewhere RENAME TO deliveries")

    assert answer.status_code == 200
    assert samples(answer.text)["norce_adapter_store_available", frozenset()] == 1


def test_the_metrics_are_still_told_where_the_ledger_cannot_be_read(stage: Stage) -> None:
    """A failing store is when they are needed most."""
    stage.store.failing = True
    path = stage.url.removeprefix("sqlite:///")
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(f"{path}{suffix}"):
            os.truncate(f"{path}{suffix}", 0)

    answer = stage.asks("/metrics")

    assert answer.status_code == 200
    assert samples(answer.text)["norce_adapter_store_available", frozenset()] == 0


def test_a_shutdown_waits_for_no_long_log(stage: Stage) -> None:
    left = []

    async def endless(**_: Any) -> AsyncIterator[LogProgress]:
        try:
            while True:
                stage.health.stopping = True  # while the first page is read
                yield LogProgress(merchant="norce")
        finally:
            left.append("the log")

    app = stage.application(reconcile=endless)

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://operations") as http:
            return await http.post("/commands/reconcile", content=b"{}")

    lines = [json.loads(line) for line in asyncio.run(asked()).text.splitlines()]

    assert [("merchant" in line, bool(line["error"])) for line in lines] == [(True, False), (False, True)]
    assert left == ["the log"]
