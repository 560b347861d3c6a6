"""Words: the paragraph about an order, the facts as lines, and the commands that help."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapter.moments import to_milliseconds, to_text
from adapter.orders import instant
from adapter.routing.explanations import condition_in_words
from adapter.why.cases import Decision, Standing, decide, is_exported
from adapter.why.facts import AtNorce, Facts, OnOrder, RouteFacts

_OUTCOMES = {
    "done": "it was taken",
    "skip": "there was nothing to send",
    "retry": "it failed and may be tried again",
    "reject": "it was refused",
    "unknown": "there was no clear answer",
    "misconfigured": "our credentials were refused",
    "broken": "the handler failed; nothing was sent",
    "not_there": "it was looked for and is not there",
    "moved_on": "it was no longer an order to send",
    "condition": "the conditions could not be evaluated",
    "released": "it was put back before anything was sent",
    "blocked": "the handler did not end",
}
_AT_NORCE = {
    AtNorce.FOUND: "{status}, changed {changed_at}",
    AtNorce.MISSING: "there is no such order",
    AtNorce.UNREADABLE: "cannot be read: {problem.words} ({problem.detail})",
}
_DECISIONS = {
    "matched": "wants the order today",
    "not_matched": "does not want the order",
    "error": "cannot be evaluated",
    None: "cannot be evaluated without the order",
}
_ON_ORDER = {
    OnOrder.REGISTERED: "registered",
    OnOrder.OUTDATED: "registered with another address or condition",
    OnOrder.MISSING: "not registered",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answer about one order."""

    case: str  # the most important one
    exported: bool
    paragraph: str  # for the merchant
    lines: tuple[str, ...]  # the facts, one each
    commands: tuple[str, ...]  # that help, the most useful first


def explain_order(facts: Facts) -> Answered:
    """Say why an order is, or is not, at its destination."""
    decisions = decide(facts)
    concerning = [each for each in decisions if each.case.standing is not Standing.UNRELATED] or decisions
    sentences = [each.case.says.format_map(_words(facts, each.route)) for each in concerning]
    return Answered(
        case=decisions[0].case.name,
        exported=is_exported(decisions),
        paragraph=" ".join([*_opening(facts), *sentences]),
        lines=tuple(fact_lines(facts, decisions)),
        commands=tuple(dict.fromkeys(each for decision in concerning for each in _commands(facts, decision))),
    )


def moment_in_words(text: str | None) -> str:
    """Return a moment to the minute with its zone: `2026-02-03 12:00 UTC`."""
    return "an unknown time" if text is None else f"{text[:10]} {text[11:16]} UTC"


def _end_in_words(text: str | None) -> str:
    """Return a moment in words that is not earlier: to the next minute."""
    moment = instant(text)
    return moment_in_words(None if moment is None else to_text(to_milliseconds(moment) + 59_999))


def _opening(facts: Facts) -> Iterator[str]:
    if facts.order_id is None:
        return
    named = f"Order {facts.order_id}" + (f" (reference {facts.reference})" if facts.reference else "")
    match facts.at_norce:
        case AtNorce.FOUND:
            state = f"in the state {facts.status}" if facts.status else "in a state that we do not know"
            yield f"{named} is {state} at Norce."
        case AtNorce.MISSING:
            yield f"{named} is not at Norce any more."
        case AtNorce.UNREADABLE:
            problem = facts.problem and facts.problem.words
            yield f"{named} cannot be read from Norce now ({problem}), so this is as far as we know."


def _words(facts: Facts, route: RouteFacts | None) -> dict[str, Any]:
    """Return the words for the sentences and commands of a case, without unknown ones."""
    channel = facts.channel
    words: dict[str, Any] = {
        "asked": facts.asked,
        "order": facts.order_id,
        "merchant": channel and channel.merchant,
        "channel": channel and channel.name,
        "status": facts.status or "unknown",
        "created_at": facts.created_at,
        "problem": facts.problem and facts.problem.words,
        "received": moment_in_words(facts.notifications[-1]["received_at"]) if facts.notifications else None,
        "notification": facts.notifications[0]["id"] if facts.notifications else None,
    }
    if facts.under_gone_names:
        words |= {
            "gone": f"“{facts.under_gone_names[0]['callback']}”",
            "gone_at": moment_in_words(facts.under_gone_names[0]["received_at"]),
        }
    if facts.refusal is not None:
        words |= {
            "check": f"“{facts.refusal['route']}”",
            "codes": ", ".join(f"“{each}”" for each in facts.refusal["codes"]) or "no code",
            "refused_at": moment_in_words(facts.refusal["at"]),
        }
    if route is not None:
        words |= _words_of_route(facts, route)
    return {name: value for name, value in words.items() if value is not None}


