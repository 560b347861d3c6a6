"""Parses verified requests into the values that the inbox and `verdicts` work with.

Only the `parse_*` functions build a `ReceivedNotification` or a `VerdictRequest`, and they require a `Sender`. So a
value of these types has passed every check. `scope` and `schema` in the body of a notification are data: Norce has
evaluated them, and they never run here.
"""

import hashlib
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from typing import Any

from adapter.callbacks.senders import RawCallback, Sender, Unauthenticated
from adapter.conditions import MISSING
from adapter.identifiers import Channel, kept_reference
from adapter.ledger.inbox import ReceivedNotification
from adapter.offload import offload
from adapter.orders import NotAnOrder, Order, canonical, decode, instant, order_digest, order_in
from adapter.routing.routes import Callback
from adapter.verdicts.verdicts import VerdictRequest

HEADERS = ("content-type", "content-encoding", "x-merchant", "x-channel")  # read by this module
COMPRESSIONS = frozenset(("gzip", "x-gzip", "deflate", "br", "zstd"))  # other content codings are ignored
LONGEST_ID = 64
FURTHEST_AHEAD_MS = 10 * 60 * 1000  # of a `lastModified` that counts


class CallbackInvalid(Exception):
    """A callback that is refused for its form. `inner` names the fault, in kebab-case."""

    def __init__(self, inner: str, message: str) -> None:
        super().__init__(message)
        self.inner = inner


class BadRequest(CallbackInvalid):
    """The request contradicts itself or has the wrong form. The caller must correct it."""


class NotJson(CallbackInvalid):
    """The content type is not a JSON type, or the content is compressed."""


class ConfigurationNotFound(CallbackInvalid):
    """The merchant or channel is not in our configuration."""


class Unresolved(CallbackInvalid):
    """The order id holds braces: a placeholder that the caller did not replace."""


def channel_not_found() -> ConfigurationNotFound:
    return ConfigurationNotFound("merchant-or-channel", "This merchant and channel are not configured here.")


def check_order_id(order_id: str) -> None:
    """Check that an order id can be part of a URL at Norce.

    Raises:
        Unresolved: The id holds braces.
        BadRequest: It is empty, too long, not printable, or a step in a path (`..`).
    """
    if "{" in order_id or "}" in order_id:
        raise Unresolved("unresolved-placeholder", "The order id in the path is an unresolved placeholder.")
    if not order_id or len(order_id) > LONGEST_ID or not order_id.isprintable() or order_id in (".", ".."):
        raise BadRequest("order-id", f"An order id has 1 to {LONGEST_ID} printable characters.")


async def parse_notification(
    raw: RawCallback, sender: Sender, callback: Callback, channels: Container[Channel], now: int
) -> tuple[ReceivedNotification, dict[str, Any]]:
    """Parse a notification: a bare order, or `{"notification": …, "order": …}`.

    Args:
        now: The time in milliseconds.

    Returns:
        The notification, and its order as a plain tree.

    Raises:
        BadRequest, NotJson, Unresolved: The request has the wrong form.
        ConfigurationNotFound: The merchant or channel is not configured.
        Unauthenticated: The secret is not valid for this merchant.
    """
    order, channel = await offload(len(raw.body), _order_in, raw, sender, channels)
    modified = _micros(order.get("lastModified"), now)
    identity, digest = await offload(len(raw.body), _identity, callback, channel, raw.order_id, order, modified)
    notification = ReceivedNotification(
        identity=identity,
        channel=channel,
        callback=callback.name,
        order_id=raw.order_id,
        snapshot_at=None if modified is None else modified // 1000,
        source=sender.source,
        body=raw.body,
        reference=kept_reference(order.get("reference")),
        digest=digest,
    )
    return notification, order


def parse_unread(
    raw: RawCallback, sender: Sender, callback: Callback, channels: Container[Channel]
) -> ReceivedNotification:
    """Parse a notification whose body is left unread, because its order is beyond its limits.

    Raises what `parse_validation` raises: also if only the body names the merchant or channel.
    """
    check_order_id(raw.order_id)
    channel = _channel_of(raw, sender, channels, {})
    return ReceivedNotification(
        identity=_hashed(["v1", *channel, callback.name, raw.order_id, None], None),
        channel=channel,
        callback=callback.name,
        order_id=raw.order_id,
        snapshot_at=None,
        source=sender.source,
        body=None,
    )


