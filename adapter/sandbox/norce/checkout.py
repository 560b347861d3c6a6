"""
The order service of Norce Checkout, over its records.

What one would get wrong: a change with hooks takes as long as they do, and nothing is locked meanwhile. Where another
change of the same order was stored first, the change is made anew on what is there now, and its hooks are asked again.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec

from adapter.sandbox.norce.callbacks import Callbacks
from adapter.sandbox.norce.orders import (
    CHANGES,
    REMOVED,
    Call,
    Invalid,
    Refused,
    created,
    part,
    problems,
    same,
    with_registration,
)
from adapter.sandbox.norce.records import Journal, Records
from adapter.sandbox.norce.switches import Switches
from adapter.sandbox.norce.versions import Order

MOST_TRIES = 10
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class Checkout:
    """Orders are created, changed and validated here; whoever calls has been let in already."""

    def __init__(
        self,
        *,
        store: Path | None = None,
        switches: Switches | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        seed: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.switches = switches or Switches()
        self.records = Records(store)
        self.journal = Journal()
        self.chance = random.Random(seed)  # noqa: S311 - nothing here is a secret
        self.sleep = sleep
        self._clock = clock
        self.callbacks = Callbacks(
            records=self.records,
            journal=self.journal,
            switches=lambda: self.switches,
            now=self.now,
            sleep=sleep,
            chance=self.chance,
            transport=transport,
        )

    def now(self) -> datetime:
        return self._clock() + timedelta(seconds=self.switches.clock_skew_seconds)

    def new_id(self, prefix: str) -> str:
        mark = "_" if self.switches.order_id_underscore else ""
        return prefix + mark + "".join(self.chance.choices(_ALPHABET, k=self.switches.id_characters))

    def stored(self, call: Call) -> Order:
        """The order that the call's address names, if it is its merchant's and channel's. Raises `Refused`."""
        order_id = call.path["order_id"]
        order = self.records.orders.get(order_id)
        if order is None or (order["merchant"], order["channel"]) != (call.merchant, call.channel):
            raise Refused("order-not-found", f"Order with id:{order_id} not found.")
        return order

    def matched(self, call: Call) -> Order:
        """The stored order that is to change, if it is the one that `If-Match` asks for. Raises `Refused`."""
        order = self.stored(call)
        expected = {each.strip() for each in (call.if_match or "*").split(",")}
        if call.switches.etags and expected.isdisjoint({"*", etag(order)}):
            raise Refused("order-conflict", "The order has changed since it was read.", 412)
        return order

    def create(self, call: Call) -> Order:
        """Stores a new order, with what the channel's configuration adds to it. Raises `Refused`."""
        order = created(call)
        reference = order["cart"]["reference"]
        if call.switches.cart_reference_unique and any(
            each["cart"]["reference"] == reference and each["merchant"] == call.merchant
            for each in self.records.orders.values()
        ):
            raise Refused("order-conflict", "There is an order for this cart already.")
        for kind, registered in self._static(call):
            order = with_registration(order, kind, registered, call)
        self.records.keep("orders", order["id"], order)
        if call.switches.notification_on_creation:
            self.callbacks.notify(None, order, (), call)
        return order

    def _static(self, call: Call) -> list[tuple[str, dict[str, Any]]]:
        kinds = ("notifications", "hooks", "validations")[: 3 if call.switches.static_hooks_and_validations else 1]
        return [
            (kind, registered)
            for document in self.records.documents_of(call.merchant, call.channel).values()
            if document.get("active") is not False
            for kind in kinds
            for registered in (document.get("order") or {}).get(kind) or ()
        ]

    async def change(self, name: str, call: Call) -> Any:
        """Carries out an operation that changes an order, and answers its body. Raises `Refused`."""
        function, touched = CHANGES[name]
        for _ in range(MOST_TRIES):
            base = self.matched(call)
            proposed, answer = function(base, call)
            final = await self.callbacks.hooks(base, proposed, touched, call)
            if self.records.orders.get(base["id"]) is not base:
                continue
            if not same({**final, "lastModified": base["lastModified"]}, base):
                self.records.keep("orders", final["id"], final)
            self.callbacks.notify(base, final, touched, call)
            return answer
        raise Refused("order-conflict", "Others change this order all the time.")

    async def delete(self, call: Call) -> None:
        """Raises `Refused`."""
        order = self.matched(call)
        if call.switches.deleted == "removed":
            any_move = replace(call.switches, transitions_enforced=False)
            await self.change("put_state", replace(call, body={"currentStatus": REMOVED}, switches=any_move))
        else:
            self.records.drop("orders", order["id"])

    async def validate(self, call: Call) -> None:
        """Raises `Invalid` with the order service's own reasons, then those of all validations."""
        order = self.stored(call)
        errors = [*problems(order), *await self.callbacks.validations(order, call)]
        if not call.switches.validation_messages:
            errors = [{name: each[name] for name in ("adapterId", "code")} for each in errors]
        if errors:
            raise Invalid(errors)

    async def execute(self, call: Call) -> None:
        """Calls the address of a payment's action. Raises `Refused`."""
        order = self.stored(call)
        payment = part(order["payments"], call.path["payment_id"], "payment-not-found")
        action = part(payment["actions"], call.path["action_id"])
        answer = await self.callbacks.call(
            "action", {"invoke": action["url"], **action}, order, seconds=call.switches.hook_seconds
        )
        if not answer.is_good:
            raise Refused("payment-error", f"The action was not carried out: {answer.reason or answer.status}.")


def etag(order: Order) -> str:
    """The entity tag of what is stored, whichever version and part of it is read."""
    return f'"{hashlib.sha256(msgspec.json.encode(order)).hexdigest()[:32]}"'
