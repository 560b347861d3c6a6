"""Inbox and lanes on both databases, with a clock that the test moves."""

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from adapter.ledger.claims import LONGEST_MESSAGE, Claimed, QueueLimits
from adapter.ledger.commands import Commands, Step
from adapter.ledger.inbox import UNREAD_EVERY_MS, Received, ReceivedNotification
from adapter.ledger.queries import Author, DeliveryFilter, Queries
from adapter.ledger.settlement import Ending
from adapter.offload import SMALL_BYTES
from adapter.orders import canonical
from adapter.plugin import Reject
from tests.ledgers import (
    BROKEN,
    CONDITION,
    DELIVERED,
    DOUBT,
    EXHAUSTED,
    EXPORT,
    HISTORY,
    HOUR,
    MISCONFIGURED,
    MOVED_ON,
    NOON,
    NOT_THERE,
    PAUSES,
    REJECTED,
    RELEASED,
    SKIPPED,
    UNKNOWN,
    Ends,
    Ledger,
    body_of,
    delivered,
    in_doubt,
    make_many,
    opened,
    receipt,
    waiting,
)
from tests.plans import assert_no_scan, seen

T = TypeVar("T")


# --- intake ---------------------------------------------------------------------------------------------------------


def test_a_notification_is_on_disk_with_its_deliveries_when_receive_returns(ledger: Ledger) -> None:
    received = ledger.receive(receipt(wanted=[(ledger.export, True), (ledger.history, False)]))

    assert received is Received.NEW
    assert ledger.rows("SELECT order_id, merchant, callback, body FROM notifications") == [
        ("order-1", "fjallboden", "order-status", body_of("order-1", 1))
    ]
    assert ledger.states() == [(1, "waiting", None), (1, "waiting", None)]
    assert len(ledger.rows("SELECT 1 FROM lanes")) == 2


def test_a_notification_without_a_wanting_route_is_stored(ledger: Ledger) -> None:
    ledger.receive(receipt())

    assert len(ledger.rows("SELECT 1 FROM notifications")) == 1
    assert ledger.states() == []


ORDER = {"id": "order-1", "total": 100.0, "items": [{"quantity": 2, "sku": "A"}]}
SPELLED_ANEW = b'{"items": [{"sku":"A", "quantity":2.0}], "total": 100, "id": "order-1"}'


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(json.dumps(ORDER).encode(), id="byte for byte"),
        pytest.param(SPELLED_ANEW, id="other order of members and spelling of numbers"),
        pytest.param(b'{"notification": {"id": "n-1"}, "order": ' + SPELLED_ANEW + b"}", id="in an envelope"),
    ],
)
def test_the_same_event_again_does_nothing_more(ledger: Ledger, again: bytes) -> None:
    wanted = [(ledger.export, True)]
    ledger.receive(receipt(body=json.dumps(ORDER).encode(), wanted=wanted))

    received = ledger.receive(receipt(body=again, wanted=wanted))

    assert received is Received.REPEAT
    assert len(ledger.rows("SELECT 1 FROM notifications")) == 1
    assert len(ledger.states()) == 1


def test_another_order_under_the_same_identity_starts_the_routes_that_read_the_order_again(ledger: Ledger) -> None:
    ledger.receive(receipt(body=b'{"total": 1}', wanted=[(ledger.export, True), (ledger.history, False)]))
    for queue in (ledger.export, ledger.history):
        ledger.settle(ledger.claim_one(queue))

    received = ledger.receive(receipt(body=b'{"total": 2}', refetching=[ledger.export]))

    assert received is Received.CONFLICT
    assert ledger.rows("SELECT conflicts_with, body FROM notifications ORDER BY id") == [
        (None, b'{"total": 1}'),
        (1, b'{"total": 2}'),
    ]
    assert ledger.claim(ledger.history) == []
    (first, second) = ledger.rows("SELECT identity FROM notifications ORDER BY id")
    claim = ledger.claim_one()
    assert (claim.body, claim.attempt, claim.identity) == (b'{"total": 2}', 1, bytes(second[0]))
    assert claim.identity.startswith(bytes(first[0]))  # another idempotency key, of which the digest is a part
    assert len(claim.identity) == len(first[0]) + 16


def test_any_number_of_conflicts_leaves_one_waiting_delivery(ledger: Ledger) -> None:
    ledger.receive(receipt(body=b'{"n": 0}', wanted=[(ledger.export, True)]))

    answers = [ledger.receive(receipt(body=b'{"n": %d}' % n, refetching=[ledger.export])) for n in range(1, 30)]

    assert set(answers) == {Received.CONFLICT}
    assert [state for _, state, _ in ledger.states()] == [*["done"] * 29, "waiting"]
    assert ledger.claim_one().body == b'{"n": 29}'
    assert ledger.rows("SELECT count(*), count(digest) FROM notifications") == [(30, 30)]  # digested once


def test_conflicts_in_one_group_leave_one_waiting_delivery(ledger: Ledger) -> None:
    async def together() -> list[Received]:
        conflicts = [receipt(body=b'{"n": %d}' % n, refetching=[ledger.export]) for n in (1, 2, 1)]
        return await asyncio.gather(*(ledger.inbox.receive(one) for one in [receipt(body=b'{"n": 0}'), *conflicts]))

    assert ledger.do(together()) == [Received.NEW, Received.CONFLICT, Received.CONFLICT, Received.REPEAT]
    assert [state for _, state, _ in ledger.states()] == ["done", "waiting"]


def test_a_conflict_leaves_the_attempted_delivery_alone(ledger: Ledger) -> None:
    ledger.receive(receipt(body=b'{"total": 1}', wanted=[(ledger.export, True)]))
    claim = ledger.claim_one()

    ledger.receive(receipt(body=b'{"total": 2}', refetching=[ledger.export]))

    assert ledger.settle(claim)
    assert ledger.claim_one().body == b'{"total": 2}'


def test_the_repeat_of_a_conflict_does_nothing_more(ledger: Ledger) -> None:
    for body in (b'{"total": 1}', b'{"total": 2}'):
        ledger.receive(receipt(body=body, refetching=[ledger.export]))
    ledger.settle(ledger.claim_one())

    received = ledger.receive(receipt(body=b'{"total": 2.0}', refetching=[ledger.export]))

    assert received is Received.REPEAT
    assert len(ledger.rows("SELECT 1 FROM notifications")) == 2
    assert ledger.claim() == []


