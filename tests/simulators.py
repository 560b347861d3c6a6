"""Simulators for tests: in this process with a client and a receiver of callbacks, or on a port.

`Shop.ask` checks every answer against `norce.api`: its status is declared, and its body fits its schema.
"""

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import httpx
import jsonschema_rs
from anyio.from_thread import start_blocking_portal

from adapter.callbacks.server import http_server, listen, url_of
from adapter.identifiers import Channel
from adapter.norce.api import BY_NAME, CHANNEL, MERCHANT, schema
from adapter.sandbox.caller import Caller
from adapter.sandbox.norce import Simulator
from tests import ORDERS, PATIENCE

T = TypeVar("T")
SAMPLE = json.loads((ORDERS / "order-api-request-sample.json").read_text("utf-8"))
COMPLETED = json.loads((ORDERS / "order-completed.json").read_text("utf-8"))
TOKEN = "a token"
PRICE = {"includingVat": 100.0, "excludingVat": 80.0}
UNDECLARED = {400, 404, 409}  # any operation may answer with these


@functools.cache
def validator(name: str) -> Any:
    return jsonschema_rs.validator_for(schema(name))


class ManualClock:
    """A clock that moves only when a test moves it, or sleeps."""

    def __init__(self) -> None:
        self.now = datetime(2026, 2, 3, 8, 0, tzinfo=UTC)
        self.slept: list[float] = []

    def __call__(self) -> datetime:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += timedelta(seconds=seconds)


class TickingClock:
    """The present time, but never the same twice, so that two changes of an order differ in time."""

    def __init__(self) -> None:
        self._last = datetime.now(UTC)

    def __call__(self) -> datetime:
        self._last = max(datetime.now(UTC), self._last + timedelta(milliseconds=1))
        return self._last


class Receiver:
    """A receiver of callbacks. Keeps the requests in `got`."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[httpx.Request], Any]] = {}
        self.got: list[httpx.Request] = []

    def to(self, path: str, answer: Any) -> str:
        """Return the URL of a callback with this answer: a response, JSON, or a function of the request."""
        self.answers[path] = answer if callable(answer) else lambda _request: answer
        return f"http://127.0.0.1:9{path}"

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.got.append(request)
        answer = self.answers.get(request.url.path, lambda _request: None)(request)
        if hasattr(answer, "__await__"):
            answer = await answer
        if isinstance(answer, httpx.Response):
            # A response can be sent only once.
            return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)
        return httpx.Response(200, json=answer)

    def bodies(self, path: str) -> list[Any]:
        return [json.loads(each.content) if each.content else None for each in self.got if each.url.path == path]


class Shop:
    """A client for one channel."""

    def __init__(
        self,
        simulator: Simulator,
        http: httpx.AsyncClient,
        loop: asyncio.Runner,
        receiver: Receiver,
        clock: ManualClock,
    ) -> None:
        self.simulator = simulator
        self.loop = loop
        self.http = http
        self.receiver = receiver
        self.clock = clock
        self.headers = {"authorization": f"Bearer {TOKEN}", MERCHANT: "norce", CHANNEL: "1"}

    def ask(
        self,
        name: str,
        body: Any = None,
        /,
        *,
        version: str | None = None,
        headers: dict[str, str] | None = None,
        query: Any = None,
        raw: bytes | None = None,
        status: int | None = None,
        **path: str,
    ) -> httpx.Response:
        """Call an operation, wait for its callbacks, check the answer and return it."""
        operation = BY_NAME[name]
        version = version or operation.versions[0]
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = self.http.build_request(
            operation.method,
            operation.url("http://simulator/checkout", version, **path),
            headers=self.headers | (headers or {}),
            params=query,
            content=content,
        )
        answer = self.loop.run(self.http.send(request))
        self.loop.run(self.simulator.wait_until_idle())
        if answer.is_success:
            assert answer.status_code in operation.answers
            wanted = operation.answers[answer.status_code]
            assert not (answer.content and wanted is None), "a body that is not declared"
        else:
            assert answer.status_code in {*operation.errors[version], *UNDECLARED}
            wanted = operation.error
        if answer.content:
            assert validator(wanted).is_valid(answer.json()), answer.text
        if status is not None:
            assert answer.status_code == status, answer.text
        return answer

    def create(self, order: Any = None, **members: Any) -> str:
        """Create an order, by default with two lines for 150 in the cart, and return its id."""
        items = [{"name": "Mössa", "quantity": 1, "total": {"includingVat": amount}} for amount in (100, 50)]
        default = {"currency": "SEK", "cart": {"reference": "7", "items": items}}
        return self.ask("create_order", (order or default) | members, status=201).json()["id"]

    def read(self, order_id: str, version: str = "v0") -> dict[str, Any]:
        return self.ask("read_order", version=version, order_id=order_id, status=200).json()

    def move(self, order_id: str, *statuses: str) -> None:
        for each in statuses:
            self.ask("put_state", {"currentStatus": each}, order_id=order_id, status=200)

    def pay(self, order_id: str, amount: float = 150, **members: Any) -> str:
        body = {"adapterId": "p", "amount": amount} | members
        return self.ask("add_payment", body, order_id=order_id, status=201).json()["id"]


@contextmanager
def shop(**given: Any) -> Iterator[Shop]:
    """Open a shop with a simulator of its own. The arguments are those of `Simulator`."""
    receiver, clock = Receiver(), ManualClock()
    given = {"token": TOKEN, "clock": clock, "sleep": clock.sleep, "seed": 1} | given
    with asyncio.Runner() as loop:
        simulator = Simulator(transport=httpx.MockTransport(receiver), **given)
        loop.run(simulator.__aenter__())
        http = httpx.AsyncClient(transport=httpx.ASGITransport(simulator.app))
        try:
            yield Shop(simulator, http, loop, receiver, clock)
        finally:
            loop.run(http.aclose())
            loop.run(simulator.__aexit__(None, None, None))


@contextmanager
def in_thread(context: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Enter an asynchronous context on an event loop in a thread of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(context) as value:
        yield value


class Served:
    """A simulator that listens on a port of this machine, in a thread."""

    def __init__(self, token: str, port: int = 0) -> None:
        self.simulator = Simulator(token=token, clock=TickingClock(), seed=3)
        self.caller = Caller(self.simulator, token, Channel("norce", "1"))
        with ExitStack() as stack:
            listening = stack.enter_context(listen("127.0.0.1", port))
            self.url = f"{url_of(listening)}/checkout"
            self._portal = stack.enter_context(start_blocking_portal())
            for each in (self.simulator, http_server(self.simulator.app, listening), self.caller):
                stack.enter_context(self._portal.wrap_async_context_manager(each))
            self._stack = stack.pop_all()

    def ask(self, name: str, body: Any = None, **path: str) -> Any:
        """Call an operation, wait for its callbacks, and return the answer."""
        return self.run(self.caller.ask(name, body, **path))  # type: ignore[arg-type]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work of the caller, wait for the callbacks, and return the result."""

        async def run_to_the_end() -> T:
            result = await work
            await self.simulator.wait_until_idle()
            return result

        return self._portal.start_task_soon(run_to_the_end).result(PATIENCE)

    def close(self) -> None:
        self._stack.close()
