"""
One attempt, from a claimed lane to how it ended: look first where there is doubt, read the order anew, decide the
conditions again, call the handler, put what it said into our words.

The handler runs only where it will have ended before the doubt about the claim ends: whoever takes the lane over after
a crash then asks the destination, and finds what this process did.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import structlog

from adapter.conditions import Result as Held
from adapter.identifiers import Channel
from adapter.ledger.claims import Claim
from adapter.ledger.settlement import Ending, Interrupted, Result
from adapter.moments import to_datetime
from adapter.norce.client import Norce
from adapter.orders import NotAnOrder, Order, read_order
from adapter.plugin import Done, Notification, NotificationHandler, Outcome, Reject, Skip, Unknown
from adapter.routing.routes import Route, wants
from adapter.routing.runner import Call, DeadlinePassed, LoopAbandoned, Run, Runner

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A route for one merchant and channel: what the dispatcher takes work from."""

    id: int
    route: Route
    merchant: str
    channel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How an attempt ended, before it is settled. `still_runs` is a handler that does not let go of its thread."""

    result: Result
    kind: str = "deliver"
    still_runs: Run[Any] | None = None

    @property
    def outcome(self) -> str:
        """The result's name, for people and metrics: a plugin's subclass must not become a label of its own."""
        if isinstance(self.result, Ending):
            return self.result.value
        kind: type = next(kind for kind in get_args(Result) if isinstance(self.result, kind))
        return kind.__name__.lower()


class Attempts:
    """Runs attempts, many at a time. `clock` is the ledger's, in milliseconds."""

    def __init__(self, *, runner: Runner, norce: Norce, clock: Callable[[], int]) -> None:
        self._runner = runner
        self._norce = norce
        self._clock = clock
        self._runs: dict[Run[Any], str | None] = {}  # and why it was asked to stop
        self.stopping = False  # nothing is begun any more

    def cancel(self, why: str) -> None:
        """Asks every handler to stop; what it leaves is in doubt, with this code."""
        for run in self._runs:
            self._runs[run] = why
            run.cancel()

    async def run(self, claim: Claim, queue: Queue) -> Ended:
        """Tries a delivery, or looks up what became of it. Never raises but where it is cancelled itself."""
        route, handling = queue.route, queue.route.handling
        looking_up = claim.in_doubt and handling.looks_up
        kind = "lookup" if looking_up else "deliver"
        if self.stopping:  # claimed while the service stops
            return Ended(result=Ending.RELEASED, kind=kind)
        if claim.in_doubt and not looking_up and not handling.repeatable:
            return Ended(
                result=Interrupted("in-doubt", "an attempt ended without a known outcome, and cannot be looked up")
            )
        try:
            notification = await self._notification(claim, queue)
        except Outcome as outcome:
            return Ended(result=_known(outcome), kind=kind)
        if not looking_up:
            held = wants(route, notification.order.data)
            if held is not Held.MATCHED:
                return Ended(result=Ending.MOVED_ON if held is Held.NOT_MATCHED else Ending.CONDITION)
        now = to_datetime(self._clock())
        if self.stopping or now + route.timeout > to_datetime(claim.doubt_ends_at):
            return Ended(result=Ending.RELEASED, kind=kind)
        call = Call(
            route=route.name,
            settings=route.settings[Channel(queue.merchant, queue.channel)],
            merchant=queue.merchant,
            channel=queue.channel,
            order_id=claim.order_id,
            identity=claim.identity.hex(),
            deadline=now + route.timeout,
            first_attempt_at=to_datetime(claim.first_attempt_at),
            attempt=claim.attempt,
            previous=claim.previous,
        )
        handler = route.handler
        assert isinstance(handler, NotificationHandler)
        run: Run[Any] = (self._runner.lookup if looking_up else self._runner.deliver)(handler, notification, call)
        try:
            return Ended(result=await self._result(run, route, claim, looking_up=looking_up), kind=kind)
        except LoopAbandoned as abandoned:
            if abandoned.blocked_by is run:
                return Ended(result=Ending.BLOCKED, kind=kind, still_runs=run)
            if not abandoned.begun:
                return Ended(result=Ending.RELEASED, kind=kind)
            return Ended(result=Interrupted("loop-abandoned", "another handler blocked the plugins' loop"), kind=kind)

    async def _notification(self, claim: Claim, queue: Queue) -> Notification:
        if claim.body is None:
            raise Reject("body-pruned", "the body of this notification is not kept any more")
        try:
            received = read_order(claim.body)
        except NotAnOrder as error:
            raise Reject("order-bad-request", "the stored body holds no order") from error
        order: Order = received
        if queue.route.refetch:
            order = await self._norce.for_handlers(Channel(queue.merchant, queue.channel)).read(claim.order_id)
        return Notification(
            id=claim.notification_id,
            merchant=claim.merchant,
            channel=claim.channel,
            callback=claim.callback,
            order=order,
            received=received,
            raw=claim.body,
            received_at=to_datetime(claim.received_at),
        )

    async def _result(self, run: Run[Any], route: Route, claim: Claim, *, looking_up: bool) -> Result:
        facts = {"route": route.name, "delivery_id": claim.delivery_id, "handler": route.handler_name}
        self._runs[run] = None
        try:
            try:
                value = await run.result(route.timeout)
            except DeadlinePassed:
                log.warning("deadline_passed", **facts)
                run.cancel()
                value = await run.ended()  # the lane stays ours until the handler has really stopped
        except LoopAbandoned:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            if not run.begun:  # the loop was held so long
                return Ending.RELEASED
            message, why = "the handler was cancelled before it ended", self._runs[run]
            return Unknown("deadline-passed", message) if why is None else Interrupted(why, message)
        except Outcome as outcome:
            return _known(outcome)
        except Exception as error:  # a bug in a plugin: logged with its traceback, and in doubt
            log.error("handler_failed", order_id=claim.order_id, exc_info=error, **facts)
            return Unknown("handler-failed", f"the handler raised {type(error).__name__}")
        finally:
            del self._runs[run]
        if looking_up and value is None:
            return Ending.NOT_THERE
        if isinstance(value, Done) or (isinstance(value, Skip) and not looking_up):
            return value
        log.error("handler_failed", **facts)
        return Unknown("handler-failed", f"the handler returned {type(value).__name__}, which is no outcome")


def _known(outcome: Outcome) -> Result:
    """The outcome itself, where it is one of ours; a plugin's own subclass of `Outcome` is a bug of the plugin's."""
    if isinstance(outcome, Result):
        return outcome
    return Unknown("handler-failed", f"{type(outcome).__name__} is no outcome of adapter.plugin")
