"""Nodes that share a PostgreSQL: one dies or is stopped past its lease, and the others take over.

Also a store that becomes unavailable under a running node and comes back.
"""

import os
import resource
import signal
from pathlib import Path

from adapter.sandbox.jetshop_stand_in import Fault
from tests import ROOT
from tests.crash.destinations import Warehouse
from tests.crash.warehouse import install
from tests.databases import postgres_server
from tests.flows.fatal import FATAL
from tests.flows.site import Flow, RunFlowOn, Service, Site, make_order, wait_until

SLOW = Fault(acts=True, delay_seconds=0.7)


def add_warehouse(site: Site) -> Warehouse:
    """Add a second route, to a destination that ignores idempotency keys and ships at every request."""
    warehouse = Warehouse()
    warehouse.answers_after = SLOW.delay_seconds
    plugin = install(site.folder / "warehouse")
    site.environ["PYTHONPATH"] = os.pathsep.join((site.environ["PYTHONPATH"], str(ROOT), str(plugin)))
    site.config["routes"]["ship"] = {
        "callback": "order-status",
        "handler": "warehouse",
        "timeout": "5s",
        "concurrency": 16,
        "settings": {"url": site.external_services.add(warehouse)},
    }
    site.config["routes"]["export-payment"] |= {"concurrency": 16, "timeout": "5s"}
    return warehouse


def send(site: Site, service: Service, names: list[str]) -> None:
    for name in names:
        site.shop.script(name, SLOW)
        assert site.notify(service, make_order(name)) == 200


def wait_until_all_delivered(site: Site, names: list[str]) -> None:
    wait_until(lambda: not site.deliveries(state="waiting"), what="the end of all deliveries")
    ended = [(each["order_id"], each["reason"]) for each in site.deliveries()]
    assert sorted(ended) == sorted((name, "delivered") for name in names for _ in range(2))


def count_effects(site: Site, warehouse: Warehouse, names: list[str]) -> set[tuple[int, int]]:
    """Return how often the shop and the warehouse acted, for each of these orders."""
    return {
        (site.shop.count_puts(name), sum(n for (of, _), n in warehouse.shipped.items() if of == name)) for name in names
    }


# --- one dies -------------------------------------------------------------------------------------------------------

EARLY, MEANWHILE, LATE = ([f"{when}-{number}" for number in range(8)] for when in ("early", "meanwhile", "late"))


def one_dies(site: Site) -> None:
    """Kill one of two nodes while it sends requests."""
    site.results["warehouse"] = warehouse = add_warehouse(site)
    first = site.start()
    second = site.start()
    send(site, first, EARLY)
    send(site, second, MEANWHILE)
    wait_until(lambda: len(warehouse.shipped) > 8)
    first.kill()
    send(site, second, LATE)
    wait_until_all_delivered(site, [*EARLY, *MEANWHILE, *LATE])


def test_the_other_node_takes_over_the_lanes_of_a_killed_one_and_nothing_is_done_twice(
    run_flow_on: RunFlowOn,
) -> None:
    site = run_flow_on(one_dies, "postgresql")

    assert count_effects(site, site.results["warehouse"], [*EARLY, *MEANWHILE, *LATE]) == {(1, 1)}
    kinds = {each["kind"] for name in EARLY + MEANWHILE for each in attempts(site, name)}
    assert kinds == {"deliver", "lookup"}


# --- an order that ends every process ------------------------------------------------------------------------------


def one_order_is_fatal(site: Site) -> None:
    """Start nodes until an order that ends every process which claims it ends none any more."""
    plugin = install(site.folder / "fatal", "fatal", "tests.flows.fatal:Fatal")
    site.environ["PYTHONPATH"] = os.pathsep.join((site.environ["PYTHONPATH"], str(ROOT), str(plugin)))
    site.config["norce"]["timeout"] = "1s"
    retry = {"schedule": ["100ms"]}
    site.config["routes"] = {
        "fatal": {"callback": "order-status", "handler": "fatal", "timeout": "1s", "retry": retry, "settings": {}}
    }
    first, second = site.start(), site.start()
    assert site.notify(first, make_order("before")) == 200
    site.wait_for_end("before")
    assert site.notify(first, make_order(FATAL)) == 200
    wait_until(lambda: not (first.is_running and second.is_running))
    third = site.start()
    wait_until(lambda: not (first.is_running or second.is_running))
    wait_until(lambda: not third.is_running)
    last = site.start()
    assert site.wait_for_end(FATAL)["state"] == "dead"
    assert site.notify(last, make_order("after")) == 200
    site.wait_for_end("after")
    assert last.is_running


def test_an_order_that_ends_every_process_becomes_a_dead_letter_after_its_schedule(run_flow_on: RunFlowOn) -> None:
    site = run_flow_on(one_order_is_fatal, "postgresql")

    dead = site.delivery(FATAL)
    assert (dead["state"], dead["reason"], dead["code"]) == ("dead", "unknown", "in-doubt")
    assert dead["tries"] == 4  # a schedule of one retry and a last lookup, and the claim that found them used up
    assert {site.delivery(name)["reason"] for name in ("before", "after")} == {"delivered"}


