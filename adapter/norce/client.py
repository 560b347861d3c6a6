"""
Norce's APIs in our words, for all merchants: any operation of `norce.operations` by its name, and what we ask most.

Errors are Norce's facts, not outcomes: a validation turns `OrderNotFound` into a 404, a delivery into a dead letter.
What one would get wrong: a change that was not answered may have been made (`NorceUnclear`), and is never sent again
from here. A read that was not answered is; and so is whatever could not even be connected.

Facts: checkout protocol, sections 1.2, 1.3, 4, 8.4 and 9. A client belongs to one event loop.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import httpx
import msgspec

from adapter.identifiers import Channel
from adapter.norce.api import ADAPTER_ID, AUTHORIZATION, BY_NAME, CHANNEL, MERCHANT, V0, Operation
from adapter.orders import NotAnOrder, Order, decode, order_in, read_order
from adapter.outgoing import connections, retry_after
from adapter.plugin import Misconfigured, Outcome, Reject, Retry, Secret, Unknown

LARGEST_ORDER_BYTES = 4 * 1024 * 1024  # and whatever else is not a list
LARGEST_ANSWER_BYTES = 64 * 1024 * 1024  # a page of a hundred orders
# Of one merchant, so that one whose Norce is silent takes nobody else's place. Not left to the client's own pool: that
# looks at every request that waits whenever one ends, and kept the event loop for 15 s while 300 of them waited.
MOST_READS_AT_ONCE = 64
MOST_PAGES = 100_000
# Nothing went out, whatever was to be done.
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
REPEATABLE = frozenset({"GET", "PUT", "PATCH", "DELETE"})  # here all of them say how something is to be

_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# The escape of half a character (RFC 8259, section 8.2), where no backslash is escaped.
_HALF = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
T = TypeVar("T")
Used = Callable[[str, int, int], None]  # merchant, number of the token (from 1), status


class NorceError(Exception):
    """What came of a request that was not done. `code` is Norce's own for it, where it gave one."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class NorceRejected(NorceError):
    """Norce will not do this (400, 409 and other 4xx), and says why with a `code`."""


class NotFound(NorceRejected):
    """Norce does not have what was asked for (404), or cannot have it: then it was not asked."""


class OrderNotFound(NotFound):
    """Norce has no such order (404)."""


class NorceRefused(NorceError):
    """Norce does not take this merchant's tokens (401, 403). Check `merchants.<merchant>.tokens`."""


class NorceUnavailable(NorceError):
    """Norce did not answer in time, or with an error, or with nonsense. `after`: it said when to come again."""

    def __init__(self, message: str, after: timedelta | None = None, code: str | None = None) -> None:
        super().__init__(message, code)
        self.after = after


class NorceTooLarge(NorceUnavailable):
    """An answer was broken off, for it went on beyond what such an answer has. A smaller page may help."""


