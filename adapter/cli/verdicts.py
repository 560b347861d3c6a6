"""The commands about what routes decided that counted for nothing: late, or in the shadow."""

from pathlib import Path
from typing import Any

import click

from adapter.cli.shared import (
    as_moment,
    list_options,
    loaded,
    look_options,
    order_option,
    print_rows,
    reading,
    route_option,
)
from adapter.ledger.queries import Queries

COLUMNS = ("at", "kind", "route", "order_id", "decided", "codes", "answered", "took_ms")
since_option = click.option("--since", callback=as_moment, help="Only what was known then or later; UTC, if not said.")


@click.group("verdicts")
def verdicts_group() -> None:
    """What routes decided too late, or in the shadow."""


@verdicts_group.command("list")
@click.option("--kind", type=click.Choice(["late", "shadow"]))
@route_option
@order_option
@since_option
@list_options
def verdicts_list(output: str, config_path: Path, **given: Any) -> None:
    """List verdicts, the newest first, with what counted in their stead."""
    with reading(loaded(config_path)) as connection:
        rows = Queries(connection).verdicts(**given)
    if output == "table":
        rows = [row | {"codes": " ".join(row["codes"])} for row in rows]
    print_rows(rows, output, COLUMNS)


@verdicts_group.command("stats")
@since_option
@look_options
def verdicts_stats(since: int | None, output: str, config_path: Path) -> None:
    """Count them by route: how many differ from what was answered."""
    with reading(loaded(config_path)) as connection:
        rows = Queries(connection).count_verdicts(since=since)
    print_rows(rows, output)
