"""`adapter.verdicts`: an answer inside the deadline, whatever the handlers and Norce do."""

import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import structlog

from adapter import config as configuration
from adapter import logs
from adapter.app import accounts
from adapter.metrics import Metrics
from adapter.norce.client import Norce, OrderNotFound
from adapter.orders import Order
from adapter.plugin import Context, Problem, Settings, ValidationHandler
from adapter.routes import Routes, build
from adapter.runner import Runner
from adapter.verdicts import Verdict, Verdicts

DEADLINE = timedelta(milliseconds=400)
FAR_TOO_LATE = 15.0  # seconds: a machine may be slow, a verdict that waits for its handler never comes
ORDER: dict[str, Any] = {"id": "o1", "merchant": "norce", "channel": "1", "country": "SE", "items": [1]}
CONFIG = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
norce: {base_url: "http://127.0.0.1:1", timeout: 10s}
merchants: {norce: {tokens: ["${env:ONE}", "${env:TWO}"], channels: {"1": {}, "2": {}}}}
senders: {header_secrets: [{header: authorization, values: ["${env:ONE}"]}]}
callbacks: {order-rules: {kind: validation, deadline: 400ms}}
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
    """Does not stop when it is told to."""

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
        self.released.wait(FAR_TOO_LATE * 2)
        return [Problem("too-late", "Nobody waits for this.")]


class Networker(ValidationHandler[Settings]):
    """Declares that it computes, and calls somebody."""

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


class NotACoroutine(ValidationHandler[Settings]):
    def validate(self, order: Order, context: Context[Settings]) -> Any:  # type: ignore[override]
        return []


class RaisesAtTheCall(ValidationHandler[Settings]):
    def validate(self, order: Order, context: Context[Settings]) -> Any:  # type: ignore[override]
        raise ValueError("before there was a coroutine")


class Point:
    def __init__(self, name: str, class_: Any) -> None:
        self.name = name
        self._class = class_

    def load(self) -> Any:
        return self._class


def route(name: str, handler: str, *, no_answer: str = "reject", more: str = "") -> str:
    return f"  {name}: {{callback: order-rules, handler: {handler}, no_answer: {no_answer}{more}}}\n"


def built(folder: Path, routes: str, handlers: dict[str, Any]) -> tuple[configuration.Config, Routes]:
    path = folder / "config.yaml"
    path.write_text(CONFIG + (routes or "  {}\n"))
    config = configuration.load(path, {"ONE": "the-first-token", "TWO": "the-second-token"})
    points: Any = [Point(name, class_) for name, class_ in handlers.items()]
    return config, build(config, points)


def is_there(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=ORDER | {"id": request.url.path.rpartition("/")[2]})


@contextlib.asynccontextmanager
async def asking(
    config: configuration.Config, routes: Routes, norce: Callable[[httpx.Request], Any], metrics: Metrics
) -> AsyncIterator[Verdicts]:
    def make_norce() -> Norce:
        transport = httpx.MockTransport(norce)
        return Norce(accounts(config), adapter_id="an_adapter", timeout=config.norce.timeout, transport=transport)

    runner = Runner(make_norce=make_norce, clock=lambda: datetime.now(UTC))
    client = make_norce()
    try:
        yield Verdicts(routes, runner=runner, norce=client, metrics=metrics, clock=lambda: time.time_ns() // 1_000_000)
    finally:
        for handler in (Block, Stubborn):
            handler.released.set()
        await client.aclose()
        await runner.stop(timedelta(seconds=10))
        for handler in (Block, Stubborn):
            handler.released.clear()


def asked(
    folder: Path,
    routes: str,
    handlers: dict[str, Any],
    norce: Callable[[httpx.Request], Any] = is_there,
    *,
    channel: str = "1",
    metrics: Metrics | None = None,
) -> list[Verdict]:
    config, made = built(folder, routes, handlers)

    async def ask() -> list[Verdict]:
        async with asking(config, made, norce, metrics or Metrics("0")) as verdicts:
            # The handlers that hang are released after this: whoever waits for one does not come back.
            async with asyncio.timeout(FAR_TOO_LATE):
                return await verdicts.validate(made.callbacks["order-rules"], "norce", channel, "o1")

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
    assert [verdict.route for verdict in verdicts] == ["zeta", "alpha", "beta"]
    assert all(verdict.missing is None for verdict in verdicts)


def test_only_routes_whose_condition_holds_are_asked(tmp_path: Path) -> None:
    routes = route("here", "deny", more=", when: {scope: /country, schema: {const: SE}}, settings: {code: here}")
    routes += route("there", "deny", more=", when: {scope: /country, schema: {const: NO}}, settings: {code: there}")
    routes += route("nowhere", "deny", more=", when: {scope: /county}, settings: {code: nowhere}")

    assert codes(asked(tmp_path, routes, {"deny": Deny})) == ["here"]


def test_no_route_is_no_verdict_and_norce_is_not_asked(tmp_path: Path) -> None:
    assert asked(tmp_path, "", {}, lambda _request: pytest.fail("nobody needs the order")) == []


def test_a_handler_gets_its_own_settings_and_a_deadline_before_the_answers(tmp_path: Path) -> None:
    Contexts.given.clear()
    before = datetime.now(UTC)

    asked(tmp_path, route("one", "contexts"), {"contexts": Contexts}, channel="2")

    [context] = Contexts.given
    assert before < context.deadline < datetime.now(UTC) + DEADLINE
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
    "no coroutine": NotACoroutine,
    "an exception at the call": RaisesAtTheCall,
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
    "late", [Forever, ForeverInPlace, Stubborn, Block], ids=["awaits", "awaits in place", "does not stop", "blocks"]
)
def test_a_late_answer_counts_as_the_routes_no_answer(tmp_path: Path, late: Any, no_answer: str) -> None:
    routes = route("one", "late", no_answer=no_answer) + route("two", "in-place")

    first, second = asked(tmp_path, routes, {"late": late, "in-place": InPlace})

    assert first.missing == "late"
    assert [problem.code for problem in first.problems] == {"approve": [], "reject": ["not-answered"]}[no_answer]
    assert (second.missing, codes([second])) == (None, ["a-code"])


