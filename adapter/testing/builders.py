"""Builders of real objects for tests: orders, notifications, contexts and a clock.

Nothing here reaches a network. `context.http` applies the rules of the service to a fake system in this process (see
`adapter.testing.faults`), and `context.orders` speaks to a `FakeNorce`.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

import httpx
from jsonpointer import JsonPointer

from adapter.config.convert import Converter, class_of
from adapter.config.problems import Reference
from adapter.identifiers import Channel
from adapter.norce.client import Account, Norce
from adapter.orders import Order, read_order
from adapter.outgoing import Outgoing
from adapter.plugin import Context, Notification, Previous, Secret, Settings
from adapter.routing.routes import Handler
from adapter.routing.runner import LoopName, PluginLoop, RouteThreads, Run, Runner
from adapter.sandbox.norce import Simulator
from adapter.testing.faults import NORCE_HOST, FakeSystem, Network, order_at_work

NOW = datetime(2026, 2, 3, 8, 16, 40, tzinfo=UTC)  # shortly after the sample order was completed
TIMEOUT = timedelta(seconds=30)
DEADLINE = timedelta(seconds=2)  # of a verdict
NORCE_TIMEOUT = timedelta(seconds=20)
ABSENT = object()  # as a value in the changes of `order`: the member is not there
_TOKEN = "of-the-fake-norce"  # noqa: S105 - it opens nothing


def order(changes: Mapping[str, Any] | None = None, *, base: Any = None) -> Order:
    """Build a complete order, by default a completed purchase of three items.

    Args:
        changes: New values by their JSON Pointers, such as `{"/currency": "NOK"}`; `ABSENT` removes a member.
        base: Your own order in place of the sample: an `Order`, JSON as text or bytes, or a dict.
    """
    if base is None:
        base = (files("adapter.sandbox.demo") / "orders/order-completed.json").read_bytes()
    tree = json.loads(base) if isinstance(base, bytes | str) else deepcopy(getattr(base, "data", base))
    for pointer, value in (changes or {}).items():
        parent, name = JsonPointer(pointer).to_last(tree)
        if value is ABSENT:
            del parent[name]
        else:
            parent[name] = value
    return read_order(json.dumps(tree, ensure_ascii=False).encode())


def notification(of: Order | None = None, **members: Any) -> Notification:
    """Build a notification about an order, by default the sample.

    Args:
        of: The order, as it was received and as Norce has it now.
        members: Other values of `adapter.plugin.Notification`, such as `received=None`.
    """
    of = of or order()
    given: dict[str, Any] = {"id": 1, "callback": "order-status", "received_at": NOW}
    given |= {"merchant": of.merchant, "channel": of.channel, "order": of, "received": of, "raw": of.raw}
    return Notification(**(given | members))


class HandClock:
    """A clock that moves only by hand. Call it for the present moment."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def move(self, by: timedelta) -> None:
        """Let this much time pass."""
        self.now += by


class FakeNorce(Simulator):
    """An offline Norce Checkout in this process, with these orders.

    `order(order_id)` returns an order as a handler has left it.
    """

    def __init__(self, *orders: Order, **options: Any) -> None:
        super().__init__(token=_TOKEN, **options)
        for each in orders:
            self.put({"_transactions": {}, **deepcopy(each.data)})


