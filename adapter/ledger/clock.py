"""The ledger's clock, in milliseconds since 1970, which no jump of a wall clock affects.

Between readings it runs on this machine's monotonic clock. At each reading (every heartbeat) it follows the wall clock
of the database's machine, so that all nodes agree. It does not follow a jump of that clock. A jump forwards would end
all leases and doubts at once, and another node would send an order while the first request is still under way; a jump
backwards would hold back all due work. The node that notices a jump first stores the offset between the ledger and the
wall clock. Later readings reduce it in small steps.
"""

import time
from collections.abc import Callable

import structlog
from sqlalchemy import Connection, Select, select

from adapter.ledger.databases import Database
from adapter.ledger.schema import watermarks

log = structlog.get_logger(__name__)

JUMP_MS = 10_000  # longer than machines and networks delay a reading
BETWEEN_READINGS_MS = 5_000
MAX_STEP_MS = 500  # and at most a tenth of the time that has passed: no lease ends early, however many nodes read
LATEST, OFFSET = "clock_latest", "clock_offset"


def _monotonic() -> int:
    # Unlike `time.monotonic`, this continues while the machine is suspended, as the clocks of other machines do.
    number = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime_ns(number) // 1_000_000


class Clock:
    """A clock that must be read once before it can be called.

    Args:
        wall_clock: Returns the wall clock of the database's machine, in milliseconds since 1970.
        monotonic: Returns milliseconds since any moment.
    """

    def __init__(self, wall_clock: Callable[[Connection], int], monotonic: Callable[[], int] = _monotonic) -> None:
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._origin: int | None = None  # the moment at which `monotonic` was 0
        self._latest = 0

    @classmethod
    def of(cls, database: Database) -> "Clock":
        """Return the clock of this database."""
        return cls(database.wall_clock)

    def __call__(self) -> int:
        assert self._origin is not None, "the clock has not been read yet"
        self._latest = max(self._latest, self._origin + self._monotonic())  # a correction never makes it go back
        return self._latest

    def read(self, connection: Connection, *, alone: bool = False) -> int:
        """Follow the wall clock, store the reading and return the moment.

        Args:
            connection: A connection inside a transaction.
            alone: No other process uses the ledger, so this process may follow a wall clock that is ahead at once.
        """
        # Locked before the wall clock is read: nodes read one after another, and each sees the previous reading. A
        # node that has read before does not wait for the lock, because its holder may have been stopped.
        locked = _select(OFFSET).with_for_update(skip_locked=self._origin is not None)
        offset = connection.execute(locked).scalar_one_or_none()
        if offset is None:
            return self()
        latest = connection.execute(_select(LATEST)).scalar_one()
        wall, monotonic = self._wall_clock(connection), self._monotonic()
        if self._origin is None:
            moment = _first_moment(wall, 0 if alone else offset, latest, alone=alone)
        else:
            moment, expected = wall + offset, self._origin + monotonic
            is_off = abs(moment - expected) > JUMP_MS
            if is_off and not 0 <= moment - latest <= JUMP_MS:
                log.warning("wall_clock_jumped", milliseconds=moment - expected)
                moment = expected
            elif is_off:  # the wall clock agrees with the readings of other nodes: this node was suspended
                log.warning("node_clock_was_off", milliseconds=expected - moment)
                self._latest = moment
            else:
                step = min(MAX_STEP_MS, max(moment - latest, 0) // 10)
                moment -= max(-step, min(step, offset))
        self._origin = moment - monotonic
        _update(connection, OFFSET, moment - wall)
        _update(connection, LATEST, moment)
        return self()


def _first_moment(wall: int, offset: int, latest: int, *, alone: bool) -> int:
    moment = wall + offset
    # Never before the last stored reading. And while other nodes run, that reading is recent: if it seems long ago, the
    # wall clock has jumped and they have not noticed yet.
    if moment < latest or (not alone and 0 < latest < moment - JUMP_MS):
        log.warning("wall_clock_jumped", milliseconds=moment - latest)
        return latest + BETWEEN_READINGS_MS
    return moment


def read_from_outside(database: Database, connection: Connection) -> int:
    """Return the moment for a process that only reads beside the service."""
    return database.wall_clock(connection) + int(connection.execute(_select(OFFSET)).scalar_one())


def _select(name: str) -> Select[int]:
    return select(watermarks.c.value).where(watermarks.c.name == name)


def _update(connection: Connection, name: str, value: int) -> None:
    connection.execute(watermarks.update().where(watermarks.c.name == name).values(value=value))
