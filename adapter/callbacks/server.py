"""The HTTP server of all ports: uvicorn, with our protocol and table of connections.

`protocol` has the limits of a connection, `connection_table` those of all together, and `limits` those of requests.
"""

import asyncio
import contextlib
import functools
import gc
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from adapter.callbacks.connection_table import MOST_UNIDENTIFIED, ConnectionTable
from adapter.callbacks.endpoints import CallbackEndpoint
from adapter.callbacks.limits import MOST_AT_ONCE, Load
from adapter.callbacks.protocol import LONGEST_REQUEST_SECONDS, UNLIMITED_PATH, GuardedProtocol

CALLBACKS = "/api/v1/callbacks/orders/"
CALLBACK_PATH = f"{CALLBACKS}{{order_id}}/{{callback}}"

# uvloop accepts one connection per listening descriptor and turn of its loop, and a busy loop makes a hundred turns a
# second: new connections waited 15 s while those that were in were served. Each further descriptor accepts one more.
CONNECTIONS_A_TURN = 64
MOST_UNACCEPTED = 4096

# In either direction of a connection; the kernel doubles it. By itself it would keep up to 6 MB that the service does
# not read, and 4 MB that the caller does not.
SOCKET_BUFFER_BYTES = 64 * 1024

MOST_CONNECTIONS = 10_000  # of the public port
MOST_BODY_BYTES = 64 * 1024 * 1024  # in unfinished bodies
MOST_OPERATIONS_CONNECTIONS = 32  # of the operations port, and of its Unix socket
OPERATIONS_CONNECTIONS_A_TURN = 4
DESCRIPTORS_OF_AN_ATTEMPT = 4  # connections to Norce and to the destination, in use and kept
# Listeners, connections that are accepted before others are closed, operations, the ledger, the log.
OTHER_DESCRIPTORS = 2 * CONNECTIONS_A_TURN + 2 * (OPERATIONS_CONNECTIONS_A_TURN + MOST_OPERATIONS_CONNECTIONS) + 100
ENOUGH_DESCRIPTORS = 65_536
SPARE_DESCRIPTORS = 2 * CONNECTIONS_A_TURN + 50  # accepted before others are closed, and a few of the service's own

SWITCH_SECONDS = 0.0005
COLLECT_AFTER = 20_000  # more objects made than freed


class PortInUse(Exception):
    """A port is taken. Choose another `server.port` or `operations.port`, or free it."""


class DescriptorsTooFew(Exception):
    """A limit on open files that is too low. Raise it: `LimitNOFILE`, `ulimit -n`."""


def ensure_descriptors(attempts: int) -> None:
    """Raise the limit on open files as far as the service can use it.

    Args:
        attempts: Deliveries that may run at once: all slots, and one for each further queue.

    Raises:
        DescriptorsTooFew: the hard limit is too low for the callers and destinations that are served at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_DESCRIPTORS)
    if soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS allows less than its hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MOST_AT_ONCE + own_descriptors(attempts)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise DescriptorsTooFew(f"the limit on open files is {limit}, but {needed} are needed; raise it (ulimit -n)")


def own_descriptors(attempts: int) -> int:
    """Return how many descriptors the service needs beside the connections of the public port."""
    return OTHER_DESCRIPTORS + DESCRIPTORS_OF_AN_ATTEMPT * attempts


def public_connections(
    attempts: int, *, max_body_bytes: int, trusted_proxies: Iterable[str], on_limit: Callable[[str], None]
) -> ConnectionTable:
    """Return the connections of the public port, with descriptors left for the service."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = sys.maxsize
    return ConnectionTable(
        most=max(1, min(MOST_CONNECTIONS, limit - own_descriptors(attempts))),
        most_unidentified=MOST_UNIDENTIFIED,
        most_body_bytes=max(MOST_BODY_BYTES, 2 * max_body_bytes),
        # At the limit, the loop would close every connection that waits to be accepted.
        highest_descriptor=limit - SPARE_DESCRIPTORS,
        trusted_proxies=trusted_proxies,
        on_limit=on_limit,
    )


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 is any free one. Raises `PortInUse`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is given, because asyncio sets TCP_NODELAY only on a socket that names it.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for size in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # its connections have the same
            listening.setsockopt(socket.SOL_SOCKET, size, SOCKET_BUFFER_BYTES)
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


async def livez(_request: Request) -> Response:
    """Answer that the event loop runs."""
    return JSONResponse({"alive": True})


class PublicApp:
    """The ASGI application of the public port.

    Callbacks bypass the router, which takes ten times as long to find the same. There is no Starlette around it: the
    endpoint answers its own errors.
    """

    def __init__(self, endpoint: CallbackEndpoint, other_routes: Sequence[BaseRoute]) -> None:
        self._endpoint = endpoint
        self.router = Router(
            routes=[Route(CALLBACK_PATH, endpoint), Route(UNLIMITED_PATH.decode(), livez), *other_routes],
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
    *,
    connections: ConnectionTable | None = None,
    load: Load | None = None,
    keep_alive: timedelta = timedelta(seconds=75),
    receive_timeout: timedelta = timedelta(seconds=LONGEST_REQUEST_SECONDS),
    connections_a_turn: int = CONNECTIONS_A_TURN,
) -> AsyncIterator[None]:
    """Serve an application on a listening socket, until its last answer.

    Args:
        connections: The table of its connections, with their limits. Without one their number has no limit.
        load: The requests that run, with their limit.
        keep_alive: How long an idle connection is kept.
        receive_timeout: The time for a whole request, from its first byte.
        connections_a_turn: How many connections are accepted in one turn of the loop.
    """
    connections = ConnectionTable() if connections is None else connections
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=functools.partial(  # type: ignore[arg-type]
            GuardedProtocol, connections=connections, load=load, receive_seconds=receive_timeout.total_seconds()
        ),
        backlog=MOST_UNACCEPTED,
        timeout_keep_alive=keep_alive.total_seconds(),  # type: ignore[arg-type]  # only our protocol uses it
        timeout_graceful_shutdown=10,
    )
    server = _Server(config)
    sockets = [listening, *(listening.dup() for _ in range(connections_a_turn - 1))]
    task = asyncio.create_task(server.serve(sockets=sockets))
    while not server.started:
        if task.done():
            await task
            raise RuntimeError("the HTTP server ended before it started")
        await asyncio.sleep(0.005)
    expiring = asyncio.create_task(connections.expire_regularly())
    try:
        with rare_garbage_collection():
            yield
    finally:
        server.should_exit = True
        try:
            await task
        finally:
            expiring.cancel()


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone: `app` handles them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
