"""Explanations of conditions: which routes want an event, and why.

They have names, places and kinds of the order, never a value.
"""

from collections.abc import Iterator
from typing import Any

from jsonpointer import JsonPointer

from adapter.conditions import MISSING, CompiledCondition, Result
from adapter.handlers.rules import RulesSettings
from adapter.identifiers import Channel
from adapter.routing.routes import Callback, Routes, wants

_RESULTS = {"matched": "wants it", "not_matched": "does not want it", "error": "cannot be evaluated"}
_ERRORS = {"scope_in_array": "the scope leads through an array, which is not possible"}


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
        yield f"  {condition_in_words(explanation['condition'])}"
    for route in explanation["routes"]:
        effect = ""
        if route["result"] == Result.ERROR.value:
            no_answer = route["no_answer"]
            effect = f": its no_answer counts, {no_answer}" if no_answer else ": a dead letter with reason condition"
        yield f"route {route['route']} (handler {route['handler']}) {_RESULTS[route['result']]}{effect}"
        if not route["is_for_channel"]:
            yield "  it is for other merchants or channels"
        for condition in route["when"]:
            yield f"  when {condition_in_words(condition)}"
        for rule in route["rules"]:
            yield f"  rule {rule['code']}: {condition_in_words(rule['rule'])}"


def condition_in_words(condition: dict[str, Any]) -> str:
    """Return one explained condition as a sentence."""
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
