"""
Who is calling: a keyed signature in the URL, or a shared secret in a header or in the query.

A registered URL is not secret, since the shopper's browser sees the order it stands on (Norce's public reference
front end loads it). So a signature opens one callback for one order and nothing else. Every candidate is tried and
compared as bytes in constant time; a refusal is the same for every reason, which is in the log and in the metric.
"""

import hashlib
import hmac
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode

import msgspec

from adapter.config import SendersConfig
from adapter.identifiers import Channel


class Unauthenticated(Exception):
    """The caller did not show that it may call. `reason` is for the log, never for the caller."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RawCallback(msgspec.Struct, frozen=True, kw_only=True):
    """
    A request that nobody has vouched for: the path's decoded parts, the query, the headers, the body's bytes.

    A struct, as is all that is made anew for each request here: a frozen dataclass takes eight times as long to make.
    """

    method: str
    order_id: str
    callback: str
    query: Mapping[str, tuple[str, ...]]
    headers: Mapping[str, str]
    body: bytes

    def once(self, parameter: str) -> str | None:
        """A query parameter that stands there exactly once."""
        values = self.query.get(parameter, ())
        return values[0] if len(values) == 1 else None


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """
    Somebody who may call. `channel` is set where the signature covers it; `merchants` are those that
    the secret is good for, None for all.
    """

    scheme: str
    key: str
    channel: Channel | None = None
    merchants: frozenset[str] | None = None
    source: str = "callback"

    def may_speak_for(self, merchant: str) -> bool:
        return self.merchants is None or merchant in self.merchants


def reconciled(channel: Channel) -> Sender:
    """The sender of what reconciliation reads from Norce."""
    return Sender(scheme="reconciliation", key="", channel=channel, source="reconciliation")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Secrets:
    scheme: str
    name: str
    digests: tuple[bytes, ...]
    merchants: frozenset[str] | None


def signature(key: bytes, channel: Channel, order_id: str, callback: str) -> str:
    """
    The `sig` of a callback URL: unpadded base64url of HMAC-SHA256 over `["v1", *channel, order_id, callback]`
    as compact UTF-8 JSON.
    """
    return _signature(hmac.new(key, digestmod="sha256"), channel, order_id, callback)


def _signature(keyed: hmac.HMAC, channel: Channel, order_id: str, callback: str) -> str:
    keyed = keyed.copy()
    keyed.update(msgspec.json.encode(["v1", *channel, order_id, callback]))
    return urlsafe_b64encode(keyed.digest()).rstrip(b"=").decode()


class Senders:
    """Everybody who may call, from the configuration."""

    def __init__(self, config: SendersConfig) -> None:
        keys = config.signed_urls.keys if config.signed_urls else {}
        # Keyed once and copied for each request.
        self._keys = {name: hmac.new(secret.reveal().encode(), digestmod="sha256") for name, secret in keys.items()}
        self._secrets = [
            *(
                _secrets("header", each.header.lower(), (v.reveal() for v in each.values), each.merchants)
                for each in config.header_secrets
            ),
            *(
                _secrets("url", each.parameter, (v.reveal() for v in each.values), each.merchants)
                for each in config.url_secrets
            ),
        ]

    @property
    def headers(self) -> tuple[str, ...]:
        """The headers that secrets stand in, in lower case."""
        return tuple(each.name for each in self._secrets if each.scheme == "header")

    @property
    def known(self) -> Iterable[tuple[str, str]]:
        """Scheme and name of every key and secret, as a `Sender` has them."""
        yield from (("signed_url", name) for name in self._keys)
        for each in self._secrets:
            yield from ((each.scheme, f"{each.name}-{number}") for number, _ in enumerate(each.digests, 1))

    def identify(self, raw: RawCallback) -> Sender:
        """The sender of a request. Raises `Unauthenticated`."""
        if "sig" in raw.query:
            return self._signed(raw)
        found: Sender | None = None
        for secrets in self._secrets:
            shown = raw.headers.get(secrets.name) if secrets.scheme == "header" else raw.once(secrets.name)
            digest = _digest(shown or "")
            for number, known in enumerate(secrets.digests):
                if hmac.compare_digest(digest, known) and found is None:
                    key = f"{secrets.name}-{number + 1}"
                    found = Sender(scheme=secrets.scheme, key=key, merchants=secrets.merchants)
        if found is None:
            raise Unauthenticated("no valid secret")
        return found

    def signed_url(self, public_url: str, channel: Channel, order_id: str, callback: str) -> str:
        """A callback URL signed with the first key. Raises `LookupError` where no key is configured."""
        return self.signed_urls(public_url, channel, order_id, callback)[0]

    def signed_urls(self, public_url: str, channel: Channel, order_id: str, callback: str) -> list[str]:
        """The same by every key that is good: the first to be registered, the others as they may be still."""
        if not self._keys:
            raise LookupError("senders.signed_urls.keys names no key to sign with")
        path = f"{public_url.rstrip('/')}/api/v1/callbacks/orders/{quote(order_id, safe='')}/{quote(callback, safe='')}"
        whose = {"merchant": channel.merchant, "channel": channel.name}
        return [
            f"{path}?{urlencode({**whose, 'key': name, 'sig': _signature(key, channel, order_id, callback)})}"
            for name, key in self._keys.items()
        ]

    def _signed(self, raw: RawCallback) -> Sender:
        shown, name = raw.once("sig"), raw.once("key")
        merchant, name_of_channel = raw.once("merchant"), raw.once("channel")
        key = self._keys.get(name or "")
        if shown is None or merchant is None or name_of_channel is None or key is None:
            raise Unauthenticated("incomplete signature, or unknown key")
        channel = Channel(merchant, name_of_channel)
        expected = _signature(key, channel, raw.order_id, raw.callback)
        if not hmac.compare_digest(shown.encode(), expected.encode()):
            raise Unauthenticated("wrong signature")
        return Sender(scheme="signed_url", key=name or "", channel=channel)


def _secrets(scheme: str, name: str, values: Iterable[str], merchants: Iterable[str] | None) -> _Secrets:
    bound = None if merchants is None else frozenset(merchants)
    return _Secrets(scheme=scheme, name=name, digests=tuple(map(_digest, values)), merchants=bound)


def _digest(value: str) -> bytes:
    # Digests have one length: a comparison then tells nothing about the length of the secret either.
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).digest()
