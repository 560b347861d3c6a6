"""
The ledger beside a model of it that a reader can hold in the head: whatever happens in whatever order, nothing that was
acknowledged is lost, and nothing is in two hands.

The model knows nothing of tables. It says what is due from the facts about a lane, so that work which the ledger would
forget (a lane that is never due again) shows at the next claim.
"""

import asyncio
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from adapter.deliveries import Attempt, Ending, Handling, Reason, Result, Settlement, State, settle
from adapter.ledger.desk import Desk
from adapter.ledger.inbox import Inbox, Receipt, Received, Wanted
from adapter.ledger.lanes import Ask, Claim, Lanes, QueueKey, Record
from adapter.ledger.store import Store
from adapter.plugin import Done, Misconfigured, Reject, Retry, Skip, Unknown

NOON = 1_770_120_000_000
HOUR = 3_600_000
DOUBT = 60_000
SCHEDULE = (timedelta(seconds=5), timedelta(minutes=5))
HANDLING = {
    "looks up": Handling(looks_up=True, repeatable=False),
    "repeatable": Handling(looks_up=False, repeatable=True),
    "neither": Handling(looks_up=False, repeatable=False),
}
RESULTS: dict[str, Result] = {
    "done": Done(),
    "skip": Skip("nothing-changed"),
    "retry": Retry("busy"),
    "retry much later": Retry("busy", after=timedelta(hours=2)),
    "reject": Reject("no-such-shop"),
    "unknown": Unknown("no-answer"),
    "misconfigured": Misconfigured("unauthorized"),
    "not there": Ending.NOT_THERE,
    "moved on": Ending.MOVED_ON,
    "condition": Ending.CONDITION,
    "released": Ending.RELEASED,
}
ROUTES = {"export": True, "history": False}  # and whether they re-read the order
REPLAYABLE = (Reason.REJECTED, Reason.EXHAUSTED)


@dataclass
class Owed:
    """A delivery as the model sees it."""

    number: int
    snapshot: int
    state: State = State.WAITING
    reason: Reason | None = None
    attempts: int = 0
    replayed_at: int = -HOUR * 1000


@dataclass
class Line:
    """One order on one route."""

    refetch: bool
    owed: list[Owed] = field(default_factory=list)
    newest: int = -1
    current: Owed | None = None  # attempted, and not passed
    due_at: int = 0  # of `current`
    held: int | None = None
    claims: int = 0
    settled: int = 0

    def waiting(self) -> list[Owed]:
        return sorted((o for o in self.owed if o.state is State.WAITING), key=lambda o: (o.snapshot, o.number))

    def due(self, now: int) -> Owed | None:
        """What would be tried now."""
        if self.held is not None:
            return None
        if self.current is not None:
            return self.current if self.current.state is State.WAITING and self.due_at <= now else None
        return next(iter(self.waiting()), None)


@dataclass
class Event:
    """Something that Norce told us: which event, and the bodies under its identity that we acknowledged."""

    order_id: str
    snapshot: int
    identity: bytes
    body: bytes
    bodies: set[bytes] = field(default_factory=set)
    owed: list[tuple[Line, Owed]] = field(default_factory=list)


@dataclass
class Held:
    line: Line
    owed: Owed
    claim: Claim


def migrated(directory: Path) -> Path:
    """An empty database, made once: the migrations are not what is tried here."""
    path = directory / "empty.db"
    if not path.exists():
        Store.open(f"sqlite:///{path}").close()
    return path


