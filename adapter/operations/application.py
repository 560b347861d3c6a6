"""
The operations port: health, metrics and commands, for the people and machines that run the service. Not for the
internet.

Alive means that the event loop answers. Ready means that callbacks can be taken: the ledger can be written and the
service is not stopping. A destination that is down does not make the service unready: the intake must go on.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import msgspec
import structlog
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from adapter.ledger.commands import Commands, NoSuchCommand
from adapter.ledger.queries import Overview, Queries
from adapter.ledger.store import Store, StoreUnavailable
from adapter.metrics import Metrics
from adapter.norce.client import NorceError
from adapter.plugin import Secret
from adapter.reconciliation.events import Reconciled

log = structlog.get_logger(__name__)

LARGEST_COMMAND_BYTES = 1024 * 1024
LINES = "application/x-ndjson"


class Reconcile(Protocol):
    """`norce.reconciliation.Reconciliation.run`."""

    def __call__(self, *, since: datetime | None, dry_run: bool) -> AsyncIterator[Reconciled]: ...


class Reconciling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the command `reconcile` takes."""

    since: datetime | None = None
    dry_run: bool = False


@dataclass(kw_only=True)
class Health:
    """What the probes tell. `checks` are asked at every `/readyz`, by name: True where all is well."""

    started: bool = False
    stopping: bool = False
    checks: dict[str, Callable[[], bool]] = field(default_factory=dict)

    def ready(self) -> dict[str, bool]:
        return {"started": self.started, "not_stopping": not self.stopping} | {n: c() for n, c in self.checks.items()}


def console(
    health: Health,
    metrics: Metrics,
    store: Store,
    token: Secret | None = None,
    *,
    wake: Callable[[], None] = lambda: None,
    reconcile: Reconcile | None = None,
) -> Starlette:
    """
    The app behind the operations port. Commands need the bearer token; without one, every command is refused. `wake` is
    called after each: there may be new work. `reconcile` reads Norce's event logs, and tells how far it is.
    """
    commands = Commands(store)

    async def livez(_request: Request) -> Response:
        return JSONResponse({"alive": True})

    async def readyz(_request: Request) -> Response:
        checks = health.ready()
        return JSONResponse({"ready": all(checks.values()), "checks": checks}, 200 if all(checks.values()) else 503)

    async def startupz(_request: Request) -> Response:
        return JSONResponse({"started": health.started}, 200 if health.started else 503)

    def read() -> None:
        try:
            with store.read_connection() as connection:
                overview = Queries(connection).overview(store.clock())
        except DBAPIError as error:  # a failing store is when all other metrics are needed most
            log.warning("ledger_unreadable", error_type=type(error).__name__)
            overview = Overview(by_route={}, oldest_waiting_seconds={}, paused={})
        metrics.show(
            deliveries=overview.by_route,
            oldest_waiting_seconds=overview.oldest_waiting_seconds,
            paused=overview.paused,
            store_available=not store.failing,
        )

    async def show_metrics(_request: Request) -> Response:
        await asyncio.to_thread(read)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def stranger(request: Request) -> Response | None:
        """What who may give no commands is answered."""
        if token is None:
            return _refused(403, "forbidden", "No command is taken: set operations.token in the configuration.")
        # As it came over the wire: Starlette reads headers as Latin-1.
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + token.reveal().encode()):
            return _refused(401, "unauthorized", "The bearer token is not the one of operations.token.")
        return None

    async def command(request: Request) -> Response:
        if (refused := stranger(request)) is not None:
            return refused
        name = request.path_params["name"]
        try:
            body = await _body(request)
            if name == "reconcile" and reconcile is not None:
                asked = msgspec.json.decode(body, type=Reconciling)
                log.info("command_done", command=name, count=0)
                progress = reconcile(since=asked.since, dry_run=asked.dry_run)
                return StreamingResponse(_told(progress, health), media_type=LINES)
            answer = await commands.do(name, body)
        except NoSuchCommand as error:
            return _refused(404, "command-not-found", str(error))
        except _TooLarge:
            return _refused(413, "too-large", f"A command has at most {LARGEST_COMMAND_BYTES} bytes.")
        except ValueError as error:
            return _refused(400, "bad-request", str(error))
        except StoreUnavailable:
            return _refused(503, "store-unavailable", "Nothing was done. Please send it again.")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        log.info("command_done", command=name, count=answer if isinstance(answer, int) else answer["changed"])
        wake()
        return JSONResponse(answer)

    return Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/startupz", startupz),
            Route("/metrics", show_metrics),
            Route("/commands/{name}", command, methods=["POST"]),
        ]
    )


async def _told(progress: AsyncIterator[Reconciled], health: Health) -> AsyncIterator[bytes]:
    """A line after each page; where it ends early, the last one says why. No shutdown waits for a long log."""
    try:
        async for each in progress:
            yield msgspec.json.encode(each) + b"\n"
            if health.stopping:
                yield (
                    msgspec.json.encode({"error": "the service stops; the next time begins where this one did"}) + b"\n"
                )
                return
    except (NorceError, StoreUnavailable) as error:
        yield msgspec.json.encode({"error": str(error)}) + b"\n"


class _TooLarge(Exception):
    """The body of a command goes beyond what is read."""


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_COMMAND_BYTES:
            raise _TooLarge
    return bytes(body)


def _refused(status: int, code: str, message: str) -> Response:
    log.warning("command_refused", status=status, code=code)
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse({"code": code, "message": message}, status, headers)
