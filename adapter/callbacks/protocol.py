"""The HTTP/1.1 protocol of a connection: uvicorn's, with limits.

uvicorn limits neither the size nor the duration of a request (measured: it takes a head of 5 MB and trailers of 21 MB,
and one that sends a byte a second keeps its connection for ever). Here a connection has one deadline, moved as its
request proceeds, and `ConnectionTable` closes it when that has passed. The size of a body is limited in `endpoints`,
which knows what to answer.

uvicorn also drops the body of a request that offers an upgrade (`Upgrade: h2c`, which Java's client sends by default),
and the answer to a caller that has closed its side of the connection. Here such requests are answered like all others.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from enum import Enum
from math import inf
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from adapter.callbacks.connection_table import CONNECTION, ConnectionTable
from adapter.callbacks.endpoints import ON_HANG_UP, RECEIVED_AT
from adapter.callbacks.limits import Load

LONGEST_HEAD_SECONDS = 10.0  # from the connection or the request's first byte
LONGEST_REQUEST_SECONDS = 10.0  # from its first byte to the end of its body
LONGEST_UNREAD_SECONDS = 10.0  # for the caller to take an answer, from the moment that it did not fit into the socket
# After an answer in the middle of a request. If the connection were closed while the caller sends, the caller's machine
# would drop the answer (RFC 9112, 9.6).
LINGER_SECONDS = 2.0

LARGEST_HEAD_BYTES = 32 * 1024
MOST_FIELDS = 128  # each takes 150 bytes more than it has
LARGEST_FRAMING_BYTES = 8 * 1024  # trailers, sizes and extensions of chunks
FRAMING_PER_BODY_BYTE = 8  # allowed on top: one byte in a chunk of its own needs five
# Parsed at once. It is the tolerance for the extensions of chunks, because the parser does not tell where it is.
PIECE_BYTES = 32 * 1024
MOST_PIPELINED = 16  # waiting requests of one connection; Norce and usual proxies send none

UNLIMITED_PATH = b"/livez"  # answered however many requests run


def _answer(status: bytes, code: bytes, message: bytes, fields: bytes = b"") -> bytes:
    body = b'{"code":"%s","message":"%s"}' % (code, message)
    return b"HTTP/1.1 %s\r\n%scontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        status, fields, len(body), body,
    )  # fmt: skip


OVERLOADED = _answer(
    b"503 Service Unavailable", b"overloaded", b"Nothing was stored. Please send it again.", b"retry-after: 5\r\n"
)
OVERLOADED_AND_CLOSED = OVERLOADED.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
TOO_SLOW = _answer(
    b"408 Request Timeout", b"request-timeout", b"The body did not arrive in time.", b"connection: close\r\n"
)

_UPGRADE_FIELDS = frozenset((b"upgrade", b"http2-settings"))


class Part(Enum):
    """The part of a request that comes next on a connection."""

    HEAD = "head"  # the rest of a head that has begun
    BODY = "body"  # the rest of a body and its trailers
    NOTHING = "nothing"  # the last request is complete, or none has begun


def _nothing() -> None:
    """Do nothing."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits, and a 503 while too many requests run.

    On a connection whose caller has been identified before, that 503 takes a fifth of the cost of an accept. On others
    `endpoints` refuses, after it has identified the caller.

    Args:
        load: The requests that run; None for a port without a limit on them.
        receive_seconds: The time for a whole request, from its first byte.
    """

    def __init__(
        self,
        *arguments: Any,
        connections: ConnectionTable | None = None,
        load: Load | None = None,
        receive_seconds: float = LONGEST_REQUEST_SECONDS,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._connections = ConnectionTable() if connections is None else connections
        self._load = load
        self._receive_seconds = receive_seconds
        self.deadline = inf  # of what the caller has to do next
        self.write_deadline = inf  # for the caller to take what was written
        self._reads = Part.NOTHING
        self._overhead = 0  # received bytes of a head, or not of a body
        self._trailer_bytes = 0
        self._is_deaf = False  # drops what comes, because the connection ends
        self._is_identified = False
        self._is_proxied = False
        self._is_refusing = False
        self._discards_body = False
        self._body_bytes = 0  # received, of the request that is being read
        self._running: RequestResponseCycle | None = None
        self._keeps_alive = False  # after the request that is being read
        self._received = b""
        self._behind_offer = b""  # to be read next: a request that offered an upgrade, without the offer
        self._offered_at: float | None = None  # the moment of the first byte of that request

    # --- from the transport -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_HeadBuffer(transport, self._finish))  # type: ignore[arg-type]
        transport.set_write_buffer_limits(0)  # `pause_writing` is called as soon as anything stays unsent
        self.deadline = time.monotonic() + LONGEST_HEAD_SECONDS
        peer = self.client[0] if self.client else None
        connected = transport.get_extra_info("socket")  # None without one, as in memory
        descriptor = 0 if connected is None else connected.fileno()
        self._is_proxied = self._connections.opened(self, peer, descriptor)

    def data_received(self, data: bytes) -> None:
        if len(data) <= PIECE_BYTES:
            self._read_piece(data)
        else:
            begin, size = 0, len(data)
            while begin < size and not self._is_deaf:
                end = begin + max(PIECE_BYTES, self._announced_bytes() if self._reads is Part.BODY else 0)
                self._read_piece(data[begin:end])
                begin = end
        if self._is_identified:
            self._hold_body()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_deadline = time.monotonic() + LONGEST_UNREAD_SECONDS

    def resume_writing(self) -> None:
        super().resume_writing()
        self.write_deadline = inf

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the answer if the caller closed its side after a whole request."""
        if self._is_deaf or self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        self._note_hang_up()  # a caller that has gone looks the same
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_deaf = True
        self._note_hang_up()
        self.pipeline.clear()
        super().connection_lost(exc)
        if self._running is not None:  # uvicorn does the same for the last request only
            self._running.disconnected = True
            self._running.message_event.set()
        self._connections.closed(self)
        self._break_cycles()

    # --- from the parser ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_deaf:
            return
        super().on_message_begin()
        began = time.monotonic() if self._offered_at is None else self._offered_at
        self._offered_at = None
        self._reads = Part.HEAD
        self.deadline = began + min(LONGEST_HEAD_SECONDS, self._receive_seconds)
        self.scope[RECEIVED_AT] = began  # type: ignore[literal-required]
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._connections.busy(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reads is not Part.HEAD:  # a field of a trailer never counts as a header
            self._trailer_bytes += len(name) + len(value)
            if self._trailer_bytes > LARGEST_FRAMING_BYTES and not self._is_deaf:
                self._cut("framing")
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        self._reads = Part.BODY
        if len(self.headers) > MOST_FIELDS or self._overhead > LARGEST_HEAD_BYTES < self._head_bytes():
            self._cut("head")
            return
        self._overhead = self._trailer_bytes = self._body_bytes = 0
        if self._offers_upgrade():
            return
        self.deadline = self.scope[RECEIVED_AT] + self._receive_seconds  # type: ignore[literal-required]
        if self._is_identified and self._load is not None and self._load.is_full() and self._may_refuse():
            self._is_refusing = True
            if self.expect_100_continue:  # the caller sends no body before it is asked to
                self._refuse(keep_alive=False)
            return
        if len(self.pipeline) >= MOST_PIPELINED:
            self._connections.on_limit("pipelined-requests")
            self._is_deaf = True
            self.deadline = inf
            self.pipeline[0][0].keep_alive = False  # the connection ends with the last answer that is due
            return
        super().on_headers_complete()
        self._discards_body = False
        self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False  # until the request is complete
        if self._is_proxied and not self._is_identified:
            self._connections.forwarded(self, self.headers)

    def on_body(self, body: bytes) -> None:
        self._overhead = max(0, self._overhead - (1 + FRAMING_PER_BODY_BYTE) * len(body))
        self._body_bytes += len(body)
        if not (self._is_refusing or self._discards_body or self._is_deaf):
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_deaf or self._offers_upgrade():
            return
        self._reads = Part.NOTHING
        self._overhead = 0
        self.deadline = inf
        self._connections.release_body(self)
        if self._is_refusing:
            self._refuse(keep_alive=self.parser.should_keep_alive())
            return
        super().on_message_complete()
        if not self.cycle.response_started:  # with a head that says that the connection ends
            self.cycle.keep_alive = self._keeps_alive

    # --- from the application -----------------------------------------------------------------------------------------

    def note_identified(self) -> None:
        """Note that the sender of the running request is known."""
        if not self._is_identified:
            self._is_identified = True
            self._connections.identified(self)
            self._hold_body()

    def note_refusal(self) -> None:
        """Drop the body of the running request as it comes, and give way to other connections."""
        self.discard_body()
        self._connections.idle(self)

    def discard_body(self) -> None:
        """Drop the body of the running request as it comes, and do not wait for it."""
        if self.cycle.more_body:
            self._discards_body = True
            self._connections.release_body(self)
            self.deadline = inf  # the answer ends the connection
            self.cycle.body = bytearray()
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Go on with the next request. In place of uvicorn's, which makes a timer for each answer."""
        self.transport.flush()  # type: ignore[attr-defined]
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._reads is Part.NOTHING:
            self._wait_for_request()

    # --- from the server, and from `ConnectionTable` ------------------------------------------------------------------

    def shutdown(self) -> None:
        self._keeps_alive = False
        super().shutdown()

    def expire(self, now: float) -> None:
        """End the connection, because its caller is overdue at `now`."""
        if self._is_deaf or self.write_deadline <= now:
            if self.write_deadline <= now:
                self._connections.on_limit("unread-answer")
            self.drop()
        elif self._reads is Part.NOTHING:  # no request has begun
            self.transport.close()
        else:
            self._connections.on_limit("request-time")
            self._end_body(TOO_SLOW)

    def refuse_body(self) -> None:
        """Answer 503 in place of waiting for the rest of the body."""
        self._end_body(OVERLOADED_AND_CLOSED)

    def drop(self) -> None:
        self._is_deaf = True
        self.deadline = self.write_deadline = inf
        self.transport.abort()

    # --- our own ------------------------------------------------------------------------------------------------------

    def _read_piece(self, data: bytes) -> None:
        while data and not self._is_deaf:
            self._received, self._behind_offer = data, b""
            self._overhead += len(data)
            super().data_received(data)
            if self._overhead > LARGEST_FRAMING_BYTES and not self._is_deaf:
                if self._reads is not Part.HEAD:
                    self._cut("framing")
                elif self._overhead > LARGEST_HEAD_BYTES or len(self.headers) > MOST_FIELDS:
                    self._cut("head")
            data = self._behind_offer

    def _head_bytes(self) -> int:
        """Return the size of a head that ends in the piece that is being parsed."""
        return self._overhead - len(self._received) + self._received.find(b"\r\n\r\n")

    def _hold_body(self) -> None:
        """Note the size of an unfinished body. Those of unknown callers take no room from it."""
        if self._reads is Part.BODY and not (self._is_deaf or self._discards_body or self._is_refusing):
            self._connections.hold_body(self, self._body_bytes)

    def _announced_bytes(self) -> int:
        """Return how many bytes of the body follow by its length. They need no limit here."""
        return next((int(value) for name, value in self.headers if name == b"content-length"), 0) - self._body_bytes

    def _break_cycles(self) -> None:
        """Free the memory of a lost connection now. The garbage collector runs rarely."""
        self.transport.end_writing()  # type: ignore[attr-defined]
        if self.scope is not None:
            self.scope.pop(CONNECTION, None)  # type: ignore[misc]
        for cycle in (self.cycle, self._running):
            if cycle is not None:
                cycle.scope.pop(CONNECTION, None)  # type: ignore[misc]
                cycle.on_response = _nothing

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _end_body(self, answer: bytes) -> None:
        """End the connection, with an answer if the running request waits for its body."""
        cycle = self._running
        if self._reads is not Part.BODY or self._is_refusing or cycle is not self.cycle or cycle.response_started:
            self.drop()
            return
        cycle.disconnected = True  # the application sees that the caller is gone, and its answer is not sent
        cycle.message_event.set()
        self.transport.write(answer)
        self.transport.close()

    def _wait_for_request(self) -> None:
        self.deadline = time.monotonic() + self.timeout_keep_alive
        self._connections.idle(self)

    def _finish(self, transport: asyncio.Transport) -> None:
        """Close the connection after what was written.

        While the caller may be sending, go on reading for a moment.
        """
        is_complete = self._reads is Part.NOTHING and not self._is_deaf
        self._is_deaf = True
        self._connections.release_body(self)
        self._connections.idle(self)
        if is_complete:
            self.deadline = inf  # `write_deadline` limits the rest
            transport.close()
        else:
            self.deadline = time.monotonic() + LINGER_SECONDS
            transport.write_eof()
            transport.resume_reading()

    def _cut(self, limit: str) -> None:
        self._connections.on_limit(limit)
        self.drop()

    def _refuse(self, *, keep_alive: bool) -> None:
        assert self._load is not None
        self._load.note_refusal()
        self.transport.write(OVERLOADED)
        if keep_alive:
            self._is_refusing = False
            self._wait_for_request()
        else:
            self.transport.close()

    def _may_refuse(self) -> bool:
        return self.cycle.response_complete and self.url != UNLIMITED_PATH

    def _note_hang_up(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.scope.pop(ON_HANG_UP, _nothing)()  # type: ignore[misc]

    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _unsupported_upgrade_warning(self) -> None:
        """Read the request as if it offered no upgrade (RFC 9110, 7.8).

        uvicorn calls this when the parser has stopped behind a head that offers one. A new parser gets the same head
        again without the offer, and everything that came behind it. The old one ignores what follows a request of
        HTTP/1.0 or with `Connection: close`.
        """
        stopped = sys.exc_info()[1]
        if self._is_deaf or not self._offers_upgrade() or not isinstance(stopped, httptools.HttpParserUpgrade):
            return
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option for option in value.split(b",") if option.strip().lower() not in _UPGRADE_FIELDS]
                head += [b"connection: " + b",".join(options)] if options else []
            elif name not in _UPGRADE_FIELDS:
                head.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._offered_at = self.scope[RECEIVED_AT]  # type: ignore[literal-required]
        self._behind_offer = b"\r\n".join(head) + b"\r\n\r\n" + self._received[stopped.args[0] :]


class _HeadBuffer:
    """A transport that writes the head and the body of a response in one packet.

    It holds the head until the body comes, which the server writes right after it. So the caller wakes once.

    Args:
        finish: Closes the connection. Nothing is written after it.
    """

    # Not 100 (Continue): it has no body, and the caller waits for it.
    FINAL = (b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 4", b"HTTP/1.1 5")

    def __init__(self, transport: asyncio.Transport, finish: Callable[[asyncio.Transport], None]) -> None:
        self._transport = transport
        self._finish = finish
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(self.FINAL) and data.endswith(b"\r\n\r\n"):
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        if not self.is_closing():
            self.flush()
            self.is_closing = lambda: True
            finish = self._finish
            self.end_writing()
            finish(self._transport)

    def abort(self) -> None:
        self.end_writing()
        self._transport.abort()

    def end_writing(self) -> None:
        """Ignore what an application still writes."""
        self.write = self._finish = _ignore  # type: ignore[method-assign, assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _ignore(_: object) -> None:
    """Do nothing."""
