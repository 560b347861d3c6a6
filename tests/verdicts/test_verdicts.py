"""`adapter.verdicts.verdicts`: it answers inside the deadline even if handlers and Norce fail."""

import asyncio
import contextlib
import io
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import httpx
import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

from adapter import config as configuration
from adapter import logs
from adapter.handlers.rules import Rules
from adapter.identifiers import Channel
from adapter.ledger.verdict_log import LoggedVerdict
from adapter.metrics import Metrics
from adapter.norce.client import Norce
from adapter.orders import Order, read_order
from adapter.plugin import Context, HookHandler, Patch, Problem, Refuse, Retry, Settings, ValidationHandler
from adapter.routing.from_config import norce_accounts
from adapter.routing.routes import Routes, build
from adapter.routing.runner import Runner
from adapter.verdicts.answer import Answer, Verdict
from adapter.verdicts.circuit_breaker import CircuitBreaker
from adapter.verdicts.verdicts import MOST_UNFINISHED, OrderBusy, OrderMissing, VerdictRequest, Verdicts
from tests import PATIENCE
from tests.ledgers import HandClock

DEADLINE = timedelta(seconds=1)  # where a handler never answers
FAR = timedelta(seconds=10)  # where every handler answers; the longest deadline that a configuration may have
CART: dict[str, Any] = {
    "id": "o1", "merchant": "norce", "channel": "1", "country": "SE",
    "cart": {"items": [{"sku": "SOCK-3P", "quantity": 2}], "attributes": {"priceList": "ordinarie"}},
    "customer": {"type": "person"},
}  # fmt: skip
ORDER: dict[str, Any] = {"id": "o1", "merchant": "norce", "channel": "1", "country": "SE", "items": [1]}
CONFIG = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
norce: {base_url: "http://127.0.0.1:1", timeout: 10s}
merchants: {norce: {tokens: ["${env:ONE}", "${env:TWO}"], channels: {"1": {}, "2": {}}}}
senders: {header_secrets: [{header: authorization, values: ["${env:ONE}"]}]}
callbacks:
  order-rules: {kind: validation, deadline: DEADLINE}
  cart-changed: {kind: hook, watch: /cart, target: /cart, deadline: DEADLINE}
  watched: {kind: hook, watch: /cart, deadline: DEADLINE}
