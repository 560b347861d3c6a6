"""One attempt at a delivery, from the claimed lane to its result.

An attempt reads the order again, evaluates the conditions on it and calls the handler; if the lane is in doubt, it
calls the handler's `lookup` instead. Orders are decoded on the handler's loop: one of 4 MiB takes up to a second, which
no verdict can wait for.

A handler is only started if its deadline is earlier than the end of the claim's doubt. Another process that takes the
lane over after a crash then looks up an effect that is either there or will never be.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from adapter.conditions import Result as Held
from adapter.deliveries.outcomes import is_bug, outcome_of
from adapter.identifiers import Channel
from adapter.ledger.claims import Claim
from adapter.ledger.settlement import Broken, Ending, Handling, Interrupted, Result, is_past_last_lookup
from adapter.moments import to_datetime
from adapter.norce.client import Norce
from adapter.orders import NotAnOrder, Order, read_order
from adapter.outgoing import Traffic
from adapter.plugin import Context, Done, Notification, NotificationHandler, Outcome, Reject, Retry, Skip, Unknown
from adapter.routing.routes import Route, wants
from adapter.routing.runner import DeadlinePassed, LoopAbandoned, Run, Runner, leaves

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """One route for one merchant and channel."""

    route: Route
    channel: Channel

    def handling(self, claim: Claim) -> Handling:
        """Return the ways in which the handler can resolve doubt about this delivery."""
        handling = self.route.handling
        return handling if claim.again_of is None else handling.of_resend()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptResult:
    """The result of an attempt, before it is settled."""

    result: Result
    kind: str = "deliver"
    still_runs: Run[Any] | None = None  # a handler that blocks its thread far past its deadline


class Attempts:
    """Runs many attempts at the same time. `clock` is the ledger's, in milliseconds."""

    def __init__(self, *, runner: Runner, norce: Norce, clock: Callable[[], int]) -> None:
        self._runner = runner
        self._norce = norce
        self._clock = clock
        self._runs: dict[Run[Any], str | None] = {}  # the reason why each was cancelled
        self.stopping = False  # no handler is started any more

    def cancel(self, reason: str) -> None:
        """Cancel every handler. What does not end regularly is then in doubt, with this code."""
        for run in self._runs:
            self._runs[run] = reason
            run.cancel()

    async def run(self, claim: Claim, queue: Queue) -> AttemptResult:
        """Deliver, or look up the effect of an earlier attempt.

        Raises only `asyncio.CancelledError`, if it is cancelled itself.
        """
        route, handling = queue.route, queue.handling(claim)
        looks_up = claim.in_doubt and handling.looks_up
        kind = "lookup" if looks_up else "deliver"
        if self.stopping:  # claimed while the service stops
            return AttemptResult(result=Ending.RELEASED, kind=kind)
        can_continue = looks_up or handling.repeatable
        if claim.in_doubt and (not can_continue or is_past_last_lookup(claim.attempt, route.schedule)):
            message = "an attempt ended without a known outcome, and cannot be looked up"
            if can_continue:
                message = "every attempt ended without a known outcome; the order may end the process"
            return AttemptResult(result=Interrupted("in-doubt", message))
        if claim.body is None and not route.refetch:
            return AttemptResult(
                result=Reject("body-pruned", "the body of this notification is no longer stored"), kind=kind
            )
        current: bytes | None = None
        if route.refetch:
            try:
                current = await self._norce.for_handlers(queue.channel).read_bytes(claim.order_id)
            except Outcome as outcome:
                return AttemptResult(result=outcome_of(outcome, sent=False, succeeded=False), kind=kind)
        now = to_datetime(self._clock())
        if self.stopping or now + route.timeout > to_datetime(claim.doubt_ends_at):
            return AttemptResult(result=Ending.RELEASED, kind=kind)
        handler = route.handler
        assert isinstance(handler, NotificationHandler)
        traffic = Traffic(handler.not_done, handler.explain)
        context = self._runner.context(
            "deliveries",
            route=route.name,
            settings=route.settings[queue.channel],
            channel=queue.channel,
            order_id=claim.order_id,
            identity=_identity_of(claim),
            deadline=now + route.timeout,
            first_attempt_at=to_datetime(claim.first_attempt_at),
            attempt=claim.attempt,
            previous=claim.previous,
            is_resend=claim.again_of is not None,
            traffic=traffic,
            concurrency=route.concurrency,
            max_answer_bytes=route.max_answer_bytes,
            log_fields=route.handler.log_fields,
        )
        handle = partial(self._handle, handler, route, claim, claim.body, current, looks_up, traffic)
        run = self._runner.start("deliveries", handle, context)
        try:
            result = await self._result(run, route, claim, traffic, looks_up=looks_up)
            return AttemptResult(result=result, kind=kind)
        except LoopAbandoned as abandoned:
            if abandoned.blocked_by is run:
                return AttemptResult(result=Ending.BLOCKED, kind=kind, still_runs=run)
            if not abandoned.begun or not _may_have_sent(traffic, handler):
                return AttemptResult(result=Ending.RELEASED, kind=kind)
            return AttemptResult(
                result=Interrupted("loop-abandoned", "another handler blocked the plugins' loop"), kind=kind
            )

    async def _handle(
        self,
        handler: NotificationHandler[Any],
        route: Route,
        claim: Claim,
        body: bytes | None,
        current: bytes | None,
        looks_up: bool,
        traffic: Traffic,
        context: Context[Any],
    ) -> Any:
        """Decode the orders, evaluate the conditions and call the handler.

        Runs on the plugins' loop.
        """
        received = None if body is None else Order(body)
        if current is None:
            assert body is not None
            try:
                order = received = read_order(body)
            except NotAnOrder as error:
                raise Reject("order-bad-request", "the stored body holds no order") from error
        else:
            order = self._norce.for_handlers(claim.channel).parse(current, claim.order_id)
        traffic.order = order
        notification = Notification(
            id=claim.notification_id,
            merchant=claim.channel.merchant,
            channel=claim.channel.name,
            callback=claim.callback,
            order=order,
            received=received,
            raw=body,
            received_at=to_datetime(claim.received_at),
        )
        try:
            if looks_up:
                found = await handler.lookup(notification, context)
                return Ending.NOT_THERE if found is None else found
            held = wants(route, order.data)
            if held is not Held.MATCHED:
                return Ending.MOVED_ON if held is Held.NOT_MATCHED else Ending.CONDITION
            return await handler.deliver(notification, context)
        finally:
            await traffic.wait_for_threads()  # whatever they do belongs to this attempt, so they hold the lane

    async def _result(self, run: Run[Any], route: Route, claim: Claim, traffic: Traffic, *, looks_up: bool) -> Result:
        """Wait until the handler has really ended. Its lane must stay claimed until then."""
        facts = {"route": route.name, "delivery_id": claim.delivery_id, "handler": route.handler_name}
        self._runs[run] = None
        try:
            try:
                value = await run.wait(route.timeout)
            except DeadlinePassed:
                log.warning("deadline_passed", **facts)
                run.cancel()
                value = await run.wait()
        except LoopAbandoned:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            if not run.begun:  # another handler blocked the loop until the deadline
                return Ending.RELEASED
            sent = _may_have_sent(traffic, route.handler)
            message, reason = "the handler was cancelled before it ended", self._runs[run]
            if reason is not None:
                return Interrupted(reason, message) if sent else Ending.RELEASED
            return (Unknown if sent else Retry)("deadline-passed", message)
        except Exception as error:
            if any(map(is_bug, leaves(error))):
                log.error("handler_failed", order_id=claim.order_id, exc_info=error, **facts)
            sent = _may_have_sent(traffic, route.handler)
            return outcome_of(error, sent=sent, succeeded=traffic.succeeded, unanswered=traffic.unanswered > 0)
        finally:
            del self._runs[run]
        if isinstance(value, Done | Ending) or (isinstance(value, Skip) and not looks_up):
            return value
        log.error("handler_failed", **facts)
        kind = Unknown if _may_have_sent(traffic, route.handler) else Broken
        return kind("handler-failed", f"the handler returned {type(value).__name__}, which is no outcome")


def _identity_of(claim: Claim) -> str:
    """Return the identity of the event, and for a resend one of its own.

    The idempotency keys are made from it.
    """
    identity = claim.identity.hex()
    return identity if claim.again_of is None else f"{identity}/{claim.delivery_id}"


def _may_have_sent(traffic: Traffic, handler: Any) -> bool:
    """Return whether a write of the attempt may have gone out. From now on, none does."""
    return traffic.close() or handler.other_clients