def test_the_repeat_of_a_conflict_retries_its_own_dead_letter(ledger: Ledger) -> None:
    ledger.receive(receipt(body=b'{"total": 1}', wanted=[(ledger.export, True)]))
    ledger.settle(ledger.claim_one())
    ledger.receive(receipt(body=b'{"total": 2}', refetching=[ledger.export]))
    ledger.settle(ledger.claim_one(), REJECTED)

    received = ledger.receive(receipt(body=b'{"total": 2}', refetching=[ledger.export]))

    assert received is Received.RETRIED
    assert ledger.claim_one().delivery_id == 2


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b'{"total": 1.0}', True), (b'{"total": 2}', True), (b'{"total": 3}', False)],
    ids=["the first", "the conflict", "neither"],
)
def test_an_order_is_known_under_its_identity_or_as_its_conflict(ledger: Ledger, body: bytes, expected: bool) -> None:
    for stored in (b'{"total": 1}', b'{"total": 2}'):
        ledger.receive(receipt(identity=b"same", body=stored))

    assert ledger.do(ledger.inbox.has([b"other", b"same"], body)) is expected
    assert not ledger.do(ledger.inbox.has([b"other"], body))


# --- routes in shadow mode ------------------------------------------------------------------------------------------


def test_a_shadow_has_a_delivery_that_is_done_and_nothing_to_claim(ledger: Ledger) -> None:
    received = ledger.receive(receipt(shadows=[ledger.export]))

    assert received is Received.NEW
    assert ledger.states() == [(1, "done", "shadow")]
    assert ledger.rows("SELECT is_wanted, body FROM notifications") == [(True, body_of("order-1", 1))]
    assert ledger.rows("SELECT holder, next_at, current_delivery_id, previous FROM lanes") == [(None,) * 4]
    assert ledger.take(*ledger.queues.values()) == Claimed(claims=[], next_due_at=None)
    assert ledger.rows("SELECT ended_at FROM deliveries") == [(NOON,)]


def test_every_event_of_an_order_is_recorded_by_a_shadow_also_in_one_group(ledger: Ledger) -> None:
    async def together() -> None:
        await asyncio.gather(*(ledger.inbox.receive(receipt(snapshot=n, shadows=[ledger.export])) for n in (1, 2)))

    ledger.do(together())
    repeated = ledger.receive(receipt(snapshot=2, shadows=[ledger.export]))

    assert repeated is Received.REPEAT
    assert ledger.states() == [(1, "done", "shadow"), (2, "done", "shadow")]


def test_a_shadow_and_another_route_of_the_same_event_do_not_affect_each_other(ledger: Ledger) -> None:
    ledger.receive(receipt(wanted=[(ledger.history, True)], shadows=[ledger.export]))
    ledger.receive(receipt(snapshot=2, wanted=[(ledger.history, True)], shadows=[ledger.export]))

    assert ledger.rows(
        "SELECT l.queue_id, d.reason FROM deliveries d JOIN lanes l ON l.id = d.lane_id ORDER BY l.queue_id, d.id"
    ) == [
        (ledger.export, "shadow"),
        (ledger.export, "shadow"),
        (ledger.history, "superseded"),
        (ledger.history, None),
    ]
    assert [claim.queue_id for claim in ledger.claim(ledger.export, ledger.history)] == [ledger.history]


def test_a_conflict_is_recorded_by_a_shadow(ledger: Ledger) -> None:
    ledger.receive(receipt(body=b'{"total": 1}', shadows=[ledger.export]))

    received = ledger.receive(receipt(body=b'{"total": 2}', shadows=[ledger.export]))

    assert received is Received.CONFLICT
    assert ledger.states() == [(1, "done", "shadow"), (1, "done", "shadow")]
    assert ledger.claim() == []


def test_work_that_waits_when_its_route_becomes_a_shadow_stays_owed(ledger: Ledger) -> None:
    """A shadow's newer event must not supersede it: nothing would be left to send."""
    ledger.owed(1)

    ledger.receive(receipt(snapshot=2, shadows=[ledger.export]))
    assert ledger.states() == [(1, "waiting", None), (2, "done", "shadow")]
    ledger.owed(3)  # in force again

    assert ledger.states() == [(1, "done", "superseded"), (2, "done", "shadow"), (3, "waiting", None)]
    assert ledger.claim_one().body == body_of("order-1", 3)


@pytest.mark.parametrize("refetch", [True, False])
def test_a_retry_keeps_its_time_and_its_place_while_its_route_is_a_shadow(ledger: Ledger, refetch: bool) -> None:
    queue = ledger.export if refetch else ledger.history
    ledger.owed(5, refetch=refetch)
    ledger.settle(ledger.claim_one(queue), waiting(NOON + HOUR), refetch=refetch)

    ledger.receive(receipt(snapshot=4, shadows=[queue]))
    ledger.receive(receipt(snapshot=6, shadows=[queue]))

    assert ledger.claim(queue) == []
    ledger.clock.now += HOUR
    claim = ledger.claim_one(queue)
    assert (claim.body, claim.attempt) == (body_of("order-1", 5), 2)
    ledger.settle(claim, delivered("a-1"), refetch=refetch)
    assert ledger.claim(queue) == []


def test_a_lane_in_doubt_stays_in_doubt_while_its_route_is_a_shadow(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), in_doubt(NOON))

    ledger.receive(receipt(snapshot=2, shadows=[ledger.export]))

    claim = ledger.claim_one()
    assert (claim.in_doubt, claim.body) == (True, body_of("order-1", 1))


def test_a_shadow_is_no_previous_delivery_and_keeps_the_last_one(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), delivered("a-1"))
    ledger.receive(receipt(snapshot=2, shadows=[ledger.export]))
    ledger.receive(receipt("order-2", 1, shadows=[ledger.export]))

    ledger.owed(3)
    ledger.owed(3, order_id="order-2")

    first, second = sorted(ledger.claim(), key=lambda claim: claim.order_id)
    assert first.previous is not None
    assert first.previous.reference == "a-1"
    assert second.previous is None


def test_an_event_that_a_shadow_has_recorded_is_not_sent_by_a_repeat(ledger: Ledger) -> None:
    """A repeat has no effect. A person sends the order with a backfill."""
    ledger.receive(receipt(shadows=[ledger.export]))

    assert ledger.receive(receipt(wanted=[(ledger.export, True)])) is Received.REPEAT
    assert ledger.claim() == []


