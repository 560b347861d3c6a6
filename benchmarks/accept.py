"""
Durable accept over the bare Starlette echo, in one run: `make bench`.

Orders of about 5 KB with random ids, at 1 and at 64 connections; server on one core, load on the other; everything on:
signature, condition, identity, metrics, one log line. Each round drives both servers in turn; the ratio is the median
of the rounds' ratios. Rows stored must equal the 200s answered, or the run fails.
"""

import argparse
import json
import os
import platform
import secrets
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvloop
from load import Load, drive

from adapter.callbacks.senders import signature

HERE = Path(__file__).parent
KEY = "benchmark-key-of-enough-bytes"
CONFIG = """
adapter: {{id: bench_adapter, public_url: "http://127.0.0.1:{port}"}}
server: {{host: 127.0.0.1, port: {port}}}
operations: {{host: 127.0.0.1, port: {operations_port}}}
store: {{url: "sqlite:///{store}"}}
merchants: {{bench: {{tokens: ["${{file:token}}"], channels: {{"1": {{}}}}}}}}
senders: {{signed_urls: {{keys: {{k: "${{file:key}}"}}}}}}
callbacks:
  order-status: {{kind: notification, scope: /state/currentStatus, schema: {{enum: [accepted, completed]}}}}
routes:
  held: {{callback: order-status, when: {{scope: /state/currentStatus, schema: {{const: completed}}}}, handler: holds,
          refetch: false, timeout: 10m, concurrency: 1}}
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=20_000, help="per round at 64 connections")
    options.add_argument("--results", type=Path, default=HERE / "results.json")
    given = options.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = cores[0], cores[-1]
    os.sched_setaffinity(0, {load_core})
    with tempfile.TemporaryDirectory(prefix="norce-adapter-bench-", dir=HERE) as folder:
        print_machine(Path(folder), server_core, load_core)
        rounds = measure(Path(folder), given.rounds, given.requests, server_core)
    results = summary(rounds)
    for key, value in results.items():
        print(f"{key:45} {value:10.3f}")
    given.results.write_text(json.dumps({**results, "rounds": rounds}, indent=1) + "\n")


def measure(folder: Path, rounds: int, requests: int, core: int) -> list[dict[str, Any]]:
    echo_port, port, operations_port = free_port(), free_port(), free_port()
    store = folder / "ledger.db"
    (folder / "token").write_text(secrets.token_hex(16))
    (folder / "key").write_text(KEY)
    (folder / "config.yaml").write_text(CONFIG.format(port=port, operations_port=operations_port, store=store))
    with (folder / "service.log").open("wb") as log:
        servers = [
            start(core, log, "echo", str(echo_port)),
            start(core, log, "service", str(folder / "config.yaml")),
        ]
        try:
            wait_for(echo_port)
            wait_for(port)
            accepted = 0
            measured: list[dict[str, Any]] = []
            for number in range(-1, rounds):  # the first one warms up
                row: dict[str, Any] = {"fdatasync_p50_ms": fdatasync_p50_ms(folder)}
                for connections, count in ((64, requests), (1, max(requests // 10, 200))):
                    prepared = [request(port) for _ in range(count)]
                    for name, at in (("echo", echo_port), ("accept", port)):
                        load = uvloop.run(drive("127.0.0.1", at, prepared, connections))
                        if set(load.statuses) != {200}:
                            sys.exit(f"{name} answered {load.statuses}")
                        row |= shown(f"{name}_{connections}", load)
                        accepted += load.statuses[200] if name == "accept" else 0
                if number >= 0:
                    measured.append(row)
            stored = sqlite3.connect(store).execute("SELECT count(*) FROM notifications").fetchone()[0]
            if stored != accepted:
                sys.exit(f"{accepted} accepted, but {stored} stored")
            print(f"{accepted} accepted, {stored} stored")
            return measured
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait(40)


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    def over(one: str, other: str) -> float:
        return statistics.median(row[one] / row[other] for row in rounds)

    return {
        "accept_sqlite_over_echo": over("accept_64_per_second", "echo_64_per_second"),
        "accept_sqlite_over_echo_1conn": over("accept_1_per_second", "echo_1_per_second"),
        "accept_p99_over_echo_p99": over("accept_64_p99_ms", "echo_64_p99_ms"),
        "accept_p50_1conn_over_fdatasync_p50": over("accept_1_p50_ms", "fdatasync_p50_ms"),
    } | {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def shown(name: str, load: Load) -> dict[str, float]:
    return {f"{name}_per_second": load.per_second, f"{name}_p50_ms": load.p50_ms, f"{name}_p99_ms": load.p99_ms}


TEMPLATE = json.loads(files("adapter.demo").joinpath("orders", "order-completed.json").read_text("utf-8"))
TEMPLATE |= {"merchant": "bench", "channel": "1", "cart": {**TEMPLATE["cart"], "items": TEMPLATE["cart"]["items"][:1]}}
for _member in ("validations", "hooks", "notifications", "shippings"):
    TEMPLATE.pop(_member)


def request(port: int) -> bytes:
    order_id = secrets.token_urlsafe(18)
    body = json.dumps({**TEMPLATE, "id": order_id}, ensure_ascii=False, indent=1).encode()
    sig = signature(KEY.encode(), "bench", "1", order_id, "order-status")
    path = f"/api/v1/callbacks/orders/{order_id}/order-status?merchant=bench&channel=1&key=k&sig={sig}"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"x-merchant: bench\r\nx-channel: 1\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def start(core: int, log: Any, *arguments: str) -> subprocess.Popen[bytes]:
    server = subprocess.Popen([sys.executable, str(HERE / "servers.py"), *arguments], stdout=log, stderr=log)
    os.sched_setaffinity(server.pid, {core})
    return server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit(f"nothing listens on port {port}")


def fdatasync_p50_ms(folder: Path) -> float:
    """What it costs to bring a rewrite of 8 KB to this disk."""
    path, times = folder / "probe", []
    with path.open("wb", buffering=0) as probe:
        for _ in range(60):
            probe.seek(0)
            probe.write(os.urandom(8192))
            started = time.perf_counter()
            os.fdatasync(probe.fileno())
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def print_machine(folder: Path, server_core: int, load_core: int) -> None:
    filesystem = os.statvfs(folder)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores (server on {server_core}, load on {load_core}), "
        f"kernel {platform.release()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version} "
        f"(WAL, synchronous=FULL), blocks of {filesystem.f_bsize} bytes, a body of {len(request(0)) - 250} bytes or so"
    )


if __name__ == "__main__":
    main()
