"""Shoppers: threads that send callbacks without a pause and record each answer."""

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests import PATIENCE
from tests.crash.destinations import Shop
from tests.flows.site import make_order, signed_url

PACE_SECONDS = 0.03
SNAPSHOTS = 3  # of one order, at most


@dataclass
class CallbackLog:
    """The callbacks that were sent, by name and snapshot of the order, and their answers."""

    acknowledged: set[tuple[str, str]] = field(default_factory=set)
    unanswered: set[tuple[str, str]] = field(default_factory=set)
    conflicts: int = 0
    repeats: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


class Shoppers:
    """Threads that send orders to one of the `addresses`, while the harness waits for acknowledgements.

    An order without an answer is sent again. Now and then an acknowledged order is sent again, too, or with other
    content (a conflict).
    """

    def __init__(
        self, prefix: str, seed: str, orders: dict[str, Any], shop: Shop, addresses: Callable[[], list[str]], count: int
    ) -> None:
        self.log = CallbackLog()
        self._prefix = prefix
        self._orders = orders
        self._shop = shop
        self._addresses = addresses
        self._more = threading.Condition()
        self._number = 0
        self._open = threading.Event()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_orders, args=(random.Random(f"{seed}/{n}"),), daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def acknowledged(self) -> int:
        return len(self.log.acknowledged)

    def wait_for(self, more: int, seconds: float) -> bool:
        """Wait until `more` further callbacks are acknowledged, and tell whether they were."""
        with self._more:
            enough = self.acknowledged + more
            return self._more.wait_for(lambda: self.acknowledged >= enough, seconds)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    # --- in a shopper's thread ---

    def _send_orders(self, rng: random.Random) -> None:
        with httpx.Client(trust_env=False, timeout=PATIENCE) as http:
            while not self._stopped.wait(PACE_SECONDS):
                with self._more:
                    self._number += 1
                    name = f"{self._prefix}-{self._number}"
                self._send_snapshots(http, name, rng)

    def _send_snapshots(self, http: httpx.Client, name: str, rng: random.Random) -> None:
        self._shop.expect(name)
        snapshots = SNAPSHOTS if rng.random() < 0.15 else 1
        for number in range(snapshots):
            body = make_order(name, lastModified=f"2026-02-03T09:00:0{number}Z")
            self._orders[name] = body
            if not self._send(http, body, tries=3 if rng.random() < 0.7 else 1, rng=rng):
                return
            if rng.random() < 0.15:
                self.log.repeats += 1
                self._send(http, body, tries=1, rng=rng)
            if rng.random() < 0.1:
                self.log.conflicts += 1
                self._post(http, body | {"reference": f"{name}-conflict"}, rng)

    def _send(self, http: httpx.Client, body: dict[str, Any], *, tries: int, rng: random.Random) -> bool:
        which = (body["id"], body["lastModified"])
        for _ in range(tries):
            if self._post(http, body, rng) == 200:
                with self._more:
                    self.log.unanswered.discard(which)
                    self.log.acknowledged.add(which)
                    self._more.notify_all()
                return True
            self.log.unanswered.add(which)
            if self._stopped.wait(rng.uniform(0.05, 0.3)):
                break
        return which in self.log.acknowledged

    def _post(self, http: httpx.Client, body: dict[str, Any], rng: random.Random) -> int | None:
        addresses = self._addresses()
        if not addresses:
            self._stopped.wait(PACE_SECONDS)
            return None
        url = signed_url(rng.choice(addresses), "order-status", body)
        began = time.monotonic()
        try:
            answer = http.post(url, content=json.dumps(body), headers={"content-type": "application/json"})
        except httpx.TransportError as error:  # the service was killed and may have stored the order
            if isinstance(error, httpx.TimeoutException):
                self.log.complaints.append(f"no answer after {time.monotonic() - began:.0f} s")
            return None
        with contextlib.suppress(KeyError):
            self.log.statuses[answer.status_code] += 1
        if answer.status_code == 503 and not answer.headers.get("retry-after"):
            self.log.complaints.append("a 503 without Retry-After")
        if answer.status_code not in (200, 503):
            self.log.complaints.append(f"a {answer.status_code}: {answer.text[:200]}")
        return answer.status_code
