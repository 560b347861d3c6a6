"""The command `explain`: which routes want an event, and why.

Decisions and reasons are the service's own. The output has names, places and kinds of the order, never a value.
"""

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
    as_json,
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

_RESULTS = {"matched": "wants it", "not_matched": "does not want it", "error": "cannot be evaluated"}
_ERRORS = {"scope_in_array": "the scope leads through an array, which is not possible"}


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
    explanation = explained(built, built.callbacks[callback], order, channel)
    if output == "json":
        click.echo(as_json(explanation))
    else:
        for line in in_words(explanation):
            click.echo(printable(line))


def explained(built: Routes, callback: Callback, order: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Return the explanation of one event as plain values.

    Args:
        built: All routes.
        callback: The callback of the event.
        order: The order as plain JSON.
        channel: The channel whose settings have the rules, for routes with the handler `rules`.
    """
    explanation: dict[str, Any] = {
        "callback": callback.name,
        "kind": callback.kind,
        "condition": callback.condition and _explain_condition(callback.condition, order),
        "routes": [],
    }
    configured = {each for route in built.all for each in route.settings}
    for route in built.of(callback.name):
        is_for_channel = channel in route.settings or channel not in configured
        result = wants(route, order) if is_for_channel else Result.NOT_MATCHED
        settings = route.settings.get(channel) if result is Result.MATCHED else None
        rules = settings.rules if isinstance(settings, RulesSettings) else ()
        explanation["routes"].append(
            {
                "route": route.name,
                "handler": route.handler_name,
                "result": result.value,
                "no_answer": route.no_answer,
                "is_for_channel": is_for_channel,
                "when": [_explain_condition(each, order) for each in route.when],
                "rules": [{"code": rule.code, "rule": _explain_condition(rule.compiled, order)} for rule in rules],
            }
        )
    return explanation


def kind(value: Any) -> str:
    """Return the kind of a value in words, never the value."""
    if value is MISSING:
        return "missing"
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, (dict, list)):
        return f"{'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    return "string" if isinstance(value, str) else "number"


def _explain_condition(condition: CompiledCondition, order: dict[str, Any]) -> dict[str, Any]:
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


def in_words(explanation: dict[str, Any]) -> Iterator[str]:
    """Yield the explanation as lines for people."""
    yield f"callback {explanation['callback']}, a {explanation['kind']}"
    if explanation["condition"]:
        yield f"  {_sentence(explanation['condition'])}"
    for route in explanation["routes"]:
        effect = ""
        if route["result"] == Result.ERROR.value:
            no_answer = route["no_answer"]
            effect = f": its no_answer counts, {no_answer}" if no_answer else ": a dead letter with reason condition"
        yield f"route {route['route']} (handler {route['handler']}) {_RESULTS[route['result']]}{effect}"
        if not route["is_for_channel"]:
            yield "  it is for other merchants or channels"
        for condition in route["when"]:
            yield f"  when {_sentence(condition)}"
        for rule in route["rules"]:
            yield f"  rule {rule['code']}: {_sentence(rule['rule'])}"


def _sentence(condition: dict[str, Any]) -> str:
    at = f"{condition['at']} ({condition['kind_at']})"
    if condition["code"] is None:
        why = "holds"
    elif condition["code"] == "scope_missing":
        why = f"does not hold: there is no {condition['at']}"
    elif condition["code"] != "schema":
        why = f"cannot be evaluated: {_ERRORS.get(condition['code'], condition['code'])}, at {at}"
    elif condition["schema_at"] is None:
        why = "does not hold; the schema is too large to find the keyword"
    elif condition["keyword"] is None:
        why = f"does not hold: the schema at {condition['schema_at'] or 'its root'} is false, for {at}"
    else:
        why = f"does not hold: {condition['keyword']} fails at {at}; in the schema at {condition['schema_at']}"
    return f"{condition['scope']} ({condition['kind']}) {why}"


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
        end(NOTHING_MATCHED, f"the body of notification {number} is not kept; see store.retention")
    return row
