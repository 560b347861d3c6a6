"""Measurements of verdicts: hooks beside the echo, stalled routes, a flood of notifications, and large deliveries."""

import contextlib
import itertools
import socket
import sys
from collections.abc import Iterator
from typing import Any

import load
import orders
from processes import Server, settle
from rows import CONNECTIONS, Bench, Round, ratios, wait_until_delivered

DEADLINE_MS = 2000
MANY_ROUTES = 100
SHARES = (1, 10, 100)  # of a hundred routes, stalled
STALLS = ("sleeps", "blocks", "spins", "norce")
MEMBERS = 150


def hooks(bench: Bench) -> Iterator[Round]:
    """Hooks beside the echo: a small rule, a large one, and a handler on the event loop of the plugins."""
    routes = {
        "hook_small_rule": ("rules", {"rules": [_rule("small", _small())]}),
        "hook_large_rule": ("rules", {"rules": [_rule("large", _large())]}),
        "hook_plugin": ("accepts", {}),
    }
    callbacks = {name.replace("_", "-"): route for name, route in routes.items()}
    database = bench.databases.new("sqlite")
    with bench.processes.echo() as echo, _serving(bench, database.url, callbacks, deadline="2s") as server:
        for _ in range(bench.rounds):
            row: Round = {}
            sent = {name: orders.prepared(bench.scaled(20_000), name.replace("_", "-")) for name in routes}
            for name, port in [("hook_echo", echo.port), *((name, server.port) for name in routes)]:
                requests = itertools.cycle(sent.get(name, sent["hook_small_rule"]))
                met = load.closed(port, requests, connections=CONNECTIONS, seconds=bench.seconds)
                _all_answered(name, met)
                row |= {f"{name}_per_second": met.per_second, f"{name}_p99_ms": met.percentile_ms(99)}
                settle()
            yield row | ratios(
                row,
                **{f"{name}_over_echo": (f"{name}_per_second", "hook_echo_per_second") for name in routes},
                hook_small_rule_p99_over_echo=("hook_small_rule_p99_ms", "hook_echo_p99_ms"),
            )
    database.remove()


