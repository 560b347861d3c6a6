"""Attacks with what a shopper has: the signed URLs of an order. And with a secret in a URL, which fits every order."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from tests.attacks.harness import AT_MOST_TEN, Attack, Result, with_slow_orders
from tests.attacks.wire import CHANNEL, MERCHANT, NO_ANSWER, URL_SECRET, Target, order_bytes, put, request, status_of
from tests.flows.site import Site, make_order

NEARLY_1_MIB = 1_000_000


async def flood(target: Target, callers: int, seconds: float, make: Any) -> Counter[int]:
    """Let callers send requests on connections of their own, which they keep. `make` returns the next request."""
    ends = time.monotonic() + seconds
    counts: Counter[int] = Counter()

    async def caller(number: int) -> None:
        while time.monotonic() < ends:
            try:
                async with target.connect() as (reader, writer):
                    status = 200
                    while status != NO_ANSWER and time.monotonic() < ends:
                        put(writer, make(number))
                        await writer.drain()
                        status = await status_of(reader)
                        counts[status] += 1
            except (OSError, TimeoutError):
                counts[NO_ANSWER] += 1
            await asyncio.sleep(0.05)

    tasks = [asyncio.ensure_future(caller(number)) for number in range(callers)]
    await asyncio.wait(tasks, timeout=seconds + 3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return counts


def let_through(statuses: Counter[int], what: str) -> list[str]:
    return [f"{statuses[200]} of {statuses.total()} {what} passed"] if statuses[200] else []


# --- verdicts ---------------------------------------------------------------------------------------------------------


def slow_norce(site: Site) -> None:
    site.norce.set_switches(answer_seconds=0.3)


async def validation_flood(target: Target, seconds: float) -> Result:
    """Call one validation of one order, which must be refused, from 150 connections."""
    call = request("POST", target.path("order-rules", "refused-flood"), b"")
    statuses = await flood(target, 150, seconds, lambda _: call)
    return {"statuses": statuses, "faults": let_through(statuses, "validations that must be refused")}


async def circuit_breaker(target: Target, seconds: float) -> Result:
    """Call five slow hooks on one order, then hooks of 105 other orders, which must be refused."""
    slow = request("POST", target.path("cart-slow", "slow-1"), order_bytes("slow-1"))
    slow_statuses = Counter(await asyncio.gather(*(target.exchange(slow) for _ in range(5))))
    others: Counter[int] = Counter()
    for number in range(105):
        order_id = f"other-{number}"
        others[await target.exchange(request("POST", target.path("cart-slow", order_id), order_bytes(order_id)))] += 1
        await asyncio.sleep(max(seconds - 4, 1) / 105)
    return {"slow": slow_statuses, "others": others, "faults": let_through(others, "hooks of other orders")}


async def slow_hooks(target: Target, seconds: float) -> Result:
    """Call a slow hook of one order 2,100 times at once, each time with another body."""
    numbers = itertools.count()

    def make(_caller: int) -> bytes:
        return request("POST", target.path("cart-slow", "slow-2"), order_bytes("slow-2", reference=str(next(numbers))))

    return {"statuses": await flood(target, 2100, seconds, make)}


def with_thirty_rules(site: Site) -> None:
    site.config["callbacks"]["cart-large"] = {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "5s"}
    site.config["routes"]["thirty"] = {
        "callback": "cart-large",
        "handler": "rules",
        "no_answer": "approve",
        "settings": {"rules": [AT_MOST_TEN | {"code": f"too-many-{number}"} for number in range(30)]},
    }


def large_order(order_id: str, last_quantity: int = 1, **changed: Any) -> bytes:
    """Return an order of nearly 1 MB with thousands of short lines."""
    line = {"id": "1", "quantity": 1, "total": {"includingVat": 1.5}}
    lines = [line] * (NEARLY_1_MIB // len(json.dumps(line, separators=(",", ":")) + ","))
    lines.append(line | {"quantity": last_quantity})
    order = make_order(order_id, **changed) | {"cart": {"reference": "1", "items": lines}}
    return json.dumps(order, separators=(",", ":")).encode()


async def large_hook(target: Target, seconds: float) -> Result:
    """Call a hook with thirty rules, and an order of 1 MB that each of them refuses, from 20 connections."""
    bodies = [large_order("large", last_quantity=11, reference=str(number)) for number in range(40)]
    calls = itertools.cycle([request("POST", target.path("cart-large", "large"), body) for body in bodies])
    statuses = await flood(target, 20, seconds, lambda _: next(calls))
    return {"statuses": statuses, "faults": let_through(statuses, "hooks that must be refused")}


# --- notifications ----------------------------------------------------------------------------------------------------


async def white_space(target: Target, seconds: float) -> Result:
    """Repeat one event from eight connections, each time with other white space."""
    body = large_order("repeated")
    path, numbers = target.path("order-status", "repeated"), itertools.count(1)

    def make(_caller: int) -> bytes:
        number = next(numbers)
        return request("POST", path, body[:1] + b" " * (number % 30_000) + body[1:])

    return {"statuses": await flood(target, 8, seconds, make)}


async def last_modified(target: Target, seconds: float) -> Result:
    """Send events that no route wants from eight connections, each with another moment and 1 MB of text."""
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=NEARLY_1_MIB))
    first = datetime(2026, 1, 1, tzinfo=UTC)
    template = order_bytes(
        "unwanted", lastModified="@MOMENT@", state={"currentStatus": "accepted"}, attributes={"text": text}
    )
    path, numbers = target.path("order-status", "unwanted"), itertools.count()

    def make(_caller: int) -> bytes:
        moment = (first + timedelta(milliseconds=next(numbers))).isoformat(timespec="milliseconds")
        return request("POST", path, template.replace(b"@MOMENT@", moment.encode()))

    return {"statuses": await flood(target, 8, seconds, make)}


def with_url_secret(callback: str, order_id: str, body: bytes) -> bytes:
    path = f"/api/v1/callbacks/orders/{order_id}/{callback}?{urlencode({'secret': URL_SECRET})}"
    return request("POST", path, body, {"x-merchant": MERCHANT, "x-channel": CHANNEL})


async def url_secret(target: Target, seconds: float) -> Result:
    """Call hooks and validations of many orders with a secret in the URL, and flood notifications."""
    numbers = itertools.count()

    def notification(_caller: int) -> bytes:
        order_id = f"url-{next(numbers)}"
        return with_url_secret("order-status", order_id, order_bytes(order_id))

    hook = with_url_secret("cart-changed", "by-secret", order_bytes("by-secret"))
    validation = with_url_secret("order-rules", "by-secret", b"")
    asked = Counter([await target.exchange(each) for each in (hook, validation)])
    statuses = await flood(target, 50, seconds, notification)
    return {
        "hook_and_validation": asked,
        "notifications": statuses,
        "faults": let_through(asked, "hooks and validations with a secret in the URL"),
    }


ATTACKS = {
    "validation-flood": Attack(
        summary="150 callers of one validation of one order, at a Norce that takes 0.3 s",
        strike=validation_flood, configure=slow_norce,
    ),
    "circuit-breaker": Attack(
        summary="five slow hooks on one order, then 105 other orders",
        strike=circuit_breaker, configure=with_slow_orders, needs_plugin=True, seconds=25,
    ),
    "slow-hooks": Attack(
        summary="2,100 slow hooks of one order at once, with different bodies",
        strike=slow_hooks, configure=with_slow_orders, needs_plugin=True,
    ),
    "large-hook": Attack(
        summary="20 callers of hooks of 1 MB, which each of 30 rules refuses",
        strike=large_hook, configure=with_thirty_rules,
    ),
    "white-space": Attack(summary="repeats of one event of 1 MB with other white space", strike=white_space),
    "last-modified": Attack(
        summary="1 MB with another lastModified each time, wanted by no route", strike=last_modified
    ),
    "url-secret": Attack(summary="one secret in the URL for many orders", strike=url_secret),
}  # fmt: skip