def test_an_order_that_returns_to_an_earlier_state_starts_the_other_route_and_not_the_shadow(ledger: Ledger) -> None:
    def arrives(identity: bytes) -> Received:
        both = receipt(snapshot=None, identity=identity, wanted=[(ledger.history, True)], shadows=[ledger.export])
        return ledger.receive(replace(both, body=b'{"is": "%s"}' % identity))

    for identity in (b"checkout", b"completed"):
        arrives(identity)
        ledger.settle(ledger.claim_one(ledger.history))

    assert arrives(b"checkout") is Received.NEW
    reasons = Counter(reason for _, _, reason in ledger.states())
    assert reasons == {"delivered": 2, "shadow": 3, None: 1}
    assert ledger.claim(ledger.export) == []


# --- digests ----------------------------------------------------------------------------------------------------------


@contextmanager
def digesting_threads() -> Iterator[list[str]]:
    """Yield the name of the thread of each digest.

    Threads are seen that start in the meantime.
    """
    threads: list[str] = []

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code is canonical.__code__:
            threads.append(threading.current_thread().name)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield threads
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize("size", [10, SMALL_BYTES], ids=["small", "large"])
def test_a_repeat_in_other_bytes_is_digested_beside_the_writer_and_once(store_url: str, size: int) -> None:
    wanted, padding = [(1, True)], " " * size
    with digesting_threads() as threads, opened(store_url) as ledger:
        ledger.receive(receipt(body=b'{"id": "order-1", "total": 1.0}' + padding.encode(), wanted=wanted))
        assert threads == []

        for space in range(1, 4):
            body = b'{"id": "order-1",' + b" " * space + b'"total": 1}' + padding.encode()
            assert ledger.receive(receipt(body=body, wanted=wanted)) is Received.REPEAT

        if size == 10:  # of the stored order, and of each of the three
            assert threads == ["MainThread"] * 4
        else:  # the thread for large bodies is seen only if it was not there before
            assert set(threads) <= {"large-bodies_0"}


def test_many_repeats_at_once_digest_the_stored_order_once(store_url: str) -> None:
    with digesting_threads() as threads, opened(store_url) as ledger:
        ledger.receive(receipt(body=b'{"total": 1.0}', identity=b"same"))

        async def together() -> list[Received]:
            repeats = [receipt(body=b'{"total": 1}' + b" " * number, identity=b"same") for number in range(5)]
            return await asyncio.gather(*map(ledger.inbox.receive, repeats))

        assert ledger.do(together()) == [Received.REPEAT] * 5
        assert len(threads) == 6


def test_a_repeat_in_equal_bytes_needs_no_digest(store_url: str) -> None:
    with digesting_threads() as threads, opened(store_url) as ledger:
        for _ in range(3):
            ledger.receive(receipt(wanted=[(ledger.export, True)]))

        assert threads == []
        assert ledger.rows("SELECT digest FROM notifications") == [(None,)]


def test_a_digest_that_the_caller_has_is_stored_and_not_computed_again(store_url: str) -> None:
    with digesting_threads() as threads, opened(store_url) as ledger:
        for body in (b'{"total": 1}', b'{"total": 1.0}'):
            ledger.receive(receipt(body=body, identity=b"same", digest=b"0123456789abcdef"))

        assert threads == []
        assert len(ledger.rows("SELECT 1 FROM notifications")) == 1


# --- notifications whose body was not read ----------------------------------------------------------------------------


def unread(*queues: int, order_id: str = "order-1") -> ReceivedNotification:
    wanted = [(queue, True) for queue in queues]
    return replace(receipt(order_id, None, wanted=wanted, identity=f"{order_id}/unread".encode()), body=None)


def test_an_unread_notification_makes_each_lane_due_once(ledger: Ledger) -> None:
    it = unread(ledger.export, ledger.other)

    assert [ledger.receive(it) for _ in range(3)] == [Received.NEW, Received.REPEAT, Received.REPEAT]

    assert ledger.claim(ledger.export, ledger.other) == []
    ledger.clock.now += UNREAD_EVERY_MS
    claims = ledger.claim(ledger.export, ledger.other)
    assert [(claim.body, claim.order_id) for claim in claims] == [(None, "order-1")] * 2


