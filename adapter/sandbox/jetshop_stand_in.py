"""
A stand-in for what `jetshop` exports to: for tests, and for trying things out without a shop.

It keeps to this project's own contract (`contract.yaml`) and knows nothing of Jetshop beyond it. It is strict where a
shop would be lenient, since its work is to find our mistakes: a request that breaks the contract is answered 400 and
remembered in `violations`. And it is unreliable on request (`script`, `down`, `missing_until`), because what it proves
is that an order arrives exactly once (`exports`) although the connection breaks at the worst moment.

It is an ASGI application. Over TCP (`serve`, `serving`) a dropped connection is a connection that really closes; under
`httpx.ASGITransport`, where there is none, it surfaces as the `httpx.RemoteProtocolError` that a client would see.
State is plain and unlocked: one event loop writes, other threads may read it, and may add to the script.
"""

import asyncio
import re
import socket
import threading
from base64 import b64encode
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import unquote

import httpx
import jsonschema_rs
import msgspec
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from adapter.handlers.jetshop.contract import contract, misses

EXTENSION = "norce_adapter.drop"  # where the server of `serve` leaves the function that breaks a connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """
    What goes wrong with one request: the effect where it `acts`, the wait, then `drop`, or `status` and `body`.

    With none of the three it is merely slow: after the wait it acts and answers as ever.
    """

    acts: bool = False  # the effect takes place first, whatever the answer says
    delay_seconds: float = 0.0  # ends early where the client goes away
    drop: bool = False  # the connection closes in place of an answer
    status: int | None = None
    code: str = "scripted"  # of the Problem that comes with the status
    details: tuple[str, ...] = ()  # the paths that the Problem names
    retry_after: str | None = None
    location: str | None = None  # of a redirect
    body: bytes | None = None  # in place of the usual one, or of a Problem where there is a status


DROPPED_BEFORE = Fault(drop=True)
DROPPED_AFTER = Fault(acts=True, drop=True)
MALFORMED = Fault(acts=True, body=b'{"orderKey": "')
BROKEN = Fault(acts=True, body=b'{"orderKey": "?", "result": "perhaps"}')


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A PUT that was taken, in the order of their arrival."""

    order_key: str
    idempotency_key: str
    document: dict[str, Any]
    result: Literal["created", "updated", "unchanged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A request against the contract, and what it broke there; places, not values."""

    method: str
    path: str
    rules: tuple[str, ...]


class JetshopStandIn:
    """One shop. `username` and `password` are what it takes, `shop_id` is the only one that it knows."""

    def __init__(self, *, shop_id: str = "1", username: str = "stand-in", password: str = "stand-in") -> None:  # noqa: S107 -- of a stand-in
        self.shop_id = shop_id
        self.documents: dict[str, dict[str, Any]] = {}
        self.journal: list[Accepted] = []
        self.violations: list[Violation] = []
        self.requests = 0  # all of them, refused or not
        self.down: Fault | None = None  # what every request meets while it is set
        self._authorization = "Basic " + b64encode(f"{username}:{password}".encode()).decode()
        self._script: defaultdict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self._missing: dict[str, int] = {}
        self._numbers: dict[str, str] = {}
        self._keys: dict[str, tuple[str, dict[str, Any]]] = {}
        self._operations = [_Operation(*operation) for operation in _operations()]

    # --- what a test tells it, and asks it ---

    def script(self, order_key: str, *faults: Fault, method: Literal["PUT", "GET"] = "PUT") -> None:
        """The next requests for this order meet these faults, one each; those after them meet none."""
        self._script[method, order_key].extend(faults)

    def missing_until(self, order_key: str, calls: int) -> None:
        """The shop does not have this order yet: the next so many PUTs are answered 404."""
        self._missing[order_key] = calls

    def exports(self, order_key: str) -> int:
        """How often something came of a request for this order: created or updated. Exactly once is 1."""
        return sum(entry.order_key == order_key and entry.result != "unchanged" for entry in self.journal)

    def order_number(self, order_key: str) -> str:
        """The shop's number for an order; the same whenever it is asked."""
        return self._numbers.setdefault(order_key, f"JS-{1001 + len(self._numbers)}")

    # --- how it is reached ---

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
        """Listens on the running event loop, and gives its URL. Port 0 is a free one. No signal is touched."""
        listener = socket.create_server((host, port))
        config = uvicorn.Config(
            self, http=_DroppingProtocol, ws="none", lifespan="off", log_config=None, access_log=False
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ready = asyncio.create_task(server.ready.wait())
        try:
            await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                raise RuntimeError("the stand-in could not listen")
            yield f"http://{host}:{listener.getsockname()[1]}"
        finally:
            ready.cancel()
            server.should_exit = True
            await serving
            listener.close()

    @contextmanager
    def serving(self, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
        """Listens on an event loop in a thread of its own, and gives its URL."""
        started: deque[str] = deque()
        ready, stop = threading.Event(), threading.Event()

        async def main() -> None:
            async with self.serve(host, port) as url:
                started.append(url)
                ready.set()
                await asyncio.to_thread(stop.wait)

        def run() -> None:
            try:
                asyncio.run(main())
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="jetshop-stand-in", daemon=True)
        thread.start()
        ready.wait()
        try:
            if not started:
                raise RuntimeError("the stand-in could not listen")
            yield started[0]
        finally:
            stop.set()
            thread.join()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the stand-in takes HTTP only, not {scope['type']}")
        try:
            response = await self._answer(Request(scope, receive), receive)
        except _Drop:
            await _drop(scope, receive)
            return
        await response(scope, receive, send)

    # --- what becomes of a request ---

    async def _answer(self, request: Request, receive: Receive) -> Response:
        self.requests += 1
        body = await request.body()
        operation, values = self._operation(request)
        rules = operation.violations(request, body) if operation else ["no such path and method"]
        if operation is None or rules:
            path = request.url.path
            self.violations.append(Violation(method=request.method, path=path, rules=tuple(rules)))
            return _problem(400, "contract-violated", "; ".join(rules))
        if request.headers.get("authorization") != self._authorization:
            return _problem(401, "unauthorized", "who is calling?", {"www-authenticate": 'Basic realm="stand-in"'})
        if values["shopId"] != self.shop_id:
            return _problem(403, "wrong-shop", "these credentials are of another shop")
        order_key = values["orderKey"]

        def act() -> Response:
            if operation.method == "GET":
                return self._read(order_key)
            return self._write(order_key, request.headers["idempotency-key"], msgspec.json.decode(body))

        return await self._with_fault(self._next_fault(operation.method, order_key), act, receive)

    def _operation(self, request: Request) -> tuple["_Operation | None", dict[str, str]]:
        # The raw path: in the decoded one, a slash within an order key could not be told from one between two values.
        path = cast("bytes", request.scope.get("raw_path") or request.scope["path"].encode()).decode("latin-1")
        for operation in self._operations:
            if operation.method == request.method and (match := operation.path.fullmatch(path)):
                return operation, {name: unquote(value) for name, value in match.groupdict().items()}
        return None, {}

    def _next_fault(self, method: str, order_key: str) -> Fault:
        if self.down is not None:
            return self.down
        faults = self._script[method, order_key]
        return faults.popleft() if faults else Fault()

    async def _with_fault(self, fault: Fault, act: Callable[[], Response], receive: Receive) -> Response:
        acted = act() if fault.acts else None
        if fault.delay_seconds:
            await _client_gone(receive, within=fault.delay_seconds)
        if fault.drop:
            raise _Drop
        if fault.status is not None and fault.body is not None:
            return Response(fault.body, fault.status, media_type="application/json")
        if fault.status is not None:
            headers = {"retry-after": fault.retry_after, "location": fault.location}
            return _problem(
                fault.status, fault.code, "as scripted", {k: v for k, v in headers.items() if v}, fault.details
            )
        usual = acted or act()
        if fault.body is not None:
            return Response(fault.body, usual.status_code, media_type="application/json")
        return usual

    def _read(self, order_key: str) -> Response:
        if order_key not in self.documents:
            return _problem(404, "not-found", "nothing is stored for this order")
        return JSONResponse(self.documents[order_key])

    def _write(self, order_key: str, idempotency_key: str, document: dict[str, Any]) -> Response:
        if self._missing.get(order_key, 0) > 0:
            self._missing[order_key] -= 1
            return _problem(404, "not-found", "the shop does not have this order")
        if self._keys.setdefault(idempotency_key, (order_key, document)) != (order_key, document):
            return _problem(409, "key-reused", "this Idempotency-Key came with another document")
        stored = self.documents.get(order_key)
        result: Literal["created", "updated", "unchanged"] = (
            "created" if stored is None else "unchanged" if stored == document else "updated"
        )
        self.documents[order_key] = document
        self.journal.append(
            Accepted(order_key=order_key, idempotency_key=idempotency_key, document=document, result=result)
        )
        answer = {"orderKey": order_key, "orderNumber": self.order_number(order_key), "result": result}
        return JSONResponse(answer, 201 if result == "created" else 200)


class _Operation:
    """One operation of the contract, as a guard."""

    def __init__(self, template: str, method: str, parameters: list[dict[str, Any]], body: str | None) -> None:
        self.method = method
        self.path = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template)))
        self.body = body
        self._headers = [
            (parameter["name"], jsonschema_rs.validator_for(parameter["schema"]))
            for parameter in parameters
            if parameter["in"] == "header" and parameter["required"]
        ]

    def violations(self, request: Request, body: bytes) -> list[str]:
        rules = ["the contract has no query"] if request.url.query else []
        for name, schema in self._headers:
            if not schema.is_valid(request.headers.get(name)):
                rules.append(f"the header {name} is missing or breaks its schema")
        if self.body is None:
            return rules + (["this operation has no body"] if body else [])
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            rules.append("the body is not declared as application/json")
        try:
            return rules + misses(self.body, msgspec.json.decode(body))
        except msgspec.DecodeError:
            return [*rules, "the body is not JSON"]