def test_a_handler_that_is_late_is_told_to_stop(tmp_path: Path) -> None:
    Forever.cancelled.clear()

    asked(tmp_path, route("one", "late"), {"late": Forever})

    assert Forever.cancelled.wait(FAR_TOO_LATE)


def test_the_deadline_holds_while_every_handler_blocks(tmp_path: Path) -> None:
    """Validation upon validation: what blocks the plugins' thread never reaches the answers."""
    config, made = built(
        tmp_path, route("one", "block") + route("two", "in-place"), {"block": Block, "in-place": InPlace}
    )

    async def ask() -> list[list[Verdict]]:
        async with asking(config, made, is_there, Metrics("0")) as verdicts:
            async with asyncio.timeout(FAR_TOO_LATE):
                return await asyncio.gather(
                    *(verdicts.validate(made.callbacks["order-rules"], "norce", "1", f"o{n}") for n in range(20))
                )

    assert {(one.missing, two.missing) for one, two in asyncio.run(ask())} == {("late", None)}


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
def test_an_order_that_cannot_be_read_is_every_routes_no_answer(
    tmp_path: Path, norce: Callable[[httpx.Request], Any]
) -> None:
    routes = route("one", "deny", no_answer="approve") + route("two", "deny", no_answer="reject")

    one, two = asked(tmp_path, routes, {"deny": Deny}, norce)

    assert (one.missing, two.missing) == ("order-unreadable", "order-unreadable")
    assert codes([one, two]) == ["not-answered"]


def test_an_order_that_norce_does_not_have_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(OrderNotFound):
        asked(tmp_path, route("one", "deny"), {"deny": Deny}, lambda _request: httpx.Response(404))


def test_the_second_token_is_tried_where_the_first_is_refused(tmp_path: Path) -> None:
    shown: list[str] = []

    def norce(request: httpx.Request) -> httpx.Response:
        shown.append(request.headers["authorization"])
        return is_there(request) if "second" in shown[-1] else httpx.Response(401)

    verdicts = asked(tmp_path, route("one", "deny"), {"deny": Deny}, norce)

    assert codes(verdicts) == ["a-code"]
    assert shown == ["Bearer the-first-token", "Bearer the-second-token"]


# --- what is counted and logged ---------------------------------------------------------------------------------------


def test_verdicts_are_counted_by_route(tmp_path: Path) -> None:
    metrics = Metrics("0")
    routes = route("yes", "approve") + route("no", "deny") + route("late", "forever", no_answer="approve")

    asked(tmp_path, routes, {"approve": Approve, "deny": Deny, "forever": Forever}, metrics=metrics)

    counted = {
        (route_, verdict): metrics.registry.get_sample_value(
            "norce_adapter_verdicts_total", {"callback": "order-rules", "route": route_, "verdict": verdict}
        )
        for route_, verdict in [("yes", "approve"), ("no", "reject"), ("late", "no_answer")]
    }
    assert set(counted.values()) == {1.0}


def test_an_answer_that_did_not_come_is_logged_once_with_its_reason(tmp_path: Path) -> None:
    stream = io.StringIO()
    root_handlers = logs.logging.getLogger().handlers
    logs.configure(stream=stream)
    try:
        asked(tmp_path, route("one", "broken"), {"broken": raising(lambda: ValueError("canary"))})
    finally:
        structlog.reset_defaults()
        logs.logging.getLogger().handlers = root_handlers

    failed, no_answer = map(json.loads, stream.getvalue().splitlines())
    assert (failed["event"], failed["exception"][0]["type"]) == ("handler_failed", "builtins.ValueError")
    assert (no_answer["event"], no_answer["reason"], no_answer["result"]) == ("no_answer", "failed", "reject")
    assert "canary" not in stream.getvalue()
