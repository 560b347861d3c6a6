"""
Claim, run, record, until told to stop.

A lane is claimed only for a free handler slot, so nothing waits in memory. The claim is on disk before the handler
runs, and the handler runs only where it will have ended before the doubt about the claim ends: whoever takes the lane
over after a crash then asks the destination, and finds what this process did.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import structlog

from adapter.conditions import Result as Held
from adapter.deliveries import Attempt, Ending, Result, Settlement, State, settle
from adapter.ledger.lanes import Ask, Claim, Lanes, Record
from adapter.ledger.store import StoreUnavailable
from adapter.metrics import Metrics
from adapter.norce.client import Norce
from adapter.orders import NotAnOrder, Order, read_order
from adapter.plugin import Done, Notification, NotificationHandler, Outcome, Reject, Skip, Unknown
from adapter.routes import Route, wants
from adapter.runner import Call, DeadlinePassed, Run, Runner

log = structlog.get_logger(__name__)

POLL = timedelta(seconds=5)
STORE_RETRY = timedelta(seconds=1)
SLACK = timedelta(seconds=5)
LAST_WORDS = timedelta(seconds=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A route for one merchant and channel: what the dispatcher takes work from."""

    id: int
    route: Route
    merchant: str
    channel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """How an attempt ended, before it is settled."""

    result: Result
    kind: str = "deliver"


