"""
Nobody knows whether the destination has acted: it is asked, not before the first request has had its time, and the
order is there exactly once.

Each story waits for doubts to end, on PostgreSQL for leases as well, so all of them are told at the same time.
"""

import random
import threading
import time
from dataclasses import dataclass

import httpx
import pytest

from adapter.sandbox.jetshop_stand_in import DROPPED_AFTER, DROPPED_BEFORE, Fault
from tests.databases import KINDS
from tests.flows.stage import Everywhere, Service, Stage, Story, Told, order, until

pytestmark = pytest.mark.timeout(300)  # of leases and doubts, on a busy machine

ACTS_AND_THEN_IS_SILENT = Fault(acts=True, delay_seconds=60)
NEVER_ACTS = Fault(delay_seconds=60, drop=True)


# --- again and again ------------------------------------------------------------------------------------------------

KILLS = 10
SEED = 20260203
FAULTS = {3: ACTS_AND_THEN_IS_SILENT, 7: DROPPED_AFTER, 11: DROPPED_BEFORE, 13: Fault(acts=True, delay_seconds=0.2)}


@dataclass
class Shoppers:
    """Orders without end, sent by a thread to whichever process is there. Nothing is sent twice."""

    stage: Stage
    service: Service | None = None
    sent: int = 0

    def __post_init__(self) -> None:
        self.acknowledged: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._shop)
        self._thread.start()

    def go_home(self) -> None:
        self._over.set()
        self._thread.join()

    def _shop(self) -> None:
        while not self._over.wait(0.005):
            service = self.service
            if service is None:
                continue
            name = f"order-{self.sent}"
            fault = next((fault for every, fault in FAULTS.items() if self.sent % every == every - 1), None)
            if fault is not None:
                self.stage.shop.script(name, fault)
            self.sent += 1
            try:
                if self.stage.notify(service, order(name)) == 200:
                    self.acknowledged.append(name)
            except httpx.TransportError:
                pass  # killed meanwhile: whether it was stored is anybody's guess


@pytest.mark.usefixtures("told_everywhere")  # they go on meanwhile
def test_nothing_acknowledged_is_lost_or_done_twice_however_often_the_process_is_killed(stage: Stage) -> None:
    """As it is shipped, on SQLite; `tests/crash` does it on both stores, and thousands of times."""
    moments = random.Random(SEED)
    stage.config["norce"]["timeout"] = "500ms"
    stage.config["routes"]["export-payment"] |= {"timeout": "500ms", "concurrency": 32}
    shoppers = Shoppers(stage)
    try:
        for _ in range(KILLS):
            service = stage.launch()
            if moments.random() < 0.2:  # while it starts
                age = moments.uniform(0.1, 0.7)
                until(lambda service=service, age=age: time.monotonic() - service.started_at > age)
            else:
                shoppers.service = service.serving()
                enough = len(shoppers.acknowledged) + moments.randint(1, 25)
                until(lambda enough=enough: len(shoppers.acknowledged) >= enough)
            service.kill()
            shoppers.service = None
    finally:
        shoppers.go_home()

    stage.shop.behaves()
    stage.start()
    until(lambda: not stage.deliveries(state="waiting"), within=40)

    acknowledged, stored = set(shoppers.acknowledged), {each["order_id"]: each for each in stage.deliveries()}
    assert len(acknowledged) >= KILLS
    assert acknowledged <= stored.keys()
    assert {each["reason"] for each in stored.values()} == {"delivered"}
    assert len(stored) == len(stage.deliveries())
    effects = {name: stage.shop.taken(name) for name in (f"order-{number}" for number in range(shoppers.sent))}
    assert {name: times for name, times in effects.items() if times != (name in stored)} == {}


# --- killed once ----------------------------------------------------------------------------------------------------

LONG_SECONDS = 3.0  # the route's timeout and Norce's: long enough for all four to be in the air when the kill comes
NAMES = ("acted", "never-reached", "being-read", "not-looked-at")


def killed(stage: Stage) -> None:
    """
    Four orders were answered 200, and the process was killed: one export had taken place and was not answered yet, one
    had not reached the destination, one order was being re-read, and one had not been looked at.
    """
    stage.config["routes"]["export-payment"] |= {"concurrency": 3, "timeout": "3s"}
    stage.config["norce"]["timeout"] = "3s"
    stage.shop.script("acted", ACTS_AND_THEN_IS_SILENT)
    stage.shop.script("never-reached", NEVER_ACTS)
    stage.norce.held.add("being-read")
    first = stage.start()
    assert [stage.notify(first, order(name)) for name in NAMES] == [200] * 4
    until(lambda: stage.shop.met("acted") and stage.shop.met("never-reached") and "being-read" in stage.norce.reads)
    first.kill()
    assert not first.said("delivery_done")
    stage.norce.held.clear()
    stage.start()
    for name in NAMES:
        stage.ended(name)


def test_an_export_that_had_taken_place_is_looked_up_and_not_sent_again(told: Told) -> None:
    stage = told(killed)

    assert stage.shop.methods("acted") == ["PUT", "GET"]
    assert stage.shop.taken("acted") == stage.shop.exports("acted") == 1
    assert stage.delivery("acted")["reason"] == "delivered"


