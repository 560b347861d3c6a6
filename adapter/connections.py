"""Connections to other systems, with limits on everything that an answer may be.

The other side may be broken or hostile, and its answers are parsed on loops that shoppers wait for. So the strict
parser that reads the requests at our door reads every answer first, and counts: what is not body, and how many lines
the heads and trailers have. httpx gets no byte that this parser has refused. (h11, the parser of httpx, sets no limit
on 1xx responses, trailers and chunk extensions. It takes quadratic time for some lines that are not HTTP, and holds the
interpreter meanwhile: 45 s for one line of 100 KiB.)

Bodies are limited by `read_content`, for every reader. Time is limited by the callers.
"""

import asyncio
import functools
import ssl
import weakref
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpcore
import httptools
import httpx

MAX_OVERHEAD_BYTES = 32 * 1024  # of an answer, all that is not body: its heads (1xx ones too), chunk lines, trailers
MAX_OVERHEAD_PART = 0.5  # of the body, on top of that, for the lines of small chunks
MAX_LINES = 200  # status lines, fields and trailers of an answer
RECEIVE_BYTES = 256 * 1024  # as much as uvloop receives at once
READ_BYTES = 16 * 1024  # parsed without a pause for other tasks
CHUNKS_IN_A_ROW = 8  # of a body, then other tasks have a turn

# Of RFC 9110, section 8.4.1, and newer ones. Other values are mistakes, such as the name of a character set.
_GZIP = ("gzip", "x-gzip")
_CODINGS = frozenset({*_GZIP, "deflate", "compress", "x-compress", "br", "zstd"})

# The callers limit their requests. A queue in the connection pool is slow.
_UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=64)


def connections(ssl_context: ssl.SSLContext | None = None) -> httpx.AsyncHTTPTransport:
    """Return connections for one event loop, without proxies, environment and retries."""
    ssl_context = ssl_context or _ssl_context()
    transport = httpx.AsyncHTTPTransport(verify=ssl_context, trust_env=False)
    # httpx has no argument for the network below its pool.
    transport._pool = _Pool(
        ssl_context=ssl_context,
        max_connections=_UNLIMITED.max_connections,
        max_keepalive_connections=_UNLIMITED.max_keepalive_connections,
        keepalive_expiry=_UNLIMITED.keepalive_expiry,
        network_backend=_Network(),
    )
    return transport


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    # Created once: it takes 20 ms, and a blocked loop is replaced while shoppers wait.
    return httpx.create_ssl_context(trust_env=False)


class ContentUnreadable(Exception):
    """The body of an answer cannot be read."""


class ContentTooLarge(ContentUnreadable):
    """The body of an answer is larger than its limit."""


def content_codings(headers: httpx.Headers) -> list[str]:
    """Return the content codings that the headers of an answer name."""
    named = headers.get_list("content-encoding", split_commas=True)
    return [name for each in named if (name := each.strip().lower()) in _CODINGS]


