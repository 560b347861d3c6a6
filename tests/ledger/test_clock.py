"""The ledger's clock on real databases, with wall clocks that jump.

A delivery that is due in 30 s is due in 30 s, even if the wall clock jumps.
"""

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest
from sqlalchemy import Connection
from structlog.testing import capture_logs

from adapter.ledger.clock import BETWEEN_READINGS_MS, MAX_STEP_MS, Clock
from adapter.ledger.databases import database_at
from adapter.ledger.lease import Lease
from adapter.ledger.store import Store
from tests.databases import rows
from tests.ledgers import NOON, Ledger, waiting

SECOND = 1000
DAY = 86_400_000
BEAT = 5 * SECOND
JUMPS = [pytest.param(jump, id=f"{jump // SECOND:+} s") for jump in (DAY, -DAY, 11 * SECOND, -11 * SECOND)]


class World:
    """The wall clock of the database, and the time that has passed."""

    def __init__(self, url: str) -> None:
        self.wall, self.passed = NOON, 0
        self._engine = database_at(url).engine(read_only=False)
        self.url = url

    def goes_on(self, milliseconds: int) -> None:
        self.wall += milliseconds
        self.passed += milliseconds

    def clock(self, *, boot: int = 0) -> Clock:
        """Return the clock of a process on a machine that was booted `boot` ms ago."""
        return Clock(lambda _connection: self.wall, lambda: boot + self.passed)

    def read(self, clock: Clock, *, alone: bool = False) -> int:
        with self._engine.begin() as connection:
            return clock.read(connection, alone=alone)

    def mark(self, name: str) -> int:
        ((value,),) = rows(self.url, f"SELECT value FROM watermarks WHERE name = '{name}'")
        return value


@pytest.fixture
def world(store_url: str) -> World:
    return World(store_url)


@pytest.fixture
def shared(postgres_url: str) -> World:
    return World(postgres_url)


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", JUMPS)
def test_a_jump_of_the_wall_clock_is_logged_and_stored_as_an_offset(world: World, jump: int) -> None:
    clock = world.clock(boot=777)
    assert world.read(clock, alone=True) == NOON
    world.goes_on(BEAT)

    world.wall += jump
    assert clock() == NOON + BEAT
    with capture_logs() as logs:
        moment = world.read(clock)

    assert moment == clock() == NOON + BEAT
    assert [(each["event"], each["milliseconds"]) for each in logs] == [("wall_clock_jumped", jump)]
    assert (world.mark("clock_offset"), world.mark("clock_latest")) == (-jump, NOON + BEAT)


@pytest.mark.parametrize("jump", JUMPS)
def test_a_jump_is_corrected_by_half_a_second_per_reading_without_going_back(world: World, jump: int) -> None:
    clock = world.clock()
    world.read(clock, alone=True)
    world.wall += jump
    moments = [world.read(clock)]
    for _ in range(60):
        for _ in range(5):
            world.goes_on(SECOND)
            moments.append(clock())
        moments.append(world.read(clock))

    healed = min(60 * MAX_STEP_MS, abs(jump))
    assert world.mark("clock_offset") == -jump + (healed if jump > 0 else -healed)
    assert all(before <= after for before, after in pairwise(moments))
    assert moments[-1] - moments[0] == pytest.approx(60 * BEAT, abs=healed)


@pytest.mark.parametrize("off", [3 * SECOND, -3 * SECOND])
def test_a_small_correction_of_the_wall_clock_is_followed_without_going_back(world: World, off: int) -> None:
    clock = world.clock()
    world.read(clock, alone=True)
    world.goes_on(BEAT)
    before = clock()
    world.wall += off

    world.read(clock)

    assert clock() == max(before, world.wall)
    world.goes_on(BEAT)
    assert clock() == world.wall


def test_a_restart_after_a_backward_jump_is_not_before_the_last_recorded_moment(world: World) -> None:
    clock = world.clock()
    world.read(clock, alone=True)
    world.goes_on(BEAT)
    recorded = clock()

    world.wall -= DAY
    again = world.clock()
    world.read(again, alone=True)

    assert recorded <= again() <= recorded + BETWEEN_READINGS_MS
    assert world.mark("clock_latest") == again()


def test_a_restart_follows_a_wall_clock_that_is_ahead(world: World) -> None:
    clock = world.clock()
    world.read(clock, alone=True)
    world.wall += DAY

    again = world.clock()
    world.read(again, alone=True)

    assert again() == world.wall
    assert world.mark("clock_offset") == 0


def test_a_restart_clears_the_offset_of_an_earlier_jump(world: World) -> None:
    clock = world.clock()
    world.read(clock, alone=True)
    world.wall += DAY
    world.read(clock)
    assert world.mark("clock_offset") == -DAY

    again = world.clock()

    assert world.read(again, alone=True) == world.wall
    assert world.mark("clock_offset") == 0