def test_an_unread_notification_during_an_attempt_starts_another_one(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()

    assert [ledger.receive(unread(ledger.export)) for _ in range(3)] == [Received.NEW, *[Received.REPEAT] * 2]

    ledger.settle(claim)
    after = ledger.claim_one()
    assert (after.body, after.identity != claim.identity) == (None, True)


def test_an_unread_notification_leaves_a_waiting_delivery_with_its_body(ledger: Ledger) -> None:
    ledger.owed(1)

    assert ledger.receive(unread(ledger.export, ledger.other)) is Received.NEW

    assert ledger.claim_one().body == body_of("order-1", 1)
    ledger.clock.now += UNREAD_EVERY_MS
    assert ledger.claim(ledger.export) == []
    assert ledger.claim_one(ledger.other).body is None


def test_a_notification_with_a_body_supersedes_a_waiting_one_without(ledger: Ledger) -> None:
    ledger.receive(unread(ledger.export))
    ledger.owed(1)
    ledger.clock.now += UNREAD_EVERY_MS

    assert ledger.claim_one().body == body_of("order-1", 1)
    assert [state for _, state, _ in ledger.states()] == ["done", "waiting"]


def test_an_unread_notification_that_no_route_wants_stores_nothing(ledger: Ledger) -> None:
    assert ledger.receive(unread()) is Received.REPEAT
    assert ledger.rows("SELECT 1 FROM notifications") == []


def test_unread_notifications_in_one_group_store_one_row_for_each_order(ledger: Ledger) -> None:
    async def together() -> list[Received]:
        those = [unread(ledger.export, order_id=f"order-{number % 2}") for number in range(6)]
        return await asyncio.gather(*(ledger.inbox.receive(each) for each in [receipt(snapshot=5), *those]))

    assert ledger.do(together()).count(Received.NEW) == 3
    assert len(ledger.rows("SELECT 1 FROM deliveries")) == 2


def test_endless_unread_notifications_store_a_row_every_ten_seconds(ledger: Ledger) -> None:
    for _ in range(200):
        ledger.receive(unread(ledger.export))
        ledger.clock.now += 1000
        for claim in ledger.claim():
            ledger.settle(claim)

    assert ledger.rows("SELECT count(*) FROM notifications") == [(20,)]


# --- an order that returns to an earlier state -----------------------------------------------------------------


def state(ledger: Ledger, name: str, moment: int | None = None, **more: Any) -> ReceivedNotification:
    """Return an event of an order in this state; without a moment, the state is its identity."""
    identity = f"order-1/{moment or name}".encode()
    wanted = [] if name == "unwanted" else [(ledger.export, True), (ledger.history, False)]
    body = json.dumps({"state": name}).encode()
    return receipt(
        identity=identity, snapshot=moment, body=body, **{"wanted": wanted, "refetching": [ledger.export], **more}
    )


MOMENTS = pytest.mark.parametrize("moment", [None, NOON], ids=["without a moment", "within one moment"])


@MOMENTS
def test_a_return_to_an_earlier_state_makes_one_delivery_wait(ledger: Ledger, moment: int | None) -> None:
    identities = []
    for name in ("a", "b", "a", "b", "a"):
        ledger.receive(state(ledger, name, moment))
        claim = ledger.claim_one()
        identities.append(claim.identity)
        ledger.settle(claim)

        assert ledger.receive(state(ledger, name, moment)) is Received.REPEAT  # it is the newest state
        assert ledger.claim() == []
    assert len(set(identities)) == 5  # each with an idempotency key of its own
    returned = ledger.rows("SELECT body, conflicts_with FROM notifications ORDER BY id LIMIT 1 OFFSET 2")
    assert returned == [(b'{"state": "a"}', None)]


@MOMENTS
def test_a_return_starts_nothing_on_a_route_with_refetch_false(ledger: Ledger, moment: int | None) -> None:
    ledger.receive(state(ledger, "a", moment))
    ledger.receive(state(ledger, "b", moment))
    while claims := ledger.claim(ledger.export, ledger.history):
        for claim in claims:
            ledger.settle(claim)

    assert ledger.receive(state(ledger, "a", moment)) is Received.NEW

    assert ledger.claim(ledger.history) == []
    assert ledger.claim_one()


@MOMENTS
def test_returns_for_ever_leave_one_waiting_delivery_and_no_row_beside_it(ledger: Ledger, moment: int | None) -> None:
    ledger.receive(state(ledger, "a", moment))
    ledger.receive(state(ledger, "b", moment))
    ledger.settle(ledger.claim_one())

    answers = [ledger.receive(state(ledger, name, moment)) for name in ("a", "b") * 10]

    assert answers == [Received.NEW, *[Received.REPEAT] * 19]
    assert len(ledger.rows("SELECT 1 FROM deliveries WHERE state = 'waiting' AND lane_id = 1")) == 1


def test_returns_in_one_group_leave_one_waiting_delivery(ledger: Ledger) -> None:
    for name in ("a", "b"):
        ledger.receive(state(ledger, name))
        ledger.settle(ledger.claim_one())

    async def together() -> list[Received]:
        return await asyncio.gather(*(ledger.inbox.receive(state(ledger, "a")) for _ in range(3)))

    assert ledger.do(together()) == [Received.NEW, Received.REPEAT, Received.REPEAT]
    assert ledger.claim_one().callback == "order-status"


def test_a_return_after_an_unwanted_state_that_the_route_has_read_is_delivered(ledger: Ledger) -> None:
    ledger.receive(state(ledger, "a"))
    ledger.settle(ledger.claim_one(), MOVED_ON)  # it read the unwanted state
    ledger.receive(state(ledger, "unwanted"))

    assert ledger.receive(state(ledger, "a")) is Received.NEW
    assert ledger.claim_one()


def test_a_repeat_during_the_attempt_makes_a_delivery_wait_behind_it(ledger: Ledger) -> None:
    """The attempt may have read another state, between the two."""
    ledger.receive(state(ledger, "a"))
    claim = ledger.claim_one()

    assert ledger.receive(state(ledger, "a")) is Received.NEW

    ledger.settle(claim, MOVED_ON)
    assert ledger.claim_one()


@pytest.mark.parametrize("ends", [DELIVERED, SKIPPED, waiting(NOON + HOUR), CONDITION, UNKNOWN])
def test_without_another_state_in_between_a_repeat_without_a_moment_does_nothing_more(
    ledger: Ledger, ends: Ends
) -> None:
    ledger.receive(state(ledger, "a"))
    ledger.settle(ledger.claim_one(), ends)

    assert ledger.receive(state(ledger, "a")) is Received.REPEAT
    assert len(ledger.rows("SELECT 1 FROM notifications")) == 1


def test_a_late_repeat_of_an_earlier_moment_does_nothing_more(ledger: Ledger) -> None:
    for moment in (NOON, NOON + 1):
        ledger.receive(state(ledger, "a", moment))
        ledger.settle(ledger.claim_one())

    assert ledger.receive(state(ledger, "a", NOON)) is Received.REPEAT
    assert ledger.claim() == []


def test_a_repeat_of_a_return_retries_its_dead_letter(ledger: Ledger) -> None:
    for name in ("a", "b"):
        ledger.receive(state(ledger, name))
        ledger.settle(ledger.claim_one())
    ledger.receive(state(ledger, "a"))
    ledger.settle(ledger.claim_one(), REJECTED)

    assert ledger.receive(state(ledger, "a")) is Received.RETRIED
    [(newest,)] = ledger.rows("SELECT max(id) FROM notifications")
    assert ledger.claim_one().notification_id == newest


def test_a_repeat_finds_the_newest_delivery_among_many_by_an_index(ledger: Ledger) -> None:
    make_many(ledger, 20_000)
    ledger.receive(state(ledger, "a"))
    ledger.settle(ledger.claim_one())

    statements = seen(ledger.store.engine, lambda: ledger.receive(state(ledger, "a")))

    assert [statement for statement, _ in statements if "ORDER BY of_lane.id DESC" in statement]
    for statement, parameters in statements:
        assert_no_scan(ledger, statement, parameters)


def test_a_third_order_under_the_same_identity_is_a_conflict_of_its_own(ledger: Ledger) -> None:
    received = [ledger.receive(receipt(body=b'{"total": %d}' % total)) for total in (1, 2, 3, 3)]

    assert received == [Received.NEW, Received.CONFLICT, Received.CONFLICT, Received.REPEAT]


def test_without_its_pruned_body_an_equal_identity_is_a_repeat(ledger: Ledger) -> None:
    ledger.receive(receipt(body=b'{"total": 1}'))
    ledger.rows("UPDATE notifications SET body = NULL")

    assert ledger.receive(receipt(body=b'{"total": 2}')) is Received.REPEAT


def test_the_same_event_twice_in_one_group_is_stored_once(ledger: Ledger) -> None:
    wanted = [(ledger.export, True)]

    async def together() -> list[Received]:
        each = [receipt(wanted=wanted), receipt(wanted=wanted), receipt(body=b'{"other": 1}', wanted=wanted)]
        return await asyncio.gather(*(ledger.inbox.receive(one) for one in each))

    assert ledger.do(together()) == [Received.NEW, Received.REPEAT, Received.CONFLICT]
    assert len(ledger.states()) == 1


def test_two_events_of_one_order_in_one_group_share_a_lane(ledger: Ledger) -> None:
    async def together() -> None:
        wanted = [(ledger.history, False)]
        await asyncio.gather(*(ledger.inbox.receive(receipt(snapshot=each, wanted=wanted)) for each in (2, 1)))

    ledger.do(together())

    assert len(ledger.rows("SELECT 1 FROM lanes")) == 1
    assert [state for _, state, _ in ledger.states()] == ["waiting", "waiting"]


def test_without_a_moment_of_its_own_a_notification_takes_the_place_of_its_arrival(ledger: Ledger) -> None:
    for snapshot in (NOON + 1, None, NOON - 1):
        ledger.receive(receipt(snapshot=snapshot, wanted=[(ledger.history, False)]))

    order = []
    for _ in range(3):
        claim = ledger.claim_one(ledger.history)
        order.append(claim.delivery_id)
        ledger.settle(claim, refetch=False)

    assert order == [3, 2, 1]


# --- stale snapshots ------------------------------------------------------------------------------------------------


def test_a_newer_snapshot_supersedes_older_deliveries_that_were_never_tried(ledger: Ledger) -> None:
    ledger.owed(1, 2, 3)

    assert ledger.states() == [(1, "done", "superseded"), (2, "done", "superseded"), (3, "waiting", None)]
    assert json.loads(ledger.claim_one().body or b"")["snapshot"] == 3


def test_a_claimed_moment_changes_nothing_on_a_route_that_reads_the_order_again(ledger: Ledger) -> None:
    ledger.owed(2, 1)

    assert ledger.states() == [(2, "done", "superseded"), (1, "waiting", None)]


def test_an_event_with_an_earlier_moment_is_delivered_although_the_later_one_is_done(ledger: Ledger) -> None:
    ledger.owed(2)
    ledger.settle(ledger.claim_one(), MOVED_ON)

    ledger.owed(1)

    assert ledger.states() == [(2, "done", "moved_on"), (1, "waiting", None)]
    assert ledger.claim_one().delivery_id == 2


def test_a_snapshot_of_the_same_moment_is_a_newer_trigger(ledger: Ledger) -> None:
    for identity in (b"a", b"b"):
        ledger.receive(receipt(identity=identity, wanted=[(ledger.export, True)]))

    assert ledger.states() == [(1, "done", "superseded"), (1, "waiting", None)]


def test_a_delivery_that_was_tried_is_not_superseded_and_goes_first(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), waiting(NOON + 5000))

    ledger.owed(2, 3)

    assert ledger.states() == [(1, "waiting", None), (2, "done", "superseded"), (3, "waiting", None)]
    assert ledger.claim() == []  # the newer one does not overtake the retry
    ledger.clock.now += 5000
    retry = ledger.claim_one()
    assert (retry.delivery_id, retry.attempt) == (1, 2)
    ledger.settle(retry)
    assert ledger.claim_one().delivery_id == 3