# --- one is stopped, and goes on ------------------------------------------------------------------------------------


def one_is_paused(site: Site) -> None:
    """Stop a node for longer than its lease while it sends requests and reads an order, then continue it."""
    site.expected_errors |= {
        "lease_lost",
        "store_unavailable",
    }  # its connection may have ended
    site.results["warehouse"] = warehouse = add_warehouse(site)
    site.config["norce"]["timeout"] = "5s"
    first = site.start()
    site.norce.held.add("unread")
    send(site, first, [*EARLY, "unread"])
    wait_until(lambda: len(warehouse.shipped) == len(EARLY) and site.norce.reads.count("unread") == 2)
    os.kill(first.pid, signal.SIGSTOP)
    site.norce.held.clear()
    second = site.start()
    send(site, second, MEANWHILE)
    wait_until_all_delivered(site, [*EARLY, "unread", *MEANWHILE])

    os.kill(first.pid, signal.SIGCONT)

    wait_until(lambda: first.logged("lease_lost"))
    assert second.stop() == 0
    send(site, first, LATE)
    wait_until_all_delivered(site, [*EARLY, "unread", *MEANWHILE, *LATE])


def test_a_node_that_was_stopped_past_its_lease_doubles_nothing_and_continues(run_flow_on: RunFlowOn) -> None:
    site = run_flow_on(one_is_paused, "postgresql")

    assert count_effects(site, site.results["warehouse"], [*EARLY, "unread", *MEANWHILE, *LATE]) == {(1, 1)}
    assert {each["kind"] for name in LATE for each in attempts(site, name)} == {"deliver"}


def attempts(site: Site, name: str) -> list[dict[str, object]]:
    found = [site.query(lambda queries, each=each: queries.delivery(each["id"])) for each in site.deliveries(name)]
    return [attempt for delivery in found for attempt in delivery["attempts"]]


# --- the store goes away, and comes back ----------------------------------------------------------------------------


def assert_refused(site: Site, service: Service, *, is_ready: bool) -> None:
    answer = site.post_notification(service, make_order("refused"))
    assert answer.status_code == 503
    assert answer.json()["code"] == "store-unavailable"
    assert int(answer.headers["retry-after"]) > 0
    checks = site.http.get(f"{service.operations_address}/readyz")
    assert (checks.status_code, checks.json()["checks"]["store"]) == (200 if is_ready else 503, False)
    if is_ready:
        assert site.validate(service, make_order("refused")).status_code == 200
    assert site.http.get(f"{service.operations_address}/livez").status_code == 200


def assert_recovered(site: Site, service: Service) -> None:
    """Check that the service recovers by itself, and that the delivery which ran during the outage happened once."""
    wait_until(lambda: site.http.get(f"{service.operations_address}/readyz").json()["checks"]["store"])
    assert site.notify(service, make_order("afterwards")) == 200
    for name in ("before", "during-outage", "afterwards"):
        assert site.wait_for_end(name)["reason"] == "delivered"
        assert site.shop.count_puts(name) == 1
    assert service.logged("store_recovered")
    assert service.is_running


def test_an_unavailable_postgresql_is_a_503_and_the_service_recovers_without_a_restart(site: Site) -> None:
    """With notifications only, such a service is not ready."""
    site.expected_errors.add("store_unavailable")
    del site.config["callbacks"]["order-rules"]
    with postgres_server() as server:
        site.config["store"]["url"] = server.fresh()
        site.shop.script("during-outage", SLOW)
        service = site.start()
        site.notify(service, make_order("before"))
        site.wait_for_end("before")
        site.notify(service, make_order("during-outage"))
        wait_until(lambda: site.shop.requests_for("during-outage"))

        server.stop()
        assert_refused(site, service, is_ready=False)

        server.start()
        assert_recovered(site, service)
        service.kill()


def test_a_full_disk_is_a_503_and_the_service_recovers_without_a_restart(site: Site) -> None:
    """A limit on the size of files acts like a full disk and needs no privileges.

    The service stays ready, because it also answers validations.
    """
    site.expected_errors.add("store_unavailable")
    site.shop.script("during-outage", SLOW)
    service = site.start()
    site.notify(service, make_order("before"))
    site.wait_for_end("before")
    site.notify(service, make_order("during-outage"))
    wait_until(lambda: site.shop.requests_for("during-outage"))
    written = Path(f"{site.folder / 'ledger.db'}-wal").stat().st_size
    assert written > service.log_path.stat().st_size
    _, hard = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)

    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (written, hard))
    assert_refused(site, service, is_ready=True)

    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert_recovered(site, service)
    assert site.shop.methods("during-outage") == ["PUT"]  # its outcome was kept until it could be stored


FLOWS: dict[Flow, tuple[str, ...]] = dict.fromkeys((one_dies, one_is_paused, one_order_is_fatal), ("postgresql",))
