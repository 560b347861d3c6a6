"""The dispatcher: claims lanes, runs attempts, settles them, and renews its lease.

A lane is claimed only for a free slot, so that no delivery waits in memory, and the claim is on disk before the
handler runs. If the lease cannot be renewed, the handlers are cancelled before other processes take the lanes.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import structlog

from adapter.deliveries.attempt import AttemptResult, Attempts, Queue
from adapter.identifiers import Channel
from adapter.ledger.claims import AttemptRecord, Claim, QueueLimits
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.settlement import Settlement, State
from adapter.ledger.store import StoreUnavailable
from adapter.metrics import Metrics
from adapter.moments import in_milliseconds
from adapter.plugin import Misconfigured
from adapter.routing.runner import Run

log = structlog.get_logger(__name__)

POLL = timedelta(seconds=5)
HEARTBEAT = timedelta(seconds=5)
STORE_RETRY = timedelta(seconds=1)
SLACK = timedelta(seconds=5)  # of the doubt of a claim, after the time to read the order and the handler's timeout
CANCEL_GRACE = timedelta(seconds=2)  # for handlers to end after they were cancelled


class Dispatcher:
    """Attempts the deliveries of all queues until it is stopped.

    Args:
        queues: All queues by their id in the ledger.
        before_handler: The longest time for reading the order again.
        clock: The ledger's clock, in milliseconds.
        slots: How many attempts may run at the same time. A queue without a running attempt may start one beyond them.
        random: Returns the jitter of a retry, 0 to 1.
        shared: Whether other processes use the same store, so that a lease can be lost.
        held: Claim nothing (`serve --hold`).
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
        self._limits = [
            QueueLimits(
                queue_id=key,
                concurrency=queue.route.concurrency,
                doubt_ms=in_milliseconds(before_handler + queue.route.timeout + SLACK),
                schedule=queue.route.schedule,
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
        self._held = held
        self._wake_up = asyncio.Event()
        self._has_room = True
        self._claims_uncertain = False
        self._claiming = asyncio.Lock()
        self._tasks: dict[asyncio.Task[None], Claim] = {}
        self._blocked: dict[asyncio.Task[None], Claim] = {}
        self._failed: list[Claim] = []
        self._busy: Counter[int] = Counter()
        self.switched_off: Container[Channel] = ()  # their deliveries wait
        self._stopping = False
        self._cancelling = False

    @property
    def running(self) -> int:
        """The number of attempts that run now."""
        return len(self._tasks)

    def wake(self) -> None:
        """Look for work now, unless all slots are busy: a freed slot wakes the dispatcher."""
        if self._has_room:
            self._wake_up.set()

    async def run(self) -> None:
        """Claim lanes and start attempts until `stop` is called. Errors of the store are retried."""
        while not self._stopping:
            # Clear the wake-up before claiming, or one that arrives in between is lost.
            self._wake_up.clear()
            try:
                async with self._claiming:
                    wait = await self._claim()
            except StoreUnavailable:
                self._claims_uncertain = True
                wait = STORE_RETRY
            if wait is not None:
                await self._wait(wait)

    async def keep_lease(self) -> None:
        """Renew the lease with every heartbeat, until cancelled."""
        while True:
            try:
                async with asyncio.timeout((HEARTBEAT * 1.5).total_seconds()):
                    renewed = await self._lease.renew()
                if not renewed:
                    log.error("lease_lost", running=len(self._tasks))
                    self._attempts.cancel("lease-lost")
                    async with self._claiming:  # a claim made meanwhile would belong to the old lease
                        await self._lease.enter()
                self._wake_up.set()  # renewing may have freed the lanes of a dead process
            except (StoreUnavailable, TimeoutError):  # logged by the store
                if self._shared and self._clock() > self._lease.until - in_milliseconds(HEARTBEAT):
                    self._attempts.cancel("lease-lost")
            await asyncio.sleep(HEARTBEAT.total_seconds())

    async def stop(self, grace: timedelta) -> None:
        """Stop claiming, and wait for the running attempts.

        Attempts that run longer than `grace` are cancelled and leave their lanes in doubt. An attempt that cannot be
        cancelled keeps its lane claimed until the next start.
        """
        self._stopping = self._attempts.stopping = True
        self._wake_up.set()
        async with self._claiming:  # a claim under way must become a task first, or its lane would stay in doubt
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(CANCEL_GRACE.total_seconds()):
                    await self._return_uncertain_claims()
        await self._drain(grace)
        self._cancelling = True
        self._attempts.cancel("shutdown")
        await self._drain(CANCEL_GRACE)
        left = [*self._tasks, *self._blocked]
        for task in left:
            task.cancel()
        if left:
            log.warning("deliveries_abandoned", running=len(left))
            await asyncio.gather(*left, return_exceptions=True)

    async def _claim(self) -> timedelta | None:
        """Claim lanes for the free slots and start them.

        Returns:
            The time to wait before the next claim; None if there may be more work at once.
        """
        await self._return_uncertain_claims()
        free = max(self._slots - len(self._tasks), 0)
        running = {claim.queue_id for claim in self._tasks.values()}
        idle = {each.queue_id for each in self._limits} - running
        limits = [
            each
            for each in self._limits
            if self._busy[each.queue_id] < each.concurrency and (free or each.queue_id in idle)
        ]
        self._has_room = bool(limits) and not self._held
        limits = [each for each in limits if self._queues[each.queue_id].channel not in self.switched_off]
        if not limits or self._held:  # a freed slot wakes the dispatcher, and so does a channel that is switched on
            return POLL
        claimed = await self._lanes.claim(limits, free, idle=idle)
        for claim in claimed.claims:
            self._busy[claim.queue_id] += 1
            task = asyncio.create_task(self._attempt(claim))
            self._tasks[task] = claim
            task.add_done_callback(self._finished)
        if claimed.claims:
            return None
        due = claimed.next_due_at
        return POLL if due is None else min(POLL, timedelta(milliseconds=max(due - self._clock(), 0)))

    async def _return_uncertain_claims(self) -> None:
        """Release claims that may be on disk although the store failed. No handler ran for them."""
        if self._claims_uncertain:
            held = (*self._tasks.values(), *self._blocked.values(), *self._failed)
            await self._lanes.give_back([claim.fence for claim in held])
            self._claims_uncertain = False

    async def _wait(self, at_most: timedelta) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most.total_seconds()):
                await self._wake_up.wait()

    async def _drain(self, within: timedelta) -> None:
        if self._tasks and within:
            await asyncio.wait(self._tasks, timeout=within.total_seconds())

    def _finished(self, task: asyncio.Task[None]) -> None:
        claim = self._tasks.pop(task)
        self._busy[claim.queue_id] -= 1
        self._wake_up.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("dispatcher_failed", exc_info=error)  # the lane stays claimed, and is in doubt at the next start
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
        """Wait until a handler that blocked its thread has ended, and release its lane."""
        await run.stopped.wait()
        self._busy[claim.queue_id] -= 1
        with contextlib.suppress(StoreUnavailable):  # the service ends; the next start releases the lane
            await self._until_stored(lambda: self._lanes.release(claim))
        self._wake_up.set()

    async def _settle(self, claim: Claim, queue: Queue, ended: AttemptResult) -> bool:
        record = AttemptRecord(
            claim=claim,
            result=ended.result,
            kind=ended.kind,
            handling=queue.handling(claim),
            schedule=queue.route.schedule,
            jitter=self._random(),
            refetch=queue.route.refetch,
            keeps_lane=ended.still_runs is not None,
        )
        try:
            settlement = await self._until_stored(lambda: self._lanes.settle(record))
        except StoreUnavailable:
            log.error("settlement_not_stored", delivery_id=claim.delivery_id, route=queue.route.name)
            return False
        except Exception as error:  # a text of the handler cannot be stored; its outcome still counts
            log.error("handler_failed", route=queue.route.name, delivery_id=claim.delivery_id,
                      order_id=claim.order_id, handler=queue.route.handler_name, exc_info=error)  # fmt: skip
            without_text = replace(record, has_text=False)
            settlement = await self._until_stored(lambda: self._lanes.settle(without_text))
        self._log_attempt(record, queue, settlement)
        return settlement is not None

    async def _until_stored(self, write: Callable[[], Any]) -> Any:
        while True:
            try:
                return await write()
            except StoreUnavailable:
                if self._cancelling:
                    raise
                await asyncio.sleep(STORE_RETRY.total_seconds())

    def _log_attempt(self, record: AttemptRecord, queue: Queue, settlement: Settlement | None) -> None:
        claim, now = record.claim, self._clock()
        events = {State.DONE: "delivery_done", State.WAITING: "delivery_retried", State.DEAD: "delivery_dead"}
        is_bad = settlement is None or settlement.state is State.DEAD or isinstance(record.result, Misconfigured)
        write = log.warning if is_bad else log.info
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
        self._metrics.delivery_attempts.labels(queue.route.name, record.outcome).inc()
        self._metrics.delivery_attempt_duration.labels(queue.route.name).observe(max(now - claim.claimed_at, 0) / 1000)
        if settlement is not None and settlement.state is State.DONE:
            self._metrics.delivery_end_to_end.labels(queue.route.name).observe(max(now - claim.received_at, 0) / 1000)
