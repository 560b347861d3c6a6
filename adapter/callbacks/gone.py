"""Calls to callbacks, channels and merchants that are no longer configured.

Open orders keep their registrations when a name is renamed or removed, and Norce refuses the purchase of an order
whose validation or hook is answered with an error. So the kind of a callback, which the ledger remembers, decides:

| the callback is known as | answer |
|---|---|
| validation or hook | 200 without problems or patches |
| notification | 404; of a channel that was never known, as if the callback were unknown |
| nothing, and the body is an order | stored as a notification without routes, then 200: it may be backfilled |
| nothing, and there is no body | 200: of the three kinds, only a validation has no body, so nothing is lost |

The caller and the form of the call are checked as for configured names, and the same limits hold. If the ledger cannot
be written, only an order under an unknown name is refused (503): it may be a notification, which must not be lost.
"""

import re
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import structlog

from adapter.callbacks.intake import Intake
from adapter.callbacks.limits import WarningCounter
from adapter.callbacks.parsing import (
    BadRequest,
    channel_not_found,
    check_order_id,
    parse_hook,
    parse_notification,
    parse_validation,
)
from adapter.callbacks.senders import RawCallback, Sender
from adapter.identifiers import Channel
from adapter.ledger.names import Names
from adapter.ledger.uses import Uses
from adapter.metrics import Metrics
from adapter.offload import offload
from adapter.routing.routes import Callback, Routes

log = structlog.get_logger(__name__)

ACCEPTED, STORED, NOT_FOUND = "accepted", "stored", "not-found"
UNKNOWN = "unknown"  # in place of a name that the ledger does not know: labels of a metric have few values
UNKNOWN_CHANNEL = Channel(UNKNOWN, UNKNOWN)
# Names that can have been configured (`config.model`). Any other text is not stored.
_CALLBACK_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_NORCE_NAME = re.compile(r"[!-~]{1,64}")
LONGEST_NAME = 64


class CallbackUnknown(Exception):
    """No callback has this name, and none was a validation or hook that had it."""


class AcceptedCall(NamedTuple):
    """The result of a call that was accepted in place of a route."""

    result: str  # accepted or stored
    channel: Channel  # for people
    may_be_hook: bool


def check_possible(channel: Channel) -> None:
    """Raise `ConfigurationNotFound` unless these can be names of a merchant and a channel."""
    if not all(map(_NORCE_NAME.fullmatch, channel)):
        raise channel_not_found()


class _EveryChannel:
    def __contains__(self, _channel: object) -> bool:
        return True


EVERY_CHANNEL = _EveryChannel()


class GoneNames:
    """Answers calls to names that are gone, counts them, and warns.

    Args:
        clock: The ledger's clock, in milliseconds.
    """

    def __init__(
        self,
        names: Names,
        uses: Uses,
        *,
        routes: Routes,
        channels: Collection[Channel],
        intake: Intake,
        metrics: Metrics,
        clock: Callable[[], int],
    ) -> None:
        self._names = names
        self._uses = uses
        self._routes = routes
        self._merchants = {channel.merchant for channel in channels}
        self._intake = intake
        self._metrics = metrics
        self._clock = clock
        self._warnings = WarningCounter(time.monotonic)

    def callback(self, name: str) -> Callback | None:
        """Return a callback that was configured once, or None."""
        kind = self._names.known.callbacks.get(name)
        return None if kind is None else Callback(name=name, kind=kind)

    async def accept(self, raw: RawCallback, sender: Sender, callback: Callback | None) -> AcceptedCall:
        """Accept a call although its callback, or its merchant or channel, is not configured.

        Args:
            raw: The call with its body.
            sender: Its sender.
            callback: The callback as it is configured, or as the ledger knows it.

        Raises:
            CallbackUnknown: It is a notification whose callback is gone, or no name of a callback.
            ConfigurationNotFound: It is a notification of a channel that is gone, or of no possible channel.
            StoreUnavailable: It may be a notification, and nothing was stored.
            BadRequest, NotJson, Unresolved, Unauthenticated: As for a configured name.
        """
        check_order_id(raw.order_id)
        if callback is not None and callback.kind == "notification" and callback.name not in self._routes.callbacks:
            self._note(raw.callback, sender.channel, sender, NOT_FOUND)
            raise CallbackUnknown
        if callback is None and not (_CALLBACK_NAME.fullmatch(raw.callback) and len(raw.callback) <= LONGEST_NAME):
            raise CallbackUnknown
        kind, result = "" if callback is None else callback.kind, ACCEPTED
        # Norce sends an order by POST. A secret in a URL is valid for notifications only.
        is_unclear = not kind and raw.method == "POST" and (raw.body != b"" or sender.scheme == "url")
        if kind == "notification" or is_unclear:
            channel, result = await self._store(raw, sender, callback), STORED
        else:
            channel = await offload(len(raw.body), _channel_of_call, raw, sender, callback)
            check_possible(channel)
        shown = self._note(raw.callback, channel, sender, result)
        return AcceptedCall(result, shown, may_be_hook=kind == "hook" or is_unclear)

    async def _store(self, raw: RawCallback, sender: Sender, callback: Callback | None) -> Channel:
        """Store an order as a notification that no route wants. Return its channel."""
        callback_or_new = callback or Callback(name=raw.callback, kind="notification")
        notification, _ = await parse_notification(raw, sender, callback_or_new, EVERY_CHANNEL, self._clock())
        channel = notification.channel
        check_possible(channel)
        if callback is not None and channel in self._names.known.channels:
            self._note(raw.callback, channel, sender, NOT_FOUND)
            raise channel_not_found()
        if sender.scheme == "url" and channel.merchant not in self._merchants:
            raise channel_not_found()  # such a secret is weak, and opens no more than the configured merchants
        await self._intake.store(notification)
        return channel

    def _note(self, callback: str, channel: Channel | None, sender: Sender, result: str) -> Channel:
        """Count a call, and warn of it at most once a minute. Return the channel to show.

        Names that the ledger knows, or that we signed, were ours. Any other is a caller's text: it is shown as unknown,
        and its calls are not remembered.
        """
        known, is_signed = self._names.known, sender.channel is not None
        labels = (
            callback if callback in known.callbacks else UNKNOWN,
            *(channel if channel is not None and channel in known.channels else UNKNOWN_CHANNEL),
        )
        if channel is not None and (is_signed or UNKNOWN not in labels):
            self._uses.record(callback, channel, sender.url_key)
        self._metrics.calls_to_gone_names.labels(*labels, result).inc()
        shown, *shown_channel = (callback, *channel) if is_signed and channel is not None else labels
        merchant, name = shown_channel
        if (count := self._warnings.count((*labels, result))) is not None:
            log.warning("gone_name_called", callback=shown, merchant=merchant, channel=name, result=result,
                        count=count)  # fmt: skip
        return Channel(merchant, name)


def _channel_of_call(raw: RawCallback, sender: Sender, callback: Callback | None) -> Channel:
    """Return the channel of a hook or validation, from the body only if nothing else names it."""
    called = callback or Callback(name=raw.callback, kind="validation")
    try:
        return parse_validation(raw, sender, called, EVERY_CHANNEL).channel
    except BadRequest:
        if not raw.body:
            raise
        return parse_hook(raw, sender, called, EVERY_CHANNEL).channel
