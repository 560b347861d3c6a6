"""
Puts our callbacks on an order, and takes them off: as often as one likes, with the same end.

An order is read, and what it has of ours is compared with what it should have, callback by callback; what is missing is
added first, then what is stale goes. Nobody else's are touched. What one would get wrong: Norce answers an addition
without an id and documents no concurrency control. So of one order here one is at it at a time. Two processes may both
add; the next finds it twice and takes one away. Until then identity makes one of two notifications, but a hook that is
there twice is asked twice, and may patch twice.

Facts: checkout protocol, sections 4, 5.1, 5.2 and 8.2. A URL is literal and signed: it opens that callback for that
order and nothing else.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

from adapter.callbacks.senders import Senders
from adapter.config import (
    CallbackConfig,
    Config,
    HookCallbackConfig,
    NotificationCallbackConfig,
    UrlSecretConfig,
    ValidationCallbackConfig,
)
from adapter.identifiers import Channel
from adapter.norce.api import V0
from adapter.norce.client import Norce, NorceRejected

# What they are called on an order, and the operations that add one and take one away, with the name of its id.
PLACES = {
    "validation": ("validations", "add_validation", "remove_validation", "validation_id"),
    "hook": ("hooks", "add_hook", "remove_hook", "hook_id"),
    "notification": ("notifications", "add_notification", "remove_notification", "notification_id"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """
    A callback of ours as it is to be on an order: the body that Norce is sent, and every address that is as good as the
    one in it.
    """

    callback: str
    kind: str
    body: Mapping[str, Any]
    addresses: frozenset[str]

    @property
    def operation(self) -> str:
        """The operation that adds it."""
        return PLACES[self.kind][1]

    def is_met_by(self, stored: Mapping[str, Any]) -> bool:
        """Whether what is on the order does the same. What Norce does not show is taken as sent."""
        rest = {name: value for name, value in self.body.items() if name not in ("invoke", "url")}
        same = all(stored.get(name) in (None, value) for name, value in rest.items())
        return same and _address(stored) in self.addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """What became of our callbacks on an order, by their names; of what was removed and is none any more, its id."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