def _operations() -> Iterator[tuple[str, str, list[dict[str, Any]], str | None]]:
    for template, item in contract()["paths"].items():
        for method in item.keys() & {"get", "put", "post", "patch", "delete"}:
            content = item[method].get("requestBody", {}).get("content", {})
            body = content["application/json"]["schema"]["$ref"].rpartition("/")[2] if content else None
            yield template, method.upper(), item.get("parameters", []) + item[method].get("parameters", []), body


def _problem(
    status: int, code: str, message: str, headers: dict[str, str] | None = None, paths: tuple[str, ...] = ()
) -> Response:
    problem: dict[str, Any] = {"code": code, "message": message}
    if paths:
        problem["details"] = [{"path": path, "message": message} for path in paths]
    return JSONResponse(problem, status, headers)


# --- a connection that breaks ---------------------------------------------------------------------------------------


class _Drop(Exception):
    """In place of an answer, the connection closes."""


async def _drop(scope: Scope, receive: Receive) -> None:
    drop = scope.get("extensions", {}).get(EXTENSION)
    if drop is None:
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
    drop()
    # The server takes an application that returns without an answer for a fault, unless it knows that the client left.
    while (await receive())["type"] != "http.disconnect":
        pass


async def _client_gone(receive: Receive, within: float) -> None:
    """Waits, for as long as somebody waits for the answer."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    waiting = asyncio.create_task(gone())
    try:
        await asyncio.wait({waiting}, timeout=within)
    finally:
        waiting.cancel()


class _DroppingProtocol(H11Protocol):
    """Tells the application how to break its own connection, which ASGI has no message for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_drop(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            await app(
                {**scope, "extensions": {**scope.get("extensions", {}), EXTENSION: transport.abort}},
                receive,
                send,
            )

        self.app = with_drop


class _Server(uvicorn.Server):
    """Tells when it listens, and leaves the process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # At once, and not when the slowest of the faults has run out.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
