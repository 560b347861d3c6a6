"""Norce, and the shoppers behind it: callbacks without end, each remembered with what became of it."""

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

from tests.crash.destinations import Shop
from tests.flows.site import make_order, signed_url

PACE_SECONDS = 0.03
SNAPSHOTS = 3  # of one order, at most


@dataclass
class Told:
    """What was said to the service, by name of the order and its snapshot, and what it answered."""

    acknowledged: set[tuple[str, str]] = field(default_factory=set)
    unanswered: set[tuple[str, str]] = field(default_factory=set)
    conflicts: int = 0
    repeats: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


class Shoppers:
    """
    Some threads that send orders to whichever node `addresses` names. `acknowledged` counts up, for the harness to wait
    for. An order is sent again where it had no answer, now and then also where it had one, and sometimes with another
    order inside.
    """

    def __init__(
        self, prefix: str, seed: str, orders: dict[str, Any], shop: Shop, addresses: Callable[[], list[str]], count: int
    ) -> None:
        self.told = Told()
        self._prefix = prefix
        self._orders = orders
        self._shop = shop
        self._addresses = addresses
        self._more = threading.Condition()
        self._number = 0
        self._open = threading.Event()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._shop_on, args=(random.Random(f"{seed}/{n}"),), daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def acknowledged(self) -> int:
        return len(self.told.acknowledged)

    def wait_for(self, more: int, within: float) -> bool:
        """Whether so many more were acknowledged, as soon as that is so."""
        with self._more:
            enough = self.acknowledged + more
            return self._more.wait_for(lambda: self.acknowledged >= enough, within)

    def go_home(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    # --- in a shopper's thread ---

    def _shop_on(self, moods: random.Random) -> None:
        with httpx.Client(trust_env=False, timeout=15) as http:
            while not self._over.wait(PACE_SECONDS):
                with self._more:
                    self._number += 1
                    name = f"{self._prefix}-{self._number}"
                self._buy(http, name, moods)

    def _buy(self, http: httpx.Client, name: str, moods: random.Random) -> None:
        self._shop.expects(name)
        snapshots = SNAPSHOTS if moods.random() < 0.15 else 1
        for number in range(snapshots):
            body = make_order(name, lastModified=f"2026-02-03T09:00:0{number}Z")
            self._orders[name] = body
            if not self._send(http, body, tries=3 if moods.random() < 0.7 else 1, moods=moods):
                return
            if moods.random() < 0.15:
                self.told.repeats += 1
                self._send(http, body, tries=1, moods=moods)
            if moods.random() < 0.1:
                self.told.conflicts += 1
                self._post(http, body | {"reference": f"{name}-conflict"}, moods)

    def _send(self, http: httpx.Client, body: dict[str, Any], *, tries: int, moods: random.Random) -> bool:
        which = (body["id"], body["lastModified"])
        for _ in range(tries):
            if self._post(http, body, moods) == 200:
                with self._more:
                    self.told.unanswered.discard(which)
                    self.told.acknowledged.add(which)
                    self._more.notify_all()
                return True
            self.told.unanswered.add(which)
            if self._over.wait(moods.uniform(0.05, 0.3)):
                break
        return which in self.told.acknowledged

    def _post(self, http: httpx.Client, body: dict[str, Any], moods: random.Random) -> int | None:
        addresses = self._addresses()
        if not addresses:
            self._over.wait(PACE_SECONDS)
            return None
        url = signed_url(moods.choice(addresses), "order-status", body)
        began = time.monotonic()
        try:
            answer = http.post(url, content=json.dumps(body), headers={"content-type": "application/json"})
        except httpx.TransportError as error:  # killed meanwhile: whether it was stored is anybody's guess
            if isinstance(error, httpx.TimeoutException):
                self.told.complaints.append(f"no answer after {time.monotonic() - began:.0f} s")
            return None
        with contextlib.suppress(KeyError):
            self.told.statuses[answer.status_code] += 1
        if answer.status_code == 503 and not answer.headers.get("retry-after"):
            self.told.complaints.append("a 503 without Retry-After")
        if answer.status_code not in (200, 503):
            self.told.complaints.append(f"a {answer.status_code}: {answer.text[:200]}")
        return answer.status_code
