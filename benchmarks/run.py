"""Measurements of the project's claims, as ratios within one run: `make bench`, `make bench ONLY="accept dispatch"`.

Every figure is the median of its rounds; a ratio is the median of the ratios of the rounds. `results.json` keeps the
figures and their rounds. A group that does not run keeps its former figures.
"""

import argparse
import json
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import rows
import verdicts
from processes import HERE, Processes
from rows import Bench, Round
from stores import databases

# The function of each group, and its number of rounds.
GROUPS: dict[str, tuple[Callable[[Bench], Iterator[Round]], int]] = {
    "accept": (rows.accept, 5),
    "open_loop": (rows.open_loop, 3),
    "slow_fsync": (rows.slow_fsync, 3),
    "peers": (rows.peers, 3),
    "overload": (rows.overload, 3),
    "dispatch": (rows.dispatch, 3),
    "latency": (rows.latency, 3),
    "memory": (rows.memory, 3),
    "growth": (rows.growth, 1),
    "backlog": (rows.backlog, 3),
    "hooks": (verdicts.hooks, 3),
    "stalls": (verdicts.stalls, 3),
    "flood": (verdicts.flood, 3),
    "pause": (verdicts.pause, 3),
}

BARS: dict[str, tuple[str, float]] = {
    "accept_sqlite_over_echo": (">=", 0.22),
    "accept_sqlite_over_commit_each": (">=", 2.5),
    "accept_postgres_over_insert_each": (">=", 2.5),
    "accept_p50_1conn_over_fdatasync_p50": ("<=", 6),
    "accept_p99_open_loop_2000_ms_over_fdatasync_p50": ("<=", 50),
    "accept_sqlite_over_commit_each_slow_fsync": (">=", 10),
    "accept_sqlite_over_celery": (">=", 7),
    "accept_sqlite_over_sqlalchemy": (">=", 5),
    "overload_accept_over_capacity": (">=", 0.9),
    "dispatch_noop_sqlite_over_echo": (">=", 0.06),
    "dispatch_noop_postgres_over_echo": (">=", 0.06),
    "dispatch_hot_lane_over_free": (">=", 0.5),
    "dispatch_paused_queue_over_free": (">=", 0.5),
    "accepted_to_delivered_p95_ms": ("<=", 100),
    "rss_over_echo": ("<=", 2.6),
    "rss_growth_after_1m_accepts": ("<=", 0.10),
    "accept_at_1m_rows_over_empty": (">=", 0.85),
    "hook_small_rule_over_echo": (">=", 0.40),
    "hook_small_rule_p99_over_echo": ("<=", 2),
    "hook_large_rule_over_echo": (">=", 0.30),
    "hook_plugin_over_echo": (">=", 0.18),
    "verdict_p999_over_deadline": ("<=", 1),
    "verdict_p99_under_notification_flood_over_deadline": ("<=", 0.02),
    "loop_pause_4mib_ms": ("<=", 100),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("groups", nargs="*", metavar="GROUP", help=f"all, or some of: {', '.join(GROUPS)}")
    options.add_argument("--rounds", type=int, help="instead of the number of each group")
    options.add_argument("--seconds", type=float, default=4.0, help="how long each server is driven in a round")
    options.add_argument("--scale", type=float, default=1.0, help="of all sizes; below 1 only to try out the benchmark")
    options.add_argument("--results", type=Path, default=HERE / "results.json")
    given = options.parse_args()
    unknown = set(given.groups) - set(GROUPS)
    if unknown:
        options.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    begun = time.monotonic()
    left_out: dict[str, str] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the folder is removed then, too
    with tempfile.TemporaryDirectory(prefix="tmp-bench-", dir=HERE) as folder:
        processes = Processes(Path(folder))
        print(processes.machine())
        print(f"SQLite {sqlite3.sqlite_version}: WAL, synchronous=FULL. Redis: appendfsync always.")
        with databases(processes) as made:
            for name in given.groups or GROUPS:
                measure, usual = GROUPS[name]
                bench = Bench(
                    processes=processes, databases=made, rounds=given.rounds or usual, seconds=given.seconds,
                    scale=given.scale, left_out=left_out,
                )  # fmt: skip
                print(f"\n{name}: {measure.__doc__}", flush=True)
                measured = list(measure(bench))
                show(summary(measured), {})
                keep(given.results, name, measured)
    print(f"\nAgainst the bars, after {(time.monotonic() - begun) / 60:.0f} minutes:")
    results = json.loads(given.results.read_text())
    show({key: results[key] for key in BARS if key in results}, left_out)


def summary(measured: list[Round]) -> dict[str, float]:
    keys = {key: None for row in measured for key in row}
    return {key: statistics.median(row[key] for row in measured if key in row) for key in keys}


def keep(path: Path, group: str, measured: list[Round]) -> None:
    """Replace the rounds of this group in the file, and compute all figures again."""
    former = json.loads(path.read_text()) if path.exists() else {}
    rounds = {name: former.get("rounds", {}).get(name, []) for name in GROUPS} | {group: measured}
    figures = {key: value for of_group in rounds.values() for key, value in summary(of_group).items()}
    claimed = {key: figures.pop(key) for key in BARS if key in figures}
    path.write_text(json.dumps({**claimed, **figures, "rounds": rounds}, indent=1) + "\n")


def show(figures: dict[str, float], left_out: dict[str, str]) -> None:
    for key, value in figures.items():
        better, bar = BARS.get(key, (None, 0.0))
        met = value >= bar if better == ">=" else value <= bar
        verdict = "" if better is None else f"  {better} {bar:<6g} {'ok' if met else 'missed'}"
        print(f"  {key:52} {value:12.3f}{verdict}")
    for key, reason in left_out.items():
        print(f"  {key:52}     left out: {reason}")


if __name__ == "__main__":
    main()
