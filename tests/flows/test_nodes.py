"""
Several nodes on one PostgreSQL: one dies, or is stopped for longer than its lease, and the others take over. And the
store itself goes away under a serving node, and comes back.
"""

import os
import resource
import signal
from pathlib import Path

import pytest

from adapter.sandbox.jetshop_stand_in import Fault
from tests import ROOT
from tests.crash.destinations import Warehouse
from tests.crash.warehouse import install
from tests.databases import postgres_server
from tests.flows.stage import Everywhere, Service, Stage, Story, order, until

pytestmark = pytest.mark.timeout(300)  # of leases and doubts, on a busy machine

SLOW = Fault(acts=True, delay_seconds=0.7)
WITHIN = 90.0  # a lease, a doubt, a heartbeat and a poll are 33 s


def with_a_warehouse(stage: Stage) -> Warehouse:
    """A second route, to a destination that ships at every request and can only be asked."""
    warehouse = Warehouse()
    warehouse.answers_after = SLOW.delay_seconds
    plugin = install(stage.folder / "warehouse")
    stage.environ["PYTHONPATH"] = os.pathsep.join((stage.environ["PYTHONPATH"], str(ROOT), str(plugin)))
    stage.config["routes"]["ship"] = {
        "callback": "order-status",
        "handler": "warehouse",
        "timeout": "2s",
        "concurrency": 16,
        "settings": {"url": stage.neighbours.add(warehouse)},
    }
    stage.config["routes"]["export-payment"] |= {"concurrency": 16, "timeout": "2s"}
    return warehouse


def send(stage: Stage, service: Service, names: list[str]) -> None:
    for name in names:
        stage.shop.script(name, SLOW)
        assert stage.notify(service, order(name)) == 200


def all_ended(stage: Stage, names: list[str]) -> None:
    waiting = "the end of all deliveries"
    until(lambda: not stage.deliveries(state="waiting"), within=WITHIN, what=waiting)
    ended = [(each["order_id"], each["reason"]) for each in stage.deliveries()]
    assert sorted(ended) == sorted((name, "delivered") for name in names for _ in range(2))


def effects(stage: Stage, warehouse: Warehouse, names: list[str]) -> set[tuple[int, int]]:
    """How often the shop and the warehouse acted for these orders."""
    return {
        (stage.shop.taken(name), sum(n for (of, _), n in warehouse.shipped.items() if of == name)) for name in names
    }


# --- one dies -------------------------------------------------------------------------------------------------------

EARLY, MEANWHILE, LATE = ([f"{when}-{number}" for number in range(8)] for when in ("early", "meanwhile", "late"))


def one_dies(stage: Stage) -> None:
    """In the middle of its requests; the other goes on."""
    stage.kept["warehouse"] = warehouse = with_a_warehouse(stage)
    first = stage.start()
    second = stage.start()
    send(stage, first, EARLY)
    send(stage, second, MEANWHILE)
    until(lambda: len(warehouse.shipped) > 8)
    first.kill()
    send(stage, second, LATE)
    all_ended(stage, [*EARLY, *MEANWHILE, *LATE])


def test_a_node_that_is_killed_leaves_its_lanes_to_the_other_and_nothing_is_done_twice(
    told_everywhere: Everywhere,
) -> None:
    stage = told_everywhere(one_dies, "postgresql")

    assert effects(stage, stage.kept["warehouse"], [*EARLY, *MEANWHILE, *LATE]) == {(1, 1)}
    kinds = {each["kind"] for name in EARLY + MEANWHILE for each in attempts(stage, name)}
    assert kinds == {"deliver", "lookup"}


# --- one is stopped, and goes on ------------------------------------------------------------------------------------