# --- several --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1], ids=["seen first by the one", "seen first by the other"])
@pytest.mark.parametrize("jump", JUMPS)
def test_nodes_agree_within_a_second_through_a_jump(shared: World, jump: int, first: int) -> None:
    nodes = [shared.clock(boot=5), shared.clock(boot=9_000_000)]
    for node in nodes:
        shared.read(node)
    began = nodes[0]()
    shared.goes_on(BEAT // 2)
    shared.wall += jump
    with capture_logs() as logs:
        for turn in range(24):
            shared.read(nodes[(turn + first) % 2])
            for _ in range(5):
                shared.goes_on(SECOND // 2)
                one, other = (node() for node in nodes)
                assert abs(one - other) <= SECOND

    assert [each["event"] for each in logs] == ["wall_clock_jumped"]
    assert nodes[0]() - began == pytest.approx(shared.passed, rel=0.11)


@pytest.mark.parametrize("number", [1, 5, 20])
def test_a_jump_is_made_good_no_faster_by_many_nodes_than_by_one(shared: World, number: int) -> None:
    nodes = [shared.clock(boot=each) for each in range(number)]
    for node in nodes:
        shared.read(node)
    shared.wall -= DAY
    began = nodes[0]()
    for _ in range(4):
        for node in nodes:
            shared.goes_on(BEAT // number)
            shared.read(node)

    passed = nodes[0]() - began
    assert passed == pytest.approx(4 * BEAT, rel=0.11)


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_node_that_starts_just_after_a_jump_takes_the_time_from_those_that_live(shared: World, jump: int) -> None:
    """Otherwise their leases would seem to have ended, and the node would take their lanes."""
    running = shared.clock()
    shared.read(running)
    shared.goes_on(BEAT - 1)
    shared.wall += jump

    starting = shared.clock(boot=3)
    shared.read(starting)

    assert abs(starting() - running()) <= BETWEEN_READINGS_MS
    shared.read(running)
    assert abs(starting() - running()) <= SECOND


def test_a_suspended_node_takes_the_time_from_the_others(shared: World) -> None:
    """To a virtual machine that was paused, the wall clock seems to have jumped."""
    stopped_for = 0
    running = shared.clock()
    paused = Clock(lambda _connection: shared.wall, lambda: shared.passed - stopped_for)
    for node in (running, paused):
        shared.read(node)
    for _ in range(12):
        shared.goes_on(BEAT)
        shared.read(running)
    stopped_for = 12 * BEAT

    shared.read(paused)

    assert paused() == running() == shared.wall
    assert shared.read(running) == shared.wall


def test_a_node_that_stops_while_reading_the_clock_does_not_block_others(shared: World) -> None:
    running, starting = shared.clock(), shared.clock()
    shared.read(running)
    shared.goes_on(BEAT)
    with database_at(shared.url).engine(read_only=False).begin() as stopped:
        starting.read(stopped)

        assert shared.read(running) == NOON + BEAT


def test_a_process_counts_as_present_until_its_connection_ends(shared: World) -> None:
    def opened() -> Store:
        return Store.open(shared.url, clock=shared.clock())

    with asyncio.Runner() as loop:
        first = opened()
        loop.run(Lease(first, version="test").enter())
        shared.wall += DAY
        second = opened()  # beside the first, that has not seen the jump
        assert second.clock() == NOON + BETWEEN_READINGS_MS
        first.close()
        second.close()

        alone = opened()
        assert alone.clock() == shared.wall
        alone.close()


# --- what is due ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(world: World) -> Iterator[Ledger]:
    with asyncio.Runner() as loop:
        ledger = Ledger(world.url, world.clock(), loop)
        try:
            yield ledger
        finally:
            ledger.store.close()


@pytest.mark.parametrize("jump", JUMPS)
def test_a_retry_is_due_after_30_seconds_whatever_the_wall_clock_does(world: World, ledger: Ledger, jump: int) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), waiting(ledger.clock() + 30 * SECOND))
    world.wall += jump
    waited = 0
    while not (claims := ledger.claim()):
        world.goes_on(SECOND)
        waited += 1
        if waited % 5 == 0:
            assert ledger.do(ledger.lease.renew())
        assert waited < 60

    assert len(claims) == 1
    assert 27 <= waited <= 33


def test_the_wall_clock_is_that_of_the_database(store_url: str) -> None:
    def wall(connection: Connection) -> int:
        return database_at(store_url).wall_clock(connection)

    with database_at(store_url).engine(read_only=True).connect() as connection:
        before = wall(connection)
        assert 1_700_000_000_000 < before <= wall(connection)
