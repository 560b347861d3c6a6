"""
One lease a process, not one a lane: while it lasts the process's lanes are its own; when it ends they are free.

It is timed by the ledger's one clock and renewed by a heartbeat. A SQLite file has one process only, the one that holds
its lock: whoever comes next knows that the others are dead.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select, update

from adapter.ledger.schema import lanes, processes
from adapter.ledger.store import Store

LEASE_MS = 15_000


class Lease:
    """This process's. `enter` first; `process_id` is what its lanes are held by, and `until` when they fall free."""

    def __init__(self, store: Store, *, version: str) -> None:
        self._store = store
        self._clock = store.clock
        self._version = version
        self.process_id = 0
        self.until = 0

    async def enter(self) -> None:
        """Begins a lease, under a new process id. Raises `StoreUnavailable`."""
        self.process_id, self.until = await self._store.write(self._enter, None)

    async def renew(self) -> bool:
        """
        The heartbeat; it also frees what dead processes held, and finds a store healed. False where the lease is lost:
        others have its lanes, and it takes `enter` to go on. Raises `StoreUnavailable`.
        """
        until = await self._store.write(self._renew, None)
        self.until = until or self.until
        return until is not None

    # --- in the writer's thread, inside its transaction ---

    def _enter(self, connection: Connection, items: Sequence[None]) -> list[tuple[int, int]]:
        now = self._clock.read(connection)
        if not self._store.shared:
            connection.execute(delete(processes))
        _bury_the_dead(connection, now)
        row = {"started_at": now, "lease_until": now + LEASE_MS, "version": self._version}
        entered = connection.execute(insert(processes).values(row)).inserted_primary_key
        assert entered is not None
        return [(entered[0], now + LEASE_MS) for _ in items]

    def _renew(self, connection: Connection, items: Sequence[None]) -> list[int | None]:
        now = self._clock.read(connection)
        mine = update(processes).where(processes.c.id == self.process_id)
        renewed = connection.execute(mine.values(lease_until=now + LEASE_MS)).rowcount == 1
        _bury_the_dead(connection, now)
        return [now + LEASE_MS if renewed else None for _ in items]


def _bury_the_dead(connection: Connection, now: int) -> None:
    connection.execute(delete(processes).where(processes.c.lease_until < now))
    nobody = ~select(processes.c.id).where(processes.c.id == lanes.c.holder).exists()
    connection.execute(update(lanes).where(lanes.c.holder.is_not(None), nobody).values(holder=None))
