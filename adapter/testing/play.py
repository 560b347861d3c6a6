"""A play of a delivery or a verdict, with a fake system and in virtual time.

The attempts, their settlement, the verdicts and the clients are those of the service. The ledger is one lane in memory.
"""

import asyncio
import io
import json
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, cast

import httpx
import jsonpatch
import structlog

from adapter import logs
from adapter.deliveries.attempt import AttemptResult, Attempts, Queue
from adapter.deliveries.dispatcher import SLACK
from adapter.identifiers import Channel
from adapter.ledger.claims import AttemptRecord, Claim, QueueLimits, attempt_of
from adapter.ledger.settlement import Ending, Reason, State, settle
from adapter.metrics import Metrics
from adapter.moments import in_milliseconds, to_datetime, to_milliseconds
from adapter.orders import Order
from adapter.plugin import (
    Done,
    Notification,
    NotificationHandler,
    Outcome,
    Patch,
    Previous,
    Problem,
    Refuse,
    Settings,
    Skip,
    ValidationHandler,
)
from adapter.routing.routes import Callback, Handler, Route, Routes
from adapter.testing import builders
from adapter.testing.builders import NORCE_TIMEOUT, NOW, TIMEOUT, FakeNorce, InPlaceRunner, NorceWith, norce_client
from adapter.testing.faults import FakeSystem, Faults, Network, SentRequest
from adapter.testing.guard import watched
from adapter.testing.virtual_time import VirtualLoop
from adapter.verdicts.answer import Answer
from adapter.verdicts.circuit_breaker import CircuitBreaker
from adapter.verdicts.verdicts import VerdictRequest, Verdicts

