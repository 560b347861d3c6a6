"""
uvicorn's HTTP protocol with its gaps closed: a request's head has an end in time and in size, and so has the crowd.

uvicorn limits neither head (measured: one of 5 MB is taken, one that drips in a byte a second keeps its connection for
ever); here the connection is closed. The body's limits are in `endpoints`, which knows what to answer. Beyond
`MOST_AT_ONCE` requests at a time the next is refused as soon as it has come, for a fifth of what an accept costs: what
could only wait until its caller has gone must not take the time of those that can be served. Who waits for a plugin or
for Norce takes no time, and counts as one of `MOST_WAITING` alone: a slow plugin must not shut the intake.
"""

import asyncio
import contextlib
import functools
import gc
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import structlog
import uvicorn
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapter.callbacks.endpoints import BODY_IS_COMPLETE, ON_HANG_UP, CallbackEndpoint
from adapter.metrics import Metrics

log = structlog.get_logger(__name__)

LONGEST_HEAD_SECONDS = 10.0
LARGEST_HEAD_BYTES = 32 * 1024
MOST_AT_ONCE = 500  # a tenth of a second's worth of accepts on one core
MOST_WAITING = 2000  # each holds an order
REFUSAL_BODY = b'{"code":"overloaded","message":"Nothing was stored. Please send it again."}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(REFUSAL_BODY), REFUSAL_BODY)
)
CALLBACKS = "/api/v1/callbacks/orders/"
CALLBACK_PATH = f"{CALLBACKS}{{order_id}}/{{callback}}"
SWITCH_SECONDS = 0.0005
COLLECTED_AFTER = 20_000  # objects more than were freed since
# uvloop takes one connection from a listening descriptor each time round its loop, and a busy loop goes round a hundred
# times a second: newcomers waited 15 s, while who was in already was served. With so many descriptors, so many at once.
CONNECTIONS_A_TURN = 64
MOST_UNACCEPTED = 4096
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
        self.scope[BODY_IS_COMPLETE] = True  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        self.transport.end()  # type: ignore[attr-defined]
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        if self.cycle is not None and not self.cycle.response_complete and ON_HANG_UP in self.cycle.scope:
            self.cycle.scope[ON_HANG_UP]()  # type: ignore[literal-required]
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


class PortInUse(Exception):
    """A port cannot be listened on. Choose another in `server.port` or `operations.port`, or stop who has it."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises `PortInUse`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio sends small answers at once (TCP_NODELAY) only on a socket that says so.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise PortInUse(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listening


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{host}:{port}"


def public_port(endpoint: CallbackEndpoint, beside: Sequence[BaseRoute]) -> Router:
    """What the public port has. A router and no Starlette around it: the endpoint answers its errors itself."""
    return Router(
        routes=[Route(CALLBACK_PATH, endpoint), *beside],
        redirect_slashes=False,  # whether Norce follows redirects is documented nowhere
        default=JSONResponse({"code": "not-found", "message": "There is nothing at this address."}, 404),
    )


def callbacks_first(endpoint: CallbackEndpoint, router: Router) -> ASGIApp:
    """The router, and before it what nearly everybody asks for: by the same rule, for a tenth of the time."""

    async def public(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path.startswith(CALLBACKS):
            order_id, _, callback = path[len(CALLBACKS) :].partition("/")
            if order_id and callback and "/" not in callback:
                scope["path_params"] = {"order_id": order_id, "callback": callback}
                await endpoint(scope, receive, send)
                return
        await router(scope, receive, send)

    return public


@contextlib.asynccontextmanager
async def served(
    app: ASGIApp,
    listening: socket.socket,
    refused: Callable[[], None] = lambda: None,
    waiting: Callable[[], int] = lambda: 0,
) -> AsyncIterator[None]:
    """
    An app behind a listening socket, from the first connection to the last answer. `refused` hears of each 503 for want
    of room; `waiting` says how many requests do nothing but wait.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=functools.partial(GuardedProtocol, refused=refused, waiting=waiting),  # type: ignore[arg-type]
        backlog=MOST_UNACCEPTED,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config)
    sockets = [listening, *(listening.dup() for _ in range(CONNECTIONS_A_TURN - 1))]
    task = asyncio.create_task(server.serve(sockets=sockets))
    while not server.started:
        if task.done():
            await task
            raise RuntimeError("the HTTP server ended before it started")
        await asyncio.sleep(0.005)
    try:
        with rare_collections():
            yield
    finally:
        server.should_exit = True
        await task


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def count_refusals(metrics: Metrics) -> Callable[[], None]:
    """Counts what is refused unread, and says so at most once in ten seconds."""
    said_at = float("-inf")

    def refused() -> None:
        nonlocal said_at
        metrics.refused.inc()
        if time.monotonic() > said_at + 10:
            said_at = time.monotonic()
            log.warning("overloaded")

    return refused


@contextlib.contextmanager
def short_thread_slices() -> Iterator[None]:
    """
    Where plugins answer shoppers: a thread of theirs that computes gives the interpreter back after half a millisecond.

    At Python's own 5 ms, four such threads left an answer waiting for seconds. It costs a tenth of the accepts, so it
    stays as it is where nobody asks plugins for answers.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """
    Keeps the garbage collector from most of its work while requests are served.

    A decoded order is hundreds of objects: at Python's own threshold every other request starts a collection, and each
    hundredth of these walks all that was ever imported. Measured, 50 us an accept and stalls of 40 ms. What there is at
    the start is set apart; what requests leave is freed without a collector, or waits for a rarer one.
    """
    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECTED_AFTER, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
