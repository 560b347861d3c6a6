"""The HTTP client for handlers: `context.http`.

It reaches only the hosts in the handler's settings and ends before the handler's deadline. Its exceptions are outcomes,
so that a handler that contains only the success path is already correct:

| event | outcome |
|---|---|
| no connection | `Retry` |
| no answer to a write that went out | `Unknown` |
| no answer to another request | `Retry` |
| `raise_for_status()` on 425, 429 | `Retry`, after `Retry-After` |
| on 408 or 5xx | `Unknown` for a write, otherwise `Retry`; both after `Retry-After` |
| on 401, 403 | `Misconfigured` |
| on another 4xx, or a redirect | `Reject` |

A write is every request but GET, HEAD and OPTIONS, unless it is marked with `extensions={"write": False}`. Gateways
send 408, 502, 503 and 504 also after the destination has acted, so a handler declares in `not_done` those that never
follow an effect, or for one request in `extensions={"not_done": {503}}`.

Otherwise it is an `httpx.AsyncClient`, with these differences:

- It calls only the schemes, hosts and ports of the `Url` fields in the handler's settings. There are no redirects, no
  proxies and nothing from the environment. `verify=` and `cert=` are settings: `PrivateCa` and `ClientCertificate`.
- There is no time limit of 5 s. Each request ends before the handler's deadline, and connects within 5 s; `timeout=`
  can shorten this, and means the same as in httpx.
- `raise_for_status()` and `json()` raise outcomes, and so do failed requests, in place of the errors of httpx.
- `json=` also takes `Decimal`, which is written as a number with all its digits.
- No compression is requested. An answer that is gzip is decompressed, any other coding is no answer.
- The body of an answer has at most the `max_answer_bytes` of the route (1 MiB). A larger one is no answer after a 2xx,
  and cut off after any other status. Heads, trailers and chunk lines are limited, too, and HTTP/2 is not spoken.
- The client belongs to one call of the handler, and need not be closed. Its connections are shared and outlive it.

An `httpx.AsyncClient` belongs to one event loop, so each loop has an `Outgoing` of its own.
"""

import asyncio
import contextlib
import functools
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
import msgspec
import structlog

from adapter.connections import ContentUnreadable, connections, content_codings, read_content
from adapter.orders import Order
from adapter.plugin import ClientCertificate, Misconfigured, Outcome, PrivateCa, Reject, Retry, Settings, Unknown, Url

log = structlog.get_logger(__name__)

MAX_ANSWER_BYTES = 1024 * 1024
LONGEST_EXPLANATION = 200
CONNECT_TIMEOUT = timedelta(seconds=5)
ENDS_BEFORE_DEADLINE = timedelta(milliseconds=100)
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)

Origin = tuple[str, str, int]
T = TypeVar("T")


class Traffic:
    """The requests of one attempt: the one place that knows whether a write went out.

    The guarded clients write it on the loop of the handler, its caller reads it on another.

    Args:
        not_done: Statuses that never follow an effect (`NotificationHandler.not_done`).
        explain: Returns the reason that a refusal gives (`NotificationHandler.explain`).
    """

    def __init__(
        self, not_done: Collection[int] = (), explain: Callable[[httpx.Response], str | None] = lambda _answer: None
    ) -> None:
        self.not_done = not_done
        self._explain = explain
        self.order: Order | None = None  # whose values no message may show
        self.writes = 0  # went out, or may have
        self.unanswered = 0  # of these, without an answer, or with one that leaves their effect open
        self.succeeded = False  # a write was answered 2xx or 3xx
        self.threads: set[asyncio.Future[Any]] = set()  # of `context.thread`, until they end
        self._closed = False

    def close(self) -> bool:
        """Let no write begin any more, and return whether one may have gone out."""
        self._closed = True
        return self.writes > 0

    def begin_write(self) -> None:
        """Count a write, right before it is sent.

        Raises:
            Retry: The attempt has ended.
        """
        self.unanswered += 1
        self.writes += 1  # counted before `_closed` is read; `close` sets `_closed`, then reads `writes`
        if self._closed:
            raise Retry("attempt-ended", "the attempt ended before the request was sent")

    async def wait_for_threads(self) -> None:
        """Return when all threads have ended, even if this is cancelled meanwhile."""
        self.unanswered += len(self.threads)  # the handler has not seen what they did
        while self.threads:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(self.threads)

    def explanation(self, answer: httpx.Response) -> str | None:
        """Return the start of what the handler takes from the body of a refusal, in one line."""
        try:
            text = self._explain(answer)
        except Exception as error:  # it must not replace the outcome
            log.warning("explain_failed", exc_info=error)
            return None
        if not isinstance(text, str):
            return None
        return "".join(each if each.isprintable() else " " for each in text[:LONGEST_EXPLANATION]).strip() or None

    def describe(self, request: httpx.Request) -> str:
        """Return the method and the path of a request, with `…` in place of values."""
        segments = request.url.raw_path.decode("ascii").partition("?")[0].split("/")
        values = set(_texts(None if self.order is None else self.order.data))
        shown = ("…" if not _PLAIN.fullmatch(each) or values & _words(each) else each for each in segments)
        return f"{request.method} {'/'.join(shown)}"


