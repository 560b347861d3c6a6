"""The binding: a ledger belongs to one Norce and one adapter id."""

import asyncio

import pytest

from adapter.ledger.binding import Binding, BoundToAnother, adopt, bind
from adapter.ledger.queries import Author
from adapter.ledger.store import Store, StoreInUse
from tests.databases import Server, rows
from tests.ledgers import HandClock, Ledger

STAGE, PRODUCTION = Binding("stage", "an_adapter"), Binding("production", "an_adapter")
BY = Author(who="anna", why="the shop goes live")


def bound(ledger: Ledger) -> list[tuple[str, str]]:
    return ledger.rows("SELECT norce, adapter_id FROM bindings")


def test_the_first_start_binds_the_ledger_and_later_ones_check_it(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.do(bind(ledger.store, STAGE))

    assert bound(ledger) == [STAGE]


@pytest.mark.parametrize("given", [PRODUCTION, Binding("stage", "another_adapter")], ids=["Norce", "adapter id"])
def test_another_norce_is_refused_with_both_and_the_remedy(ledger: Ledger, given: Binding) -> None:
    ledger.do(bind(ledger.store, STAGE))

    with pytest.raises(BoundToAnother) as raised:
        ledger.do(bind(ledger.store, given))

    for part in ("adapter an_adapter at stage", f"adapter {given.adapter_id} at {given.norce}", "store adopt"):
        assert part in str(raised.value)
    assert bound(ledger) == [STAGE]


def test_a_person_changes_the_binding_and_what_was_read_from_the_former_norce_goes(ledger: Ledger) -> None:
    ledger.do(bind(ledger.store, STAGE))
    ledger.rows("INSERT INTO documents (merchant, channel, content) VALUES ('fjallboden', '1', '')")
    ledger.rows("INSERT INTO watermarks (name, value) VALUES ('reconciled fjallboden', 1), ('reconciliation', 2)")

    former = ledger.do(adopt(ledger.store, PRODUCTION, BY))

    assert (former, bound(ledger)) == (STAGE, [PRODUCTION])
    assert ledger.rows("SELECT count(*) FROM documents") == [(0,)]
    kept = ledger.rows("SELECT name FROM watermarks ORDER BY name")
    assert kept == [("clock_latest",), ("clock_offset",)]  # without them, leases could end early
    assert ledger.rows("SELECT command, who, why, matching FROM actions") == [
        ("adopt", *(BY.who, BY.why), '{"from":"adapter an_adapter at stage","to":"adapter an_adapter at production"}')
    ]
    ledger.do(bind(ledger.store, PRODUCTION))


def test_the_first_of_several_nodes_binds_and_one_with_another_norce_is_refused(postgres: Server) -> None:
    url = postgres.fresh()
    stores: list[Store] = []
    try:

        async def start_all() -> list[BaseException | None]:
            stores.extend(Store.open(url, clock=HandClock()) for _ in range(4))
            given = (STAGE, STAGE, PRODUCTION, PRODUCTION)
            starts = (bind(store, each) for store, each in zip(stores, given, strict=True))
            return await asyncio.gather(*starts, return_exceptions=True)

        ended = asyncio.run(start_all())

        refused = [each for each, error in zip((STAGE, STAGE, PRODUCTION, PRODUCTION), ended, strict=True) if error]
        assert len(refused) == 2
        assert len(set(refused)) == 1
        assert rows(url, "SELECT norce FROM bindings") != [(refused[0].norce,)]
    finally:
        for store in stores:
            store.close()
        postgres.drop(url)


def test_a_ledger_that_another_node_uses_is_not_adopted(postgres: Server) -> None:
    url = postgres.fresh()
    try:

        async def adopt_beside_a_node() -> None:
            node, other = (Store.open(url, clock=HandClock()) for _ in range(2))
            try:
                await bind(node, STAGE)
                await adopt(other, PRODUCTION, BY)
            finally:
                node.close()
                other.close()

        with pytest.raises(StoreInUse, match="stop it first"):
            asyncio.run(adopt_beside_a_node())
        assert rows(url, "SELECT norce FROM bindings") == [("stage",)]
    finally:
        postgres.drop(url)
