"""The commands about deliveries: list, show, retry, resend and discard.

Commands that change something go through the running service, in steps.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from adapter.cli.backfill import backfill
from adapter.cli.ledger import (
    COUNT_COLUMNS,
    DELIVERY_COLUMNS,
    ID,
    parse_options,
    print_list,
    print_record,
    read_queries,
)
from adapter.cli.shared import (
    FAILED,
    NOTHING_MATCHED,
    TEXT,
    USAGE,
    author_options,
    channel_options,
    end,
    list_options,
    load_config,
    options,
    order_options,
    output_option,
    print_rows,
    progress_bar,
    rate_option,
    read_options,
    route_option,
    service_options,
    time_options,
    who_option,
)
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.commands import MAX_PER_STEP, Step
from adapter.ledger.queries import ORPHANED, DeliveryFilter, Queries, check_one_order
from adapter.ledger.resends import LEFT_OUT, LeftOut, ResendFilter, preview
from adapter.ledger.settlement import Reason, State

MAX_IDS_SHOWN = 20
IS_ORPHANED = (
    f"because their queue is {ORPHANED}: its route, merchant or channel is no longer configured; "
    "`norce-adapter deliveries discard` ends them"
)
IS_SHADOW = "because their route is in shadow mode, which sends nothing; remove mode: shadow first"

filter_options = options(
    click.option("--reason", type=click.Choice([each.value for each in Reason]), help="Only with this reason."),
    order_options,
    click.option("--code", type=TEXT, help="Only if the last attempt ended with this code."),
    time_options("deliveries received"),
    route_option,
    channel_options,
)
selection_options = options(
    click.argument("ids", type=ID, nargs=-1),
    click.option("--all", "everything", is_flag=True, help="All of them; needed if there is no other filter."),
    filter_options,
)
change_options = options(
    selection_options,
    author_options,
    click.option("--dry-run", is_flag=True, help="Only count them."),
    rate_option,
    output_option,
    service_options,
)


@click.group("deliveries")
def deliveries_group() -> None:
    """List, show, retry, resend, backfill and discard deliveries."""


deliveries_group.add_command(backfill)


@deliveries_group.command("list")
@click.option("--state", type=click.Choice([each.value for each in State]), help="Only in this state.")
@filter_options
@list_options
def deliveries_list(limit: int, output: str, config_path: Path, **filters: Any) -> None:
    """List deliveries, newest first."""
    matching, config = parse_options(filters, DeliveryFilter), load_config(config_path)
    with read_queries(config) as queries:
        rows = queries.deliveries(matching, limit=limit)
    print_list(rows, output, DELIVERY_COLUMNS, config, "no delivery matches")


@deliveries_group.command("show")
@click.argument("delivery_id", type=ID)
@read_options
def deliveries_show(delivery_id: int, output: str, config_path: Path) -> None:
    """Show a delivery with its attempts."""
    with read_queries(config_path) as queries:
        delivery = queries.delivery(delivery_id)
    print_record(delivery, "attempts", output, missing=f"there is no delivery {delivery_id}")


@deliveries_group.command("retry")
@change_options
@click.option(
    "--unknown",
    type=click.Choice(["leave", "look-up", "send"]),
    default="leave",
    show_default=True,
    help="For dead letters whose effect is unknown: leave them, have the handler look them up first, or send them "
    "again, because you have looked at the destination.",
)
def deliveries_retry(**given: Any) -> None:
    """Retry dead letters, chosen by IDS or by options, with their whole schedule."""
    _change("retry", **given)


@deliveries_group.command("discard")
@change_options
@click.option(
    "--state",
    type=click.Choice([State.DEAD.value, State.WAITING.value]),
    default=State.DEAD.value,
    show_default=True,
    help="Discard dead letters, or deliveries that wait. One that is being attempted now stays.",
)
def deliveries_discard(**given: Any) -> None:
    """Discard dead letters or waiting deliveries, chosen by IDS or by options."""
    _change("discard", unknown="leave", **given)


@deliveries_group.command("resend")
@selection_options
@click.option(
    "--resume", type=ID, metavar="NUMBER", help="Continue the command with this number, which was interrupted."
)
@click.option(
    "--unknown",
    type=click.Choice(["leave", "send"]),
    default="leave",
    show_default=True,
    help="For dead letters whose effect is unknown: leave them, or send them again, because you have looked at the "
    "destination.",
)
@click.option("--why", type=TEXT, help="Your reason. It is recorded. Required, except with --resume.")
@who_option
@click.option("--dry-run", is_flag=True, help="Only count them.")
@rate_option
@output_option
@service_options
def deliveries_resend(
    *,
    ids: tuple[int, ...],
    everything: bool,
    resume: int | None,
    unknown: str,
    who: str,
    why: str | None,
    dry_run: bool,
    rate: int | None,
    output: str,
    config_path: Path,
    to: str | None,
    token: str | None,
    **filters: Any,
) -> None:
    """Deliver again, as new deliveries with another idempotency key.

    IDS select any delivery that does not wait. Options select one for each order and route: the newest that is
    delivered or dead, if it matches. A dead letter is discarded when it is sent again.
    """
    from adapter.cli.service import run_in_steps, running_service

    is_chosen = bool(ids or everything or any(value is not None for value in filters.values()))
    if is_chosen == (resume is not None) or (dry_run and resume is not None):
        end(USAGE, "choose the deliveries by ids, by options such as --route or --reason, or by --all; or use --resume")
    if why is None and resume is None:
        end(USAGE, "give your reason with --why; it is recorded")
    if unknown == "send":  # what becomes unknown after the look at the destination is left out
        filters["ended_before"] = filters["until"]
    given = {"matching": {"ids": ids, **filters}, "by": {"who": who, "why": why or "resumed"}, "unknown": unknown}
    step = parse_options(given | {"most": min(MAX_PER_STEP, rate or MAX_PER_STEP), "action": resume}, Step)
    try:
        selection = ResendFilter.of(step.matching, step.unknown, refetching=())
    except ValueError as error:
        end(USAGE, str(error))
    total: int | None = None
    left_out: dict[LeftOut, list[int]] = {}
    if resume is None and (to is None or dry_run):  # the ledger of a service on another host may be out of reach
        rows, left_out = _preview(config_path, selection)
        total = sum(row["count"] for row in rows)
    if dry_run or total == 0:
        _report_left_out(left_out)
    if dry_run:
        print_rows(rows, output, COUNT_COLUMNS, nothing="no delivery can be sent again")
        return
    if total == 0:
        end(NOTHING_MATCHED, "no delivery can be sent again; `norce-adapter deliveries list` lists them")
    left_out.clear()
    with running_service(config_path, to, token) as service, progress_bar() as progress:
        task, changed, action = progress.add_task("resend", total=total), 0, resume

        if action is not None:
            _say_how_to_resume(action, to)

        def run(step: Step) -> Any:
            nonlocal action
            answer = service.run("resend", step)
            if action is None:
                action = answer["action"]
                _say_how_to_resume(action, to)
            for why, some in answer.get("left_out", {}).items():
                left_out.setdefault(why, []).extend(some)
            return answer

        for number in run_in_steps(run, step, rate):
            changed += number
            progress.update(task, completed=changed)
    _report_left_out(left_out)
    result = {"resent": changed, "action": action, "left_out": left_out}
    click.echo(json.dumps(result) if output == "json" else f"{changed} resent")
    if not changed and resume is None:
        end(NOTHING_MATCHED, "no delivery can be sent again; `norce-adapter deliveries list` lists them")


def _preview(config_path: Path, selection: ResendFilter) -> tuple[list[dict[str, Any]], dict[LeftOut, list[int]]]:
    config = load_config(config_path)
    refetching = [name for name, route in config.routes.items() if route.refetch]
    with read_queries(config_path) as queries:
        _check_one_order(queries, selection.matching)
        rows, left_out = preview(queries.connection, selection._replace(refetching=refetching))
    return leave_out_unsendable(config, rows), left_out


def _check_one_order(queries: Queries, matching: DeliveryFilter) -> None:
    try:
        check_one_order(queries.connection, matching)
    except ValueError as error:
        end(USAGE, str(error))


def _report_left_out(left_out: Mapping[LeftOut, Sequence[int]]) -> None:
    for why, ids in left_out.items():
        more = f" and {len(ids) - MAX_IDS_SHOWN} more" if len(ids) > MAX_IDS_SHOWN else ""
        named = ", ".join(map(str, ids[:MAX_IDS_SHOWN]))
        click.echo(f"{len(ids)} left out, {LEFT_OUT[why]}: {named}{more}", err=True)


def _say_how_to_resume(action: int, to: str | None) -> None:
    address = "" if to is None else f" --to {to}"
    words = f"norce-adapter deliveries resend --resume {action}{address}"
    click.echo(f"this is command {action}; if it is interrupted, continue it with: {words}", err=True)


def _change(
    command: str,
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
    state: str = State.DEAD.value,
    **filters: Any,
) -> None:
    from adapter.cli.service import run_in_steps, running_service

    kind = "dead letter" if state == State.DEAD.value else "waiting delivery"
    if not (ids or everything or any(value is not None for value in filters.values())):
        end(USAGE, "choose the deliveries by ids, by options such as --route or --reason, or by --all")
    if unknown == "send":  # what becomes unknown after the look at the destination is left out
        filters["ended_before"] = filters["until"]
    size = min(MAX_PER_STEP, rate or MAX_PER_STEP)
    author = {"who": who, "why": why}
    step = parse_options(
        {"matching": {"ids": ids, "state": state, **filters}, "by": author, "most": size, "unknown": unknown}, Step
    )
    total = None
    if to is None or dry_run:  # the ledger of a service on another host may be out of reach
        rows = _count(config_path, step, is_retry=command == "retry", leave_unknown=unknown == "leave")
        total = sum(row["count"] for row in rows)
    if dry_run:
        print_rows(rows, output, COUNT_COLUMNS, nothing=f"no {kind} matches")
        return
    changed = 0
    if total != 0:
        with running_service(config_path, to, token) as service, progress_bar() as progress:
            task = progress.add_task(command, total=total)
            for number in run_in_steps(lambda step: service.run(command, step), step, rate):
                changed += number
                progress.update(task, completed=changed)
    done = {"retry": "retried", "discard": "discarded"}[command]
    click.echo(json.dumps({done: changed}) if output == "json" else f"{changed} {done}")
    if state == State.WAITING.value and changed < (total or 0):
        click.echo(f"{(total or 0) - changed} left out: they are being attempted, or have ended meanwhile", err=True)
    if not (changed or total):
        end(NOTHING_MATCHED, f"no {kind} matches; `norce-adapter deliveries list --state {state}` lists them")


def _count(config_path: Path, step: Step, *, is_retry: bool, leave_unknown: bool) -> list[dict[str, Any]]:
    with read_queries(config_path) as queries:
        _check_one_order(queries, step.matching)
        rows = queries.count(step.matching)
    if is_retry:
        rows = leave_out_unsendable(load_config(config_path), rows)
    if is_retry and leave_unknown:
        left = sum(row["count"] for row in rows if row["reason"] == Reason.UNKNOWN.value)
        rows = [row for row in rows if row["reason"] != Reason.UNKNOWN.value]
        if left:
            click.echo(f"{left} left out, because their effect is unknown; see --unknown", err=True)
    return rows


def leave_out_unsendable(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the counts of configured queues that send, and report the others.

    If there are only others, end the command.
    """
    configured = set(config.queue_keys)

    def is_orphaned(row: dict[str, Any]) -> bool:
        return (row["route"], Channel(row["merchant"], row["channel"])) not in configured

    def is_shadow(row: dict[str, Any]) -> bool:
        return not is_orphaned(row) and config.routes[row["route"]].mode == "shadow"

    kept = [row for row in rows if not is_orphaned(row) and not is_shadow(row)]
    reports = []
    for leaves_out, cause in ((is_orphaned, IS_ORPHANED), (is_shadow, IS_SHADOW)):
        if left := sum(row["count"] for row in rows if leaves_out(row)):
            reports.append(f"{left} {'left out' if kept else 'refused'}, {cause}")
    if reports and not kept:
        end(FAILED, "\n".join(reports))
    for report in reports:
        click.echo(report, err=True)
    return kept