class NorceUnclear(NorceUnavailable):
    """The same of a change that went out: it may have been made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A merchant at Norce: where its Checkout services are (`…/checkout`), and its tokens, tried in turn."""

    base_url: str
    tokens: tuple[Secret, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """
    A part of a list, which begins at `offset`. `count` is how many are on it: `items`, and those that could not be
    read. `total`: how many there are in all, where Norce said so.
    """

    offset: int
    items: list[T]
    count: int
    total: int | None


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An event record of the Notification API (section 8.4). `payload` is `{notification, order}`, untouched."""

    id: str
    created_at: datetime
    merchant: str
    channel: str
    order_id: str
    payload: msgspec.Raw
    adapter_id: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.created_at.tzinfo is None:  # "Times are ISO 8601, UTC" (section 2)
            msgspec.structs.force_setattr(self, "created_at", self.created_at.replace(tzinfo=UTC))


class _Pagination(msgspec.Struct, rename="camel"):
    total_size: int | None = None  # `size` is something else in each version, and is not looked at


class Norce:
    """
    A client for all merchants. `timeout` bounds a whole request; `version` is that of the Order API (v0 or v1). `used`
    hears which token was taken; `transport` is for tests.
    """

    def __init__(
        self,
        accounts: Mapping[str, Account],
        *,
        adapter_id: str,
        timeout: timedelta,
        version: str = V0,
        used: Used = lambda _merchant, _token, _status: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._accounts = accounts
        self._adapter_id = adapter_id
        self._timeout = timeout
        self._version = version
        self._used = used
        self._reading = {merchant: asyncio.Semaphore(MOST_READS_AT_ONCE) for merchant in accounts}
        self._client = httpx.AsyncClient(
            transport=transport or connections(),
            # One client for all merchants: what Norce sets for one is not shown for another, nor kept for each order.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            # So that an answer is as large as the bytes that are counted.
            headers={"accept-encoding": "identity"},
            trust_env=False,
            follow_redirects=False,
        )

    async def order(self, channel: Channel, order_id: str, *, within: timedelta | None = None) -> Order:
        """Return the order as Norce has it now, with its `data` decoded.

        Raises `OrderNotFound`, `NorceRefused`, `NorceUnavailable`.
        """
        return parse_order(await self.order_bytes(channel, order_id, within=within), order_id)

    async def order_bytes(self, channel: Channel, order_id: str, *, within: timedelta | None = None) -> bytes:
        """Return the bytes of an order, for a caller that calls `parse_order` on another thread.

        `within` shortens the configured timeout. Raises `OrderNotFound`, `NorceRefused`, `NorceUnavailable`.
        """
        try:
            return await self.call(channel, "read_order", within=within, path={"order_id": order_id})
        except NotFound as error:
            raise OrderNotFound("Norce has no such order", error.code) from error
        except NorceRejected as error:  # neither that it is there, nor that it is not
            raise NorceUnavailable(str(error), code=error.code) from error

    async def events(self, merchant: str, *, offset: int = 0, limit: int = 100, **filters: str) -> Page[Event]:
        """A page of our own adapter's events of a merchant, from all its channels. Raises `NorceError`."""
        asked = {"adapter_id": self._adapter_id, "offset": str(offset), "limit": str(limit), **filters}
        content = await self.call(Channel(merchant, ""), "list_events", query=asked)
        return _page(content, offset, Event)

    async def pages(self, channel: Channel, *, limit: int = 50, **filters: str) -> AsyncIterator[Page[dict[str, Any]]]:
        """
        The orders of a channel, page by page: until `totalSize` is reached or a page is empty, whatever `size` says.

        Raises `NorceError`.
        """
        offset = 0
        for _ in range(MOST_PAGES):
            asked = {**filters, "offset": str(offset), "limit": str(limit)}
            page = _page(await self.call(channel, "list_orders", query=asked), offset, dict[str, Any])
            if page.count:
                yield page
            offset += page.count
            if not page.count or (page.total is not None and offset >= page.total):
                return

    async def call(
        self,
        channel: Channel,
        name: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        path: Mapping[str, str] = MappingProxyType({}),
        within: timedelta | None = None,
    ) -> bytes:
        """
        What an operation of `norce.operations` answers, as bytes; empty where it has no body.

        Two tokens are tried in turn where one is refused. `path` are the other parameters in its path. An
        empty channel name is for what belongs to the merchant as a whole. Raises `NorceError`, and `KeyError` for an
        unknown operation.
        """
        operation = BY_NAME[name]
        account = self._accounts[channel.merchant]
        version = self._version if self._version in operation.versions else operation.versions[-1]
        parameters = {"merchant": channel.merchant, "channel": channel.name, **path}
        try:
            url = operation.url(account.base_url, version, **parameters)
        except ValueError as error:
            nothing = OrderNotFound if operation.service == "order" else NotFound
            raise nothing("Norce can have nothing of such an id") from error
        request = {
            "method": operation.method,
            "url": url,
            "params": query,
            "content": None if operation.body is None else msgspec.json.encode(body),
        }
        headers = {MERCHANT: channel.merchant, **({CHANNEL: channel.name} if channel.name else {})}
        if ADAPTER_ID in operation.optional_headers:
            headers[ADAPTER_ID] = self._adapter_id
        if operation.body is not None:
            headers["content-type"] = "application/json"
        most = LARGEST_ANSWER_BYTES if name.startswith("list_") else LARGEST_ORDER_BYTES
        seconds = min(within or self._timeout, self._timeout).total_seconds()
        sent = False
        try:
            async with asyncio.timeout(seconds), self._reading[channel.merchant]:
                for number, token in enumerate(account.tokens, 1):
                    headers[AUTHORIZATION] = f"Bearer {token.reveal()}"
                    sent = True
                    answer = await self._sent(request | {"headers": headers}, most)
                    self._used(channel.merchant, number, answer.status_code)
                    if answer.status_code not in (401, 403):
                        break
        except (httpx.HTTPError, TimeoutError) as error:
            went_out = sent and operation.method != "GET" and not isinstance(error, NEVER_SENT)
            kind = NorceUnclear if went_out else NorceUnavailable
            raise kind(f"no answer from Norce: {type(error).__name__}") from error
        except _TooLarge as error:
            kind = NorceTooLarge if operation.method == "GET" else NorceUnclear
            raise kind(f"Norce's answer is larger than {most // 2**20} MiB") from error
        return _content(answer, operation)

    async def _sent(self, request: dict[str, Any], most: int) -> httpx.Response:
        """Tried once more where nothing can have been done by the first try. Raises `httpx.HTTPError`, `_TooLarge`."""
        try:
            return await self._once(request, most)
        except httpx.TransportError as error:
            if request["method"] != "GET" and not isinstance(error, NEVER_SENT):
                raise
            return await self._once(request, most)

    async def _once(self, request: dict[str, Any], most: int) -> httpx.Response:
        """An answer that goes on beyond what anything of Norce's has is broken off, and counts as none."""
        async with self._client.stream(**request, timeout=self._timeout.total_seconds()) as answer:
            chunks, size = [], 0
            async for chunk in answer.aiter_bytes():
                size += len(chunk)
                if size > most:
                    raise _TooLarge
                chunks.append(chunk)
        return httpx.Response(answer.status_code, headers=_plain(answer.headers), content=b"".join(chunks))

    def base_url(self, merchant: str) -> str:
        """Where the merchant's Checkout services are."""
        return self._accounts[merchant].base_url

    def for_handlers(self, channel: Channel) -> "HandlerOrders":
        """The same as a handler sees it, through `context.orders`."""
        return HandlerOrders(self, channel)

    async def aclose(self) -> None:
        await self._client.aclose()


class HandlerOrders:
    """`adapter.plugin.Orders` for one merchant and channel: Norce's facts as outcomes."""

    def __init__(self, norce: Norce, channel: Channel) -> None:
        self._norce = norce
        self._channel = channel

    async def read(self, order_id: str) -> Order:
        return self.parse(await self.read_bytes(order_id), order_id)

    async def read_bytes(self, order_id: str) -> bytes:
        """Return the bytes of an order, for a caller that calls `parse` on another thread."""
        try:
            return await self._norce.order_bytes(self._channel, order_id)
        except NorceError as error:
            raise _outcome(error, "GET") from error

    def parse(self, content: bytes, order_id: str) -> Order:
        """Decode the bytes of an order completely. Raises `Retry` if they hold another order or none."""
        try:
            order = parse_order(content, order_id)
            return read_order(order.raw, order.data)
        except NorceUnavailable as error:
            raise _outcome(error, "GET") from error
        except NotAnOrder as error:
            raise Retry("norce-unavailable", "Norce's answer is nested too deeply") from error

    async def set_reference(self, order_id: str, reference: str) -> None:
        await self.call("put_reference", order_id, reference)

    async def set_attributes(self, order_id: str, attributes: Mapping[str, Any]) -> None:
        await self.call("patch_attributes", order_id, attributes)

    async def call(self, operation: str, order_id: str, body: Any = None, **path: str) -> Any:
        known = BY_NAME[operation]
        try:
            content = await self._norce.call(self._channel, operation, body=body, path={"order_id": order_id, **path})
            try:
                return _decoded(content, Any) if content else None
            except NorceUnavailable as error:
                if known.method == "GET":
                    raise
                if any(known.answers.values()):
                    raise NorceUnclear(str(error)) from error  # it was made, and must not be made again
                return None
        except NorceError as error:
            raise _outcome(error, known.method) from error


class _TooLarge(Exception):
    """More bytes than are read of such an answer."""


def parse_order(content: bytes, order_id: str) -> Order:
    """Decode the `data` of an order that Norce has answered. Raises `NorceUnavailable` if it is not this order.

    A page of a proxy, for example, is no order: no condition would hold on it, and the event would be lost.
    """
    try:
        data = order_in(decode(content))
    except NotAnOrder as error:
        raise NorceUnavailable("Norce's answer is no order") from error
    if data.get("id") != order_id:
        raise NorceUnavailable("Norce's answer is not this order")
    return Order(content, data)


def base_url(environment: str, slug: str) -> str:
    """Where a merchant's Checkout services are: `…/checkout`. Production has no environment segment."""
    segment = "" if environment == "production" else f"{environment}."
    return f"https://{slug}.api-se.{segment}norce.tech/checkout"


def _outcome(error: NorceError, method: str) -> Outcome:
    match error:
        case OrderNotFound():
            return Reject("order-not-found", "Norce has no such order")
        case NorceRejected():
            return Reject("norce-rejected", str(error))
        case NorceRefused():
            return Misconfigured("norce-unauthorized", str(error))
        case NorceUnclear() if method not in REPEATABLE:
            return Unknown("norce-unavailable", str(error))
        case NorceUnavailable(after=after):
            return Retry("norce-unavailable", str(error), after=after)
    raise AssertionError(error)


def _content(answer: httpx.Response, operation: Operation) -> bytes:
    status = answer.status_code
    if status in (401, 403):
        raise NorceRefused(f"Norce answered {status}: check the tokens of this merchant")
    if answer.is_success:
        return answer.content
    code = _code(answer)
    said = f"Norce answered {status}{'' if code is None else f', {code}'}"
    if status == 404:
        if not _is_norces(answer):
            raise NorceUnavailable(f"{said}, with what is not Norce's: a page of a proxy's, say")
        is_of_order = code == "order-not-found" or (code is None and operation.service == "order")
        raise (OrderNotFound if is_of_order else NotFound)(said, code)
    if status in (408, 425, 429) or status < 400:
        raise NorceUnavailable(said, retry_after(answer.headers.get("retry-after")), code)
    if status < 500:
        raise NorceRejected(said, code)
    kind = NorceUnavailable if operation.method == "GET" or status == 503 else NorceUnclear
    raise kind(said, retry_after(answer.headers.get("retry-after")), code)


def _is_norces(answer: httpx.Response) -> bool:
    """
    Whether Norce itself says that it has not got something: with no body, an error of its own or a problem (RFC 7807).
    A gateway whose Norce is away says 404 too, to whatever is asked, and every delivery would end as a dead letter.
    """
    if not answer.content:
        return True
    try:
        said = msgspec.json.decode(answer.content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(said, dict) and not {"code", "type", "title"}.isdisjoint(said)


def _plain(headers: httpx.Headers) -> list[tuple[bytes, bytes]]:
    """Without how the body was packed: it is unpacked."""
    return [(name, value) for name, value in headers.raw if name.lower() != b"content-encoding"]


def _code(answer: httpx.Response) -> str | None:
    """
    The code of `{code, message}`, of the first in a list of them, or of a problem (RFC 7807): the last part of its
    `type`. Anything that does not look like a code is left alone: it may hold a customer's values.
    """
    try:
        error = msgspec.json.decode(answer.content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if isinstance(error, list) and error:
        error = error[0]
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    if code is None and isinstance(error.get("type"), str) and error["type"] != "about:blank":
        code = error["type"].rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return code if isinstance(code, str) and len(code) <= 64 and _CODE.fullmatch(code) else None


def _page(content: bytes, offset: int, kind: type[T]) -> Page[T]:
    try:
        read = _decoded(content, _Listed)
    except NorceUnavailable:  # half an emoji, cut off in one of them, must not hide all others
        read = _decoded(_HALF.sub(rb"\\ufffd", content.replace(rb"\\", rb"\u005c")), _Listed)
    items = []
    for each in read.data:
        with contextlib.suppress(NorceUnavailable):  # one that is not as documented must not hide all others
            items.append(_decoded(bytes(each), kind))
    return Page(offset=offset, items=items, count=len(read.data), total=read.pagination.total_size)


class _Listed(msgspec.Struct):
    data: list[msgspec.Raw]
    pagination: _Pagination = msgspec.field(default_factory=_Pagination)


def _decoded(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Never its message: it may quote the answer.
        raise NorceUnavailable("Norce's answer is not as documented") from error
