"""Commands about orders at Norce: list, show and delete.

They call Norce with the tokens in the configuration. They need no running service and no ledger.
"""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from adapter.cli.shared import (
    FAILED,
    NOTHING_MATCHED,
    TEXT,
    USAGE,
    config_option,
    end,
    list_options,
    load_config,
    options,
    print_rows,
    printable,
    progress_bar,
    read_options,
)
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.metrics import Metrics
from adapter.norce.api import V0
from adapter.norce.client import Norce, NorceError, OrderNotFound
from adapter.registrations.on_orders import PLACES
from adapter.routing.from_config import norce_client

COLUMNS = ("id", "reference", "status", "created", "total", "currency")
PAGE_SIZE = 100
Answer = TypeVar("Answer")

one_channel_options = options(
    click.option("--merchant", type=TEXT, help="The merchant; may be left out if only one is configured."),
    click.option("--channel", type=TEXT, help="The channel; may be left out if the merchant has only one."),
)


@click.group("orders")
def orders_group() -> None:
    """List, show and delete orders at Norce."""


@orders_group.command("list")
@one_channel_options
@click.option("--reference", type=TEXT, help="Only orders with this reference.")
@click.option("--cart-reference", type=TEXT, help="Only orders of this cart.")
@click.option("--search", type=TEXT, help="Only orders that contain this text (norce.version v0).")
@click.option("--status", type=TEXT, multiple=True, help="Only orders with this status; may be repeated.")
@list_options
def orders_list(limit: int, output: str, config_path: Path, **given: Any) -> None:
    """List the orders of a channel, newest first, without data about customers."""
    config = load_config(config_path)
    channel = only_channel(config, given.pop("merchant"), given.pop("channel"))
    statuses = {each.lower() for each in given.pop("status")}
    filters = {name: value for name, value in given.items() if value is not None}
    if "search" in filters and config.norce.version != V0:
        end(USAGE, "--search needs v0 of the Order API; see norce.version")
    query = {"order_by": "created", "order_by_direction": "desc", **filters}

    async def read(norce: Norce) -> tuple[list[dict[str, Any]], int | None]:
        rows: list[dict[str, Any]] = []
        in_all = None
        with progress_bar() as progress:
            task = progress.add_task("reading", total=None)
            async for page in norce.order_pages(channel, limit=min(limit, PAGE_SIZE), **query):
                rows += (row for row in map(_row, page.items) if not statuses or row["status"] in statuses)
                in_all = None if statuses else page.total
                total = None if page.total is None else min(page.total, limit)
                progress.update(task, completed=page.offset + page.count, total=total)
                if len(rows) >= limit:
                    break
        return rows[:limit], in_all

    rows, in_all = call_norce(config, read)
    matching = f"{in_all:,}".replace(",", " ") if in_all is not None and in_all > len(rows) else None
    print_rows(rows, output, COLUMNS, nothing="no order of this channel matches", matching=matching)


@orders_group.command("show")
@click.argument("order_id", metavar="ORDER", type=TEXT)
@one_channel_options
@read_options
def orders_show(order_id: str, merchant: str | None, channel: str | None, output: str, config_path: Path) -> None:
    """Show an order with its callbacks. JSON shows all of it, including the customer."""
    config = load_config(config_path)
    of_channel = only_channel(config, merchant, channel)
    answer = call_norce(config, lambda norce: norce.order(of_channel, order_id))
    if output == "json":
        click.echo(answer.raw)
        return
    order = answer.data
    for name, value in _row(order).items():
        click.echo(f"{name:13} {printable('' if value is None else value)}")
    for place, *_ in PLACES.values():
        for each in order.get(place) or ():
            # Without the query, which may hold a signature or a secret.
            address = str(each.get("invoke") or each.get("url") or "").partition("?")[0]
            click.echo(printable(f"{place[:-1]:13} {each.get('adapterId')}: {address}"))


@orders_group.command("delete")
@click.argument("order_id", metavar="ORDER", type=TEXT)
@one_channel_options
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@config_option
def orders_delete(order_id: str, merchant: str | None, channel: str | None, *, yes: bool, config_path: Path) -> None:
    """Delete an order at Norce. It cannot be undone."""
    config = load_config(config_path)
    of_channel = only_channel(config, merchant, channel)
    if not yes:
        click.confirm(
            f"Delete order {printable(order_id)} of {of_channel.merchant}, channel {of_channel.name}?",
            abort=True,
            err=True,
        )
    call_norce(config, lambda norce: norce.call(of_channel, "delete_order", path={"order_id": order_id}))
    click.echo("deleted")


def _row(order: dict[str, Any]) -> dict[str, Any]:
    state, total = (each if isinstance(each := order.get(name), dict) else {} for name in ("state", "total"))
    shown = {name: order.get(name) for name in ("id", "reference", "created", "currency")}
    return shown | {"status": str(state.get("currentStatus", "")).lower(), "total": total.get("includingVat")}


def only_channel(config: Config, merchant: str | None, channel: str | None) -> Channel:
    """Return the channel that is named, or the only one. An error ends the command."""
    merchant = merchant or _only(config.merchants, "--merchant")
    if merchant not in config.merchants:
        end(USAGE, f"no merchant {printable(merchant)} is configured, only {', '.join(config.merchants)}")
    channels = config.merchants[merchant].channels
    channel = channel or _only(channels, "--channel")
    if channel not in channels:
        end(USAGE, f"{merchant} has no channel {printable(channel)}, only {', '.join(channels)}")
    return Channel(merchant, channel)


def _only(names: Any, option: str) -> str:
    if len(names) != 1:
        end(USAGE, f"{option} is needed: {', '.join(names)}")
    return str(next(iter(names)))


def call_norce(config: Config, work: Callable[[Norce], Coroutine[Any, Any, Answer]]) -> Answer:
    """Call Norce and return the answer. An error ends the command."""

    async def run() -> Answer:
        norce = norce_client(config, Metrics(""))
        try:
            return await work(norce)
        finally:
            await norce.aclose()

    try:
        return asyncio.run(run())
    except OrderNotFound as error:
        end(NOTHING_MATCHED, str(error))
    except NorceError as error:
        end(FAILED, str(error))
