"""The harness: kill, restart and repeat; then drain and compare.

Each round has its own ledger, destinations, orders and kills. Orders arrive without a pause. At the end of a round all
deliveries drain, and the harness compares the acknowledgements with what happened. On PostgreSQL two nodes share the
ledger: one dies, the other lives.
"""

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError

from adapter.ledger.maintenance import faults
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.sandbox.norce import Simulator
from tests import PATIENCE, ROOT
from tests.crash import points
from tests.crash.destinations import Shop, Warehouse
from tests.crash.node import Node
from tests.crash.shoppers import Shoppers
from tests.crash.warehouse import install
from tests.databases import Server, reading_engine
from tests.flows.site import NORCE_TOKEN, PASSWORD, URL_KEY, ExternalServices

RANDOM, RANDOM_START = "at-a-random-moment", "at-a-random-moment-of-the-start"
FROZEN = "frozen-past-its-lease"  # stopped, taken over from, continued; then killed at a random moment
FROZEN_SECONDS = 2.5
OUTAGES = {"sqlite": "disk-full", "postgresql": "database-down"}
MAX_STUCK_ROUNDS = 3  # then the run is given up
SECONDS_TO_POINT = 10.0  # until a node has passed its point; then it dies at a random moment
EXPECTED_ERRORS = {"store_unavailable", "lease_lost", "settlement_not_stored"}


class Stuck(Exception):
    """The service did not do something for so long that it hangs."""


@dataclass
class Counts:
    """The result of a run. `faults` and `complaints` are texts for people."""

    kills: int = 0
    acknowledged: int = 0
    unanswered: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    not_done: int = 0
    shipped: int = 0
    exported: int = 0
    repeated_puts: int = 0
    repeats: int = 0
    conflicts: int = 0
    outages: int = 0
    refused: int = 0
    rounds: int = 0
    by_store: Counter[str] = field(default_factory=Counter)
    by_point: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: "Counts") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def passed(self) -> bool:
        wrong = self.lost or self.doubled or self.disordered or self.not_done or self.faults or self.complaints
        return not wrong

    def as_json(self) -> str:
        shown = {
            name: dict(value.most_common()) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }
        return json.dumps(shown | {"seconds": round(self.seconds, 1)})


