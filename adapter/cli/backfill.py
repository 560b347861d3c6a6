"""The command `deliveries backfill`, which delivers stored notifications on a route."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import msgspec

from adapter.cli.shared import (
    NOTHING_MATCHED,
    TEXT,
    USAGE,
    author_options,
    channel_options,
    end,
    options,
    output_option,
    print_rows,
    printable,
    progress_bar,
    rate_option,
    service_options,
    since_option,
)
from adapter.ledger.backfill import MAX_PER_STEP, BackfillStep

COUNT_COLUMNS = ("route", "merchant", "channel", "count")
UNREAD_COLUMNS = ("merchant", "channel", "order_id", "reason")


@click.command("backfill")
@click.argument("route", type=TEXT)
@since_option("notifications received")
@options(channel_options, author_options)
@click.option("--dry-run", is_flag=True, help="Only count the orders.")
@options(rate_option, output_option, service_options)
def backfill(
    route: str,
    *,
    who: str,
    why: str,
    dry_run: bool,
    rate: int | None,
    output: str,
    config_path: Path,
    to: str | None,
    token: str | None,
    **filters: Any,
) -> None:
    """Deliver orders on ROUTE that came before the route wanted them.

    The stored notifications are evaluated against the configuration of the running service. Each order that the route
    wants gets a delivery for its newest notification that the route wants, unless it has a delivery.
    """
    from adapter.cli.service import TIMEOUT_OF_A_LINE_SECONDS, run_in_steps, running_service

    given = {"route": route, "by": {"who": who, "why": why}, "dry_run": dry_run, **filters}
    try:
        step = msgspec.convert(given | {"most": min(MAX_PER_STEP, rate or MAX_PER_STEP)}, BackfillStep)
    except msgspec.ValidationError as error:
        end(USAGE, str(error))
    found: dict[tuple[str, str, str], None] = {}
    unread: dict[tuple[str, str, str], str] = {}
    paused: list[list[str]] = []
    changed = read = 0

    with running_service(config_path, to, token) as service, progress_bar(hidden=output == "json") as progress:
        task = progress.add_task(route, total=None)

        def run(step: BackfillStep) -> Any:
            nonlocal read
            answer = service.run("backfill", step, seconds=TIMEOUT_OF_A_LINE_SECONDS)
            read += answer["read"]
            found.update(dict.fromkeys(map(_key, answer["found"])))
            unread.update({_key(each): each["reason"] for each in answer["unread"]})
            paused.extend(answer["paused"])
            return answer

        for number in run_in_steps(run, step, rate):
            changed += number
            count = len(found) if dry_run else changed
            progress.update(task, completed=read, description=f"{route}: {read} notifications, {count} orders")

    names = [dict(zip(UNREAD_COLUMNS, (*key, reason), strict=True)) for key, reason in unread.items()]
    counts = [
        dict(zip(COUNT_COLUMNS, (route, *channel, number), strict=True))
        for channel, number in sorted(Counter(key[:2] for key in found).items())
    ]
    if output == "json":
        done = {"counts": counts} if dry_run else {"backfilled": changed}
        click.echo(json.dumps(done | {"unread": names, "paused": paused}))
    else:
        if counts:
            print_rows(counts, output, COUNT_COLUMNS)
        elif not dry_run:
            click.echo(f"{changed} backfilled")
        if names:
            click.echo(f"{len(names)} orders could not be read:", err=True)
            for each in names:
                click.echo(printable(" ".join(each.values())), err=True)
        for merchant, channel in paused:
            text = f"the queue of {merchant}, channel {channel}, is paused: its deliveries wait (`queues list`)"
            click.echo(printable(text), err=True)
    if not (found or changed or unread):
        end(NOTHING_MATCHED, f"no stored notification of an order without a delivery on {printable(route)} is wanted")


def _key(order: dict[str, str]) -> tuple[str, str, str]:
    return order["merchant"], order["channel"], order["order_id"]