def test_the_lookup_leaves_the_first_request_the_time_it_had(told: Told) -> None:
    sent, looked_up = told(killed).shop.met("acted")

    assert looked_up.at - sent.at >= LONG_SECONDS


def test_an_export_that_had_not_taken_place_is_looked_up_and_then_sent(told: Told) -> None:
    stage = told(killed)

    assert stage.shop.methods("never-reached") == ["PUT", "GET", "PUT"]
    assert stage.shop.taken("never-reached") == stage.shop.exports("never-reached") == 1
    assert [each["outcome"] for each in stage.delivery("never-reached")["attempts"]] == ["not_there", "done"]


def test_an_order_whose_handler_had_not_been_called_is_exported_once(told: Told) -> None:
    stage = told(killed)

    assert stage.shop.methods("being-read") == ["GET", "PUT"]
    assert stage.shop.taken("being-read") == 1
    assert stage.delivery("being-read")["reason"] == "delivered"


def test_an_order_that_nobody_had_looked_at_waits_for_no_doubt(told_everywhere: Everywhere) -> None:
    """On PostgreSQL it may wait for the dead node's lease: until then that node's lanes count as taken."""
    stage = told_everywhere(killed, "sqlite")

    assert stage.shop.methods("not-looked-at") == ["PUT"]
    assert stage.shop.taken("not-looked-at") == 1
    assert stage.shop.met("not-looked-at")[0].at < stage.shop.met("acted")[-1].at


# --- alive, and none the wiser --------------------------------------------------------------------------------------


def cut_off(stage: Stage) -> None:
    """The destination acts and breaks the connection in place of an answer, or answers too late."""
    stage.shop.script("cut-off", DROPPED_AFTER)
    stage.shop.script("too-late", ACTS_AND_THEN_IS_SILENT)
    service = stage.start()
    for name in ("cut-off", "too-late"):
        assert stage.notify(service, order(name)) == 200
    for name in ("cut-off", "too-late"):
        stage.ended(name)


@pytest.mark.parametrize("name", ["cut-off", "too-late"])
def test_an_export_without_an_answer_is_looked_up_and_not_sent_again(told: Told, name: str) -> None:
    stage = told(cut_off)

    delivery = stage.delivery(name)
    assert delivery["reason"] == "delivered"
    kinds = [(each["kind"], each["outcome"]) for each in delivery["attempts"] if each["outcome"] != "retry"]
    assert kinds == [("deliver", "unknown"), ("lookup", "done")]  # Norce may have been asked in vain on a busy machine
    assert stage.shop.methods(name) == ["PUT", "GET"]
    assert stage.shop.exports(name) == 1
    sent, looked_up = stage.shop.met(name)
    assert looked_up.at - sent.at >= 1.0  # the route's timeout


# --- told to stop ---------------------------------------------------------------------------------------------------


def out_of_grace(stage: Stage) -> None:
    """A delivery was cancelled by the end of the grace; the next process goes on with it."""
    calls, release = stage.folder / "calls", stage.folder / "release"
    calls.touch()
    stage.config["dispatcher"]["grace"] = "100ms"
    stage.config["routes"] = {
        "waits": {
            "callback": "order-status",
            "handler": "sample-waits",
            "timeout": "1s",
            "settings": {"calls": str(calls), "until": str(release)},
        }
    }
    first = stage.start()
    stage.notify(first, order("slow"))
    until(lambda: "deliver slow" in calls.read_text())
    assert first.stop(within=10) == 0
    delivery = stage.delivery("slow")
    assert (delivery["state"], delivery["in_doubt"], delivery["code"]) == ("waiting", True, "shutdown")
    release.touch()
    stage.start()
    stage.ended("slow")


def test_a_delivery_that_outlasted_the_grace_is_looked_up_by_the_next_process(told: Told) -> None:
    stage = told(out_of_grace)

    assert stage.delivery("slow")["reason"] == "delivered"
    calls = (stage.folder / "calls").read_text().splitlines()
    assert calls == ["deliver slow", "cancelled slow", "lookup slow", "deliver slow"]


def blocked(stage: Stage) -> None:
    """A delivery blocked its thread through the whole shutdown, and its handler can neither look up nor repeat."""
    calls = stage.folder / "calls"
    calls.touch()
    stage.config["dispatcher"]["grace"] = "100ms"
    stage.config["routes"] = {
        "sleeps": {
            "callback": "order-status",
            "handler": "sample-sleeps",
            "timeout": "1s",
            "settings": {"calls": str(calls)},
        }
    }
    first = stage.start()
    stage.notify(first, order("blocks"))
    until(lambda: "deliver blocks" in calls.read_text())
    assert first.stop(within=10) == 0
    assert stage.delivery("blocks")["in_doubt"]
    stage.start()
    stage.ended("blocks")


def test_what_nobody_can_look_up_waits_for_a_person(told: Told) -> None:
    stage = told(blocked)

    delivery = stage.delivery("blocks")
    assert (delivery["state"], delivery["reason"], delivery["code"]) == ("dead", "unknown", "in-doubt")
    assert (stage.folder / "calls").read_text().splitlines() == ["deliver blocks"]


STORIES: dict[Story, tuple[str, ...]] = {killed: KINDS, cut_off: KINDS, out_of_grace: KINDS, blocked: KINDS}