class Round:
    """One round. The context ends its processes and destinations."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        *,
        name: str,
        seed: str,
        server: Server | None,
        outages: bool,
        mistake: str | None,
        report: Callable[[str], None],
    ) -> None:
        self.kind = kind
        self.counts = Counts(rounds=1)
        self._folder = folder
        self._mistake = mistake
        self._server = server
        self._outages = outages
        self._rng = random.Random(seed)
        self._report = report
        self.name = name
        self._seed = seed
        self._open = ExitStack()
        self._nodes: list[Node] = []
        self.url = server.empty() if server else f"sqlite:///{folder / 'ledger.db'}"

    def __enter__(self) -> "Round":
        external_services = self._open.enter_context(ExternalServices())
        self.warehouse = Warehouse(random.Random(f"{self._seed}/warehouse"))
        self.shop = Shop(random.Random(f"{self._seed}/shop"), username="crash", password=PASSWORD)
        norce = Simulator(token=NORCE_TOKEN)
        self._environ = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{install(self._folder / 'plugin')}",
            "URL_KEY": URL_KEY,
            "NORCE_TOKEN": NORCE_TOKEN,
            "SHOP_PASSWORD": PASSWORD,
        }
        self._config = self._folder / "config.yaml"
        addresses = [external_services.add(app) for app in (norce.app, self.warehouse, self.shop)]
        addresses[0] += "/checkout"
        self._config.write_text(json.dumps(_config(self.url, *addresses)))
        self._shoppers = Shoppers(
            self.name,
            f"{self._seed}/shoppers",
            norce.records.orders,
            self.shop,
            lambda: [node.address for node in self._nodes if node.address],
            count=4,
        )
        return self

    def __exit__(self, *failure: object) -> None:
        self._shoppers.stop()
        for node in self._nodes:
            node.kill()
        self._open.close()
        if self._server is not None:
            self._server.drop(self.url)

    # --- killing ---

    def kill(self, point: str) -> None:
        """Let one node die at this point, or at a random moment if it does not pass the point."""
        if point in points.WHILE_STARTING or point == RANDOM_START:
            victim = self._start_node(None if point == RANDOM_START else point, self._passes_before_death(point))
        else:
            self._start_missing_nodes()
            if not self._shoppers.wait_for(self._rng.randint(1, 12), PATIENCE):
                raise Stuck("nothing is acknowledged by a service that serves")
            victim = self._rng.choice(self._nodes)
            if point in points.WITH_A_FAILING_STORE or (self._outages and point != FROZEN and self._rng.random() < 0.4):
                self._attack_in_an_outage(victim, point)
            else:
                self._attack(victim, point)
        died_at = self._let_die(victim, point)
        self.counts.kills += 1
        self.counts.by_store[self.kind] += 1
        self.counts.by_point[died_at] += 1
        self._check_ledger()

    def drain(self) -> None:
        """Wait until all deliveries are done, stop the nodes, and compare acknowledgements with what happened."""
        self._shoppers.stop()
        self._start_missing_nodes()
        ends = time.monotonic() + PATIENCE
        while self._deliveries("waiting") and time.monotonic() < ends:
            time.sleep(0.05)
        for node in self._nodes:
            node.send(signal.SIGTERM)
        for node in list(self._nodes):
            if not node.wait_for_death(PATIENCE):
                self.counts.faults.append("a node did not stop")
            elif node.exit_code != 0:
                self.counts.faults.append(f"a node ended with {node.exit_code}: {''.join(node.noise)[-2000:]}")
            self._remove_node(node)
        self._check_ledger()
        self._compare()

    def _attack(self, victim: Node, point: str) -> None:
        if point == RANDOM:
            return
        if point == FROZEN:
            victim.send(signal.SIGSTOP)
            victim.wait_for_death(FROZEN_SECONDS)
            victim.send(signal.SIGCONT)
            return
        victim.arm(point, self._passes_before_death(point), then_stop=point in points.WHILE_STOPPING)

    def _attack_in_an_outage(self, victim: Node, point: str) -> None:
        """Make the store fail for a moment. A node that does not die must recover by itself."""
        self.counts.outages += 1
        with self._outage(victim):
            victim.wait_for_death(self._rng.uniform(0, 0.4))
            self._attack(victim, point)
            victim.wait_for_death(self._rng.uniform(0, 0.6))
        if point in points.WHILE_STOPPING:
            return
        ends = time.monotonic() + PATIENCE
        while victim.alive and not self._shoppers.wait_for(1, 0.5):
            if time.monotonic() > ends:
                raise Stuck(f"not recovered {PATIENCE:g} s after the end of an outage")

    @contextmanager
    def _outage(self, victim: Node) -> Iterator[None]:
        if self._server is None:
            log = self._folder / "ledger.db-wal"
            size = log.stat().st_size if log.exists() else 0
            victim.limit_file_size(self._rng.choice((0, size + self._rng.randint(0, 20_000))))
            try:
                yield
            finally:
                if victim.alive:
                    victim.limit_file_size(None)
            return
        self._server.stop(fast=self._rng.random() < 0.5)
        try:
            yield
        finally:
            self._server.start()

    def _let_die(self, victim: Node, point: str) -> str:
        """Wait for the death of a node or kill it, and return the point at which it died."""
        by_us = point in (RANDOM, RANDOM_START, FROZEN)
        within = self._rng.uniform(0, 0.5) if by_us else SECONDS_TO_POINT
        named = victim.wait_for_death(within)
        if named and not victim.killed:
            output = "".join(victim.noise)[-2000:]
            raise Stuck(f"a node ended by itself, with {victim.exit_code}, armed for {point}: {output}")
        self._remove_node(victim)
        return point if named or by_us else RANDOM

    def _passes_before_death(self, point: str) -> int:
        """Return how often a node passes a point until it dies there."""
        if point == "migration-in-the-middle":
            return self._rng.randint(1, 8)
        often = point in points.WHILE_WORKING and not point.startswith(("heartbeat", "lookup"))
        return self._rng.randint(1, 12) if often else 1

    # --- nodes ---

    def _start_node(self, point: str | None = None, after: int = 1) -> Node:
        node = Node(self._config, self._environ, mistake=self._mistake, point=point, after=after)
        self._nodes.append(node)
        return node

    def _start_missing_nodes(self) -> None:
        while len(self._nodes) < (1 if self._server is None else 2):
            self._start_node()
        for node in self._nodes:
            if not node.wait_until_serving(PATIENCE):
                raise Stuck(f"a node does not serve ({node.exit_code}): {''.join(node.noise)[-2000:]}")

    def _remove_node(self, node: Node) -> None:
        self._nodes.remove(node)
        node.kill()  # if it still runs
        self.counts.errors.update(event["event"] for event in node.errors)
        unexpected = [event for event in node.errors if event["event"] not in EXPECTED_ERRORS]
        self.counts.complaints += [json.dumps(event)[:2000] for event in unexpected]
        if node.noise:
            self.counts.complaints.append("".join(node.noise)[-2000:])

    # --- the ledger and the destinations ---

    def _check_ledger(self) -> None:
        """Check that `store check` finds nothing. While a node lives, a fault may last until its next heartbeat."""
        ends = time.monotonic() + (PATIENCE if self._nodes else 0.0)
        while True:
            found = self._read(faults)
            if not found or time.monotonic() > ends:
                break
            time.sleep(0.1)
        self.counts.faults += found

    def _deliveries(self, state: str | None = None) -> list[dict[str, Any]]:
        return self._read(lambda connection: Queries(connection).deliveries(DeliveryFilter(state=state), limit=100_000))

    def _read(self, ask: Callable[[Any], Any]) -> Any:
        if not self.url.startswith("postgresql") and not (self._folder / "ledger.db").exists():
            return []  # killed before the file was made
        with reading_engine(self.url).connect() as connection:
            try:
                return ask(connection)
            except DBAPIError as error:
                if "no such table" in str(error) or "does not exist" in str(error):
                    return []  # killed before the tables were committed
                raise

    def _compare(self) -> None:
        log, counts = self._shoppers.log, self.counts
        exported, shipped = self.shop.exported(), self.warehouse.shipped
        lost = {(name, at) for name, at in log.acknowledged if not shipped[name, at] or not exported[name]}
        doubled = [key for key, times in (*shipped.items(), *exported.items()) if times > 1]
        disordered = [name for name, came in self.warehouse.order_of.items() if came != sorted(came)]
        strange = [name for name in (*exported, *self.warehouse.order_of) if name.endswith("-conflict")]
        not_done = [each for each in self._deliveries() if each["state"] != "done"]
        counts.acknowledged = len(log.acknowledged)
        counts.unanswered = len(log.unanswered)
        counts.lost, counts.doubled = len(lost), len(doubled)
        counts.disordered, counts.not_done = len(disordered), len(not_done)
        counts.shipped, counts.exported = sum(shipped.values()), sum(exported.values())
        counts.repeated_puts = self.shop.count_repeated_puts()
        counts.repeats, counts.conflicts = log.repeats, log.conflicts
        counts.refused = log.statuses[503]
        counts.complaints += log.complaints + [str(each) for each in self.shop.violations]
        counts.faults += [f"a conflict was delivered: {name}" for name in strange]
        for what, which in (("lost", lost), ("doubled", doubled), ("disordered", disordered), ("not done", not_done)):
            for each in list(which)[:5]:
                self._report(f"{self.name}: {what}: {each}")


def run(
    kills: int,
    *,
    stores: tuple[str, ...],
    seed: str,
    server: Server | None,
    kills_a_round: int = 25,
    only: tuple[str, ...] = (),
    mistake: str | None = None,
    outages: bool = True,
    report: Callable[[str], None],
) -> Counts:
    """Kill the service `kills` times, in rounds, on each store in turn. `only` limits the points."""
    total, began = Counts(), time.monotonic()
    number = stuck_rounds = 0
    points_left: dict[str, list[str]] = {store: [] for store in stores}
    while total.kills < kills:
        kind = stores[number % len(stores)]
        seed_of_round = f"{seed}/{number}"
        rng = random.Random(seed_of_round)
        with tempfile.TemporaryDirectory(prefix="crash-") as folder, ExitStack() as stack:
            with_outages = outages and (number // len(stores)) % 2 == 1
            round_ = Round(
                kind,
                Path(folder),
                name=f"{kind[0]}{number}",
                seed=seed_of_round,
                server=server if kind == "postgresql" else None,
                outages=with_outages,
                mistake=mistake,
                report=report,
            )
            stack.enter_context(round_)
            try:
                for _ in range(min(kills_a_round, kills - total.kills)):
                    left = points_left[kind]
                    if not left:
                        left += only or _points_of(kind, outages=with_outages)
                        rng.shuffle(left)
                    first = round_.counts.kills == 0 and not only
                    round_.kill(rng.choice(IN_MIGRATION) if first else left.pop())
                round_.drain()
            except Stuck as error:
                # Nothing was compared, so its kills prove nothing and do not count.
                round_.counts = Counts(rounds=1, faults=[f"{round_.name}: {error}"])
                stuck_rounds += 1
            total.add(round_.counts)
        number += 1
        total.seconds = time.monotonic() - began
        outage = f" ({OUTAGES[kind]})" if with_outages else ""
        report(
            f"{kind}{outage}: {total.kills}/{kills} kills, {total.acknowledged} acknowledged, {total.lost} lost,"
            f" {total.doubled} doubled, {total.seconds:.0f} s"
        )
        for each in (*round_.counts.faults, *round_.counts.complaints):
            report(f"  {each}")
        if stuck_rounds == MAX_STUCK_ROUNDS:
            break
    return total


IN_MIGRATION = ("migration-in-the-middle", "migration-before-commit", RANDOM_START)


def _points_of(kind: str, *, outages: bool) -> list[str]:
    """Return the points of the next kills: each once, and random moments for a quarter of the kills."""
    named = [*points.WHILE_STARTING, *points.WHILE_WORKING, *points.WHILE_STOPPING]
    named = [point for point in named if point not in IN_MIGRATION]  # every round begins with one of those
    if outages:
        named += points.WITH_A_FAILING_STORE
    if kind == "postgresql":
        named.append(FROZEN)
    return named + [RANDOM] * 6 + [RANDOM_START] * 2


def _config(store_url: str, norce: str, warehouse: str, shop: str) -> dict[str, Any]:
    delivered = {
        "callback": "order-status",
        "when": {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
        "timeout": "1s",
        "retry": {"schedule": ["100ms"] * 50},
        "concurrency": 16,
    }
    return {
        "adapter": {"id": "jetshop_adapter", "public_url": "http://127.0.0.1:8080"},
        "server": {"host": "127.0.0.1", "port": 0},
        "operations": {"port": 0, "socket": None},
        "store": {"url": store_url},
        "norce": {"base_url": norce, "timeout": "1s"},
        "dispatcher": {"grace": "300ms"},
        "queues": {"first_pause": "100ms", "max_pause": "200ms"},
        "merchants": {"fjallboden": {"tokens": ["${env:NORCE_TOKEN}"], "channels": {"se-b2c": {}}}},
        "senders": {"signed_urls": {"keys": {"k1": "${env:URL_KEY}"}}},
        "callbacks": {"order-status": {"kind": "notification", "scope": "/state/currentStatus"}},
        "routes": {
            "ship": delivered | {"handler": "warehouse", "refetch": False, "settings": {"url": warehouse}},
            "export-payment": delivered
            | {
                "handler": "jetshop",
                "settings": {
                    "base_url": shop,
                    "shop_id": "1",
                    "auth": {"type": "basic", "username": "crash", "password": "${env:SHOP_PASSWORD}"},
                    "unmapped": "passthrough",
                },
            },
        },
    }
