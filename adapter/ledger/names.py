"""The names that were ever configured: callbacks with their kinds, and channels.

Registrations stay on open orders when a name is renamed or removed, and only the kind says how to answer their calls.
So every configured name is stored at each start, and none is ever deleted. This process reads them into memory: the
calls need no ledger.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection, select

from adapter.identifiers import Channel
from adapter.ledger.schema import names
from adapter.ledger.store import Store, StoreUnavailable

CHANNEL = "channel"  # in place of the kind of a callback
BETWEEN_READINGS = timedelta(minutes=1)  # of the names that other nodes add


@dataclass(frozen=True, slots=True)
class KnownNames:
    """The callbacks and channels of all configurations that a ledger has seen.

    The callbacks have their kinds.
    """

    callbacks: Mapping[str, str]
    channels: frozenset[Channel]

    def other_kinds(self, callbacks: Mapping[str, str]) -> dict[str, str]:
        """Return the known kinds of those callbacks that have another kind now."""
        known = {name: self.callbacks.get(name, kind) for name, kind in callbacks.items()}
        return {name: kind for name, kind in known.items() if kind != callbacks[name]}


class KindChanged(Exception):
    """A callback has another kind than before.

    Give it another name, because open orders carry the old one.

    `known` has the former kinds by the names.
    """

    def __init__(self, known: Mapping[str, str]) -> None:
        super().__init__(", ".join(f"{name} was a {kind}" for name, kind in known.items()))
        self.known = known


def known_names(connection: Connection) -> KnownNames:
    """Read the names of a ledger."""
    rows = connection.execute(select(names)).all()
    return KnownNames(
        {row.name: row.kind for row in rows if row.kind != CHANNEL},
        frozenset(Channel(row.merchant, row.name) for row in rows if row.kind == CHANNEL),
    )


class Names:
    """The names that the ledger knows, in memory. Call `add` before anything else."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.known = KnownNames({}, frozenset())
        self._insert = store.database.inserter(
            names, ("merchant", "name", "kind"), "ON CONFLICT (merchant, name) DO NOTHING"
        )

    async def add(self, callbacks: Mapping[str, str], channels: Iterable[Channel]) -> None:
        """Store configured names, and read all that are stored.

        Args:
            callbacks: The kinds of the callbacks by their names.
            channels: The channels.

        Raises:
            KindChanged: A callback is stored with another kind. Nothing was stored.
            StoreUnavailable: Nothing was stored.
        """
        rows = [("", name, kind) for name, kind in callbacks.items()]
        rows += [(*channel, CHANNEL) for channel in channels]

        def insert(connection: Connection) -> KnownNames:
            self._insert(connection.connection.cursor(), sorted(rows))  # nodes that start at once lock in one order
            known = known_names(connection)
            if other := known.other_kinds(callbacks):
                raise KindChanged(other)
            return known

        self.known = await self._store.run(insert)

    async def keep_up_to_date(self) -> None:
        """Read the names that other nodes add, until cancelled."""
        while True:
            await asyncio.sleep(BETWEEN_READINGS.total_seconds())
            try:
                self.known = await self._store.run(known_names)
            except StoreUnavailable:  # logged by the store
                continue
