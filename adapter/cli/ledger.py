"""The commands about the ledger: deliveries, notifications, queues, verdicts and the store itself.

Commands that only read use the database. Commands that change deliveries or queues go through the running service.
`store migrate` takes the lock of a ledger that no service uses.
"""

import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
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
    config_option,
    end,
    in_one_line,
    list_options,
    load_config,
    open_ledger,
    options,
    order_option,
    output_option,
    parse_moment,
    print_rows,
    printable,
    progress_bar,
    read_options,
    route_option,
    service_options,
)
from adapter.config import Config
from adapter.ledger.clock import seen_from_outside
from adapter.ledger.commands import MOST_A_STEP, Pause, Step
from adapter.ledger.databases import database_at
from adapter.ledger.maintenance import back_up, faults, figures
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.ledger.settlement import Reason, State

DELIVERY_COLUMNS = ("id", "order_id", "route", "state", "reason", "tries", "next_at", "code", "reference")
VERDICT_COLUMNS = ("at", "kind", "route", "order_id", "decided", "codes", "answered", "took_ms")
COUNT_COLUMNS = ("route", "merchant", "channel", "state", "reason", "count")

ID = click.IntRange(0, 2**63 - 1)
Asked = TypeVar("Asked", DeliveryFilter, Step, Pause)


def _who() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container that runs under a bare number
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


shop_options = options(
    click.option("--merchant", type=TEXT, help="Only this merchant's."),
    click.option("--channel", type=TEXT, help="Only this channel's."),
)
matching_options = options(
    click.option(
        "--reason",
        type=click.Choice([reason.value for reason in Reason]),
        help="Only those that ended for this reason.",
    ),
    order_option,
    click.option("--code", type=TEXT, help="Only those whose last attempt said this code."),
    click.option("--since", callback=parse_moment, help="Only what ended then or later; UTC, if not said."),
    click.option("--until", callback=parse_moment, help="Only what ended before then."),
    route_option,
    shop_options,
)
by_options = options(
    click.option("--why", type=TEXT, required=True, help="Why you do it. It is written down."),
    click.option("--who", type=TEXT, default=_who, help="Who you are; your user and machine, if not said."),
)
step_options = options(
    click.argument("ids", type=ID, nargs=-1),
    click.option("--all", "everything", is_flag=True, help="All dead letters, where nothing else narrows it down."),
    matching_options,
    by_options,
    click.option("--dry-run", is_flag=True, help="Only count what would be meant."),
    click.option(
        "--rate", type=click.IntRange(1, 100_000), help="At most so many a second; as fast as it goes if not."
    ),
    output_option,
    service_options,
)


# --- deliveries -----------------------------------------------------------------------------------------------------


@click.group("deliveries")
def deliveries_group() -> None:
    """What is owed, done and dead."""


@deliveries_group.command("list")
@click.option("--state", type=click.Choice([state.value for state in State]))
@matching_options
@list_options
def deliveries_list(limit: int, output: str, config_path: Path, **given: Any) -> None:
    """List deliveries, the newest first."""
    matching = _asked(given, DeliveryFilter)
    with open_ledger(load_config(config_path)) as connection:
        rows = Queries(connection).deliveries(matching, limit=limit)
    print_rows(rows, output, DELIVERY_COLUMNS)


@deliveries_group.command("show")
@click.argument("delivery_id", type=ID)
@read_options
def deliveries_show(delivery_id: int, output: str, config_path: Path) -> None:
    """Show one delivery with its attempts."""
    with open_ledger(load_config(config_path)) as connection:
        delivery = Queries(connection).delivery(delivery_id)
    _show(delivery, "attempts", output, missing=f"there is no delivery {delivery_id}")


@deliveries_group.command("retry")
@step_options
@click.option(
    "--unknown",
    type=click.Choice(["leave", "look-up", "send"]),
    default="leave",
    show_default=True,
    help="Dead letters whose effect nobody knows: left out; looked up first; or sent again, for you have looked.",
)
def deliveries_retry(**given: Any) -> None:
    """Owe dead letters again, by their IDS or by what matches, with their whole schedule."""
    _step_through("retry", **given)


@deliveries_group.command("discard")
@step_options
def deliveries_discard(**given: Any) -> None:
    """Be done with dead letters, by their IDS or by what matches; their lanes go on."""
    _step_through("discard", unknown="leave", **given)


