"""
uvicorn's HTTP protocol with its gaps closed: the head of a request has an end in time and in size.

uvicorn limits neither (measured: a head of 5 MB is taken, one that drips in a byte a second keeps its connection for
ever). The body's limits are in `endpoints`, which knows what to answer; here the connection is closed.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapter.callbacks import IS_WHOLE

LONGEST_HEAD_SECONDS = 10.0
LARGEST_HEAD_BYTES = 32 * 1024


class GuardedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's head is not complete in time, or grows beyond what a caller needs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.scope[IS_WHOLE] = True  # type: ignore[literal-required]

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

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