def parse_hook(raw: RawCallback, sender: Sender, callback: Callback, channels: Container[Channel]) -> VerdictRequest:
    """Parse a hook: the body is the order with the proposed change in it.

    Raises what `parse_notification` raises.
    """
    order, channel = _order_in(raw, sender, channels)
    return VerdictRequest(
        callback=callback,
        channel=channel,
        order_id=raw.order_id,
        order=Order(raw.body, order),
        received_at=raw.received_at,
    )


def parse_validation(
    raw: RawCallback, sender: Sender, callback: Callback, channels: Container[Channel]
) -> VerdictRequest:
    """Parse a validation: the body is ignored.

    Raises what `parse_notification` raises, except `NotJson`.
    """
    check_order_id(raw.order_id)
    channel = _channel_of(raw, sender, channels, {})
    return VerdictRequest(callback=callback, channel=channel, order_id=raw.order_id, received_at=raw.received_at)


def _order_in(raw: RawCallback, sender: Sender, channels: Container[Channel]) -> tuple[dict[str, Any], Channel]:
    check_order_id(raw.order_id)
    media_type = raw.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (
        media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
    ):
        raise NotJson("content-type", "The body must be application/json.")
    codings = raw.headers.get("content-encoding", "").lower().split(",")
    if not COMPRESSIONS.isdisjoint(coding.strip() for coding in codings):
        raise NotJson("content-encoding", "The body must not be compressed.")
    try:
        order = order_in(decode(raw.body))
    except NotAnOrder as error:
        raise _malformed() from error
    order_id = order.get("id")
    if order_id is not None and order_id != raw.order_id:
        raise BadRequest("order-id-differs", "The order id in the path and the one in the body differ.")
    return order, _channel_of(raw, sender, channels, order)


def _channel_of(raw: RawCallback, sender: Sender, channels: Container[Channel], order: Mapping[str, Any]) -> Channel:
    signed = sender.channel or (None, None)
    merchant = _agreed("merchant", signed[0], raw.headers.get("x-merchant"), order.get("merchant"))
    name = _agreed("channel", signed[1], raw.headers.get("x-channel"), order.get("channel"))
    channel = Channel(merchant, name)
    if not sender.may_speak_for(merchant):
        raise Unauthenticated("the secret is not valid for this merchant")
    if channel not in channels:
        raise channel_not_found()
    return channel


def _agreed(member: str, *values: Any) -> str:
    """Return the one value that is given. Empty text counts as absent."""
    found = None
    for value in values:
        if value is None or value == "":
            continue
        if not isinstance(value, str) or (found is not None and value != found):
            raise BadRequest(f"{member}-unclear", f"The {member} differs between the URL, the header and the body.")
        found = value
    if found is None:
        raise BadRequest(f"{member}-unclear", f"The {member} is missing.")
    return found


def _micros(value: Any, now: int) -> int | None:
    moment = instant(value)
    if moment is None:
        return None
    micros = (moment - _EPOCH) // _MICROSECOND
    return micros if 0 < micros <= (now + FURTHEST_AHEAD_MS) * 1000 else None


def _identity(
    callback: Callback, channel: Channel, order_id: str, order: dict[str, Any], modified: int | None
) -> tuple[bytes, bytes | None]:
    """Return the same bytes for the same event, and the order's digest if it was needed.

    An event is a callback of an order at a moment, with the value at the callback's scope; without a moment, with the
    whole order. The moment comes first, so that the ledger's index grows at its end.
    """
    named: list[Any] = ["v1", *channel, callback.name, order_id, modified]
    digest = None
    try:
        if modified is None:
            digest = order_digest(order)
            named.append(digest.hex())
        elif callback.condition is not None and (value := callback.condition.value(order)) is not MISSING:
            named.append(value)
        return _hashed(named, modified), digest
    except NotAnOrder as error:
        raise _malformed() from error


def _hashed(named: list[Any], modified: int | None) -> bytes:
    return (modified or 0).to_bytes(8, "big") + hashlib.sha256(canonical(named)).digest()[:16]


def _malformed() -> BadRequest:
    return BadRequest(
        "malformed-json", "The body must be one JSON object in strict JSON (RFC 8259), not nested too deeply."
    )


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = datetime.resolution
