"""The HTTP client for handlers: `context.http`.

It reaches only the hosts in the handler's settings and ends before the handler's deadline. Its exceptions are outcomes,
so that a handler that contains only the success path is already correct:

| event | outcome |
|---|---|
| no connection | `Retry` |
| a GET or HEAD without an answer | `Retry` |
| another request that went out and has no answer | `Unknown` |
| `raise_for_status()` on 408, 425, 429, 503 | `Retry`, after `Retry-After` |
| on 401, 403 | `Misconfigured` |
| on another 4xx, or a redirect | `Reject` |
| on another 5xx | `Retry` for GET and HEAD, otherwise `Unknown` |

An `httpx.AsyncClient` belongs to one event loop, so each loop has an `Outgoing` of its own.
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

MAX_ANSWER_BYTES = 1024 * 1024
CONNECT_TIMEOUT = timedelta(seconds=5)
ENDS_BEFORE_DEADLINE = timedelta(milliseconds=100)
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
RETRIED_STATUSES = frozenset({408, 425, 429, 503})

Origin = tuple[str, str, int]


class DestinationResponse(httpx.Response):
    """A response whose `raise_for_status` raises outcomes."""

    def raise_for_status(self) -> "DestinationResponse":
        """Return the response if its status is 2xx.

        Raises:
            Outcome: `Retry`, `Misconfigured`, `Reject` or `Unknown`, as the table of this module says.
        """
        status = self.status_code
        if self.is_success:
            return self
        answered = f"{self.request.method} was answered {status}"
        if status in RETRIED_STATUSES:
            raise Retry("destination-busy", answered, after=retry_after(self.headers.get("retry-after")))
        if status in (401, 403):
            raise Misconfigured("destination-unauthorized", answered)
        if status < 500:
            raise Reject("destination-refused", answered)
        if self.request.method in READING_METHODS:
            raise Retry("destination-error", answered)
        raise Unknown("destination-error", answered)


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


# The callers limit their requests. A queue in the connection pool is slow.
_UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=64)


def connections() -> httpx.AsyncHTTPTransport:
    """Return connections for one event loop, without proxies, environment and retries."""
    return httpx.AsyncHTTPTransport(verify=_ssl_context(), retries=0, trust_env=False, limits=_UNLIMITED)


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    # Created once: it takes 20 ms, and a blocked loop is replaced while shoppers wait.
    return httpx.create_ssl_context(trust_env=False)


class Outgoing:
    """The connections of one event loop, shared by the clients of all calls on it."""

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._transport = transport or connections()

    def client(self, settings: Settings, deadline: datetime, clock: Callable[[], datetime]) -> httpx.AsyncClient:
        """Create a client for one call of a handler.

        It reaches the hosts in `settings`, ends before `deadline` by `clock`, and follows no redirects. It owns
        nothing, so it need not be closed.
        """
        guarded = _Guarded(self._transport, origins(settings), deadline, clock)
        headers = {"accept-encoding": "identity"}  # so that the limit on received bytes limits the answer
        return httpx.AsyncClient(transport=guarded, headers=headers, follow_redirects=False, trust_env=False)

    async def aclose(self) -> None:
        """Close all connections."""
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
        host = url.raw_host.decode("ascii")  # spelled as in `Url.origin`
        origin = (url.scheme, host, url.port or {"https": 443, "http": 80}.get(url.scheme, 0))
        if origin not in self._allowed:
            raise Misconfigured("host-not-allowed", f"no Url in this handler's settings has the host {url.host}")
        left = (self._deadline - self._clock() - ENDS_BEFORE_DEADLINE).total_seconds()
        if left <= 0:
            raise Retry("no-time-left", "the deadline came before the request was sent")
        connect = min(left, CONNECT_TIMEOUT.total_seconds())
        # These replace the client's own timeouts: only the deadline counts.
        request.extensions["timeout"] = {"connect": connect, "pool": connect, "read": left, "write": left}
        request.extensions["trace"] = self._check_deadline
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Retry("destination-unreachable", type(error).__name__) from error
        except httpx.TransportError as error:
            raise _no_answer(request, type(error).__name__) from error
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise _no_answer(request, "the answer is compressed, which was not requested")
        return DestinationResponse(
            response.status_code,
            headers=response.headers,
            stream=_Capped(response, request),
            extensions=response.extensions,
        )

    async def _check_deadline(self, event: str, _facts: Mapping[str, Any]) -> None:
        """Stop a request whose deadline has passed, right before httpcore writes it.

        The process may have been suspended for longer than its lease. By now another process may have looked up the
        effect, found nothing and sent the request, and it must not go out a second time.
        """
        if not event.endswith((".send_request_headers.started", ".send_request_body.started")):
            return
        if self._clock() >= self._deadline:
            if event.endswith(".send_request_headers.started"):
                raise Retry("no-time-left", "the deadline came before the request was sent")
            raise Unknown("destination-no-answer", "the deadline came in the middle of the request")


class _Capped(httpx.AsyncByteStream):
    """The body of an answer, limited to `MAX_ANSWER_BYTES`. Its errors are outcomes."""

    def __init__(self, response: httpx.Response, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        try:
            async for chunk in self._response.stream:  # type: ignore[union-attr]
                size += len(chunk)
                if size > MAX_ANSWER_BYTES:
                    raise _no_answer(self._request, "the answer is larger than 1 MiB")
                yield chunk
        except httpx.TransportError as error:
            raise _no_answer(self._request, type(error).__name__) from error

    async def aclose(self) -> None:
        await self._response.aclose()


def _no_answer(request: httpx.Request, reason: str) -> Retry | Unknown:
    message = f"{request.method} had no answer: {reason}"
    if request.method in READING_METHODS:
        return Retry("destination-no-answer", message)
    return Unknown("destination-no-answer", message)
