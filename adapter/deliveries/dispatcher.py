"""
Claim, run, record, until told to stop; and keep the lease under which all of it happens.

A lane is claimed only for a free handler slot, so nothing waits in memory, and the claim is on disk before the handler
runs. Where the lease cannot be renewed, others will take the lanes: the handlers are told to stop before they do.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import structlog

from adapter.deliveries.attempt import Attempts, Ended, Queue
from adapter.identifiers import Channel
from adapter.ledger.claims import Claim, QueueLimits, Record
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.settlement import Attempt, Settlement, State
from adapter.ledger.store import StoreUnavailable
from adapter.metrics import Metrics
from adapter.moments import in_milliseconds, to_datetime
from adapter.plugin import Done, Outcome, Skip
from adapter.routing.runner import Run

log = structlog.get_logger(__name__)

POLL = timedelta(seconds=5)
BEAT = timedelta(seconds=5)
STORE_RETRY = timedelta(seconds=1)
SLACK = timedelta(seconds=5)
LAST_WORDS = timedelta(seconds=2)


class Dispatcher:
    """
    Works the queues until `stop`. `clock` is the ledger's, in milliseconds; `before_handler` is how long reading the
    order may take; `random` gives the jitter, 0 to 1; with a `shared` store, a lease can be lost.
    """

    def __init__(
        self,
        queues: Mapping[int, Queue],
        *,
        lanes: Lanes,
        lease: Lease,
        attempts: Attempts,
        before_handler: timedelta,
        metrics: Metrics,
        clock: Callable[[], int],
        slots: int,
        random: Callable[[], float],
        shared: bool,
        held: bool = False,
    ) -> None:
        self._queues = queues
        around = before_handler + SLACK
        self._limits = [
            QueueLimits(
                queue_id=key,
                concurrency=queue.route.concurrency,
                doubt_ms=in_milliseconds(around + queue.route.timeout),
            )
            for key, queue in queues.items()
        ]
        self._lanes = lanes
        self._lease = lease
        self._attempts = attempts
        self._metrics = metrics
        self._clock = clock
        self._slots = slots
        self._random = random
        self._shared = shared
        self._held = held  # claims nothing: `serve --hold`
        self._news = asyncio.Event()
        self._has_room = True
        self._claims_in_question = False
        self._claiming = asyncio.Lock()
        self._tasks: dict[asyncio.Task[None], Claim] = {}
        self._blocked: dict[asyncio.Task[None], Claim] = {}
        self._failed: list[Claim] = []
        self._busy: Counter[int] = Counter()
        self.switched_off: Container[Channel] = ()  # what they are owed waits
        self._stopping = False
        self._cancelling = False

    @property
    def running(self) -> int:
        """How many deliveries are being tried now."""
        return len(self._tasks)

    def wake(self) -> None:
        """There is new work. Without room for it that is no news: the slot will be, when it is given back."""
        if self._has_room:
            self._news.set()

    async def run(self) -> None:
        """Claims and starts work until `stop` is called. A store that fails is tried again, for as long as it takes."""
        while not self._stopping:
            # Clear the news before claiming: what lands in between must not be lost.
            self._news.clear()
            try:
                async with self._claiming:
                    wait = await self._claim()
            except StoreUnavailable:
                self._claims_in_question = True
                wait = STORE_RETRY
            if wait is not None:
                await self._wait(wait)

    async def keep_lease(self) -> None:
        """The heartbeat, until cancelled."""
        while True:
            try:
                async with asyncio.timeout((BEAT * 1.5).total_seconds()):
                    renewed = await self._lease.renew()
                if not renewed:
                    log.error("lease_lost", running=len(self._tasks))
                    self._attempts.cancel("lease-lost")
                    async with self._claiming:  # what is claimed meanwhile would be a dead process's
                        await self._lease.enter()
                self._news.set()  # the beat may have freed a dead process's lanes
            except (StoreUnavailable, TimeoutError):  # the store has said so itself
                if self._shared and self._clock() > self._lease.until - in_milliseconds(BEAT):
                    self._attempts.cancel("lease-lost")
            await asyncio.sleep(BEAT.total_seconds())

    async def stop(self, grace: timedelta) -> None:
        """
        Takes no more work and waits `grace` for what runs. What still runs then is cancelled and leaves its lane in
        doubt; what cannot be cancelled keeps its lane claimed, and the next start finds it so.
        """
        self._stopping = self._attempts.stopping = True
        self._news.set()
        async with self._claiming:  # what is being claimed now must be among the tasks, or it would stay in doubt
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(LAST_WORDS.total_seconds()):
                    await self._give_back()
        await self._drain(grace)
        self._cancelling = True
        self._attempts.cancel("shutdown")
        await self._drain(LAST_WORDS)
        left = [*self._tasks, *self._blocked]
        for task in left:
            task.cancel()
        if left:
            log.warning("deliveries_abandoned", running=len(left))
            await asyncio.gather(*left, return_exceptions=True)

    async def _claim(self) -> timedelta | None:
        """Claims what there is room for, and starts it; how long to wait for more, or None for not at all."""
        await self._give_back()
        free = 0 if self._held else self._slots - len(self._tasks)
        asks = [ask for ask in self._limits if self._busy[ask.queue_id] < ask.concurrency] if free > 0 else []
        self._has_room = bool(asks)
        asks = [ask for ask in asks if not self._is_off(self._queues[ask.queue_id])]
        if not asks:  # a slot that is given back will wake us, or who switches a channel on
            return POLL
        taken = await self._lanes.claim(asks, free)
        for claim in taken.claims:
            self._busy[claim.queue_id] += 1
            task = asyncio.create_task(self._attempt(claim))
            self._tasks[task] = claim
            task.add_done_callback(self._finished)
        if taken.claims:
            return None
        due = taken.next_due_at
        return POLL if due is None else min(POLL, timedelta(milliseconds=max(due - self._clock(), 0)))

    def _is_off(self, queue: Queue) -> bool:
        return queue.channel in self.switched_off

    async def _give_back(self) -> None:
        """Undoes claims that are on disk although the store has failed: nobody has run them."""
        if self._claims_in_question:
            held = (*self._tasks.values(), *self._blocked.values(), *self._failed)
            await self._lanes.give_back([claim.fence for claim in held])
            self._claims_in_question = False

    async def _wait(self, at_most: timedelta) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most.total_seconds()):
                await self._news.wait()

    async def _drain(self, within: timedelta) -> None:
        if self._tasks and within:
            await asyncio.wait(self._tasks, timeout=within.total_seconds())

    def _finished(self, task: asyncio.Task[None]) -> None:
        claim = self._tasks.pop(task)
        self._busy[claim.queue_id] -= 1
        self._news.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("dispatcher_failed", exc_info=error)  # the lane stays claimed, and in doubt at the next start
            self._failed.append(claim)

    async def _attempt(self, claim: Claim) -> None:
        queue = self._queues[claim.queue_id]
        ended = await self._attempts.run(claim, queue)
        settled = await self._settle(claim, queue, ended)
        if settled and ended.still_runs is not None:
            task = asyncio.create_task(self._release(claim, ended.still_runs))
            self._busy[claim.queue_id] += 1
            self._blocked[task] = claim
            task.add_done_callback(self._blocked.pop)

    async def _release(self, claim: Claim, run: Run[Any]) -> None:
        """Keeps the lane until the thread has let go of a handler that blocked it; its slot is free already."""
        await run.stopped.wait()
        self._busy[claim.queue_id] -= 1
        with contextlib.suppress(StoreUnavailable):  # too late: the next start finds it
            await self._until_stored(lambda: self._lanes.release(claim))
        self._news.set()

    async def _settle(self, claim: Claim, queue: Queue, ended: Ended) -> bool:
        result = ended.result
        attempt = Attempt(
            number=claim.attempt,
            in_doubt=claim.in_doubt,
            ended_at=to_datetime(self._clock()),
            doubt_ends_at=to_datetime(claim.doubt_ends_at),
            handling=queue.route.handling,
            schedule=queue.route.schedule,
            jitter=self._random(),
        )
        record = Record(
            claim=claim,
            result=result,
            attempt=attempt,
            kind=ended.kind,
            outcome=ended.outcome,
            code=result.code if isinstance(result, Outcome) else result.reason if isinstance(result, Skip) else None,
            message=result.message if isinstance(result, Outcome) else None,
            reference=result.reference if isinstance(result, Done) else None,
            facts=result.facts if isinstance(result, Done) else None,
            passes=queue.route.refetch,
            keeps=ended.still_runs is not None,
        )
        try:
            settlement = await self._until_stored(lambda: self._lanes.settle(record))
        except StoreUnavailable:
            log.error("settle_given_up", delivery_id=claim.delivery_id, route=queue.route.name)
            return False
        except Exception as error:  # words of the handler's that cannot be written: the outcome counts, not they
            log.error("handler_failed", route=queue.route.name, delivery_id=claim.delivery_id,
                      order_id=claim.order_id, handler=queue.route.handler_name, exc_info=error)  # fmt: skip
            bare = replace(record, message=None, reference=None, facts=None)
            settlement = await self._until_stored(lambda: self._lanes.settle(bare))
        self._tell(record, queue, settlement)
        return settlement is not None

    async def _until_stored(self, write: Callable[[], Any]) -> Any:
        while True:
            try:
                return await write()
            except StoreUnavailable:
                if self._cancelling:
                    raise
                await asyncio.sleep(STORE_RETRY.total_seconds())

    def _tell(self, record: Record, queue: Queue, settlement: Settlement | None) -> None:
        claim, now = record.claim, self._clock()
        events = {State.DONE: "delivery_done", State.WAITING: "delivery_retried", State.DEAD: "delivery_dead"}
        write = log.info if settlement and settlement.state is not State.DEAD else log.warning
        if settlement is not None and settlement.pauses:
            write = log.warning
        write(
            events[settlement.state] if settlement else "lane_lost",
            delivery_id=claim.delivery_id,
            notification_id=claim.notification_id,
            order_id=claim.order_id,
            merchant=claim.channel.merchant,
            channel=claim.channel.name,
            route=queue.route.name,
            attempt=claim.attempt,
            kind=record.kind,
            outcome=record.outcome,
            code=record.code,
            reason=settlement and settlement.reason and settlement.reason.value,
            in_doubt=settlement and not settlement.known,
            next_at=settlement and settlement.due_at and settlement.due_at.isoformat(timespec="milliseconds"),
            duration_ms=now - claim.claimed_at,
        )
        self._metrics.attempts.labels(queue.route.name, record.outcome).inc()
        self._metrics.attempt_duration.labels(queue.route.name).observe(max(now - claim.claimed_at, 0) / 1000)
        if settlement is not None and settlement.state is State.DONE:
            self._metrics.end_to_end.labels(queue.route.name).observe(max(now - claim.received_at, 0) / 1000)