class LedgerMachine(RuleBasedStateMachine):
    events = Bundle("events")
    hands = Bundle("hands")  # claims of this process and of dead ones
    templates: Path

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        shutil.copyfile(migrated(self.templates), self.directory / "adapter.db")
        self.now = NOON
        self.lines: dict[tuple[str, str], Line] = {}
        self.known: list[Event] = []
        self.conflicts = 0
        self.deliveries = 0
        self.paused: set[str] = set()
        self.handling = HANDLING["looks up"]
        self.enter()

    def enter(self) -> None:
        self.store = Store.open(f"sqlite:///{self.directory}/adapter.db", clock=lambda _last: lambda: self.now)
        self.inbox, self.lanes = Inbox(self.store), Lanes(self.store)
        keys = {route: QueueKey(route=route, merchant="m", channel="1") for route in ROUTES}
        queues = self.loop.run(self.lanes.enter(list(keys.values()), version="test"))
        self.queues = {route: queues[key] for route, key in keys.items()}

    def teardown(self) -> None:
        self.store.close()
        self.loop.close()
        shutil.rmtree(self.directory)

    @initialize(handling=st.sampled_from(sorted(HANDLING)))
    def choose(self, handling: str) -> None:
        self.handling = HANDLING[handling]

    # --- what happens ---

    @rule(target=events, order=st.sampled_from("AAB"), snapshot=st.integers(0, 5), value=st.integers(0, 1))
    def notified(self, order: str, snapshot: int, value: int) -> Any:
        """An event, newer or older than what has been seen; perhaps one that was there before."""
        identity = f"{order}/{snapshot}/{value}".encode()
        if any(event.identity == identity for event in self.known):
            return multiple()
        body = json.dumps({"id": order, "at": snapshot, "value": value}).encode()
        event = Event(order, snapshot, identity, body, {body})
        assert self.receive(event, body) is Received.NEW
        self.known.append(event)
        for route, refetch in ROUTES.items():
            line = self.lines.setdefault((order, route), Line(refetch))
            self.deliveries += 1
            owed = Owed(self.deliveries, snapshot)
            if snapshot >= line.newest:
                line.newest = snapshot
                for older in line.waiting() if refetch else ():
                    if older is not line.current:
                        older.state, older.reason = State.DONE, Reason.SUPERSEDED
            elif refetch:
                owed.state, owed.reason = State.DONE, Reason.SUPERSEDED
            line.owed.append(owed)
            event.owed.append((line, owed))
        return event

    @rule(event=events, in_envelope=st.booleans(), by_reconciliation=st.sampled_from([False, False, False, True]))
    def repeated(self, event: Event, in_envelope: bool, by_reconciliation: bool) -> None:
        body = b'{"notification": {}, "order": %s}' % event.body if in_envelope else event.body
        replayed = [] if by_reconciliation else self.replayable(event)

        received = self.receive(event, body, source="reconciliation" if by_reconciliation else "callback")

        assert received is (Received.REPLAYED if replayed else Received.REPEAT)
        self.model_replays(replayed)

    @rule(event=events, other=st.integers(0, 2))
    def contradicted(self, event: Event, other: int) -> None:
        body = json.dumps({"id": event.order_id, "another": other}).encode()
        replayed = self.replayable(event) if body in event.bodies else []

        received = self.receive(event, body)

        if body in event.bodies:  # it is kept already; the sender may have pressed retry all the same
            assert received is (Received.REPLAYED if replayed else Received.REPEAT)
            self.model_replays(replayed)
        else:
            assert received is Received.CONFLICT
            event.bodies.add(body)
            self.conflicts += 1

    def replayable(self, event: Event) -> list[tuple[Line, Owed]]:
        return [
            (line, owed)
            for line, owed in event.owed
            if owed.state is State.DEAD and owed.reason in REPLAYABLE and owed.replayed_at <= self.now - HOUR
        ]

    def model_replays(self, replayed: list[tuple[Line, Owed]]) -> None:
        for line, owed in replayed:
            owed.state, owed.reason, owed.attempts, owed.replayed_at = State.WAITING, None, 0, self.now
            if line.current is owed:
                line.due_at = self.now

    @rule(target=hands, most=st.integers(1, 10))
    def claimed(self, most: int) -> Any:
        return multiple(*self.claim(most))

    @rule(hand=consumes(hands), result=st.sampled_from(sorted(RESULTS)))
    def settled(self, hand: Held, result: str) -> None:
        self.settle(hand, result)

    @rule(result=st.sampled_from([*sorted(RESULTS), "done", "reject"]), after=st.sampled_from([0, DOUBT, HOUR]))
    def worked(self, result: str, after: int) -> None:
        """A dispatcher's turn: all that is due is tried, and ends in the same way."""
        self.now += after
        for hand in self.claim(100):
            self.settle(hand, result)

    def claim(self, most: int) -> list[Held]:
        due = {
            key: owed
            for key, line in self.lines.items()
            if key[1] not in self.paused and (owed := line.due(self.now)) is not None
        }
        asks = [Ask(queue_id=each, most=100, doubt_ms=DOUBT) for each in self.queues.values()]

        claims = self.loop.run(self.lanes.claim(asks, most))

        route_of = {queue: route for route, queue in self.queues.items()}
        taken = []
        for claim in claims:
            key = (claim.order_id, route_of[claim.queue_id])
            line, owed = self.lines[key], due.pop(key)  # due, and handed out once
            assert claim.delivery_id == owed.number
            assert claim.in_doubt == (line.claims > line.settled)
            assert claim.doubt_ends_at == self.now + DOUBT
            line.claims += 1
            owed.attempts += 1
            assert (claim.number, claim.attempt) == (line.claims, owed.attempts)
            line.held, line.current, line.due_at = claim.number, owed, claim.doubt_ends_at
            taken.append(Held(line, owed, claim))
        assert not due or len(claims) == most, "something was due and was not handed out"
        return taken

    def settle(self, hand: Held, result: str) -> None:
        line, owed, claim = hand.line, hand.owed, hand.claim
        attempt = Attempt(
            number=claim.attempt,
            in_doubt=claim.in_doubt,
            ended_at=datetime.fromtimestamp(self.now / 1000, UTC),
            doubt_ends_at=datetime.fromtimestamp(claim.doubt_ends_at / 1000, UTC),
            handling=self.handling,
            schedule=SCHEDULE,
            jitter=0.5,
        )
        settlement = settle(RESULTS[result], attempt)
        record = Record(
            claim=claim, settlement=settlement, kind="deliver", outcome=result, reference=result, passes=line.refetch
        )

        kept = self.loop.run(self.lanes.settle(record))

        assert kept == (line.held == claim.number)
        if kept:
            self.model_settles(line, owed, claim, settlement)

    def model_settles(self, line: Line, owed: Owed, claim: Claim, settlement: Settlement) -> None:
        line.held = None
        owed.state, owed.reason = settlement.state, settlement.reason
        if settlement.known:
            line.settled = claim.number
        if not settlement.counts:
            owed.attempts -= 1
        if settlement.pauses:
            self.paused.add("export" if line.refetch else "history")
        if settlement.state is State.WAITING:
            assert settlement.due_at is not None
            line.due_at = int(settlement.due_at.timestamp() * 1000)
        elif settlement.state is State.DONE or (line.refetch and settlement.reason is not Reason.UNKNOWN):
            line.current = None

    @rule()
    def crashed(self) -> None:
        """The process dies with what it has in hand; the next one takes over, and pauses for the configuration end."""
        self.store.close()
        for line in self.lines.values():
            line.held = None
        self.paused.clear()
        self.enter()

    @rule(by=st.sampled_from([1000, DOUBT - 1, DOUBT, HOUR, 3 * HOUR]))
    def time_passed(self, by: int) -> None:
        self.now += by

    def receive(self, event: Event, body: bytes, source: str = "callback") -> Received:
        return self.loop.run(
            self.inbox.receive(
                Receipt(
                    identity=event.identity,
                    merchant="m",
                    channel="1",
                    callback="order-status",
                    order_id=event.order_id,
                    snapshot_at=event.snapshot,
                    source=source,
                    body=body,
                    wanted=tuple(Wanted(queue_id=self.queues[route], refetch=ROUTES[route]) for route in ROUTES),
                )
            )
        )

    # --- what always holds ---

    @invariant()
    def nothing_is_lost_and_every_row_is_as_the_model_says(self) -> None:
        with self.store.read_connection() as connection:
            rows = Desk(connection).deliveries(limit=10_000)
            (kept,) = connection.exec_driver_sql("SELECT count(*) FROM notifications").one()
        lane_of = {owed.number: (key, line, owed) for key, line in self.lines.items() for owed in line.owed}
        assert kept == len(self.known) + self.conflicts
        assert sorted(row["id"] for row in rows) == sorted(lane_of)
        for row in rows:
            (order_id, route), line, owed = lane_of[row["id"]]
            assert (row["order_id"], row["route"]) == (order_id, route)
            assert (State(row["state"]), row["reason"] and Reason(row["reason"])) == (owed.state, owed.reason)
            assert (row["reason"] is None) == (row["state"] == "waiting")
            assert (row["ended_at"] is None) == (row["state"] == "waiting")
            assert row["tries"] == owed.attempts
            assert row["in_doubt"] == (line.current is owed and line.claims > line.settled)

    @invariant()
    def a_route_that_refetches_has_at_most_one_more_trigger_than_it_tries(self) -> None:
        for line in self.lines.values():
            if line.refetch:
                fresh = [owed for owed in line.waiting() if owed is not line.current and owed.replayed_at < 0]
                assert len(fresh) <= 1


# Each step is a commit to disk, and a busy disk takes its time over each.
@pytest.mark.timeout(400)
def test_the_ledger_does_what_its_model_does(tmp_path: Path) -> None:
    machine = type("Machine", (LedgerMachine,), {"templates": tmp_path})

    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=30, deadline=None))
