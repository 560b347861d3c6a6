"""Answers validations and hooks with the verdicts of all routes, inside one deadline.

At the deadline the answer goes out with the verdicts that are there. A route that is late, broken or cannot be asked
gets its `no_answer`. Norce stops waiting at a time that it documents nowhere (the payment providers in front of it wait
3 to 10 s), so the deadline is ours. It includes reading the order.

What a caller causes stays with its order. Equal hooks share one evaluation, and validations share a read that starts
after they came. A validation whose read is delayed by others until its deadline is refused, and so is each call that
misses its deadline because this process is too busy. They never get a `no_answer`, because a caller could choose that.

A late route is not stopped: its verdict is recorded when it comes. Nothing is logged before the answer is on its way,
because writing releases the interpreter, and a plugin's thread that computes may keep it for long.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import msgspec
import structlog

from adapter.conditions import Result
from adapter.identifiers import Channel
from adapter.ledger.verdict_log import LoggedVerdict
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import Norce, NorceBusy, NorceError, NorceRefused, NorceUnavailable, OrderNotFound
from adapter.offload import SMALL_BYTES
from adapter.orders import Order
from adapter.plugin import Context, Outcome, Pace, Undecided
from adapter.routing.routes import Callback, Route, Routes, wants
from adapter.routing.runner import LoopName, Run, Runner, leaves
from adapter.verdicts.answer import Answer, Verdict, combine, no_answer, verdict_of
from adapter.verdicts.circuit_breaker import CircuitBreaker
from adapter.verdicts.patches import PatchInvalid
from adapter.verdicts.shared_runs import SharedRuns

log = structlog.get_logger(__name__)

# For the way of the answer. Measured with 200 requests a second on two cores with 15 other processes that are ready to
# run: an answer comes at most 390 ms after its time. Past threads that compute without pause, no margin is enough.
MARGIN = timedelta(milliseconds=400)
MOST_OF_MARGIN = 0.2  # of the deadline
NO_BUGS = (Outcome, NorceError, Undecided, TimeoutError)  # errors that are logged without a traceback
MOST_CODES = 20  # in a line of the log
SECONDS_BETWEEN_TRACEBACKS = 3600  # of one kind
ORDER_READS = "order-reads"  # limits, as metrics and logs name them
LATE_LOOP = "late-loop"
MOST_LAG = 0.5  # of the deadline: with more, a verdict is missing because the loop was late
READS_OF_AN_ORDER_AT_ONCE = 4
# A hook joins an evaluation that has at least this part of the time that the hook has left. One whose request came
# slowly has less.
LEAST_SHARED_TIME = 0.9
MOST_UNFINISHED = 200  # runs that go on after their answer; each holds an order
# Reasons for a missing verdict that say nothing about the handler: neither a miss nor a success for the breaker.
NOT_ASKED = frozenset({"condition", "circuit-open", "held-up"})
TOO_LATE = frozenset({"late", "held-up", "order-unreadable"})  # reasons that a late loop causes

T = TypeVar("T")


class OrderMissing(Exception):
    """Norce has no order of this id, so a validation has nothing to decide."""


class OrderBusy(Exception):
    """Other calls leave no room or no time for a call. `limit` names the limit."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


class VerdictRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validation or hook whose sender is known and whose form is right."""

    callback: Callback
    channel: Channel
    order_id: str
    order: Order | None = None  # of a hook, with the proposed change in it; that of a validation is read from Norce
    received_at: float = msgspec.field(default_factory=time.monotonic)  # the first byte

    @property
    def answer_by(self) -> float:
        seconds = self.callback.deadline.total_seconds()
        return self.received_at + seconds - min(MARGIN.total_seconds(), seconds * MOST_OF_MARGIN)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "callback": self.callback.name,
            "merchant": self.channel.merchant,
            "channel": self.channel.name,
            "order_id": self.order_id,
        }


class _Evaluation(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A hook that is being answered, with the answer that its repeats get, too."""

    request: VerdictRequest
    body: bytes
    began_at: float
    answer: asyncio.Future[Answer]

    def serves(self, request: VerdictRequest, body: bytes) -> bool:
        """Return True if a hook is equal and its deadline leaves room for this evaluation.

        Alone, the hook would have hardly more time than the evaluation has in all.
        """
        if self.body != body or self.request.answer_by > request.answer_by:
            return False
        left = request.answer_by - time.monotonic()
        return self.request.answer_by - self.began_at >= LEAST_SHARED_TIME * left


