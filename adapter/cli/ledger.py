"""
The commands about what is in the ledger: deliveries, notifications, queues, and the store itself.

Lists read beside the service. What changes something goes through the operations port of the running service; where
none runs, the command opens the store itself, which on SQLite means that it takes the lock.
"""

import getpass
import json
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import uvloop
from rich.console import Console
from rich.progress import Progress
from sqlalchemy.exc import DBAPIError

from adapter.cli.shared import (
    FAILED,
    NOTHING_MATCHED,
    STORE,
    USAGE,
    config_option,
    configured,
    desk,
    end,
    output_option,
    print_rows,
)
from adapter.config import Config
from adapter.ledger.clock import seen_from_outside
from adapter.ledger.commands import MOST_A_STEP, Commands, Pause, Step
from adapter.ledger.databases import database_at
from adapter.ledger.matching import By, Matching
from adapter.ledger.store import Store, StoreInUse, StoreMissing, StoreUnavailable, open_for_reading
from adapter.ledger.upkeep import back_up, faults, figures

DELIVERY_COLUMNS = ("id", "order_id", "route", "state", "reason", "tries", "next_at", "code", "reference")
COUNT_COLUMNS = ("route", "merchant", "channel", "state", "reason", "count")

Decorated = Callable[..., Any]


def options(*given: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Several options as one decorator, in the order in which the help shows them."""

    def decorate(function: Decorated) -> Decorated:
        for each in reversed(given):
            function = each(function)
        return function

    return decorate


def _moment(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return int(datetime.fromisoformat(value).astimezone().timestamp() * 1000)
    except ValueError as error:
        raise click.BadParameter("must be a date or a moment, such as 2026-02-03 or 2026-02-03T12:00:00Z") from error


place_options = options(
    click.option("--route", help="Only this route's."),
    click.option("--merchant", help="Only this merchant's."),
    click.option("--channel", help="Only this channel's."),
)
matching_options = options(
    click.option("--reason", help="Only those that ended for this reason, such as rejected."),
    click.option("--order", "order_id", help="Only this order's."),
    click.option("--code", help="Only those whose last attempt said this code."),
    click.option("--since", callback=_moment, help="Only what ended then or later: 2026-02-03, 2026-02-03T12:00:00Z."),
    click.option("--until", callback=_moment, help="Only what ended before then."),
    place_options,
)
by_options = options(
    click.option("--why", required=True, help="Why you do it. It is written down."),
    click.option("--who", default=lambda: f"{getpass.getuser()}@{socket.gethostname()}", help="Who you are."),
)
step_options = options(
    click.argument("ids", type=int, nargs=-1),
    click.option("--all", "everything", is_flag=True, help="All dead letters, where nothing else narrows it down."),
    matching_options,
    by_options,
    click.option("--dry-run", is_flag=True, help="Only count what would be meant."),
    click.option(
        "--rate", type=click.IntRange(1, 100_000), help="At most so many a second; as fast as it goes if not."
    ),
    output_option,
    config_option,
)


# --- deliveries -----------------------------------------------------------------------------------------------------


@click.group("deliveries")
def deliveries_group() -> None:
    """What is owed, done and dead."""


@deliveries_group.command("list")
@click.option("--state", type=click.Choice(["waiting", "done", "dead"]))
@matching_options
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))
@output_option
@config_option
def deliveries_list(limit: int, output: str, config_path: Path, **matching: Any) -> None:
    """List deliveries, the newest first."""
    with desk(config_path) as open_desk:
        rows = open_desk.deliveries(Matching(**matching), limit=limit)
    print_rows(rows, output, DELIVERY_COLUMNS)


@deliveries_group.command("show")
@click.argument("delivery_id", type=int)
@output_option
@config_option
def deliveries_show(delivery_id: int, output: str, config_path: Path) -> None:
    """Show one delivery with its attempts."""
    with desk(config_path) as open_desk:
        delivery = open_desk.delivery(delivery_id)
    _show(delivery, f"there is no delivery {delivery_id}", "attempts", output)


@deliveries_group.command("replay")
@step_options
@click.option(
    "--unknown",
    type=click.Choice(["leave", "look-up", "send"]),
    default="leave",
    show_default=True,
    help="Dead letters whose effect nobody knows: left out; looked up first; or sent again, for you have looked.",
)
def deliveries_replay(**given: Any) -> None:
    """Owe dead letters again, by their IDS or by what matches, with their whole schedule."""
    _step_through("replay", **given)


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
    **given: Any,
) -> None:
    narrowed = ids or any(value is not None for value in given.values())
    if not narrowed and not everything:
        end(USAGE, "say which: by their ids, by options such as --route or --reason, or --all")
    matching = Matching(ids=ids, **given)
    with desk(config_path) as open_desk:
        counted = open_desk.count(msgspec.structs.replace(matching, state="dead"))
    if name == "replay" and unknown == "leave":
        left_out = sum(row["count"] for row in counted if row["reason"] == "unknown")
        counted = [row for row in counted if row["reason"] != "unknown"]
        if left_out:
            click.echo(f"{left_out} unknown left out: nobody knows their effect; see --unknown", err=True)
    if dry_run or not counted:
        print_rows(counted, output, COUNT_COLUMNS)
        return
    total, changed = sum(row["count"] for row in counted), 0
    config, _ = configured(config_path)
    most = min(MOST_A_STEP, rate or MOST_A_STEP)
    step: Step | None = Step(matching=matching, by=By(who=who, why=why), most=most, unknown=unknown)  # type: ignore[arg-type]
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        shown = progress.add_task(name, total=total)
        while step is not None:
            started = time.monotonic()
            done = _ask(config, name, step)
            changed += done["changed"]
            progress.update(shown, completed=changed)
            step = done["after"] and msgspec.structs.replace(step, after=done["after"], action=done["action"])
            if step and rate:
                time.sleep(max(0.0, done["changed"] / rate - (time.monotonic() - started)))
    said = {"replay": "replayed", "discard": "discarded"}[name]
    click.echo(json.dumps({said: changed}) if output == "json" else f"{changed} {said}")


# --- notifications --------------------------------------------------------------------------------------------------


@click.group("notifications")
def notifications_group() -> None:
    """What Norce has told us."""


@notifications_group.command("list")
@click.option("--order", "order_id", help="Only this order's.")
@click.option("--callback", help="Only this callback's.")
@click.option("--merchant", help="Only this merchant's.")
@click.option("--channel", help="Only this channel's.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))
@output_option
@config_option
def notifications_list(limit: int, output: str, config_path: Path, **given: str | None) -> None:
    """List notifications, the newest first."""
    with desk(config_path) as open_desk:
        rows = open_desk.notifications(limit=limit, **given)
    print_rows(
        rows, output, ("id", "received_at", "order_id", "callback", "merchant", "channel", "source", "conflicts_with")
    )


@notifications_group.command("show")
@click.argument("notification_id", type=int)
@output_option
@config_option
def notifications_show(notification_id: int, output: str, config_path: Path) -> None:
    """Show one notification with its deliveries; never its body."""
    with desk(config_path) as open_desk:
        notification = open_desk.notification(notification_id)
    _show(notification, f"there is no notification {notification_id}", "deliveries", output, DELIVERY_COLUMNS)


# --- queues ---------------------------------------------------------------------------------------------------------


@click.group("queues")
def queues_group() -> None:
    """A queue is one route for one merchant and channel: what can be paused."""


@queues_group.command("list")
@output_option
@config_option
def queues_list(output: str, config_path: Path) -> None:
    """List the queues: which run, which are paused by what, and what waits in them."""
    config, _ = configured(config_path)
    with desk(config_path) as open_desk:
        rows = open_desk.queues(seen_from_outside(database_at(config.store.url), open_desk.connection))
    columns = ("route", "merchant", "channel", "state", "paused_by", "reason", "paused_until", "waiting", "running")
    print_rows(rows, output, columns)


@queues_group.command("pause")
@click.argument("route")
@click.option("--merchant", help="Only this merchant's.")
@click.option("--channel", help="Only this channel's.")
@by_options
@output_option
@config_option
def queues_pause(**given: Any) -> None:
    """Try nothing of this ROUTE until it is resumed. The intake goes on, and the work is kept."""
    _pause("pause", **given)


@queues_group.command("resume")
@click.argument("route")
@click.option("--merchant", help="Only this merchant's.")
@click.option("--channel", help="Only this channel's.")
@by_options
@output_option
@config_option
def queues_resume(**given: Any) -> None:
    """Let this ROUTE go on at once, whatever paused it."""
    _pause("resume", **given)


def _pause(
    name: str,
    *,
    route: str,
    merchant: str | None,
    channel: str | None,
    who: str,
    why: str,
    output: str,
    config_path: Path,
) -> None:
    config, _ = configured(config_path)
    changed = _ask(config, name, Pause(route=route, merchant=merchant, channel=channel, by=By(who=who, why=why)))
    if output == "json":
        click.echo(json.dumps({f"{name}d": changed}))
    elif changed:
        click.echo(f"{changed} {name}d")
    if not changed:
        end(NOTHING_MATCHED, f"there is no queue of route {route} for that; `norce-adapter queues list` shows them")


# --- the store ------------------------------------------------------------------------------------------------------


@click.group("store")
def store_group() -> None:
    """The database itself."""


@store_group.command("check")
@config_option
def store_check(config_path: Path) -> None:
    """Look for what must never be so; fail where something is."""
    config, _ = configured(config_path)
    with desk(config_path) as open_desk:
        found = faults(open_desk.connection)
    for each in found:
        click.echo(each, err=True)
    if found:
        end(FAILED, f"{database_at(config.store.url).where}: {len(found)} kinds of faults")
    click.echo(f"{database_at(config.store.url).where}: all is well")


@store_group.command("stats")
@output_option
@config_option
def store_stats(output: str, config_path: Path) -> None:
    """How much there is of what, and who lives on it."""
    config, _ = configured(config_path)
    with desk(config_path) as open_desk:
        now = seen_from_outside(database_at(config.store.url), open_desk.connection)
        counted = figures(open_desk.connection)
        processes = open_desk.processes(now)
    if output == "json":
        click.echo(json.dumps(counted | {"processes": processes}))
        return
    for name, value in counted.items():
        click.echo(f"{name:15}{value:>15}")
    for process in processes:
        alive = "alive" if process["alive"] else "its lease has ended"
        click.echo(f"process {process['id']}, version {process['version']}, since {process['started_at']}: {alive}")


@store_group.command("actions")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))
@output_option
@config_option
def store_actions(limit: int, output: str, config_path: Path) -> None:
    """List what people did to queues and deliveries: who, when and why."""
    with desk(config_path) as open_desk:
        rows = open_desk.actions(limit)
    print_rows(rows, output, ("id", "at", "command", "who", "why", "matching", "changed"))


@store_group.command("migrate")
@config_option
def store_migrate(config_path: Path) -> None:
    """Bring the tables up to date, without serving. `serve` does it by itself."""
    config, _ = configured(config_path)
    try:
        Store.open(config.store.url).close()
    except (StoreInUse, StoreUnavailable) as error:
        end(STORE, str(error))
    click.echo(f"{database_at(config.store.url).where} is up to date")


@store_group.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@config_option
def store_backup(file: Path, config_path: Path) -> None:
    """Copy a SQLite store into FILE, beside the running service, as it is at one moment."""
    config, _ = configured(config_path)
    database = database_at(config.store.url)
    if database.shared:
        end(USAGE, f"a PostgreSQL is backed up by its own means, such as: pg_dump --format=custom --file={file} …")
    try:
        with open_for_reading(config.store.url).connect() as connection:
            size = back_up(connection, file)
    except FileExistsError as error:
        end(USAGE, str(error))
    except (StoreMissing, StoreUnavailable) as error:
        end(STORE, str(error))
    except DBAPIError as error:
        end(STORE, f"cannot read {database.where}: {error.orig}")
    click.echo(f"{file}: {size} bytes")


GROUPS = (deliveries_group, notifications_group, queues_group, store_group)


def _show(
    shown: dict[str, Any] | None, missing: str, rows: str, output: str, columns: tuple[str, ...] | None = None
) -> None:
    """One thing with the rows that belong to it."""
    if shown is None:
        end(NOTHING_MATCHED, missing)
    if output == "json":
        click.echo(json.dumps(shown, ensure_ascii=False))
        return
    for name, value in shown.items():
        if name != rows and value not in (None, []):
            click.echo(f"{name:18}{value}")
    click.echo()
    if shown[rows]:
        print_rows(shown[rows], "table", columns)


def _ask(config: Config, name: str, body: Step | Pause) -> Any:
    """Has a command done by the running service; where none runs, by ourselves."""
    content = msgspec.json.encode(body)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.operations.host, config.operations.host)  # noqa: S104
    authority = f"[{host}]" if ":" in host else host
    token = config.operations.token
    headers = {"authorization": f"Bearer {token.reveal()}"} if token else {}
    try:
        with httpx.Client(trust_env=False, timeout=30) as http:
            url = f"http://{authority}:{config.operations.port}/commands/{name}"
            answer = http.post(url, content=content, headers=headers)
    except httpx.ConnectError:
        return _by_ourselves(config, name, content)
    except httpx.HTTPError as error:
        end(FAILED, f"no answer from {authority}:{config.operations.port}: {type(error).__name__}")
    if answer.status_code == 503:
        end(STORE, answer.json()["message"])
    if answer.status_code != 200:
        end(FAILED, f"{authority}:{config.operations.port} answered {answer.status_code}: {_message(answer)}")
    return answer.json()


def _by_ourselves(config: Config, name: str, content: bytes) -> Any:
    async def do() -> Any:
        store = Store.open(config.store.url)
        try:
            return await Commands(store).do(name, content)
        finally:
            store.close()

    try:
        return uvloop.run(do())
    except StoreInUse as error:
        port = config.operations.port
        end(STORE, f"{error}, or let its operations port ({port}) be reached: nothing answers there")
    except StoreUnavailable as error:
        end(STORE, str(error))


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return "no message"
