"""
`explain`: who wants this event, and why. Decisions and reasons are the service's own.

It reads what the service reads, an order with people in it, and shows of it names, places and kinds: never a value.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from jsonpointer import JsonPointer
from sqlalchemy import select

from adapter.cli.ledger import ID
from adapter.cli.shared import (
    NOTHING_MATCHED,
    USAGE,
    config_option,
    end,
    load_config_and_routes,
    open_ledger,
    output_option,
    printable,
)
from adapter.conditions import MISSING, CompiledCondition, Result
from adapter.config import Config
from adapter.handlers.rules import RulesSettings
from adapter.identifiers import Channel
from adapter.ledger.schema import notifications
from adapter.orders import NotAnOrder, decode, order_in
from adapter.routing.routes import Callback, Routes, wants

_RESULTS = {"matched": "wants it", "not_matched": "does not want it", "error": "cannot tell"}
_ERRORS = {
    "scope_in_array": "the scope leads through an array, which no condition can",
    "too_deep": "it is nested too deeply to be decided",
    "too_costly": "it is too large for this schema; a smaller scope helps",
    "number_too_large": "it has a number beyond 64 bits, and the schema asks about numbers",
}


@click.command()
@click.argument("what", metavar="FILE|NOTIFICATION")
@click.option("--callback", help="The name of a configured callback; a notification's own, if not said.")
@output_option
@config_option
def explain(what: str, callback: str | None, output: str, config_path: Path) -> None:
    """
    Show for each route of a callback whether it wants an event, and why.

    FILE is an order, an envelope or an event record, - for standard input; NOTIFICATION the number of one in the
    ledger. Nothing is sent, stored or changed, and no value of the order is shown.
    """
    config, built = load_config_and_routes(config_path)
    if what.isascii() and what.isdecimal():
        kept = _notification(config, ID(what))
        order, channel = _order_in(kept.body, what), Channel(kept.merchant, kept.channel)
        callback = callback or kept.callback
    else:
        order = _order_in(_bytes_of(what), what)
        channel = Channel(str(order.get("merchant")), str(order.get("channel")))
    if callback is None:
        end(USAGE, "a file needs --callback: the name of a configured callback")
    if callback not in built.callbacks:
        end(USAGE, f"no callback {callback} is configured; there are: {', '.join(sorted(built.callbacks))}")
    if channel not in config.channels:
        click.echo("the order's merchant and channel are not configured, so no rules are shown", err=True)
    told = explained(built, built.callbacks[callback], order, channel)
    if output == "json":
        click.echo(json.dumps(told, ensure_ascii=False))
    else:
        for line in in_words(told):
            click.echo(printable(line))


def explained(built: Routes, callback: Callback, order: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """
    Everything about one event, as plain values. The rules of the handler `rules` are settings, which a
    channel may have for itself.
    """
    told: dict[str, Any] = {
        "callback": callback.name,
        "kind": callback.kind,
        "condition": _told(callback.condition, order),
        "routes": [],
    }
    for route in built.of(callback.name):
        result = wants(route, order)
        settings = route.settings.get(channel) if result is Result.MATCHED else None
        rules = settings.rules if isinstance(settings, RulesSettings) else ()
        told["routes"].append(
            {
                "route": route.name,
                "handler": route.handler_name,
                "result": result.value,
                "no_answer": route.no_answer,
                "when": _told(route.when, order),
                "rules": [{"code": rule.code, "rule": _told(rule.compiled, order)} for rule in rules],
            }
        )
    return told


def kind(value: Any) -> str:
    """What a value is, and never which one."""
    if value is MISSING:
        return "missing"
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, (dict, list)):
        return f"{'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    return "string" if isinstance(value, str) else "number"


def _told(condition: CompiledCondition | None, order: dict[str, Any]) -> Any:
    """What became of a condition; None where there is none."""
    if condition is None:
        return None
    evaluation, reason = condition.evaluate(order), condition.reason(order)
    scope = str(condition.condition.scope)
    at = reason.where if reason else evaluation.where or scope
    return {
        "scope": scope,
        "kind": kind(condition.value(order)),
        "result": evaluation.result.value,
        "code": evaluation.code,
        "at": at,
        "kind_at": kind(JsonPointer(at).resolve(order, MISSING)),
        "keyword": reason and reason.keyword,
        "schema_at": reason and reason.schema,
    }


def in_words(told: dict[str, Any]) -> Iterator[str]:
    """The same for people, line by line."""
    yield f"callback {told['callback']}, a {told['kind']}"
    if told["condition"]:
        yield f"  {_sentence(told['condition'])}"
    for route in told["routes"]:
        follows = ""
        if route["result"] == Result.ERROR.value:
            follows = (
                f": its no_answer counts, {route['no_answer']}" if route["no_answer"] else ": a dead letter, condition"
            )
        yield f"route {route['route']} (handler {route['handler']}) {_RESULTS[route['result']]}{follows}"
        if route["when"]:
            yield f"  when {_sentence(route['when'])}"
        for rule in route["rules"]:
            yield f"  rule {rule['code']}: {_sentence(rule['rule'])}"


def _sentence(seen: dict[str, Any]) -> str:
    at = f"{seen['at']} ({seen['kind_at']})"
    if seen["code"] is None:
        why = "holds"
    elif seen["code"] == "scope_missing":
        why = f"does not hold, since nothing is at {seen['at']}"
    elif seen["code"] != "schema":
        why = f"cannot be decided: {_ERRORS.get(seen['code'], seen['code'])}, at {at}"
    elif seen["schema_at"] is None:
        why = "does not hold; no reason was found in the schema"
    elif seen["schema_at"] is None:
        why = "does not hold; the schema is too large to find the keyword"
    elif seen["keyword"] is None:
        why = f"does not hold: the schema at {seen['schema_at'] or 'its root'} is false, for {at}"
    else:
        why = f"does not hold: {seen['keyword']} fails at {at}; in the schema at {seen['schema_at']}"
    return f"{seen['scope']} ({seen['kind']}) {why}"


def _bytes_of(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        end(USAGE, f"{name} cannot be read: {error.strerror}")


def _order_in(raw: bytes, what: str) -> dict[str, Any]:
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
        end(NOTHING_MATCHED, f"the body of notification {number} is no longer kept; see store.retention")
    return row