SCHEDULE = (timedelta(seconds=5), timedelta(seconds=30), timedelta(minutes=5), timedelta(hours=1))
RUNNING = "running"
_START = to_milliseconds(NOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedAttempt:
    """An attempt that has ended. One whose process was killed is not recorded."""

    kind: str  # deliver or lookup
    outcome: Done | Skip | Outcome | None  # None if a lookup found no effect


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The course of a play."""

    requests: list[SentRequest]  # of the handler, in their order
    effects: list[Any]  # of the fake system, and what was added at Norce
    log: list[dict[str, Any]]  # the lines, as they would leave the process
    errors: list[BaseException]  # bugs of the handler
    connections: list[str]  # opened beside the context, as sentences
    blocking: list[str]  # calls that blocked the thread of all handlers, as sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedDelivery(Played):
    """The course of a delivery."""

    attempts: list[PlayedAttempt]
    reason: str  # delivered, skipped, rejected, exhausted, unknown, broken; `running` if the handler did not stop

    @property
    def outcome(self) -> Done | Skip | Outcome | None:
        """The outcome of the last attempt."""
        return self.attempts[-1].outcome if self.attempts else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedVerdict(Played):
    """A verdict, with the answer to Norce."""

    problems: list[Problem]
    patches: list[Patch]  # without those that change nothing
    refusal: Refuse | None
    missing: str | None  # why there is no verdict, such as `late` or `failed`
    error: BaseException | None
    order: dict[str, Any]  # with the patches


def play(
    handler: NotificationHandler[Any] | type[NotificationHandler[Any]],
    notification: Notification | None = None,
    app: FakeSystem | None = None,
    *,
    settings: Mapping[str, Any] | Settings | None = None,
    faults: Faults = (),
    norce: FakeNorce | None = None,
    timeout: timedelta = TIMEOUT,
    schedule: Sequence[timedelta] = SCHEDULE,
    previous: Previous | None = None,
    is_resend: bool = False,
) -> PlayedDelivery:
    """Deliver a notification as the service does, with retries and lookups, to its end.

    Hours of backoff take milliseconds. The pauses of queues, which concern other orders, are left out. It runs an event
    loop, so call it from a plain function.

    Args:
        handler: The handler or its class. After a kill, a class is created anew, as in a new process.
        notification: By default about the sample order.
        app: The fake system: an ASGI application, or a function from request to response.
        settings: As in `config.yaml`. Here, a secret is plain text.
        faults: Of the handler's requests.
        norce: By default a Norce that has the order.
        timeout: Of the route.
        schedule: The retry schedule of the route.
        previous: The last `Done` for this order.
        is_resend: A person wants the order delivered again.

    Raises:
        Exception: The fake system raised it.
    """
    about = notification or builders.notification()
    stage = Stage(handler, [about.order], app, settings=settings, faults=faults, norce=norce, timeout=timeout)
    (played,) = stage.deliver([about], schedule=schedule, previous=previous, is_resend=is_resend)
    return played


def ask(
    handler: Handler | type[Handler],
    order: Order | None = None,
    app: FakeSystem | None = None,
    *,
    settings: Mapping[str, Any] | Settings | None = None,
    kind: str | None = None,
    target: str = "/cart",
    faults: Faults = (),
    norce: FakeNorce | None = None,
    deadline: timedelta = builders.DEADLINE,
) -> PlayedVerdict:
    """Ask a validation or a hook as the service does, inside its deadline.

    Args:
        handler: The handler or its class.
        order: For a hook, with the change in it; by default the sample.
        app: The fake system: an ASGI application, or a function from request to response.
        settings: As in `config.yaml`. Here, a secret is plain text.
        kind: `validation` or `hook`, for a handler that is both.
        target: The pointer that a hook's patches stay inside.
        faults: Of the handler's requests.
        norce: By default a Norce that has the order.
        deadline: Of the callback.

    Raises:
        Exception: The fake system raised it.
    """
    about = order or builders.order()
    stage = Stage(handler, [about], app, settings=settings, faults=faults, norce=norce, timeout=deadline)
    (played,) = stage.answer([about], kind=kind, target=target)
    return played


class Stage:
    """A handler between Norce and a fake system. It serves one play."""

    def __init__(
        self,
        handler: Handler | type[Handler],
        orders: Sequence[Order],
        app: FakeSystem | None,
        *,
        settings: Mapping[str, Any] | Settings | None,
        faults: Faults = (),
        norce: FakeNorce | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        self.handler = handler
        self.channel = Channel(orders[0].merchant, orders[0].channel)
        self.settings = builders.settings_of(handler, settings)
        self.timeout = timeout
        self._norce = NorceWith(*orders, norce=norce)
        self.network = Network(
            app, self._norce, faults=faults, not_done=getattr(handler, "not_done", ()), timeout=timeout,
            quotes=personal_texts(orders[0]),
        )  # fmt: skip

    def deliver(
        self,
        notifications: Sequence[Notification],
        *,
        schedule: Sequence[timedelta] = SCHEDULE,
        previous: Previous | None = None,
        is_resend: bool = False,
    ) -> list[PlayedDelivery]:
        """Deliver notifications about different orders at the same time."""
        lanes = [_Lane(each, previous, again_of=1 if is_resend else None) for each in notifications]

        async def process() -> bool:
            """Deliver what is left. Returns False if the process was killed."""
            self.network.killed = asyncio.get_running_loop().create_future()
            route = self._route_of(Callback(name=notifications[0].callback, kind="notification"), schedule)
            attempts = Attempts(runner=self._runner(), norce=self._reader(), clock=_now)
            queue = Queue(route=route, channel=self.channel)
            work = asyncio.gather(*(lane.work(attempts, queue) for lane in lanes))
            await asyncio.wait((work, self.network.killed), return_when=asyncio.FIRST_COMPLETED)
            if not self.network.killed.done():
                work.result()
                return True
            for lane in lanes:
                lane.abandon()
            return False

        seen = self._run_processes(process)
        return [PlayedDelivery(attempts=lane.attempts, reason=lane.reason, **seen) for lane in lanes]

    def answer(self, orders: Sequence[Order], *, kind: str | None = None, target: str = "/cart") -> list[PlayedVerdict]:
        """Answer about different orders at the same time."""
        cls = self.handler if isinstance(self.handler, type) else type(self.handler)
        kind = kind or ("validation" if issubclass(cls, ValidationHandler) else "hook")
        callback = Callback(name="test", kind=kind, deadline=self.timeout, soft_limit=self.timeout, target=target)
        answers: list[Answer] = []

        async def process() -> bool:
            verdicts = Verdicts(
                Routes({callback.name: callback}, [self._route_of(callback)], ()),
                runner=self._runner(),
                norce=self._reader(),
                metrics=_metrics(),
                clock=_now,
                circuit_breaker=CircuitBreaker(orders=0, open_for=self.timeout),
                lag=lambda: 0.0,
                record=lambda _verdict: None,
            )
            requests = (
                VerdictRequest(
                    callback=callback, channel=self.channel, order_id=each.id, order=each if kind == "hook" else None
                )
                for each in orders
            )
            answers.extend(await asyncio.gather(*map(verdicts.answer, requests)))
            await asyncio.sleep(10 * self.timeout.total_seconds())  # a late handler may still have effects
            return True

        seen = self._run_processes(process)
        return [_played_verdict(*each, **seen) for each in zip(answers, orders, strict=True)]

    def _route_of(self, callback: Callback, schedule: Sequence[timedelta] = ()) -> Route:
        return Route(
            name="test",
            callback=callback,
            when=(),
            handler_name="test",
            handler=self.handler() if isinstance(self.handler, type) else self.handler,
            settings={self.channel: self.settings},
            refetch=True,
            no_answer="reject",
            timeout=self.timeout,
            schedule=schedule,
            concurrency=1,
        )

    def _runner(self) -> InPlaceRunner:
        return InPlaceRunner.over(self.network, self.channel, lambda: to_datetime(_now()))

    def _reader(self) -> Any:
        return norce_client(self.channel, httpx.MockTransport(self._norce))

    def _run_processes(self, process: Callable[[], Coroutine[Any, Any, bool]]) -> dict[str, Any]:
        """Run one process after another, each on its own loop, until one is not killed.

        A killed process does not go on, not even with its `finally` blocks, before everything else is over.

        Returns:
            The members of `Played`.
        """
        loops = [VirtualLoop()]
        lines: list[dict[str, Any]] = []
        errors: list[BaseException] = []
        with watched(other_clients=getattr(self.handler, "other_clients", False)) as watch, _log(lines, errors):
            try:
                while not loops[-1].run_until_complete(process()):
                    loops.append(VirtualLoop(loops[-1].now))
                loops[-1].run_until_complete(self.network.finish())
            finally:
                self.network.is_closed = True
                for loop in loops:
                    _close(loop)
        for failure in self.network.failures:
            raise failure
        return {
            "requests": self.network.requests,
            "effects": self.network.effects,
            "log": lines,
            "errors": errors,
            "connections": watch.connections,
            "blocking": watch.blocking,
        }


@dataclass(slots=True)
class _Lane:
    """The lane of one delivery. Moments are milliseconds."""

    notification: Notification
    previous: Previous | None
    again_of: int | None
    claim: Claim | None = None  # while it is held
    claims: int = 0
    counted: int = 0  # attempts
    in_doubt: bool = False
    due: int = _START
    due_after_death: int = _START
    first_attempt_at: int = 0
    attempts: list[PlayedAttempt] = field(default_factory=list)
    reason: str = RUNNING

    async def work(self, attempts: Attempts, queue: Queue) -> None:
        """Attempt the delivery until it has ended.

        Gives up if the handler goes on when other processes may act on the lane.
        """
        before_end = NORCE_TIMEOUT + queue.route.timeout + SLACK
        while self.reason == RUNNING:
            await asyncio.sleep(max(self.due - _now(), 0) / 1000)
            claim = self.claim = self._claimed(queue, in_milliseconds(before_end))
            attempt = asyncio.create_task(attempts.run(claim, queue))
            await asyncio.wait((attempt,), timeout=before_end.total_seconds())
            if not attempt.done():
                return
            self._settle(claim, queue, attempt.result())

    def _claimed(self, queue: Queue, doubt_ms: int) -> Claim:
        now, about = _now(), self.notification
        self.claims += 1
        self.counted += 1
        self.first_attempt_at = self.first_attempt_at or now
        limits = QueueLimits(queue_id=1, concurrency=1, doubt_ms=doubt_ms, schedule=queue.route.schedule)
        self.due_after_death = limits.due_after_death(self.counted, now)
        return Claim(
            lane_id=1,
            holder=1,
            number=self.claims,
            in_doubt=self.in_doubt,
            doubt_ends_at=now + doubt_ms,
            queue_id=1,
            delivery_id=2,
            attempt=self.counted,
            first_attempt_at=self.first_attempt_at,
            claimed_at=now,
            notification_id=about.id,
            callback=about.callback,
            channel=queue.channel,
            order_id=about.order.id,
            identity=about.order.id.encode(),
            received_at=to_milliseconds(about.received_at),
            body=about.raw,
            previous=self.previous,
            again_of=self.again_of,
        )

    def _settle(self, claim: Claim, queue: Queue, ended: AttemptResult) -> None:
        record = AttemptRecord(
            claim=claim,
            result=ended.result,
            kind=ended.kind,
            handling=queue.handling(claim),
            schedule=queue.route.schedule,
            jitter=0.0,
            refetch=True,
        )
        settlement = settle(record.result, attempt_of(record, _now()))
        outcome = None if isinstance(record.result, Ending) else record.result
        self.attempts.append(PlayedAttempt(kind=record.kind, outcome=outcome))
        self.claim = None
        self.counted -= not settlement.counts
        self.in_doubt = not settlement.known
        if settlement.state is not State.WAITING:
            self.reason = cast("Reason", settlement.reason).value
        elif settlement.due_at is not None:
            self.due = to_milliseconds(settlement.due_at)

    def abandon(self) -> None:
        """Free the lane of a process that was killed, so that its claim is never settled."""
        if self.claim is not None:
            self.claim, self.in_doubt, self.due = None, True, self.due_after_death


def _now() -> int:
    return _START + round(asyncio.get_running_loop().time() * 1000)


def _close(loop: VirtualLoop) -> None:
    loop.set_exception_handler(lambda _loop, _facts: None)
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    with suppress(AssertionError):  # a task that waits for ever, whatever happens
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _played_verdict(answer: Answer, order: Order, **seen: Any) -> PlayedVerdict:
    (verdict,) = answer.verdicts
    is_given = verdict.missing is None
    return PlayedVerdict(
        problems=list(verdict.problems) if is_given else [],
        patches=list(answer.patches),
        refusal=verdict.refusal if is_given else None,
        missing=verdict.missing,
        error=verdict.error,
        order=jsonpatch.JsonPatch(json.loads(answer.document)).apply(order.data),
        **seen,
    )


def personal_texts(order: Order) -> set[str]:
    """Return the texts about the customer that occur nowhere else in an order."""
    rest = json.dumps({**order.data, "customer": None}, ensure_ascii=False)
    left, found = [order.data.get("customer")], set()
    while left:
        value = left.pop()
        if isinstance(value, str) and len(value) > 4 and value not in rest:
            found.add(value)
        elif isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
    return found


@cache
def _metrics() -> Metrics:
    return Metrics("test")


@contextmanager
def _log(lines: list[dict[str, Any]], errors: list[BaseException]) -> Iterator[None]:
    """Collect the log as it would leave the process, and the errors with tracebacks in it."""

    def collect(_logger: Any, _level: str, fields: Any) -> Any:
        if isinstance(error := fields.get("exc_info"), BaseException):
            errors.append(error)
        return fields

    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = structlog.get_config() if structlog.is_configured() else None
    logs.configure(stream=stream, level="debug", format="json")
    structlog.configure(processors=[collect, *structlog.get_config()["processors"]])
    try:
        yield
    finally:
        structlog.reset_defaults()
        if before is not None:
            structlog.configure(**before)
        root.handlers[:] = handlers
        root.setLevel(level)
        lines += map(json.loads, stream.getvalue().splitlines())
