"""Commands about the ledger: notifications, queues, verdicts and the store.

Commands that only read use the database. Commands that change queues go through the running service.
`store migrate` needs the lock of a ledger that no service uses.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from adapter.cli.shared import (
    FAILED,
    NOTHING_MATCHED,
    STORE,
    TEXT,
    USAGE,
    as_json,
    author_options,
    channel_options,
    config_option,
    end,
    in_one_line,
    list_options,
    load_config,
    open_ledger,
    options,
    order_options,
    output_option,
    print_rows,
    printable,
    read_options,
    route_option,
    service_options,
    time_options,
    whole_list_options,
)
from adapter.config import Config
from adapter.ledger.clock import read_from_outside
from adapter.ledger.commands import QueueChange, Step
from adapter.ledger.databases import database_at
from adapter.ledger.maintenance import back_up, faults, figures
from adapter.ledger.queries import ORPHANED, Author, DeliveryFilter, Queries, Rows
from adapter.ledger.settlement import State

DELIVERY_COLUMNS = (
    "id", "received_at", "merchant", "channel", "order_id", "route", "state", "reason", "tries", "next_at", "ended_at",
    "code", "reference",
)  # fmt: skip
VERDICT_COLUMNS = (
    "at", "kind", "merchant", "channel", "order_id", "route", "decided", "codes", "answered", "took_ms",
)  # fmt: skip
NOTIFICATION_COLUMNS = (
    "id", "received_at", "merchant", "channel", "order_id", "reference", "callback", "source", "conflicts_with",
)  # fmt: skip
QUEUE_COLUMNS = (
    "route", "merchant", "channel", "state", "paused_by", "reason", "paused_until", "waiting", "running",
)  # fmt: skip
ACTION_COLUMNS = ("id", "at", "command", "who", "why", "matching", "changed")
COUNT_COLUMNS = ("route", "merchant", "channel", "state", "reason", "count")

ID = click.IntRange(0, 2**63 - 1)
Body = TypeVar("Body", DeliveryFilter, Step, QueueChange, Author)


queue_options = options(
    click.argument("route", type=TEXT), channel_options, author_options, output_option, service_options
)


@contextlib.contextmanager
def read_queries(config: Path | Config) -> Iterator[Queries]:
    with open_ledger(config if isinstance(config, Config) else load_config(config)) as connection:
        yield Queries(connection)


# --- notifications --------------------------------------------------------------------------------------------------


@click.group("notifications")
def notifications_group() -> None:
    """List and show notifications."""


@notifications_group.command("list")
@order_options
@click.option("--callback", type=TEXT, help="Only of this callback.")
@time_options("notifications received")
@channel_options
@list_options
def notifications_list(output: str, config_path: Path, **filters: Any) -> None:
    """List notifications, newest first."""
    config = load_config(config_path)
    with read_queries(config) as queries:
        rows = queries.notifications(**filters)
    print_list(rows, output, NOTIFICATION_COLUMNS, config, "no notification matches")


@notifications_group.command("show")
@click.argument("notification_id", type=ID)
@read_options
def notifications_show(notification_id: int, output: str, config_path: Path) -> None:
    """Show a notification with its deliveries, without its body."""
    with read_queries(config_path) as queries:
        notification = queries.notification(notification_id)
    missing = f"there is no notification {notification_id}"
    print_record(notification, "deliveries", output, DELIVERY_COLUMNS, missing=missing)


# --- queues ---------------------------------------------------------------------------------------------------------


@click.group("queues")
def queues_group() -> None:
    """List, pause and resume queues.

    A queue is one route for one merchant and channel.
    """


@queues_group.command("list")
@whole_list_options
def queues_list(output: str, config_path: Path) -> None:
    """List the queues with their state, their pause and their waiting deliveries.

    A queue whose route, merchant or channel is no longer configured is orphaned.
    """
    from adapter.cli.service import is_held

    config = load_config(config_path)
    with open_ledger(config) as connection:
        now = read_from_outside(database_at(config.store.url), connection)
        rows = Queries(connection).queues(now, config.queue_keys)
    shadows = {name for name, route in config.routes.items() if route.mode == "shadow"}
    rows = [row | {"state": "shadow"} if row["route"] in shadows and row["state"] != ORPHANED else row for row in rows]
    if is_held(config):
        rows = [row | {"state": "held"} if row["state"] == "running" else row for row in rows]
    nothing = "there is no queue yet: `serve` makes one for each notification route, merchant and channel"
    print_rows(rows, output, QUEUE_COLUMNS, nothing=nothing, channels=config.channels)


@queues_group.command("pause")
@queue_options
def queues_pause(**given: Any) -> None:
    """Pause the queues of ROUTE until you resume them. Their deliveries wait meanwhile."""
    _pause_or_resume("pause", **given)


@queues_group.command("resume")
@queue_options
def queues_resume(**given: Any) -> None:
    """Resume the queues of ROUTE at once, whatever the cause of their pause."""
    _pause_or_resume("resume", **given)


def _pause_or_resume(
    command: str,
    *,
    who: str,
    why: str,
    output: str,
    config_path: Path,
    to: str | None,
    token: str | None,
    **filters: Any,
) -> None:
    from adapter.cli.service import running_service

    change = parse_options({"by": {"who": who, "why": why}, **filters}, QueueChange)
    with running_service(config_path, to, token) as service:
        changed = service.run(command, change)
    click.echo(json.dumps({f"{command}d": changed}) if output == "json" else f"{changed} {command}d")
    if not changed:
        end(NOTHING_MATCHED, f"route {change.route} has no such queue; `norce-adapter queues list` lists them")


# --- verdicts -------------------------------------------------------------------------------------------------------


@click.group("verdicts")
def verdicts_group() -> None:
    """List recorded verdicts, and count those without effect."""


@verdicts_group.command("list")
@click.option(
    "--kind",
    type=click.Choice(["answer", "late", "shadow"]),
    help="Only refusals and patches that were answered, late verdicts, or those of shadow routes.",
)
@route_option
@order_options
@time_options("verdicts reached")
@channel_options
@list_options
def verdicts_list(output: str, config_path: Path, **filters: Any) -> None:
    """List refusals, patches, late verdicts and those of shadow routes, newest first."""
    config = load_config(config_path)
    with read_queries(config) as queries:
        found = queries.verdicts(**filters)
    rows = found
    if output == "table":
        rows = Rows((row | {"codes": " ".join(row["codes"])} for row in found), found.matching)
    print_list(rows, output, VERDICT_COLUMNS, config, "no recorded verdict matches; plain approvals are not recorded")


@verdicts_group.command("stats")
@time_options("verdicts reached")
@whole_list_options
def verdicts_stats(since: int | None, until: int | None, output: str, config_path: Path) -> None:
    """Count late and shadow verdicts by route, and how many differ from the answer."""
    with read_queries(config_path) as queries:
        rows = queries.count_verdicts(since=since, until=until)
    print_rows(rows, output, nothing="no route had a late or shadow verdict")


# --- the store ------------------------------------------------------------------------------------------------------


@click.group("store")
def store_group() -> None:
    """Check, measure, migrate, adopt and back up the database, and list what people changed."""


@store_group.command("check")
@config_option
def store_check(config_path: Path) -> None:
    """Check the database for faults. Exit with 1 if there are any."""
    config = load_config(config_path)
    location = database_at(config.store.url).location
    with open_ledger(config) as connection:
        found = faults(connection)
    for each in found:
        click.echo(each, err=True)
    if found:
        end(FAILED, f"{location} has {len(found)} kinds of faults")
    click.echo(f"{location} has no faults")


@store_group.command("stats")
@read_options
def store_stats(output: str, config_path: Path) -> None:
    """Show the number of rows, the size, and the processes that use the database."""
    config = load_config(config_path)
    with open_ledger(config) as connection:
        now = read_from_outside(database_at(config.store.url), connection)
        record = figures(connection) | {"processes": Queries(connection).processes(now)}
    print_record(record, "processes", output)


@store_group.command("actions")
@list_options
def store_actions(limit: int, output: str, config_path: Path) -> None:
    """List the changes that people made in the ledger and at Norce, newest first."""
    with read_queries(config_path) as queries:
        rows = queries.actions(limit)
    print_rows(rows, output, ACTION_COLUMNS, nothing="nobody has changed anything yet", matching=rows.matching)


@store_group.command("migrate")
@config_option
def store_migrate(config_path: Path) -> None:
    """Bring the tables up to date, as `serve` does when it starts. No service may be running."""
    from adapter import logs
    from adapter.ledger.store import Store, StoreInUse, StoreUnavailable

    logs.configure(level="warning")
    config = load_config(config_path)
    try:
        Store.open(config.store.url).close()
    except (StoreInUse, StoreUnavailable) as error:
        end(STORE, in_one_line(error))
    click.echo(f"{database_at(config.store.url).location} is up to date")


@store_group.command("adopt")
@author_options
@click.option("--dry-run", is_flag=True, help="Only show the change, and how many deliveries wait.")
@output_option
@config_option
def store_adopt(who: str, why: str, *, dry_run: bool, output: str, config_path: Path) -> None:
    """Bind the database to the Norce and the adapter id of this configuration.

    At its first start a database is bound to those that are configured then. No service may be running.
    """
    from adapter import logs
    from adapter.ledger.binding import adopt, binding
    from adapter.ledger.store import Store, StoreInUse, StoreUnavailable
    from adapter.routing.from_config import ledger_binding

    logs.configure(level="warning")
    config = load_config(config_path)
    given = ledger_binding(config)
    with open_ledger(config) as connection:
        former = binding(connection)
        waiting = sum(row["count"] for row in Queries(connection).count(DeliveryFilter(state=State.WAITING.value)))
    if former == given:
        end(NOTHING_MATCHED, f"{database_at(config.store.url).location} belongs to {given} already")
    if not dry_run:
        author = parse_options({"who": who, "why": why}, Author)

        async def change() -> None:
            store = Store.open(config.store.url)
            try:
                await adopt(store, given, author)
            finally:
                store.close()

        try:
            asyncio.run(change())
        except (StoreInUse, StoreUnavailable) as error:
            end(STORE, in_one_line(error))
    if output == "json":
        shown = {"from": None if former is None else former._asdict(), "to": given._asdict()}
        click.echo(as_json(shown | {"waiting": waiting, "changed": not dry_run}))
        return
    before = "no Norce yet" if former is None else str(former)
    click.echo(f"{'would change' if dry_run else 'changed'} from {before} to {given}; {waiting} deliveries wait")


@store_group.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@config_option
def store_backup(file: Path, config_path: Path) -> None:
    """Copy a SQLite database to FILE. The service may be running."""
    config = load_config(config_path)
    if database_at(config.store.url).shared:
        end(USAGE, f"back PostgreSQL up with its own tools, such as: pg_dump --format=custom --file={file} …")
    try:
        with open_ledger(config) as connection:
            size = back_up(connection, file)
    except FileExistsError as error:
        end(USAGE, str(error))
    click.echo(f"{file}: {size} bytes")


# --- helpers --------------------------------------------------------------------------------------------------------


def print_list(rows: Rows, output: str, columns: tuple[str, ...], config: Config, nothing: str) -> None:
    print_rows(rows, output, columns, nothing=nothing, matching=rows.matching, channels=config.channels)


def print_record(
    record: dict[str, Any] | None, rows: str, output: str, columns: tuple[str, ...] | None = None, *, missing: str = ""
) -> None:
    """Print a record, and below it the rows in its member `rows`."""
    if record is None:
        end(NOTHING_MATCHED, missing)
    if output == "json":
        click.echo(as_json(record))
        return
    for name, value in record.items():
        if name != rows and value not in (None, []):
            click.echo(f"{name:18}{printable(value)}")
    click.echo()
    if record[rows]:
        print_rows(record[rows], "table", columns)


def parse_options(given: dict[str, Any], kind: type[Body]) -> Body:
    """Check options as the service does, so that a mistake in them is wrong usage."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        end(USAGE, str(error))
