"""The traffic of an ordinary day, at fixed rates: each request is due at a moment, and is timed from it.

Hooks and validations reuse their connections, as Norce does. Notifications and probes open a new one each time, so
that a service which accepts no connections shows.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests import ROOT
from tests.attacks.wire import Target, order_bytes, request

sys.path.append(str(ROOT / "benchmarks"))  # a folder of scripts

from load import Load, open_loops, percentile

CONNECTIONS = 400  # of each kind
ORDERS = 5000
CLOSE = {"connection": "close"}
# The statuses that each kind may get. `refused` are validations of orders that a rule refuses.
EXPECTED: dict[str, tuple[int, ...]] = {
    "hooks": (200,),
    "validations": (200,),
    "refused": (400,),
    "notifications": (200,),
    "probes": (200, 404),  # an older service does not have this path on its public port
}
RATES = {"hooks": 25.0, "validations": 5.0, "refused": 5.0, "notifications": 25.0, "probes": 4.0}


class Requests(Sequence[bytes]):
    """Requests that are made when they are due."""

    def __init__(self, count: int, make: Callable[[int], bytes]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> bytes:
        return self._make(number)


def makers(target: Target) -> dict[str, Callable[[int], bytes]]:
    """Return a function for each kind, which makes the request of a number."""
    name = "honest-{:010d}".format
    template, first = order_bytes(name(0)), name(0).encode()

    def order(order_id: str) -> bytes:
        return template.replace(first, order_id.encode())

    def hook(number: int) -> bytes:
        order_id = name(number % ORDERS)
        return request("POST", target.path("cart-changed", order_id), order(order_id))

    def validation(number: int) -> bytes:
        return request("POST", target.path("order-rules", name(number % ORDERS)), b"")

    def refused(number: int) -> bytes:
        return request("POST", target.path("order-rules", f"refused-{number % ORDERS}"), b"")

    def notification(number: int) -> bytes:
        order_id = name(number)
        return request("POST", target.path("order-status", order_id), order(order_id), CLOSE)

    def probe(_number: int) -> bytes:
        return request("GET", "/livez", headers=CLOSE)

    return {
        "hooks": hook,
        "validations": validation,
        "refused": refused,
        "notifications": notification,
        "probes": probe,
    }


def send(target: Target, seconds: float, rates: Mapping[str, float]) -> dict[str, list[tuple[float, float, int]]]:
    """Send honest traffic. Return (due, answered, status) of every request, by kind; times are `time.monotonic`."""
    kinds = {kind: rate for kind, rate in rates.items() if rate}
    offset = time.monotonic() - time.perf_counter()
    each = makers(target)
    loads: list[Load] = open_loops(
        target.port,
        *((Requests(int(seconds * rate), each[kind]), rate) for kind, rate in kinds.items()),
        connections=CONNECTIONS,
    )
    return {
        kind: [(due + offset, answered + offset, status) for due, answered, status in load.answers]
        for kind, load in zip(kinds, loads, strict=True)
    }


def figures(answers: list[tuple[float, float, int]], kind: str, since: float, until: float) -> dict[str, Any]:
    """Return the figures of one kind for the requests that were due in a span."""
    chosen = [each for each in answers if since <= each[0] < until]
    times = sorted(answered - due for due, answered, _ in chosen)
    statuses = Counter(status for _, _, status in chosen)
    return {
        "sent": len(chosen),
        "wrong": sum(status not in EXPECTED[kind] for _, _, status in chosen),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "p50_ms": round(percentile(times, 50) * 1000, 1),
        "p99_ms": round(percentile(times, 99) * 1000, 1),
        "most_ms": round(times[-1] * 1000, 1) if times else 0.0,
    }
