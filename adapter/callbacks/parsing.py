"""
What was sent. Only these functions build a `ReceivedNotification`, a `HookRequest` or a `ValidationRequest`, and they
ask for the `Sender` that only `senders` hands out: a value of these types has passed every check.

The `scope` and `schema` in a notification's own body are data: Norce has decided on them already, and they never run.
"""

import hashlib
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from typing import Any

from adapter.callbacks.senders import RawCallback, Sender, Unauthenticated
from adapter.conditions import MISSING
from adapter.identifiers import Channel
from adapter.ledger.inbox import ReceivedNotification
from adapter.orders import NotAnOrder, Order, canonical, decode, instant, order_digest, order_in
from adapter.routing.routes import Callback
from adapter.verdicts.verdicts import VerdictRequest

HEADERS = ("content-type", "x-merchant", "x-channel")  # the ones that are read here
LONGEST_ID = 64
FURTHEST_AHEAD_MS = 10 * 60 * 1000


class CallbackInvalid(Exception):
    """A callback that cannot be taken as it is. `inner` names what is wrong with it, in kebab-case."""

    def __init__(self, inner: str, message: str) -> None:
        super().__init__(message)
        self.inner = inner


class BadRequest(CallbackInvalid):
    """The caller sent something that contradicts itself or the form: it must be mended at the caller's end."""


class NotJson(CallbackInvalid):
    """The body does not say that it is JSON."""


class ConfigurationNotFound(CallbackInvalid):
    """The merchant or the channel is not in our configuration."""


class Unresolved(CallbackInvalid):
    """The URL holds literal braces: a placeholder that the caller did not fill in."""


def check_order_id(order_id: str) -> None:
    """
    Raises `Unresolved` on literal braces, `BadRequest` on an id that is empty, over 64 characters, holds a control
    character or is a step in a path (`..`): it becomes part of a URL at Norce.
    """
    if "{" in order_id or "}" in order_id:
        raise Unresolved("unresolved-placeholder", "The order id in the path is an unresolved placeholder.")
    if not order_id or len(order_id) > LONGEST_ID or not order_id.isprintable() or order_id in (".", ".."):
        raise BadRequest("order-id", f"An order id has 1 to {LONGEST_ID} printable characters.")


def parse_notification(
    raw: RawCallback, sender: Sender, callback: Callback, channels: Container[Channel], now: int
) -> tuple[ReceivedNotification, dict[str, Any]]:
    """
    The notification in a request, a bare order or `{"notification": …, "order": …}`, and the order as a plain tree.
    `now` in milliseconds.

    Raises `NotJson`, `BadRequest`, `ConfigurationNotFound`, `Unauthenticated` (a secret that is not good for this
    merchant), `Unresolved`.
    """
    order, channel = _order_in(raw, sender, channels)
    modified = _micros(order.get("lastModified"), now)
    notification = ReceivedNotification(
        identity=_identity(callback, channel, raw, order, modified),
        channel=channel,
        callback=callback.name,
        order_id=raw.order_id,
        snapshot_at=None if modified is None else modified // 1000,
        source=sender.source,
        body=raw.body,
    )
    return notification, order


def parse_hook(raw: RawCallback, sender: Sender, callback: Callback, channels: Container[Channel]) -> VerdictRequest:
    """
    The hook in a request: the order with the proposed change in it, of either version.

    Raises what `parse_notification` raises.
    """
    order, channel = _order_in(raw, sender, channels)
    return VerdictRequest(callback=callback, channel=channel, order_id=raw.order_id, order=Order(raw.body, order))


def parse_validation(
    raw: RawCallback, sender: Sender, callback: Callback, channels: Container[Channel]
) -> VerdictRequest:
    """
    The validation in a request; its body is not looked at.

    Raises `BadRequest`, `ConfigurationNotFound`, `Unauthenticated`, `Unresolved`.
    """
    check_order_id(raw.order_id)
    return VerdictRequest(callback=callback, channel=_whose(raw, sender, channels, {}), order_id=raw.order_id)


def _order_in(raw: RawCallback, sender: Sender, channels: Container[Channel]) -> tuple[dict[str, Any], Channel]:
    """The order in a body, and whose it is."""
    check_order_id(raw.order_id)
    media_type = raw.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (
        media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
    ):
        raise NotJson("content-type", "The body must be application/json.")
    try:
        order = order_in(decode(raw.body))
    except NotAnOrder as error:
        raise _malformed() from error
    order_id = order.get("id")
    if order_id is not None and order_id != raw.order_id:
        raise BadRequest("order-id-differs", "The order id in the path and the one in the body differ.")
    return order, _whose(raw, sender, channels, order)


def _whose(raw: RawCallback, sender: Sender, channels: Container[Channel], order: Mapping[str, Any]) -> Channel:
    signed = sender.channel or (None, None)
    merchant = _one_of("merchant", signed[0], raw.headers.get("x-merchant"), order.get("merchant"))
    name = _one_of("channel", signed[1], raw.headers.get("x-channel"), order.get("channel"))
    channel = Channel(merchant, name)
    if channel not in channels:
        raise ConfigurationNotFound("merchant-or-channel", "This merchant and channel are not configured here.")
    if not sender.may_speak_for(merchant):
        raise Unauthenticated("the secret is not good for this merchant")
    return channel


def _one_of(what: str, *values: Any) -> str:
    """What is said at least once and never in two ways; an empty text says nothing."""
    found = None
    for value in values:
        if value is None or value == "":
            continue
        if not isinstance(value, str) or (found is not None and value != found):
            raise BadRequest(f"{what}-unclear", f"The {what} differs between the URL, the header and the body.")
        found = value
    if found is None:
        raise BadRequest(f"{what}-unclear", f"The {what} is given nowhere.")
    return found


def _micros(value: Any, now: int) -> int | None:
    moment = instant(value)
    if moment is None:
        return None
    micros = (moment - _EPOCH) // _MICROSECOND
    return micros if 0 < micros <= (now + FURTHEST_AHEAD_MS) * 1000 else None


def _identity(
    callback: Callback, channel: Channel, raw: RawCallback, order: dict[str, Any], modified: int | None
) -> bytes:
    """
    Which event it is: merchant, channel, callback, order, when it was modified and the value at the scope; without a
    moment the whole order. It begins with the moment, so that the ledger's index grows at its end.
    """
    named: list[Any] = ["v1", *channel, callback.name, raw.order_id, modified]
    try:
        if modified is None:
            named.append(order_digest(order).hex())
        elif callback.condition is not None and (value := callback.condition.value(order)) is not MISSING:
            named.append(value)
        return (modified or 0).to_bytes(8, "big") + hashlib.sha256(canonical(named)).digest()[:16]
    except NotAnOrder as error:
        raise _malformed() from error


def _malformed() -> BadRequest:
    return BadRequest(
        "malformed-json", "The body must be one JSON object in strict JSON (RFC 8259), not nested too deeply."
    )


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = datetime.resolution