def _step_through(
    name: str,
    *,
    ids: tuple[int, ...],
    everything: bool,
    who: str,
    why: str,
    dry_run: bool,
    rate: int | None,
    unknown: str,
    output: str,
    config_path: Path,
    to: str | None,
    token: str | None,
    **given: Any,
) -> None:
    from adapter.cli.service import running_service

    narrowed = ids or any(value is not None for value in given.values())
    if not narrowed and not everything:
        end(USAGE, "say which: by their ids, by options such as --route or --reason, or --all")
    most = min(MOST_A_STEP, rate or MOST_A_STEP)
    by = {"who": who, "why": why}
    step = _asked({"matching": {"ids": ids, **given}, "by": by, "most": most, "unknown": unknown}, Step)
    total = None  # elsewhere, the ledger may be out of reach
    if to is None or dry_run:
        counted = _count_dead_letters(
            load_config(config_path), step, leave_unknown=name == "retry" and unknown == "leave"
        )
        total = sum(row["count"] for row in counted)
    if dry_run:
        print_rows(counted, output, COUNT_COLUMNS)
        return
    changed = 0
    if total != 0:
        with running_service(config_path, to, token) as service, progress_bar() as progress:
            task = progress.add_task(name, total=total)
            for number in steps(lambda step: service.run(name, step), step, rate):
                changed += number
                progress.update(task, completed=changed)
    done = {"retry": "retried", "discard": "discarded"}[name]
    click.echo(json.dumps({done: changed}) if output == "json" else f"{changed} {done}")
    if not (changed or total):
        end(NOTHING_MATCHED, "there is no such dead letter; `norce-adapter deliveries list --state dead` shows them")


def _count_dead_letters(config: Config, step: Step, *, leave_unknown: bool) -> list[dict[str, Any]]:
    with open_ledger(config) as connection:
        rows = Queries(connection).count(msgspec.structs.replace(step.matching, state=State.DEAD.value))
    if leave_unknown:
        left = sum(row["count"] for row in rows if row["reason"] == Reason.UNKNOWN.value)
        rows = [row for row in rows if row["reason"] != Reason.UNKNOWN.value]
        if left:
            click.echo(f"{left} unknown left out: nobody knows their effect; see --unknown", err=True)
    return rows


