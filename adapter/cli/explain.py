"""The command `explain`: which routes want an event, and why.

Decisions and reasons are the service's own. The output has names, places and kinds of the order, never a value.
"""

import sys
from pathlib import Path
from typing import Any

import click
from sqlalchemy import select

from adapter.cli.ledger import ID
from adapter.cli.shared import (
    NOTHING_MATCHED,
    USAGE,
    as_json,
    config_option,
    end,
    load_config_and_routes,
    open_ledger,
    output_option,
    printable,
)
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.schema import notifications
from adapter.orders import NotAnOrder, decode, order_in
from adapter.routing.explanations import explained, in_words


@click.command()
@click.argument("what", metavar="FILE|NOTIFICATION")
@click.option("--callback", help="Name of a configured callback. Default: that of the notification.")
@output_option
@config_option
def explain(what: str, callback: str | None, output: str, config_path: Path) -> None:
    """Show which routes of a callback want an event, and why.

    FILE holds an order, an envelope or an event record; - is standard input. NOTIFICATION is the number of a
    notification in the ledger. The command sends, stores and changes nothing, and shows no value of the order.
    """
    config, built = load_config_and_routes(config_path)
    if what.isascii() and what.isdecimal():
        kept = _notification(config, ID(what))
        order, channel = order_in_file(kept.body, what), Channel(kept.merchant, kept.channel)
        callback = callback or kept.callback
    else:
        order = order_in_file(bytes_of(what), what)
        channel = Channel(str(order.get("merchant")), str(order.get("channel")))
    if callback is None:
        end(USAGE, "a file needs --callback: the name of a configured callback")
    if callback not in built.callbacks:
        end(USAGE, f"no callback {callback} is configured; there are: {', '.join(sorted(built.callbacks))}")
    if channel not in config.channels:
        click.echo("the order's merchant and channel are not configured, so no rules are shown", err=True)
    explanation = explained(built, built.callbacks[callback], order, channel)
    if output == "json":
        click.echo(as_json(explanation))
    else:
        for line in in_words(explanation):
            click.echo(printable(line))


def bytes_of(name: str) -> bytes:
    """Return the content of a file, or of standard input for `-`, or end the command."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        end(USAGE, f"{name} cannot be read: {error.strerror}")


def order_in_file(raw: bytes, what: str) -> dict[str, Any]:
    """Return the order in an order, an envelope or an event record, or end the command."""
    try:
        tree = decode(raw)
        if isinstance(tree, dict) and isinstance(tree.get("payload"), dict):  # an event record of the Notification API
            tree = tree["payload"]
        return order_in(tree)
    except NotAnOrder as error:
        end(USAGE, f"{what} holds no order: {error}")


def _notification(config: Config, number: int) -> Any:
    n = notifications.c
    with open_ledger(config) as connection:
        row = connection.execute(select(n.callback, n.merchant, n.channel, n.body).where(n.id == number)).one_or_none()
    if row is None:
        end(NOTHING_MATCHED, f"there is no notification {number}; a file of that name is ./{number}")
    if row.body is None:
        end(NOTHING_MATCHED, f"the body of notification {number} is not kept; see store.retention")
    return row
