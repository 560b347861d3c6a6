"""
The command that looks for notifications that never came. The running service does it; where none runs, we do.
"""

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import click
import httpx
import msgspec
import uvloop
from rich.console import Console
from rich.progress import Progress

from adapter import app
from adapter.cli.shared import (
    FAILED,
    as_moment,
    check_done,
    config_option,
    configured,
    end,
    opening,
    operations_port,
    output_option,
    print_rows,
    printable,
)
from adapter.config import Config
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import NorceError
from adapter.operations.application import Reconciling
from adapter.reconciliation.events import Reconciled
from adapter.routing.routes import Routes

COLUMNS = ("merchant", "events", "received", "missed", "others")


class _Line(Reconciled, kw_only=True):
    """A line of what the service tells: how far it is with a merchant, or at the end why it is not done."""

    merchant: str = ""


@click.command()
@click.option(
    "--since", callback=as_moment, help="Read as far back as that, whatever was read before; UTC, if not said."
)
@click.option("--dry-run", is_flag=True, help="Only say what is missing.")
@output_option
@config_option
def reconcile(since: int | None, *, dry_run: bool, output: str, config_path: Path) -> None:
    """
    Read Norce's event log, and bring the notifications that never came. Those that did are known, and left.

    Without --since it begins where it ended the last time.
    """
    config, routes = configured(config_path)
    asked = Reconciling(since=None if since is None else to_datetime(since), dry_run=dry_run)
    told = _Told(json_output=output == "json")
    with told.progress:
        try:
            uvloop.run(told.follow(_lines(config, routes, asked)))
        except httpx.HTTPError as error:
            end(FAILED, f"no answer from {operations_port(config)[0]}: {type(error).__name__}")
        except msgspec.DecodeError:
            end(FAILED, f"what answers at {operations_port(config)[0]} is no norce-adapter; see operations.port")
    if output == "json":
        click.echo(json.dumps(told.rows()))
    elif told.rows():
        print_rows(told.rows(), output, COLUMNS)
        if dry_run:
            click.echo("Nothing was brought: it was a dry run.", err=True)
    if told.error is not None:
        end(FAILED, f"not read to its end: {printable(told.error)}")


class _Told:
    """What has been told so far, for a person on the way and at the end."""

    def __init__(self, *, json_output: bool) -> None:
        self.progress = Progress(
            console=Console(stderr=True), transient=True, disable=json_output or not sys.stderr.isatty()
        )
        self.error: str | None = None
        self._of: dict[str, Reconciled] = {}

    async def follow(self, lines: AsyncIterator[Reconciled | str]) -> None:
        tasks = {}
        async for each in lines:
            if isinstance(each, str):
                self.error = each
                continue
            self._of[each.merchant] = each
            if each.merchant not in tasks:
                tasks[each.merchant] = self.progress.add_task(each.merchant, total=None)
            # What is older than it has to go back is not read: the log's whole length is no measure of the way.
            self.progress.update(tasks[each.merchant], completed=each.events, description=f"{each.merchant}: "
                                 f"{each.events} events, {each.missed} missed")  # fmt: skip

    def rows(self) -> list[dict[str, object]]:
        return [{name: getattr(each, name) for name in COLUMNS} for each in self._of.values()]


async def _lines(config: Config, routes: Routes, asked: Reconciling) -> AsyncIterator[Reconciled | str]:
    """What the running service tells, line by line; where none runs, what we find ourselves."""
    authority, headers = operations_port(config)
    url = f"http://{authority}/commands/reconcile"
    # A line comes after each page, and before a merchant's first one Norce is asked twice.
    patience = 60.0 + 2 * config.norce.timeout.total_seconds()
    try:
        async with (
            httpx.AsyncClient(trust_env=False, timeout=patience) as http,
            http.stream("POST", url, content=msgspec.json.encode(asked), headers=headers) as answer,
        ):
            if answer.status_code != 200:
                check_done(authority, answer.status_code, msgspec.json.decode(await answer.aread()))
            async for line in answer.aiter_lines():
                told = msgspec.json.decode(line, type=_Line)
                yield told if told.merchant else told.error or "it ended early"
            return
    except httpx.ConnectError:
        pass
    with opening(config):
        try:
            async with app.reconciling(config, routes, Metrics(app.VERSION)) as healing:
                async for each in healing.run(since=asked.since, dry_run=asked.dry_run):
                    yield each
        except NorceError as error:
            yield str(error)