def context(
    handler: Handler | type[Handler],
    settings: Mapping[str, Any] | Settings | None = None,
    app: FakeSystem | None = None,
    *,
    of: Order | None = None,
    norce: FakeNorce | None = None,
    clock: Callable[[], datetime] | None = None,
    timeout: timedelta = TIMEOUT,
    first_attempt_at: datetime | None = None,
    attempt: int = 1,
    previous: Previous | None = None,
    is_resend: bool = False,
) -> Context[Any]:
    """Build the context of one call, with the clients that the service would give it.

    Args:
        handler: The handler or its class.
        settings: As in `config.yaml`. Here, a secret is plain text.
        app: The fake system that answers the requests to all hosts in the settings.
        of: The order of the call, by default the sample.
        norce: By default a Norce that has this order.
        clock: By default a `HandClock`.
        timeout: The time until the deadline.
        first_attempt_at: By default now.
        attempt: The number of the attempt, from 1.
        previous: The last `Done` for this order.
        is_resend: A person wants the order delivered again.
    """
    of, clock = of or order(), clock or HandClock()
    network = Network(app, NorceWith(of, norce=norce), timeout=timeout)
    channel = Channel(of.merchant, of.channel)
    return InPlaceRunner.over(network, channel, clock).context(
        None if getattr(handler, "computes", False) else "deliveries",
        route="test",
        settings=settings_of(handler, settings),
        channel=channel,
        order_id=of.id,
        identity="test, again" if is_resend else "test",
        deadline=clock() + timeout,
        first_attempt_at=first_attempt_at or clock(),
        attempt=attempt,
        previous=previous,
        is_resend=is_resend,
        log_fields=handler.log_fields,
    )


def settings_of(handler: Handler | type[Handler], given: Mapping[str, Any] | Settings | None) -> Settings:
    """Return the settings of a handler, or raise `ValueError` with all problems in them."""
    if isinstance(given, Settings):
        return given
    problems: list[str] = []
    converter = _Converter(lambda path, message: problems.append(f"{path} {message}"))
    settings = converter.convert(handler.settings_type, dict(given or {}), "")
    if problems:
        raise ValueError("; ".join(problems))
    return settings  # type: ignore[no-any-return]


class _Converter(Converter):
    def _leaf(self, type_: Any, value: Any, path: str, subject: str = "") -> Any:
        kind = class_of(type_)
        if isinstance(kind, type) and issubclass(kind, Secret) and isinstance(value, str):
            value = Reference(value, "a text in a test")
        return super()._leaf(type_, value, path, subject)


class NorceWith:
    """A transport's function that answers with these orders.

    At the first other request, it becomes a `FakeNorce`.
    """

    def __init__(self, *orders: Order, norce: FakeNorce | None) -> None:
        self._orders = {each.id: each for each in orders}
        self._norce = norce

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        order = self._orders.get(request.url.path.rpartition("/")[2])
        if self._norce is None and request.method == "GET" and order is not None:
            return httpx.Response(200, content=order.raw)
        self._norce = self._norce or FakeNorce(*self._orders.values())
        return await httpx.ASGITransport(self._norce.app).handle_async_request(request)


def norce_client(channel: Channel, transport: httpx.AsyncBaseTransport) -> Norce:
    """Return the service's client for Norce over this transport."""
    account = Account(base_url=f"http://{NORCE_HOST}/checkout", tokens=(Secret(_TOKEN),))
    return Norce({channel.merchant: account}, adapter_id="test", timeout=NORCE_TIMEOUT, transport=transport)


class InPlaceRunner(Runner):
    """A runner that calls handlers on its caller's event loop.

    It notes whose request is whose.
    """

    @classmethod
    def over(cls, network: Network, channel: Channel, clock: Callable[[], datetime]) -> "InPlaceRunner":
        """Return a runner whose handlers send everything over a network."""
        return cls(
            make_norce=lambda: norce_client(channel, network), make_outgoing=lambda: Outgoing(network), clock=clock
        )

    def open(self, name: LoopName) -> None:
        self._loops[name] = _InPlaceLoop(self._make_norce(), self._make_outgoing())

    def context(self, on: LoopName | None, **given: Any) -> Context[Any]:
        order_at_work.set(given["order_id"])  # the task of the call inherits it
        return super().context(on, **given)


class _InPlaceLoop(PluginLoop):
    def __init__(self, norce: Norce, outgoing: Outgoing) -> None:
        self.threads: dict[str, RouteThreads] = {}
        self.norce = norce
        self.outgoing = outgoing
        self._runs: set[Run[Any]] = set()

    def start(self, coroutine: Any, *, name: str = "", within: timedelta = timedelta.max) -> Run[Any]:
        return Run(asyncio.get_running_loop(), coroutine, name=name, deadline=within.total_seconds(), runs=self._runs)

    def current_run(self) -> None:
        return None