routes:
"""


class Code(Settings, frozen=True, kw_only=True):
    code: str = "a-code"


class Deny(ValidationHandler[Code]):
    async def validate(self, order: Order, context: Context[Code]) -> list[Problem]:
        return [Problem(context.settings.code, f"No, {order.id}.")]


class Approve(ValidationHandler[Settings]):
    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        return []


class InPlace(Deny):
    computes = True


class Contexts(ValidationHandler[Settings]):
    """Remembers the contexts that it was given."""

    given: ClassVar[list[Context[Settings]]] = []

    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        self.given.append(context)
        return []


class Forever(ValidationHandler[Settings]):
    """Never returns; remembers whether it was told to stop."""

    cancelled: ClassVar[threading.Event] = threading.Event()

    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return []


class ForeverInPlace(Forever):
    computes = True


class Stubborn(ValidationHandler[Settings]):
    """Ignores its cancellation."""

    released: ClassVar[threading.Event] = threading.Event()

    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        while not self.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        return []


class Block(ValidationHandler[Settings]):
    """Blocks its thread, as a synchronous client would."""

    released: ClassVar[threading.Event] = threading.Event()

    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        self.released.wait(PATIENCE * 2)
        return [Problem("too-late", "Too late.")]


class Networker(ValidationHandler[Settings]):
    """Declares that it computes, but calls a server."""

    computes = True

    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        await context.http.get("https://elsewhere.example")
        return []


def raising(error: Callable[[], BaseException]) -> type[ValidationHandler[Settings]]:
    class Raises(ValidationHandler[Settings]):
        async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
            raise error()

    return Raises


def returning(value: Any) -> type[ValidationHandler[Settings]]:
    class Returns(ValidationHandler[Settings]):
        async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
            return value  # type: ignore[no-any-return]

    return Returns


class Point:
    def __init__(self, name: str, class_: Any) -> None:
        self.name = name
        self._class = class_

    def load(self) -> Any:
        return self._class


def route(name: str, handler: str, *, callback: str = "order-rules", no_answer: str = "reject", more: str = "") -> str:
    return f"  {name}: {{callback: {callback}, handler: {handler}, no_answer: {no_answer}{more}}}\n"


def built(
    folder: Path, routes: str, handlers: dict[str, Any], deadline: timedelta, soft_limit: str
) -> tuple[configuration.Config, Routes]:
    path = folder / "config.yaml"
    callbacks = CONFIG.replace("DEADLINE", f"{deadline / timedelta(milliseconds=1):.0f}ms")
    path.write_text(callbacks.replace("validation, ", f"validation, soft_limit: {soft_limit}, ") + (routes or "  {}\n"))
    config = configuration.load(path, {"ONE": "the-first-token", "TWO": "the-second-token"})
    points: Any = [Point(name, class_) for name, class_ in handlers.items()]
    return config, build(config, points)


def is_there(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=ORDER | {"id": request.url.path.rpartition("/")[2]})


class Asking:
    """Verdicts with their routes, and a memory of what was recorded and counted."""

    def __init__(
        self,
        verdicts: Verdicts,
        routes: Routes,
        metrics: Metrics,
        logged: "asyncio.Queue[LoggedVerdict]",
        answered: list[LoggedVerdict],
    ) -> None:
        self.verdicts = verdicts
        self.routes = routes
        self.metrics = metrics
        self.logged = logged  # late verdicts and those of shadows
        self.answered = answered

    async def validate(self, order_id: str = "o1", channel: str = "1") -> Answer:
        return await self._answer("order-rules", order_id, channel)

    async def change(
        self, callback: str = "cart-changed", order_id: str = "o1", *, received_at: float | None = None, **members: Any
    ) -> Answer:
        order = read_order(json.dumps(CART | {"id": order_id} | members).encode())
        return await self._answer(callback, order_id, "1", order, received_at)

    async def _answer(
        self, callback: str, order_id: str, channel: str, order: Order | None = None, received_at: float | None = None
    ) -> Answer:
        # The handlers that hang are released after this, so a test that waits for one would not end.
        async with asyncio.timeout(PATIENCE):
            return await self.verdicts.answer(
                VerdictRequest(
                    callback=self.routes.callbacks[callback],
                    channel=Channel("norce", channel),
                    order_id=order_id,
                    order=order,
                    received_at=time.monotonic() if received_at is None else received_at,
                )
            )

    async def recorded(self) -> LoggedVerdict:
        return await asyncio.wait_for(self.logged.get(), PATIENCE)

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"norce_adapter_{name}", labels) or 0.0


@contextlib.asynccontextmanager
async def asking(
    folder: Path,
    routes: str,
    handlers: dict[str, Any],
    norce: Callable[[httpx.Request], Any] = is_there,
    *,
    breaker: CircuitBreaker | None = None,
    deadline: timedelta = FAR,
    soft_limit: str = "",
    lag: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[Asking]:
    half = f"{deadline / timedelta(milliseconds=2):.0f}ms"
    config, made = built(folder, routes, handlers, deadline, soft_limit or half)

    def make_norce() -> Norce:
        transport = httpx.MockTransport(norce)
        return Norce(norce_accounts(config), adapter_id="an_adapter", timeout=config.norce.timeout, transport=transport)

    runner = Runner(make_norce=make_norce, clock=lambda: datetime.now(UTC))
    client, metrics = make_norce(), Metrics("0")
    logged: asyncio.Queue[LoggedVerdict] = asyncio.Queue()
    answered: list[LoggedVerdict] = []
    verdicts = Verdicts(
        made,
        runner=runner,
        norce=client,
        metrics=metrics,
        clock=lambda: time.time_ns() // 1_000_000,
        circuit_breaker=breaker or CircuitBreaker(orders=0, open_for=timedelta(0)),
        lag=lag,
        record=lambda each: answered.append(each) if each.kind == "answer" else logged.put_nowait(each),
    )
    try:
        yield Asking(verdicts, made, metrics, logged, answered)
    finally:
        for handler in (Block, Stubborn):
            handler.released.set()
        await client.aclose()
        await runner.stop(timedelta(seconds=PATIENCE))
        for handler in (Block, Stubborn):
            handler.released.clear()


def asked(
    folder: Path,
    routes: str,
    handlers: dict[str, Any],
    norce: Callable[[httpx.Request], Any] = is_there,
    *,
    channel: str = "1",
    deadline: timedelta = FAR,
) -> list[Verdict]:
    async def ask() -> list[Verdict]:
        async with asking(folder, routes, handlers, norce, deadline=deadline) as at:
            return list((await at.validate(channel=channel)).verdicts)

    return asyncio.run(ask())


def codes(verdicts: list[Verdict]) -> list[str]:
    return [problem.code for verdict in verdicts for problem in verdict.problems]


# --- what was decided -------------------------------------------------------------------------------------------------


def test_problems_come_in_the_order_of_the_configuration_not_of_the_answers(tmp_path: Path) -> None:
    class Slow(Deny):
        async def validate(self, order: Order, context: Context[Code]) -> list[Problem]:
            for _ in range(50):
                await asyncio.sleep(0)
            return await super().validate(order, context)

    routes = (
        route("zeta", "slow", more=", settings: {code: first}")
        + route("alpha", "deny", more=", settings: {code: second}")
        + route("beta", "in-place", more=", settings: {code: third}")
    )

    verdicts = asked(tmp_path, routes, {"slow": Slow, "deny": Deny, "in-place": InPlace})

    assert codes(verdicts) == ["first", "second", "third"]
    assert [verdict.route.name for verdict in verdicts] == ["zeta", "alpha", "beta"]
    assert all(verdict.missing is None for verdict in verdicts)


def test_only_routes_whose_condition_holds_give_a_verdict(tmp_path: Path) -> None:
    routes = route("here", "deny", more=", when: {scope: /country, schema: {const: SE}}, settings: {code: here}")
    routes += route("there", "deny", more=", when: {scope: /country, schema: {const: NO}}, settings: {code: there}")
    routes += route("nowhere", "deny", more=", when: {scope: /county}, settings: {code: nowhere}")

    assert codes(asked(tmp_path, routes, {"deny": Deny})) == ["here"]


@pytest.mark.parametrize("addressed", ['channels: ["2"]', 'merchants: [norce], channels: ["2"]'])
def test_a_route_of_another_channel_has_no_verdict_even_without_an_order(tmp_path: Path, addressed: str) -> None:
    """The address names the channel, so an order that cannot be read does not matter."""
    routes = route("others", "deny", more=f", {addressed}") + route("ours", "deny", no_answer="approve")

    def silent(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503)

    assert [each.route.name for each in asked(tmp_path, routes, {"deny": Deny})] == ["ours"]
    unread = asked(tmp_path, routes, {"deny": Deny}, silent)
    assert [(each.route.name, each.missing, each.decided) for each in unread] == [
        ("ours", "order-unreadable", "approve")
    ]


def test_the_order_is_not_read_if_no_route_is_for_the_channel(tmp_path: Path) -> None:
    routes = route("others", "deny", more=', channels: ["2"]')

    assert asked(tmp_path, routes, {"deny": Deny}, lambda _request: pytest.fail("no route needs the order")) == []


def test_without_routes_there_is_no_verdict_and_no_call_to_norce(tmp_path: Path) -> None:
    assert asked(tmp_path, "", {}, lambda _request: pytest.fail("no route needs the order")) == []


def test_a_handler_gets_its_own_settings_and_a_deadline_before_the_answers(tmp_path: Path) -> None:
    Contexts.given.clear()
    before = datetime.now(UTC)

    asked(tmp_path, route("one", "contexts"), {"contexts": Contexts}, channel="2")

    [context] = Contexts.given
    assert before < context.deadline < datetime.now(UTC) + FAR
    assert (context.route, context.attempt) == ("one", 1)


# --- no answer --------------------------------------------------------------------------------------------------------

BROKEN: dict[str, Any] = {
    "an exception": raising(lambda: ValueError("no")),
    "an exception group": raising(lambda: ExceptionGroup("many", [ValueError("no")])),
    "a cancellation of its own": raising(asyncio.CancelledError),
    "a timeout of its own": raising(TimeoutError),
    "the end of the process": raising(SystemExit),
    "an interrupt": raising(KeyboardInterrupt),
    "nothing": returning(None),
    "true": returning(True),
    "a text": returning("no"),
    "a tuple": returning((Problem("a-code", "No."),)),
    "a list of texts": returning(["a-code"]),
    "a list with a hole": returning([Problem("a-code", "No."), None]),
    "a class": returning(Problem),
    "a problem without words": returning([Problem("a-code", None)]),  # type: ignore[arg-type]
    "a problem with an object for words": returning([Problem("a-code", object())]),  # type: ignore[arg-type]
    "a problem that is no text": returning([Problem("a-code", "\ud800")]),
    "a call that it may not make": Networker,
}


@pytest.mark.parametrize("no_answer", ["approve", "reject"])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_answer_counts_as_the_routes_no_answer(tmp_path: Path, broken: Any, no_answer: str) -> None:
    routes = route("one", "broken", no_answer=no_answer) + route("two", "deny")

    first, second = asked(tmp_path, routes, {"broken": broken, "deny": Deny})

    assert first.missing == "failed"
    assert [problem.code for problem in first.problems] == {"approve": [], "reject": ["not-answered"]}[no_answer]
    assert (second.missing, codes([second])) == (None, ["a-code"])


@pytest.mark.parametrize("broken", ["a problem without words", "a problem that is no text", "the end of the process"])
def test_a_broken_answer_computed_in_place_counts_the_same(tmp_path: Path, broken: str) -> None:
    in_place = type("InPlace", (BROKEN[broken],), {"computes": True})

    assert asked(tmp_path, route("one", "broken"), {"broken": in_place})[0].missing == "failed"


@pytest.mark.parametrize("no_answer", ["approve", "reject"])
@pytest.mark.parametrize(
    ("late", "why"), [(Forever, "late"), (Stubborn, "late"), (Block, "blocks")], ids=["awaits", "is stubborn", "blocks"]
)
def test_a_late_answer_counts_as_the_routes_no_answer(tmp_path: Path, late: Any, why: str, no_answer: str) -> None:
    routes = route("one", "late", no_answer=no_answer) + route("two", "in-place")

    first, second = asked(tmp_path, routes, {"late": late, "in-place": InPlace}, deadline=DEADLINE)

    assert first.missing == why
    assert [problem.code for problem in first.problems] == {"approve": [], "reject": ["not-answered"]}[no_answer]
    assert (second.missing, codes([second])) == (None, ["a-code"])


def test_a_computing_handler_that_waits_gets_its_no_answer_at_once(tmp_path: Path) -> None:
    Forever.cancelled.clear()

    (verdict,) = asked(tmp_path, route("one", "waits"), {"waits": ForeverInPlace})

    assert verdict.missing == "failed"
    assert verdict.ended_at - verdict.started_at < FAR.total_seconds()
    assert Forever.cancelled.is_set()


def test_the_deadline_holds_while_every_handler_blocks(tmp_path: Path) -> None:
    """Validation upon validation: what blocks the plugins' thread never reaches the answers, and is named."""

    async def ask() -> list[Answer]:
        routes = route("one", "block") + route("two", "in-place") + route("three", "deny")
        async with asking(
            tmp_path, routes, {"block": Block, "in-place": InPlace, "deny": Deny}, deadline=DEADLINE
        ) as at:
            return await asyncio.gather(*(at.validate(f"o{number}") for number in range(20)))

    missing = {tuple(verdict.missing for verdict in answer.verdicts) for answer in asyncio.run(ask())}
    assert missing == {("blocks", None, "held-up")}


def test_a_condition_in_error_counts_as_no_answer(tmp_path: Path) -> None:
    when = ", when: {scope: /items/0, schema: {const: 1}}"
    routes = route("one", "deny", no_answer="approve", more=when) + route("two", "deny", more=when)

    one, two = asked(tmp_path, routes, {"deny": Deny})

    assert [one.missing, two.missing] == ["condition", "condition"]
    assert codes([one, two]) == ["not-answered"]


# --- Norce fails ------------------------------------------------------------------------------------------------------


