"""
What the orders are for: a shop that honours the idempotency key, and a warehouse that does not; both count what really
happened, and break connections before and after that.
"""

import asyncio
import contextlib
import random
from collections import Counter, defaultdict

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from adapter.sandbox.jetshop_stand_in import DROPPED_AFTER, DROPPED_BEFORE, EXTENSION, Fault, JetshopStandIn

LATE_SECONDS = 0.15  # far less than the time a request is left before anybody asks what became of it


class Warehouse:
    """
    Ships at every POST. `shipped` counts by order and snapshot; `order_of` has the snapshots as they came. Without
    `moods` it is reliable; `answers_after` are the seconds from the shipment to the answer.
    """

    def __init__(self, moods: random.Random | None = None) -> None:
        self.answers_after = 0.0
        self.shipped: Counter[tuple[str, str]] = Counter()
        self.order_of: dict[str, list[str]] = defaultdict(list)
        self._moods = moods
        self._acting: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            await request.body()
        except ClientDisconnect:  # killed in the middle of its request: nothing that anybody could act on
            return
        _, reference, snapshot = scope["path"].rsplit("/", 2)
        if request.method == "GET":
            response: Response = JSONResponse({"number": f"W-{reference}"}, 200)
            if (reference, snapshot) not in self.shipped:
                response = JSONResponse({}, 404)
            await response(scope, receive, send)
            return
        mood = 0.5 if self._moods is None else self._moods.random()
        if mood < 0.04:
            await JSONResponse({}, 503)(scope, receive, send)
            return
        if mood < 0.08:
            await _hang_up(scope, receive)
            return
        if mood < 0.16:  # it acts, though nobody may be waiting any more
            acting = asyncio.create_task(self._late(reference, snapshot))
            self._acting.add(acting)
            acting.add_done_callback(self._acting.discard)
            await asyncio.shield(acting)
        else:
            self._ship(reference, snapshot)
        if mood > 0.96:
            await _hang_up(scope, receive)
            return
        await asyncio.sleep(self.answers_after)
        await JSONResponse({"number": f"W-{reference}"}, 201)(scope, receive, send)

    async def _late(self, reference: str, snapshot: str) -> None:
        await asyncio.sleep(self._moods.uniform(0, LATE_SECONDS))
        self._ship(reference, snapshot)

    def _ship(self, reference: str, snapshot: str) -> None:
        self.shipped[reference, snapshot] += 1
        self.order_of[reference].append(snapshot)


class Shop(JetshopStandIn):
    """The shop: the same key again changes nothing. Some orders meet a fault at their first request."""

    def __init__(self, moods: random.Random, *, username: str, password: str) -> None:
        super().__init__(username=username, password=password)
        self._moods = moods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):  # killed in the middle of its request
            await super().__call__(scope, receive, send)

    def expects(self, name: str) -> None:
        """An order will come."""
        mood = self._moods.random()
        if mood < 0.12:
            faults = (DROPPED_BEFORE, DROPPED_AFTER, Fault(acts=True, delay_seconds=LATE_SECONDS), Fault(status=503))
            self.script(name, faults[int(mood / 0.03)])

    def exported(self) -> Counter[str]:
        """How often something came of a request, by order."""
        return Counter(entry.order_key for entry in list(self.journal) if entry.result != "unchanged")

    def asked_again(self) -> int:
        """PUTs that found done what they asked for: no harm here, yet not meant to be."""
        return sum(entry.result == "unchanged" for entry in list(self.journal))


async def _hang_up(scope: Scope, receive: Receive) -> None:
    scope["extensions"][EXTENSION]()
    while (await receive())["type"] != "http.disconnect":
        pass