_PLAIN = re.compile(r"[A-Za-z._-]*|v[0-9]{1,2}")  # neither an id nor a percent-encoded character is part of it


def _words(segment: str) -> set[str]:
    segment = segment.casefold()
    return {segment, *re.split(r"[._-]", segment)} - {""}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text inside a JSON value of any depth, in lower case."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value.strip().casefold()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value


def is_write(request: httpx.Request) -> bool:
    """Return whether a request may have an effect at the destination."""
    return bool(request.extensions.get("write", request.method not in READING_METHODS))


def not_done(request: httpx.Request) -> Collection[int]:
    """Return the statuses that only this request declares as never following an effect."""
    return request.extensions.get("not_done", ())  # type: ignore[no-any-return]


class DestinationResponse(httpx.Response):
    """A response whose `raise_for_status` and `json` raise outcomes."""

    traffic: Traffic

    def raise_for_status(self) -> "DestinationResponse":
        """Return the response if its status is 2xx.

        Raises:
            Outcome: `Retry`, `Misconfigured`, `Reject` or `Unknown`, as the table of this module says.
        """
        if self.is_success:
            return self
        outcome = self._outcome()
        outcome.host, outcome.status = self.request.url.host, self.status_code
        outcome.explanation = self.traffic.explanation(self)
        raise outcome

    def _outcome(self) -> Outcome:
        status = self.status_code
        answered = f"{self.traffic.describe(self.request)} was answered {status}"
        after = retry_after(self.headers.get("retry-after"))
        if status in (401, 403):
            return Misconfigured("destination-unauthorized", answered)
        if status in (425, 429):
            return Retry("destination-busy", answered, after=after)
        if status < 500 and status != 408:
            return Reject("destination-refused", answered)
        code = "destination-busy" if status in (408, 503) else "destination-error"
        declared = {*self.traffic.not_done, *not_done(self.request)}
        is_doubt = is_write(self.request) and status not in declared
        return (Unknown if is_doubt else Retry)(code, answered, after=after)

    def json(self, **options: Any) -> Any:
        """Return the body, decoded.

        Raises:
            Outcome: The body is not JSON, such as a page of a proxy: `Retry`, after a write `Unknown`.
        """
        try:
            return super().json(**options)
        except (ValueError, RecursionError) as error:
            raise _no_answer(self.traffic, self.request, "its body is not JSON") from error


def retry_after(value: str | None, now: datetime | None = None) -> timedelta | None:
    """Parse `Retry-After` (RFC 9110, 10.2.3). Return None if it is neither seconds nor a date."""
    if value is None:
        return None
    try:
        if value.strip().isdecimal():
            return timedelta(seconds=min(int(value), 10**7))
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(moment - (now or datetime.now(UTC)), timedelta(0))


def origins(settings: Settings) -> frozenset[Origin]:
    """Return the origin of every `Url` in the settings, at any depth."""
    return frozenset(url.origin for url in _found(Url, settings))


