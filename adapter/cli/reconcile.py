"""The command `reconcile`: the running service looks for missing notifications."""

import json
from pathlib import Path
from typing import Any

import click

from adapter.cli.shared import (
    FAILED,
    end,
    options,
    output_option,
    parse_moment,
    print_rows,
    printable,
    progress_bar,
    service_options,
)
from adapter.moments import to_datetime

COLUMNS = ("merchant", "events", "received", "missed", "others")


@click.command()
@click.option(
    "--since", callback=parse_moment, help="Read back to this moment, even if that was read before; UTC by default."
)
@click.option("--dry-run", is_flag=True, help="Only count the missing notifications.")
@options(output_option, service_options)
def reconcile(
    since: int | None, *, dry_run: bool, output: str, config_path: Path, to: str | None, token: str | None
) -> None:
    """Receive the notifications that are missing.

    They are read from Norce's event log. Without --since, reading starts where it ended the last time.
    """
    from adapter.cli.service import running_service

    asked = {"since": None if since is None else to_datetime(since), "dry_run": dry_run}
    found: dict[str, dict[str, Any]] = {}
    error = None
    with running_service(config_path, to, token) as service, progress_bar(hidden=output == "json") as progress:
        tasks = {}
        for line in service.run_line_by_line("reconcile", asked):
            merchant = line.get("merchant")
            if merchant is None:
                error = line.get("error") or "the service ended early"
                continue
            found[merchant] = {name: line.get(name) for name in COLUMNS}
            if merchant not in tasks:
                tasks[merchant] = progress.add_task(merchant, total=None)
            # The length of the log is no total: reading stops where it ended the last time.
            text = f"{merchant}: {line['events']} events, {line['missed']} missed"
            progress.update(tasks[merchant], completed=line["events"], description=text)
    rows = list(found.values())
    if output == "json":
        click.echo(json.dumps(rows))
    elif rows:
        print_rows(rows, output, COLUMNS)
        if dry_run:
            click.echo("Nothing was received, because this was a dry run.", err=True)
    if error is not None:
        end(FAILED, f"the event log was not read to its end: {printable(error)}")
