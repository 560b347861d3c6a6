"""
The ledger's one clock, in whole milliseconds since 1970: time that passes, whatever happens to wall clocks.

Between two readings it runs by this machine's monotonic clock. At a reading (every heartbeat) it follows the wall clock
of the database's machine, so that all nodes agree. A wall clock that has jumped meanwhile is not followed: whoever sees
the jump first writes it down, as how far the ledger is away from that clock, and it is made good by and by.
"""

import time
from collections.abc import Callable

import structlog
from sqlalchemy import Connection, Select, select

from adapter.ledger.databases import Database
from adapter.ledger.schema import watermarks

log = structlog.get_logger(__name__)

JUMP_MS = 10_000  # more than machines and networks are ever late between two readings
BETWEEN_READINGS_MS = 5_000
STEP_MS = 500  # made good at a reading, and a tenth of what has passed: no lease ends by it, however many nodes read
LATEST, AWAY = "clock_latest", "clock_away"


def _monotonic() -> int:
    # Unlike `time.monotonic`, it goes on while the machine is suspended, as everybody else's does.
    number = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime_ns(number) // 1_000_000


class Clock:
    """Call it for the moment. `wall` is asked inside a transaction; `monotonic` counts milliseconds from anywhere."""

    def __init__(self, wall: Callable[[Connection], int], monotonic: Callable[[], int] = _monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._begins: int | None = None  # the moment at which `monotonic` was 0
        self._latest = 0

    @classmethod
    def of(cls, database: Database) -> "Clock":
        return cls(database.wall_clock)

    def __call__(self) -> int:
        assert self._begins is not None, "the clock has not been read yet"
        self._latest = max(self._latest, self._begins + self._monotonic())  # a correction makes it stand, not go back
        return self._latest

    def read(self, connection: Connection, *, alone: bool = False) -> int:
        """
        The moment, by the database's wall clock; from here on `__call__` goes by it. Writes down how far it has come.

        `alone`: no other process lives by this clock, so a wall clock that is ahead may be followed at once.
        """
        # Locked before the wall clock is asked: nodes read one after the other, and each sees what the last one wrote.
        # A node that is read by now does not wait for that: another one is at it, and may have been stopped there.
        locked = _read(AWAY).with_for_update(skip_locked=self._begins is not None)
        away = connection.execute(locked).scalar_one_or_none()
        if away is None:
            return self()
        latest = connection.execute(_read(LATEST)).scalar_one()
        wall, monotonic = self._wall(connection), self._monotonic()
        if self._begins is None:
            moment = _first(wall, 0 if alone else away, latest, alone=alone)
        else:
            moment, expected = wall + away, self._begins + monotonic
            is_off = abs(moment - expected) > JUMP_MS
            if is_off and not 0 <= moment - latest <= JUMP_MS:
                log.warning("wall_clock_jumped", milliseconds=moment - expected)
                moment = expected
            elif is_off:  # the others have read it all the time and agree: it is this node that was away
                log.warning("node_clock_was_off", milliseconds=expected - moment)
                self._latest = moment
            else:
                step = min(STEP_MS, max(moment - latest, 0) // 10)
                moment -= max(-step, min(step, moment - wall))
        self._begins = moment - monotonic
        _write(connection, AWAY, moment - wall)
        _write(connection, LATEST, moment)
        return self()


def _first(wall: int, away: int, latest: int, *, alone: bool) -> int:
    """The moment for a process that starts."""
    moment = wall + away
    # Never before the last recorded moment, which may be later than the last reading. And where others live, they have
    # read the clock just now: if that seems long ago, it has jumped, and they do not know it yet.
    if moment < latest or (not alone and 0 < latest < moment - JUMP_MS):
        log.warning("wall_clock_jumped", milliseconds=moment - latest)
        return latest + BETWEEN_READINGS_MS
    return moment


def seen_from_outside(database: Database, connection: Connection) -> int:
    """The moment, for who only reads beside the service."""
    return database.wall_clock(connection) + int(connection.execute(_read(AWAY)).scalar_one())


def _read(name: str) -> Select[int]:
    return select(watermarks.c.value).where(watermarks.c.name == name)


def _write(connection: Connection, name: str, value: int) -> None:
    connection.execute(watermarks.update().where(watermarks.c.name == name).values(value=value))