def _found(kind: type[T], value: Any) -> Iterator[T]:
    """Yield every value of a kind inside a setting, at any depth."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _found(kind, getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _found(kind, item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _found(kind, item)


@functools.cache
def _ssl_context(authorities: tuple[PrivateCa, ...], certificates: tuple[ClientCertificate, ...]) -> ssl.SSLContext:
    context = httpx.create_ssl_context(trust_env=False)
    for authority in authorities:
        context.load_verify_locations(cadata=authority)
    for certificate in certificates:
        certificate.load(context)
    return context


class Outgoing:
    """The connections of one event loop, shared by the clients of all calls on it."""

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._transport = transport or connections()
        self._is_real = transport is None
        self._of_settings: dict[Any, httpx.AsyncBaseTransport] = {}  # with authorities and certificates of their own

    def client(
        self,
        settings: Settings,
        deadline: datetime,
        clock: Callable[[], datetime],
        traffic: Traffic,
        *,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> httpx.AsyncClient:
        """Create a client for one call of a handler.

        It reaches the hosts in `settings`, ends before `deadline` by `clock`, follows no redirects, and counts what it
        sends in `traffic`. It owns nothing, so it need not be closed.
        """
        guarded = _Guarded(self._connections(settings), origins(settings), deadline, clock, traffic, max_answer_bytes)
        headers = {"accept-encoding": "identity"}  # compression saves nothing here
        return _Client(transport=guarded, headers=headers, timeout=None, follow_redirects=False, trust_env=False)

    async def aclose(self) -> None:
        """Close all connections."""
        for each in (self._transport, *self._of_settings.values()):
            await each.aclose()

    def _connections(self, settings: Settings) -> httpx.AsyncBaseTransport:
        own = tuple(_found(PrivateCa, settings)), tuple(_found(ClientCertificate, settings))
        if not any(own) or not self._is_real:
            return self._transport
        if own not in self._of_settings:
            self._of_settings[own] = connections(_ssl_context(*own))
        return self._of_settings[own]


class _Client(httpx.AsyncClient):
    """A client whose `json=` takes decimals."""

    def build_request(self, *arguments: Any, **named: Any) -> httpx.Request:
        if (value := named.get("json")) is None or any(named.get(other) for other in ("content", "data", "files")):
            return super().build_request(*arguments, **named)
        request = super().build_request(*arguments, **named | {"json": None, "content": _json(value)})
        request.headers.setdefault("content-type", "application/json")
        return request


def _json(value: Any) -> bytes:
    """Encode JSON as httpx does, and a `Decimal` as a number with all its digits."""
    decimals = []

    def zero(each: Any) -> int:
        if not isinstance(each, Decimal):
            raise TypeError(f"a {type(each).__name__} is not JSON")
        if not each.is_finite():
            raise ValueError("a Decimal that is not finite is not JSON")
        decimals.append(each)
        return 0

    text = json.dumps(value, default=zero, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _EXACT_JSON.encode(value) if decimals else text.encode()


def _of_subclass(value: Any) -> Any:
    kinds: tuple[type[Any], ...] = (str, int, float, dict, list)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


_EXACT_JSON = msgspec.json.Encoder(decimal_format="number", enc_hook=_of_subclass)


class Sending:
    """One request on its way. It is counted as a write while it is out."""

    def __init__(self, traffic: Traffic, *, write: bool) -> None:
        self.is_out = False
        self.has_begun = False  # its headers were sent
        self._traffic = traffic
        self._write = write

    def begin(self) -> None:
        """Count the request. Call this before the transport, which may trace nothing."""
        if self._write and not self.is_out:
            self.is_out = True
            self._traffic.begin_write()

    def undo(self) -> None:
        """Take the request back: nothing of it was sent."""
        if self.is_out:
            self.is_out = False
            self._traffic.writes -= 1
            self._traffic.unanswered -= 1

    def answer(self, status: int, not_done: Collection[int] = ()) -> None:
        """Note the status of the answer. Only then is it known whether a write had an effect."""
        if self.is_out and ((status < 500 and status != 408) or status in {*self._traffic.not_done, *not_done}):
            self._traffic.unanswered -= 1
            self._traffic.succeeded |= 200 <= status < 400  # a 303 leads to what was made (RFC 9110, 15.4.4)

    async def trace(self, event: str, _facts: Mapping[str, Any]) -> None:
        """Follow the steps of httpcore: nothing is out while it connects."""
        if event == "connection.connect_tcp.started":
            self.undo()
        elif event.endswith(".send_request_headers.started"):
            self.begin()
        elif event.endswith(".send_request_headers.complete"):
            self.has_begun = True


class _Guarded(httpx.AsyncBaseTransport):
    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        allowed: frozenset[Origin],
        deadline: datetime,
        clock: Callable[[], datetime],
        traffic: Traffic,
        max_answer_bytes: int,
    ) -> None:
        self._transport = transport
        self._allowed = allowed
        self._deadline = deadline
        self._clock = clock
        self._traffic = traffic
        self._max_answer_bytes = max_answer_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        host = url.raw_host.decode("ascii")  # spelled as in `Url.origin`
        origin = (url.scheme, host, url.port or {"https": 443, "http": 80}.get(url.scheme, 0))
        if origin not in self._allowed:
            raise Misconfigured("host-not-allowed", f"no Url in this handler's settings has the host {url.host}")
        left = (self._deadline - self._clock() - ENDS_BEFORE_DEADLINE).total_seconds()
        if left <= 0:
            raise _no_time_left()
        connect = min(left, CONNECT_TIMEOUT.total_seconds())
        longest = {"connect": connect, "pool": connect, "read": left, "write": left}
        own = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            step: most if own.get(step) is None else min(own[step], most) for step, most in longest.items()
        }
        sending = Sending(self._traffic, write=is_write(request))
        request.extensions["trace"] = functools.partial(self._trace, request, sending)
        ends_at = asyncio.get_running_loop().time() + left
        sending.begin()
        try:
            async with asyncio.timeout_at(ends_at):
                response = await self._transport.handle_async_request(request)
        except (TimeoutError, *NOT_SENT) as error:
            if isinstance(error, TimeoutError) and (sending.is_out or not is_write(request)):
                raise _no_answer(self._traffic, request, type(error).__name__) from error
            sending.undo()
            retry = Retry(
                "destination-unreachable", f"{self._traffic.describe(request)} was not sent: {type(error).__name__}"
            )
            retry.host = url.host
            raise retry from error
        except httpx.LocalProtocolError:  # a bug of the handler, such as a header with a line break
            if not sending.has_begun:
                sending.undo()
            raise
        except httpx.TransportError as error:
            raise _no_answer(self._traffic, request, type(error).__name__) from error
        sending.answer(response.status_code, not_done(request))
        return _answer(response, request, self._traffic, ends_at, self._max_answer_bytes)

    async def _trace(self, request: httpx.Request, sending: Sending, event: str, facts: Mapping[str, Any]) -> None:
        """Stop a request whose deadline has passed, right before httpcore writes it.

        The process may have been suspended for longer than its lease. By now another process may have looked up the
        effect, found nothing and sent the request, and it must not go out a second time.
        """
        begins = event.endswith(".send_request_headers.started")
        if (begins or event.endswith(".send_request_body.started")) and self._clock() >= self._deadline:
            if begins:
                sending.undo()
                raise _no_time_left()
            raise _no_answer(self._traffic, request, "the deadline came in the middle of the request")
        await sending.trace(event, facts)


def _answer(
    response: httpx.Response, request: httpx.Request, traffic: Traffic, ends_at: float, max_bytes: int
) -> DestinationResponse:
    headers = response.headers.copy()
    headers.pop("content-encoding", None)  # the body is decoded here, where its size is limited
    if content_codings(response.headers):
        headers.pop("content-length", None)
    body = _Body(response, max_bytes, ends_at, lambda reason: _no_answer(traffic, request, reason))
    answer = DestinationResponse(response.status_code, headers=headers, stream=body, extensions=response.extensions)
    answer.traffic = traffic
    return answer


class _Body(httpx.AsyncByteStream):
    """The body of an answer, decoded, with limits on its size and its time.

    If it cannot be read, a 2xx is no answer. Any other status counts without its body.
    """

    def __init__(
        self,
        response: httpx.Response,
        max_bytes: int,
        ends_at: float,
        no_answer: Callable[[str], Retry | Unknown],
    ) -> None:
        self._response = response
        self._pieces = read_content(response, max_bytes)
        self._ends_at = ends_at
        self._no_answer = no_answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while (piece := await self._next_piece()) is not None:
                yield piece
        except (ContentUnreadable, TimeoutError, httpx.TransportError) as error:
            reason = str(error) if isinstance(error, ContentUnreadable) else type(error).__name__
            if self._response.is_success:
                raise self._no_answer(reason) from error

    async def _next_piece(self) -> bytes | None:
        async with asyncio.timeout_at(self._ends_at):  # a limit on each read would let a slow answer last for ever
            return await anext(self._pieces, None)

    async def aclose(self) -> None:
        await self._response.aclose()


def _no_time_left() -> Retry:
    return Retry("no-time-left", "the deadline came before the request was sent")


def _no_answer(traffic: Traffic, request: httpx.Request, reason: str) -> Retry | Unknown:
    kind = Unknown if is_write(request) else Retry
    outcome = kind("destination-no-answer", f"{traffic.describe(request)} had no answer: {reason}")
    outcome.host = request.url.host
    return outcome