def test_a_claimed_delivery_is_not_superseded(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()

    ledger.owed(2)

    assert ledger.claim() == []
    assert ledger.settle(claim)
    assert ledger.states() == [(1, "done", "delivered"), (2, "waiting", None)]
    assert ledger.claim_one().delivery_id == 2


def test_a_route_that_does_not_refetch_gets_every_snapshot_in_order(ledger: Ledger) -> None:
    ledger.owed(3, 1, 2, refetch=False)

    seen = []
    for _ in range(3):
        claim = ledger.claim_one(ledger.history)
        seen.append(json.loads(claim.body or b"")["snapshot"])
        ledger.settle(claim, refetch=False)

    assert seen == [1, 2, 3]
    assert ledger.claim(ledger.history) == []


def test_no_delivery_comes_before_an_attempted_one(ledger: Ledger) -> None:
    ledger.owed(2, refetch=False)
    ledger.settle(ledger.claim_one(ledger.history), waiting(NOON), refetch=False)

    ledger.owed(1, refetch=False)

    assert ledger.claim_one(ledger.history).delivery_id == 1  # snapshot 2, which came and was tried first


# --- dead letters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settlement", [REJECTED, EXHAUSTED, CONDITION], ids=lambda each: each.reason)
def test_a_dead_letter_of_a_route_that_refetches_is_passed(ledger: Ledger, settlement: Ends) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()
    ledger.owed(2)

    ledger.settle(claim, settlement)

    assert ledger.states()[0] == (1, "dead", settlement.reason)
    assert ledger.claim_one().delivery_id == 2


@pytest.mark.parametrize("settlement", [REJECTED, EXHAUSTED, CONDITION], ids=lambda each: each.reason)
def test_a_dead_letter_of_a_route_that_does_not_refetch_holds_its_lane(ledger: Ledger, settlement: Ends) -> None:
    ledger.owed(1, 2, refetch=False)

    ledger.settle(ledger.claim_one(ledger.history), settlement, refetch=False)
    ledger.owed(3, refetch=False)
    ledger.clock.now += 100 * HOUR

    assert ledger.claim(ledger.history) == []
    assert ledger.next_due_at() is None


@pytest.mark.parametrize("settlement", [REJECTED, EXHAUSTED, CONDITION, BROKEN], ids=lambda each: each.reason)
@pytest.mark.parametrize("arrives", ["before", "after"])
def test_a_stopped_lane_goes_on_once_its_route_reads_the_order_again(
    ledger: Ledger, settlement: Ends, arrives: str
) -> None:
    """The next delivery may wait behind the letter already, or arrive after the change of the configuration."""
    ledger.owed(1, refetch=False)
    ledger.settle(ledger.claim_one(ledger.history), settlement, refetch=False)
    if arrives == "before":
        ledger.owed(2, refetch=False)

    ledger.do(ledger.lanes.open_queues([EXPORT, HISTORY], refetching=["history"]))
    if arrives == "after":
        ledger.receive(receipt(snapshot=2, wanted=[(ledger.history, True)]))

    assert ledger.claim_one(ledger.history).delivery_id == 2
    assert ledger.states()[0] == (1, "dead", settlement.reason)


def test_a_stopped_lane_in_which_nothing_waits_is_idle_once_its_route_reads_the_order_again(ledger: Ledger) -> None:
    ledger.owed(1, refetch=False)
    ledger.settle(ledger.claim_one(ledger.history), REJECTED, refetch=False)

    ledger.do(ledger.lanes.open_queues([HISTORY], refetching=["history"]))

    assert ledger.claim(ledger.history) == []
    assert ledger.rows("SELECT holder, next_at, current_delivery_id FROM lanes") == [(None, None, None)]


@pytest.mark.parametrize("what", ["unknown", "of another queue", "held by a blocked handler", "waiting for a retry"])
def test_a_start_leaves_other_lanes_as_they_are(ledger: Ledger, what: str) -> None:
    ledger.owed(1, 2, refetch=False)
    claim = ledger.claim_one(ledger.history)
    if what == "held by a blocked handler":
        ledger.settle(claim, Ends(Ending.BLOCKED, "unknown"), refetch=False, keeps_lane=True)
    else:
        ends = {"unknown": UNKNOWN, "waiting for a retry": waiting(NOON + HOUR)}.get(what, REJECTED)
        ledger.settle(claim, ends, refetch=False)
    before = ledger.rows("SELECT * FROM lanes")

    refetching = ["export"] if what == "of another queue" else ["history"]
    ledger.do(ledger.lanes.open_queues([EXPORT, HISTORY], refetching=refetching))

    assert ledger.rows("SELECT * FROM lanes") == before


def test_a_start_finds_stopped_lanes_among_many_orders_by_an_index(ledger: Ledger) -> None:
    make_many(ledger, 20_000)
    ledger.owed(1, order_id="order-1", refetch=False)
    ledger.settle(ledger.claim_one(ledger.history), REJECTED, refetch=False)

    open_queues = ledger.lanes.open_queues([HISTORY], refetching=["history"])
    statements = seen(ledger.store.engine, lambda: ledger.do(open_queues))

    assert [statement for statement, _ in statements if "current_delivery_id" in statement]
    for statement, parameters in statements:
        assert_no_scan(ledger, statement, parameters, ("notifications", "deliveries", "lanes"))


@pytest.mark.parametrize("refetch", [True, False], ids=["refetch", "no-refetch"])
def test_an_unknown_outcome_always_holds_its_lane(ledger: Ledger, refetch: bool) -> None:
    queue = ledger.export if refetch else ledger.history
    ledger.owed(1, refetch=refetch)
    claim = ledger.claim_one(queue)

    ledger.settle(claim, UNKNOWN, refetch=refetch)
    ledger.owed(2, refetch=refetch)
    ledger.clock.now += 100 * HOUR

    assert ledger.claim(queue) == []
    assert ledger.states() == [(1, "dead", "unknown"), (2, "waiting", None)]


def test_a_dead_letter_holds_its_own_lane_only(ledger: Ledger) -> None:
    ledger.owed(1, refetch=False, order_id="order-1")
    ledger.owed(1, refetch=False, order_id="order-2")
    first, second = ledger.claim(ledger.history)

    ledger.settle(first, UNKNOWN, refetch=False)
    ledger.settle(second, waiting(NOON), refetch=False)

    assert [claim.order_id for claim in ledger.claim(ledger.history)] == ["order-2"]


@pytest.mark.parametrize("settlement", [REJECTED, EXHAUSTED], ids=["rejected", "exhausted"])
@pytest.mark.parametrize("refetch", [True, False], ids=["refetch", "no-refetch"])
def test_a_repeat_retries_a_dead_letter_whose_outcome_is_known(ledger: Ledger, settlement: Ends, refetch: bool) -> None:
    queue = ledger.export if refetch else ledger.history
    ledger.owed(1, refetch=refetch)
    ledger.settle(ledger.claim_one(queue), settlement, refetch=refetch)

    received = ledger.receive(receipt(wanted=[(queue, refetch)]))

    assert received is Received.RETRIED
    assert ledger.states() == [(1, "waiting", None)]
    again = ledger.claim_one(queue)
    assert (again.delivery_id, again.attempt, again.in_doubt) == (1, 1, False)


def test_repeats_retry_at_most_once_an_hour(ledger: Ledger) -> None:
    ledger.owed(1)
    answers = []
    for minutes in (0, 30, 59, 60, 119, 120):
        ledger.clock.now = NOON + minutes * 60_000
        for claim in ledger.claim():
            ledger.settle(claim, REJECTED)
        answers.append(ledger.receive(receipt()))

    repeat, retried = Received.REPEAT, Received.RETRIED
    assert answers == [retried, repeat, repeat, retried, repeat, retried]


@pytest.mark.parametrize(
    "settlement",
    [
        UNKNOWN,
        CONDITION,
        DELIVERED,
        SKIPPED,
        MOVED_ON,
    ],
    ids=lambda each: each.reason,
)
def test_a_repeat_never_retries_anything_else(ledger: Ledger, settlement: Ends) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), settlement)
    ledger.clock.now += 2 * HOUR

    received = ledger.receive(receipt(wanted=[(ledger.export, True)]))

    assert received is Received.REPEAT
    assert ledger.claim() == []
    assert ledger.states()[0][2] == settlement.reason


