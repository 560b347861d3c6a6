"""The measurements of notifications, one function for each group.

A function drives its servers in turn and yields the figures of each round: absolute ones, and the ratios within the
round.

A run fails if the number of stored rows is not the number of 200s. (Requests that an overloaded server has not answered
when the load ends may be stored or not.)
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import load
import orders
import redis
from processes import LeftOut, Processes, Server, settle
from sqlalchemy import create_engine, text
from stores import SMALL_BODY, Database, Databases, fill, room_for

CONNECTIONS = 64
OPEN_CONNECTIONS = 1024
QUIET_MS = 20
STORES = ("sqlite", "postgres")

Round = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The means of the groups. `scale` makes every size smaller, to try out the benchmark."""

    processes: Processes
    databases: Databases
    rounds: int
    seconds: float
    scale: float
    left_out: dict[str, str] = field(default_factory=dict)

    def scaled(self, number: int) -> int:
        return max(int(number * self.scale), 500)


class Receiver:
    """A server that stores every request to which it answers 200. `stored` counts its rows."""

    def __init__(self, name: str, server: Server, stored: Callable[[], int]) -> None:
        self.name = name
        self.server = server
        self._stored = stored
        self.accepted = 0
        self.unanswered = 0  # when an open load ended; they may be stored

    def closed(self, requests: Iterable[bytes], *, connections: int = CONNECTIONS, seconds: float = 600) -> load.Load:
        """Run a closed load, and exit unless every answer is 200."""
        met = load.closed(self.server.port, requests, connections=connections, seconds=seconds)
        self.accepted += met.statuses[200]
        if set(met.statuses) != {200}:
            sys.exit(f"{self.name} answered {dict(met.statuses)}")
        settle()
        return met

    def open_loop(self, requests: list[bytes], *, per_second: float, connections: int = OPEN_CONNECTIONS) -> load.Load:
        """Run an open load with any answers, and wait until the server is idle."""
        met = load.open_loop(self.server.port, requests, per_second=per_second, connections=connections)
        self.accepted += met.statuses[200]
        self.unanswered += met.statuses[load.UNANSWERED]
        for _ in range(60):
            time.sleep(1)
            if self.closed(orders.prepared(20), connections=1).percentile_ms(50) < QUIET_MS:
                return met
        sys.exit(f"{self.name} does not come to rest after a load")

    def check(self) -> None:
        stored = self._stored()
        print(f"  {self.name}: {self.accepted} accepted, {self.unanswered} unanswered, {stored} stored")
        if not self.accepted <= stored <= self.accepted + self.unanswered:
            sys.exit(f"{self.name}: {self.accepted} accepted, but {stored} stored")


