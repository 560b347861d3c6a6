"""The operations application: health, metrics and commands. Keep it off the internet.

Alive means that the event loop answers. Ready means that the service can receive callbacks: the ledger can be written,
and the service is not stopping.
"""

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import structlog
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from adapter.callbacks.connection_table import ConnectionTable, note_identified
from adapter.callbacks.server import (
    MOST_OPERATIONS_CONNECTIONS,
    OPERATIONS_CONNECTIONS_A_TURN,
    http_server,
    listen,
    livez,
    url_of,
)
from adapter.config import Config
from adapter.deliveries.backfill import BackfillResult
from adapter.ledger.backfill import BackfillStep
from adapter.ledger.commands import Commands, NoSuchCommand
from adapter.ledger.queries import Author, Overview, Queries
from adapter.ledger.store import Store, StoreUnavailable
from adapter.metrics import Metrics
from adapter.norce.client import NorceError
from adapter.operations.health import Health
from adapter.operations.host_check import HostCheck
from adapter.operations.unix_socket import listening_at
from adapter.plugin import Secret
from adapter.reconciliation.events import LogProgress
from adapter.reconciliation.orders import OrdersProgress

P = TypeVar("P", LogProgress, OrdersProgress)

log = structlog.get_logger(__name__)

LARGEST_COMMAND_BYTES = 1024 * 1024


class Reconcile(Protocol):
    """The type of `Reconciliation.run`, which yields the progress after each page."""

    def __call__(self, *, since: datetime | None, dry_run: bool) -> AsyncIterator[LogProgress]: ...


class ReconcileOrders(Protocol):
    """The type of `OrderReconciliation.run`, which yields the progress after each page."""

    def __call__(self, *, since: datetime | None, by: Author | None) -> AsyncIterator[OrdersProgress]: ...


class ReconcileCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of the command `reconcile`."""

    since: datetime | None = None
    dry_run: bool = False


class ReconcileOrdersCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of the command `reconcile-orders`. `by` brings the missing orders."""

    since: datetime | None = None
    by: Author | None = None


RunBackfill = Callable[[BackfillStep], Awaitable[BackfillResult]]


class CommandTooLarge(Exception):
    """The body of a command has more than `LARGEST_COMMAND_BYTES`."""