class Registrar:
    """Registers the configured callbacks. Raises `norce.client.NorceError`, and `LookupError` without a signing key."""

    def __init__(self, config: Config, norce: Norce) -> None:
        self._config = config
        self._senders = Senders(config.senders)
        self._norce = norce
        self._orders = WeakValueDictionary[tuple[str, str], asyncio.Lock]()  # those that somebody is at

    async def register(self, channel: Channel, order_id: str) -> Registered:
        """
        Adds what is missing, and removes what is stale, doubled or signed with a key that is not good any more. What
        Norce refuses is raised when all others are there, and before anything is removed.
        """
        async with self._alone(channel.merchant, order_id):
            return await self._register(channel, order_id)

    async def _register(self, channel: Channel, order_id: str) -> Registered:
        wanted = list(registrations(self._config, self._senders, channel, order_id))
        stored = await self._ours(channel, order_id)
        kept: dict[str, tuple[str, Any]] = {}  # the kind and id of each that stays, by its callback
        for each in wanted:
            meeting = ((kind, entry["id"]) for kind, entry in stored if kind == each.kind and each.is_met_by(entry))
            if (stays := next(meeting, None)) is not None:
                kept[each.callback] = stays
        missing = [each for each in wanted if each.callback not in kept]
        refused: NorceRejected | None = None
        for each in missing:
            try:
                await self._norce.call(channel, each.operation, body=each.body, path={"order_id": order_id})
            except NorceRejected as error:  # of a scope that Norce does not watch, say: it costs the others nothing
                refused = refused or error
        if refused is not None:
            raise refused
        stale = [(kind, entry) for kind, entry in stored if (kind, entry["id"]) not in kept.values()]
        await self._remove(channel, order_id, stale)
        return Registered(
            added=tuple(sorted(each.callback for each in missing)),
            removed=self._names(stale),
            kept=tuple(sorted(kept)),
        )

    async def deregister(self, channel: Channel, order_id: str) -> Registered:
        """Removes all that are ours, whatever they are."""
        async with self._alone(channel.merchant, order_id):
            stored = await self._ours(channel, order_id)
            await self._remove(channel, order_id, stored)
        return Registered(removed=self._names(stored))

    def _alone(self, merchant: str, order_id: str) -> asyncio.Lock:
        return self._orders.setdefault((merchant, order_id), asyncio.Lock())

    async def _ours(self, channel: Channel, order_id: str) -> list[tuple[str, Mapping[str, Any]]]:
        """What the order has of ours, each with its kind."""
        order = await self._norce.order(channel, order_id)
        return [
            (kind, entry)
            for kind, (place, *_) in PLACES.items()
            for entry in order.data.get(place) or ()
            if isinstance(entry, Mapping) and entry.get("adapterId") == self._config.adapter.id and entry.get("id")
        ]

    async def _remove(self, channel: Channel, order_id: str, entries: list[tuple[str, Mapping[str, Any]]]) -> None:
        for kind, entry in entries:
            _, _, operation, parameter = PLACES[kind]
            path = {"order_id": order_id, parameter: str(entry["id"])}
            try:
                await self._norce.call(channel, operation, path=path)
            except NorceRejected:  # with 400 or 404: somebody else may have taken it away meanwhile
                left = await self._ours(channel, order_id)
                if any(each == kind and there["id"] == entry["id"] for each, there in left):
                    raise

    def _names(self, entries: list[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
        return tuple(sorted(self._name(entry) for _, entry in entries))

    def _name(self, entry: Mapping[str, Any]) -> str:
        name = unquote(_address(entry).partition("?")[0].rpartition("/")[2])
        return name if name in self._config.callbacks else str(entry["id"])


def registrations(
    config: Config, senders: Senders, channel: Channel, order_id: str, *, public_url: str | None = None
) -> Iterator[Registration]:
    """
    Every configured callback as it is to be on this order, in the words of the configured version of the Order API.

    Raises `LookupError` where no key is configured to sign with.
    """
    base = public_url or str(config.adapter.public_url)
    for name, callback in config.callbacks.items():
        signed = senders.signed_urls(base, channel, order_id, name)
        body = _body(config, name, callback, signed[0])
        standing = [static_url(config, channel.merchant, name)] if callback.kind == "notification" else []
        addresses = frozenset((*signed, *filter(None, standing)))
        yield Registration(callback=name, kind=callback.kind, body=body, addresses=addresses)


def static_notifications(config: Config, merchant: str) -> list[dict[str, Any]]:
    """
    The notifications that a channel's configuration adds to every new order. Their address is a template of Norce's, so
    it carries the secret of its own that our document names, in place of a signature.

    Raises `LookupError` where `senders.url_secrets` has none for this merchant alone.
    """
    found = []
    for name, callback in config.callbacks.items():
        if isinstance(callback, NotificationCallbackConfig):
            static_secret(config, merchant)
            found.append(_body(config, name, callback, str(static_url(config, merchant, name))))
    return found


def static_url(config: Config, merchant: str, callback: str) -> str | None:
    """The template of a static registration; None where no secret is configured for it."""
    given = _static(config, merchant)
    if given is None:
        return None
    path = f"/api/v1/callbacks/orders/{{order.id}}/{quote(callback, safe='')}"
    return f"{{configuration.adapter.internalUrl}}{path}?{given.parameter}={{configuration.callbacks.secret}}"


def static_secret(config: Config, merchant: str) -> str:
    """
    The value that our document holds for it: the first that is accepted, as it stands in a URL.

    Raises `LookupError` where there is none.
    """
    given = _static(config, merchant)
    if given is None:
        raise LookupError(f"senders.url_secrets has no secret that is good for merchant {merchant} alone")
    return quote(given.values[0].reveal(), safe="")


def _static(config: Config, merchant: str) -> UrlSecretConfig | None:
    # Whoever has the merchant's token reads it, and a shopper's browser may: it must not speak for another merchant.
    good = (each for each in config.senders.url_secrets if set(each.merchants or config.merchants) == {merchant})
    return next(good, None)


def _body(config: Config, name: str, callback: CallbackConfig, url: str) -> dict[str, Any]:
    is_v0 = config.norce.version == V0
    whose = {"adapterId": config.adapter.id}
    named = {"reference": name, "description": f"{callback.kind} {name} of {config.adapter.id}"}
    match callback:
        case ValidationCallbackConfig():
            return {**whose, "url": url} if is_v0 else {**whose, **named, "invoke": url}
        case HookCallbackConfig():
            parts = {"subscribeTo" if is_v0 else "scope": callback.watch}
            if callback.target is not None:
                parts["target"] = callback.target
            return {**whose, **({} if is_v0 else named), **parts, "invoke": url, "version": callback.version}
        case NotificationCallbackConfig():
            condition = {"scope": callback.scope, "schema": callback.schema}
            return {**whose, **named, **condition, "invoke": url, "version": V0}
    raise AssertionError(callback)


def _address(stored: Mapping[str, Any]) -> str:
    return str(stored.get("invoke") or stored.get("url") or "")
