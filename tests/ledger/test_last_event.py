"""After the last true event, a route has run against the order as Norce has it, whatever else arrives."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from adapter.ledger.claims import Claim
from adapter.ledger.commands import Commands, Step
from adapter.ledger.inbox import ReceivedNotification
from adapter.ledger.queries import Author, DeliveryFilter
from tests.databases import clear
from tests.ledgers import (
    DELIVERED,
    EXHAUSTED,
    HOUR,
    MOVED_ON,
    NOON,
    RELEASED,
    SKIPPED,
    Ends,
    HandClock,
    Ledger,
    in_doubt,
    receipt,
    waiting,
)

UNWANTED = "unwanted"  # a state of the order in which the conditions of the route do not hold
# `lastModified` of an event: clocks of several machines, of which each may be wrong, and what somebody made up.
moments = st.integers(NOON - 3, NOON + 3)
endings: st.SearchStrategy[Callable[[int], Ends]] = st.sampled_from(
    [
        lambda _: DELIVERED,
        lambda _: SKIPPED,
        lambda _: MOVED_ON,
        lambda _: EXHAUSTED,
        lambda _: RELEASED,
        lambda now: waiting(now + HOUR),
        lambda now: in_doubt(now + HOUR),
    ]
)
states = st.sampled_from(["a", "b", UNWANTED])
steps = st.one_of(
    # The order at Norce changes; its event is sent, and arrives later or twice.
    st.tuples(st.just("changed"), moments),
    st.tuples(st.just("became"), states),  # without `lastModified`; it may have been like this before
    st.tuples(st.just("became_at_once"), states),  # the same, within the `lastModified` of the last change
    st.tuples(st.just("became_unread"), states),  # beyond the limits of the order: its body is not read
    st.tuples(st.just("arrived"), st.integers(0, 9)),
    st.tuples(st.just("forged"), st.tuples(st.none() | moments, st.integers(0, 2), st.booleans())),
    st.tuples(st.just("began"), st.none()),
    st.tuples(st.just("ended"), endings),
    st.tuples(st.just("waited"), st.sampled_from([1, HOUR])),
    st.tuples(st.just("resent"), st.booleans()),
)


@dataclass
class World:
    """One order at Norce, its events on their way, and the attempts of a route that reads the order again."""

    ledger: Ledger
    versions: int = 0
    modified: int = NOON
    order: dict[str, Any] = field(default_factory=dict)
    events: list[ReceivedNotification] = field(default_factory=list)
    on_their_way: list[ReceivedNotification] = field(default_factory=list)
    running: list[tuple[Claim, dict[str, Any]]] = field(default_factory=list)  # with the order that each has read
    last_read: dict[str, Any] = field(default_factory=dict)

    def receive(self, notification: ReceivedNotification) -> None:
        self.ledger.receive(notification)

    def event(self, moment: int | None, content: dict[str, Any], *, wanted: bool = True) -> ReceivedNotification:
        body = json.dumps({"id": "order-1", **content}).encode()
        return receipt(
            identity=b"order-1" + (body if moment is None else str(moment).encode()),
            snapshot=moment,
            body=body,
            wanted=[(self.ledger.export, True)] if wanted else [],
            refetching=[self.ledger.export],
        )

    def send(self, moment: int | None, **content: Any) -> None:
        self.order = content
        self.events.append(self.event(moment, content, wanted=self.is_wanted(content)))
        self.on_their_way.append(self.events[-1])

    def is_wanted(self, content: dict[str, Any]) -> bool:
        return content.get("state") != UNWANTED

    def changed(self, moment: int) -> None:
        self.versions += 1
        self.modified = moment
        self.send(moment, version=self.versions)

    def became(self, state: str) -> None:
        self.versions += 1
        self.send(None, state=state)

    def became_unread(self, state: str) -> None:
        self.became(state)
        unread = receipt(identity=b"order-1/unread", snapshot=None, wanted=[(self.ledger.export, True)])
        self.events[-1] = self.on_their_way[-1] = replace(unread, body=None)

    def became_at_once(self, state: str) -> None:
        self.send(self.modified, version=self.versions, state=state)

    def arrived(self, number: int) -> None:
        """Receive an event that is on its way, or one that came before."""
        if self.on_their_way:
            self.receive(self.on_their_way.pop(number % len(self.on_their_way)))
        elif self.events:
            self.receive(self.events[number % len(self.events)])

    def forged(self, it: tuple[int | None, int, bool]) -> None:
        moment, content, matches = it
        self.receive(self.event(moment, {"forged": content}, wanted=matches))

    def began(self, _: None) -> None:
        self.running += [(claim, self.order) for claim in self.ledger.claim()]
        assert len(self.running) <= 1

    def ended(self, ending: Callable[[int], Ends]) -> None:
        if self.running:
            claim, order = self.running.pop()
            ends = ending(self.ledger.clock.now)
            if ends is not RELEASED and not self.is_wanted(order):
                ends = MOVED_ON
            assert self.ledger.settle(claim, ends)
            if ends is not RELEASED:
                self.last_read = order

    def waited(self, time: int) -> None:
        self.ledger.clock.now += time

    def resent(self, newest: bool) -> None:
        """Deliver the newest, or some that have ended, again."""
        commands = Commands(self.ledger.store, refetching=["export"])
        some = "SELECT id FROM deliveries WHERE again_of IS NULL ORDER BY id LIMIT 3"
        ids = () if newest else tuple(row[0] for row in self.ledger.rows(some))
        by = Author(who="a person", why="to see")
        first = self.ledger.do(commands.resend(Step(matching=DeliveryFilter(ids=ids), by=by)))
        self.ledger.do(commands.resend(Step(matching=DeliveryFilter(), by=by, action=first.action)))

    def finish(self) -> None:
        """Let everything arrive and every attempt succeed."""
        while self.on_their_way:
            self.arrived(0)
        self.ended(lambda _: DELIVERED)
        for _ in range(10 + len(self.ledger.rows("SELECT id FROM deliveries WHERE state = 'waiting'"))):
            self.waited(2 * HOUR)
            self.began(None)
            self.ended(lambda _: DELIVERED)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_after_the_last_true_event_the_route_has_run_against_the_order_as_norce_has_it(
    kind: str, request: pytest.FixtureRequest
) -> None:
    def fresh() -> str:
        if kind == "sqlite":
            return str(request.getfixturevalue("files").fresh())
        url: str = request.getfixturevalue("postgres_url")
        clear(url)
        return url

    @settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
    @given(happened=st.lists(steps, max_size=30))
    def holds(happened: list[tuple[str, Any]]) -> None:
        with asyncio.Runner() as loop:
            ledger = Ledger(fresh(), HandClock(), loop, migrated=True)
            try:
                world = World(ledger)
                for name, value in happened:
                    getattr(world, name)(value)
                world.finish()

                assert world.last_read == world.order or not world.is_wanted(world.order)
                assert ledger.rows("SELECT count(*) FROM deliveries WHERE state = 'waiting'") == [(0,)]
            finally:
                ledger.store.close()

    holds()
