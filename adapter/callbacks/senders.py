"""Identifies the senders of callbacks, by a signature in the URL or by a secret.

A secret is in a header or in the query. A signed URL is no secret: the shopper's browser sees the order that it stands
on (Norce's public reference front end loads it). So a signature is valid for one callback of one order. All secrets are
tried, and compared as bytes in constant time. The caller gets the same refusal for every reason; log and metric have
the reason.
"""

import hashlib
import hmac
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from urllib.parse import quote, urlencode

import msgspec

from adapter.config.model import SendersConfig
from adapter.identifiers import Channel


class Unauthenticated(Exception):
    """The caller did not prove that it may call. Log the `reason`, never send it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RawCallback(msgspec.Struct, frozen=True, kw_only=True):
    """An unverified request: the decoded parts of its path, its query, headers and body.

    The body is empty until the sender is identified. No sender's proof covers the body.

    Values that are made for each request are structs: a frozen dataclass takes eight times as long to make.
    """

    method: str
    order_id: str
    callback: str
    query: Mapping[str, tuple[str, ...]]
    headers: Mapping[str, str]
    body: bytes = b""
    received_at: float = msgspec.field(default_factory=time.monotonic)  # when its first byte came

    def once(self, parameter: str) -> str | None:
        """Return the value of a query parameter, or None if it is absent or repeated."""
        values = self.query.get(parameter, ())
        return values[0] if len(values) == 1 else None


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """A caller who may call. Only `Senders.identify` and `reconciled` make one."""

    scheme: str  # signed_url, header, url or reconciliation
    key: str  # the name of the key or secret
    channel: Channel | None = None  # of a signature, which covers it
    merchants: frozenset[str] | None = None  # whose callbacks a secret is valid for; None for all
    source: str = "callback"  # of its notifications: callback, reconciliation or orders

    @property
    def url_key(self) -> str:
        """The URL key that verified the call, or an empty text."""
        return self.key if self.scheme == "signed_url" else ""

    def may_speak_for(self, merchant: str) -> bool:
        return self.merchants is None or merchant in self.merchants


def reconciled(channel: Channel, source: str = "reconciliation") -> Sender:
    """Return the sender of notifications that reconciliation reads from Norce.

    `source` is reconciliation, for the event log, or orders.
    """
    return Sender(scheme="reconciliation", key="", channel=channel, source=source)


def sign(keyed: hmac.HMAC, channel: Channel, order_id: str, callback: str) -> str:
    """Return the `sig` of a callback URL.

    It is the unpadded base64url of the HMAC-SHA256 of `["v1", merchant, channel, order_id, callback]` as compact UTF-8
    JSON. `keyed` holds the key and nothing else; it stays unchanged.
    """
    keyed = keyed.copy()
    keyed.update(msgspec.json.encode(["v1", *channel, order_id, callback]))
    return urlsafe_b64encode(keyed.digest()).rstrip(b"=").decode()


class Senders:
    """The callers that the configuration accepts."""

    def __init__(self, config: SendersConfig) -> None:
        keys = config.signed_urls.keys if config.signed_urls else {}
        self._keys = {name: hmac.new(secret.reveal().encode(), digestmod="sha256") for name, secret in keys.items()}
        headers = [("header", each.header.lower(), each) for each in config.header_secrets]
        urls = [("url", each.parameter, each) for each in config.url_secrets]
        self._secrets = [
            _Secrets(
                scheme=scheme,
                name=name,
                digests=tuple(_digest(value.reveal()) for value in given.values),
                merchants=None if given.merchants is None else frozenset(given.merchants),
            )
            for scheme, name, given in (*headers, *urls)
        ]

    @property
    def headers(self) -> tuple[str, ...]:
        """The names of the headers that may hold a secret, in lower case."""
        return tuple(each.name for each in self._secrets if each.scheme == "header")

    @property
    def known(self) -> Iterable[tuple[str, str]]:
        """The scheme and key of every `Sender` that `identify` may return."""
        yield from (("signed_url", name) for name in self._keys)
        for each in self._secrets:
            yield from ((each.scheme, f"{each.name}-{number}") for number, _ in enumerate(each.digests, 1))

    def identify(self, raw: RawCallback) -> Sender:
        """Return the sender of a request, by its address and headers. Raises `Unauthenticated`."""
        if "sig" in raw.query:
            return self._signed(raw)
        found: Sender | None = None
        for secrets in self._secrets:
            shown = raw.headers.get(secrets.name) if secrets.scheme == "header" else raw.once(secrets.name)
            digest = _digest(shown or "")
            for number, known in enumerate(secrets.digests, 1):
                if hmac.compare_digest(digest, known) and found is None:
                    key = f"{secrets.name}-{number}"
                    found = Sender(scheme=secrets.scheme, key=key, merchants=secrets.merchants)
        if found is None:
            raise Unauthenticated("no valid secret")
        return found

    def signed_url(self, public_url: str, channel: Channel, order_id: str, callback: str) -> str:
        """Return a URL signed with the first key. Raises `LookupError` without a key."""
        return self.signed_urls(public_url, channel, order_id, callback)[0]

    def signed_urls(self, public_url: str, channel: Channel, order_id: str, callback: str) -> list[str]:
        """Return the valid URLs of a callback, one for each key. The first is the one to register."""
        if not self._keys:
            raise LookupError("senders.signed_urls.keys names no key to sign with")
        path = f"{public_url.rstrip('/')}/api/v1/callbacks/orders/{quote(order_id, safe='')}/{quote(callback, safe='')}"
        named = {"merchant": channel.merchant, "channel": channel.name}
        return [
            f"{path}?{urlencode({**named, 'key': name, 'sig': sign(key, channel, order_id, callback)})}"
            for name, key in self._keys.items()
        ]

    def _signed(self, raw: RawCallback) -> Sender:
        shown, key_name, merchant, channel_name = map(raw.once, ("sig", "key", "merchant", "channel"))
        key = self._keys.get(key_name or "")
        if shown is None or merchant is None or channel_name is None or key is None:
            raise Unauthenticated("incomplete signature, or unknown key")
        channel = Channel(merchant, channel_name)
        if not hmac.compare_digest(shown.encode(), sign(key, channel, raw.order_id, raw.callback).encode()):
            raise Unauthenticated("wrong signature")
        return Sender(scheme="signed_url", key=key_name or "", channel=channel)


class _Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """The secrets that one header or query parameter may hold."""

    scheme: str
    name: str
    digests: tuple[bytes, ...]
    merchants: frozenset[str] | None


def _digest(value: str) -> bytes:
    # Digests have one length, so the time of a comparison does not depend on the length of the secret.
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).digest()
