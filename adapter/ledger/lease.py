"""
One lease a process, not one a lane: while it lasts the process's lanes are its own; when it ends they are free.

It is timed by the ledger's one clock and renewed by a heartbeat. A SQLite file has one process only, the one that holds
its lock: whoever comes next knows that the others are dead.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select, update

from adapter.ledger.schema import lanes, processes
from adapter.ledger.settlement import FOR_EVER
from adapter.ledger.store import Store

LEASE_MS = 15_000
BURIED = -1  # in place of a lease: it will not be renewed


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
        _bury_the_dead(connection, now if self._store.shared else FOR_EVER)
        row = {"started_at": now, "lease_until": now + LEASE_MS, "version": self._version}
        entered = connection.execute(insert(processes).values(row)).inserted_primary_key
        assert entered is not None
        return [(entered[0], now + LEASE_MS) for _ in items]

    def _renew(self, connection: Connection, items: Sequence[None]) -> list[int | None]:
        now = self._clock.read(connection)
        mine = (processes.c.id == self.process_id) & (processes.c.lease_until > BURIED)
        renewed = connection.execute(update(processes).where(mine).values(lease_until=now + LEASE_MS)).rowcount == 1
        _bury_the_dead(connection, now)
        return [now + LEASE_MS if renewed else None for _ in items]


def _bury_the_dead(connection: Connection, now: int) -> None:
    """
    Frees what they held. Waits for nobody: neither for one that is being buried by others or renews after all, nor for
    a lane that is being written; the next beat comes back for it, and until then its holder stays known as buried.
    """
    p, known = processes.c, select(processes.c.id)
    ended = known.where(p.lease_until < now).order_by(p.id).with_for_update(skip_locked=True)
    dead = set(connection.execute(ended).scalars())
    unknown = (lanes.c.holder > 0) & ~known.where(p.id == lanes.c.holder).exists()
    gone = dead | set(connection.execute(select(lanes.c.holder).where(unknown).distinct()).scalars())
    if not gone:
        return
    held = select(lanes.c.id).where(lanes.c.holder.in_(gone)).order_by(lanes.c.queue_id, lanes.c.order_id)
    free = connection.execute(held.with_for_update(skip_locked=True)).scalars().all()
    connection.execute(update(lanes).where(lanes.c.id.in_(free)).values(holder=None))
    connection.execute(update(processes).where(p.id.in_(dead)).values(lease_until=BURIED))
    still_holds = select(lanes.c.id).where(lanes.c.holder == p.id).exists()
    connection.execute(delete(processes).where(p.id.in_(dead), ~still_holds))
