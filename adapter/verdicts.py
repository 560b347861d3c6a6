"""
May this purchase go on? Asked of all routes in parallel, answered inside one deadline, always.

At the deadline the answer goes out from what is known; a route that is late, broken or cannot be asked counts as its
`no_answer`. Norce goes on without us when it tires of waiting and says nowhere when (the payment providers in front of
it wait 3 to 10 s), so the deadline is ours. Reading the order is inside it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from adapter.conditions import Result
from adapter.metrics import Metrics
from adapter.norce.client import Norce, NorceRefused, NorceUnavailable
from adapter.orders import Order
from adapter.plugin import Problem, ValidationHandler
from adapter.routes import Callback, Route, Routes, wants
from adapter.runner import Call, Runner

log = structlog.get_logger(__name__)

MARGIN = timedelta(milliseconds=50)  # for the answer's own way out
MOST_OF_MARGIN = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one route decided. `missing` says why there is no answer; the problems are then its `no_answer`."""

    route: str
    problems: tuple[Problem, ...]
    missing: str | None = None


class Verdicts:
    """Asks the routes of a validation. `clock` is the ledger's, in milliseconds."""

    def __init__(
        self, routes: Routes, *, runner: Runner, norce: Norce, metrics: Metrics, clock: Callable[[], int]
    ) -> None:
        self._routes = routes
        self._runner = runner
        self._norce = norce
        self._metrics = metrics
        self._clock = clock

    async def validate(self, callback: Callback, merchant: str, channel: str, order_id: str) -> list[Verdict]:
        """
        What each route that was asked decided, in the order of the configuration.

        Answers before the callback's deadline whatever the routes do. Raises `norce.client.OrderNotFound`.
        """
        routes = self._routes.of(callback.name)
        if not routes:
            return []
        assert callback.deadline is not None
        started = asyncio.get_running_loop().time()
        budget = callback.deadline - min(MARGIN, callback.deadline * MOST_OF_MARGIN)
        ends = started + budget.total_seconds()
        try:
            order = await self._norce.order(merchant, channel, order_id, within=budget)
        except (NorceUnavailable, NorceRefused) as error:
            log.warning("order_unreadable", order_id=order_id, merchant=merchant, error_type=type(error).__name__)
            verdicts = [self._no_answer(route, "order-unreadable") for route in routes]
        else:
            verdicts = await self._ask(routes, order, merchant, channel, order_id, ends)
        for verdict in verdicts:
            decided = "no_answer" if verdict.missing else "reject" if verdict.problems else "approve"
            self._metrics.verdicts.labels(callback.name, verdict.route, decided).inc()
        return verdicts

    async def _ask(
        self, routes: tuple[Route, ...], order: Order, merchant: str, channel: str, order_id: str, ends: float
    ) -> list[Verdict]:
        now = self._clock()
        left = ends - asyncio.get_running_loop().time()
        deadline = datetime.fromtimestamp(now / 1000, UTC) + timedelta(seconds=left)
        answers: list[tuple[Route, asyncio.Task[list[Problem]]]] = []
        verdicts: dict[str, Verdict] = {}
        for route in routes:
            held = wants(route, order.data)
            self._metrics.conditions.labels("route", held.value).inc()
            if held is Result.ERROR:
                verdicts[route.name] = self._no_answer(route, "condition")
            elif held is Result.MATCHED:
                call = Call(
                    route=route.name,
                    settings=route.settings[merchant, channel],
                    merchant=merchant,
                    channel=channel,
                    order_id=order_id,
                    identity=order_id,
                    deadline=deadline,
                    first_attempt_at=datetime.fromtimestamp(now / 1000, UTC),
                )
                assert isinstance(route.handler, ValidationHandler)
                answers.append((route, asyncio.create_task(self._runner.validate(route.handler, order, call))))
        if answers:
            await asyncio.wait([task for _, task in answers], timeout=max(left, 0))
        for route, task in answers:
            verdicts[route.name] = self._verdict(route, task)
        return [verdicts[route.name] for route in routes if route.name in verdicts]

    def _verdict(self, route: Route, task: "asyncio.Task[list[Problem]]") -> Verdict:
        if not task.done():
            task.cancel()
            return self._no_answer(route, "late")
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            log.error("handler_failed", route=route.name, handler=route.handler_name, exc_info=error)
            return self._no_answer(route, "failed")
        problems = task.result()
        if not isinstance(problems, list) or not all(map(_can_be_told, problems)):
            log.error("handler_failed", route=route.name, handler=route.handler_name, reason="returned no problems")
            return self._no_answer(route, "failed")
        return Verdict(route=route.name, problems=tuple(problems))

    def _no_answer(self, route: Route, why: str) -> Verdict:
        log.warning("no_answer", route=route.name, handler=route.handler_name, reason=why, result=route.no_answer)
        if route.no_answer == "approve":
            return Verdict(route=route.name, problems=(), missing=why)
        problem = Problem("not-answered", f"{route.name} could not be decided in time; please try again.")
        return Verdict(route=route.name, problems=(problem,), missing=why)


def _can_be_told(problem: object) -> bool:
    """Whether it is a problem with text in it: what cannot be written as JSON would take the other answers with it."""
    if not isinstance(problem, Problem) or not isinstance(problem.message, str):
        return False
    try:
        problem.message.encode()
    except UnicodeEncodeError:
        return False
    return True