def steps(
    ask: Callable[[Step], Any],
    step: Step,
    rate: int | None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[int]:
    """Asks for step after step, no more than `rate` deliveries a second; how many each has changed."""
    while True:
        began = clock()
        done = ask(step)
        yield done["changed"]
        if done["after"] is None:
            return
        step = msgspec.structs.replace(step, after=done["after"], action=done["action"])
        if rate:
            sleep(max(0.0, done["changed"] / rate - (clock() - began)))


# --- notifications --------------------------------------------------------------------------------------------------


@click.group("notifications")
def notifications_group() -> None:
    """What Norce has told us."""


@notifications_group.command("list")
@order_option
@click.option("--callback", type=TEXT, help="Only this callback's.")
@shop_options
@list_options
def notifications_list(limit: int, output: str, config_path: Path, **given: str | None) -> None:
    """List notifications, the newest first."""
    with open_ledger(load_config(config_path)) as connection:
        rows = Queries(connection).notifications(limit=limit, **given)
    print_rows(
        rows, output, ("id", "received_at", "order_id", "callback", "merchant", "channel", "source", "conflicts_with")
    )


@notifications_group.command("show")
@click.argument("notification_id", type=ID)
@read_options
def notifications_show(notification_id: int, output: str, config_path: Path) -> None:
    """Show one notification with its deliveries; never its body."""
    with open_ledger(load_config(config_path)) as connection:
        notification = Queries(connection).notification(notification_id)
    missing = f"there is no notification {notification_id}"
    _show(notification, "deliveries", output, DELIVERY_COLUMNS, missing=missing)


# --- queues ---------------------------------------------------------------------------------------------------------


queue_options = options(
    click.argument("route", type=TEXT),
    shop_options,
    by_options,
    output_option,
    service_options,
)


@click.group("queues")
def queues_group() -> None:
    """A queue is one route for one merchant and channel: what can be paused."""


@queues_group.command("list")
@read_options
def queues_list(output: str, config_path: Path) -> None:
    """List the queues: which run, which are paused by what, and what waits in them."""
    from adapter.cli.service import is_held

    config = load_config(config_path)
    with open_ledger(config) as connection:
        rows = Queries(connection).queues(seen_from_outside(database_at(config.store.url), connection))
    if is_held(config):
        rows = [row | {"state": "held"} if row["state"] == "running" else row for row in rows]
    columns = ("route", "merchant", "channel", "state", "paused_by", "reason", "paused_until", "waiting", "running")
    print_rows(rows, output, columns)


@queues_group.command("pause")
@queue_options
def queues_pause(**given: Any) -> None:
    """Try nothing of this ROUTE until it is resumed. The intake goes on, and the work is kept."""
    _pause("pause", **given)


@queues_group.command("resume")
@queue_options
def queues_resume(**given: Any) -> None:
    """Let this ROUTE go on at once, whatever paused it."""
    _pause("resume", **given)


def _pause(
    name: str, *, who: str, why: str, output: str, config_path: Path, to: str | None, token: str | None, **given: Any
) -> None:
    from adapter.cli.service import running_service

    pause = _asked({"by": {"who": who, "why": why}, **given}, Pause)
    with running_service(config_path, to, token) as service:
        changed = service.run(name, pause)
    click.echo(json.dumps({f"{name}d": changed}) if output == "json" else f"{changed} {name}d")
    if not changed:
        end(NOTHING_MATCHED, f"there is no such queue of {pause.route}; `norce-adapter queues list` shows them")


# --- verdicts --------------------------------------------------------------------------------------------------------

known_since_option = click.option(
    "--since", callback=parse_moment, help="Only what was known then or later; UTC, if not said."
)


@click.group("verdicts")
def verdicts_group() -> None:
    """What routes decided too late, or in the shadow."""


@verdicts_group.command("list")
@click.option("--kind", type=click.Choice(["late", "shadow"]))
@route_option
@order_option
@known_since_option
@list_options
def verdicts_list(output: str, config_path: Path, **given: Any) -> None:
    """List verdicts, the newest first, with what counted in their stead."""
    with open_ledger(load_config(config_path)) as connection:
        rows = Queries(connection).verdicts(**given)
    if output == "table":
        rows = [row | {"codes": " ".join(row["codes"])} for row in rows]
    print_rows(rows, output, VERDICT_COLUMNS)


@verdicts_group.command("stats")
@known_since_option
@read_options
def verdicts_stats(since: int | None, output: str, config_path: Path) -> None:
    """Count them by route: how many differ from what was answered."""
    with open_ledger(load_config(config_path)) as connection:
        rows = Queries(connection).count_verdicts(since=since)
    print_rows(rows, output)


# --- the store ------------------------------------------------------------------------------------------------------


@click.group("store")
def store_group() -> None:
    """The database itself."""


@store_group.command("check")
@config_option
def store_check(config_path: Path) -> None:
    """Look for what must never be so; fail where something is."""
    config = load_config(config_path)
    with open_ledger(config) as connection:
        found = faults(connection)
    for each in found:
        click.echo(each, err=True)
    if found:
        end(FAILED, f"{database_at(config.store.url).location}: {len(found)} kinds of faults")
    click.echo(f"{database_at(config.store.url).location}: all is well")


@store_group.command("stats")
@read_options
def store_stats(output: str, config_path: Path) -> None:
    """How much there is of what, and who lives on it."""
    config = load_config(config_path)
    with open_ledger(config) as connection:
        now = seen_from_outside(database_at(config.store.url), connection)
        counted = figures(connection) | {"processes": Queries(connection).processes(now)}
    _show(counted, "processes", output)


@store_group.command("actions")
@list_options
def store_actions(limit: int, output: str, config_path: Path) -> None:
    """List what people did to queues and deliveries: who, when and why."""
    with open_ledger(load_config(config_path)) as connection:
        rows = Queries(connection).actions(limit)
    print_rows(rows, output, ("id", "at", "command", "who", "why", "matching", "changed"))


@store_group.command("migrate")
@config_option
def store_migrate(config_path: Path) -> None:
    """Bring the tables up to date, without serving. `serve` does it by itself."""
    from adapter import logs
    from adapter.ledger.store import Store, StoreInUse, StoreUnavailable

    logs.configure(level=logs.WARNING)
    config = load_config(config_path)
    try:
        Store.open(config.store.url).close()
    except (StoreInUse, StoreUnavailable) as error:
        end(STORE, in_one_line(error))
    click.echo(f"{database_at(config.store.url).location} is up to date")


@store_group.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@config_option
def store_backup(file: Path, config_path: Path) -> None:
    """Copy a SQLite store into FILE, beside the running service, as it is at one moment."""
    config = load_config(config_path)
    if database_at(config.store.url).shared:
        end(USAGE, f"a PostgreSQL is backed up by its own means, such as: pg_dump --format=custom --file={file} …")
    try:
        with open_ledger(config) as connection:
            size = back_up(connection, file)
    except FileExistsError as error:
        end(USAGE, str(error))
    click.echo(f"{file}: {size} bytes")


def _show(
    shown: dict[str, Any] | None, rows: str, output: str, columns: tuple[str, ...] | None = None, *, missing: str = ""
) -> None:
    """One thing with the rows that belong to it."""
    if shown is None:
        end(NOTHING_MATCHED, missing)
    if output == "json":
        click.echo(json.dumps(shown, ensure_ascii=False))
        return
    for name, value in shown.items():
        if name != rows and value not in (None, []):
            click.echo(f"{name:18}{printable(value)}")
    click.echo()
    if shown[rows]:
        print_rows(shown[rows], "table", columns)


def _asked(given: dict[str, Any], kind: type[Asked]) -> Asked:
    """What the service would not take either is wrong usage."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        end(USAGE, str(error))
