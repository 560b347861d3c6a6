"""The client for Norce's APIs, for all merchants.

Its errors are facts about Norce, not outcomes: a validation turns `OrderNotFound` into a 404, a delivery into a dead
letter. A change without an answer may have been made (`NorceUnclear`), so the client never sends it again. It repeats a
read once, and whatever could not be sent.

Facts: checkout protocol, sections 1.2, 1.3, 4, 8.4 and 9. A client belongs to one event loop.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from adapter.connections import ContentTooLarge, ContentUnreadable, connections, read_content
from adapter.identifiers import Channel
from adapter.norce.api import ADAPTER_ID, AUTHORIZATION, BY_NAME, CHANNEL, MERCHANT, V0, Operation
from adapter.offload import offload
from adapter.orders import NotAnOrder, Order, decode, instant, order_in, read_order
from adapter.outgoing import NOT_SENT, Sending, Traffic, retry_after
from adapter.plugin import Misconfigured, Outcome, Reject, Retry, Secret, Unknown

MAX_ORDER_BYTES = 4 * 1024 * 1024  # of an order and of every other answer that is not a list
# As many as fit into 1 MiB, the largest body that a callback has by default: what is accepted must be decided. Decoding
# holds the interpreter, so no thread helps: 4 MiB of empty lists take 170 ms and 96 MiB.
MAX_ORDER_VALUES = 700_000
MAX_LIST_BYTES = 16 * 1024 * 1024  # of a page; a smaller page may fit
MAX_ERROR_BYTES = 64 * 1024  # of an answer that is not 2xx; a longer one counts without its body
# Of one merchant, so that a merchant whose Norce does not answer leaves connections to the others. The pool of httpx is
# no alternative: it looks at all waiting requests when one ends, and blocked the event loop for 15 s with 300 of them.
MAX_REQUESTS_AT_ONCE = 64
MAX_REQUESTS_OF_AN_ORDER = 8  # of those, so that one order leaves the others to the rest
MAX_PAGES = 100_000
REPEATABLE = frozenset({"GET", "PUT", "PATCH", "DELETE"})  # in Norce's APIs these set a state, so repeating is harmless

_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
T = TypeVar("T")
TokenUsed = Callable[[str, int, int], None]  # merchant, number of the token (from 1), status


class NorceError(Exception):
    """A request to Norce that failed. `code` is Norce's own code, if it gave one.

    `host` and `status` are None if no request was made, or none was answered.
    """

    host: str | None = None
    status: int | None = None

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code

    def at(self, url: str, status: int | None = None) -> Self:
        """Note the address and the status of the request that failed, and return the error."""
        self.host, self.status = urlsplit(url).hostname, status
        return self


class NorceRejected(NorceError):
    """Norce rejects the request (400, 409 and other 4xx) and gives the reason in `code`."""


class NotFound(NorceRejected):
    """Norce does not have the thing (404).

    For an id that Norce cannot have, no request is sent.
    """


class OrderNotFound(NotFound):
    """Norce has no such order (404)."""


class NorceRefused(NorceError):
    """Norce refuses this merchant's tokens (401, 403). Check `merchants.<merchant>.tokens`."""


class NorceUnavailable(NorceError):
    """Norce gave no usable answer in time. `after` is its `Retry-After`."""

    def __init__(self, message: str, after: timedelta | None = None, code: str | None = None) -> None:
        super().__init__(message, code)
        self.after = after


class NorceBusy(NorceUnavailable):
    """Other requests of its order or merchant delayed a request until its time ran out."""


class NorceTooLarge(NorceUnavailable):
    """The answer to a read exceeds the limit. A smaller page may help."""