class Measured(contextlib.ExitStack):
    """Servers that run beside each other. They are driven in turn, and checked at the end."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench
        self.receivers: dict[str, Receiver] = {}

    def echo(self) -> Server:
        return self.enter_context(self._bench.processes.echo())

    def service(self, name: str, kind: str = "sqlite", **named: object) -> None:
        database = self._bench.databases.new(kind)
        self.callback(database.remove)
        server = self.enter_context(self._bench.processes.service(database.url, **named))
        self.receivers[name] = Receiver(name, server, lambda: database.stored)

    def peer(self, name: str, app: str, environment: dict[str, str], stored: Callable[[], int]) -> None:
        server = self.enter_context(self._bench.processes.peer(app, environment))
        self.receivers[name] = Receiver(name, server, stored)

    def if_possible(self, key: str, start: Callable[[], None]) -> None:
        try:
            start()
        except LeftOut as reason:
            self._bench.left_out[key] = str(reason)

    def check(self) -> None:
        for receiver in self.receivers.values():
            receiver.check()


def accept(bench: Bench) -> Iterator[Round]:
    """Accepts on both stores, beside the echo, a commit or an insert for each accept, and the disk."""
    with Measured(bench) as at:
        echo = at.echo()
        at.service("accept_sqlite")
        at.service("commit_each", kind_of_server="commit_each")
        at.if_possible("accept_postgres_over_insert_each", lambda: at.service("accept_postgres", "postgres"))
        at.if_possible("accept_postgres_over_insert_each", lambda: _insert_each(bench, at))
        for _ in range(bench.rounds):
            row: Round = {"fdatasync_p50_ms": bench.processes.fdatasync_p50_ms()}
            requests = orders.prepared(bench.scaled(40_000))
            met = load.closed(
                echo.port, itertools.cycle(requests), connections=CONNECTIONS, seconds=bench.seconds
            )  # fmt: skip
            row |= _figures("echo", met)
            settle()
            for name, receiver in at.receivers.items():
                row |= _figures(name, receiver.closed(requests, seconds=bench.seconds))
            del requests
            one = orders.prepared(bench.scaled(8_000))
            row |= _figures("echo_1conn", load.closed(echo.port, one, connections=1, seconds=bench.seconds / 2))
            settle()
            ours = at.receivers["accept_sqlite"]
            row |= _figures("accept_sqlite_1conn", ours.closed(one, connections=1, seconds=bench.seconds / 2))
            row |= ratios(
                row,
                accept_sqlite_over_echo=("accept_sqlite_per_second", "echo_per_second"),
                accept_postgres_over_echo=("accept_postgres_per_second", "echo_per_second"),
                accept_sqlite_over_commit_each=("accept_sqlite_per_second", "commit_each_per_second"),
                accept_postgres_over_insert_each=("accept_postgres_per_second", "insert_each_per_second"),
                accept_p50_1conn_over_fdatasync_p50=("accept_sqlite_1conn_p50_ms", "fdatasync_p50_ms"),
            )
            yield row
        at.check()


def open_loop(bench: Bench) -> Iterator[Round]:
    """2 000 accepts a second on a fixed schedule, each timed from the moment it was due."""
    with Measured(bench) as at:
        at.service("open_loop_2000")
        receiver = at.receivers["open_loop_2000"]
        receiver.closed(orders.prepared(500))
        for _ in range(bench.rounds):
            row: Round = {"open_loop_2000_fdatasync_p50_ms": bench.processes.fdatasync_p50_ms()}
            requests = orders.prepared(int(2000 * max(8 * min(bench.scale, 1), 2)))
            met = receiver.open_loop(requests, per_second=2000)
            row |= {
                "accept_open_loop_2000_p50_ms": met.percentile_ms(50),
                "accept_open_loop_2000_p99_ms": met.percentile_ms(99),
                "accept_open_loop_2000_answered_200": met.statuses[200] / len(requests),
                "open_loop_2000_generator_late_p99_ms": met.late_p99_ms,
            }
            row |= ratios(
                row,
                accept_p99_open_loop_2000_ms_over_fdatasync_p50=(
                    "accept_open_loop_2000_p99_ms", "open_loop_2000_fdatasync_p50_ms",
                ),
            )  # fmt: skip
            yield row
        at.check()


def slow_fsync(bench: Bench) -> Iterator[Round]:
    """Group commits beside single commits, on a disk that takes a millisecond more."""
    try:
        environment = bench.processes.slow_fsync()
    except LeftOut as reason:
        bench.left_out["accept_sqlite_over_commit_each_slow_fsync"] = str(reason)
        return
    with Measured(bench) as at:
        at.service("slow_fsync_accept", environment=environment)
        at.service("slow_fsync_commit_each", kind_of_server="commit_each", environment=environment)
        yield from _side_by_side(
            bench, at,
            accept_sqlite_over_commit_each_slow_fsync=(
                "slow_fsync_accept_per_second", "slow_fsync_commit_each_per_second",
            ),
        )  # fmt: skip


def peers(bench: Bench) -> Iterator[Round]:
    """Accepts beside receivers that are written as the users of their frameworks write them."""
    with Measured(bench) as at:
        at.service("peers_accept")
        at.if_possible("accept_sqlite_over_celery", lambda: _celery(bench, at))
        url = bench.databases.new("sqlite").url
        at.peer("sqlalchemy", "sqlalchemy_orm", {"DATABASE_URL": url}, lambda: _rows_of_peer(url))
        yield from _side_by_side(
            bench, at,
            accept_sqlite_over_celery=("peers_accept_per_second", "celery_per_second"),
            accept_sqlite_over_sqlalchemy=("peers_accept_per_second", "sqlalchemy_per_second"),
        )  # fmt: skip


def overload(bench: Bench) -> Iterator[Round]:
    """Twice the load that the service can take: it accepts as much as before and refuses the rest."""
    with Measured(bench) as at:
        at.service("overload")
        receiver = at.receivers["overload"]
        for _ in range(bench.rounds):
            capacity = receiver.closed(orders.prepared(bench.scaled(40_000)), seconds=bench.seconds).per_second
            seconds = 2 * bench.seconds
            requests = orders.prepared(int(2 * capacity * seconds))
            met = receiver.open_loop(requests, per_second=2 * capacity, connections=9_000)
            # Neither the first quarter, in which what may wait fills up, nor what is answered after the load has ended.
            begun = min(begin for begin, _, _ in met.answers)
            first, last = begun + seconds / 4, begun + seconds
            taken = sum(1 for _, end, status in met.answers if status == 200 and first <= end < last) / (last - first)
            refused = met.statuses[503]
            yield {
                "overload_capacity_per_second": capacity,
                "overload_accepted_per_second": taken,
                "overload_accept_over_capacity": taken / capacity,
                "overload_refused_share": refused / len(requests),
                "overload_unanswered_share": 1 - (met.statuses[200] + refused) / len(requests),
                "overload_accept_p99_ms": met.percentile_ms(99, 200),
                "overload_refused_p99_ms": met.percentile_ms(99, 503),
            }
        at.check()


def dispatch(bench: Bench) -> Iterator[Round]:
    """Deliveries a second with a handler that does nothing, while 100 000 rows of several kinds wait."""
    many, free = bench.scaled(100_000), bench.scaled(30_000)
    held: dict[str, dict[str, Database]] = {}
    for kind in STORES:
        try:
            held[kind] = {name: bench.databases.new(kind) for name in ("noop", "hot_lane", "paused_queue")}
        except LeftOut as reason:
            bench.left_out[f"dispatch_noop_{kind}_over_echo"] = str(reason)
    for of_kind in held.values():
        for name, database in of_kind.items():
            with bench.processes.service(database.url, "delivers"):
                pass  # makes the tables and the queues
            if name == "hot_lane":
                fill(database, waiting=many, behind_one_order=True)
            if name == "paused_queue":
                fill(database, route="parked", waiting=many, paused=True)
    for _ in range(bench.rounds):
        row: Round = {}
        with bench.processes.echo() as echo:
            requests = itertools.cycle(orders.prepared(bench.scaled(10_000)))
            met = load.closed(echo.port, requests, connections=CONNECTIONS, seconds=bench.seconds)
            row["dispatch_echo_per_second"] = met.per_second
        for kind, of_kind in held.items():
            for name, database in of_kind.items():
                fill(database, waiting={"noop": many, "hot_lane": many + free, "paused_queue": free}[name])
                row[f"dispatch_{name}_{kind}_per_second"] = _dispatched(bench, database)
            noop = f"dispatch_noop_{kind}_per_second"
            row |= ratios(
                row,
                **{
                    f"dispatch_noop_{kind}_over_echo": (noop, "dispatch_echo_per_second"),
                    f"dispatch_hot_lane_over_free_{kind}": (f"dispatch_hot_lane_{kind}_per_second", noop),
                    f"dispatch_paused_queue_over_free_{kind}": (f"dispatch_paused_queue_{kind}_per_second", noop),
                },
            )
        yield (
            row | _worst(row, "dispatch_hot_lane_over_free", min) | _worst(row, "dispatch_paused_queue_over_free", min)
        )
    for of_kind in held.values():
        for database in of_kind.values():
            database.remove()


def latency(bench: Bench) -> Iterator[Round]:
    """Time from the accept of an order to the record of its delivery, at 200 orders a second."""
    with Measured(bench) as at:
        found: dict[str, Database] = {}
        for kind in STORES:
            try:
                found[kind] = bench.databases.new(kind)
            except LeftOut as reason:
                bench.left_out[f"accepted_to_delivered_p95_ms_{kind}"] = str(reason)
        servers = {kind: at.enter_context(bench.processes.service(db.url, "delivers")) for kind, db in found.items()}
        receivers = {
            kind: Receiver(f"latency_{kind}", servers[kind], lambda db=db: db.stored) for kind, db in found.items()
        }
        for receiver in receivers.values():
            receiver.closed(orders.prepared(CONNECTIONS))
        for _ in range(bench.rounds):
            row: Round = {}
            for kind, database in found.items():
                wait_until_delivered(database)
                before = database.number("SELECT max(id) FROM deliveries")
                requests = orders.prepared(int(200 * max(10 * min(bench.scale, 1), 2)))
                receivers[kind].open_loop(requests, per_second=200)
                wait_until_delivered(database)
                times = _delivery_times(database, before)
                row[f"accepted_to_delivered_p50_ms_{kind}"] = load.percentile(times, 50)
                row[f"accepted_to_delivered_p95_ms_{kind}"] = load.percentile(times, 95)
            yield row | _worst(row, "accepted_to_delivered_p95_ms", max)
        for receiver in receivers.values():
            receiver.check()
    for database in found.values():
        database.remove()


def memory(bench: Bench) -> Iterator[Round]:
    """Resident memory after 20 000 requests, over that of the echo after as many."""
    for _ in range(bench.rounds):
        requests = orders.prepared(bench.scaled(20_000))
        with bench.processes.echo() as echo:
            load.closed(echo.port, requests, connections=CONNECTIONS)
            row = {"rss_echo_mib": echo.rss_mib}
        with Measured(bench) as at:
            at.service("memory_accept")
            receiver = at.receivers["memory_accept"]
            receiver.closed(requests)
            row["rss_accept_mib"] = receiver.server.rss_mib
            receiver.check()
        yield row | ratios(row, rss_over_echo=("rss_accept_mib", "rss_echo_mib"))


def growth(bench: Bench) -> Iterator[Round]:
    """Growth of the resident memory from 20 000 accepts to a million more. One round, because it is long."""
    many = bench.scaled(1_000_000)
    if not room_for(bench.processes.folder, many):
        bench.left_out["rss_growth_after_1m_accepts"] = "this disk has no room for a million orders"
        return
    with Measured(bench) as at:
        at.service("growth")
        receiver = at.receivers["growth"]
        receiver.closed(itertools.islice(orders.endless(), bench.scaled(20_000)))
        before = receiver.server.rss_mib
        met = receiver.closed(itertools.islice(orders.endless(), many), seconds=3600)
        after = receiver.server.rss_mib
        receiver.check()
        yield {
            "rss_before_1m_accepts_mib": before,
            "rss_after_1m_accepts_mib": after,
            "rss_growth_after_1m_accepts": after / before - 1,
            "growth_accept_per_second": met.per_second,
        }


def backlog(bench: Bench) -> Iterator[Round]:
    """Accepts into a ledger of a million delivered orders, and into an empty one."""
    many = bench.scaled(1_000_000)
    small = not room_for(bench.processes.folder, many)
    if small:
        print(f"  no room for {many} bodies of 5 KB: the million's are cut to {SMALL_BODY} bytes")
    full = bench.databases.new("sqlite")
    with bench.processes.service(full.url):
        pass
    begun = time.perf_counter()
    fill(full, delivered=many, body_bytes=SMALL_BODY if small else None)
    print(
        f"  {many} rows filled in, {full.path.stat().st_size / 2**30:.1f} GiB, in {time.perf_counter() - begun:.0f} s"
    )
    with bench.processes.service(full.url) as server:
        filled = Receiver("backlog_1m_rows", server, lambda: full.stored - many)
        for number in range(-1, bench.rounds):  # the first one warms up
            with Measured(bench) as at:
                at.service("backlog_empty")
                empty = at.receivers["backlog_empty"]
                requests = orders.prepared(bench.scaled(40_000))
                row: Round = {}
                for receiver in (empty, filled):
                    met = receiver.closed(requests, seconds=bench.seconds)
                    row |= {
                        f"{receiver.name}_per_second": met.per_second,
                        f"{receiver.name}_p99_ms": met.percentile_ms(99),
                    }
                empty.check()
            if number >= 0:
                yield row | ratios(
                    row, accept_at_1m_rows_over_empty=("backlog_1m_rows_per_second", "backlog_empty_per_second")
                )
        filled.check()
    full.remove()


def _side_by_side(bench: Bench, at: Measured, **of: tuple[str, str]) -> Iterator[Round]:
    for _ in range(bench.rounds):
        requests = orders.prepared(bench.scaled(40_000))
        row: Round = {}
        for name, receiver in at.receivers.items():
            row |= _figures(name, receiver.closed(requests, seconds=bench.seconds))
        yield row | ratios(row, **of)
    at.check()


def _figures(name: str, met: load.Load) -> Round:
    return {
        f"{name}_per_second": met.per_second,
        f"{name}_p50_ms": met.percentile_ms(50),
        f"{name}_p99_ms": met.percentile_ms(99),
    }


def ratios(row: Round, **of: tuple[str, str]) -> Round:
    return {key: row[one] / row[other] for key, (one, other) in of.items() if one in row and other in row}


def _worst(row: Round, key: str, which: Callable[[Iterable[float]], float]) -> Round:
    of_stores = [row[f"{key}_{kind}"] for kind in STORES if f"{key}_{kind}" in row]
    return {key: which(of_stores)} if of_stores else {}


def _insert_each(bench: Bench, at: Measured) -> None:
    url = bench.databases.postgres_url()
    at.peer("insert_each", "insert_each", {"DATABASE_URL": url}, lambda: _rows_of_peer(url))


def _celery(bench: Bench, at: Measured) -> None:
    url = at.enter_context(bench.processes.redis())
    at.peer("celery", "celery_redis", {"BROKER_URL": url}, lambda: int(redis.Redis.from_url(url).llen("celery")))


def _rows_of_peer(url: str) -> int:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        count = int(connection.execute(text("SELECT count(*) FROM orders")).scalar_one())
    engine.dispose()
    return count


def _dispatched(bench: Bench, database: Database) -> float:
    """Return the recorded deliveries a second, from the times in the ledger. Nothing reads it meanwhile."""
    done = "SELECT count(*) FROM deliveries WHERE state = 'done'"
    before = database.number(done)
    with bench.processes.service(database.url, "delivers") as server:
        time.sleep(1.5)
        begin = time.time_ns() // 1_000_000
        time.sleep(bench.seconds * 1.25)
        end = time.time_ns() // 1_000_000
    after = database.number(done)
    called = bench.processes.delivered(server)
    if called != after - before:
        sys.exit(f"{called} deliveries handed to the handler, but {after - before} recorded")
    end = min(end, database.number("SELECT max(ended_at) FROM deliveries"))  # should all that was free be delivered
    counted = database.number(f"{done} AND ended_at >= :begin AND ended_at < :end", begin=begin, end=end)
    if end <= begin:
        sys.exit("everything was delivered before it could be measured; raise the number of rows")
    return counted * 1000 / (end - begin)


def wait_until_delivered(database: Database) -> None:
    for _ in range(150):
        if not database.number("SELECT count(*) FROM deliveries WHERE state = 'waiting'"):
            return
        time.sleep(0.2)
    sys.exit("what was accepted is not delivered within 30 seconds")


def _delivery_times(database: Database, after: int) -> list[float]:
    statement = text(
        "SELECT d.ended_at - n.received_at FROM deliveries d JOIN notifications n ON n.id = d.notification_id"
        " WHERE d.id > :after ORDER BY 1"
    )
    with database.engine().connect() as connection:
        return [float(time) for time in connection.execute(statement, {"after": after}).scalars()]
