"""
uvicorn's HTTP protocol with its gaps closed: a request's head has an end in time and in size, and so has the crowd.

uvicorn limits neither head (measured: one of 5 MB is taken, one that drips in a byte a second keeps its connection for
ever); here the connection is closed. The body's limits are in `endpoints`, which knows what to answer. Beyond
`MOST_AT_ONCE` requests at a time the next is refused as soon as it has come, for a fifth of what an accept costs: what
could only wait until its caller has gone must not take the time of those that can be served. Who waits for a plugin or
for Norce takes no time, and counts as one of `MOST_WAITING` alone: a slow plugin must not shut the intake.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapter.callbacks import IS_WHOLE

LONGEST_HEAD_SECONDS = 10.0
LARGEST_HEAD_BYTES = 32 * 1024
MOST_AT_ONCE = 500  # a tenth of a second's worth of accepts on one core
MOST_WAITING = 2000  # each holds an order
REFUSAL_BODY = b'{"code":"overloaded","message":"Nothing was stored. Please send it again."}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(REFUSAL_BODY), REFUSAL_BODY)
)
# How the head of an answer begins; 100 (Continue) has no body, and is waited for.
FINAL = (b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 4", b"HTTP/1.1 5")


class GuardedProtocol(HttpToolsProtocol):
    """
    Closes a connection whose next request's head is not complete in time, or grows beyond what a caller needs, and
    answers 503 where too many requests are being served; `refused` is then told. `waiting`: how many of them only wait.
    """

    def __init__(
        self,
        *arguments: Any,
        refused: Callable[[], None] = lambda: None,
        waiting: Callable[[], int] = lambda: 0,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._refused = refused
        self._waiting = waiting
        self._refusing = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_InOnePiece(transport))  # type: ignore[arg-type]
        self._start_head()
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > LARGEST_HEAD_BYTES:
                self._close()
            elif self._head_timer is None:  # only now: most heads have come whole, and need none
                self._start_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:  # a further request on the same connection
            self._start_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and len(self.tasks) >= MOST_AT_ONCE and self._is_crowded():
            self._refusing = True
            if self.expect_100_continue:  # it waits for a word before it sends its body
                self._refuse(keep_alive=False)
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refusing:
            self._refuse(keep_alive=self.parser.should_keep_alive())
            return
        super().on_message_complete()
        self.scope[IS_WHOLE] = True  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        self.transport.end()  # type: ignore[attr-defined]
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def _is_crowded(self) -> bool:
        return len(self.tasks) >= MOST_WAITING or len(self.tasks) - self._waiting() >= MOST_AT_ONCE

    def _refuse(self, *, keep_alive: bool) -> None:
        self.transport.write(REFUSAL)
        if not keep_alive:
            self.transport.close()
        else:
            self._refusing = False
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        self._refused()

    def _start_head(self) -> None:
        self._in_head = True
        self._head_bytes = 0

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(LONGEST_HEAD_SECONDS, self._close)

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._end_head()
        if not self.transport.is_closing():
            self.transport.close()


class _InOnePiece:
    """
    A transport that keeps the head of an answer until its body comes, which the server writes right after it: one
    packet then, and the caller is woken once.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(FINAL) and data.endswith(b"\r\n\r\n"):
            self._head = data
            return
        self._transport.write(data)

    def end(self) -> None:
        """An answer is complete, also one that has no body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.end()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
