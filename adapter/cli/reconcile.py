"""The command `reconcile`, which finds notifications and orders that never came."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from adapter.cli.shared import (
    FAILED,
    TEXT,
    USAGE,
    end,
    list_output_option,
    options,
    parse_moment,
    print_rows,
    printable,
    progress_bar,
    service_options,
    who_option,
)
from adapter.moments import to_datetime

COLUMNS = ("merchant", "events", "received", "missed", "others")
ORDER_COLUMNS = ("merchant", "channel", "orders", "missing", "brought", "young", "others")


@click.command()
@click.option(
    "--since",
    callback=parse_moment,
    metavar="TIME",
    help="Read back to this time, even if that was read before; UTC by default. With --orders: only orders created "
    "then or later; by default in the last 48 hours.",
)
@click.option("--dry-run", is_flag=True, help="Only count what is missing.")
@click.option("--orders", is_flag=True, help="Compare Norce's orders with the ledger, instead of its event log.")
@click.option("--bring", is_flag=True, help="With --orders: receive the missing orders as Norce has them now.")
@click.option("--why", type=TEXT, help="With --bring: your reason. It is recorded.")
@options(who_option, list_output_option, service_options)
def reconcile(
    since: int | None,
    *,
    dry_run: bool,
    orders: bool,
    bring: bool,
    why: str | None,
    who: str,
    output: str,
    config_path: Path,
    to: str | None,
    token: str | None,
) -> None:
    """Receive the notifications that are missing.

    They are read from Norce's event log. Without --since, reading starts where it ended the last time.

    An order without our registration leaves no event. --orders lists the orders that fulfil a callback's condition and
    of which the ledger has no notification. Only --bring receives them.
    """
    if bring and not orders:
        end(USAGE, "--bring needs --orders")
    if bring and not (why or "").strip():
        end(USAGE, "--bring needs --why: your reason, which is recorded")
    asked: dict[str, Any] = {"since": None if since is None else to_datetime(since)}
    if not orders:
        rows, _, error = _read_lines(
            "reconcile", asked | {"dry_run": dry_run}, COLUMNS[:1], COLUMNS,
            lambda line: f"{line['events']} events, {line['missed']} missed", output, config_path, to, token,
        )  # fmt: skip
        if output == "json":
            click.echo(json.dumps(rows))
        elif rows:
            print_rows(rows, output, COLUMNS)
            if dry_run:
                click.echo("Nothing was received, because this was a dry run.", err=True)
        if error is not None:
            end(FAILED, f"the event log was not read to its end: {printable(error)}")
        return
    asked["by"] = {"who": who, "why": why} if bring and not dry_run else None
    rows, ids, error = _read_lines(
        "reconcile-orders", asked, ORDER_COLUMNS[:2], ORDER_COLUMNS,
        lambda line: f"{line['orders']} orders, {line['missing']} missing", output, config_path, to, token,
    )  # fmt: skip
    found = [row | {"ids": ids[row["merchant"], row["channel"]]} for row in rows]
    if output == "json":
        click.echo(json.dumps(found))
    elif found and output == "csv":
        print_rows(found, output)
    elif rows:
        print_rows(rows, output, ORDER_COLUMNS)
        for (merchant, channel), missing in ids.items():
            for order_id in missing:
                click.echo(printable(f"missing: {order_id} ({merchant}, channel {channel})"))
        if any(ids.values()) and asked["by"] is None:
            click.echo("Nothing was received; --bring --why … receives the missing orders.", err=True)
    if error is not None:
        end(FAILED, f"not all orders were compared: {printable(error)}")


def _read_lines(
    command: str,
    asked: dict[str, Any],
    keys: tuple[str, ...],
    columns: tuple[str, ...],
    describe: Callable[[dict[str, Any]], str],
    output: str,
    config_path: Path,
    to: str | None,
    token: str | None,
) -> tuple[list[dict[str, Any]], dict[tuple[str, ...], list[str]], str | None]:
    """Run a command with progress bars.

    Returns:
        The last line of each key, the ids in all lines of the key, and the error that ended the command.
    """
    from adapter.cli.service import running_service

    found: dict[tuple[str, ...], dict[str, Any]] = {}
    ids: dict[tuple[str, ...], list[str]] = {}
    error = None
    with running_service(config_path, to, token) as service, progress_bar(hidden=output == "json") as progress:
        tasks = {}
        for line in service.run_line_by_line(command, asked):
            if line.get("merchant") is None:
                error = line.get("error") or "the service ended early"
                continue
            key = tuple(line[name] for name in keys)
            found[key] = {name: line.get(name) for name in columns}
            ids.setdefault(key, []).extend(line.get("ids", ()))
            if key not in tasks:
                tasks[key] = progress.add_task(key[0], total=None)
            # The length of the list is no total: reading stops where it ended the last time.
            progress.update(
                tasks[key], completed=line[columns[len(keys)]], description=f"{' '.join(key)}: {describe(line)}"
            )
    return list(found.values()), ids, error