async def never(_request: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


def broken_connection(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset", request=request)


def refused_connection(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


DEEP = b'{"cart":' + b'{"items":[' * 400 + b"]}" * 400 + b"}"
UNREADABLE: dict[str, Callable[[httpx.Request], Any]] = {
    "no answer": never,
    "a broken connection": broken_connection,
    "a refused connection": refused_connection,
    "401": lambda _request: httpx.Response(401),
    "403": lambda _request: httpx.Response(403),
    "429": lambda _request: httpx.Response(429, headers={"retry-after": "5"}),
    "500": lambda _request: httpx.Response(500),
    "a redirect": lambda _request: httpx.Response(302, headers={"location": "http://127.0.0.1:1/"}),
    "204": lambda _request: httpx.Response(204),
    "no JSON": lambda _request: httpx.Response(200, content=b"<html>"),
    "a list": lambda _request: httpx.Response(200, json=[ORDER]),
    "a JSON bomb": lambda _request: httpx.Response(200, content=b"[" * 100_000),
    "deep nesting": lambda _request: httpx.Response(200, content=DEEP),
    "a wrong encoding": lambda _request: httpx.Response(200, headers={"content-encoding": "gzip"}, content=b"x"),
    "too much": lambda _request: httpx.Response(200, content=b" " * (4 * 1024 * 1024) + json.dumps(ORDER).encode()),
}


@pytest.mark.parametrize("norce", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_order_that_cannot_be_read_gives_every_routes_no_answer(
    tmp_path: Path, norce: Callable[[httpx.Request], Any]
) -> None:
    routes = route("one", "deny", no_answer="approve") + route("two", "deny", no_answer="reject")

    one, two = asked(tmp_path, routes, {"deny": Deny}, norce, deadline=DEADLINE if norce is never else FAR)

    assert (one.missing, two.missing) == ("order-unreadable", "order-unreadable")
    assert codes([one, two]) == ["not-answered"]


def test_an_order_that_norce_does_not_have_raises_order_missing(tmp_path: Path) -> None:
    with pytest.raises(OrderMissing):
        asked(tmp_path, route("one", "deny"), {"deny": Deny}, lambda _request: httpx.Response(404))


def test_the_second_token_is_tried_where_the_first_is_refused(tmp_path: Path) -> None:
    shown: list[str] = []

    def norce(request: httpx.Request) -> httpx.Response:
        shown.append(request.headers["authorization"])
        return is_there(request) if "second" in shown[-1] else httpx.Response(401)

    verdicts = asked(tmp_path, route("one", "deny"), {"deny": Deny}, norce)

    assert codes(verdicts) == ["a-code"]
    assert shown == ["Bearer the-first-token", "Bearer the-second-token"]


# --- this process is too busy -----------------------------------------------------------------------------------------


def late_loop(*, by: float) -> Callable[[], float]:
    """Return a lag that grows by this part of the deadline during a request."""
    seconds = iter((7.0, 7.0 + by * DEADLINE.total_seconds()))
    return lambda: next(seconds)


@pytest.mark.parametrize(
    ("handler", "norce"), [(Forever, is_there), (Deny, never)], ids=["a late handler", "an order that is not read"]
)
@pytest.mark.parametrize("no_answer", ["approve", "reject"])
def test_a_call_whose_verdict_is_missing_after_the_loop_was_late_is_refused(
    tmp_path: Path, handler: Any, norce: Callable[[httpx.Request], Any], no_answer: str
) -> None:
    async def ask() -> None:
        lag, routes = late_loop(by=0.6), route("one", "asked", no_answer=no_answer)
        async with asking(tmp_path, routes, {"asked": handler}, norce, deadline=DEADLINE, lag=lag) as at:
            with pytest.raises(OrderBusy) as refused:
                await at.validate()
            assert refused.value.limit == "late-loop"
            await asyncio.sleep(0)
            assert at.answered == []

    asyncio.run(ask())


@pytest.mark.parametrize("no_answer", ["approve", "reject"])
@pytest.mark.parametrize("code", ["approves", "no-stock"])
def test_a_late_verdict_on_a_call_that_was_refused_with_503_is_not_compared_with_no_answer(
    tmp_path: Path, code: str, no_answer: str
) -> None:
    async def ask() -> tuple[Asking, LoggedVerdict]:
        lag, routes = late_loop(by=0.6), route("one", "held", no_answer=no_answer, more=f", settings: {{code: {code}}}")
        async with asking(tmp_path, routes, {"held": Held}, deadline=DEADLINE, lag=lag) as at:
            with pytest.raises(OrderBusy):
                await at.validate()
            Held.let_go.set()
            return at, await at.recorded()

    at, logged = asyncio.run(ask())

    assert (logged.kind, logged.answered, at.answered) == ("late", "busy", [])
    labels = {"callback": "order-rules", "route": "one", "kind": "late", "verdict": logged.decided, "result": "same"}
    assert at.counted("verdicts_unused_total", **labels) == 1


@pytest.mark.parametrize(
    ("handler", "lateness", "missing"),
    [(Forever, 0.4, "late"), (Block, 0.6, "blocks"), (Deny, 0.6, None)],
    ids=["a little late", "a handler that blocks", "a verdict in time"],
)
def test_another_call_keeps_its_answer(tmp_path: Path, handler: Any, lateness: float, missing: str | None) -> None:
    async def ask() -> Answer:
        lag = late_loop(by=lateness)
        async with asking(tmp_path, route("one", "asked"), {"asked": handler}, deadline=DEADLINE, lag=lag) as at:
            return await at.validate()

    (verdict,) = asyncio.run(ask()).verdicts

    assert verdict.missing == missing


# --- a hook -----------------------------------------------------------------------------------------------------------


class Wishes(Settings, frozen=True, kw_only=True):
    path: str = "/cart/attributes/priceList"
    value: str = "medlem"
    op: str = "add"


class Patches(HookHandler[Wishes]):
    """Wants a member to have a value."""

    async def change(self, order: Order, context: Context[Wishes]) -> list[Patch]:
        wish = context.settings
        return [Patch(wish.op, wish.path, None if wish.op == "remove" else wish.value)]  # type: ignore[arg-type]


class PatchesInPlace(Patches):
    computes = True


class Accepts(HookHandler[Settings]):
    async def change(self, order: Order, context: Context[Settings]) -> list[Patch]:
        return []


class Refuses(HookHandler[Code]):
    async def change(self, order: Order, context: Context[Code]) -> list[Patch]:
        raise Refuse(context.settings.code, f"Not {order.id}.", inner="E-17")


class RefusesInPlace(Refuses):
    computes = True


class NeverChanges(HookHandler[Settings]):
    async def change(self, order: Order, context: Context[Settings]) -> list[Patch]:
        await asyncio.Event().wait()
        raise AssertionError


class NeverForO1(Refuses):
    async def change(self, order: Order, context: Context[Code]) -> list[Patch]:
        if order.id == "o1":
            await asyncio.Event().wait()
        return await super().change(order, context)


HOOKS = {
    "patch": Patches, "patch-in-place": PatchesInPlace, "accept": Accepts, "refuse": Refuses,
    "refuse-in-place": RefusesInPlace, "never": NeverChanges,
}  # fmt: skip


def hook(name: str, handler: str, *, no_answer: str = "approve", more: str = "", callback: str = "cart-changed") -> str:
    return route(name, handler, callback=callback, no_answer=no_answer, more=more)


SHADOW = ", mode: shadow"


def test_patches_of_a_large_order_are_merged_beside_the_loop(tmp_path: Path) -> None:
    threads: list[str] = []

    class Members(dict[str, Any]):
        def __copy__(self) -> dict[str, Any]:
            threads.append(threading.current_thread().name)
            return dict(self)

    async def patched(size: int) -> Answer:
        raw = json.dumps(CART | {"filler": "x" * size}).encode()
        order = Order(raw, Members(json.loads(raw)))
        wish = wishing(path="/cart/attributes/wrapping", value="gift", op="add")
        async with asking(tmp_path, hook("one", "patch-in-place", more=wish), HOOKS) as at:
            return await at.verdicts.answer(
                VerdictRequest(
                    callback=at.routes.callbacks["cart-changed"],
                    channel=Channel("norce", "1"),
                    order_id="o1",
                    order=order,
                )
            )

    assert [patch.path for patch in asyncio.run(patched(2**20)).patches] == ["/cart/attributes/wrapping"]
    assert "MainThread" not in threads
    assert asyncio.run(patched(100)).patches
    assert threads[-1] == "MainThread"


def test_other_requests_are_answered_between_the_conditions_on_a_large_order(tmp_path: Path) -> None:
    condition = "{scope: /cart/attributes, schema: {type: object}}"
    more = (
        ", when: "
        + condition
        + ", settings: {rules: ["
        + ", ".join("{scope: /cart/attributes, schema: {type: object}, code: c, message: m}" for _ in range(5))
        + "]}"
    )
    routes = "".join(hook(f"rules-{number}", "rules", more=more) for number in range(3))

    async def pauses(size: int) -> int:
        order = CART | {"cart": {"attributes": {"filler": "x" * size}}}
        turns = 0

        async def other_requests() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with asking(tmp_path, routes, {"rules": Rules}) as at:
            request = VerdictRequest(
                callback=at.routes.callbacks["cart-changed"],
                channel=Channel("norce", "1"),
                order_id="o1",
                order=read_order(json.dumps(order).encode()),
            )
            others = asyncio.create_task(other_requests())
            await asyncio.sleep(0)
            before = turns
            answer = await at.verdicts.answer(request)
            others.cancel()
            assert [verdict.decided for verdict in answer.verdicts] == ["accept"] * 3
            return turns - before

    assert asyncio.run(pauses(2**20)) >= 2 + 3 * 4
    assert asyncio.run(pauses(2**10)) == 0


def wishing(**wish: str) -> str:
    return f", settings: {json.dumps(wish)}"


def changed(
    folder: Path,
    routes: str,
    handlers: dict[str, Any] = HOOKS,
    callback: str = "cart-changed",
    *,
    deadline: timedelta = FAR,
) -> Answer:
    async def ask() -> Answer:
        async with asking(folder, routes, handlers, deadline=deadline) as at:
            return await at.change(callback)

    return asyncio.run(ask())


def decided(answer: Answer) -> list[tuple[str, str | None]]:
    return [(verdict.decided, verdict.missing) for verdict in answer.verdicts]


def test_a_hook_without_routes_is_accepted(tmp_path: Path) -> None:
    answer = changed(tmp_path, "")

    assert (answer.stops, answer.patches, answer.document, answer.verdicts) == (False, [], b"[]", [])


@pytest.mark.parametrize("handler", ["patch", "patch-in-place"])
def test_the_patches_of_all_routes_are_answered_in_the_order_of_the_configuration(tmp_path: Path, handler: str) -> None:
    routes = hook("zeta", handler, more=wishing(path="/cart/attributes/zeta"))
    routes += hook("mu", "accept") + hook("alpha", "patch", more=wishing(path="/cart/attributes/alpha"))

    answer = changed(tmp_path, routes)

    assert json.loads(answer.document) == [
        {"op": "add", "path": "/cart/attributes/zeta", "value": "medlem"},
        {"op": "add", "path": "/cart/attributes/alpha", "value": "medlem"},
    ]
    assert decided(answer) == [("patch", None), ("accept", None), ("patch", None)]


def test_the_first_refusal_in_the_order_of_the_configuration_is_the_answer(tmp_path: Path) -> None:
    class Slow(Refuses):
        async def change(self, order: Order, context: Context[Code]) -> list[Patch]:
            for _ in range(50):
                await asyncio.sleep(0)
            return await super().change(order, context)

    routes = hook("zeta", "patch") + hook("mu", "slow", more=", settings: {code: first}")
    routes += hook("alpha", "refuse-in-place", more=", settings: {code: second}")

    answer = changed(tmp_path, routes, HOOKS | {"slow": Slow})

    assert answer.refusal is not None
    assert (answer.refusal.code, answer.refusal.message, answer.refusal.inner) == ("first", "Not o1.", "E-17")
    assert decided(answer) == [("patch", None), ("refuse", None), ("refuse", None)]


@pytest.mark.parametrize("handler", ["refuse", "refuse-in-place"])
def test_a_refusal_does_not_keep_its_order_in_memory(tmp_path: Path, handler: str) -> None:
    answer = changed(tmp_path, hook("one", handler, more=", settings: {code: first}"))

    assert answer.refusal is not None
    assert answer.refusal.__traceback__ is None


def test_only_hook_routes_whose_condition_holds_give_a_verdict(tmp_path: Path) -> None:
    answer = changed(tmp_path, hook("there", "refuse", more=", when: {scope: /country, schema: {const: NO}}"))

    assert (answer.stops, answer.verdicts) == (False, [])


def test_a_patch_that_changes_nothing_is_an_acceptance(tmp_path: Path) -> None:
    answer = changed(tmp_path, hook("one", "patch", more=wishing(value="ordinarie")))

    assert (answer.document, decided(answer)) == (b"[]", [("accept", None)])


UNANSWERABLE = {
    "outside-target": {"path": "/customer/type", "value": "organization"},
    "does-not-apply": {"path": "/cart/nowhere/x"},
    "contradicts": {"path": "/cart/attributes/priceList", "value": "another"},
}


@pytest.mark.parametrize(("reason", "wish"), UNANSWERABLE.items(), ids=UNANSWERABLE.keys())
@pytest.mark.parametrize("no_answer", ["approve", "reject"])
def test_patches_that_cannot_be_used_give_the_routes_no_answer(
    tmp_path: Path, reason: str, wish: dict[str, str], no_answer: str
) -> None:
    routes = hook("one", "patch") + hook("two", "patch", no_answer=no_answer, more=wishing(**wish))

    answer = changed(tmp_path, routes)

    assert answer.verdicts[1].missing == reason
    assert answer.verdicts[0].missing is None
    if no_answer == "approve":
        assert [patch.path for patch in answer.patches] == ["/cart/attributes/priceList"]
    else:
        assert answer.refusal is not None
        assert answer.refusal.code == "not-answered"


def test_a_hook_without_a_target_never_patches(tmp_path: Path) -> None:
    answer = changed(tmp_path, hook("one", "patch", callback="watched"), callback="watched")

    assert (answer.document, decided(answer)) == (b"[]", [("accept", "outside-target")])


def test_a_no_answer_that_rejects_comes_before_the_refusals_of_later_routes(tmp_path: Path) -> None:
    routes = hook("one", "patch", no_answer="reject", more=wishing(path="/customer/type"))
    routes += hook("two", "refuse", more=", settings: {code: second}")

    answer = changed(tmp_path, routes)

    assert answer.refusal is not None
    assert answer.refusal.code == "not-answered"


def changing(change: Callable[[], Any]) -> type[HookHandler[Settings]]:
    class Changes(HookHandler[Settings]):
        async def change(self, order: Order, context: Context[Settings]) -> list[Patch]:
            return change()  # type: ignore[no-any-return]

    return Changes


def refusing(message: Any, inner: Any = None) -> Any:
    raise Refuse("a-code", message, inner=inner)


BROKEN_HOOKS: dict[str, Callable[[], Any]] = {
    "an exception": lambda: 1 / 0,
    "nothing": lambda: None,
    "a tuple": lambda: (Patch.remove("/cart/items"),),
    "plain operations": lambda: [{"op": "remove", "path": "/cart/items"}],
    "problems": lambda: [Problem("a-code", "No.")],
    "a refusal that was not raised": lambda: Refuse("a-code", "No."),
    "a refusal without words": lambda: refusing(None),
    "a refusal that is no text": lambda: refusing("\ud800"),
    "a refusal with an object for its cause": lambda: refusing("No.", object()),
}


@pytest.mark.parametrize("computes", [False, True], ids=["on its loop", "in place"])
@pytest.mark.parametrize("broken", BROKEN_HOOKS.values(), ids=BROKEN_HOOKS.keys())
def test_a_broken_hook_counts_as_its_no_answer(tmp_path: Path, broken: Callable[[], Any], computes: bool) -> None:
    handler = type("Handler", (changing(broken),), {"computes": computes})

    answer = changed(tmp_path, hook("one", "broken", no_answer="reject"), {"broken": handler})

    assert decided(answer) == [("refuse", "failed")]


def test_a_refusal_inside_a_group_refuses(tmp_path: Path) -> None:
    """Such as one of several checks in a `TaskGroup`; with `no_answer: approve` the change would be stored."""

    def fail() -> Any:
        raise ExceptionGroup("", [KeyError(), ExceptionGroup("", [Refuse("a-code", "No.")])])

    answer = changed(tmp_path, hook("one", "refuse", no_answer="approve"), {"refuse": changing(fail)})

    assert decided(answer) == [("refuse", None)]
    assert answer.verdicts[0].refusal is not None
    assert answer.verdicts[0].refusal.code == "a-code"


def test_a_refusal_raised_by_a_validation_is_a_failure(tmp_path: Path) -> None:
    (verdict,) = asked(tmp_path, route("one", "refuse"), {"refuse": raising(lambda: Refuse("a-code", "No."))})

    assert verdict.missing == "failed"


@pytest.mark.parametrize(("no_answer", "counts"), [("approve", "accept"), ("reject", "refuse")])
def test_a_late_hook_counts_as_its_no_answer(tmp_path: Path, no_answer: str, counts: str) -> None:
    answer = changed(tmp_path, hook("one", "never", no_answer=no_answer) + hook("two", "patch"), deadline=DEADLINE)

    assert decided(answer) == [(counts, "late"), ("patch", None)]


@pytest.mark.parametrize(("no_answer", "stops"), [("approve", False), ("reject", True)])
def test_an_internal_error_gives_every_routes_no_answer(tmp_path: Path, no_answer: str, stops: bool) -> None:
    async def ask() -> tuple[Answer, Answer]:
        routes = hook("one", "patch-in-place", no_answer=no_answer) + route("two", "deny", no_answer=no_answer)
        async with asking(tmp_path, routes, HOOKS | {"deny": Deny}) as at:
            at.verdicts._context = None  # type: ignore[assignment,method-assign]
            return await at.change(), await at.validate()

    for answer in asyncio.run(ask()):
        assert answer.stops == stops
        assert [verdict.missing for verdict in answer.verdicts] == ["failed"]


# --- what is counted and logged ---------------------------------------------------------------------------------------


def test_verdicts_are_counted_by_route_and_decision(tmp_path: Path) -> None:
    async def ask() -> Asking:
        routes = route("yes", "approve") + route("no", "deny") + route("late", "forever", no_answer="approve")
        routes += hook("patches", "patch") + hook("refuses", "refuse") + hook("accepts", "accept")
        handlers = HOOKS | {"approve": Approve, "deny": Deny, "forever": Forever}
        async with asking(tmp_path, routes, handlers, deadline=DEADLINE) as at:
            await at.validate()
            await at.change()
        return at

    at = asyncio.run(ask())
    for callback, name, verdict in [
        ("order-rules", "yes", "approve"), ("order-rules", "no", "reject"), ("order-rules", "late", "no_answer"),
        ("cart-changed", "patches", "patch"), ("cart-changed", "refuses", "refuse"),
        ("cart-changed", "accepts", "accept"),
    ]:  # fmt: skip
        labels = {"callback": callback, "route": name}
        assert at.counted("verdict_duration_seconds_count", **labels, verdict=verdict) == 1
        assert at.counted("verdicts_missing_total", **labels, reason="late") == (name == "late")
        assert at.counted("verdicts_slow_total", **labels) == (name == "late")
    assert at.counted("callback_deadline_seconds", callback="order-rules") == DEADLINE.total_seconds()


class Dawdles(Approve):
    """Takes longer than its callback's soft limit of a millisecond."""

    computes = True

    async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
        begun = time.monotonic()
        while time.monotonic() < begun + 0.002:
            pass
        return []


def test_a_verdict_past_the_soft_limit_counts_and_is_counted_and_logged(tmp_path: Path) -> None:
    async def ask() -> Asking:
        async with asking(tmp_path, route("one", "dawdles"), {"dawdles": Dawdles}, soft_limit="1ms") as at:
            assert not (await at.validate()).stops
        return at

    with capture_logs() as logged:
        at = asyncio.run(ask())

    assert at.counted("verdicts_slow_total", callback="order-rules", route="one") == 1
    assert [(line["log_level"], line["decided"]) for line in logged if line["event"] == "verdict"] == [
        ("warning", "approve")
    ]


def test_every_verdict_is_one_line(tmp_path: Path) -> None:
    with capture_logs() as logged:
        changed(tmp_path, hook("zeta", "patch") + hook("mu", "refuse") + hook("alpha", "accept"))

    assert {line["event"] for line in logged} == {"verdict"}
    assert [(line["route"], line["decided"], line["log_level"]) for line in logged] == [
        ("zeta", "patch", "info"), ("mu", "refuse", "info"), ("alpha", "accept", "info")
    ]  # fmt: skip
    zeta, mu, alpha = logged
    assert (zeta["paths"], mu["codes"]) == (("/cart/attributes/priceList",), ("a-code",))
    assert not {"codes", "paths"} & alpha.keys()
    assert all(
        (line["callback"], line["merchant"], line["channel"], line["order_id"]) == ("cart-changed", "norce", "1", "o1")
        for line in logged
    )


def test_a_missing_verdict_is_logged_with_its_reason(tmp_path: Path) -> None:
    stream = io.StringIO()
    root_handlers = logs.logging.getLogger().handlers
    logs.configure(stream=stream)
    try:
        asked(tmp_path, route("one", "broken"), {"broken": raising(lambda: ValueError("canary"))})
    finally:
        structlog.reset_defaults()
        logs.logging.getLogger().handlers = root_handlers

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]  # a loop of another test may say something
    [verdict] = (line for line in lines if line["event"] in ("verdict", "handler_failed"))
    assert verdict["exception"][0]["type"] == "builtins.ValueError"
    told = {
        name: verdict[name] for name in ("event", "level", "decided", "reason", "no_answer", "error_type", "handler")
    }
    assert told == {
        "event": "verdict", "level": "error", "decided": "no_answer", "reason": "failed", "no_answer": "reject",
        "error_type": "ValueError", "handler": "broken",
    }  # fmt: skip
    assert "canary" not in stream.getvalue()


def test_a_bug_has_one_traceback_an_hour_for_its_kind_and_route(tmp_path: Path) -> None:
    routes = route("one", "broken") + route("two", "broken") + route("three", "other")
    handlers = {"broken": raising(lambda: ValueError("canary")), "other": raising(lambda: KeyError("canary"))}

    async def ask() -> None:
        async with asking(tmp_path, routes, handlers) as at:
            for _ in range(3):
                await at.validate()
                await asyncio.sleep(0)

    with capture_logs() as logged:
        asyncio.run(ask())

    assert len(logged) == 9
    assert sorted(line["route"] for line in logged if line.get("exc_info")) == ["one", "three", "two"]


def test_a_failed_request_is_one_line_with_code_host_and_status(tmp_path: Path) -> None:
    def refused() -> BaseException:
        error = Retry("destination-busy")
        error.host, error.status = "credit.example", 503
        return error

    with capture_logs() as logged:
        asked(tmp_path, route("one", "busy"), {"busy": raising(refused)})

    [line] = logged
    assert not line.get("exc_info")
    assert {name: line[name] for name in ("merchant", "order_id", "error_type", "code", "host", "status")} == {
        "merchant": "norce", "order_id": "o1", "error_type": "Retry", "code": "destination-busy",
        "host": "credit.example", "status": 503,
    }  # fmt: skip


def test_a_route_without_half_of_its_deadline_has_not_missed_it(tmp_path: Path) -> None:
    """A request that comes byte by byte must not open the circuit breaker of a plugin."""
    breaker = CircuitBreaker(orders=1, open_for=timedelta(hours=1))

    async def ask(started: float, *missing: str) -> bool:
        async with asking(
            tmp_path, route("one", "forever"), {"forever": Forever}, breaker=breaker, deadline=DEADLINE
        ) as at:
            request = VerdictRequest(
                callback=at.routes.callbacks["order-rules"],
                channel=Channel("norce", "1"),
                order_id="o1",
                received_at=time.monotonic() - started,
            )
            answer = await at.verdicts.answer(request)
            await asyncio.sleep(0)
        assert [each.missing for each in answer.verdicts if each.missing not in missing] == []
        return breaker.is_open(("one", Channel("norce", "1")), "another")

    # On a slow machine the handler has not begun when the rest of the deadline is over.
    assert asyncio.run(ask(DEADLINE.total_seconds() * 0.6, "late", "held-up")) is False
    assert asyncio.run(ask(0, "late")) is True


def test_patches_that_cannot_be_used_are_logged_with_their_place(tmp_path: Path) -> None:
    with capture_logs() as logged:
        changed(tmp_path, hook("one", "patch", more=wishing(path="/customer/type", value="canary")))

    [line] = logged
    assert (line["reason"], line["where"], line["no_answer"]) == ("outside-target", "/customer/type", "approve")
    assert "canary" not in str(logged)


def test_nothing_is_logged_before_the_answer_is_returned(tmp_path: Path) -> None:
    """To write is to let go of the interpreter, at the very moment when the deadline is a margin away."""

    async def ask() -> None:
        async with asking(tmp_path, route("one", "forever"), {"forever": Forever}, deadline=DEADLINE) as at:
            with capture_logs() as logged:
                await at.validate()
                assert logged == []
                await asyncio.sleep(0)
                assert [line["reason"] for line in logged] == ["late"]

    asyncio.run(ask())


# --- what comes late --------------------------------------------------------------------------------------------------


class Held(ValidationHandler[Code]):
    """Says what it has to say when it is let go."""

    let_go: ClassVar[threading.Event] = threading.Event()

    async def validate(self, order: Order, context: Context[Code]) -> list[Problem]:
        await asyncio.to_thread(self.let_go.wait, PATIENCE)
        if context.settings.code == "breaks":
            raise ValueError("late, and broken")
        return [] if context.settings.code == "approves" else [Problem(context.settings.code, "No.")]


class HeldHook(HookHandler[Wishes]):
    async def change(self, order: Order, context: Context[Wishes]) -> list[Patch]:
        await asyncio.to_thread(Held.let_go.wait, PATIENCE)
        if context.settings.op == "refuse":
            raise Refuse("a-code", "No.")
        return [Patch.add(context.settings.path, context.settings.value)]


@pytest.fixture(autouse=True)
def nothing_is_let_go() -> Iterator[None]:
    yield
    Held.let_go.clear()


LATE: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "approves": (", settings: {code: approves}", "approve", (), "differs"),
    "rejects": (", settings: {code: no-stock}", "reject", ("no-stock",), "same"),
    "breaks": (", settings: {code: breaks}", "failed", ("failed",), "same"),
}


@pytest.mark.parametrize(("more", "says", "codes_", "result"), LATE.values(), ids=LATE.keys())
def test_a_late_verdict_is_recorded_with_the_no_answer_that_was_used(
    tmp_path: Path, more: str, says: str, codes_: tuple[str, ...], result: str
) -> None:
    async def ask() -> tuple[Asking, LoggedVerdict]:
        async with asking(tmp_path, route("one", "held", more=more), {"held": Held}, deadline=DEADLINE) as at:
            answer = await at.validate()
            assert [verdict.missing for verdict in answer.verdicts] == ["late"]
            assert at.logged.empty()
            Held.let_go.set()
            return at, await at.recorded()

    at, logged = asyncio.run(ask())

    assert msgspec.structs.replace(logged, took_ms=0) == LoggedVerdict(
        kind="late", callback="order-rules", route="one", channel=Channel("norce", "1"), order_id="o1", decided=says,
        codes=codes_, answered="reject", took_ms=0,
    )  # fmt: skip
    assert logged.took_ms > DEADLINE.total_seconds() * 1000 * 0.8
    labels = {"callback": "order-rules", "route": "one", "kind": "late", "verdict": says, "result": result}
    assert at.counted("verdicts_unused_total", **labels) == 1


LATE_HOOKS: dict[str, tuple[dict[str, str], str, tuple[str, ...], str]] = {
    "patches": ({}, "patch", ("/cart/attributes/priceList",), "differs"),
    "patches what is there": ({"value": "ordinarie"}, "accept", (), "same"),
    "patches beside the target": ({"path": "/customer/type"}, "failed", ("outside-target",), "same"),
    "refuses": ({"op": "refuse"}, "refuse", ("a-code",), "differs"),
}


@pytest.mark.parametrize(("wish", "says", "codes_", "result"), LATE_HOOKS.values(), ids=LATE_HOOKS.keys())
def test_a_late_verdict_of_a_hook_is_recorded_as_merged_with_the_order(
    tmp_path: Path, wish: dict[str, str], says: str, codes_: tuple[str, ...], result: str
) -> None:
    async def ask() -> tuple[Asking, LoggedVerdict]:
        async with asking(
            tmp_path, hook("one", "held", more=wishing(**wish)), {"held": HeldHook}, deadline=DEADLINE
        ) as at:
            await at.change()
            Held.let_go.set()
            return at, await at.recorded()

    at, logged = asyncio.run(ask())

    assert (logged.kind, logged.decided, logged.codes, logged.answered) == ("late", says, codes_, "approve")
    labels = {"callback": "cart-changed", "route": "one", "kind": "late", "verdict": says, "result": result}
    assert at.counted("verdicts_unused_total", **labels) == 1


def test_the_oldest_of_too_many_late_runs_is_cancelled_and_counted(tmp_path: Path) -> None:
    Forever.cancelled.clear()

    async def ask() -> float:
        async with asking(tmp_path, route("one", "forever"), {"forever": Forever}, deadline=DEADLINE) as at:
            await asyncio.gather(*(at.validate(f"o{number}") for number in range(MOST_UNFINISHED)))
            assert not Forever.cancelled.is_set()
            await at.validate("one-more")
            assert await asyncio.to_thread(Forever.cancelled.wait, PATIENCE)
            return at.counted("verdicts_dropped_total")

    assert asyncio.run(ask()) == 1


# --- one miss after another -------------------------------------------------------------------------------------------


def breaker_of(orders: int) -> tuple[CircuitBreaker, HandClock]:
    clock = HandClock()
    return CircuitBreaker(orders=orders, open_for=timedelta(seconds=30), clock=clock), clock


def test_the_circuit_breaker_skips_a_late_route_and_then_probes_it(tmp_path: Path) -> None:
    breaker, clock = breaker_of(2)

    async def ask() -> tuple[list[str | None], Asking]:
        said = []
        async with asking(tmp_path, route("one", "held"), {"held": Held}, breaker=breaker, deadline=DEADLINE) as at:
            for number, seconds in enumerate((0, 0, 0, 29, 1, 0)):
                clock.now += seconds
                if seconds == 1:
                    Held.let_go.set()
                (verdict,) = (await at.validate(f"o{number}")).verdicts
                said.append(verdict.missing)
                await asyncio.sleep(0)
            return said, at

    said, at = asyncio.run(ask())

    assert said == ["late", "late", "circuit-open", "circuit-open", None, None]
    assert at.counted("verdicts_missing_total", callback="order-rules", route="one", reason="circuit-open") == 2


def test_a_quick_failure_is_no_miss(tmp_path: Path) -> None:
    """It holds up nobody; and an order that a rule cannot be decided on must not switch the rule off for the others."""
    breaker, _ = breaker_of(1)

    async def ask() -> list[str | None]:
        async with asking(tmp_path, route("one", "fails"), {"fails": raising(ValueError)}, breaker=breaker) as at:
            answers: list[Verdict] = []
            for number in range(3):
                answers += (await at.validate(f"o{number}")).verdicts
                await asyncio.sleep(0)
            return [verdict.missing for verdict in answers]

    assert asyncio.run(ask()) == ["failed"] * 3


def test_slow_hooks_of_one_order_do_not_open_the_circuit_breaker_for_the_others(tmp_path: Path) -> None:
    breaker, _ = breaker_of(20)

    async def ask() -> None:
        routes = hook("one", "never-o1", no_answer="approve")
        async with asking(tmp_path, routes, {"never-o1": NeverForO1}, breaker=breaker, deadline=DEADLINE) as at:
            slow = await asyncio.gather(*(at.change(note=number) for number in range(50)))
            assert {decided(answer)[0] for answer in slow} == {("accept", "late")}
            await asyncio.sleep(0)
        async with asking(tmp_path, routes, {"never-o1": NeverForO1}, breaker=breaker) as at:
            others = await asyncio.gather(*(at.change(order_id=f"other-{number}") for number in range(105)))
            assert {decided(answer)[0] for answer in others} == {("refuse", None)}

    asyncio.run(ask())


def test_a_failure_past_the_soft_limit_is_a_miss(tmp_path: Path) -> None:
    """A destination that does not answer: its client gives up a little before the deadline."""

    class GivesUp(Dawdles):
        async def validate(self, order: Order, context: Context[Settings]) -> list[Problem]:
            await super().validate(order, context)
            raise TimeoutError

    breaker, _ = breaker_of(1)

    async def ask() -> list[str | None]:
        handlers = {"gives-up": GivesUp}
        async with asking(tmp_path, route("one", "gives-up"), handlers, breaker=breaker, soft_limit="1ms") as at:
            answers: list[Verdict] = []
            for _ in range(2):
                answers += (await at.validate()).verdicts
                await asyncio.sleep(0)
            return [verdict.missing for verdict in answers]

    assert asyncio.run(ask()) == ["failed", "circuit-open"]


def test_a_route_delayed_by_another_is_no_miss(tmp_path: Path) -> None:
    breaker, _ = breaker_of(1)

    async def ask() -> list[tuple[str | None, ...]]:
        routes = route("one", "block") + route("two", "deny")
        async with asking(tmp_path, routes, {"block": Block, "deny": Deny}, breaker=breaker, deadline=DEADLINE) as at:
            answers: list[Answer] = []
            for _ in range(2):
                answers.append(await at.validate())
                await asyncio.sleep(0)
                Block.released.set()
            return [tuple(verdict.missing for verdict in answer.verdicts) for answer in answers]

    assert asyncio.run(ask()) == [("blocks", "held-up"), ("circuit-open", None)]


# --- many calls for one order -----------------------------------------------------------------------------------------


class Reads:
    """A Norce that answers the read of an order when the test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._has_begun = asyncio.Event()
        self._may_answer: dict[str, asyncio.Event] = {}
        self.orders: dict[str, dict[str, Any]] = {}  # by id, as they are when a read begins

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        order_id = request.url.path.rpartition("/")[2]
        self.begun.append(order_id)
        self._has_begun.set()
        answer = ORDER | {"id": order_id} | self.orders.get(order_id, {})
        if order_id in self._may_answer:
            await self._may_answer[order_id].wait()
        return httpx.Response(200, json=answer)

    def hold(self, order_id: str) -> None:
        self._may_answer[order_id] = asyncio.Event()

    def answer(self, order_id: str) -> None:
        self._may_answer.pop(order_id).set()

    async def have_begun(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.begun) < count:
                self._has_begun.clear()
                await self._has_begun.wait()
        for _ in range(20):
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def flood(at: Asking, order_id: str = "flooded", count: int = 200) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    calls = [asyncio.create_task(at.validate(order_id)) for _ in range(count)]
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def test_a_flood_for_one_order_lets_no_other_order_pass(tmp_path: Path) -> None:
    norce = Reads()
    norce.hold("flooded")

    async def ask() -> list[Answer]:
        routes = route("one", "deny", no_answer="approve")
        async with asking(tmp_path, routes, {"deny": Deny}, norce) as at, flood(at):
            await norce.have_begun(4)
            return [await at.validate(f"o{number}") for number in range(5)]

    assert [codes(list(answer.verdicts)) for answer in asyncio.run(ask())] == [["a-code"]] * 5
    assert norce.begun.count("flooded") == 4


def test_a_flood_for_an_order_does_not_let_it_pass(tmp_path: Path) -> None:
    """A validation whose read was delayed by others gets no verdict, not even that of `no_answer`."""
    norce = Reads()
    norce.hold("flooded")

    async def ask() -> list[Any]:
        routes = route("one", "deny", no_answer="approve")
        async with asking(tmp_path, routes, {"deny": Deny}, norce, deadline=DEADLINE) as at, flood(at) as calls:
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(ask())
    assert [each.verdicts[0].missing for each in answers[:4]] == ["order-unreadable"] * 4
    assert {type(each) for each in answers[4:]} == {OrderBusy}


def test_a_validation_whose_read_began_late_gets_no_no_answer(tmp_path: Path) -> None:
    norce = Reads()
    norce.hold("flooded")

    async def ask() -> list[Any]:
        routes, handlers = route("one", "deny", no_answer="approve"), {"deny": Deny}
        async with asking(tmp_path, routes, handlers, norce, deadline=DEADLINE) as at, flood(at, count=5) as calls:
            await norce.have_begun(4)
            calls[0].cancel()
            await norce.have_begun(5)
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(ask())
    assert [each.verdicts[0].missing for each in answers[1:4]] == ["order-unreadable"] * 3
    assert type(answers[4]) is OrderBusy


def test_a_shopper_who_corrects_the_cart_is_not_refused_by_an_older_read(tmp_path: Path) -> None:
    class DenyUncorrected(Deny):
        async def validate(self, order: Order, context: Context[Code]) -> list[Problem]:
            return [] if order.data.get("corrected") else await super().validate(order, context)

    norce = Reads()
    norce.hold("o1")

    async def ask() -> tuple[list[Answer], Answer]:
        routes = route("one", "deny")
        async with asking(tmp_path, routes, {"deny": DenyUncorrected}, norce) as at, flood(at, "o1", 9) as before:
            await norce.have_begun(4)
            norce.orders["o1"] = {"corrected": True}
            after = asyncio.create_task(at.validate())
            await norce.have_begun(4)
            norce.answer("o1")
            return await asyncio.gather(*before), await after

    before, after = asyncio.run(ask())
    assert [answer.stops for answer in before] == [True] * 4 + [False] * 5
    assert not after.stops
    assert len(norce.begun) == 5


def test_all_validations_that_share_a_read_learn_that_norce_has_no_such_order(tmp_path: Path) -> None:
    async def ask() -> list[Any]:
        async with (
            asking(tmp_path, route("one", "deny"), {"deny": Deny}, lambda _request: httpx.Response(404)) as at,
            flood(at, count=20) as calls,
        ):
            return await asyncio.gather(*calls, return_exceptions=True)

    assert {type(each) for each in asyncio.run(ask())} == {OrderMissing}


class Counts(HookHandler[Settings]):
    """Counts its calls, and refuses with the number of the call when it is let go."""

    begun: ClassVar[int] = 0
    calls: ClassVar["queue.SimpleQueue[int]"] = queue.SimpleQueue()
    let_go: ClassVar[threading.Event] = threading.Event()

    async def change(self, order: Order, context: Context[Settings]) -> list[Patch]:
        Counts.begun += 1
        number = Counts.begun
        self.calls.put(number)
        await asyncio.to_thread(self.let_go.wait, PATIENCE)
        raise Refuse(f"call-{number}", "No.")


@contextlib.asynccontextmanager
async def counting(folder: Path, more: str = "", **given: Any) -> AsyncIterator[Asking]:
    Counts.begun, Counts.calls = 0, queue.SimpleQueue()
    Counts.let_go.clear()
    try:
        async with asking(folder, hook("one", "counts") + more, HOOKS | {"counts": Counts}, **given) as at:
            try:
                yield at
            finally:
                Counts.let_go.set()
    finally:
        Counts.let_go.set()


async def call_begun() -> int:
    return await asyncio.to_thread(Counts.calls.get, timeout=PATIENCE)


def refusals(answers: list[Answer]) -> list[str]:
    return [answer.refusal.code for answer in answers if answer.refusal is not None]


def test_equal_hooks_of_one_order_share_one_evaluation_and_its_answer(tmp_path: Path) -> None:
    async def ask() -> tuple[list[Answer], Asking]:
        async with counting(tmp_path, hook("s", "refuse", more=SHADOW)) as at:
            calls = [asyncio.create_task(at.change()) for _ in range(20)]
            await call_begun()
            assert at.verdicts.waiting == 20
            Counts.let_go.set()
            answers = await asyncio.gather(*calls)
            await at.recorded()
            return answers, at

    answers, at = asyncio.run(ask())
    assert refusals(answers) == ["call-1"] * 20
    assert all(answer is answers[0] for answer in answers)
    assert at.logged.empty()  # the shadow was asked once
    labels = {"callback": "cart-changed", "route": "one", "verdict": "refuse"}
    assert at.counted("verdict_duration_seconds_count", **labels) == 1


@pytest.mark.parametrize(
    "other", [{"note": 1}, {"order_id": "o2"}, {"callback": "watched"}], ids=["bytes", "order", "callback"]
)
def test_hooks_that_differ_share_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    async def ask() -> list[Answer]:
        async with counting(tmp_path, hook("two", "counts", callback="watched")) as at:
            calls = [asyncio.create_task(at.change()), asyncio.create_task(at.change(**other))]
            assert [await call_begun(), await call_begun()] == [1, 2]
            Counts.let_go.set()
            return await asyncio.gather(*calls)

    assert sorted(refusals(asyncio.run(ask()))) == ["call-1", "call-2"]


def test_a_hook_does_not_get_the_answer_of_an_evaluation_that_has_ended(tmp_path: Path) -> None:
    async def ask() -> list[Answer]:
        async with counting(tmp_path) as at:
            Counts.let_go.set()
            answers = [await at.change() for _ in range(3)]
            assert not at.verdicts._evaluations
            return answers

    assert refusals(asyncio.run(ask())) == ["call-1", "call-2", "call-3"]


@pytest.mark.parametrize(
    ("first", "second"), [(0.5, 0.0), (0.0, 0.5)], ids=["the first came slowly", "the second came slowly"]
)
def test_a_hook_keeps_its_own_deadline_beside_an_equal_one(tmp_path: Path, first: float, second: float) -> None:
    """It joins neither an evaluation that had less time than its own nor one that ends after its deadline."""

    async def ask() -> list[Answer]:
        async with counting(tmp_path) as at:
            now = time.monotonic()
            calls = [
                asyncio.create_task(at.change(received_at=now - part * FAR.total_seconds())) for part in (first, second)
            ]
            assert [await call_begun(), await call_begun()] == [1, 2]
            Counts.let_go.set()
            return await asyncio.gather(*calls)

    assert refusals(asyncio.run(ask())) == ["call-1", "call-2"]


def test_an_equal_hook_is_evaluated_again_if_the_first_one_is_cancelled(tmp_path: Path) -> None:
    async def ask() -> list[Answer]:
        async with counting(tmp_path) as at:
            calls = [asyncio.create_task(at.change()) for _ in range(4)]
            await call_begun()
            calls[0].cancel()
            await call_begun()
            Counts.let_go.set()
            return await asyncio.gather(*calls[1:])

    assert refusals(asyncio.run(ask())) == ["call-2"] * 3


# --- what is recorded -------------------------------------------------------------------------------------------------

RECORDED: dict[str, tuple[str, list[tuple[str, str, tuple[str, ...], str | None]]]] = {
    "a plain approval": (route("one", "approve"), []),
    "a problem beside an approval": (
        route("one", "approve") + route("two", "deny"), [("two", "reject", ("a-code",), None)],
    ),
    "two problems": (
        route("one", "deny") + route("two", "deny"),
        [("one", "reject", ("a-code",), None), ("two", "reject", ("a-code",), None)],
    ),
    "a no_answer that rejects": (route("one", "broken"), [("one", "failed", ("failed",), "reject")]),
    "a no_answer that approves": (route("one", "broken", no_answer="approve"), []),
    "an accepted change": (hook("one", "accept"), []),
    "a patch": (hook("one", "patch"), [("one", "patch", ("/cart/attributes/priceList",), None)]),
    "a patch that the order has already": (hook("one", "patch", more=wishing(value="ordinarie")), []),
    "a patch beside one that the order has already": (
        hook("one", "patch", more=wishing(value="ordinarie")) + hook("two", "patch", more=wishing(path="/cart/note")),
        [("two", "patch", ("/cart/note",), None)],
    ),
    "a patch that an earlier route made": (
        hook("one", "patch") + hook("two", "patch"), [("one", "patch", ("/cart/attributes/priceList",), None)],
    ),
    "a patch that a refusal makes void": (
        hook("one", "patch") + hook("two", "refuse"), [("two", "refuse", ("a-code",), None)],
    ),
    "a patch that cannot be used": (hook("one", "patch", more=wishing(path="/customer/type")), []),
}  # fmt: skip


@pytest.mark.parametrize(("routes", "expected"), RECORDED.values(), ids=RECORDED)
def test_refusals_and_patches_are_recorded_and_plain_approvals_are_not(
    tmp_path: Path, routes: str, expected: list[tuple[str, str, tuple[str, ...], str | None]]
) -> None:
    class Broken(Deny):
        async def validate(self, order: Order, context: Context[Code]) -> list[Problem]:
            raise ValueError("canary")

    async def ask() -> Asking:
        handlers = HOOKS | {"deny": Deny, "approve": Approve, "broken": Broken}
        async with asking(tmp_path, routes, handlers) as at:
            await (at.validate() if "order-rules" in routes else at.change())
            await asyncio.sleep(0)  # nothing is recorded before the answer is on its way
            return at

    at = asyncio.run(ask())

    assert [(each.route, each.decided, each.codes, each.answered) for each in at.answered] == expected
    assert {(each.kind, each.order_id, each.channel) for each in at.answered} <= {
        ("answer", "o1", Channel("norce", "1"))
    }
    assert "canary" not in str(at.answered)
    assert "medlem" not in str(at.answered)


def test_equal_hooks_that_share_an_evaluation_are_recorded_once(tmp_path: Path) -> None:
    async def ask() -> list[LoggedVerdict]:
        async with counting(tmp_path) as at:
            calls = [asyncio.create_task(at.change()) for _ in range(4)]
            await call_begun()
            Counts.let_go.set()
            await asyncio.gather(*calls)
            await asyncio.sleep(0)
            return at.answered

    assert [(each.decided, each.codes) for each in asyncio.run(ask())] == [("refuse", ("call-1",))]


# --- in the shadow ----------------------------------------------------------------------------------------------------


def shadowed(
    folder: Path, enforced: str, shadow: str, handlers: dict[str, Any] = HOOKS
) -> tuple[Answer, LoggedVerdict, str]:
    """The answer, what the shadow said, and whether it would have been the same answer with it."""

    async def ask() -> tuple[Answer, LoggedVerdict, str]:
        async with asking(folder, enforced + shadow, handlers | {"deny": Deny, "approve": Approve}) as at:
            answer = await (at.validate() if "order-rules" in shadow else at.change())
            logged = await at.recorded()
            labels = {"callback": logged.callback, "route": logged.route, "kind": "shadow", "verdict": logged.decided}
            (result,) = (
                each for each in ("same", "differs") if at.counted("verdicts_unused_total", **labels, result=each)
            )
            return answer, logged, result

    return asyncio.run(ask())


SHADOWS: dict[str, tuple[str, str, str, str]] = {
    "approves": (route("a", "approve"), route("s", "approve", more=SHADOW), "approve", "same"),
    "rejects": (route("a", "approve"), route("s", "deny", more=SHADOW), "reject", "differs"),
    "rejects what is rejected": (route("a", "deny"), route("s", "deny", more=SHADOW), "reject", "same"),
    "is alone": ("", route("s", "deny", more=SHADOW), "reject", "differs"),
    "accepts": (hook("a", "patch"), hook("s", "accept", more=SHADOW), "accept", "same"),
    "refuses": (hook("a", "patch"), hook("s", "refuse", more=SHADOW), "refuse", "differs"),
    "refuses what is refused": (hook("a", "refuse"), hook("s", "refuse", more=SHADOW), "refuse", "same"),
    "patches": (hook("a", "accept"), hook("s", "patch", more=SHADOW), "patch", "differs"),
    "patches alike": (hook("a", "patch"), hook("s", "patch", more=SHADOW), "patch", "same"),
    "contradicts": (
        hook("a", "patch"), hook("s", "patch", more=SHADOW + wishing(value="another")), "failed", "same",
    ),
    "patches what is refused": (hook("a", "refuse"), hook("s", "patch", more=SHADOW), "patch", "same"),
}  # fmt: skip


@pytest.mark.parametrize(("enforced", "shadow", "says", "result"), SHADOWS.values(), ids=SHADOWS.keys())
def test_a_shadow_verdict_is_recorded_and_compared_and_never_used(
    tmp_path: Path, enforced: str, shadow: str, says: str, result: str
) -> None:
    answer, logged, compared = shadowed(tmp_path, enforced, shadow)

    assert [verdict.route.name for verdict in answer.verdicts] == ["a"] * bool(enforced)
    assert (logged.route, logged.kind, logged.decided, logged.answered) == ("s", "shadow", says, None)
    assert compared == result


def test_the_order_is_read_for_a_shadow_alone(tmp_path: Path) -> None:
    answer, logged, _ = shadowed(tmp_path, "", route("s", "deny", more=SHADOW))

    assert not answer.stops
    assert logged.codes == ("a-code",)


@pytest.mark.parametrize("computes", [False, True])
def test_a_blocking_shadow_delays_neither_the_answer_nor_other_handlers(tmp_path: Path, computes: bool) -> None:
    block = type("Shadow", (Block,), {"computes": computes})

    async def ask() -> tuple[list[Answer], LoggedVerdict]:
        routes = route("s", "block", more=SHADOW) + route("a", "deny") + route("b", "in-place")
        async with asking(tmp_path, routes, {"block": block, "deny": Deny, "in-place": InPlace}) as at:
            answers = [await at.validate() for _ in range(3)]
            assert at.logged.empty()
            Block.released.set()
            return answers, await at.recorded()

    answers, logged = asyncio.run(ask())

    for answer in answers:
        assert [verdict.missing for verdict in answer.verdicts] == [None, None]
    assert (logged.decided, logged.codes) == ("reject", ("too-late",))


def test_a_shadow_route_whose_condition_does_not_hold_is_not_run(tmp_path: Path) -> None:
    async def ask() -> bool:
        when = ", when: {scope: /country, schema: {const: NO}}"
        async with asking(tmp_path, route("s", "deny", more=SHADOW + when), {"deny": Deny}) as at:
            await at.validate()
            await asyncio.sleep(0)
            return at.logged.empty()

    assert asyncio.run(ask())
