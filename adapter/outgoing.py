"""
The HTTP client that a handler gets: only the hosts in its settings, capped by its deadline, answers in our outcomes.

What it raises *is* the outcome table, so that a handler's happy path alone is already correct:

| happened | outcome |
|---|---|
| no connection | `Retry` |
| a GET or HEAD without answer | `Retry` |
| another request without answer once it went out | `Unknown` |
| `raise_for_status()` on 408, 425, 429, 503 | `Retry`, after `Retry-After` |
| on 401, 403 | `Misconfigured` |
| on another 4xx, or a redirect | `Reject` |
| on another 5xx | `Retry` for GET and HEAD, else `Unknown` |

An `httpx.AsyncClient` belongs to one event loop: make an `Outgoing` per loop, on it.
"""

import functools
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec

from adapter.plugin import Misconfigured, Reject, Retry, Settings, Unknown, Url

LARGEST_ANSWER_BYTES = 1024 * 1024
CONNECT_TIMEOUT = timedelta(seconds=5)
ENDS_BEFORE_DEADLINE = timedelta(milliseconds=100)
READ_ONLY = frozenset({"GET", "HEAD", "OPTIONS"})
LATER = frozenset({408, 425, 429, 503})

Origin = tuple[str, str, int]


class Answer(httpx.Response):
    """A response whose `raise_for_status` raises the outcomes of the table above."""

    def raise_for_status(self) -> "Answer":
        """Itself where the far side says 2xx. Raises `Retry`, `Misconfigured`, `Reject` or `Unknown`."""
        status = self.status_code
        if self.is_success:
            return self
        answered = f"{self.request.method} was answered {status}"
        if status in LATER:
            raise Retry("destination-busy", answered, after=retry_after(self.headers.get("retry-after")))
        if status in (401, 403):
            raise Misconfigured("destination-unauthorized", answered)
        if status < 500:
            raise Reject("destination-refused", answered)
        if self.request.method in READ_ONLY:
            raise Retry("destination-error", answered)
        raise Unknown("destination-error", answered)


def retry_after(value: str | None, now: datetime | None = None) -> timedelta | None:
    """`Retry-After` (RFC 9110, 10.2.3) as a duration: seconds or a date; None where it is neither."""
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
    """The hosts that these settings name: the origin of every `Url` in them, however deep."""
    return frozenset(url.origin for url in _urls(settings))


def _urls(value: Any) -> Iterator[Url]:
    if isinstance(value, Url):
        yield value
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _urls(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _urls(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _urls(item)


# Who asks is limited, each in a way of its own: a queue in here is slow.
_UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=64)


def connections() -> httpx.AsyncHTTPTransport:
    """Connections of one event loop to whom it may be: no proxies, no environment, nothing tried twice."""
    return httpx.AsyncHTTPTransport(verify=_trusted(), retries=0, trust_env=False, limits=_UNLIMITED)


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Whom we trust. Read once: it takes 20 ms, and a loop that a plugin blocks is replaced while shoppers wait."""
    return httpx.create_ssl_context(trust_env=False)


class Outgoing:
    """The connections of one event loop. `client` makes the view of them that one call of a handler gets."""

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._transport = transport or connections()

    def client(self, settings: Settings, deadline: datetime, clock: Callable[[], datetime]) -> httpx.AsyncClient:
        """
        A client for one call: it reaches the hosts in `settings` and ends before `deadline`, on `clock`.

        It follows no redirects and reads no environment. Not to be closed: it owns nothing.
        """
        guarded = _Guarded(self._transport, origins(settings), deadline, clock)
        headers = {"accept-encoding": "identity"}  # an answer is as large as the bytes that are counted
        return httpx.AsyncClient(transport=guarded, headers=headers, follow_redirects=False, trust_env=False)

    async def aclose(self) -> None:
        await self._transport.aclose()


class _Guarded(httpx.AsyncBaseTransport):
    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        allowed: frozenset[Origin],
        deadline: datetime,
        clock: Callable[[], datetime],
    ) -> None:
        self._transport = transport
        self._allowed = allowed
        self._deadline = deadline
        self._clock = clock

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        host = url.raw_host.decode("ascii")  # in the one spelling that the wire has, as in `Url.origin`
        origin = (url.scheme, host, url.port or {"https": 443, "http": 80}.get(url.scheme, 0))
        if origin not in self._allowed:
            raise Misconfigured("host-not-allowed", f"{url.host} is in no Url of this handler's settings")
        left = (self._deadline - self._clock() - ENDS_BEFORE_DEADLINE).total_seconds()
        if left <= 0:
            raise Retry("no-time-left", "the deadline came before the request was sent")
        connect = min(left, CONNECT_TIMEOUT.total_seconds())
        # In place of the client's own timeouts: what is left of the deadline is the only bound that counts.
        request.extensions["timeout"] = {"connect": connect, "pool": connect, "read": left, "write": left}
        request.extensions["trace"] = self._may_be_sent
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Retry("destination-unreachable", type(error).__name__) from error
        except httpx.TransportError as error:
            raise _without_answer(request, error) from error
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise _without_answer(request, None, "the answer is compressed, which was not asked for")
        return Answer(
            response.status_code,
            headers=response.headers,
            stream=_Capped(response, request),
            extensions=response.extensions,
        )

    async def _may_be_sent(self, event: str, _facts: Mapping[str, Any]) -> None:
        """
        Asked by httpcore before it writes. A process may have been stopped since the request was begun, for longer than
        its lease: others have looked it up by now, found nothing and sent it, and it must not go out a second time.
        """
        if not event.endswith((".send_request_headers.started", ".send_request_body.started")):
            return
        if self._clock() >= self._deadline:
            if event.endswith(".send_request_headers.started"):
                raise Retry("no-time-left", "the deadline came before the request was sent")
            raise Unknown("destination-no-answer", "the deadline came in the middle of the request")


class _Capped(httpx.AsyncByteStream):
    """The body of an answer: at most a mebibyte, and broken off in our words."""

    def __init__(self, response: httpx.Response, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        try:
            async for chunk in self._response.stream:  # type: ignore[union-attr]
                size += len(chunk)
                if size > LARGEST_ANSWER_BYTES:
                    raise _without_answer(self._request, None, "the answer is larger than 1 MiB")
                yield chunk
        except httpx.TransportError as error:
            raise _without_answer(self._request, error) from error

    async def aclose(self) -> None:
        await self._response.aclose()


def _without_answer(request: httpx.Request, error: Exception | None, why: str = "") -> Retry | Unknown:
    message = f"{request.method} had no answer: {why or type(error).__name__}"
    if request.method in READ_ONLY:
        return Retry("destination-no-answer", message)
    return Unknown("destination-no-answer", message)
