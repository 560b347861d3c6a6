"""The command `why`: the reason why an order is, or is not, at its destination."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from adapter.cli.orders import call_norce
from adapter.cli.service import is_held
from adapter.cli.shared import (
    NOTHING_MATCHED,
    TEXT,
    as_json,
    channel_options,
    load_config_and_routes,
    open_ledger,
    printable,
    read_options,
)
from adapter.identifiers import Channel
from adapter.why.words import Answered, explain_order


@click.command()
@click.argument("asked", metavar="ORDER|REFERENCE|CART", type=TEXT)
@channel_options
@read_options
def why(asked: str, merchant: str | None, channel: str | None, output: str, config_path: Path) -> None:
    """Say why an order is, or is not, at its destination.

    The answer is a paragraph for the merchant, then the facts, and the commands that help. The command reads the ledger
    and Norce, and changes nothing. It exits with 0 if every order of this id or reference is exported, else with 3.
    """
    from adapter.ledger.clock import read_from_outside
    from adapter.ledger.databases import database_at
    from adapter.ledger.queries import Queries
    from adapter.why.facts import facts_of, facts_without_order, find_in_ledger, read_orders

    config, routes = load_config_and_routes(config_path)

    def is_asked(each: Channel) -> bool:
        return merchant in (None, each.merchant) and channel in (None, each.name)

    with open_ledger(config) as connection:
        queries = Queries(connection)
        now = read_from_outside(database_at(config.store.url), connection)
        known = [each for each in find_in_ledger(queries, asked) if is_asked(each.channel)]
        channels = list(filter(is_asked, config.channels))
        readings, problem = call_norce(config, lambda norce: read_orders(norce, asked, known, channels))
        held = is_held(config)
        found = [facts_of(each, asked, queries, config, routes, now=now, is_held=held) for each in readings]
    all_facts = found or [facts_without_order(asked, problem, now)]
    answers = [explain_order(each) for each in all_facts]
    if output == "json":
        rows = zip(all_facts, answers, strict=True)
        click.echo(as_json([msgspec.to_builtins(answer) | {"facts": msgspec.to_builtins(of)} for of, answer in rows]))
    else:
        if len(answers) > 1:
            click.echo(f"{len(answers)} orders have the reference {printable(asked)}.\n")
        click.echo("\n\n".join("\n".join(map(printable, _lines(each))) for each in answers))
    if not all(each.exported for each in answers):
        sys.exit(NOTHING_MATCHED)


def _lines(answer: Answered) -> Iterator[str]:
    yield answer.paragraph
    if answer.lines:
        yield from ("", "Facts", *(f"  {each}" for each in answer.lines))
    if answer.commands:
        yield from ("", "Commands that help", *(f"  {each}" for each in answer.commands))