def _words_of_route(facts: Facts, route: RouteFacts) -> dict[str, Any]:
    current, delivered, queue = route.current, route.delivered, route.queue or {}
    words = {
        "route": f"“{route.route}”",
        "route_name": route.route,
        "callback": route.callback or "an unknown callback",
        "wanted": " or ".join(route.wanted_statuses) or "ready",
        "failing": "; ".join(_failing_in_words(each) for each in route.failing) or "our rule does not select it",
        "earlier": "",
        "number": "",
        "paused_until": _end_in_words(queue.get("paused_until")),
        "paused_at": f" since {moment_in_words(route.pause['at'])}" if route.pause else "",
        "ahead": f"orders that wait: {queue.get('waiting', 0)}",
    }
    if route.arrivals:
        words |= {
            "received": moment_in_words(route.arrivals[-1]["received_at"]),
            "notification": route.arrivals[0]["id"],
        }
    if delivered is not None:
        number = f", with the number {delivered['reference']}" if delivered["reference"] else ""
        since = moment_in_words(delivered["ended_at"])
        words |= {"delivered": delivered["id"], "delivered_at": since, "number": number}
        words["earlier"] = f" An earlier version of it has been there since {since}{number}."
    if current is not None:
        attempts = current.get("attempts") or ()
        words |= {
            "delivery": current["id"],
            "notification": current["notification_id"],
            "state": current["state"],
            "tries": _count(current["tries"], "attempt", "attempts"),
            "code": f"“{current['code'] or current['reason'] or 'no code'}”",
            "next_at": _end_in_words(current["next_at"]),
            "ended_at": moment_in_words(current["ended_at"]),
            "first_attempt_at": moment_in_words(current["first_attempt_at"]),
            "attempted_at": moment_in_words(attempts[-1]["ended_at"] if attempts else current["first_attempt_at"]),
        }
    return words


def _commands(facts: Facts, decision: Decision) -> Iterator[str]:
    words = {name: shlex.quote(str(value)) for name, value in _words(facts, decision.route).items()}
    if facts.channel is not None:
        words["of_channel"] = f"--merchant {words['merchant']} --channel {words['channel']}"
    for each in decision.case.remedies:
        with contextlib.suppress(KeyError):  # it names something that is not known here, such as a notification
            yield each.format_map(words)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _failing_in_words(condition: Mapping[str, Any]) -> str:
    """Return for the merchant which part of the order is not as the route wants it."""
    part = " ".join(condition["scope"].split("/")[1:])
    return f"it has no {part}" if condition["code"] == "scope_missing" else f"its {part} is not as it has to be"


# --- facts as lines ---------------------------------------------------------------------------------------------------


def fact_lines(facts: Facts, decisions: list[Decision]) -> Iterator[str]:
    """Yield the facts about an order, one line each; details are indented."""
    if facts.order_id is None:
        return
    references = {"reference": facts.reference, "cart": facts.cart_reference}
    named = [f"{name} {value}" for name, value in references.items() if value]
    assert facts.channel is not None
    yield ", ".join([f"order {facts.order_id} of {facts.channel.merchant}, channel {facts.channel.name}", *named])
    changed_at = moment_in_words(facts.changed_at)
    yield "at Norce: " + _AT_NORCE[facts.at_norce].format(
        status=facts.status or "unknown state", changed_at=changed_at, problem=facts.problem
    )
    for name, state in facts.callbacks.items():
        yield f"  callback {name}: {_ON_ORDER[state]}"
    configured = "configured" if facts.is_channel_configured else "not configured"
    yield f"channel: {configured}, and switched {'off' if facts.is_switched_off else 'on'} in Norce's configuration"
    yield "service: " + ("held" if facts.is_held else "running" if facts.is_served else "not running")
    yield f"received: {_count(len(facts.notifications), 'notification', 'notifications')}"
    for each in reversed(facts.notifications):
        received_at = moment_in_words(each["received_at"])
        yield f"  notification {each['id']}: {each['callback']}, {received_at}, source {each['source']}"
    for decision in decisions:
        if decision.route is not None:
            yield from _route_lines(decision)
    for each in reversed(facts.verdicts):
        codes = f": {', '.join(each['codes'])}" if each["codes"] else ""
        yield f"verdict {moment_in_words(each['at'])}: {each['route']} {each['decided']} ({each['kind']}){codes}"


def _route_lines(decision: Decision) -> Iterator[str]:
    route = decision.route
    assert route is not None
    about = f"callback {route.callback}, {_DECISIONS[route.decision]}" if route.callback else "not configured"
    yield f"route {route.route} ({about}): {decision.case.name}"
    for each in route.conditions:
        yield f"  condition {condition_in_words(dict(each))}"
    if route.queue is not None:
        queue = route.queue
        pause = f" by {queue['paused_by']} until {queue['paused_until']}" if queue["paused_by"] else ""
        reason = f": {queue['reason']}" if queue["reason"] else ""
        yield f"  queue: {queue['state']}{pause}{reason}; {queue['waiting']} wait, {queue['running']} running"
    if route.pause is not None:
        yield f"  paused by {route.pause['who']} at {moment_in_words(route.pause['at'])}"
    for each in reversed(route.deliveries):
        again = f", again for delivery {each['again_of']}" if each["again_of"] else ""
        yield f"  delivery {each['id']} for notification {each['notification_id']}{again}: {_delivery_in_words(each)}"
        for attempt in each.get("attempts", ()):
            yield f"    {_attempt_in_words(attempt)}"


def _delivery_in_words(delivery: Mapping[str, Any]) -> str:
    if delivery["state"] == "waiting":
        next_at = f", next at {moment_in_words(delivery['next_at'])}" if delivery["next_at"] else ""
        return f"waiting{next_at}{', in doubt' if delivery['in_doubt'] else ''}"
    number = f" as {delivery['reference']}" if delivery["reference"] else ""
    return f"{delivery['state']}, {delivery['reason']}{number}, {moment_in_words(delivery['ended_at'])}"


def _attempt_in_words(attempt: Mapping[str, Any]) -> str:
    kind = "looked up" if attempt["kind"] == "lookup" else "tried"
    more = [f"“{each}”" for each in (attempt["code"], attempt["message"]) if each]
    outcome = _OUTCOMES.get(attempt["outcome"], attempt["outcome"])
    return f"{kind} {moment_in_words(attempt['started_at'])}: {outcome}{': ' if more else ''}{' '.join(more)}"
