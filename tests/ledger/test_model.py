"""The ledger beside a small model of it: nothing acknowledged is lost, and no lane has two holders.

Hypothesis runs random histories on a SQLite file, and with two processes on one PostgreSQL. In the model, a lane (one
order on one route) has `current`, the delivery that was attempted and is not finished, and `held`, its holder.

| what happens | to a lane that is idle | due, or waiting | held | stopped by a dead letter |
|---|---|---|---|---|
| a newer event | due | as before, older ones superseded | the same | the same, and the event waits |
| an event in shadow | as before | the same | the same | the same |
| an older event | superseded (`history`: due) | superseded (`history`: in its place) | the same | same |
| a claim | - | if due and its queue has room: held, attempts + 1 | - | - |
| a known outcome | - | - | done or dead: due if more waits, else idle; retry: waiting | - |
| an unknown outcome | - | - | waiting, in doubt; or stopped | - |
| a claim that is given back | - | - | due at once, attempts - 1, no new doubt | - |
| a release | - | - | as settled | - |
| its process dies | - | - | held until its lease ends and another beats; due when doubt ends | - |
| a late settlement | nothing | nothing | nothing, unless it is of this claim | nothing |
| a retry of a letter | due | in its place | not while it is attempted | due, in doubt as before |
| a discard of a letter | - | as before | not while it is attempted | due if more waits, else idle; no doubt |
| a resend | due | waits, in its place, never superseded | the same | the same; of the letter: as a discard |

Its queue (one route) runs, is paused until a moment, or tries one lane as a probe. `settlement` decides about
deliveries and queues; its functions are pure and have tests of their own.

The model knows nothing of tables. It computes what is due from the facts about a lane, so a lane that the ledger would
forget shows at the next claim.

`EXAMPLES=4000 pytest tests/ledger/test_model.py --timeout 0` runs a quarter as many histories on each database.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from adapter.identifiers import Channel
from adapter.ledger.claims import AttemptRecord, Claim, QueueKey, QueueLimits
from adapter.ledger.commands import Commands, QueueChange, Step
from adapter.ledger.databases import database_at
from adapter.ledger.inbox import RETURN_BYTES, Inbox, Received, ReceivedNotification, Wanted
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import LEASE_MS, Lease
from adapter.ledger.maintenance import faults
from adapter.ledger.queries import Author, DeliveryFilter
from adapter.ledger.settlement import (
    FOR_EVER,
    RUNNING,
    Attempt,
    Ending,
    Handling,
    PausedBy,
    PausePolicy,
    QueueState,
    Reason,
    Result,
    State,
    after_attempt,
    settle,
)
from adapter.ledger.store import Store
from adapter.orders import order_digest
from adapter.plugin import Done, Misconfigured, Reject, Retry, Skip, Unknown
from tests.databases import clear
from tests.ledgers import DOUBT, HOUR, NOON, HandClock

CONCURRENCY = 2
POLICY = PausePolicy(after_failures=2, first=timedelta(seconds=30), longest=timedelta(minutes=2))
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
    "blocked": Ending.BLOCKED,
}
ROUTES = {"export": True, "history": False}  # and whether they re-read the order
RETRYABLE = (Reason.REJECTED, Reason.EXHAUSTED)
BY = Author(who="a person", why="to see")
PERSON = replace(RUNNING, paused_until=FOR_EVER, paused_by=PausedBy.PERSON, reason=BY.why)
NODES = st.integers(0, 1)


@dataclass(eq=False)
class Owed:
    """A delivery in the model. `number` is its place in the order of arrival."""

    number: int
    snapshot: int
    identity: bytes
    state: State = State.WAITING
    reason: Reason | None = None
    attempts: int = 0
    retried_at: int = -HOUR * 1000
    again_of: int | None = None  # the id of a delivery
    command: int | None = None
    of_event: "list[tuple[Line, Owed]]" = field(default_factory=list)  # the deliveries of its notification


@dataclass(eq=False)
class Line:
    """A lane in the model."""

    order_id: str
    route: str
    owed: list[Owed] = field(default_factory=list)
    current: Owed | None = None  # attempted, and not passed
    due_at: int = 0  # of `current`
    doubt_until: int = 0  # of its last claim
    free_at: int = 0  # after a discard in doubt
    held: int | None = None  # by which process
    claims: int = 0
    settled: int = 0

    @property
    def refetch(self) -> bool:
        return ROUTES[self.route]

    @property
    def newest(self) -> Owed:
        return [owed for owed in self.owed if owed.again_of is None][-1]

    def waiting(self) -> list[Owed]:
        return sorted(
            (o for o in self.owed if o.state is State.WAITING),
            key=lambda o: (0 if self.refetch else o.snapshot, o.number),
        )

    def still_tries(self, owed: Owed) -> bool:
        """Return whether the delivery is settled while its handler still runs."""
        return self.held is not None and self.current is owed

    def next(self) -> tuple[int, Owed] | None:
        """Return the delivery to attempt next, and when."""
        if self.held is not None:
            return None
        if self.current is not None:
            return (self.due_at, self.current) if self.current.state is State.WAITING else None
        return next(((self.free_at, owed) for owed in self.waiting()), None)

    def after_doubt(self, now: int) -> int:
        return max(now, self.doubt_until) if self.claims > self.settled else now


@dataclass(eq=False)
class Event:
    """An event of Norce, and the events with its identity and another body."""

    order_id: str
    snapshot: int
    identity: bytes
    body: bytes
    conflicts: dict[bytes, "Event"] = field(default_factory=dict)
    owed: list[tuple[Line, Owed]] = field(default_factory=list)
    returns: list[tuple[Line, Owed]] = field(default_factory=list)  # deliveries of the order's returns to this body

    def is_of(self, owed: Owed) -> bool:
        return owed.identity.startswith(self.identity) and len(owed.identity) - len(self.identity) in (0, RETURN_BYTES)


@dataclass(eq=False)
class Resend:
    """A command that may have been interrupted, and when it was given. Without ids, it is for all lanes."""

    action: int
    at: int
    ids: tuple[int, ...]
    sends_unknown: bool


@dataclass(eq=False)
class Held:
    line: Line
    owed: Owed
    claim: Claim


class Node:
    """A process that has the ledger open."""

    def __init__(self, url: str, clock: HandClock) -> None:
        database = database_at(url)
        database.lock()
        self.store = Store(database, clock=clock)
        self.lease = Lease(self.store, version="test")
        refetching = [route for route, refetch in ROUTES.items() if refetch]
        self.inbox, self.commands = Inbox(self.store), Commands(self.store, refetching=refetching)
        self.lanes = Lanes(self.store, self.lease, policy=POLICY)


class LedgerMachine(RuleBasedStateMachine):
    events = Bundle("events")
    hands = Bundle("hands")  # claims of processes that live, and of dead ones
    kept = Bundle("kept")  # settled, and held until their handler has really ended
    fresh_url: Callable[[], str]  # an empty database
    processes: int

    def __init__(self) -> None:
        super().__init__()
        self.url = type(self).fresh_url()
        self.loop = asyncio.Runner()
        self.clock = HandClock(NOON)
        self.lines: dict[tuple[str, str], Line] = {}
        self.known: list[Event] = []
        self.conflicts = 0
        self.arrived = 0
        self.resends: list[Resend] = []
        self.queue_states = dict.fromkeys(ROUTES, RUNNING)
        self.handling = HANDLING["looks up"]
        self.leases: dict[int, int] = {}  # processes, and until when their lease lasts
        self.nodes: list[Node] = []
        for _ in range(self.processes):
            self.nodes.append(self.entered())
        self.looking = database_at(self.url).engine(read_only=True).connect()

    def entered(self) -> Node:
        node = Node(self.url, self.clock)
        self.loop.run(node.lease.enter())
        if self.processes == 1:
            self.leases.clear()
        self.model_ends_leases()
        self.leases[node.lease.process_id] = self.now + LEASE_MS
        keys = {route: QueueKey(route, Channel("m", "1")) for route in ROUTES}
        queues = self.loop.run(node.lanes.open_queues(list(keys.values())))
        self.queues = {route: queues[key] for route, key in keys.items()}
        for route, state in self.queue_states.items():
            if state.paused_by is PausedBy.MISCONFIGURED:
                self.queue_states[route] = RUNNING
        return node

    @property
    def now(self) -> int:
        return self.clock.now

    def node(self, number: int) -> Node:
        return self.nodes[number % len(self.nodes)]

    def teardown(self) -> None:
        self.looking.close()
        for node in self.nodes:
            node.store.close()
        self.loop.close()

    @initialize(handling=st.sampled_from(sorted(HANDLING)))
    def choose(self, handling: str) -> None:
        self.handling = HANDLING[handling]

    # --- events ---

    @rule(
        target=events,
        told=st.lists(
            st.tuples(st.sampled_from("AAABC"), st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=4
        ),
        node=NODES,
    )
    def notified(self, told: list[tuple[str, int, int]], node: int) -> Any:
        """Receive events in one group, newer or older than earlier ones, some of them twice."""
        events: list[Event] = []
        expected: list[Received] = []
        receipts = []
        for order, snapshot, value in told:
            identity = f"{order}/{snapshot}/{value}/".encode()
            if any(event.identity == identity for event in self.known):
                continue
            is_new = all(event.identity != identity for event in events)
            body = json.dumps({"id": order, "at": snapshot, "value": value}).encode()
            event = Event(order, snapshot, identity, body)
            receipts.append(self.receipt(event, body))
            expected.append(Received.NEW if is_new else Received.REPEAT)
            if is_new:
                events.append(event)

        async def together() -> list[Received]:
            return await asyncio.gather(*map(self.node(node).inbox.receive, receipts))

        assert self.loop.run(together()) == expected
        for event in events:
            self.known.append(event)
            for route in ROUTES:
                self.model_owes(self.lines.setdefault((event.order_id, route), Line(event.order_id, route)), event)
        return multiple(*events)

    def model_owes(self, line: Line, event: Event) -> None:
        self.arrived += 1
        owed = Owed(self.arrived, event.snapshot, event.identity)
        for older in line.waiting() if line.refetch else ():
            if older is not line.current and older.again_of is None:
                older.state, older.reason = State.DONE, Reason.SUPERSEDED
        line.owed.append(owed)
        event.owed.append((line, owed))
        owed.of_event = event.owed

    @rule(
        target=events,
        order=st.sampled_from("AAABC"),
        snapshot=st.integers(0, 5),
        value=st.integers(0, 1),
        shadow=st.sampled_from(sorted(ROUTES)),
        node=NODES,
    )
    def notified_in_shadow(self, order: str, snapshot: int, value: int, shadow: str, node: int) -> Any:
        """Receive a new event while one of the routes is a shadow: nothing else in its lane changes."""
        identity = f"{order}/{snapshot}/{value}/".encode()
        if any(event.identity == identity for event in self.known):
            return multiple()
        event = Event(order, snapshot, identity, json.dumps({"id": order, "at": snapshot, "value": value}).encode())

        received = self.loop.run(self.node(node).inbox.receive(self.receipt(event, event.body, shadow=shadow)))

        assert received is Received.NEW
        self.known.append(event)
        for route in ROUTES:
            line = self.lines.setdefault((order, route), Line(order, route))
            if route != shadow:
                self.model_owes(line, event)
                continue
            self.arrived += 1
            line.owed.append(Owed(self.arrived, snapshot, identity, State.DONE, Reason.SHADOW))
            event.owed.append((line, line.owed[-1]))
        return event

    @rule(
        event=events,
        in_envelope=st.booleans(),
        source=st.sampled_from(["callback"] * 3 + ["reconciliation"]),
        node=NODES,
    )
    def repeated(self, event: Event, in_envelope: bool, source: str, node: int) -> None:
        body = b'{"notification": {}, "order": %s}' % event.body if in_envelope else event.body
        if self.returned(event, event, body, source, node):
            return
        retried = [] if source == "reconciliation" else self.retryable(event)

        received = self.loop.run(self.node(node).inbox.receive(self.receipt(event, body, source)))

        assert received is (Received.RETRIED if retried else Received.REPEAT)
        self.model_retries(retried)

    @rule(event=events, other=st.integers(0, 2), node=NODES)
    def contradicted(self, event: Event, other: int, node: int) -> None:
        order = {"id": event.order_id, "another": other}
        body = json.dumps(order).encode()
        if body in event.conflicts and self.returned(event, event.conflicts[body], body, "callback", node):
            return
        retried = self.retryable(event.conflicts[body]) if body in event.conflicts else []

        received = self.loop.run(self.node(node).inbox.receive(self.receipt(event, body)))

        if body in event.conflicts:
            assert received is (Received.RETRIED if retried else Received.REPEAT)
            self.model_retries(retried)
            return
        assert received is Received.CONFLICT
        identity = event.identity + order_digest(order)
        conflict = event.conflicts[body] = Event(event.order_id, event.snapshot, identity, body)
        self.conflicts += 1
        for route, refetch in ROUTES.items():
            if refetch:
                self.model_owes(self.lines[event.order_id, route], conflict)

    def returned(self, event: Event, now: Event, body: bytes, source: str, node: int) -> bool:
        """Receive a repeat if it may be a return: another body of the event came last, and its delivery began."""
        lines = [line for line, owed in event.owed if line.refetch and owed.again_of is None]
        newest = [(line, line.newest) for line in lines]
        began = [
            line
            for line, owed in newest
            if (owed.state is not State.WAITING or line.current is owed)
            and owed.identity.startswith(event.identity)
            and not now.is_of(owed)
        ]
        if not began:
            return False

        received = self.loop.run(self.node(node).inbox.receive(self.receipt(event, body, source)))

        assert received is Received.NEW
        self.conflicts += 1
        with self.looking.begin():
            newest_row = self.looking.execute(text("SELECT identity FROM notifications ORDER BY id DESC LIMIT 1"))
            identity = bytes(newest_row.scalar_one())
        again = Event(event.order_id, event.snapshot, identity, body)
        for line in began:
            self.model_owes(line, again)
        assert now.is_of(line.newest)
        now.returns += again.owed
        for _, owed in again.owed:
            owed.of_event = now.returns
        return True

    def retryable(self, event: Event) -> list[tuple[Line, Owed]]:
        last = [(line, owed) for line, owed in event.returns if line.newest.identity == owed.identity]
        return [
            (line, owed)
            for line, owed in [*event.owed, *last]
            if owed.reason in RETRYABLE and owed.retried_at <= self.now - HOUR and not line.still_tries(owed)
        ]

    # --- work ---

    @rule(target=hands, most=st.integers(1, 10), node=NODES)
    def claimed(self, most: int, node: int) -> Any:
        return multiple(*self.claim(self.node(node), most))

    @rule(hand=consumes(hands), result=st.sampled_from(sorted(RESULTS)), node=NODES)
    def settled(self, hand: Held, result: str, node: int) -> None:
        self.settle(self.node(node), hand, result)

    @rule(target=kept, hand=consumes(hands), result=st.sampled_from(sorted(RESULTS)), node=NODES)
    def settled_and_kept(self, hand: Held, result: str, node: int) -> Any:
        """Settle with a known result while the handler still runs."""
        return hand if self.settle(self.node(node), hand, result, keeps=True) else multiple()

    @rule(hand=consumes(kept), node=NODES)
    def released(self, hand: Held, node: int) -> None:
        self.loop.run(self.node(node).lanes.release(hand.claim))
        if hand.line.held == hand.claim.holder and hand.line.claims == hand.claim.number:
            hand.line.held = None

    @rule(
        result=st.sampled_from([*sorted(RESULTS), "done", "reject"]),
        after=st.sampled_from([0, DOUBT, HOUR]),
        node=NODES,
    )
    def worked(self, result: str, after: int, node: int) -> None:
        """Attempt everything that is due, all with the same result."""
        self.clock.now += after
        self.beaten(node)
        for hand in self.claim(self.node(node), 100):
            self.settle(self.node(node), hand, result)

    @rule(most=st.integers(1, 3), node=NODES)
    def claimed_without_an_answer(self, most: int, node: int) -> None:
        """Give back the claims that are not in hand, as after a connection that broke at the commit."""
        it = self.node(node)
        before = [line for line in self.lines.values() if line.held == it.lease.process_id]
        hands = self.claim(it, most)
        held = [(self.ids[line.order_id, line.route], line.claims) for line in before]

        assert self.loop.run(it.lanes.give_back(held)) == len(hands)

        for hand in hands:
            line = hand.line
            line.held, line.due_at = None, self.now
            hand.owed.attempts -= 1
            if line.settled == line.claims - 1:
                line.settled = line.claims

    def claim(self, node: Node, most: int) -> list[Held]:
        room = self.model_room()
        due: dict[tuple[str, str], Owed] = {
            key: coming[1]
            for key, line in self.lines.items()
            if room[line.route] and (coming := line.next()) is not None and coming[0] <= self.now
        }
        expected = sum(min(room[route], count) for route, count in Counter(route for _, route in due).items())
        limits = [
            QueueLimits(queue_id=each, concurrency=CONCURRENCY, doubt_ms=DOUBT, schedule=SCHEDULE)
            for each in self.queues.values()
        ]
        hands: list[Held] = []
        taken = self.loop.run(node.lanes.claim(limits, most))
        while taken.claims or (taken.next_due_at or FOR_EVER) <= self.now:  # as a dispatcher does
            hands += [self.model_claims(node, claim, due) for claim in taken.claims]
            if len(hands) == most:
                break
            taken = self.loop.run(node.lanes.claim(limits, most - len(hands)))
        assert len(hands) == min(most, expected), "something was due and was not handed out, or too much was"
        later = self.model_next_due()
        assert len(hands) == most or later is None or (taken.next_due_at is not None and taken.next_due_at <= later)
        return hands

    def model_room(self) -> dict[str, int]:
        held = Counter(line.route for line in self.lines.values() if line.held is not None)
        return {
            route: max(state.room(CONCURRENCY, self.now) - held[route], 0) for route, state in self.queue_states.items()
        }

    def model_next_due(self) -> int | None:
        """Return when a queue will have a lane to claim, or None."""
        moments = []
        for route, state in self.queue_states.items():
            coming = [each[0] for line in self.lines.values() if line.route == route and (each := line.next())]
            if coming and state.paused_until != FOR_EVER:
                moments.append(max(min(coming), state.paused_until or 0))
        return min((moment for moment in moments if moment > self.now), default=None)

    def model_claims(self, node: Node, claim: Claim, due: dict[tuple[str, str], Owed]) -> Held:
        (route,) = (route for route, queue in self.queues.items() if queue == claim.queue_id)
        key = (claim.order_id, route)
        self.assert_probe(claim, route, due)
        line, owed = self.lines[key], due.pop(key)  # due, and handed out once
        assert claim.identity == owed.identity
        assert claim.in_doubt == (line.claims > line.settled)
        assert (claim.holder, claim.doubt_ends_at) == (node.lease.process_id, self.now + DOUBT)
        line.claims += 1
        owed.attempts += 1
        assert (claim.number, claim.attempt) == (line.claims, owed.attempts)
        line.held, line.current, line.doubt_until, line.free_at = claim.holder, owed, self.now + DOUBT, 0
        delay = SCHEDULE[min(claim.attempt, len(SCHEDULE)) - 1] // timedelta(milliseconds=1)
        line.due_at = self.now + max(DOUBT, delay)
        return Held(line, owed, claim)

    def assert_probe(self, claim: Claim, route: str, due: Mapping[tuple[str, str], Owed]) -> None:
        """Check that a probe passes over the lanes that failed, as long as another one is due."""
        state = self.queue_states[route]
        if not state.is_running() and claim.lane_id in state.failed_lanes:
            lanes = {self.ids[key] for key in due if key[1] == route}
            assert lanes <= set(state.failed_lanes)

    def settle(self, node: Node, hand: Held, result: str, *, keeps: bool = False) -> bool:
        line, claim = hand.line, hand.claim
        attempt = Attempt(
            number=claim.attempt,
            in_doubt=claim.in_doubt,
            ended_at=datetime.fromtimestamp(self.now / 1000, UTC),
            doubt_ends_at=datetime.fromtimestamp(claim.doubt_ends_at / 1000, UTC),
            handling=self.handling,
            schedule=SCHEDULE,
            jitter=0.5,
        )
        record = AttemptRecord(
            claim=claim, result=RESULTS[result], kind="deliver", handling=self.handling, schedule=SCHEDULE, jitter=0.5,
            refetch=line.refetch, keeps_lane=keeps,
        )  # fmt: skip

        settlement = self.loop.run(node.lanes.settle(record))

        is_held = line.held == claim.holder and line.claims == claim.number
        assert (settlement is not None) == is_held
        if is_held:
            was = self.queue_states[line.route]
            self.queue_states[line.route] = after_attempt(
                was, record.result, claim.lane_id, self.now, POLICY, is_retry=claim.attempt > 1
            )
            expected = settle(record.result, replace(attempt, paused=was.is_paused_by_others(claim.lane_id)))
            assert settlement == expected
            self.model_settles(hand, expected, keeps=keeps)
            assert self.loop.run(node.lanes.settle(record)) is not None  # once more: it stands there
        return is_held

    def model_settles(self, hand: Held, settlement: Any, *, keeps: bool) -> None:
        line, owed = hand.line, hand.owed
        line.held = hand.claim.holder if keeps else None
        owed.state, owed.reason = settlement.state, settlement.reason
        if settlement.known:
            line.settled = hand.claim.number
        if not settlement.counts:
            owed.attempts -= 1
        if settlement.state is State.WAITING:
            assert settlement.due_at is not None
            line.due_at = int(settlement.due_at.timestamp() * 1000)
        elif settlement.state is State.DONE or (line.refetch and settlement.reason is not Reason.UNKNOWN):
            line.current = None

    # --- processes ---

    @rule(node=NODES)
    def crashed(self, node: int) -> None:
        """Kill a process with its claims, and start another."""
        number = node % len(self.nodes)
        self.nodes[number].store.close()
        self.nodes[number] = self.entered()

    @rule(node=NODES)
    def beaten(self, node: int) -> None:
        """Renew the lease of a process, which frees the lanes of expired ones."""
        it = self.node(node)
        process_id = it.lease.process_id

        renewed = self.loop.run(it.lease.renew())

        assert renewed == (process_id in self.leases)
        if renewed:
            self.leases[process_id] = self.now + LEASE_MS
        self.model_ends_leases()
        if not renewed:
            self.loop.run(it.lease.enter())
            self.leases[it.lease.process_id] = self.now + LEASE_MS

    def model_ends_leases(self) -> None:
        self.leases = {process: until for process, until in self.leases.items() if until >= self.now}
        for line in self.lines.values():
            if line.held not in self.leases:
                line.held = None

    @rule(by=st.sampled_from([1000, LEASE_MS, LEASE_MS + 1, DOUBT - 1, DOUBT, HOUR, 3 * HOUR]))
    def time_passed(self, by: int) -> None:
        self.clock.now += by

    # --- people ---

    @rule(route=st.sampled_from(sorted(ROUTES)), resumes=st.booleans(), node=NODES)
    def paused_or_resumed(self, route: str, resumes: bool, node: int) -> None:
        commands = self.node(node).commands
        change = QueueChange(route=route, by=BY)

        assert self.loop.run(commands.resume(change) if resumes else commands.pause(change)) == 1

        was = self.queue_states[route]
        self.queue_states[route] = RUNNING if resumes else replace(PERSON, **kept_of(was))

    @precondition(lambda self: any(owed.state is State.DEAD for line in self.lines.values() for owed in line.owed))
    @rule(unknown=st.sampled_from(["leave", "look-up", "send"]), node=NODES)
    def retried(self, unknown: Literal["leave", "look-up", "send"], node: int) -> None:
        meant = [(line, owed) for line, owed in self.dead() if unknown != "leave" or owed.reason is not Reason.UNKNOWN]

        step = Step(matching=DeliveryFilter(ended_before=self.clock.now + 1), by=BY, unknown=unknown)
        assert self.loop.run(self.node(node).commands.retry(step)).changed == len(meant)

        self.model_retries(meant, ends_doubt=unknown == "send")

    @precondition(lambda self: any(owed.state is State.DEAD for line in self.lines.values() for owed in line.owed))
    @rule(node=NODES)
    def discarded(self, node: int) -> None:
        meant = self.dead()

        assert self.loop.run(self.node(node).commands.discard(Step(matching=DeliveryFilter(), by=BY))).changed == len(
            meant
        )

        for line, owed in meant:
            owed.state, owed.reason = State.DONE, Reason.DISCARDED
            if line.current is owed:
                line.free_at = line.after_doubt(self.now)
                line.current, line.settled = None, line.claims

    @precondition(lambda self: self.lines)
    @rule(
        by_ids=st.lists(st.integers(0, 50), max_size=3),
        unknown=st.sampled_from(["leave", "send"]),
        steps=st.integers(0, 2),
        node=NODES,
    )
    def resent(self, by_ids: list[int], unknown: Literal["leave", "send"], steps: int, node: int) -> None:
        """Deliver again, and be interrupted after some steps of one delivery each."""
        ids = tuple(dict.fromkeys(by_ids))
        matching = DeliveryFilter(ids=ids, ended_before=None if ids else self.now + 1)
        step = Step(matching=matching, by=BY, unknown=unknown, most=1)

        result = self.loop.run(self.node(node).commands.resend(step))

        assert (result.changed, result.after) == (0, 0)
        given = Resend(result.action, self.now, ids, unknown == "send")
        self.resends.append(given)
        for _ in range(steps):
            if result.after is not None:
                step = Step(matching=DeliveryFilter(), by=BY, most=1, after=result.after, action=given.action)
                expected = [each for each in self.to_resend(given) if each[0] > step.after][:1]
                result = self.loop.run(self.node(node).commands.resend(step))
                assert result.changed == self.model_resends(given, expected)

    @precondition(lambda self: self.resends)
    @rule(which=st.integers(0, 9), node=NODES)
    def resumed(self, which: int, node: int) -> None:
        """Resume a command that was interrupted, or that had ended. Once more changes nothing."""
        given = self.resends[which % len(self.resends)]
        step = Step(matching=DeliveryFilter(), by=BY, action=given.action)
        expected = self.to_resend(given)
        commands = self.node(node).commands

        assert self.loop.run(commands.resend(step)).changed == self.model_resends(given, expected)
        assert self.loop.run(commands.resend(step)).changed == 0

    def to_resend(self, given: Resend) -> list[tuple[int, Line, Owed]]:
        """Return the deliveries that a command selects now, with their ids."""
        asked = EVERYTHING.replace("SELECT", "SELECT d.id AS delivery_id,", 1)
        with self.looking.begin():
            rows = {key_of(row): row for row in self.looking.execute(text(asked))}
        selected = []
        for line in self.lines.values():
            ended: list[tuple[int, Line, Owed]] = []
            for owed in line.owed:
                row = rows[owed.identity, line.route, owed.again_of, owed.command]
                if given.ids:
                    made = any(each.again_of == row.delivery_id for each in line.owed if each.command == given.action)
                    if row.delivery_id in given.ids and not made:
                        selected.append((row.delivery_id, line, owed))
                elif (owed.state is State.DEAD or owed.reason is Reason.DELIVERED) and row.ended_at <= given.at:
                    ended.append((row.delivery_id, line, owed))
            if ended and all(owed.command != given.action for owed in line.owed):
                selected.append(max(ended, key=lambda each: (0 if line.refetch else each[2].snapshot, each[2].number)))
        return sorted(selected, key=lambda each: each[0])

    def model_resends(self, given: Resend, selected: list[tuple[int, Line, Owed]]) -> int:
        sent = 0
        for delivery_id, line, owed in selected:
            is_left = owed.reason is Reason.UNKNOWN and not given.sends_unknown
            if owed.state is State.WAITING or line.still_tries(owed) or is_left:
                continue
            sent += 1
            self.arrived += 1
            again = Owed(self.arrived, owed.snapshot, owed.identity, again_of=delivery_id, command=given.action)
            again.of_event = owed.of_event
            line.owed.append(again)
            owed.of_event.append((line, again))
            if owed.state is State.DEAD:
                owed.state, owed.reason = State.DONE, Reason.DISCARDED
                if line.current is owed:
                    line.free_at = line.after_doubt(self.now)
                    line.current, line.settled = None, line.claims
        return sent

    def dead(self) -> list[tuple[Line, Owed]]:
        return [
            (line, owed)
            for line in self.lines.values()
            for owed in line.owed
            if owed.state is State.DEAD and not line.still_tries(owed)
        ]

    def model_retries(self, letters: list[tuple[Line, Owed]], *, ends_doubt: bool = False) -> None:
        for line, owed in letters:
            owed.state, owed.reason, owed.attempts, owed.retried_at = State.WAITING, None, 0, self.now
            if line.current is owed:
                line.due_at = self.now if ends_doubt else line.after_doubt(self.now)
                if ends_doubt:
                    line.settled = line.claims

    def receipt(
        self, event: Event, body: bytes, source: str = "callback", shadow: str | None = None
    ) -> ReceivedNotification:
        return ReceivedNotification(
            identity=event.identity,
            channel=Channel("m", "1"),
            callback="order-status",
            order_id=event.order_id,
            snapshot_at=event.snapshot,
            source=source,
            body=body,
            wanted=tuple(
                Wanted(queue_id=self.queues[route], refetch=ROUTES[route], shadow=route == shadow) for route in ROUTES
            ),
            wanted_in_conflict=tuple(
                Wanted(queue_id=self.queues[route], refetch=True) for route, refetch in ROUTES.items() if refetch
            ),
        )

    # --- what always holds ---

    @property
    def ids(self) -> dict[tuple[str, str], int]:
        asked = "SELECT l.id, order_id, route FROM lanes l JOIN queues q ON q.id = queue_id"
        with self.looking.begin():
            return {(row.order_id, row.route): row.id for row in self.looking.execute(text(asked))}

    @invariant()
    def nothing_is_lost_and_every_row_is_as_the_model_says(self) -> None:
        with self.looking.begin():
            rows = self.looking.execute(text(EVERYTHING)).all()
            stored = self.looking.execute(text("SELECT count(*) FROM notifications")).scalar_one()
            queues = {row.route: row for row in self.looking.execute(text("SELECT * FROM queues"))}
            wrong = [each for each in faults(self.looking) if "unknown process" not in each]
        assert wrong == []
        assert stored == len(self.known) + self.conflicts
        owed_of = {
            (owed.identity, line.route, owed.again_of, owed.command): (line, owed)
            for line in self.lines.values()
            for owed in line.owed
        }
        assert Counter(map(key_of, rows)) == Counter(owed_of.keys())
        for row in rows:
            line, owed = owed_of[key_of(row)]
            assert (State(row.state), row.reason and Reason(row.reason)) == (owed.state, owed.reason)
            assert (row.reason is None) == (row.ended_at is None) == (row.state == "waiting")
            assert row.attempts == owed.attempts
            assert (row.claim, row.settled) == (line.claims, line.settled)
            assert bool(row.is_current) == (line.current is owed)
            assert row.holder == line.held
            if line.held is None and line.current is owed:
                assert row.next_at == (line.due_at if owed.state is State.WAITING else None)
        for route, state in self.queue_states.items():
            assert queues[route].paused_until == state.paused_until
            assert queues[route].paused_by == (state.paused_by and state.paused_by.value)
            assert json.loads(queues[route].failed_lanes or "[]") == list(state.failed_lanes)

    @invariant()
    def a_lane_that_nobody_holds_stops_only_for_a_dead_letter(self) -> None:
        for line in self.lines.values():
            assert line.held is not None or line.current is None or line.current.state is not State.DONE

    @invariant()
    def a_route_that_refetches_has_at_most_one_more_trigger_than_it_tries(self) -> None:
        for line in self.lines.values():
            if line.refetch:
                waiting = [owed for owed in line.waiting() if owed.again_of is None]
                fresh = [owed for owed in waiting if owed is not line.current and owed.retried_at < 0]
                assert len(fresh) <= 1


EVERYTHING = """
SELECT n.identity, q.route, d.again_of, d.command, d.state, d.reason, d.ended_at, d.attempts, l.claim, l.settled,
       l.holder, l.next_at,       coalesce(l.current_delivery_id = d.id, false) AS is_current
FROM deliveries d JOIN notifications n ON n.id = d.notification_id JOIN lanes l ON l.id = d.lane_id
JOIN queues q ON q.id = l.queue_id
"""


def key_of(row: Any) -> tuple[bytes, str, int | None, int | None]:
    """Return what identifies a delivery in the model."""
    return bytes(row.identity), row.route, row.again_of, row.command


def kept_of(state: QueueState) -> dict[str, Any]:
    return {"failed_lanes": state.failed_lanes, "pauses_in_row": state.pauses_in_row}


# Each step is a commit to disk, and a busy disk takes its time over each.
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_ledger_behaves_like_its_model(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "sqlite":
        fresh = request.getfixturevalue("files").fresh
        processes = 1
    else:
        url = request.getfixturevalue("postgres_url")
        processes = 2

        def fresh() -> str:
            clear(url)
            return url

    machine = type("Machine", (LedgerMachine,), {"fresh_url": staticmethod(fresh), "processes": processes})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=settings.default.max_examples // 4,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