class Verdicts:
    """Asks the routes of validations and hooks.

    Args:
        clock: The ledger's clock, in milliseconds.
        lag: Returns the seconds by which the running event loop has been late, in all (see `LoopLag`).
        record: Takes refusals and patches that are answered, late verdicts, and those of routes in shadow mode. Equal
            hooks that share an evaluation are recorded once: they announce one change, and a caller that repeats a hook
            must not fill the log.
    """

    def __init__(
        self,
        routes: Routes,
        *,
        runner: Runner,
        norce: Norce,
        metrics: Metrics,
        clock: Callable[[], int],
        circuit_breaker: CircuitBreaker,
        lag: Callable[[], float],
        record: Callable[[LoggedVerdict], None],
    ) -> None:
        def read(of: tuple[Channel, str], within: timedelta | None) -> Coroutine[Any, Any, Order]:
            return norce.order(*of, within=within)

        self._runner = runner
        self._reads = SharedRuns(read, at_once=READS_OF_AN_ORDER_AT_ONCE)
        self._evaluations: dict[tuple[str, Channel, str], list[_Evaluation]] = {}  # by callback, channel and order
        self._metrics = metrics
        self._clock = clock
        self._circuit_breaker = circuit_breaker
        self._lag = lag
        self._record = record
        self._routes = routes
        self._unfinished: dict[Run[Any], None] = {}  # the oldest first
        self._shown_at: dict[tuple[str, type[BaseException]], float] = {}  # the last traceback of a kind
        self.waiting = 0  # requests that wait for a handler or for Norce
        answered = [callback for callback in routes.callbacks.values() if callback.kind != "notification"]
        if any(route.shadow for each in answered for route in routes.of(each.name)):
            runner.open("shadows")
        for each in answered:
            metrics.callback_deadline.labels(each.name).set(each.deadline.total_seconds())

    async def answer(self, request: VerdictRequest) -> Answer:
        """Return the answer before the deadline, whatever the handlers and Norce do.

        The order of a validation is read from Norce, unless no route needs it.

        Raises:
            OrderMissing: Norce has no such order.
            OrderBusy: Other calls delayed the read of a validation, or the loop, until the deadline.
        """
        if request.order is None:
            return await self._evaluate(request)
        key, body = (request.callback.name, request.channel, request.order_id), request.order.raw
        running = self._evaluations.get(key, ())
        while (equal := next((each for each in running if each.serves(request, body)), None)) is not None:
            await self._waiting_for(asyncio.wait((equal.answer,)))
            if not equal.answer.cancelled():
                return equal.answer.result()
            running = self._evaluations.get(key, ())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        evaluation = _Evaluation(request=request, body=body, began_at=time.monotonic(), answer=answer)
        evaluations = self._evaluations.setdefault(key, [])
        evaluations.append(evaluation)
        try:
            answer.set_result(await self._evaluate(request))
            return answer.result()
        finally:
            answer.cancel()  # nothing, if it is there
            evaluations.remove(evaluation)
            if not evaluations:
                del self._evaluations[key]

    async def _evaluate(self, request: VerdictRequest) -> Answer:
        order, lag_before = request.order, self._lag()
        late: list[tuple[Route, Run[Any]]] = []  # runs that go on after the answer
        try:
            if order is None:
                if not self._serving(request):
                    return Answer(verdicts=())
                order = await self._read_order(request)
            verdicts = await self._ask_routes(request, order, late)
            if len(order.raw) > SMALL_BYTES and any(verdict.patches for verdict in verdicts):
                answer = await asyncio.to_thread(combine, request.callback, order, verdicts)
            else:
                answer = combine(request.callback, order, verdicts)
        except OrderNotFound as error:
            raise OrderMissing from error
        except OrderBusy:
            raise
        except Exception as error:  # noqa: BLE001 - a mistake of ours neither stops a shopper nor lets one through
            reason = "order-unreadable" if isinstance(error, NorceUnavailable | NorceRefused) else "failed"
            if isinstance(error, NO_BUGS):
                # Its traceback keeps this frame, which keeps the error and with it what Norce has sent.
                error = error.with_traceback(None)
            missing = [
                no_answer(route, reason, error=error, started_at=request.received_at)
                for route in self._enforced(request)
            ]
            answer = combine(request.callback, None, missing)
        is_too_late = any(verdict.missing in TOO_LATE for verdict in answer.verdicts)
        is_busy = is_too_late and self._lag() - lag_before > MOST_LAG * request.callback.deadline.total_seconds()
        for route, run in late:
            assert order is not None
            self._let_finish(run, partial(self._record_late, request, order, route, run, is_busy=is_busy))
        if is_busy:
            raise OrderBusy(LATE_LOOP)
        asyncio.get_running_loop().call_soon(self._report, request, answer, order)
        return answer

    async def _read_order(self, request: VerdictRequest) -> Order:
        within = timedelta(seconds=request.answer_by - time.monotonic())
        try:
            return await self._waiting_for(self._reads.get((request.channel, request.order_id), within))
        except (TimeoutError, NorceBusy) as error:
            raise OrderBusy(ORDER_READS) from error

    async def _ask_routes(
        self, request: VerdictRequest, order: Order, late: list[tuple[Route, Run[Any]]]
    ) -> list[Verdict]:
        """Return the verdicts of the routes, and add the runs that go on to `late`."""
        verdicts: dict[str, Verdict | None] = {}  # in the order of the configuration
        runs: list[tuple[Route, Run[Any]]] = []
        computing: list[Route] = []
        pace = Pace(order)
        for route in self._enforced(request):
            if route.when and pace.is_exceeded():
                await asyncio.sleep(0)
            held = self._held(route, order)
            if held is Result.NOT_MATCHED:
                continue
            verdicts[route.name] = None
            if held is Result.ERROR:
                verdicts[route.name] = no_answer(route, "condition", started_at=request.received_at)
            elif self._circuit_breaker.is_open((route.name, request.channel), request.order_id):
                verdicts[route.name] = no_answer(route, "circuit-open", started_at=request.received_at)
            elif route.computes:
                computing.append(route)
            else:
                context = self._context(request, route, "answers", request.answer_by - time.monotonic())
                runs.append((route, self._runner.start("answers", partial(route.method, order), context)))
        for route in computing:  # while the others run
            started_at = time.monotonic()
            context = self._context(request, route, None, request.answer_by - started_at)
            result = await self._runner.compute(partial(route.method, order), context)
            verdicts[route.name] = verdict_of(route, result, started_at)
        if runs:
            left = max(request.answer_by - time.monotonic(), 0)
            await self._waiting_for(asyncio.wait([run.ended for _, run in runs], timeout=left))
            holding = self._runner.current_answer()
            for route, run in runs:
                verdicts[route.name] = _in_time(route, run, holding)
                if not run.ended.done():
                    late.append((route, run))
        return [verdict for verdict in verdicts.values() if verdict is not None]

    def _serving(self, request: VerdictRequest) -> list[Route]:
        return self._routes.serving(request.callback.name, request.channel)

    def _enforced(self, request: VerdictRequest) -> list[Route]:
        return [route for route in self._serving(request) if not route.shadow]

    def _held(self, route: Route, order: Order) -> Result:
        if not route.when:
            return Result.MATCHED
        held = wants(route, order.data)
        self._metrics.conditions_evaluated.labels("route", held.value).inc()
        return held

    def _context(self, request: VerdictRequest, route: Route, on: LoopName | None, seconds: float) -> Context[Any]:
        now = to_datetime(self._clock())
        return self._runner.context(
            on,
            route=route.name,
            settings=route.settings[request.channel],
            channel=request.channel,
            order_id=request.order_id,
            identity=request.order_id,
            deadline=now + timedelta(seconds=seconds),
            first_attempt_at=now,
            concurrency=route.concurrency,
            max_answer_bytes=route.max_answer_bytes,
            log_fields=route.handler.log_fields,
        )

    async def _waiting_for(self, awaitable: Awaitable[T]) -> T:
        self.waiting += 1
        try:
            return await awaitable
        finally:
            self.waiting -= 1

    def _let_finish(self, run: Run[Any], then: Callable[[], None]) -> None:
        """Let a run go on after its answer, and call `then` at its end.

        Of too many such runs, the oldest is cancelled.
        """
        if len(self._unfinished) >= MOST_UNFINISHED:
            oldest = next(iter(self._unfinished))
            del self._unfinished[oldest]
            oldest.cancel()
            self._metrics.verdicts_dropped.inc()
        self._unfinished[run] = None

        def ended(_: object) -> None:
            if run in self._unfinished:
                del self._unfinished[run]
                if run.was_cancelled:  # the service stops
                    self._metrics.verdicts_dropped.inc()
                else:
                    then()

        run.ended.add_done_callback(ended)

    # --- once the answer is on its way ---

    def _report(self, request: VerdictRequest, answer: Answer, order: Order | None) -> None:
        for verdict in answer.verdicts:
            self._count(request, verdict)
            self._log(request, verdict)
            if verdict.stops or verdict.route.name in answer.changed_by:
                self._record_verdict(request, verdict, "answer", instead=None if verdict.missing is None else "reject")
        if order is not None:
            shadows = [route for route in self._serving(request) if route.shadow]
            for route in shadows:
                self._ask_shadow(request, answer, order, route)

    def _count(self, request: VerdictRequest, verdict: Verdict) -> None:
        callback, route, missing = request.callback, verdict.route, verdict.missing
        took = verdict.ended_at - verdict.started_at
        if missing == "order-unreadable":  # the time was Norce's
            self._metrics.verdicts_missing.labels(callback.name, route.name, missing).inc()
            return
        self._metrics.verdict_duration.labels(callback.name, route.name, verdict.label).observe(took)
        is_slow = took > callback.soft_limit.total_seconds()
        if is_slow:
            self._metrics.verdicts_slow.labels(callback.name, route.name).inc()
        if missing is not None:
            self._metrics.verdicts_missing.labels(callback.name, route.name, missing).inc()
        # The request or the order came slowly if a late route had less than half of the deadline.
        had_time = missing not in ("late", "blocks") or took >= callback.deadline.total_seconds() / 2
        if missing not in NOT_ASKED and had_time:
            missed = missing in ("late", "blocks") or (missing == "failed" and is_slow)
            self._circuit_breaker.record((route.name, request.channel), request.order_id, missed=missed)

    def _log(self, request: VerdictRequest, verdict: Verdict, **more: str) -> None:
        route, error = verdict.route, verdict.error
        took = verdict.ended_at - verdict.started_at
        facts = request.facts | {"route": route.name, "decided": verdict.label} | more
        facts["duration_ms"] = round(took * 1000, 2)
        if verdict.missing is None:
            is_slow = took > request.callback.soft_limit.total_seconds()
            if verdict.codes:
                facts["paths" if verdict.decided == "patch" else "codes"] = verdict.codes[:MOST_CODES]
            (log.warning if is_slow else log.info)("verdict", **facts)
            return
        facts |= {"handler": route.handler_name, "reason": verdict.missing, "no_answer": route.no_answer}
        if isinstance(error, PatchInvalid):
            facts["where"] = error.path
        elif error is not None:
            told = next((each for each in leaves(error) if isinstance(each, Outcome | NorceError)), error)
            facts["error_type"] = type(told).__name__
            facts |= {name: value for name in ("code", "host", "status") if (value := getattr(told, name, None))}
        is_bug = error is not None and not all(isinstance(each, NO_BUGS) for each in leaves(error))
        if verdict.missing == "failed" and error is not None and is_bug:
            log.error("verdict", **facts, exc_info=error if self._needs_traceback(route, error) else None)
        else:
            log.warning("verdict", **facts)

    def _needs_traceback(self, route: Route, error: BaseException) -> bool:
        """Return True at most once an hour for a kind of error of a route.

        A traceback for each shopper would fill the log.
        """
        kind, now = (route.name, type(error)), time.monotonic()
        is_new = now - self._shown_at.get(kind, float("-inf")) >= SECONDS_BETWEEN_TRACEBACKS
        if is_new:
            self._shown_at[kind] = now
        return is_new

    def _ask_shadow(self, request: VerdictRequest, answer: Answer, order: Order, route: Route) -> None:
        held = self._held(route, order)
        if held is Result.MATCHED:
            seconds = request.answer_by - request.received_at
            context = self._context(request, route, None if route.computes else "shadows", seconds)
            run = self._runner.start("shadows", partial(route.method, order), context)
            self._let_finish(run, lambda: self._record_shadow(request, answer, order, _verdict_of_run(route, run)))
        elif held is Result.ERROR:
            verdict = no_answer(route, "condition", started_at=time.monotonic())
            self._record_unheard(request, verdict, "shadow", differs=False)

    def _record_shadow(self, request: VerdictRequest, answer: Answer, order: Order, verdict: Verdict) -> None:
        # Compared as if it were the last route. The order, or another route's patch, may already be as it wants.
        after = combine(request.callback, order, [*answer.verdicts, verdict])
        differs = not answer.stops and (after.stops or len(after.patches) > len(answer.patches))
        self._record_unheard(request, after.verdicts[-1], "shadow", differs=differs)

    def _record_late(
        self, request: VerdictRequest, order: Order, route: Route, run: Run[Any], *, is_busy: bool
    ) -> None:
        (verdict,) = combine(request.callback, order, [_verdict_of_run(route, run)]).verdicts
        # A call that was answered 503 will come again: neither `no_answer` nor this verdict decides it.
        differs = not is_busy and (verdict.decided == "patch" or verdict.stops != (route.no_answer == "reject"))
        self._record_unheard(request, verdict, "late", differs=differs, instead="busy" if is_busy else route.no_answer)

    def _record_unheard(
        self, request: VerdictRequest, verdict: Verdict, kind: str, *, differs: bool, instead: str | None = None
    ) -> None:
        """Count, log and record a verdict that is no part of the answer.

        Args:
            kind: `late` or `shadow`.
            differs: The answer would have been another with it.
            instead: The answer in its place.
        """
        route = verdict.route
        decided = verdict.decided if verdict.missing is None else "failed"
        result = "differs" if differs and verdict.missing is None else "same"
        self._metrics.verdicts_unused.labels(request.callback.name, route.name, kind, decided, result).inc()
        self._log(request, verdict, kind=kind)
        self._record_verdict(request, verdict, kind, instead=instead)

    def _record_verdict(self, request: VerdictRequest, verdict: Verdict, kind: str, *, instead: str | None) -> None:
        since = request.received_at if kind == "late" else verdict.started_at
        self._record(
            LoggedVerdict(
                kind=kind,
                callback=request.callback.name,
                route=verdict.route.name,
                channel=request.channel,
                order_id=request.order_id,
                decided=verdict.decided if verdict.missing is None else "failed",
                codes=verdict.codes if verdict.missing is None else (verdict.missing,),
                answered=instead,
                took_ms=round((verdict.ended_at - since) * 1000),
            )
        )


def _in_time(route: Route, run: Run[Any], holding: Run[Any] | None) -> Verdict:
    if run.ended.done():
        return _verdict_of_run(route, run)
    is_to_blame = holding is not None and holding.name == route.name
    reason = "blocks" if is_to_blame else "late" if run.begun else "held-up"
    return no_answer(route, reason, started_at=run.started_at)


def _verdict_of_run(route: Route, run: Run[Any]) -> Verdict:
    return verdict_of(route, run.result, run.started_at, run.ended_at)
