"""The order service of Norce Checkout, over its records.

A change waits for the answers of hooks, and holds no lock meanwhile. If another change of the same order was stored in
the meantime, the change is applied again to the stored order, and its hooks are called again.
"""

import asyncio
import random
import string
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from adapter.moments import to_milliseconds, to_text
from adapter.sandbox.norce.callbacks import Callbacks
from adapter.sandbox.norce.orders import (
    CHANGES,
    ApiRequest,
    Refused,
    ValidationFailed,
    created,
    problems,
    same,
    with_registration,
)
from adapter.sandbox.norce.records import Records
from adapter.sandbox.norce.switches import Switches
from adapter.sandbox.norce.versions import Order

MAX_TRIES = 10


class Checkout:
    """The orders of all merchants. Its callers have authorized the request.

    Args:
        switches: Their state at the start.
        clock: Returns the present time.
        sleep: Waits for so many seconds.
        seed: Fixes everything that is random, ids included.
        transport: Sends callbacks.
    """

    def __init__(
        self,
        *,
        switches: Switches | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        seed: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.switches = switches or Switches()
        self.records = Records()
        self.journal = self.records.journal
        self.chance = random.Random(seed)  # noqa: S311 - nothing here is a secret
        self.sleep = sleep
        self._clock = clock
        self.callbacks = Callbacks(
            records=self.records,
            switches=lambda: self.switches,
            now=self.now,
            sleep=sleep,
            chance=self.chance,
            transport=transport,
        )

    def now(self) -> datetime:
        return self._clock() + timedelta(seconds=self.switches.clock_skew_seconds)

    def timestamp(self) -> str:
        return to_text(to_milliseconds(self.now()))

    def new_id(self, prefix: str) -> str:
        return prefix + "".join(self.chance.choices(string.ascii_letters + string.digits, k=24))

    def stored(self, request: ApiRequest) -> Order:
        """Return the order in the path if it belongs to the channel, or raise `Refused`."""
        order_id = request.path["order_id"]
        order = self.records.orders.get(order_id)
        if order is None or (order["merchant"], order["channel"]) != (request.merchant, request.channel):
            raise Refused("order-not-found", f"Order with id:{order_id} not found.")
        return order

    def create(self, request: ApiRequest) -> Order:
        """Store a new order with the static notifications of its channel, or raise `Refused`."""
        order = created(request)
        for document in self.records.documents_of(request.merchant, request.channel).values():
            if document.get("active") is not False:
                for each in (document.get("order") or {}).get("notifications") or ():
                    order = with_registration(order, "notifications", each, request)
        self.records.orders[order["id"]] = order
        return order

    async def change(self, name: str, request: ApiRequest) -> Any:
        """Carry out a change and return the body of its answer, or raise `Refused`."""
        for _ in range(MAX_TRIES):
            base = self.stored(request)
            proposed, answer = CHANGES[name](base, request)
            final = await self.callbacks.hooks(base, proposed, request)
            if self.records.orders.get(base["id"]) is not base:
                continue
            if not same({**final, "lastModified": base["lastModified"]}, base):
                self.records.orders[base["id"]] = final
            self.callbacks.notify(base, final)
            return answer
        raise Refused("order-conflict", "Other requests keep changing this order.")

    def delete(self, request: ApiRequest) -> None:
        """Delete an order, or raise `Refused`."""
        del self.records.orders[self.stored(request)["id"]]

    async def validate(self, request: ApiRequest) -> None:
        """Raise `ValidationFailed` if the order service or a validation finds an error."""
        order, switches = self.stored(request), request.switches
        errors = [*problems(order), *await self.callbacks.validations(order, switches)]
        if not switches.validation_messages:
            errors = [{name: each[name] for name in ("adapterId", "code")} for each in errors]
        if errors:
            raise ValidationFailed(errors)
