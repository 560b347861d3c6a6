"""The lease of a process, under which it holds its lanes. When it ends, they are free.

A process has one lease, timed by the ledger's clock and renewed by a heartbeat; lanes have none. On SQLite only one
process can hold the file's lock, so a process that starts knows that all earlier ones are dead.
"""

from sqlalchemy import Connection, delete, insert, select, update

from adapter.ledger.schema import lanes, processes
from adapter.ledger.settlement import FOR_EVER
from adapter.ledger.store import Store

LEASE_MS = 15_000
ENDED = -1  # in place of `lease_until`, once other processes have taken the lanes


class Lease:
    """The lease of this process. Call `enter` before anything else."""

    def __init__(self, store: Store, *, version: str) -> None:
        self._store = store
        self._clock = store.clock
        self._version = version
        self.process_id = 0  # the holder of its lanes
        self.until = 0  # the end of the lease, in milliseconds

    async def enter(self) -> None:
        """Begin a lease under a new process id. Raises `StoreUnavailable`."""
        self.process_id, self.until = await self._store.run(self._enter)

    async def renew(self) -> bool:
        """Renew the lease (the heartbeat), and free the lanes of processes whose lease has ended.

        Returns False if this lease has ended: other processes have the lanes, and only `enter` gives a new one. Raises
        `StoreUnavailable`.
        """
        until = await self._store.run(self._renew)
        self.until = until or self.until
        return until is not None

    # --- in the writer's thread, inside its transaction ---

    def _enter(self, connection: Connection) -> tuple[int, int]:
        now = self._clock.read(connection)
        _release_expired_leases(connection, now if self._store.shared else FOR_EVER)
        row = {"started_at": now, "lease_until": now + LEASE_MS, "version": self._version}
        entered = connection.execute(insert(processes).values(row)).inserted_primary_key
        assert entered is not None
        return entered[0], now + LEASE_MS

    def _renew(self, connection: Connection) -> int | None:
        now = self._clock.read(connection)
        own = (processes.c.id == self.process_id) & (processes.c.lease_until > ENDED)
        renewed = connection.execute(update(processes).where(own).values(lease_until=now + LEASE_MS)).rowcount == 1
        _release_expired_leases(connection, now)
        return now + LEASE_MS if renewed else None


def _release_expired_leases(connection: Connection, now: int) -> None:
    """Free the lanes of processes whose lease has ended.

    This waits for no lock: a process that others handle or that renews its lease after all is skipped, and so is a lane
    that is being written. The next heartbeat returns to it; until then, its holder stays in the table as ended.
    """
    p, process_ids = processes.c, select(processes.c.id)
    expired = process_ids.where(p.lease_until < now).order_by(p.id).with_for_update(skip_locked=True)
    ended = set(connection.execute(expired).scalars())
    unknown = (lanes.c.holder > 0) & ~process_ids.where(p.id == lanes.c.holder).exists()
    gone = ended | set(connection.execute(select(lanes.c.holder).where(unknown).distinct()).scalars())
    if not gone:
        return
    held = select(lanes.c.id).where(lanes.c.holder.in_(gone)).order_by(lanes.c.queue_id, lanes.c.order_id)
    free = connection.execute(held.with_for_update(skip_locked=True)).scalars().all()
    connection.execute(update(lanes).where(lanes.c.id.in_(free)).values(holder=None))
    connection.execute(update(processes).where(p.id.in_(ended)).values(lease_until=ENDED))
    still_holds = select(lanes.c.id).where(lanes.c.holder == p.id).exists()
    connection.execute(delete(processes).where(p.id.in_(ended), ~still_holds))
