"""
May this purchase go on? May this change be stored, and what else is to change with it? Asked of all routes at the same
time, about the same order, and answered inside one deadline, always.

At the deadline the answer goes out from what is known; a route that is late, broken or cannot be asked counts as its
`no_answer`. Norce goes on without us when it tires of waiting and says nowhere when (the payment providers in front of
it wait 3 to 10 s), so the deadline is ours. Reading the order is inside it.

What a reader would get wrong: a late route is not stopped. What it would have said is recorded when it says it. And
nothing is logged before the answer is on its way: to write is to let go of the interpreter, and a plugin's thread that
spins gives it back when it likes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
import structlog

from adapter.conditions import Result
from adapter.identifiers import Channel
from adapter.ledger.verdict_log import LoggedVerdict
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import Norce, NorceRefused, NorceUnavailable
from adapter.orders import Order
from adapter.plugin import Context, Patch, Problem, Refuse
from adapter.routing.routes import Callback, Route, Routes, wants
from adapter.routing.runner import LoopAbandoned, LoopName, Run, Runner
from adapter.verdicts.patches import PatchInvalid, encode, merge

log = structlog.get_logger(__name__)

MARGIN = timedelta(milliseconds=200)  # for the answer's own way out, past plugins that spin
MOST_OF_MARGIN = 0.2
MOST_UNFINISHED = 200  # runs that go on though nobody waits for them; each holds an order
HEAD_START = 0.05  # seconds, before it is looked whether the caller is still there: most answers are there by then
# Why there is no answer though the handler was not asked, or could do nothing about it: no miss, and no success either.
NOT_ASKED = frozenset({"order-unreadable", "condition", "bypassed", "held-up"})

Key = tuple[str, Channel]  # the route's name
Gone = Callable[[], Awaitable[bool]]  # waits for word from the caller, and says whether it has hung up


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """
    What one route decided: approve or reject; of a hook accept, patch or refuse. Where there is no answer, `missing`
    says why, and the rest is the route's `no_answer`. Moments are monotonic.
    """

    route: Route
    decided: str
    began: float
    ended: float
    problems: Sequence[Problem] = ()
    patches: Sequence[Patch] = ()
    refusal: Refuse | None = None
    missing: str | None = None
    error: BaseException | None = None

    @property
    def codes(self) -> tuple[str, ...]:
        """Of its problems or its refusal, or the places that it patches."""
        if self.refusal is not None:
            return (self.refusal.code,)
        if self.decided == "patch":
            return tuple(patch.path for patch in self.patches)
        return tuple(problem.code for problem in self.problems)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """
    What goes out, and the verdicts that it was made of, in the order of the configuration. Of a hook: the first
    refusal, or else the `patches` of all routes, as one JSON Patch in `document`.
    """

    verdicts: Sequence[Verdict]
    refusal: Refuse | None = None
    patches: Sequence[Patch] = ()
    document: bytes = b"[]"

    @property
    def problems(self) -> list[Problem]:
        return [problem for verdict in self.verdicts for problem in verdict.problems]

    @property
    def stops(self) -> bool:
        return self.refusal is not None or bool(self.problems)


class _Asked(msgspec.Struct, kw_only=True):
    """One validation or hook on its way. Moments are monotonic."""

    callback: Callback
    channel: Channel
    order_id: str
    gone: Gone
    began: float
    ends: float
    hung_up_at: float | None = None


class Misses:
    """
    Which routes missed `most` times in a row, so that they are bypassed: for so long, then one asks, and so on. In
    memory, for this process alone. `most` of 0 is never.
    """

    def __init__(self, *, most: int, bypass: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._bypass = bypass.total_seconds()
        self._clock = clock
        self._missed: dict[Key, int] = {}
        self._until: dict[Key, float] = {}

    def bypassed(self, key: Key) -> bool:
        """Whether it is not to be asked now. Where its time is up, the first who hears that it is, tries."""
        until = self._until.get(key)
        if until is None:
            return False
        now = self._clock()
        if now < until:
            return True
        self._until[key] = now + self._bypass  # nobody else tries meanwhile, whatever becomes of this one
        return False

    def note(self, key: Key, *, missed: bool) -> None:
        if missed:
            self._missed[key] = self._missed.get(key, 0) + 1
            if 0 < self._most <= self._missed[key]:
                self._until[key] = self._clock() + self._bypass
        elif key in self._missed:
            del self._missed[key]
            self._until.pop(key, None)


class Verdicts:
    """
    Asks the routes of validations and hooks. `clock` is the ledger's, in milliseconds; `record` hears what came too
    late to be heard, and what shadows said.
    """

    def __init__(
        self,
        routes: Routes,
        *,
        runner: Runner,
        norce: Norce,
        metrics: Metrics,
        clock: Callable[[], int],
        misses: Misses,
        record: Callable[[LoggedVerdict], None],
    ) -> None:
        self._runner = runner
        self._norce = norce
        self._metrics = metrics
        self._clock = clock
        self._misses = misses
        self._record = record
        answered = [callback for callback in routes.callbacks.values() if callback.kind != "notification"]
        self._enforced = {each.name: [r for r in routes.of(each.name) if not r.shadow] for each in answered}
        self._shadows = {each.name: [r for r in routes.of(each.name) if r.shadow] for each in answered}
        self._unfinished: dict[Run[Any], None] = {}  # the oldest first
        self.waiting = 0  # validations and hooks that wait for a handler or for Norce
        if any(self._shadows.values()):
            runner.open("shadows")
        for each in answered:
            metrics.deadline.labels(each.name).set(each.deadline.total_seconds())

    async def validate(self, callback: Callback, channel: Channel, order_id: str, gone: Gone) -> Answer:
        """
        May this purchase go on? The order is read from Norce, unless nobody asks about it.

        Answers before the callback's deadline whatever the routes do. Raises `norce.client.OrderNotFound`.
        """
        asked = self._asked(callback, channel, order_id, gone)
        if not self._enforced[callback.name] and not self._shadows[callback.name]:
            return Answer(verdicts=())
        try:
            with self._watching(asked):
                within = timedelta(seconds=asked.ends - asked.began)
                order = await self._norce.order(channel, order_id, within=within)
        except (NorceUnavailable, NorceRefused) as error:
            answer = self._none(asked, "order-unreadable", error)
            asyncio.get_running_loop().call_soon(self._tell, asked, answer, None)
            return answer
        return await self._answer(asked, order)

    async def change(self, callback: Callback, channel: Channel, order_id: str, order: Order, gone: Gone) -> Answer:
        """May this change be stored, and what else is to change? Answers before the deadline, and raises nothing."""
        return await self._answer(self._asked(callback, channel, order_id, gone), order)

    def _asked(self, callback: Callback, channel: Channel, order_id: str, gone: Gone) -> _Asked:
        began = time.monotonic()
        seconds = callback.deadline.total_seconds()
        ends = began + seconds - min(MARGIN.total_seconds(), seconds * MOST_OF_MARGIN)
        return _Asked(callback=callback, channel=channel, order_id=order_id, gone=gone, began=began, ends=ends)

    async def _answer(self, asked: _Asked, order: Order) -> Answer:
        try:
            answer = _merged(asked.callback, order, await self._ask(asked, order))
        except Exception as error:  # noqa: BLE001 - a mistake of ours neither stops a shopper nor lets one through
            answer = self._none(asked, "failed", error)
        asyncio.get_running_loop().call_soon(self._tell, asked, answer, order)
        return answer

    async def _ask(self, asked: _Asked, order: Order) -> list[Verdict]:
        verdicts: dict[str, Verdict | None] = {}  # in the order of the configuration
        runs: list[tuple[Route, Run[Any]]] = []
        computing: list[Route] = []
        for route in self._enforced[asked.callback.name]:
            held = self._held(route, order)
            if held is Result.NOT_MATCHED:
                continue
            verdicts[route.name] = None
            if held is Result.ERROR:
                verdicts[route.name] = _no_answer(route, "condition", began=asked.began)
            elif self._misses.bypassed((route.name, asked.channel)):
                verdicts[route.name] = _no_answer(route, "bypassed", began=asked.began)
            elif route.computes:
                computing.append(route)
            else:
                context = self._context(asked, route, "answers", asked.ends - time.monotonic())
                runs.append((route, self._runner.start("answers", partial(route.ask, order), context)))
        for route in computing:
            began = time.monotonic()
            context = self._context(asked, route, None, asked.ends - began)
            compute = partial(self._runner.compute, partial(route.ask, order), context)
            verdicts[route.name] = _heard(route, compute, began)
        if runs:
            await self._wait(asked, [run.ended for _, run in runs])
            holding = self._runner.current_answer()
            for route, run in runs:
                verdicts[route.name] = self._in_time(asked, order, route, run, holding)
        return [verdict for verdict in verdicts.values() if verdict is not None]

    def _held(self, route: Route, order: Order) -> Result:
        if route.when is None:
            return Result.MATCHED
        held = wants(route, order.data)
        self._metrics.conditions.labels("route", held.value).inc()
        return held

    def _context(self, asked: _Asked, route: Route, on: LoopName | None, seconds: float) -> Context[Any]:
        now = to_datetime(self._clock())
        return self._runner.context(
            on,
            route=route.name,
            settings=route.settings[asked.channel],
            channel=asked.channel,
            order_id=asked.order_id,
            identity=asked.order_id,
            deadline=now + timedelta(seconds=seconds),
            first_attempt_at=now,
        )

    async def _wait(self, asked: _Asked, endings: Sequence["asyncio.Future[Any]"]) -> None:
        """Until all have ended or the time is up."""
        left = asked.ends - time.monotonic()
        _, pending = await asyncio.wait(endings, timeout=max(min(left, HEAD_START), 0))
        if pending and left > HEAD_START:
            with self._watching(asked):
                await asyncio.wait(pending, timeout=max(asked.ends - time.monotonic(), 0))

    def _in_time(self, asked: _Asked, order: Order, route: Route, run: Run[Any], holding: Run[Any] | None) -> Verdict:
        if run.ended.done():
            return _heard(route, run.result, run.started_at, run.ended_at)
        self._go_on(run, lambda: self._came_late(asked, order, route, run))
        is_to_blame = holding is not None and holding.name == route.name
        why = "blocks" if is_to_blame else "late" if run.begun else "held-up"
        return _no_answer(route, why, began=run.started_at)

    def _go_on(self, run: Run[Any], then: Callable[[], None]) -> None:
        """Lets it run though nobody waits for it, and calls `then` where it ends before too many others have come."""
        if len(self._unfinished) >= MOST_UNFINISHED:
            oldest = next(iter(self._unfinished))
            del self._unfinished[oldest]
            oldest.cancel()
            self._metrics.verdicts_dropped.inc()
        self._unfinished[run] = None

        def ended(_: object) -> None:
            if run in self._unfinished:
                del self._unfinished[run]
                if run.was_cancelled:  # the service ends
                    self._metrics.verdicts_dropped.inc()
                else:
                    then()

        run.ended.add_done_callback(ended)

    @contextmanager
    def _watching(self, asked: _Asked) -> Iterator[None]:
        """Counts it as one that waits, and notes when the caller hangs up meanwhile."""

        def told(leaving: "asyncio.Task[bool]") -> None:
            if (
                asked.hung_up_at is None
                and not leaving.cancelled()
                and leaving.exception() is None
                and leaving.result()
            ):
                asked.hung_up_at = time.monotonic()
                waited = asked.hung_up_at - asked.began
                self._metrics.patience.labels(asked.callback.name).observe(waited)
                log.warning("caller_hung_up", **_facts(asked), milliseconds=round(waited * 1000))

        leaving = asyncio.ensure_future(asked.gone())
        leaving.add_done_callback(told)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            leaving.cancel()

    def _none(self, asked: _Asked, why: str, error: BaseException) -> Answer:
        """The answer where no route could be asked."""
        began = asked.began
        routes = self._enforced[asked.callback.name]
        verdicts = [_no_answer(route, why, error=error, began=began) for route in routes]
        return _merged(asked.callback, None, verdicts)

    # --- when the answer is on its way ---

    def _tell(self, asked: _Asked, answer: Answer, order: Order | None) -> None:
        for verdict in answer.verdicts:
            self._count(asked, verdict)
            self._log(asked, verdict)
            if asked.hung_up_at is not None and verdict.missing is None and verdict.ended > asked.hung_up_at:
                self._unheard(asked, verdict, "hung-up", "unanswered")
        if order is not None:
            for route in self._shadows[asked.callback.name]:
                self._shadow(asked, answer, order, route)

    def _count(self, asked: _Asked, verdict: Verdict) -> None:
        callback, route, missing = asked.callback, verdict.route, verdict.missing
        took = verdict.ended - verdict.began
        self._metrics.verdict_duration.labels(callback.name, route.name, _shown(verdict)).observe(took)
        is_slow = took > callback.soft_limit.total_seconds()
        if is_slow:
            self._metrics.slow_verdicts.labels(callback.name, route.name).inc()
        if missing is not None:
            self._metrics.no_answers.labels(callback.name, route.name, missing).inc()
        if missing not in NOT_ASKED:
            missed = missing in ("late", "blocks") or (missing == "failed" and is_slow)
            self._misses.note((route.name, asked.channel), missed=missed)

    def _log(self, asked: _Asked, verdict: Verdict, **more: str) -> None:
        route, error = verdict.route, verdict.error
        took = verdict.ended - verdict.began
        facts = _facts(asked) | {"route": route.name, "outcome": _shown(verdict)} | more
        facts["duration_ms"] = round(took * 1000, 2)
        if verdict.missing is None:
            is_slow = took > asked.callback.soft_limit.total_seconds()
            (log.warning if is_slow else log.info)("verdict", **facts)
            return
        if isinstance(error, PatchInvalid):
            facts["where"] = error.path
        elif error is not None:
            facts["error_type"] = type(error).__name__
        log.warning("verdict", **facts, handler=route.handler_name, reason=verdict.missing, result=route.no_answer)
        if verdict.missing == "failed":
            log.error("handler_failed", route=route.name, handler=route.handler_name, exc_info=error)

    def _came_late(self, asked: _Asked, order: Order, route: Route, run: Run[Any]) -> None:
        heard = _heard(route, run.result, run.started_at, run.ended_at)
        (verdict,) = _merged(asked.callback, order, [heard]).verdicts
        if asked.hung_up_at is not None:
            self._unheard(asked, verdict, "hung-up", "unanswered")
        else:
            stops = verdict.decided in ("reject", "refuse")
            differs = verdict.decided == "patch" or stops != (route.no_answer == "reject")
            self._unheard(asked, verdict, "late", "differs" if differs and verdict.missing is None else "same")

    def _shadow(self, asked: _Asked, answer: Answer, order: Order, route: Route) -> None:
        held = self._held(route, order)
        if held is Result.MATCHED:
            context = self._context(asked, route, None if route.computes else "shadows", asked.ends - asked.began)
            run = self._runner.start("shadows", partial(route.ask, order), context)
            self._go_on(run, lambda: self._shadow_said(asked, answer, order, route, run))
        elif held is Result.ERROR:
            verdict = _no_answer(route, "condition", began=time.monotonic())
            self._unheard(asked, verdict, "shadow", "same")

    def _shadow_said(self, asked: _Asked, answer: Answer, order: Order, route: Route, run: Run[Any]) -> None:
        heard = _heard(route, run.result, run.started_at, run.ended_at)
        # As if it were the last of the routes; what it asks for may be there already, by itself or by another's patch.
        after = _merged(asked.callback, order, [*answer.verdicts, heard])
        verdict = after.verdicts[-1]
        differs = not answer.stops and (after.stops or len(after.patches) > len(answer.patches))
        self._unheard(asked, verdict, "shadow", "differs" if differs and verdict.missing is None else "same")

    def _unheard(self, asked: _Asked, verdict: Verdict, kind: str, result: str) -> None:
        """Counts, logs and records what was said to nobody. `result`: whether the answer would have been the same."""
        names = (asked.callback.name, verdict.route.name)
        decided = verdict.decided if verdict.missing is None else "failed"
        self._metrics.unheard_verdicts.labels(*names, kind, decided, result).inc()
        self._log(asked, verdict, kind=kind)
        until = verdict.ended if asked.hung_up_at is None or kind == "shadow" else asked.hung_up_at
        since = verdict.began if kind == "shadow" else asked.began
        self._record(
            LoggedVerdict(
                kind=kind,
                callback=asked.callback.name,
                route=verdict.route.name,
                channel=asked.channel,
                order_id=asked.order_id,
                decided=decided,
                codes=() if verdict.missing else verdict.codes,
                answered=verdict.route.no_answer if kind == "late" else None,
                took_ms=round((until - since) * 1000),
            )
        )


def _heard(route: Route, outcome: Callable[[], Any], began: float, ended: float | None = None) -> Verdict:
    """What a route said, or why that is nothing. `outcome` returns or raises what its handler did."""
    value: Any = None
    error: BaseException | None = None
    why = "failed"
    try:
        value = outcome()
    except LoopAbandoned as abandoned:
        is_to_blame = abandoned.blocked_by is not None and abandoned.blocked_by.name == route.name
        error, why = abandoned, "blocks" if is_to_blame else "held-up"
    except (Exception, asyncio.CancelledError) as raised:  # noqa: BLE001 - whatever a plugin does
        error = raised
    ended = time.monotonic() if ended is None else ended
    if route.callback.kind == "hook":
        if isinstance(value, list) and all(isinstance(each, Patch) for each in value):
            decided = "patch" if value else "accept"
            return Verdict(route=route, decided=decided, patches=value, began=began, ended=ended)
        if isinstance(error, Refuse) and _is_text(error.message) and (error.inner is None or _is_text(error.inner)):
            return Verdict(route=route, decided="refuse", refusal=error, began=began, ended=ended)
    elif isinstance(value, list) and all(isinstance(each, Problem) and _is_text(each.message) for each in value):
        decided = "reject" if value else "approve"
        return Verdict(route=route, decided=decided, problems=value, began=began, ended=ended)
    if error is None:
        error = TypeError("the handler answered something else")
    return _no_answer(route, why, error=error, began=began, ended=ended)


def _is_text(value: object) -> bool:
    """Whether it can be written as JSON: what cannot would take the other answers with it."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _no_answer(
    route: Route, why: str, *, began: float, ended: float | None = None, error: BaseException | None = None
) -> Verdict:
    approves, is_hook = route.no_answer == "approve", route.callback.kind == "hook"
    words = ("not-answered", "This could not be checked in time; please try again.")
    return Verdict(
        route=route,
        decided=("accept" if approves else "refuse") if is_hook else ("approve" if approves else "reject"),
        began=began,
        ended=time.monotonic() if ended is None else ended,
        problems=() if approves or is_hook else (Problem(*words),),
        refusal=Refuse(*words) if is_hook and not approves else None,
        missing=why,
        error=error,
    )