def stalls(bench: Bench) -> Iterator[Round]:
    """The slowest answer in a thousand over the deadline, while some of a hundred routes stall."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as silent_norce:
        for _ in range(bench.rounds):
            row: Round = {}
            for stall, share in itertools.product(STALLS, SHARES):
                row[f"verdict_p999_over_deadline_{stall}_{share}"] = _slowest(bench, stall, share, silent_norce)
            yield row | {"verdict_p999_over_deadline": max(row.values())}


def flood(bench: Bench) -> Iterator[Round]:
    """The 99th of a hundred hooks a second beside 64 connections of notifications, on one core, over the deadline."""
    database = bench.databases.new("sqlite")
    callbacks = {"quiet": ("rules", {"rules": [_rule("small", _small())]})}
    with _serving(bench, database.url, callbacks, deadline=f"{DEADLINE_MS}ms") as server:
        for _ in range(bench.rounds):
            asked = [orders.prepared(int(100 * max(10 * min(bench.scale, 1), 2)), "quiet") for _ in range(2)]
            quiet = load.open_loop(server.port, asked[0], per_second=100, connections=CONNECTIONS)
            flooded, noise = load.beside(
                server.port, asked[1], per_second=100, connections=CONNECTIONS,
                beside=orders.endless(), beside_connections=CONNECTIONS,
            )  # fmt: skip
            for met in (quiet, flooded, noise):
                _all_answered("flood", met)
            yield {
                "verdict_quiet_p99_ms": quiet.percentile_ms(99),
                "verdict_flooded_p99_ms": flooded.percentile_ms(99),
                "verdict_flood_notifications_per_second": noise.per_second,
                "verdict_p99_under_notification_flood_over_deadline": flooded.percentile_ms(99) / DEADLINE_MS,
            }
    database.remove()


def pause(bench: Bench) -> Iterator[Round]:
    """The slowest of 200 hooks a second while orders of 1 MiB arrive, are read again with 3.9 MiB and delivered."""
    database = bench.databases.new("sqlite")
    callbacks = {"quiet": ("rules", {"rules": [_rule("small", _small())]})}
    with (
        bench.processes.norce() as norce,
        _serving(bench, database.url, callbacks, deadline="2s", norce_port=norce.port, handler="compares") as server,
    ):
        for _ in range(bench.rounds):
            seconds = max(bench.seconds * 2, 2)
            quiet = orders.prepared(int(200 * seconds), "quiet")
            large = [orders.request(make=orders.large) for _ in range(int(seconds))]
            hooks, notifications = load.open_loops(
                server.port, (quiet, 200), (large, 1), connections=CONNECTIONS
            )  # fmt: skip
            _all_answered("pause", notifications)
            _all_answered("pause", hooks)
            wait_until_delivered(database)
            yield {"loop_pause_4mib_ms": hooks.percentile_ms(100), "loop_pause_4mib_p99_ms": hooks.percentile_ms(99)}
    database.remove()


def _slowest(bench: Bench, stall: str, share: int, silent_norce: socket.socket) -> float:
    """Return the 99.9th percentile over the deadline. Exit unless every request is answered."""
    per_second = 200
    names = [f"hook-{number}" for number in range(MANY_ROUTES)]
    handlers: dict[str, tuple[str, dict[str, Any]]] = {
        name: (stall if number < share else "accepts", {}) for number, name in enumerate(names)
    }
    kind = "validation" if stall == "norce" else "hook"
    if kind == "validation":
        handlers = {name: ("approves", {}) for name in names}
    database = bench.databases.new("sqlite")
    norce = silent_norce.getsockname()[1]
    deadline = f"{DEADLINE_MS}ms"
    with _serving(bench, database.url, handlers, deadline=deadline, kind=kind, norce_port=norce) as server:
        called = names[:share] if stall == "norce" else names
        count = max(int(1500 * min(bench.scale, 1)), MANY_ROUTES)
        requests = [orders.request(name) for name in itertools.islice(itertools.cycle(called), count)]
        met = load.open_loop(server.port, requests, per_second=per_second, connections=1024)
    database.remove()
    _all_answered(f"{stall} {share}", met)
    return met.percentile_ms(99.9) / DEADLINE_MS


def _all_answered(name: str, met: load.Load) -> None:
    if set(met.statuses) != {200}:
        sys.exit(f"{name} was answered {dict(met.statuses)}")


@contextlib.contextmanager
def _serving(
    bench: Bench,
    url: str,
    callbacks: dict[str, tuple[str, dict[str, Any]]],
    *,
    deadline: str,
    kind: str = "hook",
    norce_port: int | None = None,
    handler: str = "holds",
) -> Iterator[Server]:
    """Run the service with a callback of this kind for each handler. `handler` takes notifications."""
    watched = {"watch": "/cart", "target": "/cart"} if kind == "hook" else {}
    parts = {
        "callbacks": {name: {"kind": kind, "deadline": deadline, **watched} for name in callbacks},
        "routes": {
            name: {"callback": name, "handler": handler, "no_answer": "approve", "settings": settings}
            for name, (handler, settings) in callbacks.items()
        },
    }
    if norce_port is not None:
        parts["norce"] = {"base_url": f"http://127.0.0.1:{norce_port}"}
    with bench.processes.service(url, handler, more=parts) as server:
        yield server


def _rule(code: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"scope": "/cart", "schema": schema, "code": code, "message": "This cannot be bought."}


def _small() -> dict[str, Any]:
    return {
        "required": ["items", "total"],
        "properties": {
            "reference": {"type": "string"},
            "items": {"type": "array", "minItems": 1},
            "total": {"type": "object"},
        },
    }


def _large() -> dict[str, Any]:
    """Return a schema of about 150 properties. Every cart meets it; most members are optional."""
    text = {"type": ["string", "null"], "maxLength": 100, "pattern": "^[A-Za-z0-9 -]*$"}
    more = {f"member{number}": text for number in range(MEMBERS // 3)}
    return {
        "required": ["items", "total"],
        "properties": {
            **more,
            "items": {"type": "array", "minItems": 1, "items": {"type": "object", "properties": more}},
            "total": {"type": "object", "properties": more},
        },
    }
