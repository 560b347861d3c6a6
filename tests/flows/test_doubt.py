"""Deliveries in doubt: a lookup after the deadline of the first request, and exactly one order at the destination.

Each flow waits until doubt ends, and on PostgreSQL also for leases. So all of them run at the same time.
"""

import random
import threading
import time
from dataclasses import dataclass

import httpx
import pytest

from adapter.sandbox.jetshop_stand_in import DROPPED_AFTER, DROPPED_BEFORE, Fault
from tests.databases import KINDS
from tests.flows.site import Flow, RunFlow, RunFlowOn, Service, Site, make_order, wait_until

ACTS_AND_THEN_IS_SILENT = Fault(acts=True, delay_seconds=60)
NEVER_ACTS = Fault(delay_seconds=60, drop=True)


# --- many kills ------------------------------------------------------------------------------------------------

KILLS = 5
SEED = 20260203
FAULTS = {3: ACTS_AND_THEN_IS_SILENT, 7: DROPPED_AFTER, 11: DROPPED_BEFORE, 13: Fault(acts=True, delay_seconds=0.2)}


@dataclass
class Shoppers:
    """A thread that sends orders to the running process, each once."""

    site: Site
    service: Service | None = None
    sent: int = 0

    def __post_init__(self) -> None:
        self.acknowledged: list[str] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._shop)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _shop(self) -> None:
        while not self._stopped.wait(0.005):
            service = self.service
            if service is None:
                continue
            name = f"order-{self.sent}"
            fault = next((fault for every, fault in FAULTS.items() if self.sent % every == every - 1), None)
            if fault is not None:
                self.site.shop.script(name, fault)
            self.sent += 1
            try:
                if self.site.notify(service, make_order(name)) == 200:
                    self.acknowledged.append(name)
            except httpx.TransportError:
                pass  # the service was killed and may have stored the order


@pytest.mark.usefixtures("run_flow_on")  # the flows run meanwhile
def test_nothing_acknowledged_is_lost_or_done_twice_however_often_the_process_is_killed(site: Site) -> None:
    """The crash test does this thousands of times, on both stores and at named points."""
    moments = random.Random(SEED)
    site.config["norce"]["timeout"] = "5s"
    site.config["routes"]["export-payment"] |= {"timeout": "5s", "concurrency": 32}
    site.config["queues"] = {"first_pause": "200ms", "max_pause": "1s"}
    shoppers = Shoppers(site)
    try:
        for _ in range(KILLS):
            service = site.launch()
            if moments.random() < 0.2:  # while it starts
                age = moments.uniform(0.1, 0.7)
                wait_until(lambda service=service, age=age: time.monotonic() - service.started_at > age)
            else:
                shoppers.service = service.wait_until_serving()
                enough = len(shoppers.acknowledged) + moments.randint(1, 25)
                wait_until(lambda enough=enough: len(shoppers.acknowledged) >= enough)
            service.kill()
            shoppers.service = None
    finally:
        shoppers.stop()

    site.shop.forget_faults()
    site.start()
    wait_until(lambda: not site.deliveries(state="waiting"))

    acknowledged, stored = set(shoppers.acknowledged), {each["order_id"]: each for each in site.deliveries()}
    assert len(acknowledged) >= KILLS
    assert acknowledged <= stored.keys()
    assert {each["reason"] for each in stored.values()} == {"delivered"}
    assert len(stored) == len(site.deliveries())
    effects = {name: site.shop.count_puts(name) for name in (f"order-{number}" for number in range(shoppers.sent))}
    assert {name: times for name, times in effects.items() if times != (name in stored)} == {}


# --- killed once ----------------------------------------------------------------------------------------------------

LONG_SECONDS = 10.0  # the timeout of the route and of Norce: all four must have begun when the kill comes
NAMES = ("acted", "never-reached", "being-read", "untouched")


def killed(site: Site) -> None:
    """Kill the service when four orders were answered 200.

    One export has taken place and is not answered yet, one does not reach the destination, one order is being read
    again, and one is untouched.
    """
    site.config["routes"]["export-payment"] |= {"concurrency": 3, "timeout": "10s"}
    site.config["norce"]["timeout"] = "10s"
    site.shop.script("acted", ACTS_AND_THEN_IS_SILENT)
    site.shop.script("never-reached", NEVER_ACTS)
    site.norce.held.add("being-read")
    first = site.start()
    assert [site.notify(first, make_order(name)) for name in NAMES] == [200] * 4
    wait_until(
        lambda: (
            site.shop.requests_for("acted")
            and site.shop.requests_for("never-reached")
            and "being-read" in site.norce.reads
        )
    )
    first.kill()
    assert not first.logged("delivery_done")
    site.norce.held.clear()
    site.start()
    for name in NAMES:
        site.wait_for_end(name)


def test_after_a_kill_an_export_that_took_place_is_looked_up_and_not_sent_again(run_flow: RunFlow) -> None:
    site = run_flow(killed)

    assert site.shop.methods("acted") == ["PUT", "GET"]
    assert site.shop.count_puts("acted") == site.shop.exports("acted") == 1
    assert site.delivery("acted")["reason"] == "delivered"


def test_the_lookup_waits_until_the_first_request_has_had_its_time(run_flow: RunFlow) -> None:
    sent, looked_up = run_flow(killed).shop.requests_for("acted")

    assert looked_up.at - sent.at >= LONG_SECONDS


