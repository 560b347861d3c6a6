"""The binding: the one Norce, and our adapter id there, whose orders a ledger holds.

With another Norce, every order that waits would be read, exported or refused by mistake, and an event of the other
Norce could count as a repeat. So a ledger is bound at its first start, and only a person changes that.
"""

from typing import NamedTuple

from sqlalchemy import Connection, delete, select, text, update

from adapter.ledger.clock import LATEST, OFFSET
from adapter.ledger.commands import record_action
from adapter.ledger.queries import Author
from adapter.ledger.schema import bindings, documents, watermarks
from adapter.ledger.store import Store, StoreInUse

# A second node that starts at the same moment waits here for the first.
BIND = text("INSERT INTO bindings (id, norce, adapter_id) VALUES (1, :norce, :adapter_id) ON CONFLICT (id) DO NOTHING")


class Binding(NamedTuple):
    """A Norce, as its environment or address, and our adapter id there."""

    norce: str
    adapter_id: str

    def __str__(self) -> str:
        return f"adapter {self.adapter_id} at {self.norce}"


class BoundToAnother(Exception):
    """The ledger belongs to another Norce.

    Use a ledger of its own, or change this one with `store adopt`.
    """

    def __init__(self, location: str, bound: Binding, given: Binding) -> None:
        super().__init__(
            f"{location} belongs to {bound}, and the configuration names {given}: use another database (store.url), "
            "or run `norce-adapter store adopt` if this one is to change over"
        )


def binding(connection: Connection) -> Binding | None:
    """Return the binding of a ledger, or None before its first start."""
    row = connection.execute(select(bindings.c.norce, bindings.c.adapter_id)).first()
    return None if row is None else Binding(*row)


async def bind(store: Store, given: Binding) -> None:
    """Bind a ledger at its first start. Later, check the binding.

    Raises:
        BoundToAnother: The ledger belongs to another Norce.
        StoreUnavailable: Nothing was checked.
    """

    def bound(connection: Connection) -> Binding | None:
        connection.execute(BIND, given._asdict())
        return binding(connection)

    if (found := await store.run(bound)) is not None and found != given:
        raise BoundToAnother(store.database.location, found, given)


async def adopt(store: Store, given: Binding, by: Author) -> Binding | None:
    """Bind a ledger to another Norce, and record who did it. Return the former binding.

    The configuration documents of the former Norce and the progress of reconciliation in its lists are deleted: both
    begin again, as at a first start.

    Raises:
        StoreInUse: Another process uses the database.
        StoreUnavailable: Nothing was changed.
    """

    def change(connection: Connection) -> Binding | None:
        if not store.database.is_sole_process(connection):
            raise StoreInUse(f"another process uses {store.database.location}; stop it first")
        former = binding(connection)
        if former != given:
            connection.execute(BIND, given._asdict())
            connection.execute(update(bindings).values(given._asdict()))
            connection.execute(delete(documents))
            connection.execute(delete(watermarks).where(watermarks.c.name.not_in((LATEST, OFFSET))))
            changed = {"from": None if former is None else str(former), "to": str(given)}
            record_action(connection, "adopt", by, changed, 1, store.clock())
        return former

    return await store.run(change)
