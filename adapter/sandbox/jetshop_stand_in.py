"""A stand-in for Jetshop, the destination of the handler `jetshop`.

It implements this project's own contract (`contract.yaml`) and knows nothing else about Jetshop. It is stricter than a
shop: it answers 400 to a request that breaks the contract and remembers it in `violations`. It fails on request
(`script`, `down`), so that tests can show that an order arrives exactly once (`exports`).

The stand-in is an ASGI application. Over TCP (`serve`) a dropped connection really closes. With `httpx.ASGITransport`
it raises the `httpx.RemoteProtocolError` that a client would see. The state has no lock: one event loop writes it,
other threads may read it and add to the script.
"""

import asyncio
import re
from base64 import b64encode
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Generator, MutableMapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from socket import socket
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import unquote

import httpx
import msgspec
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from adapter.callbacks.server import listen, url_of
from adapter.handlers.jetshop.contract import violations

_PATH = re.compile(r"/shops/(?P<shopId>[^/]+)/orders/(?P<orderKey>[^/]+)/payment-information")
EXTENSION = "norce_adapter.drop"  # the ASGI extension of `serve`: a function that breaks the connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault of one request.

    First comes the effect, if it `acts`; then the delay; then a drop or an answer. A fault with neither `drop`,
    `status` nor `body` is only slow: after the delay it acts and answers as usual.
    """

    acts: bool = False
    delay_seconds: float = 0.0  # ends early if the client disconnects
    drop: bool = False  # close the connection instead of answering
    status: int | None = None
    code: str = "scripted"  # of the Problem that comes with the status
    details: tuple[str, ...] = ()  # the paths that the Problem names
    retry_after: str | None = None
    location: str | None = None  # of a redirect
    body: bytes | None = None  # instead of the usual body or a Problem


DROPPED_BEFORE = Fault(drop=True)
DROPPED_AFTER = Fault(acts=True, drop=True)
MALFORMED = Fault(acts=True, body=b'{"orderKey": "')
BROKEN = Fault(acts=True, body=b'{"orderKey": "?", "result": "perhaps"}')


class Accepted(NamedTuple):
    """An accepted PUT."""

    order_key: str
    idempotency_key: str
    document: dict[str, Any]
    result: Literal["created", "updated", "unchanged"]


class Violation(NamedTuple):
    """A request that breaks the contract, without its values."""

    method: str
    path: str
    rules: tuple[str, ...]


class JetshopStandIn:
    """A shop that accepts one username, one password and one shop id.

    Attributes:
        documents: The stored document of each order.
        journal: The accepted PUTs, in the order of arrival.
        violations: The requests that broke the contract.
        requests: The number of all requests.
        down: The fault of every request, as long as it is set.
    """

    def __init__(self, *, shop_id: str = "1", username: str = "stand-in", password: str = "stand-in") -> None:  # noqa: S107 -- of a stand-in
        self.shop_id = shop_id
        self.documents: dict[str, dict[str, Any]] = {}
        self.journal: list[Accepted] = []
        self.violations: list[Violation] = []
        self.requests = 0
        self.down: Fault | None = None
        self._authorization = "Basic " + b64encode(f"{username}:{password}".encode()).decode()
        self._script: defaultdict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self._numbers: dict[str, str] = {}
        self._keys: dict[str, tuple[str, dict[str, Any]]] = {}

    def script(self, order_key: str, *faults: Fault, method: Literal["PUT", "GET"] = "PUT") -> None:
        """Give each of the next requests for this order one of these faults."""
        self._script[method, order_key].extend(faults)

    def exports(self, order_key: str) -> int:
        """Return how many requests for this order had an effect: exactly once is 1."""
        return sum(entry.order_key == order_key and entry.result != "unchanged" for entry in self.journal)

    def order_number(self, order_key: str) -> str:
        """Return the shop's number of an order. It never changes."""
        return self._numbers.setdefault(order_key, f"JS-{1001 + len(self._numbers)}")

    @asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[str]:
        """Listen on a port of 127.0.0.1, by default any free one, and yield the URL."""
        with listen("127.0.0.1", port) as listening:
            config = uvicorn.Config(
                self, http=_DroppingProtocol, ws="none", lifespan="off", log_config=None, access_log=False
            )
            server = _StandInServer(config)
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            try:
                await server.ready.wait()
                yield url_of(listening)
            finally:
                server.should_exit = True
                await serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the stand-in serves HTTP only, not {scope['type']}")
        try:
            response = await self._respond(Request(scope, receive), receive)
        except _Drop:
            await _drop(scope, receive)
            return
        await response(scope, receive, send)

    async def _respond(self, request: Request, receive: Receive) -> Response:
        self.requests += 1
        body = await request.body()
        # Match the raw path: the decoded one does not show whether a slash belongs to an order key.
        path = cast("bytes", request.scope.get("raw_path") or request.scope["path"].encode()).decode("latin-1")
        match = _PATH.fullmatch(path) if request.method in ("GET", "PUT") else None
        rules = _violations(request, body) if match else ["no such path and method"]
        if match is None or rules:
            self.violations.append(Violation(request.method, request.url.path, tuple(rules)))
            return _problem(400, "contract-violated", "; ".join(rules))
        if request.headers.get("authorization") != self._authorization:
            return _problem(401, "unauthorized", "unknown caller", {"www-authenticate": 'Basic realm="stand-in"'})
        if unquote(match["shopId"]) != self.shop_id:
            return _problem(403, "wrong-shop", "these credentials belong to another shop")
        order_key = unquote(match["orderKey"])

        def act() -> Response:
            if request.method == "GET":
                return self._get(order_key)
            return self._put(order_key, request.headers["idempotency-key"], msgspec.json.decode(body))

        faults = self._script[request.method, order_key]
        fault = self.down or (faults.popleft() if faults else Fault())
        return await self._with_fault(fault, act, receive)

    async def _with_fault(self, fault: Fault, act: Callable[[], Response], receive: Receive) -> Response:
        response = act() if fault.acts else None
        if fault.delay_seconds:
            await _wait(receive, fault.delay_seconds)
        if fault.drop:
            raise _Drop
        if fault.status is not None:
            given = {"retry-after": fault.retry_after, "location": fault.location}
            headers = {name: value for name, value in given.items() if value}
            response = _problem(fault.status, fault.code, "as scripted", headers, fault.details)
        response = response or act()
        if fault.body is not None:
            return Response(fault.body, response.status_code, media_type="application/json")
        return response

    def _get(self, order_key: str) -> Response:
        if order_key not in self.documents:
            return _problem(404, "not-found", "nothing is stored for this order")
        return JSONResponse(self.documents[order_key])

    def _put(self, order_key: str, idempotency_key: str, document: dict[str, Any]) -> Response:
        if self._keys.setdefault(idempotency_key, (order_key, document)) != (order_key, document):
            return _problem(409, "key-reused", "this Idempotency-Key came with another document")
        stored = self.documents.get(order_key)
        result: Literal["created", "updated", "unchanged"] = (
            "created" if stored is None else "unchanged" if stored == document else "updated"
        )
        self.documents[order_key] = document
        self.journal.append(Accepted(order_key, idempotency_key, document, result))
        answer = {"orderKey": order_key, "orderNumber": self.order_number(order_key), "result": result}
        return JSONResponse(answer, 201 if result == "created" else 200)