class Dispatcher:
    """Works the queues until `stop`. `clock` is the ledger's, in milliseconds; `random` gives the jitter, 0 to 1."""

    def __init__(
        self,
        queues: Mapping[int, Queue],
        *,
        lanes: Lanes,
        runner: Runner,
        norce: Norce,
        norce_timeout: timedelta,
        metrics: Metrics,
        clock: Callable[[], int],
        slots: int,
        random: Callable[[], float],
    ) -> None:
        self._queues = queues
        self._lanes = lanes
        self._runner = runner
        self._norce = norce
        self._before_handler = norce_timeout + SLACK
        self._metrics = metrics
        self._clock = clock
        self._slots = slots
        self._random = random
        self._news = asyncio.Event()
        self._has_room = True
        self._claiming = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: set[Run[Any]] = set()
        self._busy: Counter[int] = Counter()
        self._stopping = False
        self._cancelling = False

    @property
    def running(self) -> int:
        """How many deliveries are being tried now."""
        return len(self._tasks)

    def wake(self) -> None:
        """There is new work. Without a free slot for it that is no news: the slot will be, when it is given back."""
        if self._has_room:
            self._news.set()

    async def run(self) -> None:
        """Claims and starts work until `stop` is called. A store that fails is tried again, for as long as it takes."""
        while not self._stopping:
            # Clear the news before claiming: what lands in between must not be lost.
            self._news.clear()
            asked_at = self._clock()
            try:
                async with self._claiming:
                    asks = self._asks()
                    self._has_room = bool(asks)
                    claims = await self._lanes.claim(asks, self._free) if asks else []
                    for claim in claims:
                        self._busy[claim.queue_id] += 1
                        task = asyncio.create_task(self._attempt(claim))
                        self._tasks.add(task)
                        task.add_done_callback(self._finished)
                if not asks:  # no room: a slot that is given back will wake us
                    await self._wait(POLL)
                elif not claims:
                    await self._sleep(asked_at)
            except StoreUnavailable:
                await self._wait(STORE_RETRY)

    async def stop(self, grace: timedelta) -> None:
        """
        Takes no more work and waits `grace` for what runs. What still runs then is cancelled and leaves its lane in
        doubt; what cannot be cancelled keeps its lane claimed, and the next start finds it so.
        """
        self._stopping = True
        self._news.set()
        async with self._claiming:  # what is being claimed now must be among the tasks, or it would stay in doubt
            pass
        await self._drain(grace)
        self._cancelling = True
        for run in self._runs:
            run.cancel()
        await self._drain(LAST_WORDS)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            log.warning("deliveries_abandoned", running=len(self._tasks))
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drain(self, within: timedelta) -> None:
        if self._tasks and within:
            await asyncio.wait(self._tasks, timeout=within.total_seconds())

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._news.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("dispatcher_failed", exc_info=error)  # the lane stays claimed, and in doubt at the next start

    @property
    def _free(self) -> int:
        return self._slots - len(self._tasks)

    def _asks(self) -> list[Ask]:
        free = self._free
        return [
            Ask(
                queue_id=queue.id,
                most=min(free, queue.route.concurrency - self._busy[queue.id]),
                doubt_ms=_ms(self._before_handler + queue.route.timeout),
            )
            for queue in self._queues.values()
            if free > 0 and self._busy[queue.id] < queue.route.concurrency
        ]

    async def _sleep(self, asked_at: int) -> None:
        due = await self._lanes.next_due_at()
        # What was due when we asked could not be taken: a slot that is given back will wake us. What has become due
        # since then nobody has asked for.
        if due is None or due <= asked_at:
            await self._wait(POLL)
        else:
            await self._wait(min(POLL, timedelta(milliseconds=max(due - self._clock(), 0))))

    async def _wait(self, at_most: timedelta) -> None:
        try:
            async with asyncio.timeout(at_most.total_seconds()):
                await self._news.wait()
        except TimeoutError:
            return

    # --- one attempt ---

    async def _attempt(self, claim: Claim) -> None:
        queue = self._queues[claim.queue_id]
        try:
            ended = await self._try(claim, queue)
            attempt = Attempt(
                number=claim.attempt,
                in_doubt=claim.in_doubt,
                ended_at=_moment(self._clock()),
                doubt_ends_at=_moment(claim.doubt_ends_at),
                handling=queue.route.handling,
                schedule=queue.route.schedule,
                jitter=self._random(),
            )
            settlement = settle(ended.result, attempt)
            await self._record(claim, queue, ended, settlement)
        finally:
            self._busy[claim.queue_id] -= 1

    async def _try(self, claim: Claim, queue: Queue) -> _Ended:
        route, handling = queue.route, queue.route.handling
        looking_up = claim.in_doubt and handling.looks_up
        kind = "lookup" if looking_up else "deliver"
        if self._stopping:  # claimed while the service stops
            return _Ended(result=Ending.RELEASED, kind=kind)
        if claim.in_doubt and not looking_up and not handling.repeatable:
            return _Ended(
                result=Unknown("in-doubt", "an attempt ended without a known outcome, and cannot be looked up")
            )
        try:
            notification = await self._notification(claim, queue)
        except Outcome as outcome:
            return _Ended(result=_known(outcome), kind=kind)
        if not looking_up:
            held = wants(route, notification.order.data)
            if held is not Held.MATCHED:
                return _Ended(result=Ending.MOVED_ON if held is Held.NOT_MATCHED else Ending.CONDITION)
        now = _moment(self._clock())
        if self._stopping or now + route.timeout > _moment(claim.doubt_ends_at):
            return _Ended(result=Ending.RELEASED, kind=kind)
        call = Call(
            route=route.name,
            settings=route.settings[queue.merchant, queue.channel],
            merchant=queue.merchant,
            channel=queue.channel,
            order_id=claim.order_id,
            identity=claim.identity.hex(),
            deadline=now + route.timeout,
            first_attempt_at=_moment(claim.first_attempt_at),
            attempt=claim.attempt,
            previous=claim.previous,
        )
        handler = route.handler
        assert isinstance(handler, NotificationHandler)
        run: Run[Any] = (self._runner.lookup if looking_up else self._runner.deliver)(handler, notification, call)
        return _Ended(result=await self._result(run, route, claim, looking_up=looking_up), kind=kind)

    async def _notification(self, claim: Claim, queue: Queue) -> Notification:
        if claim.body is None:
            raise Reject("body-pruned", "the body of this notification is not kept any more")
        try:
            received = read_order(claim.body)
        except NotAnOrder as error:
            raise Reject("order-bad-request", "the stored body holds no order") from error
        order: Order = received
        if queue.route.refetch:
            order = await self._norce.for_handlers(queue.merchant, queue.channel).read(claim.order_id)
        return Notification(
            id=claim.notification_id,
            merchant=claim.merchant,
            channel=claim.channel,
            callback=claim.callback,
            order=order,
            received=received,
            raw=claim.body,
            received_at=_moment(claim.received_at),
        )

    async def _result(self, run: Run[Any], route: Route, claim: Claim, *, looking_up: bool) -> Result:
        self._runs.add(run)
        try:
            try:
                value = await run.result(route.timeout)
            except DeadlinePassed:
                log.warning(
                    "deadline_passed", route=route.name, delivery_id=claim.delivery_id, handler=route.handler_name
                )
                run.cancel()
                value = await run.ended()  # the lane stays ours until the handler has really stopped
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            code = "shutdown" if self._cancelling else "deadline-passed"
            return Unknown(code, "the handler was cancelled before it ended")
        except Outcome as outcome:
            return _known(outcome)
        except Exception as error:  # a bug in a plugin: logged with its traceback, and in doubt
            log.error("handler_failed", route=route.name, delivery_id=claim.delivery_id, order_id=claim.order_id,
                      handler=route.handler_name, exc_info=error)  # fmt: skip
            return Unknown("handler-failed", f"the handler raised {type(error).__name__}")
        finally:
            self._runs.discard(run)
        if looking_up and value is None:
            return Ending.NOT_THERE
        if isinstance(value, Done) or (isinstance(value, Skip) and not looking_up):
            return value
        log.error("handler_failed", route=route.name, delivery_id=claim.delivery_id, handler=route.handler_name)
        return Unknown("handler-failed", f"the handler returned {type(value).__name__}, which is no outcome")

    async def _record(self, claim: Claim, queue: Queue, ended: _Ended, settlement: Settlement) -> None:
        result = ended.result
        record = Record(
            claim=claim,
            settlement=settlement,
            kind=ended.kind,
            outcome=_outcome(result),
            code=result.code if isinstance(result, Outcome) else result.reason if isinstance(result, Skip) else None,
            message=result.message if isinstance(result, Outcome) else None,
            reference=result.reference if isinstance(result, Done) else None,
            facts=result.facts if isinstance(result, Done) else None,
            passes=queue.route.refetch,
        )
        while True:
            try:
                kept = await self._lanes.settle(record)
                break
            except StoreUnavailable:
                if self._cancelling:
                    log.error("settle_given_up", delivery_id=claim.delivery_id, route=queue.route.name)
                    return
                await asyncio.sleep(STORE_RETRY.total_seconds())
            except Exception as error:  # words of the handler's that cannot be written: the outcome counts, not they
                if (record.message, record.reference, record.facts) == (None, None, None):
                    raise
                log.error("handler_failed", route=queue.route.name, delivery_id=claim.delivery_id,
                          order_id=claim.order_id, handler=queue.route.handler_name, exc_info=error)  # fmt: skip
                record = replace(record, message=None, reference=None, facts=None)
        now = self._clock()
        event = {State.DONE: "delivery_done", State.WAITING: "delivery_retried", State.DEAD: "delivery_dead"}
        write = log.warning if settlement.state is State.DEAD or settlement.pauses else log.info
        write(
            event[settlement.state] if kept else "lane_lost",
            delivery_id=claim.delivery_id,
            notification_id=claim.notification_id,
            order_id=claim.order_id,
            merchant=claim.merchant,
            channel=claim.channel,
            route=queue.route.name,
            attempt=claim.attempt,
            kind=record.kind,
            outcome=record.outcome,
            code=record.code,
            reason=settlement.reason and settlement.reason.value,
            in_doubt=not settlement.known,
            next_at=settlement.due_at and settlement.due_at.isoformat(timespec="milliseconds"),
            duration_ms=now - claim.claimed_at,
        )
        self._metrics.attempts.labels(queue.route.name, record.outcome).inc()
        self._metrics.attempt_duration.labels(queue.route.name).observe((now - claim.claimed_at) / 1000)
        if settlement.state is State.DONE:
            self._metrics.end_to_end.labels(queue.route.name).observe((now - claim.received_at) / 1000)


def _known(outcome: Outcome) -> Result:
    """The outcome itself, where it is one of ours; a plugin's own subclass of `Outcome` is a bug of the plugin's."""
    if isinstance(outcome, Result):
        return outcome
    return Unknown("handler-failed", f"{type(outcome).__name__} is no outcome of adapter.plugin")


def _outcome(result: Result) -> str:
    if isinstance(result, Ending):
        return result.value
    # By our own names: a plugin's subclass must not become a label of its own.
    kind: type = next(kind for kind in get_args(Result) if isinstance(result, kind))
    return kind.__name__.lower()


def _ms(duration: timedelta) -> int:
    return int(duration.total_seconds() * 1000)


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
