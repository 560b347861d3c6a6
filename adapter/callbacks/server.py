"""The HTTP server of both ports: uvicorn with limits on heads and on load.

uvicorn limits neither the size nor the duration of a request's head (measured: it takes one of 5 MB, and one that sends
a byte a second keeps its connection for ever). Here such a connection is closed. The limits of the body are in
`endpoints`, which knows what to answer.

uvicorn also drops the body of a request that offers an upgrade (`Upgrade: h2c`, which Java's client sends by default),
and the answer to a caller that has closed its side of the connection. Here such requests are answered like all others.

Beyond `MOST_AT_ONCE` requests at a time the next is refused with a 503 as soon as it has come, for a fifth of the cost
of an accept. Requests that only wait for a plugin or for Norce take no time and count towards `MOST_WAITING` alone, so
that a slow plugin does not shut out notifications.
"""

import asyncio
import contextlib
import functools
import gc
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import httptools
import structlog
import uvicorn
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapter.callbacks.endpoints import BODY_IS_COMPLETE, ON_HANG_UP, RECEIVED_AT, CallbackEndpoint
from adapter.metrics import Metrics

log = structlog.get_logger(__name__)

CALLBACKS = "/api/v1/callbacks/orders/"
CALLBACK_PATH = f"{CALLBACKS}{{order_id}}/{{callback}}"

LONGEST_HEAD_SECONDS = 10.0
LARGEST_HEAD_BYTES = 32 * 1024
MOST_AT_ONCE = 500  # as many accepts as one core does in a tenth of a second
MOST_WAITING = 2000  # each holds an order
REFUSAL_BODY = b'{"code":"overloaded","message":"Nothing was stored. Please send it again."}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(REFUSAL_BODY), REFUSAL_BODY)
)
WARN_EVERY_SECONDS = 10
# uvloop accepts one connection per listening descriptor and turn of its loop, and a busy loop makes a hundred turns a
# second: new connections waited 15 s while those that were in were served. Each further descriptor accepts one more.
CONNECTIONS_A_TURN = 64
MOST_UNACCEPTED = 4096

DESCRIPTORS_OF_AN_ATTEMPT = 4  # connections to Norce and to the destination, in use and kept
OTHER_DESCRIPTORS = 128
ENOUGH_DESCRIPTORS = 65_536  # idle connections of callers take more than the service needs at once

SWITCH_SECONDS = 0.0005
COLLECT_AFTER = 20_000  # more objects made than freed


class PortInUse(Exception):
    """A port is taken. Choose another `server.port` or `operations.port`, or free it."""


class DescriptorsTooFew(Exception):
    """A limit on open files that is too low. Raise it: `LimitNOFILE`, `ulimit -n`."""


def ensure_descriptors(*, attempts: int, are_verdicts_configured: bool) -> None:
    """Raise the limit on open files as far as the service can use it.

    Args:
        attempts: Deliveries that may run at once: all slots, and one for each further queue.
        are_verdicts_configured: Whether there are validations or hooks, whose callers may wait.

    Raises:
        DescriptorsTooFew: the hard limit is too low for the callers and destinations that are served at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_DESCRIPTORS)
    if soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS allows less than its hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    callers = MOST_AT_ONCE + MOST_WAITING * are_verdicts_configured
    needed = 3 * CONNECTIONS_A_TURN + callers + DESCRIPTORS_OF_AN_ATTEMPT * attempts + OTHER_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise DescriptorsTooFew(f"the limit on open files is {limit}, but {needed} are needed; raise it (ulimit -n)")


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 is any free one. Raises `PortInUse`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is given, because asyncio sets TCP_NODELAY only on a socket that names it.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise PortInUse(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listening


def url_of(listening: socket.socket) -> str:
    """Return a URL that reaches a listening socket from this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{host}:{port}"


_REFUSALS = {  # of the router
    404: ("not-found", "There is nothing at this address."),
    405: ("method-not-allowed", "Allow lists the methods of this address."),
}