def test_after_a_kill_an_export_that_did_not_take_place_is_looked_up_and_then_sent(run_flow: RunFlow) -> None:
    site = run_flow(killed)

    assert site.shop.methods("never-reached") == ["PUT", "GET", "PUT"]
    assert site.shop.count_puts("never-reached") == site.shop.exports("never-reached") == 1
    assert [each["outcome"] for each in site.delivery("never-reached")["attempts"]] == ["not_there", "done"]


def test_an_order_whose_handler_was_not_called_is_exported_once(run_flow: RunFlow) -> None:
    site = run_flow(killed)

    assert site.shop.methods("being-read") == ["GET", "PUT"]
    assert site.shop.count_puts("being-read") == 1
    assert site.delivery("being-read")["reason"] == "delivered"


def test_an_untouched_order_does_not_wait_for_the_end_of_a_doubt(run_flow_on: RunFlowOn) -> None:
    """On SQLite only: on PostgreSQL the lanes of a dead node are claimed until its lease ends."""
    site = run_flow_on(killed, "sqlite")

    assert site.shop.methods("untouched") == ["PUT"]
    assert site.shop.count_puts("untouched") == 1
    assert site.shop.requests_for("untouched")[0].at < site.shop.requests_for("acted")[-1].at


# --- no answer from the destination ----------------------------------------------------------------------------------


def cut_off(site: Site) -> None:
    """Let the destination act, and break the connection or answer too late."""
    site.config["norce"]["timeout"] = site.config["routes"]["export-payment"]["timeout"] = "5s"
    site.shop.script("cut-off", DROPPED_AFTER)
    site.shop.script("too-late", ACTS_AND_THEN_IS_SILENT)
    service = site.start()
    for name in ("cut-off", "too-late"):
        assert site.notify(service, make_order(name)) == 200
    for name in ("cut-off", "too-late"):
        site.wait_for_end(name)


@pytest.mark.parametrize("name", ["cut-off", "too-late"])
def test_an_export_without_an_answer_is_looked_up_and_not_sent_again(run_flow: RunFlow, name: str) -> None:
    site = run_flow(cut_off)

    delivery = site.delivery(name)
    assert delivery["reason"] == "delivered"
    kinds = [(each["kind"], each["outcome"]) for each in delivery["attempts"]]
    assert kinds == [("deliver", "unknown"), ("lookup", "done")]
    assert site.shop.methods(name) == ["PUT", "GET"]
    assert site.shop.exports(name) == 1
    sent, looked_up = site.shop.requests_for(name)
    assert looked_up.at - sent.at >= 5.0  # the timeout of the route


# --- shutdown ---------------------------------------------------------------------------------------------------


def out_of_grace(site: Site) -> None:
    """Cancel a delivery at the end of the grace. The next process continues it."""
    calls, release = site.folder / "calls", site.folder / "release"
    calls.touch()
    site.config["dispatcher"]["grace"] = "100ms"
    site.config["norce"]["timeout"] = "5s"
    site.config["routes"] = {
        "waits": {
            "callback": "order-status",
            "handler": "sample-waits",
            "timeout": "10s",
            "settings": {"calls": str(calls), "until": str(release)},
        }
    }
    first = site.start()
    site.notify(first, make_order("slow"))
    wait_until(lambda: "deliver slow" in calls.read_text())
    assert first.stop() == 0
    delivery = site.delivery("slow")
    assert (delivery["state"], delivery["in_doubt"], delivery["code"]) == ("waiting", True, "shutdown")
    release.touch()
    site.start()
    site.wait_for_end("slow")


def test_a_delivery_that_was_cancelled_at_shutdown_is_looked_up_by_the_next_process(run_flow: RunFlow) -> None:
    site = run_flow(out_of_grace)

    assert site.delivery("slow")["reason"] == "delivered"
    calls = (site.folder / "calls").read_text().splitlines()
    assert calls == ["deliver slow", "cancelled slow", "lookup slow", "deliver slow"]


def blocked(site: Site) -> None:
    """Shut down while a delivery blocks its thread. Its handler has no lookup and is not repeatable."""
    calls = site.folder / "calls"
    calls.touch()
    site.config["dispatcher"]["grace"] = "100ms"
    site.config["norce"]["timeout"] = "5s"
    site.config["routes"] = {
        "sleeps": {
            "callback": "order-status",
            "handler": "sample-sleeps",
            "timeout": "10s",
            "settings": {"calls": str(calls)},
        }
    }
    first = site.start()
    site.notify(first, make_order("blocks"))
    wait_until(lambda: "deliver blocks" in calls.read_text())
    assert first.stop() == 0
    assert site.delivery("blocks")["in_doubt"]
    site.start()
    site.wait_for_end("blocks")


def test_a_delivery_in_doubt_without_a_lookup_waits_for_a_person(run_flow: RunFlow) -> None:
    site = run_flow(blocked)

    delivery = site.delivery("blocks")
    assert (delivery["state"], delivery["reason"], delivery["code"]) == ("dead", "unknown", "in-doubt")
    assert (site.folder / "calls").read_text().splitlines() == ["deliver blocks"]


FLOWS: dict[Flow, tuple[str, ...]] = {killed: KINDS, cut_off: KINDS, out_of_grace: KINDS, blocked: KINDS}
