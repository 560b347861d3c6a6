"""Several nodes on one PostgreSQL keep the same promises as one.

Every node has a store with its own connection and writer thread, so their transactions really collide. They are driven
from one event loop. `pg_stat_database` counts their deadlocks.
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from sqlalchemy import event, make_url
from sqlalchemy.exc import DBAPIError

from adapter.ledger.claims import Claim
from adapter.ledger.databases import Postgres, database_at
from adapter.ledger.inbox import Inbox, Received
from adapter.ledger.lease import LEASE_MS, Lease
from adapter.ledger.store import Store, StoreUnavailable
from tests import PATIENCE
from tests.databases import Server, database_of, rows, waits_for_a_lock
from tests.ledgers import DOUBT, REJECTED, HandClock, Ledger, body_of, receipt, waiting

T = TypeVar("T")


class Nodes:
    """Nodes on one database, with one clock that the test moves."""

    def __init__(self, url: str, server: Server) -> None:
        self.url, self.server = url, server
        self.clock = HandClock()
        self.loop = asyncio.Runner()
        self.all: list[Ledger] = []

    def start(self, number: int) -> list[Ledger]:
        for _ in range(number):
            self.all.append(Ledger(self.url, self.clock, self.loop))
        return self.all

    def together(self, *work: Coroutine[Any, Any, T]) -> list[T]:
        async def gather() -> list[T]:
            return await asyncio.gather(*work)

        return self.loop.run(gather())

    def stop(self) -> None:
        while self.all:
            self.all.pop().store.close()
        self.loop.close()

    def connections(self) -> int:
        with self.server.connect("postgres") as connection:
            asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
            return connection.execute(asked, [database_of(self.url)]).fetchone()[0]

    def deadlocks(self) -> int:
        """Return the deadlocks so far. The statistics are complete only when every node is stopped."""
        with self.server.connect("postgres") as connection:
            asked = "SELECT deadlocks FROM pg_stat_database WHERE datname = %s"
            return connection.execute(asked, [database_of(self.url)]).fetchone()[0]


@pytest.fixture
def nodes(postgres_url: str, postgres: Server) -> Iterator[Nodes]:
    nodes = Nodes(postgres_url, postgres)
    try:
        yield nodes
    finally:
        nodes.stop()


@contextmanager
def no_deadlocks(nodes: Nodes) -> Iterator[None]:
    before = nodes.deadlocks()
    yield
    nodes.stop()
    assert nodes.deadlocks() - before == 0


# --- intake ---------------------------------------------------------------------------------------------------------


def test_accepts_of_the_same_orders_in_opposite_order_neither_wait_in_a_ring_nor_lose_anything(nodes: Nodes) -> None:
    four = nodes.start(4)
    orders = [f"order-{number:02}" for number in range(30)]

    async def accept(number: int, node: Ledger) -> list[Received]:
        received = []
        wanted = [(node.export, True), (node.history, False)]
        for wave in range(8):
            mine = orders if number % 2 else orders[::-1]
            each = [receipt(order, wave * 4 + number, wanted=wanted) for order in mine]
            received += await asyncio.gather(*map(node.inbox.receive, each))
        return received

    with no_deadlocks(nodes):
        answers = nodes.together(*(accept(number, node) for number, node in enumerate(four)))

    assert Counter(answer for each in answers for answer in each) == {Received.NEW: 4 * 8 * 30}
    assert rows(nodes.url, "SELECT count(*), count(DISTINCT identity) FROM notifications") == [(960, 960)]
    assert rows(nodes.url, "SELECT count(*) FROM lanes") == [(60,)]
    kept = "SELECT q.route, count(*) FROM deliveries JOIN lanes l ON l.id = lane_id JOIN queues q ON q.id = l.queue_id"
    assert rows(nodes.url, f"{kept} GROUP BY q.route ORDER BY q.route") == [("export", 960), ("history", 960)]
    fresh = f"{kept} WHERE state = 'waiting' AND route = 'export' GROUP BY q.route, l.order_id"
    assert rows(nodes.url, fresh) == [("export", 1)] * 30  # all others are superseded, whichever came first


def test_the_same_event_at_several_nodes_at_once_is_stored_once(nodes: Nodes) -> None:
    three = nodes.start(3)
    events = list(range(60))

    async def accept(number: int, node: Ledger) -> dict[int, Received]:
        mine = events[::-1] if number % 2 else events
        wanted = [(node.export, True), (node.history, False)]
        received = await asyncio.gather(
            *(node.inbox.receive(receipt(f"order-{each % 7}", each, wanted=wanted)) for each in mine)
        )
        return dict(zip(mine, received, strict=True))

    with no_deadlocks(nodes):
        answers = nodes.together(*(accept(number, node) for number, node in enumerate(three)))

    for each in events:
        assert sorted(answer[each].value for answer in answers) == ["new", "repeat", "repeat"]
    assert rows(nodes.url, "SELECT count(*) FROM notifications") == [(60,)]
    assert rows(nodes.url, "SELECT count(*) FROM deliveries") == [(120,)]
    assert rows(nodes.url, "SELECT count(*) FROM lanes") == [(14,)]


def test_the_same_identity_with_another_order_at_each_node_is_one_event_and_conflicts(nodes: Nodes) -> None:
    three = nodes.start(3)

    answers = nodes.together(
        *(node.inbox.receive(receipt(body=b'{"node": %d}' % number)) for number, node in enumerate(three))
    )

    assert Counter(answers) == {Received.NEW: 1, Received.CONFLICT: 2}


# --- claims ---------------------------------------------------------------------------------------------------------


def test_a_repeat_of_an_event_that_another_node_is_pruning_is_new(nodes: Nodes) -> None:
    (node,) = nodes.start(1)
    node.receive(receipt())

    @event.listens_for(node.store.engine, "before_cursor_execute")
    def prune(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("SELECT notifications.id") and node.rows("SELECT id FROM notifications") == [(1,)]:
            node.rows("DELETE FROM notifications")

    assert node.receive(receipt()) is Received.NEW
    assert node.rows("SELECT id FROM notifications WHERE id > 1")


def test_the_lanes_held_by_all_nodes_never_exceed_the_concurrency_of_their_queue(nodes: Nodes) -> None:
    three = nodes.start(3)
    for number in range(60):
        three[0].receive(receipt(f"order-{number}", wanted=[(three[0].export, True), (three[0].history, False)]))
    held: dict[int, Claim] = {}
    most: Counter[int] = Counter()

    async def work(node: Ledger) -> int:
        done = idle = 0
        while idle < 3:
            claims = (await node.lanes.claim(node.limits(node.export, node.history, concurrency=5), 4)).claims
            for claim in claims:
                assert claim.lane_id not in held, "two nodes hold a lane"
                held[claim.lane_id] = claim
            for queue, number in Counter(claim.queue_id for claim in held.values()).items():
                most[queue] = max(most[queue], number)
            await asyncio.sleep(0)
            for claim in claims:
                await node.settle_later(claim)
                del held[claim.lane_id]
            done += len(claims)
            idle = 0 if claims else idle + 1
        return done

    with no_deadlocks(nodes):
        answers = nodes.together(*map(work, three))

    assert sum(answers) == 120
    assert set(most.values()) <= {1, 2, 3, 4, 5}
    assert rows(nodes.url, "SELECT max(held) FROM held_at_once") == [(5,)]


@pytest.fixture(autouse=True)
def counted_by_the_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """A trigger counts the held lanes of a queue after every claim, so that no moment is missed."""
    if "concurrency" not in request.node.name:
        yield
        return
    url = request.getfixturevalue("postgres_url")
    rows(url, "CREATE TABLE held_at_once (held integer)")
    rows(
        url,
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO held_at_once"
        " SELECT count(*) FROM lanes WHERE holder IS NOT NULL AND queue_id = NEW.queue_id; RETURN NULL; END $$",
    )
    rows(url, "CREATE TRIGGER note AFTER UPDATE OF claim ON lanes FOR EACH ROW EXECUTE FUNCTION note()")
    yield
    rows(url, "DROP TRIGGER note ON lanes")
    rows(url, "DROP FUNCTION note")
    rows(url, "DROP TABLE held_at_once")


def test_a_queue_that_probes_is_probed_by_one_node(nodes: Nodes) -> None:
    three = nodes.start(3)
    for number in range(5):
        three[0].owed(1, order_id=f"order-{number}")
    rows(nodes.url, f"UPDATE queues SET paused_until = {nodes.clock.now - 1}, paused_by = 'failures'")

    taken = nodes.together(*(node.lanes.claim(node.limits(), 10) for node in three))

    assert sorted(len(each.claims) for each in taken) == [0, 0, 1]


def test_the_lanes_of_a_node_whose_lease_ended_are_taken_over_when_the_doubt_ends(nodes: Nodes) -> None:
    lost, other = nodes.start(2)
    lost.owed(1)
    claim = lost.claim_one()
    nodes.clock.now += LEASE_MS + 1

    assert other.do(other.lease.renew())
    assert other.claim() == []
    assert other.next_due_at() == claim.doubt_ends_at
    assert rows(nodes.url, "SELECT holder FROM lanes") == [(None,)]
    nodes.clock.now = claim.doubt_ends_at
    assert other.do(other.lease.renew())
    taken_over = other.claim_one()

    assert (taken_over.in_doubt, taken_over.attempt, taken_over.number) == (True, 2, claim.number + 1)
    assert not lost.settle(claim)
    assert not lost.do(lost.lease.renew())
    assert other.settle(taken_over)
    assert rows(nodes.url, "SELECT claim FROM attempts") == [(taken_over.number,)]


def test_a_node_that_lost_its_lease_enters_again_and_works(nodes: Nodes) -> None:
    lost, other = nodes.start(2)
    nodes.clock.now += LEASE_MS + 1
    other.do(other.lease.renew())

    assert not lost.do(lost.lease.renew())
    lost.do(lost.lease.enter())
    lost.owed(1)

    assert lost.settle(lost.claim_one())
    assert lost.do(lost.lease.renew())
    assert other.do(other.lease.renew())


def test_a_late_settlement_before_anybody_took_the_lane_over_records_nothing_either(nodes: Nodes) -> None:
    lost, other = nodes.start(2)
    lost.owed(1)
    claim = lost.claim_one()
    nodes.clock.now += LEASE_MS + 1
    other.do(other.lease.renew())

    assert not lost.settle(claim)

    assert rows(nodes.url, "SELECT state, attempts FROM deliveries") == [("waiting", 1)]


def test_lanes_claimed_after_the_end_of_a_lease_are_freed_at_the_next_heartbeat(nodes: Nodes) -> None:
    """Its handler has ended before another node may claim the lane."""
    lost, other = nodes.start(2)
    nodes.clock.now += LEASE_MS + 1
    other.do(other.lease.renew())
    lost.owed(1)
    claim = lost.claim_one()

    other.do(other.lease.renew())

    assert rows(nodes.url, "SELECT holder, next_at FROM lanes") == [(None, claim.doubt_ends_at)]


def test_another_node_never_ends_a_renewed_lease(nodes: Nodes) -> None:
    four = nodes.start(4)

    for _ in range(20):
        nodes.clock.now += LEASE_MS // 3
        assert nodes.together(*(node.lease.renew() for node in four)) == [True] * 4


# --- everything at once ---------------------------------------------------------------------------------------------


def test_a_storm_of_accepts_claims_settlements_and_beats_loses_nothing(nodes: Nodes) -> None:
    """In the end every delivery is done, dead or superseded.

    Two of three orders are late or repeated, a fifth of the attempts is rejected and retried by a repeat, and one node
    after another loses its lease.
    """
    three = nodes.start(3)
    chance = random.Random(7)
    accepted: set[tuple[str, int]] = set()
    held: set[int] = set()
    stop = asyncio.Event()

    async def accept(node: Ledger) -> None:
        wanted = [(node.export, True), (node.history, False)]
        for _ in range(40):
            some = [(f"order-{chance.randrange(12)}", chance.randrange(60)) for _ in range(8)]
            await asyncio.gather(*(node.inbox.receive(receipt(order, at, wanted=wanted)) for order, at in some))
            accepted.update(some)
            await asyncio.sleep(0)

    async def work(node: Ledger, until: Callable[[], bool]) -> None:
        while not until():
            claims = (await node.lanes.claim(node.limits(node.export, node.history), 6)).claims
            assert not held & {claim.lane_id for claim in claims}
            held.update(claim.lane_id for claim in claims)
            endings = [
                REJECTED if chance.random() < 0.2 else waiting(0) if chance.random() < 0.2 else None for _ in claims
            ]
            settled = [
                node.settle_later(claim, *filter(None, [end]), refetch=claim.queue_id == node.export)
                for claim, end in zip(claims, endings, strict=True)
            ]
            held.difference_update(claim.lane_id for claim in claims)
            assert all(await asyncio.gather(*settled))

    async def beat(node: Ledger) -> None:
        while not stop.is_set():
            assert await node.lease.renew()

    async def all_of_it() -> None:
        beats = [asyncio.create_task(beat(node)) for node in three]
        intake = [asyncio.create_task(accept(node)) for node in three]
        over = lambda: all(task.done() for task in intake)  # noqa: E731
        await asyncio.gather(*intake, *(work(node, over) for node in three))
        stop.set()
        await asyncio.gather(*beats)

    with no_deadlocks(nodes):
        nodes.loop.run(all_of_it())
        for _ in range(200):
            nodes.clock.now += DOUBT
            for claim in three[0].claim(three[0].export, three[0].history):
                three[0].settle(claim)
        stuck = rows(
            nodes.url,
            "SELECT id FROM deliveries d WHERE state = 'waiting'"
            " AND NOT EXISTS (SELECT FROM deliveries e WHERE e.lane_id = d.lane_id AND e.state = 'dead')",
        )
    assert stuck == []
    assert rows(nodes.url, "SELECT count(*) FROM notifications") == [(len(accepted),)]
    assert rows(nodes.url, "SELECT count(*) FROM deliveries") == [(2 * len(accepted),)]
    assert rows(nodes.url, "SELECT count(*) FROM lanes WHERE holder IS NOT NULL") == [(0,)]
    late = "SELECT count(*) FROM attempts a JOIN deliveries d ON d.id = delivery_id WHERE reason = 'superseded'"
    assert rows(nodes.url, f"{late} AND retried_at IS NULL") == [(0,)]


# --- a node that is stopped -----------------------------------------------------------------------------------------

PATIENCE_MS = 1000


@pytest.fixture
def impatient(postgres_url: str) -> Iterator[Callable[[], Store]]:
    """Make every store wait for locks at most a second."""
    stores = []

    def make() -> Store:
        database = Postgres(make_url(postgres_url), patience_ms=PATIENCE_MS)
        stores.append(Store(database, clock=HandClock()))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def test_a_node_that_stops_inside_a_transaction_blocks_others_for_a_limited_time(
    nodes: Nodes, impatient: Callable[[], Store]
) -> None:
    (node,) = nodes.start(1)
    node.owed(1)
    store = impatient()
    inbox, lease = Inbox(store), Lease(store, version="test")
    wanted = [(node.export, True)]
    stopped = Postgres(make_url(nodes.url), patience_ms=PATIENCE_MS).engine(read_only=False).connect()
    stopped.exec_driver_sql("SELECT * FROM lanes FOR UPDATE")

    async def meanwhile() -> list[Received]:
        await lease.enter()
        assert await lease.renew()
        assert await inbox.receive(receipt("another order", wanted=wanted)) is Received.NEW
        failed = 0
        while True:
            try:
                return [await inbox.receive(receipt("order-1", 2, wanted=wanted))] * failed
            except StoreUnavailable:
                failed += 1

    answers = nodes.loop.run(asyncio.wait_for(meanwhile(), PATIENCE))

    assert set(answers) == {Received.NEW}
    assert len(answers) <= 3
    with pytest.raises(DBAPIError, match="idle"):
        stopped.exec_driver_sql("SELECT 1")
    stopped.close()


def test_a_claim_passes_over_lanes_that_a_stopped_node_has_locked(nodes: Nodes) -> None:
    (node,) = nodes.start(1)
    for number in (1, 2, 3):
        node.owed(1, order_id=f"order-{number}")
    with database_at(nodes.url).engine(read_only=False).begin() as stopped:
        stopped.exec_driver_sql("SELECT * FROM lanes WHERE order_id = 'order-2' FOR UPDATE")

        assert [claim.order_id for claim in node.claim()] == ["order-1", "order-3"]

    assert [claim.order_id for claim in node.claim()] == ["order-2"]


def test_a_beat_waits_neither_for_the_clock_nor_for_lanes_nor_for_the_dead(nodes: Nodes) -> None:
    alive, dead = nodes.start(2)
    for number in (1, 2):
        dead.owed(1, order_id=f"order-{number}")
    dead.claim()
    nodes.clock.now += LEASE_MS + 1
    with database_at(nodes.url).engine(read_only=False).begin() as stopped:
        stopped.exec_driver_sql("SELECT * FROM watermarks FOR UPDATE")
        stopped.exec_driver_sql("SELECT * FROM lanes WHERE order_id = 'order-1' FOR UPDATE")
        assert alive.do(alive.lease.renew())
        assert rows(nodes.url, "SELECT order_id FROM lanes WHERE holder IS NULL") == [("order-2",)]
        assert not dead.do(dead.lease.renew())  # it is being buried, and stays so

    assert alive.do(alive.lease.renew())
    assert rows(nodes.url, "SELECT count(*) FROM lanes WHERE holder IS NULL") == [(2,)]
    assert rows(nodes.url, "SELECT count(*) FROM processes") == [(1,)]


def test_ending_a_lease_does_not_wait_for_its_renewal(nodes: Nodes) -> None:
    alive, late = nodes.start(2)
    nodes.clock.now += LEASE_MS + 1
    with database_at(nodes.url).engine(read_only=False).begin() as renewing:
        renewing.exec_driver_sql(
            f"UPDATE processes SET lease_until = {nodes.clock.now + LEASE_MS} WHERE id = {late.lease.process_id}"
        )
        assert alive.do(alive.lease.renew())

    assert alive.do(alive.lease.renew())
    assert late.do(late.lease.renew())


# --- who hears of new work ------------------------------------------------------------------------------------------


class Listener:
    """A listener of a node, and its event."""

    def __init__(self, url: str) -> None:
        self.heard = threading.Event()
        self.end = database_at(url).listen(self.heard.set)

    def hears(self) -> bool:
        heard = self.heard.wait(20)
        self.heard.clear()
        return heard


@pytest.fixture
def listener(postgres_url: str) -> Iterator[Listener]:
    listener = Listener(postgres_url)
    yield listener
    listener.end()


def test_a_notification_at_one_node_wakes_the_others(nodes: Nodes, listener: Listener) -> None:
    (node,) = nodes.start(1)
    assert listener.hears()  # that it listens: something may have been told before

    node.owed(1)
    assert listener.hears()

    node.settle(node.claim_one(), REJECTED)
    node.receive(receipt())  # a repeat, which retries
    assert listener.hears()


def test_a_notification_without_deliveries_wakes_no_node(nodes: Nodes, listener: Listener) -> None:
    (node,) = nodes.start(1)
    assert listener.hears()

    node.receive(receipt("nobody's"))
    assert not listener.heard.is_set()
    node.owed(1)

    assert listener.hears()


def test_a_listener_comes_back_when_its_connection_ends(nodes: Nodes, listener: Listener) -> None:
    assert listener.hears()

    nodes.server.disconnect(nodes.url)
    assert listener.hears()  # for what it may have missed
    (node,) = nodes.start(1)
    node.owed(1)

    assert listener.hears()


def test_a_listener_that_is_ended_leaves_no_thread_and_no_connection(nodes: Nodes) -> None:
    before = {thread.name for thread in threading.enumerate()}
    listener = Listener(nodes.url)
    assert listener.hears()

    listener.end()

    assert {thread.name for thread in threading.enumerate()} <= before
    assert nodes.connections() == 0


def test_a_listener_uses_the_same_address_as_the_writer(nodes: Nodes) -> None:
    """An address for fail-over has several hosts: `host=a&host=b`."""
    host = nodes.url.partition("host=")[2]
    listener = Listener(nodes.url.replace(f"host={host}", f"host={host}&host=/nowhere"))
    try:
        assert listener.hears()
    finally:
        listener.end()


# --- between a look and a lock --------------------------------------------------------------------------------------


@contextmanager
def a_gate_before_locking(nodes: Nodes) -> Iterator[Callable[[], None]]:
    """Stop a claim before it locks its lanes, until the gate opens."""
    for sql in (
        "CREATE FUNCTION gate() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
        " IF current_query() LIKE '%SKIP LOCKED%' THEN PERFORM pg_advisory_xact_lock_shared(42); END IF;"
        " RETURN true; END $$",
        "ALTER TABLE lanes ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY gate ON lanes USING (gate())",
        "DROP ROLE IF EXISTS visitor",
        "CREATE ROLE visitor LOGIN",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO visitor",
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO visitor",
    ):
        rows(nodes.url, sql)
    gate = nodes.server.connect(database_of(nodes.url))
    gate.execute("SELECT pg_advisory_lock(42)")
    try:
        yield lambda: gate.execute("SELECT pg_advisory_unlock_all()")
    finally:
        gate.close()
        nodes.stop()
        for sql in (
            "DROP POLICY gate ON lanes",
            "ALTER TABLE lanes DISABLE ROW LEVEL SECURITY",
            "DROP FUNCTION gate",
            "DROP OWNED BY visitor",
            "DROP ROLE visitor",
        ):
            rows(nodes.url, sql)


@pytest.mark.parametrize("waits", [True, False], ids=["something waits", "nothing waits"])
def test_a_claim_sees_deliveries_that_were_added_while_it_read(nodes: Nodes, waits: bool) -> None:
    """Between reading and locking a lane, another node may add a delivery.

    The claim must neither attempt a delivery that was superseded meanwhile, nor make a lane idle that has new work.
    """
    (node,) = nodes.start(1)
    if waits:
        node.owed(1)
    else:  # the lane is due all the same: a snapshot came that was superseded when it arrived
        node.owed(2)
        node.settle(node.claim_one())
        node.owed(1)
    with a_gate_before_locking(nodes) as open_gate:
        visitor = Ledger(nodes.url.replace("postgres@", "visitor@"), nodes.clock, nodes.loop)
        nodes.all.append(visitor)

        async def meet() -> list[Claim]:
            claiming = asyncio.create_task(visitor.lanes.claim(visitor.limits(), 1))
            await somebody_waits(nodes)
            await node.inbox.receive(receipt(snapshot=3, wanted=[(node.export, True)]))
            open_gate()
            return (await claiming).claims

        (claim,) = nodes.loop.run(meet())
        assert claim.body == body_of("order-1", 3)
        assert visitor.settle(claim)

    assert node.states()[-2:] == [(1, "done", "superseded"), (3, "done", "delivered")]


async def somebody_waits(nodes: Nodes) -> None:
    with nodes.server.connect(database_of(nodes.url)) as connection:
        async with asyncio.timeout(PATIENCE):
            while not connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0]:  # noqa: ASYNC110
                await asyncio.sleep(0)


# --- an arrival beside a claim --------------------------------------------------------------------------------------


def test_a_delivery_that_another_node_claims_at_this_moment_is_not_superseded(nodes: Nodes) -> None:
    one, two = nodes.start(2)
    one.owed(1)
    limits = {each.queue_id: each for each in one.limits()}
    with one.store.engine.connect() as connection:
        with connection.begin():
            (claim,) = one.lanes._claim(connection, limits, 1, ()).claims
            arriving = threading.Thread(target=asyncio.run, args=(arrive(two.url, 2),))
            arriving.start()
            while not waits_for_a_lock(nodes.url):
                assert arriving.is_alive(), "it did not wait"
        arriving.join(PATIENCE)

    assert one.states() == [(1, "waiting", None), (2, "waiting", None)]
    assert one.settle(claim)
    assert two.claim_one().delivery_id == 2


def test_a_lane_into_which_another_node_receives_at_this_moment_is_claimed_afterwards(nodes: Nodes) -> None:
    one, two = nodes.start(2)
    one.owed(1)
    with one.store.engine.connect() as connection:
        with connection.begin():
            one.inbox._receive(connection, [receipt(snapshot=2, wanted=[(one.export, True)])])

            assert two.claim() == []
        assert two.claim_one().delivery_id == 2
    assert one.states() == [(1, "done", "superseded"), (2, "waiting", None)]


async def arrive(url: str, snapshot: int) -> None:
    """Receive an event at a node of its own."""
    database = database_at(url)
    store = Store(database, clock=HandClock())
    (queue_id,) = rows(url, "SELECT id FROM queues WHERE route = 'export' AND merchant = 'fjallboden'")[0]
    await Inbox(store).receive(receipt(snapshot=snapshot, wanted=[(queue_id, True)]))
    store.close()