def test_reconciliation_retries_nothing(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), REJECTED)

    assert ledger.receive(receipt(source="reconciliation")) is Received.REPEAT
    assert ledger.claim() == []


def test_a_retry_does_not_pass_an_unknown_outcome_that_holds_the_lane(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), REJECTED)
    ledger.owed(2)
    ledger.settle(ledger.claim_one(), UNKNOWN)

    ledger.receive(receipt(snapshot=1))
    ledger.clock.now += 2 * HOUR

    assert ledger.claim() == []


# --- claims ---------------------------------------------------------------------------------------------------------


def test_a_claim_says_all_that_an_attempt_needs(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.clock.now += 7

    claim = ledger.claim_one()

    assert (claim.order_id, claim.channel, claim.callback) == ("order-1", ("fjallboden", "1"), "order-status")
    assert claim.body == body_of("order-1", 1)
    assert claim.identity == b"order-1/1/"
    assert (claim.attempt, claim.in_doubt, claim.previous) == (1, False, None)
    assert (claim.received_at, claim.claimed_at, claim.first_attempt_at) == (NOON, NOON + 7, NOON + 7)
    assert claim.doubt_ends_at == NOON + 7 + DOUBT


def test_a_held_lane_is_not_claimed_again(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.claim_one()
    ledger.clock.now += 100 * HOUR

    assert ledger.claim() == []
    assert ledger.next_due_at() is None


def test_an_attempt_is_written_with_its_outcome(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()
    ledger.clock.now += 250

    ledger.settle(claim, Ends(Reject("no-such-shop", "x" * 5000), "rejected"))

    assert ledger.rows(
        "SELECT delivery_id, claim, kind, started_at, ended_at, outcome, code, length(message) FROM attempts"
    ) == [(1, 1, "deliver", NOON, NOON + 250, "reject", "no-such-shop", LONGEST_MESSAGE)]


def test_the_last_done_is_there_at_the_next_claim_of_the_lane(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), delivered("shop-7", digest="abc", lines=3))
    ledger.clock.now += HOUR
    ledger.owed(2)

    previous = ledger.claim_one().previous

    assert previous is not None
    assert (previous.reference, previous.facts) == ("shop-7", {"digest": "abc", "lines": 3})
    assert previous.at == datetime.fromtimestamp(NOON / 1000, UTC)


def test_a_retry_is_not_due_before_its_moment(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), waiting(NOON + 5000))
    ledger.clock.now = NOON + 4999

    assert ledger.claim() == []
    assert ledger.next_due_at() == NOON + 5000
    ledger.clock.now = NOON + 5000
    assert ledger.claim_one().attempt == 2


def test_an_attempt_that_does_not_count_is_taken_back(ledger: Ledger) -> None:
    ledger.owed(1)

    ledger.settle(ledger.claim_one(), RELEASED)

    assert ledger.claim_one().attempt == 1


def test_an_unknown_outcome_leaves_the_lane_in_doubt_until_one_is_known(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), in_doubt(NOON))
    second = ledger.claim_one()
    ledger.settle(second, in_doubt(NOON))
    third = ledger.claim_one()
    ledger.settle(third, NOT_THERE)

    fourth = ledger.claim_one()

    assert [claim.in_doubt for claim in (second, third, fourth)] == [True, True, False]