def one_is_paused(stage: Stage) -> None:
    """Stopped in the middle of its requests, and of a re-read, for longer than its lease; then it goes on."""
    stage.expected |= {"lease_lost", "store_unavailable"}  # its transaction or connection may have been ended meanwhile
    stage.kept["warehouse"] = warehouse = with_a_warehouse(stage)
    stage.config["norce"]["timeout"] = "2s"
    first = stage.start()
    stage.norce.held.add("unread")
    send(stage, first, [*EARLY, "unread"])
    until(lambda: len(warehouse.shipped) == len(EARLY) and stage.norce.reads.count("unread") == 2)
    os.kill(first.process.pid, signal.SIGSTOP)
    stage.norce.held.clear()
    second = stage.start()
    send(stage, second, MEANWHILE)
    all_ended(stage, [*EARLY, "unread", *MEANWHILE])

    os.kill(first.process.pid, signal.SIGCONT)

    until(lambda: first.said("lease_lost"), within=WITHIN)
    assert second.stop() == 0
    send(stage, first, LATE)
    all_ended(stage, [*EARLY, "unread", *MEANWHILE, *LATE])


def test_a_node_that_was_stopped_past_its_lease_doubles_nothing_and_works_on(told_everywhere: Everywhere) -> None:
    stage = told_everywhere(one_is_paused, "postgresql")

    assert effects(stage, stage.kept["warehouse"], [*EARLY, "unread", *MEANWHILE, *LATE]) == {(1, 1)}
    assert {each["kind"] for name in LATE for each in attempts(stage, name)} == {"deliver"}


def attempts(stage: Stage, name: str) -> list[dict[str, object]]:
    found = [stage.query(lambda queries, each=each: queries.delivery(each["id"])) for each in stage.deliveries(name)]
    return [attempt for delivery in found for attempt in delivery["attempts"]]


# --- the store goes away, and comes back ----------------------------------------------------------------------------


def is_refused(stage: Stage, service: Service) -> None:
    answer = stage.answer(service, order("refused"))
    assert answer.status_code == 503
    assert answer.json()["code"] == "store-unavailable"
    assert int(answer.headers["retry-after"]) > 0
    checks = stage.http.get(f"{service.operations_address}/readyz")
    assert (checks.status_code, checks.json()["checks"]["store"]) == (503, False)
    assert stage.http.get(f"{service.operations_address}/livez").status_code == 200


def all_is_well_again(stage: Stage, service: Service) -> None:
    """Without a callback and without a restart; what was in the air when the store went is there once."""
    until(lambda: stage.ready(service), within=20)
    assert stage.notify(service, order("afterwards")) == 200
    for name in ("before", "in-the-air", "afterwards"):
        assert stage.ended(name)["reason"] == "delivered"
        assert stage.shop.taken(name) == 1
    assert service.said("store_recovered")
    assert service.process.poll() is None


def test_a_postgresql_that_goes_away_is_a_503_and_heals_without_a_restart(stage: Stage) -> None:
    stage.expected.add("store_unavailable")
    with postgres_server() as server:
        stage.config["store"]["url"] = server.fresh()
        stage.shop.script("in-the-air", SLOW)
        service = stage.start()
        stage.notify(service, order("before"))
        stage.ended("before")
        stage.notify(service, order("in-the-air"))
        until(lambda: stage.shop.met("in-the-air"))

        server.stop()
        is_refused(stage, service)

        server.start()
        all_is_well_again(stage, service)
        service.kill()


def test_a_full_disk_is_a_503_and_heals_without_a_restart(stage: Stage) -> None:
    """No file of the service may grow beyond the log of its database, which a full disk is like, and takes no root."""
    stage.expected.add("store_unavailable")
    stage.shop.script("in-the-air", SLOW)
    service = stage.start()
    stage.notify(service, order("before"))
    stage.ended("before")
    stage.notify(service, order("in-the-air"))
    until(lambda: stage.shop.met("in-the-air"))
    written = Path(f"{stage.folder / 'ledger.db'}-wal").stat().st_size
    assert written > service.log_path.stat().st_size
    _, hard = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)

    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (written, hard))
    is_refused(stage, service)

    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    all_is_well_again(stage, service)
    assert stage.shop.methods("in-the-air") == ["PUT"]  # its outcome was kept until it could be written


STORIES: dict[Story, tuple[str, ...]] = {one_dies: ("postgresql",), one_is_paused: ("postgresql",)}