async def read_content(response: httpx.Response, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the content of an answer, decompressed if it is gzip.

    No compression is requested, but some servers and proxies compress all the same. What is compressed is decompressed
    in a thread, and between small chunks other tasks have a turn.

    Raises:
        ContentTooLarge: It has more than `max_bytes`, as received or decompressed.
        ContentUnreadable: It has another content coding, or is not what its coding says.
    """
    codings = content_codings(response.headers)
    if codings and (len(codings) > 1 or codings[0] not in _GZIP):
        raise ContentUnreadable("its body is compressed, which was not requested")
    compressed = bytearray()
    size = count = 0
    async for chunk in response.stream:  # type: ignore[union-attr]
        size += len(chunk)
        count += 1
        if size > max_bytes:
            raise _too_large(max_bytes)
        if codings:
            compressed += chunk
        else:
            yield chunk
        if count % CHUNKS_IN_A_ROW == 0:
            await asyncio.sleep(0)
    if compressed:
        # Not in the loop's own threads, which plugins may keep busy.
        yield await asyncio.wrap_future(_thread().submit(_decompressed, compressed, max_bytes))


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="decompression")


def _decompressed(compressed: bytearray, max_bytes: int) -> bytes:
    inflate = zlib.decompressobj(wbits=31)
    try:
        content = inflate.decompress(compressed, max_bytes + 1)
    except zlib.error:
        raise ContentUnreadable("its body is not what its Content-Encoding says") from None
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    if not inflate.eof or inflate.unused_data:
        raise ContentUnreadable("its body is incomplete, or there is more after it")
    return content


def _too_large(max_bytes: int) -> ContentTooLarge:
    return ContentTooLarge(f"its body is larger than {max_bytes // 1024} KiB")


class _Pool(httpcore.AsyncConnectionPool):
    """A pool that closes the connections that no request owns.

    In httpcore's pool, a cancelled request may leave its connection behind: open, and neither idle nor in use
    (encode/httpcore#1093). Under load, such connections took all descriptors of the service within minutes.
    """

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        response = await super().handle_async_request(request)
        stream: Any = response.stream
        # If it is cancelled while it closes the answer, the request stays in the pool as well.
        weakref.finalize(stream, self._forget, stream._pool_request).atexit = False
        return response

    def _forget(self, request: Any) -> None:
        if request in self._requests:
            self._requests.remove(request)

    def _assign_requests_to_connections(self) -> list[Any]:
        closing = super()._assign_requests_to_connections()
        owned = {id(request.connection) for request in self._requests}
        for each in list(self._connections):
            if id(each) not in owned and not (each.is_idle() or each.is_closed()):
                self._connections.remove(each)
                closing.append(each)
        return closing

    async def _close_connections(self, closing: list[Any]) -> None:
        if closing:  # they have left the pool, so a cancellation must not interrupt this
            await asyncio.shield(asyncio.create_task(super()._close_connections(closing)))


class _Network(httpcore.AnyIOBackend):
    async def connect_tcp(self, *arguments: Any, **named: Any) -> httpcore.AsyncNetworkStream:
        return _Checked(await super().connect_tcp(*arguments, **named))


class _Checked(httpcore.AsyncNetworkStream):
    """A connection that lets through only answers within the limits."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream: httpcore.AsyncNetworkStream | None = stream
        self._answer = _AnswerParser()
        self._is_sending = False
        self._received = memoryview(b"")  # what is not read yet of the last bytes that came

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's
        self._is_sending = False
        if self._received:
            await asyncio.sleep(0)
        else:
            # All that has come: of less, anyio would copy the rest each time.
            self._received = memoryview(await self._open().read(RECEIVE_BYTES, timeout))
        size = min(max_bytes, READ_BYTES)
        data, self._received = bytes(self._received[:size]), self._received[size:]
        if data:
            self._answer.check(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        if not self._is_sending:
            self._answer.begin(is_to_head=buffer.startswith(b"HEAD "))
            self._is_sending = True
        await self._open().write(buffer, timeout)

    async def aclose(self) -> None:
        # httpx keeps the connection of an answer until a collection of garbage. It must not keep what has come.
        self._received = memoryview(b"")
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as above
    ) -> httpcore.AsyncNetworkStream:
        return _Checked(await self._open().start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return None if self._stream is None else self._stream.get_extra_info(info)

    def _open(self) -> httpcore.AsyncNetworkStream:
        if self._stream is None:
            raise httpcore.ReadError("the connection is closed")
        return self._stream


class _AnswerParser:
    """The parser of the answers on one connection, each with the 1xx answers before it."""

    def __init__(self) -> None:
        self._is_to_head = True
        self.begin(is_to_head=False)

    def begin(self, *, is_to_head: bool) -> None:
        """Begin with the answer to the next request; to a HEAD request, it has no body."""
        if is_to_head or self._is_to_head:  # a parser that waits for such a body is of no use
            self._parser = httptools.HttpResponseParser(self)
            # Both are frequent and harmless: a `Content-Length` beside chunks is ignored, as are spaces after a size.
            self._parser.set_dangerous_leniencies(lenient_chunked_length=True, lenient_spaces_after_chunk_size=True)
        self._is_to_head = is_to_head
        self._is_complete = False
        self._bytes = self._body = self._lines = 0

    def check(self, data: bytes) -> None:
        """Parse what has come. Raises `httpcore.RemoteProtocolError` if it must not be used."""
        self._bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise httpcore.RemoteProtocolError("the answer is not HTTP/1.1") from error
        overhead = self._bytes - self._body
        if self._lines > MAX_LINES or overhead > MAX_OVERHEAD_BYTES + MAX_OVERHEAD_PART * self._body:
            raise httpcore.RemoteProtocolError("the answer has too much that is not body")

    def on_message_begin(self) -> None:
        self._refuse_if(self._is_complete)
        self._lines += 1

    def on_header(self, _name: bytes, _value: bytes) -> None:
        self._lines += 1

    def on_chunk_header(self) -> None:
        self._refuse_if(self._is_to_head)

    def on_body(self, body: bytes) -> None:
        self._refuse_if(self._is_to_head)
        self._body += len(body)

    def on_message_complete(self) -> None:
        self._is_complete = self._parser.get_status_code() >= 200

    def _refuse_if(self, is_unexpected: bool) -> None:
        # Otherwise httpx would read this as the answer to the next request.
        if is_unexpected:
            raise ValueError("more than the answer")