def _merged(callback: Callback, order: Order | None, verdicts: Sequence[Verdict]) -> Answer:
    """The answer that these verdicts make. Patches that cannot be answered are their route's `no_answer`."""
    patches: list[Patch] = []
    if order is not None and any(verdict.patches for verdict in verdicts):
        patches, refused = merge(order.data, [verdict.patches for verdict in verdicts], callback.target)
        verdicts = [
            verdict
            if invalid is None
            else _no_answer(verdict.route, invalid.reason, error=invalid, began=verdict.began, ended=verdict.ended)
            for verdict, invalid in zip(verdicts, refused, strict=True)
        ]
        if not patches:  # all of it is there already
            verdicts = [
                msgspec.structs.replace(verdict, decided="accept") if verdict.decided == "patch" else verdict
                for verdict in verdicts
            ]
    refusal = next((verdict.refusal for verdict in verdicts if verdict.refusal is not None), None)
    if not patches:
        return Answer(verdicts=verdicts, refusal=refusal)
    return Answer(verdicts=verdicts, refusal=refusal, patches=patches, document=encode(patches))


def _shown(verdict: Verdict) -> str:
    return verdict.decided if verdict.missing is None else "no_answer"


def _facts(asked: _Asked) -> dict[str, Any]:
    return {
        "callback": asked.callback.name,
        "merchant": asked.channel.merchant,
        "channel": asked.channel.name,
        "order_id": asked.order_id,
    }
