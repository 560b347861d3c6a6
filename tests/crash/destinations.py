"""The destinations: a shop that honours idempotency keys, and a warehouse that ignores them.

Both count what really happened, and break connections before and after they act.
"""

import asyncio
import contextlib
import random
from collections import Counter, defaultdict

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from adapter.sandbox.jetshop_stand_in import DROPPED_AFTER, DROPPED_BEFORE, EXTENSION, Fault, JetshopStandIn

LATE_SECONDS = 0.15  # far less than the time between a request and its lookup


class Warehouse:
    """A warehouse that ships at every POST. Without `rng` it is reliable.

    `shipped` counts by order and snapshot; `order_of` has the snapshots in order of arrival. `answers_after` is the
    time from the shipment to the answer, in seconds.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self.answers_after = 0.0
        self.shipped: Counter[tuple[str, str]] = Counter()
        self.order_of: dict[str, list[str]] = defaultdict(list)
        self._rng = rng
        self._late_shipments: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            await request.body()
        except ClientDisconnect:  # the service was killed while it sent the request
            return
        _, reference, snapshot = scope["path"].rsplit("/", 2)
        if request.method == "GET":
            response: Response = JSONResponse({"number": f"W-{reference}"}, 200)
            if (reference, snapshot) not in self.shipped:
                response = JSONResponse({}, 404)
            await response(scope, receive, send)
            return
        chance = 0.5 if self._rng is None else self._rng.random()
        if chance < 0.04:
            await JSONResponse({}, 503)(scope, receive, send)
            return
        if chance < 0.08:
            await _hang_up(scope, receive)
            return
        if chance < 0.16:  # it acts, although the caller may be dead by then
            shipment = asyncio.create_task(self._late(reference, snapshot))
            self._late_shipments.add(shipment)
            shipment.add_done_callback(self._late_shipments.discard)
            await asyncio.shield(shipment)
        else:
            self._ship(reference, snapshot)
        if chance > 0.96:
            await _hang_up(scope, receive)
            return
        await asyncio.sleep(self.answers_after)
        await JSONResponse({"number": f"W-{reference}"}, 201)(scope, receive, send)

    async def _late(self, reference: str, snapshot: str) -> None:
        await asyncio.sleep(self._rng.uniform(0, LATE_SECONDS))
        self._ship(reference, snapshot)

    def _ship(self, reference: str, snapshot: str) -> None:
        self.shipped[reference, snapshot] += 1
        self.order_of[reference].append(snapshot)


class Shop(JetshopStandIn):
    """A shop for which the same key again changes nothing. The first request of some orders meets a fault."""

    def __init__(self, rng: random.Random, *, username: str, password: str) -> None:
        super().__init__(username=username, password=password)
        self._rng = rng

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):  # the service was killed while it sent the request
            await super().__call__(scope, receive, send)

    def expect(self, name: str) -> None:
        """Prepare for an order, perhaps with a fault at its first request."""
        chance = self._rng.random()
        if chance < 0.12:
            faults = (DROPPED_BEFORE, DROPPED_AFTER, Fault(acts=True, delay_seconds=LATE_SECONDS), Fault(status=503))
            self.script(name, faults[int(chance / 0.03)])

    def exported(self) -> Counter[str]:
        """Count the requests that changed something, by order."""
        return Counter(entry.order_key for entry in list(self.journal) if entry.result != "unchanged")

    def count_repeated_puts(self) -> int:
        """Count the PUTs that changed nothing. They do no harm here, but a correct service sends none."""
        return sum(entry.result == "unchanged" for entry in list(self.journal))


async def _hang_up(scope: Scope, receive: Receive) -> None:
    scope["extensions"][EXTENSION]()
    while (await receive())["type"] != "http.disconnect":
        pass
