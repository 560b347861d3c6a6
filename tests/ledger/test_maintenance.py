"""Maintenance on both databases: pruning, checks, figures and backups."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, event

from adapter.ledger import maintenance as room
from adapter.ledger.commands import Commands, Step
from adapter.ledger.inbox import Received
from adapter.ledger.maintenance import Maintenance, Pruned, Retention, back_up, faults, figures
from adapter.ledger.queries import Author, DeliveryFilter
from adapter.ledger.store import Store, StoreUnavailable, open_for_reading
from adapter.ledger.verdict_log import VerdictLog
from adapter.plugin import Reject, Retry
from tests.databases import Server, rows, waits_for_a_lock
from tests.ledger.test_verdict_log import LATE
from tests.ledgers import (
    DAY,
    HOUR,
    MISCONFIGURED,
    NOON,
    REJECTED,
    UNKNOWN,
    Ends,
    HandClock,
    Ledger,
    body_of,
    delivered,
    make_many,
    make_verdicts,
    opened,
    receipt,
    waiting,
)
from tests.plans import assert_no_scan, plan, seen

KEPT = Retention(
    bodies=timedelta(days=30),
    bodies_of_dead_letters=timedelta(days=90),
    unwanted=timedelta(days=1),
    rows=timedelta(days=400),
    verdicts=timedelta(days=30),
    uses=timedelta(days=90),
)
BY = Author(who="anna", why="mended")


def prune(ledger: Ledger, maintenance: Maintenance | None = None) -> Pruned:
    """Run a whole round."""
    maintenance = maintenance or Maintenance(ledger.store, KEPT)
    total = Pruned()
    while True:
        step = ledger.do(maintenance.step())
        total = Pruned(
            bodies=total.bodies + step.bodies,
            notifications=total.notifications + step.notifications,
            verdicts=total.verdicts + step.verdicts,
            more=step.more,
        )
        if not step.more:
            return total


def after(ledger: Ledger, days: float) -> Pruned:
    ledger.clock.now = NOON + int(days * DAY)
    return prune(ledger)


def bodies(ledger: Ledger) -> list[str]:
    """Return the orders whose body is still stored."""
    return [row[0] for row in ledger.rows("SELECT order_id FROM notifications WHERE body IS NOT NULL ORDER BY id")]


def remembered(ledger: Ledger) -> list[str]:
    return [row[0] for row in ledger.rows("SELECT order_id FROM notifications ORDER BY id")]


def found(ledger: Ledger) -> list[str]:
    with ledger.store.read_connection() as connection:
        return faults(connection)


def command(ledger: Ledger, name: str, *ids: int, **more: Any) -> int:
    step = Step(matching=DeliveryFilter(ids=ids), by=BY, **more)
    return ledger.do(getattr(Commands(ledger.store), name)(step)).changed


def one_of_each(ledger: Ledger) -> None:
    """Fill the ledger with orders named after their state. Their notifications count from 1."""
    ledger.receive(receipt("unwanted"))
    for order in ("done", "dead", "waits", "stops", "held"):
        ledger.owed(1, order_id=order)
    claims = {claim.order_id: claim for claim in ledger.claim()}
    ledger.settle(claims["done"])
    ledger.settle(claims["dead"], REJECTED)
    ledger.settle(claims["waits"], waiting(NOON + 5000))
    ledger.settle(claims["stops"], UNKNOWN)


# --- bodies ---------------------------------------------------------------------------------------------------------


def test_the_words_of_a_destination_live_as_long_as_the_body(ledger: Ledger) -> None:
    refusal = Reject("destination-refused", "POST /orders was answered 422")
    refusal.explanation = "anna@shop.example is unknown"
    for order in ("done", "dead", "bodiless"):
        ledger.owed(1, order_id=order)
    ledger.rows("UPDATE notifications SET body = NULL WHERE order_id = 'bodiless'")
    claims = {claim.order_id: claim for claim in ledger.claim()}
    ledger.settle(claims["done"], Ends(Retry("destination-busy", "POST /orders was answered 503"), due=NOON))
    (again,) = ledger.claim()
    ledger.settle(again)
    for order in ("dead", "bodiless"):
        ledger.settle(claims[order], Ends(refusal, "rejected"))

    def messages() -> list[str | None]:
        return [row[0] for row in ledger.rows("SELECT message FROM attempts ORDER BY id")]

    of_busy, of_done, of_dead, of_bodiless = messages()
    assert of_busy == "POST /orders was answered 503"
    assert of_done is None
    assert of_dead == "POST /orders was answered 422: anna@shop.example is unknown"
    assert of_bodiless == "POST /orders was answered 422"
    after(ledger, 31)
    assert messages() == [None, None, of_dead, of_bodiless]
    after(ledger, 91)
    assert messages() == [None, None, None, of_bodiless]


def test_bodies_are_deleted_after_a_month_if_all_is_done_and_otherwise_after_three(ledger: Ledger) -> None:
    one_of_each(ledger)

    assert after(ledger, 1.1).bodies == 1
    assert after(ledger, 30) == Pruned()
    assert after(ledger, 30.1).bodies == 1
    assert bodies(ledger) == ["dead", "waits", "stops", "held"]
    assert after(ledger, 90).bodies == 0
    assert after(ledger, 90.1).bodies == 2
    assert bodies(ledger) == ["waits", "held"]
    assert after(ledger, 399).bodies == 0
    assert len(remembered(ledger)) == 6
    assert found(ledger) == []


def test_the_body_of_a_notification_that_no_route_wants_is_deleted_after_a_day(ledger: Ledger) -> None:
    one_of_each(ledger)
    ledger.receive(receipt("conflict", body=b'{"total": 1}'))
    ledger.receive(receipt("conflict", body=b'{"total": 2}', refetching=[ledger.export]))

    assert after(ledger, 1) == Pruned()
    assert after(ledger, 1.1).bodies == 2
    assert bodies(ledger) == ["done", "dead", "waits", "stops", "held", "conflict"]
    assert len(remembered(ledger)) == 8


def test_unwanted_bodies_are_found_among_many_by_their_index(ledger: Ledger) -> None:
    make_many(ledger, 20_000)
    ledger.rows("UPDATE notifications SET body = ''")
    for number in range(3):
        ledger.receive(receipt(f"unwanted-{number}"))
    ledger.clock.now += 2 * DAY

    maintenance = Maintenance(ledger.store, KEPT)
    statements = seen(ledger.store.engine, lambda: ledger.do(maintenance.step()))

    finding = [each for each in statements if "NOT notifications.is_wanted" in each[0]]
    assert finding
    for statement, parameters in finding:
        assert "ix_notifications_unwanted_bodies" in str(plan(ledger, statement, parameters))
    assert len(ledger.rows("SELECT 1 FROM notifications WHERE body IS NOT NULL")) == 20_000


def test_a_needed_body_is_deleted_once_nothing_waits_for_it(ledger: Ledger) -> None:
    one_of_each(ledger)
    maintenance = Maintenance(ledger.store, KEPT)
    ledger.clock.now = NOON + 100 * DAY
    prune(ledger, maintenance)
    assert bodies(ledger) == ["waits", "held"]

    ledger.settle(ledger.claim_one())
    prune(ledger, maintenance)

    assert bodies(ledger) == ["held"]


def test_a_dead_letter_that_is_discarded_loses_its_body_with_the_done(ledger: Ledger) -> None:
    one_of_each(ledger)
    after(ledger, 40)

    command(ledger, "discard", 2)
    after(ledger, 40)

    assert bodies(ledger) == ["waits", "stops", "held"]


def test_one_waiting_delivery_is_enough_to_keep_the_body(ledger: Ledger) -> None:
    ledger.receive(receipt(wanted=[(ledger.export, True), (ledger.history, False)]))
    ledger.settle(ledger.claim_one())

    assert after(ledger, 100).bodies == 0
    ledger.settle(ledger.claim_one(ledger.history))
    assert after(ledger, 100).bodies == 1


def test_the_body_of_a_retried_letter_stays(ledger: Ledger) -> None:
    one_of_each(ledger)
    ledger.clock.now = NOON + 89 * DAY
    command(ledger, "retry", 2)

    after(ledger, 95)

    assert "dead" in bodies(ledger)
    claims = {claim.order_id: claim for claim in ledger.claim()}
    assert claims["dead"].body == body_of("dead", 1)


def test_the_body_of_a_conflict_goes_like_any_other(ledger: Ledger) -> None:
    ledger.receive(receipt("order-1", body=b'{"total": 1}'))
    ledger.receive(receipt("order-1", body=b'{"total": 2}'))

    assert after(ledger, 31).bodies == 2


@pytest.mark.parametrize("days", [31, 91, 200])
def test_a_repeat_is_a_repeat_without_its_body(ledger: Ledger, days: int) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one())
    after(ledger, days)

    assert bodies(ledger) == []
    assert ledger.receive(receipt(wanted=[(ledger.export, True)])) is Received.REPEAT
    assert ledger.receive(receipt(body=b'{"another": 1}', wanted=[(ledger.export, True)])) is Received.REPEAT


# --- rows -----------------------------------------------------------------------------------------------------------


def test_after_400_days_only_waiting_and_stopping_deliveries_stay(ledger: Ledger) -> None:
    one_of_each(ledger)
    ledger.receive(receipt("unwanted", body=b'{"another": 1}'))
    assert after(ledger, 400).notifications == 0

    assert after(ledger, 400.1).notifications == 4

    assert remembered(ledger) == ["waits", "stops", "held"]
    assert [row[0] for row in ledger.rows("SELECT order_id FROM lanes ORDER BY id")] == ["waits", "stops", "held"]
    assert ledger.rows("SELECT count(*) FROM deliveries") == [(3,)]
    assert ledger.rows("SELECT count(*) FROM attempts") == [(2,)]
    assert ledger.rows("SELECT count(*) FROM queues") == [(3,)]
    assert found(ledger) == []


def test_rows_that_had_to_stay_are_looked_at_in_the_next_round(ledger: Ledger) -> None:
    one_of_each(ledger)
    maintenance = Maintenance(ledger.store, KEPT)
    ledger.clock.now = NOON + 401 * DAY
    prune(ledger, maintenance)

    ledger.settle(ledger.claim_one())
    command(ledger, "discard", 4)
    assert prune(ledger, maintenance).notifications == 2

    assert remembered(ledger) == ["held"]
    assert found(ledger) == []


def test_a_lane_with_a_younger_delivery_stays(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), delivered("shop-1"))
    ledger.clock.now = NOON + 300 * DAY
    ledger.owed(2)
    ledger.settle(ledger.claim_one())

    assert after(ledger, 401).notifications == 1
    ledger.owed(3)

    claim = ledger.claim_one()
    assert (claim.delivery_id, claim.number) == (3, 3)
    assert claim.previous is not None


def test_a_conflict_with_its_delivery_outlives_the_notification_that_it_contradicts(ledger: Ledger) -> None:
    ledger.receive(receipt("order-1", body=b'{"total": 1}'))
    ledger.clock.now = NOON + 300 * DAY
    ledger.receive(receipt("order-1", body=b'{"total": 2}', refetching=[ledger.export]))

    assert after(ledger, 401).notifications == 1
    assert ledger.rows("SELECT conflicts_with FROM notifications") == [(None,)]
    assert ledger.claim_one().body == b'{"total": 2}'


def test_an_event_is_new_again_once_its_row_is_gone(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one())
    wanted = [(ledger.export, True)]

    after(ledger, 400)
    before = ledger.receive(receipt(wanted=wanted))
    after(ledger, 401)
    again = ledger.receive(receipt(wanted=wanted))

    assert (before, again) == (Received.REPEAT, Received.NEW)
    assert ledger.settle(ledger.claim_one())


def test_a_repeat_does_not_keep_an_old_row_alive_nor_does_a_younger_notification(ledger: Ledger) -> None:
    ledger.receive(receipt("old"))
    ledger.clock.now = NOON + 399 * DAY
    ledger.receive(receipt("young"))
    ledger.receive(receipt("old"))

    assert after(ledger, 401).notifications == 1
    assert remembered(ledger) == ["young"]


# --- verdicts -------------------------------------------------------------------------------------------------------


def judge(ledger: Ledger, *orders: str) -> None:
    verdict_log = VerdictLog(ledger.store, dropped=lambda number: pytest.fail(f"{number} dropped"))
    for order in orders:
        verdict_log.record(msgspec.structs.replace(LATE, order_id=order))
    ledger.do(verdict_log.flush())


def test_a_verdict_goes_after_a_month(ledger: Ledger) -> None:
    judge(ledger, "old")
    ledger.clock.now += DAY
    judge(ledger, "young")

    assert after(ledger, 30) == Pruned()
    assert after(ledger, 30.1) == Pruned(verdicts=1)
    assert ledger.rows("SELECT order_id FROM verdicts") == [("young",)]


def test_of_many_verdicts_a_step_takes_a_few_and_scans_no_table(ledger: Ledger) -> None:
    make_verdicts(ledger, 50_000)
    ledger.clock.now += 30 * DAY - 1000 * (50_000 - room.VERDICTS_PER_STEP - 2)  # so many are old
    maintenance = Maintenance(ledger.store, KEPT)

    first: list[Pruned] = []
    statements = seen(ledger.store.engine, lambda: first.append(ledger.do(maintenance.step())))

    assert first == [Pruned(verdicts=room.VERDICTS_PER_STEP, more=True)]
    assert prune(ledger, maintenance).verdicts == 1
    assert ledger.rows("SELECT count(*) FROM verdicts") == [(50_000 - room.VERDICTS_PER_STEP - 1,)]
    for statement, parameters in statements:
        assert_no_scan(ledger, statement, parameters, ("verdicts",))


def test_a_flood_of_refusals_takes_the_place_of_the_oldest_verdicts(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MOST_VERDICTS", 300)
    judge(ledger, *(["before"] * 50), *(["flood"] * (room.VERDICTS_PER_STEP + 300)))

    maintenance = Maintenance(ledger.store, KEPT)
    first, rest = ledger.do(maintenance.step()), prune(ledger, maintenance)

    assert (first.verdicts, first.more, rest.verdicts) == (room.VERDICTS_PER_STEP, True, 50)
    assert ledger.rows("SELECT order_id, count(*) FROM verdicts GROUP BY order_id") == [("flood", 300)]


# --- in small steps -------------------------------------------------------------------------------------------------


def touched(ledger: Ledger, do: Callable[[], Any]) -> list[int]:
    """Collect the numbers of rows that the statements of the writer change."""
    counts: list[int] = []

    def hear(_connection: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith(("UPDATE", "DELETE", "INSERT")):
            counts.append(cursor.rowcount)

    event.listen(ledger.store.engine, "after_cursor_execute", hear)
    try:
        do()
    finally:
        event.remove(ledger.store.engine, "after_cursor_execute", hear)
    return counts


def test_of_a_hundred_thousand_a_step_touches_a_few_and_scans_no_table(ledger: Ledger) -> None:
    make_many(ledger, 100_000)
    ledger.clock.now = NOON + 401 * DAY
    maintenance = Maintenance(ledger.store, KEPT)
    statements = seen(ledger.store.engine, lambda: ledger.do(maintenance.step()))

    counts = touched(ledger, lambda: ledger.do(maintenance.step()))

    assert max(counts) == room.NOTIFICATIONS_PER_STEP
    assert sum(counts) <= 4 * room.NOTIFICATIONS_PER_STEP
    assert ledger.rows("SELECT count(*) FROM notifications") == [(100_000 - 2 * room.NOTIFICATIONS_PER_STEP,)]
    for statement, parameters in statements:
        assert_no_scan(ledger, statement, parameters)
    assert found(ledger) == []


def test_notifications_are_accepted_between_the_steps(ledger: Ledger) -> None:
    make_many(ledger, 1000)
    ledger.clock.now = NOON + 401 * DAY

    async def both() -> tuple[list[Pruned], list[Received]]:
        maintenance = Maintenance(ledger.store, KEPT)
        pruned: list[Pruned] = []
        received: list[Received] = []

        async def take_in() -> None:
            for number in range(20):
                # Some are orders whose lane is being taken away.
                order = f"done-{number * 50 + 1}"
                received.append(await ledger.inbox.receive(receipt(order, 2, wanted=[(ledger.export, True)])))

        taking = asyncio.create_task(take_in())
        while not pruned or pruned[-1].more:
            pruned.append(await maintenance.step())
        await taking
        return pruned, received

    pruned, received = ledger.do(both())

    assert [each.notifications for each in pruned] == [200] * 5 + [0]
    assert received == [Received.NEW] * 20
    assert len(ledger.claim()) == 20
    assert found(ledger) == []


def test_progress_survives_a_restart_because_none_is_kept(ledger: Ledger) -> None:
    make_many(ledger, 500)
    ledger.clock.now = NOON + 401 * DAY
    ledger.do(Maintenance(ledger.store, KEPT).step())

    assert prune(ledger, Maintenance(ledger.store, KEPT)).notifications == 300
    assert remembered(ledger) == []


def test_a_step_that_fails_is_done_again(ledger: Ledger) -> None:
    make_many(ledger, 250)
    ledger.clock.now = NOON + 401 * DAY
    maintenance = Maintenance(ledger.store, KEPT)
    ledger.rows("ALTER TABLE attempts RENAME TO elsewhere")
    with pytest.raises(Exception, match="attempts"):
        ledger.do(maintenance.step())
    ledger.rows("ALTER TABLE elsewhere RENAME TO attempts")

    assert prune(ledger, maintenance).notifications == 250


@contextlib.contextmanager
def second(ledger: Ledger) -> Iterator[Ledger]:
    """Yield another node on the same database."""
    with asyncio.Runner() as runner:
        clock = HandClock(ledger.clock.now)
        node = Ledger(ledger.url, clock, runner)
        try:
            yield node
        finally:
            node.store.close()


@contextlib.contextmanager
def on_postgres(postgres: Server) -> Iterator[Ledger]:
    url = postgres.fresh()
    try:
        with opened(url) as ledger:
            yield ledger
    finally:
        postgres.drop(url)


def beside(ledger: Ledger, inside: Callable[[Connection], Any], meanwhile: Callable[[Ledger], Any]) -> Any:
    """Run `there` on another node while a transaction here is done but not committed. Returns its result."""
    answers: list[Any] = []
    with second(ledger) as node, ledger.store.engine.connect() as connection:
        with connection.begin():
            inside(connection)
            thread = threading.Thread(target=lambda: answers.append(meanwhile(node)))
            thread.start()
            while not waits_for_a_lock(ledger.url):
                assert thread.is_alive(), "it did not wait"
        thread.join(30)
    ledger.do(ledger.lease.enter())  # the other one has seen that the lease of this one had ended
    return answers[0]


def test_an_accept_into_a_lane_that_is_being_deleted_loses_nothing(postgres: Server) -> None:
    with on_postgres(postgres) as ledger:
        ledger.owed(1)
        ledger.settle(ledger.claim_one())
        ledger.clock.now = NOON + 401 * DAY
        maintenance = Maintenance(ledger.store, KEPT)

        received = beside(
            ledger,
            lambda connection: maintenance._rows(connection, 0),
            lambda node: node.receive(receipt("order-1", 2, wanted=[(node.export, True)])),
        )

        assert received is Received.NEW
        assert remembered(ledger) == ["order-1"]
        assert ledger.claim_one().number == 1
        assert found(ledger) == []


def test_a_lane_into_which_something_is_accepted_meanwhile_is_not_deleted(postgres: Server) -> None:
    with on_postgres(postgres) as ledger:
        ledger.owed(1)
        ledger.settle(ledger.claim_one())
        ledger.clock.now = NOON + 401 * DAY
        new = receipt("order-1", 2, wanted=[(ledger.export, True)])

        pruned = beside(
            ledger,
            lambda connection: ledger.inbox._receive(connection, [new]),
            prune,
        )

        assert pruned.notifications == 1
        assert ledger.claim_one().number == 2
        assert found(ledger) == []


def test_a_letter_that_is_retried_meanwhile_is_not_deleted(postgres: Server) -> None:
    with on_postgres(postgres) as ledger:
        ledger.owed(1)
        ledger.settle(ledger.claim_one(), REJECTED)
        ledger.clock.now = NOON + 401 * DAY
        step = Step(matching=DeliveryFilter(ids=(1,)), by=BY)

        pruned = beside(
            ledger,
            lambda connection: Commands(ledger.store)._step(connection, "retry", step),
            prune,
        )

        assert (pruned.notifications, pruned.bodies) == (0, 0)
        assert ledger.claim_one().body is not None


def test_a_conflict_that_comes_meanwhile_stays(postgres: Server) -> None:
    with on_postgres(postgres) as ledger:
        ledger.receive(receipt("order-1", body=b'{"total": 1}', digest=b"1"))
        ledger.clock.now = NOON + 401 * DAY
        conflict = receipt("order-1", body=b'{"total": 2}', digest=b"2")

        pruned = beside(
            ledger,
            lambda connection: ledger.inbox._receive(connection, [conflict]),
            prune,
        )

        assert pruned.notifications == 1
        assert ledger.rows("SELECT conflicts_with, body FROM notifications") == [(None, b'{"total": 2}')]


def test_two_nodes_prune_at_once(postgres: Server) -> None:
    with on_postgres(postgres) as ledger, second(ledger) as node:
        make_many(ledger, 1000)
        ledger.clock.now = node.clock.now = NOON + 401 * DAY
        done: list[Pruned] = []
        threads = [threading.Thread(target=lambda each=each: done.append(prune(each))) for each in (ledger, node)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert len(done) == 2
        assert sum(each.notifications for each in done) == 1000
        assert remembered(ledger) == []


# --- faults ---------------------------------------------------------------------------------------------------------

PLANTED = {
    "a lane with work that is never claimed": (
        "UPDATE lanes SET next_at = NULL, current_delivery_id = NULL WHERE order_id = 'waits'",
        "lanes that no process will claim although a delivery waits: 1",
    ),
    "a lane that waits for what is done": (
        "UPDATE deliveries SET state = 'done', reason = 'discarded' WHERE id = 4",
        "lanes that no process will claim although a delivery waits: 1",
    ),
    "a lane stopped by what waits": (
        "UPDATE lanes SET next_at = NULL WHERE order_id = 'waits'",
        "lanes that no process will claim although a delivery waits: 1",
    ),
    "a holder that is not there": (
        "UPDATE lanes SET holder = 4711 WHERE order_id = 'held'",
        "lanes held by an unknown process: 1",
    ),
    "a delivery that is not there": (
        "UPDATE lanes SET current_delivery_id = 4711 WHERE order_id IN ('held', 'stops')",
        "lanes whose current delivery is missing: 2",
    ),
    "a delivery of another lane": (
        "UPDATE lanes SET current_delivery_id = 1 WHERE order_id = 'held'",
        "lanes whose current delivery is missing: 1",
    ),
    "more settled than claimed": (
        "UPDATE lanes SET settled = claim + 1 WHERE order_id = 'done'",
        "lanes with more settled claims than claims: 1",
    ),
    "an unknown state": (
        "UPDATE deliveries SET state = 'lost' WHERE id = 1",
        "deliveries with an unknown state: 1",
    ),
    "an end without a reason": (
        "UPDATE deliveries SET reason = NULL WHERE id IN (1, 2)",
        "finished deliveries without a reason: 2",
    ),
    "a pause without a cause": (
        "UPDATE queues SET paused_until = 1",
        "paused queues without a cause: 3",
    ),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_each_kind_of_fault_is_found(ledger: Ledger, planted: tuple[str, str]) -> None:
    one_of_each(ledger)
    sql, words = planted

    ledger.rows(sql)

    assert found(ledger) == [words]


def test_nothing_is_found_in_a_ledger_that_is_well(ledger: Ledger) -> None:
    assert found(ledger) == []
    one_of_each(ledger)
    ledger.owed(2, order_id="stops")
    ledger.owed(1, order_id="broken-credentials")
    (claim,) = ledger.claim()
    ledger.settle(claim, MISCONFIGURED)
    assert found(ledger) == []
    after = ledger.reopened()
    try:
        assert found(after) == []
    finally:
        after.store.close()
        ledger.store = Store.open(ledger.url, clock=ledger.clock)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("sql", "words"),
    [
        (
            "DELETE FROM notifications WHERE id = 2",
            ["rows of deliveries with a reference to a missing row of notifications"],
        ),
        ("DELETE FROM deliveries WHERE id = 1", ["rows of attempts with a reference to a missing row of deliveries"]),
        (
            "DELETE FROM lanes WHERE order_id = 'done'",
            ["rows of deliveries with a reference to a missing row of lanes"],
        ),
    ],
)
def test_dangling_references_are_found_on_sqlite(ledger: Ledger, sql: str, words: list[str]) -> None:
    one_of_each(ledger)

    ledger.rows(sql)

    assert found(ledger) == words


def test_a_file_that_is_broken_is_found(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/a.db") as ledger:
        make_many(ledger, 2000)
        ledger.store.close()
        ledger.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        root = ledger.rows("SELECT rootpage FROM sqlite_master WHERE name = 'ix_deliveries_lane_id'")[0][0]
        with (tmp_path / "a.db").open("r+b") as file:
            file.seek(root * 4096 - 60)
            file.write(b"\xff" * 50)
        with open_for_reading(ledger.url).connect() as connection:
            try:
                said = faults(connection)
            except Exception as error:  # noqa: BLE001 - so broken that it cannot be read at all
                said = [str(error)]
        ledger.store = Store.open(f"sqlite:///{tmp_path}/b.db", clock=ledger.clock)

    assert said


# --- figures and backup ---------------------------------------------------------------------------------------------


def test_figures_count_rows_and_bodies(ledger: Ledger) -> None:
    one_of_each(ledger)
    after(ledger, 31)

    with ledger.store.read_connection() as connection:
        told = figures(connection)

    size = told.pop("bytes")
    assert told == {
        "notifications": 6, "deliveries": 5, "attempts": 4, "lanes": 5, "queues": 3, "verdicts": 0,
        "bodies": 4,
    }  # fmt: skip
    assert size > 8192


@pytest.fixture
def in_a_file(tmp_path: Path) -> Iterator[Ledger]:
    with opened(f"sqlite:///{tmp_path}/adapter.db") as ledger:
        yield ledger


def backed_up(ledger: Ledger, target: Path) -> int:
    with open_for_reading(ledger.url).connect() as connection:
        return back_up(connection, target)


def test_a_backup_of_a_live_store_opens_and_is_equal(in_a_file: Ledger, tmp_path: Path) -> None:
    one_of_each(in_a_file)
    target = tmp_path / "copy.db"
    with in_a_file.store.engine.connect() as writer, writer.begin() as under_way:
        writer.exec_driver_sql("DELETE FROM attempts")
        size = backed_up(in_a_file, target)  # nothing of it is copied
        under_way.rollback()

    assert size == target.stat().st_size
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    assert target.stat().st_mode & 0o077 == 0
    copied = f"sqlite:///{target}"
    for table in ("notifications", "deliveries", "lanes", "queues", "watermarks"):
        assert rows(copied, f"SELECT * FROM {table}") == in_a_file.rows(f"SELECT * FROM {table}")
    assert rows(copied, "SELECT count(*) FROM attempts") == [(4,)]
    with asyncio.Runner() as runner:
        restored = Ledger(copied, in_a_file.clock, runner)
        restored.clock.now += HOUR
        assert sorted(claim.order_id for claim in restored.claim()) == ["held", "waits"]
        assert found(restored) == []
        restored.store.close()


def test_a_backup_overwrites_nothing(in_a_file: Ledger, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_text("precious")

    with pytest.raises(FileExistsError, match="exists already"):
        backed_up(in_a_file, target)

    assert target.read_text() == "precious"


def test_a_broken_off_backup_does_not_block_the_next(in_a_file: Ledger, tmp_path: Path) -> None:
    (tmp_path / "copy.db.partial").write_text("half")

    assert backed_up(in_a_file, tmp_path / "copy.db") > 0


def test_a_backup_that_cannot_be_written_says_so(in_a_file: Ledger, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot write"):
        backed_up(in_a_file, tmp_path / "no" / "such" / "folder" / "copy.db")


def test_the_files_of_a_backup_hold_no_bodies_that_were_pruned(in_a_file: Ledger, tmp_path: Path) -> None:
    in_a_file.receive(receipt(body=b'{"name": "canary of a shopper"}'))
    after(in_a_file, 31)

    backed_up(in_a_file, tmp_path / "copy.db")

    assert b"canary" not in (tmp_path / "copy.db").read_bytes()