def test_a_claim_is_settled_only_once(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()

    assert ledger.settle(claim, waiting(NOON))
    assert ledger.settle(claim, waiting(NOON))  # as after a connection that broke at the commit
    assert ledger.states() == [(1, "waiting", None)]
    assert len(ledger.rows("SELECT 1 FROM attempts")) == 1


def test_a_claim_that_is_kept_is_settled_once_too(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()

    assert ledger.settle(claim, RELEASED, keeps_lane=True)
    assert ledger.settle(claim, RELEASED, keeps_lane=True)

    assert ledger.rows("SELECT count(*) FROM attempts") == [(1,)]
    assert ledger.rows("SELECT attempts FROM deliveries") == [(0,)]


@pytest.mark.parametrize("refetch", [True, False], ids=["refetch", "no-refetch"])
def test_a_dead_letter_is_not_discarded_while_its_handler_still_runs(ledger: Ledger, refetch: bool) -> None:
    queue = ledger.export if refetch else ledger.history
    ledger.owed(1, refetch=refetch)
    claim = ledger.claim_one(queue)
    ledger.settle(claim, UNKNOWN, refetch=refetch, keeps_lane=True)
    ledger.owed(2, refetch=refetch)
    commands = Commands(ledger.store)
    discard = Step(matching=DeliveryFilter(), by=Author(who="a person", why="it is there"))

    assert ledger.do(commands.discard(discard)).changed == 0
    ledger.do(ledger.lanes.release(claim))
    assert ledger.do(commands.discard(discard)).changed == 1

    ledger.clock.now += DOUBT
    assert ledger.claim_one(queue).delivery_id == 2


def test_an_old_claim_records_nothing_after_the_lane_was_taken_over(ledger: Ledger) -> None:
    ledger.owed(1)
    old = ledger.claim_one()
    after = ledger.reopened()
    try:
        after.clock.now += DOUBT
        new = after.claim_one()

        kept_old, kept_new = after.settle(old, REJECTED), after.settle(new)

        assert (kept_old, kept_new) == (False, True)
        assert after.states() == [(1, "done", "delivered")]
    finally:
        after.store.close()


def test_the_lanes_of_a_dead_process_are_in_doubt_and_not_due_before_the_doubt_ends(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()
    after = ledger.reopened()
    try:
        assert after.claim() == []
        assert after.next_due_at() == claim.doubt_ends_at
        after.clock.now = claim.doubt_ends_at - 1
        assert after.claim() == []
        after.clock.now = claim.doubt_ends_at
        taken_over = after.claim_one()

        assert (taken_over.delivery_id, taken_over.attempt, taken_over.in_doubt) == (1, 2, True)
        assert taken_over.number > claim.number
    finally:
        after.store.close()


def test_a_claim_is_on_disk_when_it_returns(ledger: Ledger) -> None:
    ledger.owed(1)

    ledger.claim_one()

    assert ledger.rows("SELECT claim, settled, holder IS NOT NULL FROM lanes") == [(1, 0, 1)]


def test_a_claim_takes_at_most_the_given_number_of_lanes(ledger: Ledger) -> None:
    for number in range(5):
        ledger.receive(receipt(f"order-{number}", wanted=[(ledger.export, True), (ledger.history, False)]))

    limits = [
        QueueLimits(queue_id=ledger.export, concurrency=2, doubt_ms=DOUBT, schedule=()),
        QueueLimits(queue_id=ledger.history, concurrency=5, doubt_ms=DOUBT, schedule=()),
    ]
    claims = ledger.do(ledger.lanes.claim(limits, 4)).claims

    taken = [claim.queue_id for claim in claims]
    assert len(taken) == 4
    assert taken.count(ledger.export) <= 2


def test_one_lane_of_an_idle_queue_is_claimed_beyond_the_given_number(ledger: Ledger) -> None:
    for number in range(3):
        ledger.receive(receipt(f"order-{number}", wanted=[(ledger.export, True), (ledger.history, False)]))

    first = ledger.take(ledger.export, ledger.history, most=0, idle=[ledger.history])
    second = ledger.take(ledger.export, ledger.history, most=1, idle=[ledger.export, ledger.history])
    third = ledger.take(ledger.export, ledger.history, most=0)

    assert [claim.queue_id for claim in first.claims] == [ledger.history]
    assert sorted(claim.queue_id for claim in second.claims) == sorted([ledger.export, ledger.history])
    assert third.claims == []


def test_queues_come_in_turn_so_that_no_backlog_starves_another(ledger: Ledger) -> None:
    for number in range(6):
        ledger.receive(receipt(f"order-{number}", wanted=[(ledger.export, True), (ledger.history, False)]))

    taken = [ledger.claim(ledger.export, ledger.history, most=1)[0].queue_id for _ in range(4)]

    assert sorted(taken) == sorted([ledger.export, ledger.history] * 2)


def test_lanes_in_which_nothing_waits_do_not_hide_those_in_which_something_does(ledger: Ledger) -> None:
    ledger.owed(2)
    ledger.settle(ledger.claim_one())
    ledger.rows(f"UPDATE lanes SET next_at = {NOON}")  # as after a discarded delivery
    ledger.clock.now += 1
    ledger.owed(1, order_id="order-2")

    taken = ledger.take(most=1)

    assert (taken.claims, taken.next_due_at) == ([], ledger.clock.now)
    assert ledger.claim_one().order_id == "order-2"


def test_a_claim_and_its_settlement_find_their_rows_among_many_by_an_index(ledger: Ledger) -> None:
    make_many(ledger, 20_000)
    ledger.owed(NOON, order_id="order-1")

    statements = seen(ledger.store.engine, lambda: ledger.settle(ledger.claim_one()))

    assert [statement for statement, _ in statements if "JOIN notifications" in statement]
    for statement, parameters in statements:
        assert_no_scan(ledger, statement, parameters)


def test_lanes_of_a_queue_come_in_the_order_in_which_they_are_due(ledger: Ledger) -> None:
    for number in (3, 1, 2):
        ledger.clock.now = NOON + number
        ledger.owed(1, order_id=f"order-{number}")
    ledger.clock.now = NOON + HOUR

    assert [claim.order_id for claim in ledger.claim()] == ["order-1", "order-2", "order-3"]


# --- pauses ---------------------------------------------------------------------------------------------------------


def test_a_start_ends_a_pause_for_refused_credentials(ledger: Ledger) -> None:
    for number in range(6):
        ledger.owed(1, order_id=f"order-{number}")
    for claim in ledger.claim(most=5):
        ledger.settle(claim, MISCONFIGURED)

    assert ledger.claim() == []
    assert ledger.next_due_at() == NOON + 30_000
    after = ledger.reopened()
    try:
        assert len(after.claim()) == 6
    finally:
        after.store.close()


def test_a_probe_passes_over_the_lanes_that_failed_although_they_are_due_for_longer(ledger: Ledger) -> None:
    for number in range(5):
        ledger.owed(1, order_id=f"order-{number}")
    failed = ledger.claim()
    for claim in failed:
        ledger.settle(claim, MISCONFIGURED)
    ledger.clock.now += 1000
    for number in (5, 6):
        ledger.owed(1, order_id=f"order-{number}")

    probes = []
    for _ in range(4):
        ledger.clock.now += HOUR
        probes.append(ledger.claim_one())
        assert ledger.claim() == []  # one at a time
        ledger.settle(probes[-1], MISCONFIGURED)

    assert {claim.order_id for claim in probes[:2]} == {"order-5", "order-6"}
    assert {claim.order_id for claim in probes[2:]} < {claim.order_id for claim in failed}
    assert probes[2].lane_id != probes[3].lane_id  # as all have failed: the one that is due for longest


def test_a_pause_is_for_one_route_of_one_merchant_and_channel(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.receive(receipt("elsewhere", wanted=[(ledger.other, True)]))
    ledger.settle(ledger.claim_one(), PAUSES)

    claims = ledger.claim(ledger.export, ledger.other)

    assert [claim.order_id for claim in claims] == ["elsewhere"]


def test_entering_again_finds_the_same_queues(ledger: Ledger) -> None:
    before = ledger.queues
    after = ledger.reopened()
    after.store.close()

    assert after.queues == before


# --- queries -------------------------------------------------------------------------------------------------------


def query(ledger: Ledger, look: Callable[[Queries], T]) -> T:
    with ledger.store.read_connection() as connection:
        return look(Queries(connection))


def test_deliveries_are_listed_by_state_route_and_order(ledger: Ledger) -> None:
    ledger.owed(1, order_id="order-1")
    ledger.owed(1, order_id="order-2", refetch=False)
    ledger.settle(ledger.claim_one(), Ends(Reject("no-such-shop", "The shop is unknown."), "rejected"))

    def ids(limit: int = 100, **asked: Any) -> list[int]:
        return [
            each["id"]
            for each in query(ledger, lambda queries: queries.deliveries(DeliveryFilter(**asked), limit=limit))
        ]

    assert ids() == [2, 1]
    assert ids(limit=1) == [2]
    assert ids(state="dead") == [1]
    assert ids(route="history") == [2]
    assert ids(order_id="order-1", state="waiting") == []


def test_a_delivery_is_shown_with_its_attempts(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), waiting(NOON + 5000))
    ledger.clock.now += 5000
    ledger.settle(ledger.claim_one(), delivered("shop-7"))

    shown = query(ledger, lambda queries: queries.delivery(1))

    assert shown is not None
    assert (shown["state"], shown["reason"], shown["tries"], shown["reference"]) == ("done", "delivered", 2, "shop-7")
    assert shown["first_attempt_at"] == "2026-02-03T12:00:00.000Z"
    assert [(each["outcome"], each["code"]) for each in shown["attempts"]] == [
        ("retry", "destination-busy"),
        ("done", None),
    ]


def test_a_delivery_shows_its_doubt_and_its_due_time(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), in_doubt(NOON + 5000))
    ledger.owed(2)

    first, second = (query(ledger, lambda queries: queries.delivery(number)) for number in (1, 2))  # noqa: B023

    assert first is not None
    assert second is not None
    assert first["in_doubt"] is True
    assert first["next_at"] == "2026-02-03T12:00:05.000Z"
    assert (second["in_doubt"], second["next_at"]) == (False, None)


def test_the_desk_has_nothing_to_show_for_a_delivery_that_is_not_there(ledger: Ledger) -> None:
    assert query(ledger, lambda queries: queries.delivery(1)) is None


def test_the_overview_counts_waiting_and_dead_deliveries(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        ledger.owed(1, order_id=f"order-{number}")
    ledger.clock.now += 90_000
    dead, done, paused = ledger.claim()
    ledger.settle(dead, REJECTED)
    ledger.settle(done)
    ledger.settle(paused, PAUSES)

    overview = query(ledger, lambda queries: queries.overview(ledger.clock.now))

    assert overview.by_route == {("export", "waiting"): 1, ("export", "dead"): 1}
    assert overview.oldest_waiting_seconds == {"export": 90.0}
    assert overview.paused == {("export", "fjallboden", "1"): "destination-busy"}