class PublicApp:
    """The ASGI application of the public port.

    Callbacks bypass the router, which takes ten times as long to find the same. There is no Starlette around it: the
    endpoint answers its own errors.
    """

    def __init__(self, endpoint: CallbackEndpoint, other_routes: Sequence[BaseRoute]) -> None:
        self._endpoint = endpoint
        self.router = Router(
            routes=[Route(CALLBACK_PATH, endpoint), *other_routes],
            redirect_slashes=False,  # no document says that Norce follows redirects
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path.startswith(CALLBACKS):
            order_id, _, callback = path[len(CALLBACKS) :].partition("/")
            if order_id and callback and "/" not in callback:
                scope["path_params"] = {"order_id": order_id, "callback": callback}
                await self._endpoint(scope, receive, send)
                return
        scope["app"] = self  # with this, the router raises its refusals
        try:
            await self.router(scope, receive, send)
        except HTTPException as error:
            code, message = _REFUSALS[error.status_code]
            response = JSONResponse({"code": code, "message": message}, error.status_code, error.headers)
            await response(scope, receive, send)


@contextlib.asynccontextmanager
async def http_server(
    app: ASGIApp,
    listening: socket.socket,
    on_refusal: Callable[[], None] = lambda: None,
    waiting: Callable[[], int] = lambda: 0,
    keep_alive: timedelta = timedelta(seconds=75),
) -> AsyncIterator[None]:
    """Serve an application on a listening socket, until its last answer.

    Args:
        keep_alive: How long an idle connection is kept.
        on_refusal: Called for each request that is refused because too many are running.
        waiting: Returns how many of the running requests only wait.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=functools.partial(GuardedProtocol, on_refusal=on_refusal, waiting=waiting),  # type: ignore[arg-type]
        backlog=MOST_UNACCEPTED,
        timeout_keep_alive=keep_alive.total_seconds(),  # type: ignore[arg-type]  # it only reaches `call_later`
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
        with rare_garbage_collection():
            yield
    finally:
        server.should_exit = True
        await task


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone: `app` handles them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def report_refusals(metrics: Metrics) -> Callable[[], None]:
    """Return a function that counts a refused request, and warns at most once in ten seconds."""
    warned_at = float("-inf")

    def on_refusal() -> None:
        nonlocal warned_at
        metrics.callbacks_refused.inc()
        if time.monotonic() > warned_at + WARN_EVERY_SECONDS:
            warned_at = time.monotonic()
            log.warning("overloaded")

    return on_refusal


_UPGRADE_FIELDS = frozenset((b"upgrade", b"http2-settings"))


def _nothing() -> None:
    """Do nothing."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on heads, and a 503 while too many requests run."""

    def __init__(
        self,
        *arguments: Any,
        on_refusal: Callable[[], None] = lambda: None,
        waiting: Callable[[], int] = lambda: 0,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._on_refusal = on_refusal
        self._waiting = waiting
        self._is_refusing = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._is_in_head = False
        self._received = b""
        self._behind_offer = b""  # to be read next: a request that offered an upgrade, without the offer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_HeadBuffer(transport))  # type: ignore[arg-type]
        self._begin_head()
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        while data:
            self._received, self._behind_offer = data, b""
            super().data_received(data)
            if self._is_in_head:
                self._head_bytes += len(data)
                if self._head_bytes > LARGEST_HEAD_BYTES:
                    self._close()
                elif self._head_timer is None:  # started only here, because most heads come in one piece
                    self._start_timer()
            data = self._behind_offer

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[RECEIVED_AT] = time.monotonic()  # type: ignore[literal-required]
        if not self._is_in_head:  # a further request on the same connection
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        if self._offers_upgrade():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and len(self.tasks) >= MOST_AT_ONCE and self._is_crowded():
            self._is_refusing = True
            if self.expect_100_continue:  # the caller sends no body before it is asked to
                self._refuse(keep_alive=False)
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade():
            return
        if self._is_refusing:
            self._refuse(keep_alive=self.parser.should_keep_alive())
            return
        super().on_message_complete()
        self.scope[BODY_IS_COMPLETE] = True  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the answer if the caller closed its side after a whole request."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        self._note_hang_up()  # a caller that has gone looks the same
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._note_hang_up()
        super().connection_lost(exc)

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
        if not self._offers_upgrade() or not isinstance(stopped, httptools.HttpParserUpgrade):
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
        self._behind_offer = b"\r\n".join(head) + b"\r\n\r\n" + self._received[stopped.args[0] :]

    def _is_crowded(self) -> bool:
        return len(self.tasks) >= MOST_WAITING or len(self.tasks) - self._waiting() >= MOST_AT_ONCE

    def _refuse(self, *, keep_alive: bool) -> None:
        self.transport.write(REFUSAL)
        if not keep_alive:
            self.transport.close()
        else:
            self._is_refusing = False
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        self._on_refusal()

    def _begin_head(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(LONGEST_HEAD_SECONDS, self._close)

    def _end_head(self) -> None:
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._end_head()
        if not self.transport.is_closing():
            self.transport.close()


class _HeadBuffer:
    """A transport that writes the head and the body of a response in one packet.

    It holds the head until the body comes, which the server writes right after it. So the caller wakes once.
    """

    # Not 100 (Continue): it has no body, and the caller waits for it.
    FINAL = (b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 4", b"HTTP/1.1 5")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
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
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@contextlib.contextmanager
def short_thread_slices() -> Iterator[None]:
    """Let a thread that computes release the interpreter after half a millisecond.

    Use this where plugins answer shoppers: with Python's 5 ms, four such threads delayed an answer by seconds. It costs
    a tenth of the accepts, so it stays off where no plugin answers.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@contextlib.contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Spare the garbage collector most of its work while requests are served.

    A decoded order is hundreds of objects. With Python's threshold every second request starts a collection, and every
    hundredth of those walks all imported modules: 50 us for each accept, and pauses of 40 ms (measured). What exists at
    the start is set apart. What requests leave is freed without the collector, or at its next, rarer run.
    """
    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