class NorceUnclear(NorceUnavailable):
    """A change was sent and has no usable answer. Norce may have made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A merchant's access to Norce: the address of its Checkout services, and its tokens."""

    base_url: str
    tokens: tuple[Secret, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """A part of a list."""

    offset: int
    items: list[T]
    count: int  # the items, and those that could not be read
    total: int | None  # length of the list, if Norce says so


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An event record of the Notification API (section 8.4)."""

    id: str
    created_at: datetime
    merchant: str
    channel: str
    order_id: str
    payload: msgspec.Raw  # `{notification, order}`
    adapter_id: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.created_at.tzinfo is None:  # "Times are ISO 8601, UTC" (section 2)
            msgspec.structs.force_setattr(self, "created_at", self.created_at.replace(tzinfo=UTC))


class ListedOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order of a list."""

    id: str
    created_at: datetime
    changed_at: datetime | None
    raw: bytes


class _Pagination(msgspec.Struct, rename="camel"):
    total_size: int | None = None  # `size` has another meaning in each version and is not used


class Norce:
    """A client for all merchants.

    Args:
        accounts: By merchant.
        timeout: Of a whole request.
        version: Of the Order API, v0 or v1.
        used: Called after each request.
        transport: For tests.
    """

    def __init__(
        self,
        accounts: Mapping[str, Account],
        *,
        adapter_id: str,
        timeout: timedelta,
        version: str = V0,
        used: TokenUsed = lambda _merchant, _token, _status: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._accounts = accounts
        self._adapter_id = adapter_id
        self._timeout = timeout
        self._version = version
        self._used = used
        self._turns = {merchant: _Turns() for merchant in accounts}
        self._client = httpx.AsyncClient(
            transport=transport or connections(),
            # One client serves all merchants, so a cookie of one must not be sent for another, nor kept for each order.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            headers={"accept-encoding": "identity"},
            trust_env=False,
            follow_redirects=False,
        )

    async def order(self, channel: Channel, order_id: str, *, within: timedelta | None = None) -> Order:
        """Return the order as Norce has it now, with its `data` decoded.

        Raises `OrderNotFound`, `NorceRefused`, `NorceUnavailable`.
        """
        content = await self.order_bytes(channel, order_id, within=within)
        try:
            return await offload(len(content), parse_order, content, order_id)
        except NorceUnavailable as error:
            error.at(self.base_url(channel.merchant), 200)
            raise

    async def order_bytes(self, channel: Channel, order_id: str, *, within: timedelta | None = None) -> bytes:
        """Return the bytes of an order, for a caller that calls `parse_order` on another thread.

        `within` shortens the configured timeout. Raises `OrderNotFound`, `NorceRefused`, `NorceUnavailable`.
        """
        try:
            return await self.call(channel, "read_order", within=within, path={"order_id": order_id})
        except NotFound as error:
            raise OrderNotFound("Norce has no such order", error.code) from error
        except NorceRejected as error:  # does not say whether the order exists
            base = self.base_url(channel.merchant)
            raise NorceUnavailable(str(error), code=error.code).at(base, error.status) from error

    async def events(self, merchant: str, *, offset: int = 0, limit: int = 100, **filters: str) -> Page[Event]:
        """Return a page of our adapter's events in all channels of a merchant.

        Raises `NorceError`.
        """
        query = {"adapter_id": self._adapter_id, "offset": str(offset), "limit": str(limit), **filters}
        return await _page(
            await self.call(Channel(merchant, ""), "list_events", query=query), offset, partial(_decoded, kind=Event)
        )

    async def orders(self, channel: Channel, *, offset: int = 0, limit: int = 50, **filters: str) -> Page[ListedOrder]:
        """Return a page of the orders of a channel. Raises `NorceError`."""
        query = {**filters, "offset": str(offset), "limit": str(limit)}
        return await _page(await self.call(channel, "list_orders", query=query), offset, _listed_order)

    async def order_pages(
        self, channel: Channel, offset: int = 0, /, *, limit: int = 50, **filters: str
    ) -> AsyncIterator[Page[dict[str, Any]]]:
        """Yield the orders of a channel page by page, from `offset` on.

        The list ends when `totalSize` is reached or a page is empty. Raises `NorceError`.
        """
        for _ in range(MAX_PAGES):
            query = {**filters, "offset": str(offset), "limit": str(limit)}
            page = await _page(
                await self.call(channel, "list_orders", query=query), offset, partial(_decoded, kind=dict[str, Any])
            )
            if page.count:
                yield page
            offset += page.count
            if not page.count or (page.total is not None and offset >= page.total):
                return
        raise NorceUnavailable("the list of orders has no end")

    async def call(
        self,
        channel: Channel,
        name: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        path: Mapping[str, str] = MappingProxyType({}),
        within: timedelta | None = None,
        traffic: Traffic | None = None,
    ) -> bytes:
        """Call an operation and return the bytes of its answer, which are empty if it has no body.

        If Norce refuses a token, the next one is tried.

        Args:
            channel: With an empty name for what belongs to the merchant as a whole.
            name: Of the operation, in `norce.api`.
            body: Encoded as JSON.
            query: Parameters after the path.
            path: The parameters in the path, except merchant and channel.
            within: Shortens the configured timeout.
            traffic: Of the attempt that makes the call, if repeating the call would do harm.

        Raises:
            NorceError: If the request failed.
            KeyError: If there is no such operation.
        """
        operation = BY_NAME[name]
        account = self._accounts[channel.merchant]
        version = self._version if self._version in operation.versions else operation.versions[-1]
        parameters = {"merchant": channel.merchant, "channel": channel.name, **path}
        try:
            url = operation.url(account.base_url, version, **parameters)
        except ValueError as error:
            not_found = OrderNotFound if operation.service == "order" else NotFound
            raise not_found("Norce can have nothing of this id") from error
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
        max_bytes = MAX_LIST_BYTES if name.startswith("list_") else MAX_ORDER_BYTES
        seconds = min(within or self._timeout, self._timeout).total_seconds()
        sending = Sending(traffic or Traffic(), write=operation.method != "GET")
        turns, turn = self._turns[channel.merchant], path.get("order_id", channel.name)
        is_delayed, status = False, None
        try:
            async with asyncio.timeout(seconds):
                if is_delayed := not turns.begin(turn):
                    await turns.wait(turn)
                try:
                    for number, token in enumerate(account.tokens, 1):
                        headers[AUTHORIZATION] = f"Bearer {token.reveal()}"
                        answer = await self._send(request | {"headers": headers}, max_bytes, sending)
                        self._used(channel.merchant, number, answer.status)
                        if answer.status not in (401, 403):
                            break
                finally:
                    turns.end(turn)
            status = answer.status
            sending.answer(status)
            return _content(answer, operation)
        except (httpx.HTTPError, TimeoutError) as error:
            if isinstance(error, NOT_SENT):
                sending.undo()
            failure: type[NorceUnavailable] = NorceUnclear if sending.is_out else NorceUnavailable
            if is_delayed and isinstance(error, TimeoutError) and not sending.is_out:
                failure = NorceBusy
            message = f"no answer from Norce to {operation.title}: {type(error).__name__}"
            raise failure(message).at(url) from error
        except NorceError as error:
            error.at(url, error.status or status)
            raise

    async def _send(self, request: dict[str, Any], max_bytes: int, sending: Sending) -> "_Reply":
        try:
            return await self._send_once(request, max_bytes, sending)
        except httpx.TransportError as error:
            if request["method"] != "GET" and not isinstance(error, NOT_SENT):
                raise
            return await self._send_once(request, max_bytes, sending)

    async def _send_once(self, request: dict[str, Any], max_bytes: int, sending: Sending) -> "_Reply":
        sending.begin()
        async with self._client.stream(
            **request, timeout=self._timeout.total_seconds(), extensions={"trace": sending.trace}
        ) as answer:
            status, reason = answer.status_code, None
            try:
                body: bytes | None = await _read_body(answer, max_bytes if answer.is_success else MAX_ERROR_BYTES)
            except ContentUnreadable as error:
                body, reason, is_too_large = None, str(error), isinstance(error, ContentTooLarge)
            except httpx.TransportError:
                if answer.is_success:
                    raise
                body = None
        if reason is None or not answer.is_success:  # the status of an error counts without its body
            return _Reply(status, answer.headers, body)
        failure: type[NorceUnavailable] = NorceTooLarge if is_too_large else NorceUnavailable
        if request["method"] != "GET":
            failure = NorceUnclear
        raise failure(f"Norce's answer cannot be read: {reason}").at(request["url"], status)

    def base_url(self, merchant: str) -> str:
        """Return the address of the merchant's Checkout services."""
        return self._accounts[merchant].base_url

    def for_handlers(self, channel: Channel, traffic: Traffic | None = None) -> "HandlerOrders":
        """Return the view of Norce that a handler has in `context.orders`."""
        return HandlerOrders(self, channel, traffic or Traffic())

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class _Turns:
    """The running requests of one merchant, limited in all and for each order.

    Those that wait begin in turn, order by order, so that many of one order do not delay those of others.
    """

    def __init__(self) -> None:
        self._free = MAX_REQUESTS_AT_ONCE
        self._running: dict[str, int] = {}  # by order
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}  # by order, the next first

    def begin(self, order_id: str) -> bool:
        """Begin a request. Returns False if it must `wait`."""
        running = self._running.get(order_id, 0)
        if not self._free or running >= MAX_REQUESTS_OF_AN_ORDER:
            return False
        self._free -= 1
        self._running[order_id] = running + 1
        return True

    async def wait(self, order_id: str) -> None:
        """Wait, and begin a request in its turn."""
        line = self._waiting.setdefault(order_id, {})
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had begun
                self.end(order_id)
            line.pop(turn, None)
            if not line and self._waiting.get(order_id) is line:
                del self._waiting[order_id]
            raise

    def end(self, order_id: str) -> None:
        """End a request, and begin those that may begin now."""
        self._free += 1
        if (running := self._running.pop(order_id) - 1) > 0:
            self._running[order_id] = running
        # At most a few orders are at their limit, so this does not look far.
        while self._free and (following := next(filter(self._may_begin, self._waiting), None)) is not None:
            line = self._waiting.pop(following)
            turn = next(iter(line))
            del line[turn]
            if line:
                self._waiting[following] = line  # behind all others
            if not turn.done():  # not cancelled
                self.begin(following)
                turn.set_result(None)

    def _may_begin(self, order_id: str) -> bool:
        return self._running.get(order_id, 0) < MAX_REQUESTS_OF_AN_ORDER


class HandlerOrders:
    """`adapter.plugin.Orders` for one channel. Raises outcomes, not the client's errors."""

    def __init__(self, norce: Norce, channel: Channel, traffic: Traffic) -> None:
        self._norce = norce
        self._channel = channel
        self._traffic = traffic

    async def read(self, order_id: str) -> Order:
        """Return the order as Norce has it now."""
        return self.parse(await self.read_bytes(order_id), order_id)

    async def read_bytes(self, order_id: str) -> bytes:
        """Return the bytes of an order, for a caller that calls `parse` on another thread."""
        try:
            return await self._norce.order_bytes(self._channel, order_id)
        except NorceError as error:
            raise _outcome(error, "GET") from error

    def parse(self, content: bytes, order_id: str) -> Order:
        """Decode an order completely. Raises `Retry` if `content` is not this order."""
        try:
            order = parse_order(content, order_id)
            return read_order(order.raw, order.data)
        except NorceUnavailable as error:
            raise _outcome(error.at(self._norce.base_url(self._channel.merchant), 200), "GET") from error
        except NotAnOrder as error:
            raise Retry("norce-unavailable", "Norce's answer is nested too deeply") from error

    async def set_reference(self, order_id: str, reference: str) -> None:
        """Set the order's reference."""
        await self.call("put_reference", order_id, reference)

    async def set_attributes(self, order_id: str, attributes: Mapping[str, Any]) -> None:
        """Set some of the order's attributes; the others stay."""
        await self.call("patch_attributes", order_id, attributes)

    async def call(self, operation: str, order_id: str, body: Any = None, **path: str) -> Any:
        """Call an operation of `norce.api` on the order and return its answer, decoded."""
        known = BY_NAME[operation]
        traffic = None if known.method in REPEATABLE else self._traffic
        try:
            content = await self._norce.call(
                self._channel, operation, body=body, path={"order_id": order_id, **path}, traffic=traffic
            )
            try:
                return _decoded(content, Any) if content else None
            except NorceUnavailable as error:
                if known.method == "GET":
                    raise
                if any(known.answers.values()):
                    raise NorceUnclear(str(error)) from error  # Norce made the change; repeating would make another
                return None
        except NorceError as error:
            raise _outcome(error, known.method) from error


def parse_order(content: bytes, order_id: str) -> Order:
    """Decode the `data` of an order that Norce has answered.

    Raises `NorceUnavailable` if it is not this order. A page of a proxy, for example, is no order: no condition would
    hold on it, and the event would be lost.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_ORDER_VALUES:
        raise NorceUnavailable("Norce's answer has more values than an order")
    try:
        data = order_in(decode(content))
    except NotAnOrder as error:
        raise NorceUnavailable("Norce's answer is no order") from error
    if data.get("id") != order_id:
        raise NorceUnavailable("Norce's answer is not this order")
    return Order(content, data)


def base_url(environment: str, slug: str) -> str:
    """Return the address of a merchant's Checkout services: `…/checkout`."""
    # Production has no segment for the environment.
    segment = "" if environment == "production" else f"{environment}."
    return f"https://{slug}.api-se.{segment}norce.tech/checkout"


def _outcome(error: NorceError, method: str) -> Outcome:
    outcome = _kind_of_outcome(error, method)
    outcome.host, outcome.status = error.host, error.status
    return outcome


def _kind_of_outcome(error: NorceError, method: str) -> Outcome:
    match error:
        case OrderNotFound():
            return Reject("order-not-found", "Norce has no such order")
        case NorceRejected():
            return Reject("norce-rejected", str(error))
        case NorceRefused():
            return Misconfigured("norce-unauthorized", str(error))
        case NorceUnclear(after=after) if method not in REPEATABLE:
            return Unknown("norce-unavailable", str(error), after=after)
        case NorceUnavailable(after=after):
            return Retry("norce-unavailable", str(error), after=after)
    raise AssertionError(error)


async def _read_body(answer: httpx.Response, max_bytes: int) -> bytes:
    pieces: list[bytes] = []  # one buffer that grows, beside others that grow, leaves three times its size unused
    try:
        async for piece in read_content(answer, max_bytes):
            pieces.append(piece)
    except BaseException:
        pieces.clear()  # an error keeps this frame until it is logged, and many may wait for that
        raise
    return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: httpx.Headers
    body: bytes | None  # None if the body of an error cannot be read


def _content(reply: _Reply, operation: Operation) -> bytes:
    status = reply.status
    if status in (401, 403):
        raise NorceRefused(f"Norce answered {status} to {operation.title}: check the tokens of this merchant")
    if 200 <= status < 300:
        assert reply.body is not None
        return reply.body
    code = _code(reply)
    said = f"Norce answered {status} to {operation.title}{'' if code is None else f', {code}'}"
    if status == 404:
        if not _is_from_norce(reply):
            raise NorceUnavailable(f"{said}, and not in Norce's form: perhaps from a proxy")
        is_of_order = code == "order-not-found" or (code is None and operation.service == "order")
        raise (OrderNotFound if is_of_order else NotFound)(said, code)
    if status in (425, 429) or status < 400:
        raise NorceUnavailable(said, retry_after(reply.headers.get("retry-after")), code)
    if status < 500 and status != 408:
        raise NorceRejected(said, code)
    failure = NorceUnavailable if operation.method == "GET" else NorceUnclear
    raise failure(said, retry_after(reply.headers.get("retry-after")), code)


def _is_from_norce(reply: _Reply) -> bool:
    """Tell whether a 404 is Norce's own: empty, an error of Norce or a problem (RFC 7807).

    A gateway that cannot reach Norce also answers 404, to everything, and every delivery would become a dead letter.
    """
    if reply.body == b"":
        return True
    body = _json_or_none(reply.body)
    return isinstance(body, dict) and not {"code", "type", "title"}.isdisjoint(body)


def _code(reply: _Reply) -> str | None:
    """Return the code of an error, of the first in a list, or of a problem's `type`.

    A text that does not look like a code is ignored: it may contain a customer's values.
    """
    error = _json_or_none(reply.body)
    if isinstance(error, list) and error:
        error = error[0]
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    if code is None and isinstance(error.get("type"), str) and error["type"] != "about:blank":
        code = error["type"].rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return code if isinstance(code, str) and len(code) <= 64 and _CODE.fullmatch(code) else None


def _json_or_none(content: bytes | None) -> Any:
    if content is None:
        return None
    with contextlib.suppress(NorceUnavailable):
        return _decoded(content, Any)
    return None


async def _page(content: bytes, offset: int, read: Callable[[bytes], T]) -> Page[T]:
    """Decode a page in a thread: a large one takes longer than other tasks can wait."""
    return await asyncio.to_thread(_decoded_page, content, offset, read)


def _decoded_page(content: bytes, offset: int, read: Callable[[bytes], T]) -> Page[T]:
    listed = _decoded(content, _Listed)
    items = []
    for each in map(bytes, listed.data):
        with contextlib.suppress(NorceUnavailable):  # an item in another form must not hide the others
            if len(each) <= MAX_ORDER_BYTES:  # as for an order by itself; a larger one would hold the interpreter
                items.append(read(each))
    return Page(offset=offset, items=items, count=len(listed.data), total=listed.pagination.total_size)


def _listed_order(item: bytes) -> ListedOrder:
    head = _decoded(item, _Head)
    created_at = instant(head.created)
    if created_at is None:
        raise NorceUnavailable("an order of the list does not say when it was created")
    return ListedOrder(id=head.id, created_at=created_at, changed_at=instant(head.last_modified), raw=item)


class _Head(msgspec.Struct, rename="camel"):
    id: str
    created: Any = None
    last_modified: Any = None


class _Listed(msgspec.Struct):
    data: list[msgspec.Raw]
    pagination: _Pagination = msgspec.field(default_factory=_Pagination)


def _decoded(content: bytes, kind: type[T]) -> T:
    try:
        decoded: T = decode(content, kind)
    except NotAnOrder as error:
        # Without the decoder's message, which may quote the answer.
        raise NorceUnavailable("Norce's answer is not as documented") from error
    return decoded
