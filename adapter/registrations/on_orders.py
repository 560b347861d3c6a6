"""Registration of our callbacks on one order, and their removal.

Both may be repeated. An order's callbacks are compared with the configuration, one by one. Missing ones are added
first, then stale ones are removed. Callbacks of other adapters are left alone.

Norce returns no id for an addition and documents no concurrency control. So this process handles one order once at a
time. Two processes may both add a callback; the next call finds it twice and removes one. Until then, identity makes
one of two notifications, but a hook that is registered twice is called twice and may patch twice.

Facts: checkout protocol, sections 4, 5.1, 5.2 and 8.2. A callback URL is literal and signed: it is valid for one
callback of one order.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.config.model import (
    CallbackConfig,
    HookCallbackConfig,
    NotificationCallbackConfig,
    UrlSecretConfig,
    ValidationCallbackConfig,
)
from adapter.identifiers import Channel
from adapter.norce.api import V0
from adapter.norce.client import Norce, NorceError, NorceRefused, NorceRejected, OrderNotFound

# By kind: the member of an order, the operations that add and remove one, and the path parameter of its id.
PLACES = {
    "validation": ("validations", "add_validation", "remove_validation", "validation_id"),
    "hook": ("hooks", "add_hook", "remove_hook", "hook_id"),
    "notification": ("notifications", "add_notification", "remove_notification", "notification_id"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """One of our callbacks as it should be on an order."""

    callback: str
    kind: str
    body: Mapping[str, Any]
    addresses: frozenset[str]  # equally good ones: signed with any valid key, or static

    @property
    def operation(self) -> str:
        """The operation that adds it."""
        return PLACES[self.kind][1]

    def is_met_by(self, stored: Mapping[str, Any]) -> bool:
        """Tell whether a callback on the order is the same. Omitted members count as equal."""
        rest = {name: value for name, value in self.body.items() if name not in ("invoke", "url")}
        same = all(stored.get(name) in (None, value) for name, value in rest.items())
        return same and _address(stored) in self.addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One of our callbacks as Norce has it on an order."""

    kind: str
    entry: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, Any]:
        """The kind and the id."""
        return self.kind, self.entry["id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """The names of our callbacks on an order, by what was done with them."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()  # an id, if the callback is no longer configured
    kept: tuple[str, ...] = ()


class CallbacksRejected(NorceRejected):
    """Norce rejects some of our callbacks on an order.

    The message names each with Norce's answer. `rejected` has the errors by name, and `done` the callbacks that were
    handled all the same.
    """

    def __init__(self, rejected: Mapping[str, NorceError], done: Registered) -> None:
        self.rejected = rejected
        self.done = done
        super().__init__("; ".join(f"{name}: {error}" for name, error in rejected.items()))
        first = next(iter(rejected.values()))
        self.code, self.host, self.status = first.code, first.host, first.status


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference between an order's callbacks of ours and the configuration."""

    missing: tuple[Registration, ...] = ()
    stale: tuple[Stored, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """True if nothing is left to do."""
        return not self.missing and not self.stale


class Registrar:
    """Registers the configured callbacks on orders.

    Raises `NorceError`, and `LookupError` if no key to sign with is configured.
    """

    def __init__(self, config: Config, norce: Norce) -> None:
        self._config = config
        self._senders = Senders(config.senders)
        self._norce = norce
        self._locks = WeakValueDictionary[tuple[str, str], asyncio.Lock]()  # by merchant and order id

    def compare(
        self, channel: Channel, order_id: str, order: Mapping[str, Any], *, removes: bool = False
    ) -> Comparison:
        """Compare the callbacks on an order with the configuration.

        With `removes`, all of them are stale.
        """
        stored = stored_on(order, self._config.adapter.id)
        if removes:
            return Comparison(stale=tuple(stored))
        wanted = list(registrations(self._config, self._senders, channel, order_id))
        kept: dict[str, tuple[str, Any]] = {}  # the key of each that stays, by its callback
        for each in wanted:
            meeting = (one.key for one in stored if one.kind == each.kind and each.is_met_by(one.entry))
            if (key := next(meeting, None)) is not None:
                kept[each.callback] = key
        return Comparison(
            missing=tuple(each for each in wanted if each.callback not in kept),
            stale=tuple(each for each in stored if each.key not in kept.values()),
            kept=tuple(sorted(kept)),
        )

    def names(self, found: Comparison) -> Registered:
        """Return the names of the callbacks in a comparison."""
        return Registered(
            added=tuple(sorted(each.callback for each in found.missing)),
            removed=tuple(sorted(self._name(each.entry) for each in found.stale)),
            kept=found.kept,
        )

    async def register(self, channel: Channel, order_id: str) -> Registered:
        """Add missing callbacks, and remove stale and doubled ones.

        A callback that is signed with a key that is no longer valid is stale.

        Raises:
            CallbacksRejected: Norce rejects some callbacks. If it rejects one to add, nothing was removed.
            NorceError: Norce does not answer, or has no such order.
        """
        return await self._apply(channel, order_id, removes=False)

    async def deregister(self, channel: Channel, order_id: str) -> Registered:
        """Remove all our callbacks, configured or not. Raises as `register` does."""
        return await self._apply(channel, order_id, removes=True)

    async def _apply(self, channel: Channel, order_id: str, *, removes: bool) -> Registered:
        async with self._lock(channel, order_id):
            order = await self._norce.order(channel, order_id)
            found = self.compare(channel, order_id, order.data, removes=removes)
            rejected = await self._add_callbacks(channel, order_id, found.missing)
            stale = () if rejected else found.stale
            left = await self._remove(channel, order_id, stale)
        removed = tuple(each for each in stale if each.key not in left)
        added = tuple(each for each in found.missing if each.callback not in rejected)
        done = self.names(Comparison(missing=added, stale=removed, kept=found.kept))
        rejected |= {self._name(each.entry): left[each.key] for each in stale if each.key in left}
        if rejected:
            raise CallbacksRejected(rejected, done)
        return done

    async def _add_callbacks(
        self, channel: Channel, order_id: str, missing: Sequence[Registration]
    ) -> dict[str, NorceError]:
        """Add callbacks, and return the errors of those that Norce rejects by their names."""
        rejected: dict[str, NorceError] = {}
        for each in missing:
            try:
                await self._norce.call(channel, each.operation, body=each.body, path={"order_id": order_id})
            except OrderNotFound:  # deleted meanwhile
                raise
            # For example a scope that Norce does not watch. Norce has just taken the token, so a 403 is about this one.
            except (NorceRejected, NorceRefused) as error:
                rejected[each.callback] = error
        return rejected

    def _lock(self, channel: Channel, order_id: str) -> asyncio.Lock:
        return self._locks.setdefault((channel.merchant, order_id), asyncio.Lock())

    async def _remove(
        self, channel: Channel, order_id: str, stale: Sequence[Stored]
    ) -> dict[tuple[str, Any], NorceError]:
        """Remove callbacks, and return the errors of those that Norce leaves by their keys."""
        rejected: dict[tuple[str, Any], NorceError] = {}
        for each in stale:
            _, _, operation, parameter = PLACES[each.kind]
            path = {"order_id": order_id, parameter: str(each.entry["id"])}
            try:
                await self._norce.call(channel, operation, path=path)
            except (NorceRejected, NorceRefused) as error:
                rejected[each.key] = error
        if rejected:  # 400 or 404: perhaps they have been removed meanwhile
            order = await self._norce.order(channel, order_id)
            left = [each.key for each in stored_on(order.data, self._config.adapter.id)]
            rejected = {key: error for key, error in rejected.items() if key in left}
        return rejected

    def _name(self, entry: Mapping[str, Any]) -> str:
        name = callback_name(entry)
        return name if name in self._config.callbacks else str(entry["id"])


def stored_on(order: Mapping[str, Any], adapter_id: str) -> list[Stored]:
    """Return the callbacks of an adapter that Norce has on an order.

    Args:
        order: The order as plain JSON.
        adapter_id: The id of the adapter.
    """
    return [
        Stored(kind=kind, entry=entry)
        for kind, (place, *_) in PLACES.items()
        for entry in order.get(place) or ()
        if isinstance(entry, Mapping) and entry.get("adapterId") == adapter_id and entry.get("id")
    ]


def callback_name(stored: Mapping[str, Any]) -> str:
    """Return the name in the address of a callback on an order."""
    return unquote(_address(stored).partition("?")[0].rpartition("/")[2])


def registrations(
    config: Config, senders: Senders, channel: Channel, order_id: str, *, public_url: str | None = None
) -> Iterator[Registration]:
    """Yield every configured callback as it should be on this order.

    Raises `LookupError` if no key to sign with is configured.
    """
    base = public_url or str(config.adapter.public_url)
    for name, callback in config.callbacks.items():
        signed = senders.signed_urls(base, channel, order_id, name)
        static = static_url(config, channel.merchant, name) if callback.kind == "notification" else None
        yield Registration(
            callback=name,
            kind=callback.kind,
            body=registration_body(config, name, callback, signed[0]),
            addresses=frozenset(signed if static is None else (*signed, static)),
        )


def static_url(config: Config, merchant: str, callback: str) -> str | None:
    """Return the URL template of a static notification, or None without a secret for it."""
    secret = url_secret(config, merchant)
    if secret is None:
        return None
    path = f"/api/v1/callbacks/orders/{{order.id}}/{quote(callback, safe='')}"
    return f"{{configuration.adapter.internalUrl}}{path}?{secret.parameter}={{configuration.callbacks.secret}}"


def url_secret(config: Config, merchant: str) -> UrlSecretConfig | None:
    """Return the URL secret that is good for this merchant alone, or None.

    Everybody with the merchant's token can read it, and perhaps a shopper's browser. So it must not be good for another
    merchant.
    """
    good = (each for each in config.senders.url_secrets if set(each.merchants or config.merchants) == {merchant})
    return next(good, None)


def registration_body(config: Config, name: str, callback: CallbackConfig, url: str) -> dict[str, Any]:
    """Return the body that registers a callback, in the configured version of the Order API."""
    is_v0 = config.norce.version == V0
    adapter = {"adapterId": config.adapter.id}
    named = {"reference": name, "description": f"{callback.kind} {name} of {config.adapter.id}"}
    match callback:
        case ValidationCallbackConfig():
            return {**adapter, "url": url} if is_v0 else {**adapter, **named, "invoke": url}
        case HookCallbackConfig():
            parts = {"subscribeTo" if is_v0 else "scope": callback.watch}
            if callback.target is not None:
                parts["target"] = callback.target
            return {**adapter, **({} if is_v0 else named), **parts, "invoke": url, "version": callback.version}
        case NotificationCallbackConfig():
            condition = {"scope": callback.scope, "schema": callback.schema}
            return {**adapter, **named, **condition, "invoke": url, "version": V0}
    raise AssertionError(callback)


def _address(stored: Mapping[str, Any]) -> str:
    return str(stored.get("invoke") or stored.get("url") or "")