def _violations(request: Request, body: bytes) -> list[str]:
    rules = ["the contract has no query"] if request.url.query else []
    if request.method == "GET":
        return rules + (["this operation has no body"] if body else [])
    if not 16 <= len(request.headers.get("idempotency-key", "")) <= 128:
        rules.append("the header Idempotency-Key is missing or breaks its schema")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        rules.append("the body is not declared as application/json")
    try:
        return rules + violations("PaymentInformation", msgspec.json.decode(body))
    except msgspec.DecodeError:
        return [*rules, "the body is not JSON"]


def _problem(
    status: int, code: str, message: str, headers: dict[str, str] | None = None, paths: tuple[str, ...] = ()
) -> Response:
    problem: dict[str, Any] = {"code": code, "message": message}
    if paths:
        problem["details"] = [{"path": path, "message": message} for path in paths]
    return JSONResponse(problem, status, headers)


# --- a connection that breaks ---------------------------------------------------------------------------------------


class _Drop(Exception):
    """The connection closes instead of an answer."""


async def _drop(scope: Scope, receive: Receive) -> None:
    drop = scope.get("extensions", {}).get(EXTENSION)
    if drop is None:
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
    drop()
    # uvicorn logs an error if an application returns without an answer before the disconnect is known.
    await _disconnected(receive)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _wait(receive: Receive, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await _disconnected(receive)


class _DroppingProtocol(H11Protocol):
    """A protocol that gives the application a function to break the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_drop(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            extensions = {**scope.get("extensions", {}), EXTENSION: transport.abort}
            await app({**scope, "extensions": extensions}, receive, send)

        self.app = with_drop


class _StandInServer(uvicorn.Server):
    """A server that leaves signals alone, and does not wait for slow answers when it stops."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