class OperationsEndpoints:
    """The endpoints of the operations application.

    Args:
        configured: The ids of the configured queues; None if every queue is configured.
        wake: Called after each command, because a command may create work for the dispatcher.
    """

    def __init__(
        self,
        health: Health,
        metrics: Metrics,
        store: Store,
        *,
        commands: Commands,
        reconcile: Reconcile,
        reconcile_orders: ReconcileOrders,
        backfill: RunBackfill,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._store = store
        self._commands = commands
        self._reconcile = reconcile
        self._reconcile_orders = reconcile_orders
        self._backfill = backfill
        self._wake = wake

    def for_socket(self) -> Starlette:
        """Return the application for the Unix socket. Commands need no token."""
        return self._application(lambda _request: None)

    def for_port(self, token: Secret | None, names: Collection[str] = ()) -> Starlette:
        """Return the application for the port. It answers to these names and to every IP address.

        Commands need the bearer token. Without a configured token, the port refuses every command.
        """
        host_check = Middleware(HostCheck, names=names)
        return self._application(lambda request: _refuse_without_token(request, token), host_check)

    def _application(self, refuse: Callable[[Request], Response | None], *middleware: Middleware) -> Starlette:
        async def command(request: Request) -> Response:
            if (refusal := refuse(request)) is not None:
                return refusal
            note_identified(request.scope)
            return await self.run_command(request)

        return Starlette(
            routes=[
                Route("/livez", livez),
                Route("/readyz", self.readyz),
                Route("/startupz", self.startupz),
                Route("/metrics", self.show_metrics),
                Route("/commands/{name}", command, methods=["POST"]),
            ],
            middleware=middleware,
        )

    async def readyz(self, _request: Request) -> Response:
        checks = self._health.results()
        is_ready = self._health.is_ready(checks)
        content = {"ready": is_ready, "held": self._health.is_held, "checks": checks}
        return JSONResponse(content, 200 if is_ready else 503)

    async def startupz(self, _request: Request) -> Response:
        return JSONResponse({"started": self._health.started}, 200 if self._health.started else 503)

    async def show_metrics(self, _request: Request) -> Response:
        await asyncio.to_thread(self._update_metrics)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _update_metrics(self) -> None:
        try:
            with self._store.read_connection() as connection:
                overview = Queries(connection).overview(self._store.clock())
        except DBAPIError as error:  # the other metrics are needed most while the store fails
            log.warning("ledger_unreadable", error_type=type(error).__name__)
            overview = Overview(by_route={}, oldest_waiting_seconds={}, paused={})
        self._metrics.set_ledger_gauges(
            deliveries=overview.by_route,
            oldest_waiting_seconds=overview.oldest_waiting_seconds,
            paused=overview.paused,
            store_available=not self._store.failing,
        )

    async def run_command(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            body = await _read_body(request)
            if name == "reconcile":
                events = msgspec.json.decode(body, type=ReconcileCommand)
                found = self._reconcile(since=events.since, dry_run=events.dry_run)
                return self._stream(name, found, lambda each: 0 if events.dry_run else each.missed)
            if name == "reconcile-orders":
                orders = msgspec.json.decode(body, type=ReconcileOrdersCommand)
                compared = self._reconcile_orders(since=orders.since, by=orders.by)
                return self._stream(name, compared, lambda each: each.brought)
            if name == "backfill":
                answer = msgspec.to_builtins(await self._backfill(msgspec.json.decode(body, type=BackfillStep)))
            else:
                answer = await self._commands.run(name, body)
        except NoSuchCommand as error:
            names = sorted((*error.names, "backfill", "reconcile", "reconcile-orders"))
            return _refusal(404, "command-not-found", f"There is no command {name}; there are: {', '.join(names)}.")
        except CommandTooLarge:
            return _refusal(413, "too-large", f"A command has at most {LARGEST_COMMAND_BYTES} bytes.")
        except ValueError as error:
            return _refusal(400, "bad-request", str(error))
        except StoreUnavailable:
            return _refusal(503, "store-unavailable", "Nothing was done. Please send it again.")
        except ClientDisconnect:
            return Response(status_code=400)  # the caller has gone
        log.info("command_done", command=name, count=answer if isinstance(answer, int) else answer["changed"])
        self._wake()
        return JSONResponse(answer)

    def _stream(self, command: str, pages: AsyncIterator[P], changed: Callable[[P], int]) -> Response:
        """Answer with a line for the progress after each page.

        If the run ends early, the last line has the error.
        """

        async def lines() -> AsyncIterator[bytes]:
            changes: dict[tuple[str, str], int] = {}
            try:
                async for found in pages:
                    changes[found.merchant, getattr(found, "channel", "")] = changed(found)
                    yield msgspec.json.encode(found) + b"\n"
                    if self._health.stopping:  # a shutdown does not wait for a long list
                        yield _error_line("the service stops; run the command again to continue")
                        break
            except (NorceError, StoreUnavailable) as error:
                yield _error_line(str(error))
            log.info("command_done", command=command, count=sum(changes.values()))

        return StreamingResponse(lines(), media_type="application/x-ndjson")


def _error_line(message: str) -> bytes:
    return msgspec.json.encode({"error": message}) + b"\n"


def _refuse_without_token(request: Request, token: Secret | None) -> Response | None:
    if token is None:
        return _refusal(403, "forbidden", "This port takes no commands: set operations.token in the configuration.")
    # Starlette decodes headers as Latin-1; compare the bytes that were sent.
    given = request.headers.get("authorization", "").encode("latin-1")
    if not hmac.compare_digest(given, b"Bearer " + token.reveal().encode()):
        return _refusal(401, "unauthorized", "The bearer token is not the one of operations.token.")
    return None


def _refusal(status: int, code: str, message: str) -> Response:
    log.warning("command_refused", status=status, code=code)
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse({"code": code, "message": message}, status, headers)


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_COMMAND_BYTES:
            raise CommandTooLarge
    return bytes(body)


async def serve_operations(
    stack: contextlib.AsyncExitStack, config: Config, endpoints: OperationsEndpoints, on_limit: Callable[[str], None]
) -> str:
    """Serve operations on the port and the Unix socket. Return the address of the port."""

    async def serve(app: ASGIApp, listening: socket.socket) -> None:
        connections = ConnectionTable(most=MOST_OPERATIONS_CONNECTIONS, on_limit=on_limit)
        server = http_server(app, listening, connections=connections, connections_a_turn=OPERATIONS_CONNECTIONS_A_TURN)
        await stack.enter_async_context(server)

    given = config.operations
    port = listen(given.host, given.port)
    stack.callback(port.close)
    if given.socket is not None:
        await serve(endpoints.for_socket(), stack.enter_context(listening_at(Path(given.socket))))
    await serve(endpoints.for_port(given.token, {given.host, *given.hosts}), port)
    return url_of(port)
