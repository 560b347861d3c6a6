"""Queries on both databases: lists, details and the overview, without a scan of a large table."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from adapter.ledger import queries as queries_module
from adapter.ledger.queries import DeliveryFilter, Queries
from tests.databases import KINDS, Server
from tests.ledger import test_verdict_log as judged
from tests.ledger.test_verdict_log import SHADOW
from tests.ledgers import (
    DAY,
    DELIVERED,
    EXPORT,
    HISTORY,
    HOUR,
    NOON,
    OTHER,
    REJECTED,
    Ledger,
    delivered,
    make_many,
    make_verdicts,
    opened,
    receipt,
    waiting,
)
from tests.plans import BIG, assert_no_scan, seen

T = TypeVar("T")
MANY = 100_000


LATE = replace(judged.LATE, route="limits")


def query(ledger: Ledger, look: Callable[[Queries], T]) -> T:
    with ledger.store.read_connection() as connection:
        return look(Queries(connection))


# --- what is shown --------------------------------------------------------------------------------------------------


def test_notifications_are_filtered_and_listed_newest_first(ledger: Ledger) -> None:
    ledger.receive(receipt("order-1", 1))
    ledger.owed(2, order_id="order-1")
    ledger.owed(1, order_id="order-2")

    def ids(**asked: Any) -> list[int]:
        return [row["id"] for row in query(ledger, lambda queries: queries.notifications(**asked))]

    assert ids() == [3, 2, 1]
    assert ids(limit=1) == [3]
    assert ids(order_id="order-1") == [2, 1]
    assert ids(order_id="order-1", limit=1) == [2]
    assert ids(order_id="nobody's") == []
    assert ids(callback="order-status", merchant="fjallboden", channel="1") == [3, 2, 1]
    assert ids(merchant="annan") == ids(channel="2") == ids(callback="cart") == []


BEGINNINGS: dict[str, list[str]] = {
    "o_yClT": ["o_yClT-a", "o_yClT-b"],
    "o_yClT-a": ["o_yClT-a"],
    "o_yCl": [],  # too short
    "oXyClT": ["oXyClT-a"],
    "100%-a": ["100%-ab"],
    "100%-": [],
    "%%%%%%": [],
    "______": [],
    "abcdef": ["abcdef"],  # the whole id of one order, and the beginning of another
    "abcdefg": ["abcdefg"],
    "ABCDEF": [],
    "short": ["short"],
    "åäöåäö": ["åäöåäö☃"],
}


@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "unwanted"])
def test_the_beginning_of_an_id_stands_for_all_orders_whose_ids_begin_so(ledger: Ledger, wanted: bool) -> None:
    orders = ["o_yClT-a", "oXyClT-a", "100%-ab", "abcdefg", "abcdef", "o_yClT-b", "short", "åäöåäö☃"]
    verdict_log = judged.Writing(ledger)
    for order in orders:
        ledger.receive(receipt(order, wanted=[(ledger.export, True)] if wanted else []))
        verdict_log.record(replace(LATE, order_id=order))
    verdict_log.flush()

    for name, expected in BEGINNINGS.items():
        found = (
            query(ledger, lambda queries, name=name: queries.notifications(order_id=name)),  # type: ignore[misc]
            query(ledger, lambda queries, name=name: queries.verdicts(order_id=name)),  # type: ignore[misc]
            query(ledger, lambda queries, name=name: queries.orders(name)),  # type: ignore[misc]
            query(ledger, lambda queries, name=name: queries.deliveries(DeliveryFilter(order_id=name))),  # type: ignore[misc]
        )
        ids = [sorted(row["order_id"] for row in rows) for rows in found]
        assert ids == [expected] * 3 + [expected if wanted else []], name


def test_an_order_is_found_by_its_own_reference_and_by_that_of_a_destination(ledger: Ledger) -> None:
    ledger.receive(receipt("order-1", 1, wanted=[(ledger.export, True)]))
    ledger.receive(receipt("order-1", 2, reference="100-1"))
    ledger.receive(receipt("order-2", 1, wanted=[(ledger.export, True)], reference="100-2"))
    ledger.settle(ledger.claim(most=1)[0], delivered("GC-7"))
    ledger.settle(ledger.claim(most=1)[0], REJECTED)
    ledger.receive(receipt("order-2", 2, wanted=[(ledger.export, True)]))
    ledger.settle(ledger.claim(most=1)[0], delivered("GC-8" + "x" * 1000))
    verdict_log = judged.Writing(ledger)
    verdict_log.record(LATE)
    verdict_log.flush()

    def found(reference: str) -> tuple[list[Any], ...]:
        return query(
            ledger,
            lambda queries: (
                [row["id"] for row in queries.deliveries(DeliveryFilter(reference=reference))],
                [row["id"] for row in queries.notifications(reference=reference)],
                [row["order_id"] for row in queries.verdicts(reference=reference)],
                [row["order_id"] for row in queries.orders(reference)],
            ),
        )

    assert found("100-1") == found("GC-7") == ([1], [2, 1], ["order-1"], ["order-1"])
    assert found("100-2") == found("GC-8" + "x" * 900) == ([3, 2], [4, 3], [], ["order-2"])
    assert found("GC-8") == found("100_1") == found("%") == ([], [], [], [])
    shown = query(ledger, lambda queries: queries.deliveries())
    references = [(row["order_reference"], (row["reference"] or "")[:4]) for row in shown]
    assert references == [(None, "GC-8"), ("100-2", ""), (None, "GC-7")]


@pytest.mark.parametrize("reference", ["nul\0", "half \ud800", "", "tab\t"], ids=ascii)
def test_a_reference_that_cannot_be_searched_is_not_kept(ledger: Ledger, reference: str) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), delivered(reference), has_text=False)

    assert ledger.rows("SELECT state, reference FROM deliveries") == [("done", None)]


def test_orders_of_several_merchants_with_one_reference_are_told_apart(ledger: Ledger) -> None:
    ledger.receive(receipt("order-1", wanted=[(ledger.export, True)], reference="7"))
    other = replace(receipt("order-2", wanted=[(ledger.other, True)], reference="7"), channel=OTHER.channel)
    ledger.receive(other)

    found = query(ledger, lambda queries: queries.orders("7"))

    annan = {"merchant": "annan", "channel": "1", "order_id": "order-2"}
    assert found == [annan, {"merchant": "fjallboden", "channel": "1", "order_id": "order-1"}]


def test_since_and_until_are_the_time_of_receipt(ledger: Ledger) -> None:
    for number in range(6):
        ledger.clock.now = NOON + number * HOUR
        ledger.receive(receipt(f"order-{number}", wanted=[(ledger.export, True)]))
    ledger.clock.now = NOON + DAY
    ledger.settle(ledger.claim(most=1)[0])

    def ids(since: int | None, until: int | None) -> list[int]:
        deliveries = query(ledger, lambda queries: queries.deliveries(DeliveryFilter(since=since, until=until)))
        notifications = query(ledger, lambda queries: queries.notifications(since=since, until=until))
        counted = query(ledger, lambda queries: queries.count(DeliveryFilter(since=since, until=until)))
        found = [row["id"] for row in deliveries]
        assert [row["id"] for row in notifications] == found
        assert sum(row["count"] for row in counted) == len(found)
        return found

    assert ids(NOON + HOUR, NOON + 3 * HOUR) == [3, 2]
    assert ids(None, NOON + 1) == [1]
    assert ids(NOON + 4 * HOUR + 1, None) == [6]
    assert ids(NOON + 5 * HOUR + 1, None) == ids(None, NOON) == []
    assert len(ids(0, NOON + DAY)) == 6


def test_nodes_whose_clocks_differ_a_little_hide_nothing_from_a_list(ledger: Ledger) -> None:
    for number, seconds in enumerate((10, 40, 0, 30, 20)):
        ledger.clock.now = NOON + seconds * 1000
        ledger.receive(receipt(f"order-{number}"))

    found = query(ledger, lambda queries: queries.notifications(since=NOON + 20_000, until=NOON + 41_000))

    assert sorted(row["order_id"] for row in found) == ["order-1", "order-3", "order-4"]


def test_a_list_says_how_many_match_if_it_is_not_all(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        ledger.owed(1, order_id=f"order-{number}")

    def matching(limit: int, **given: Any) -> str | None:
        return query(ledger, lambda queries: queries.deliveries(DeliveryFilter(**given), limit=limit)).matching

    assert (matching(6), matching(5), matching(4), matching(1, order_id="order-1")) == (None, None, "5", None)
    monkeypatch.setattr(queries_module, "MOST_COUNTED", 3)
    assert matching(1) == "5"
    for number in range(5, 12):
        ledger.owed(1, order_id=f"order-{number}")
    assert matching(1) == "more than 10"


def test_a_notification_is_shown_with_its_deliveries_and_conflicts_and_never_its_body(ledger: Ledger) -> None:
    ledger.receive(receipt(body=b'{"canary": 1}', wanted=[(ledger.export, True), (ledger.history, False)]))
    ledger.receive(receipt(body=b'{"canary": 2}'))

    [(conflict,)] = ledger.rows("SELECT id FROM notifications WHERE conflicts_with = 1")
    shown = query(ledger, lambda queries: queries.notification(1))

    assert (shown["order_id"], shown["body_bytes"], shown["conflicts"]) == ("order-1", 13, [conflict])
    assert [each["route"] for each in shown["deliveries"]] == ["history", "export"]
    assert shown["received_at"] == "2026-02-03T12:00:00.000Z"
    assert "canary" not in str(shown)
    assert query(ledger, lambda queries: queries.notification(conflict))["conflicts_with"] == 1
    assert query(ledger, lambda queries: queries.notification(4711)) is None


def test_queues_show_waiting_and_running_deliveries(ledger: Ledger) -> None:
    for number in range(3):
        ledger.owed(1, order_id=f"order-{number}")
    ledger.settle(ledger.claim(most=1)[0], waiting(NOON + HOUR))
    ledger.claim(most=1)

    rows = query(ledger, lambda queries: queries.queues(ledger.clock.now, ledger.queues))

    shown = {(row["route"], row["merchant"]): (row["state"], row["waiting"], row["running"]) for row in rows}
    assert shown == {
        ("export", "annan"): ("running", 0, 0),
        ("export", "fjallboden"): ("running", 3, 1),
        ("history", "fjallboden"): ("running", 0, 0),
    }


def test_a_queue_whose_pause_is_over_is_probing(ledger: Ledger) -> None:
    ledger.rows(f"UPDATE queues SET paused_until = {NOON + HOUR}, paused_by = 'failures' WHERE id = {ledger.export}")

    def state(now: int) -> tuple[str, str | None]:
        rows = query(ledger, lambda queries: queries.queues(now, ledger.queues))
        (row,) = [each for each in rows if each["id"] == ledger.export]
        return row["state"], row["paused_until"]

    assert state(NOON) == ("paused", "2026-02-03T13:00:00.000Z")
    assert state(NOON + HOUR) == ("probing", "2026-02-03T13:00:00.000Z")


def test_a_queue_that_is_not_configured_is_orphaned_even_while_it_is_paused(ledger: Ledger) -> None:
    ledger.rows(f"UPDATE queues SET paused_until = {NOON + HOUR}, paused_by = 'failures' WHERE id = {ledger.export}")

    rows = query(ledger, lambda queries: queries.queues(NOON, [HISTORY]))

    assert {(row["route"], row["merchant"]): row["state"] for row in rows} == {
        ("export", "annan"): "orphaned",
        ("export", "fjallboden"): "orphaned",
        ("history", "fjallboden"): "running",
    }


def test_the_overview_adds_up_the_queues_of_a_route_and_takes_the_oldest(ledger: Ledger) -> None:
    ledger.receive(receipt("order-1", wanted=[(ledger.other, True)]))
    ledger.clock.now += HOUR
    ledger.owed(1, order_id="order-2")
    ledger.clock.now += HOUR

    overview = query(ledger, lambda queries: queries.overview(ledger.clock.now))

    assert overview.by_route == {("export", "waiting"): 2}
    assert overview.oldest_waiting_seconds == {"export": 7200.0}


def test_processes_are_shown_as_alive_or_not(ledger: Ledger) -> None:
    (process,) = query(ledger, lambda queries: queries.processes(NOON))
    (later,) = query(ledger, lambda queries: queries.processes(NOON + HOUR))

    assert (process["alive"], later["alive"], process["version"]) == (True, False, "test")


def test_verdicts_are_filtered_and_listed_newest_first(ledger: Ledger) -> None:
    verdict_log = judged.Writing(ledger)
    for number, each in enumerate((LATE, SHADOW, replace(LATE, decided="approve", order_id="order-2"))):
        ledger.clock.now = NOON + number
        verdict_log.record(each)
    verdict_log.flush()

    def kinds(**asked: Any) -> list[str]:
        return [row["kind"] for row in query(ledger, lambda queries: queries.verdicts(**asked))]

    assert kinds() == ["late", "shadow", "late"]
    assert kinds(limit=2) == ["late", "shadow"]
    assert kinds(kind="shadow") == ["shadow"]
    assert kinds(route="limits") == ["late", "late"]
    assert kinds(order_id="order-1") == ["shadow", "late"]
    assert kinds(since=NOON + 1) == ["late", "shadow"]
    assert kinds(route="limits", order_id="order-1", since=NOON + 1) == []
    assert query(ledger, lambda queries: queries.verdicts(kind="late", order_id="order-1")) == [
        {
            "id": 1, "at": "2026-02-03T12:00:00.000Z", "kind": "late", "callback": "order-rules", "route": "limits",
            "merchant": "fjallboden", "channel": "1", "order_id": "order-1", "decided": "reject",
            "codes": ["national-id-missing", "no-name"], "answered": "approve", "took_ms": 2300,
        }
    ]  # fmt: skip


# What would have made another answer than the one that went out, by what was decided and what was answered.
DIFFERS = {
    ("approve", "approve"): 0, ("accept", "approve"): 0, ("reject", "reject"): 0, ("refuse", "reject"): 0,
    ("approve", "reject"): 1, ("accept", "reject"): 1, ("reject", "approve"): 1, ("refuse", "approve"): 1,
    ("patch", "approve"): 1, ("patch", "reject"): 1, ("failed", "approve"): 0, ("failed", "reject"): 0,
    ("patch", None): 0, ("reject", None): 0,
}  # fmt: skip


@pytest.mark.parametrize(("pair", "differs"), DIFFERS.items(), ids=str)
def test_a_verdict_differs_if_it_would_have_changed_the_answer(
    ledger: Ledger, pair: tuple[str, str | None], differs: int
) -> None:
    verdict_log = judged.Writing(ledger)
    verdict_log.record(replace(LATE, decided=pair[0], answered=pair[1]))
    verdict_log.flush()

    assert [row["differs"] for row in query(ledger, lambda queries: queries.count_verdicts())] == [differs]


def test_verdicts_are_counted_by_route(ledger: Ledger) -> None:
    verdict_log = judged.Writing(ledger)
    verdict_log.record(LATE, replace(LATE, decided="failed", took_ms=1), SHADOW, replace(SHADOW, decided="refuse"))
    ledger.clock.now = NOON + DAY
    verdict_log.record(LATE)
    verdict_log.flush()

    nothing = {"late": 0, "shadow": 0, "rejects": 0, "failed": 0, "differs": 0}
    assert query(ledger, lambda queries: queries.count_verdicts()) == [
        nothing | {"route": "limits", "late": 3, "rejects": 2, "failed": 1, "differs": 2},
        nothing | {"route": SHADOW.route, "shadow": 2, "rejects": 1},
    ]
    assert query(ledger, lambda queries: queries.count_verdicts(since=NOON + DAY)) == [
        nothing | {"route": "limits", "late": 1, "rejects": 1, "differs": 1}
    ]


# --- with a hundred thousand of each --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def crowded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """Fill a ledger with 100 000 done deliveries, as many waiting and some dead ones.

    On PostgreSQL fewer wait: it rightly scans the table if half of its rows count.
    """
    server: Server | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    url = server.fresh() if server else f"sqlite:///{tmp_path_factory.mktemp('crowded')}/adapter.db"
    with opened(url) as ledger:
        make_many(ledger, MANY, "done")
        make_many(ledger, 200 if server else MANY, "waiting")
        make_many(ledger, 200, "dead")
        make_verdicts(ledger, MANY)
        ledger.rows(f"UPDATE notifications SET received_at = {NOON} - 1000 * ({MANY} - id) WHERE id < {MANY}")
        ledger.rows("UPDATE notifications SET reference = 'own-' || id WHERE id % 2 = 0")
        ledger.rows("UPDATE deliveries SET reference = 'theirs-' || id WHERE state = 'done'")
        ledger.rows(f"UPDATE notifications SET is_wanted = {'0' if server is None else 'false'} WHERE id % 3 = 0")
        ledger.rows("ANALYZE")
        yield ledger
    if server:
        server.drop(url)


# The newest of all are read from the end of the table, and left off after a hundred.
QUERIES: dict[str, Callable[[Queries], Any]] = {
    "dead letters": lambda queries: queries.deliveries(DeliveryFilter(state="dead")),
    "dead letters of a reason": lambda queries: queries.deliveries(DeliveryFilter(state="dead", reason="rejected")),
    "deliveries of an order": lambda queries: queries.deliveries(DeliveryFilter(order_id="waiting-77")),
    "deliveries whose order ids begin so": lambda queries: queries.deliveries(DeliveryFilter(order_id="done-7777")),
    "deliveries of a reference": lambda queries: queries.deliveries(DeliveryFilter(reference="theirs-77")),
    "deliveries since a moment": lambda queries: queries.deliveries(DeliveryFilter(since=NOON - HOUR)),
    "deliveries until a moment": lambda queries: queries.deliveries(DeliveryFilter(until=NOON - DAY)),
    "notifications since a moment": lambda queries: queries.notifications(since=NOON - HOUR),
    "notifications of a reference": lambda queries: queries.notifications(reference="own-78"),
    "notifications whose order ids begin so": lambda queries: queries.notifications(order_id="done-7777"),
    "orders by a name": lambda queries: queries.orders("done-7777"),
    "verdicts whose order ids begin so": lambda queries: queries.verdicts(order_id="order-7777"),
    "verdicts of a reference": lambda queries: queries.verdicts(reference="own-78"),
    "deliveries of a notification": lambda queries: queries.deliveries(DeliveryFilter(notification_id=77)),
    "deliveries by id": lambda queries: queries.deliveries(DeliveryFilter(ids=(7, 77))),
    "a delivery": lambda queries: queries.delivery(77),
    "notifications of an order": lambda queries: queries.notifications(order_id="waiting-77"),
    "a notification": lambda queries: queries.notification(77),
    "what a retry would mean": lambda queries: queries.count(DeliveryFilter(state="dead", reason="rejected")),
    "what it would mean of an order": lambda queries: queries.count(DeliveryFilter(state="dead", order_id="dead-77")),
    "the metrics": lambda queries: queries.overview(NOON),
    "queues": lambda queries: queries.queues(NOON, [EXPORT]),
    "actions": lambda queries: queries.actions(),
    "verdicts": lambda queries: queries.verdicts(),
    "verdicts of a day": lambda queries: queries.verdicts(since=NOON - DAY),
    "verdicts about an order": lambda queries: queries.verdicts(order_id="order-77"),
    "verdicts of an hour, counted": lambda queries: queries.count_verdicts(since=NOON - HOUR),
}


# One test for all, because each process that takes a part of them would fill a ledger.
def test_no_query_scans_a_large_table(crowded: Ledger) -> None:
    for name, look in QUERIES.items():
        statements = seen(crowded.store._reader, partial(query, crowded, look))

        assert statements, name
        for statement, parameters in statements:
            assert_no_scan(crowded, statement, parameters, (*BIG, "verdicts"))


def test_queries_work_on_a_large_ledger(crowded: Ledger) -> None:
    overview = query(crowded, lambda queries: queries.overview(NOON + DAY))

    waits = 200 if crowded.url.startswith("postgresql") else MANY
    assert overview.by_route == {("export", "waiting"): waits, ("export", "dead"): 200}
    assert overview.oldest_waiting_seconds == {"export": 86400.0}
    assert [
        row["order_id"] for row in query(crowded, lambda queries: queries.notifications(order_id="waiting-77"))
    ] == ["waiting-77"]


def test_every_state_but_waiting_has_a_reason(ledger: Ledger) -> None:
    ledger.owed(1, order_id="order-1")
    ledger.owed(1, order_id="order-2")
    for claim, ends in zip(ledger.claim(), (DELIVERED, REJECTED), strict=True):
        ledger.settle(claim, ends)

    counted = query(ledger, lambda queries: queries.count(DeliveryFilter(route="export")))

    assert [(row["state"], row["reason"], row["count"]) for row in counted] == [
        ("dead", "rejected", 1),
        ("done", "delivered", 1),
    ]
