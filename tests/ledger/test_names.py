"""The memory of names and of their calls, on both stores."""

import asyncio
from datetime import timedelta

import pytest

from adapter.identifiers import Channel
from adapter.ledger.maintenance import Maintenance, Retention
from adapter.ledger.names import KindChanged, KnownNames, Names
from adapter.ledger.store import Store
from adapter.ledger.uses import DAY_MS, MOST_DIFFERENT, RecentUse, Uses, recent_uses
from tests.databases import Server
from tests.ledgers import DAY, NOON, HandClock, Ledger

HERE, THERE = Channel("fjallboden", "1"), Channel("annan", "1")
RULES, CART = {"order-rules": "validation"}, {"cart-changed": "hook"}


def added(ledger: Ledger, callbacks: dict[str, str], *channels: Channel) -> KnownNames:
    names = Names(ledger.store)
    ledger.do(names.add(callbacks, channels))
    return names.known


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_stay_known_after_they_are_removed_from_the_configuration(ledger: Ledger) -> None:
    added(ledger, RULES, HERE)

    known = added(ledger, CART, THERE)

    assert known == KnownNames(RULES | CART, frozenset({HERE, THERE}))


def test_another_kind_for_a_known_name_is_refused_and_nothing_is_stored(ledger: Ledger) -> None:
    added(ledger, RULES)

    with pytest.raises(KindChanged) as raised:
        added(ledger, {"order-rules": "hook", "cart-changed": "hook"})

    assert raised.value.known == {"order-rules": "validation"}
    assert added(ledger, {}) == KnownNames(RULES, frozenset())


def test_a_channel_may_have_the_name_of_a_callback(ledger: Ledger) -> None:
    assert added(ledger, RULES, Channel("order-rules", "order-rules")).callbacks == RULES


def test_nodes_that_start_at_once_store_each_name_once(postgres: Server) -> None:
    url = postgres.fresh()
    stores: list[Store] = []
    try:

        async def start_all() -> list[KnownNames]:
            stores.extend(Store.open(url, clock=HandClock()) for _ in range(4))
            nodes = [Names(store) for store in stores]
            channels = [Channel("fjallboden", str(number)) for number in range(50)]
            await asyncio.gather(*(node.add(RULES, order) for node in nodes for order in (channels, channels[::-1])))
            return [node.known for node in nodes]

        known = asyncio.run(start_all())

        assert {(len(each.channels), *each.callbacks) for each in known} == {(50, "order-rules")}
    finally:
        for store in stores:
            store.close()
        postgres.drop(url)


# --- uses -------------------------------------------------------------------------------------------------------------


def recent(ledger: Ledger) -> list[RecentUse]:
    with ledger.store.read_connection() as connection:
        return recent_uses(connection, ledger.clock.now)


def test_calls_add_up_over_days_and_nodes(ledger: Ledger) -> None:
    nodes = [Uses(ledger.store), Uses(ledger.store)]
    for day in range(9):
        ledger.clock.now = NOON + day * DAY
        for node in nodes:
            node.record("order-rules", HERE, "k1")
            node.record("order-rules", THERE, "")
            ledger.do(node.flush())

    assert recent(ledger) == [
        RecentUse(callback="order-rules", channel=channel, key=key, calls=14, today=2, last_at=NOON + 8 * DAY)
        for channel, key in ((THERE, ""), (HERE, "k1"))
    ]
    assert len(ledger.rows("SELECT day FROM uses")) == 18


def test_calls_are_written_in_the_background_and_the_rest_at_the_end(ledger: Ledger) -> None:
    uses = Uses(ledger.store, gather_for=timedelta(0))

    async def run() -> None:
        task = asyncio.create_task(uses.run())
        uses.record("order-rules", HERE, "k1")
        while not await asyncio.to_thread(recent, ledger):  # noqa: ASYNC110 - what it waits for is in a database
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        uses.record("order-rules", HERE, "k1")
        await uses.flush()

    ledger.do(run())

    assert [use.calls for use in recent(ledger)] == [2]


def test_calls_wait_in_memory_while_the_ledger_fails_and_are_bounded(ledger: Ledger) -> None:
    uses = Uses(ledger.store)
    ledger.store.capacity = 0
    uses.record("order-rules", HERE, "k1")
    ledger.do(uses.flush())
    for number in range(MOST_DIFFERENT + 100):
        uses.record(f"name-{number}", HERE, "k1")
    uses.record("order-rules", HERE, "k1")
    ledger.do(uses.flush())
    ledger.store.capacity = 4000

    ledger.do(uses.flush())

    assert len(recent(ledger)) == MOST_DIFFERENT
    assert [use.calls for use in recent(ledger) if use.callback == "order-rules"] == [2]


def test_calls_are_forgotten_after_their_retention(ledger: Ledger) -> None:
    uses = Uses(ledger.store)
    for day in (0, 10):
        ledger.clock.now = NOON + day * DAY
        uses.record("order-rules", HERE, "k1")
        ledger.do(uses.flush())
    long = timedelta(days=400)
    retention = Retention(
        bodies=long, bodies_of_dead_letters=long, unwanted=long, rows=long, verdicts=long, uses=timedelta(days=9)
    )

    ledger.do(Maintenance(ledger.store, retention).step())

    assert ledger.rows("SELECT day FROM uses") == [((NOON + 10 * DAY) // DAY_MS,)]
