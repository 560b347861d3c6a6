"""The network between a handler and a fake system, with the faults of a real one.

A fake system is an ASGI application, or a function that takes an `httpx.Request` and returns an `httpx.Response`. If it
has a list `effects`, that is what it has done, with one entry for each effect. Otherwise each write that it answers
with 2xx or 3xx is an effect.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, TypeAlias

import httpx

from adapter.outgoing import is_write, not_done

NORCE_HOST = "norce.test"
RETRY_AFTER = timedelta(seconds=120)
LATENCY_SECONDS = 0.001  # of each request, so that calls at the same time alternate
order_at_work: ContextVar[str | None] = ContextVar("order_at_work", default=None)  # the id of the order of a request

FakeSystem: TypeAlias = Callable[..., Any]


class NetworkFault(Enum):
    """The fourteen faults that a request can meet."""

    REFUSED = "the connection was refused", False, None
    RESET_BEFORE = "the connection broke before the system acted", False, None
    RESET_AFTER = "the connection broke after the system had acted", True, None
    STATUS_500 = "500 after the system had acted", True, 500
    STATUS_502_BEFORE = "502 from a gateway, and the system did not act", False, 502
    STATUS_502_AFTER = "502 from a gateway after the system had acted", True, 502
    STATUS_503_BEFORE = "503 from a gateway, and the system did not act", False, 503
    STATUS_503_AFTER = "503 from a gateway after the system had acted", True, 503
    STATUS_401 = "401", False, 401
    STATUS_422 = "422", False, 422
    STATUS_429 = "429 with Retry-After", False, 429
    HTML_WITH_200 = "a page of HTML with status 200, and the system did not act", False, 200
    SLOW = "no answer before the deadline, although the system acted", True, None
    KILLED_AFTER = "the process was killed after the system had acted", True, None

    def __init__(self, says: str, acts: bool, status: int | None) -> None:
        self.says = says
        self.acts = acts
        self.status = status


Faults: TypeAlias = Mapping[int, NetworkFault | None] | Iterable[NetworkFault | None]
"""Faults by the number of their request, from 0, or one for each request in turn; None is no fault."""


@dataclass(slots=True, kw_only=True)
class SentRequest:
    """A request of a handler, to a system or to Norce."""

    request: httpx.Request
    order_id: str | None  # of the delivery or verdict that sent it
    at: float  # in seconds since the beginning
    fault: NetworkFault | None
    status: int | None = None  # of the answer; None without one

    @property
    def text(self) -> str:
        """The method, the URL and the body."""
        return f"{self.request.method} {self.request.url} {self.request.content.decode(errors='replace')}"


class Network(httpx.AsyncBaseTransport):
    """The way of all requests of a handler.

    Args:
        app: The fake system.
        norce: Answers the requests to Norce.
        faults: The faults of the requests.
        not_done: Statuses that the system never sends after it has acted.
        timeout: Of the handler.
        quotes: Texts that the answers to refused requests quote, as those of real systems do.
    """

    def __init__(
        self,
        app: FakeSystem | None,
        norce: Callable[[httpx.Request], Awaitable[httpx.Response]],
        *,
        faults: Faults = (),
        not_done: Collection[int] = (),
        timeout: timedelta = timedelta(seconds=30),
        quotes: Iterable[str] = (),
    ) -> None:
        self.requests: list[SentRequest] = []
        self.failures: list[Exception] = []  # of the fake system
        self.killed: asyncio.Future[None] | None = None  # done once a fault has killed the process
        self.is_closed = False
        self._app = app
        self._is_asgi = app is not None and len(inspect.signature(app).parameters) == 3
        self._norce = norce
        self._faults = faults if isinstance(faults, Mapping) else dict(enumerate(faults))
        self._not_done = not_done
        self._timeout = timeout.total_seconds()
        self._refusal = f"This cannot be taken: {', '.join(quotes)}."
        self._counted: list[str] = []
        self._late: list[asyncio.Task[httpx.Response]] = []

    @property
    def effects(self) -> list[Any]:
        """The effects of all requests so far."""
        return [*self._counted, *getattr(self._app, "effects", ())]

    async def finish(self) -> None:
        """Wait until the system has acted on slow requests."""
        await asyncio.gather(*self._late, return_exceptions=True)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.is_closed:
            raise httpx.ConnectError("the process has ended")
        now, fault = asyncio.get_running_loop().time(), self._faults.get(len(self.requests))
        sent = SentRequest(request=request, order_id=order_at_work.get(), at=now, fault=fault)
        self.requests.append(sent)
        await request.aread()
        await asyncio.sleep(LATENCY_SECONDS)
        answer = await (self._act(request) if fault is None else self._meet(fault, request))
        sent.status = answer.status_code
        return answer

    async def _meet(self, fault: NetworkFault, request: httpx.Request) -> httpx.Response:
        if fault is NetworkFault.REFUSED:
            raise httpx.ConnectError("refused")
        if fault is NetworkFault.SLOW:  # the system goes on, even if the handler no longer waits
            self._late.append(late := asyncio.create_task(self._act(request, after=self._timeout / 2)))
            await asyncio.sleep(2 * self._timeout)
            return await late
        if fault.acts and fault.status not in {*self._not_done, *not_done(request)}:
            await self._act(request)
        if fault is NetworkFault.KILLED_AFTER:
            if self.killed is not None and not self.killed.done():
                self.killed.set_result(None)
            await asyncio.get_running_loop().create_future()
        if fault.status is None:
            raise httpx.ReadError("reset")
        if fault is NetworkFault.HTML_WITH_200:
            return httpx.Response(200, html=f"<html><body>{self._refusal}</body></html>")
        headers = {"retry-after": f"{RETRY_AFTER.total_seconds():.0f}"} if fault is NetworkFault.STATUS_429 else {}
        return httpx.Response(fault.status, headers=headers, json={"code": "injected", "message": self._refusal})

    async def _act(self, request: httpx.Request, after: float = 0.0) -> httpx.Response:
        """Let the system act and return its answer."""
        if after:
            await asyncio.sleep(after)
        try:
            answer = await self._respond(request)
            content = await answer.aread()
        except httpx.TransportError:
            raise
        except Exception as error:
            self.failures.append(error)
            raise
        is_counted = is_write(request) and not hasattr(self._app, "effects")
        if request.url.host == NORCE_HOST:
            is_counted = request.method == "POST"  # other changes set a state, and may be repeated
        if is_counted and answer.status_code < 400:
            self._counted.append(f"{request.method} {request.url.path}")
        return httpx.Response(answer.status_code, headers=answer.headers, content=content)

    async def _respond(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == NORCE_HOST:
            return await self._norce(request)
        if self._app is None:
            raise httpx.ConnectError("there is no fake system")
        if self._is_asgi:
            return await httpx.ASGITransport(self._app).handle_async_request(request)
        answer = self._app(request)
        return await answer if inspect.isawaitable(answer) else answer  # type: ignore[no-any-return]
