"""Attacks on connections: they need no credentials, except where they say so."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.attacks.harness import MIB, Attack, Result, only_notifications
from tests.attacks.wire import (
    NO_ANSWER,
    PIECE,
    SECRET,
    Target,
    head,
    is_closed,
    order_bytes,
    push,
    put,
    repeat,
    request,
    status_of,
    stop_reading,
)

BODY_BYTES = 1024 * 1024
DEADLINE_SECONDS = 10.0  # of the service, for one request
SLACK_SECONDS = 5.0
UNSIGNED = "/api/v1/callbacks/orders/an-order/cart-changed"
CHUNKED = {"host": "adapter.example", "content-type": "application/json", "transfer-encoding": "chunked"}
LENGTH = {"host": "adapter.example", "content-type": "application/json", "content-length": str(BODY_BYTES)}


# --- trailers ---------------------------------------------------------------------------------------------------------


async def send_trailers(target: Target, most: int) -> int:
    """Send small trailer fields until the service closes. Return the bytes that went out."""
    async with target.connect() as connection:
        put(connection[1], head("POST", UNSIGNED, CHUNKED) + b"0\r\n")
        return await push(connection, b"a:b\r\n" * (PIECE // 5), most)


async def trailers(target: Target, seconds: float) -> Result:
    ends, taken = time.monotonic() + seconds, [0]
    while time.monotonic() < ends:
        with contextlib.suppress(OSError, TimeoutError):
            taken.append(await send_trailers(target, 21 * MIB))
        await asyncio.sleep(0.5)
    return {"connections": len(taken) - 1, "most_mib_taken": round(max(taken) / MIB, 2)}


async def ask_with_trailer(target: Target, order_id: str) -> int:
    """Send a notification whose only credential is a trailer. Return the status."""
    body = order_bytes(order_id)
    path = f"/api/v1/callbacks/orders/{order_id}/order-status"
    chunks = b"%x\r\n%s\r\n0\r\nauthorization: %s\r\n\r\n" % (len(body), body, SECRET.encode())
    return await target.exchange(head("POST", path, CHUNKED) + chunks)


async def trailer_authorization(target: Target, seconds: float) -> Result:
    statuses = await repeat(1, min(seconds, 3), lambda _: ask_with_trailer(target, "by-trailer"), pause=0.2)
    accepted = statuses[200]
    return {"statuses": statuses, "faults": [f"{accepted} were accepted"] if accepted else []}


# --- silence ----------------------------------------------------------------------------------------------------------


def answered_before_body(target: Target) -> dict[str, tuple[bytes, int]]:
    """Return heads that are answered before their body arrives, each with the port to send it to."""
    length = {"host": "127.0.0.1", "content-length": "100"}
    return {
        "unknown path": (head("GET", "/nothing", length), target.port),
        "unknown caller": (head("POST", UNSIGNED, length), target.port),
        "validation": (head("POST", target.path("order-rules", "silent"), length), target.port),
        "operations": (head("GET", "/livez", length), target.operations_port),
    }


async def fall_silent(target: Target, first: bytes, port: int, within: float) -> tuple[int, bool]:
    """Send a head, one byte after the answer, and nothing more. Return the status, and whether the service closed."""
    async with target.connect(port) as (reader, writer):
        put(writer, first)
        status = await status_of(reader)
        put(writer, b"x")
        return status, await is_closed(reader, within)


async def silence(target: Target, seconds: float) -> Result:
    """Open 900 connections that fall silent, and count those that the service still holds after its deadline."""
    results: Counter[str] = Counter()
    wait = max(seconds - 3, DEADLINE_SECONDS + SLACK_SECONDS)
    ways = list(answered_before_body(target).values())[:2]  # without credentials and on the public port

    async def one(number: int) -> None:
        try:
            _, closed = await fall_silent(target, *ways[number % len(ways)], wait)
        except (OSError, TimeoutError):
            results["not connected"] += 1
        else:
            results["closed" if closed else "held"] += 1

    tasks = []
    for number in range(900):
        tasks.append(asyncio.ensure_future(one(number)))
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    held = results["held"]
    return {"connections": results, "faults": [f"{held} connections are held beyond the deadline"] if held else []}


async def idle_connections(target: Target, seconds: float) -> Result:
    """Open 1,500 connections with a signed URL, which say one thing and stay. One that is cut off comes again."""
    ends = time.monotonic() + seconds
    path = target.path("order-status", "idle")
    once = request("POST", path, order_bytes("idle"))

    async def call(_number: int) -> int:
        async with target.connect() as (reader, writer):
            put(writer, once)
            status = await status_of(reader)
            await is_closed(reader, max(ends - time.monotonic(), 0))
            return status

    return {"statuses": await repeat(1500, seconds, quietly(call), pause=target.comes_again_seconds)}


# --- bodies -----------------------------------------------------------------------------------------------------------


async def slow_bodies(target: Target, seconds: float) -> Result:
    """Send 560 bodies of a byte a second without credentials. A caller that is cut off comes again."""
    ends = time.monotonic() + seconds

    async def call(_number: int) -> int:
        async with target.connect() as (reader, writer):
            put(writer, head("POST", UNSIGNED, LENGTH) + b"{")
            answer = asyncio.ensure_future(status_of(reader))
            while not answer.done() and time.monotonic() < ends:
                await asyncio.wait([answer], timeout=1)
                put(writer, b" ")
            if not answer.done():
                answer.cancel()
                return NO_ANSWER
            return answer.result()

    return {"statuses": await repeat(560, seconds, quietly(call), pause=target.comes_again_seconds)}


async def endless_bodies(target: Target, seconds: float, path_of: Callable[[int], str] = lambda _: UNSIGNED) -> Result:
    """Hold 450 bodies that lack their last byte."""
    ends = time.monotonic() + seconds

    async def call(number: int) -> int:
        async with target.connect() as (reader, writer):
            put(writer, head("POST", path_of(number), LENGTH) + b"{")
            answer = asyncio.ensure_future(status_of(reader))
            for _ in range(BODY_BYTES // PIECE - 1):
                if answer.done():
                    break
                with contextlib.suppress(OSError, TimeoutError):
                    put(writer, b" " * PIECE)
                    async with asyncio.timeout(1):
                        await writer.drain()
            await asyncio.wait([answer], timeout=max(ends - time.monotonic(), 0))
            if not answer.done():
                answer.cancel()
                return NO_ANSWER
            return answer.result()

    return {"statuses": await repeat(450, seconds, quietly(call), pause=target.comes_again_seconds)}


async def endless_signed_bodies(target: Target, seconds: float) -> Result:
    path = target.path("cart-changed", "endless")
    return await endless_bodies(target, seconds, lambda _: path)


async def endless_bodies_of_many_orders(target: Target, seconds: float) -> Result:
    return await endless_bodies(target, seconds, lambda number: target.path("cart-changed", f"endless-{number}"))


def quietly(call: Callable[[int], Awaitable[int]]) -> Callable[[int], Awaitable[int]]:
    """Return the call with `NO_ANSWER` for a connection that fails."""

    async def quiet(number: int) -> int:
        try:
            return await call(number)
        except (OSError, TimeoutError):
            return NO_ANSWER

    return quiet


# --- answers ----------------------------------------------------------------------------------------------------------


# Below the limit on heads, wherever the service's read ends.
UNREAD = head("GET", "/docs/v1/openapi.yaml", {"host": "a"}) * 500


async def unread_answers(target: Target, seconds: float) -> Result:
    """Send thousands of requests on each of 300 connections, and read none of the answers."""
    results: Counter[str] = Counter()

    async def one(number: int) -> None:
        await asyncio.sleep(number * 0.01)
        try:
            async with target.connect(receive_buffer=4096) as (_, writer):
                stop_reading(writer)
                while time.monotonic() < ends and not writer.transport.is_closing():
                    if not writer.transport.get_write_buffer_size():
                        put(writer, UNREAD)
                    await asyncio.sleep(0.2)
                results["cut" if writer.transport.is_closing() else "held"] += 1
        except (OSError, TimeoutError):
            results["cut"] += 1

    ends = time.monotonic() + seconds
    await asyncio.gather(*(one(number) for number in range(300)))
    late = results["held"] if seconds > DEADLINE_SECONDS + SLACK_SECONDS else 0
    return {"connections": results, "faults": [f"{late} clients that do not read are served"] if late else []}


# --- heads ------------------------------------------------------------------------------------------------------------


async def drip_heads(target: Target, seconds: float) -> Result:
    """Send 1,500 heads of a byte a second. A caller that is cut off comes again."""
    ends = time.monotonic() + seconds
    lasted: list[float] = []

    async def call(_number: int) -> int:
        async with target.connect() as (reader, writer):
            began = time.monotonic()
            closed = asyncio.ensure_future(is_closed(reader, 3600))
            put(writer, b"GET /")
            while not closed.done() and time.monotonic() < ends:
                put(writer, b"x")
                await asyncio.wait([closed], timeout=1)
            if closed.done():
                lasted.append(time.monotonic() - began)
            closed.cancel()
            return NO_ANSWER

    await repeat(1500, seconds, quietly(call), pause=target.comes_again_seconds)
    longest = round(max(lasted, default=0), 1)
    faults = [f"a head lasted {longest} s"] if longest > DEADLINE_SECONDS + SLACK_SECONDS else []
    return {"cut_off": len(lasted), "longest_seconds": longest, "faults": faults}


async def large_heads(target: Target, seconds: float) -> Result:
    """Send heads of 60 KB in one piece, and some without end."""
    large = head("GET", "/livez", {"host": "adapter.example", **{f"x-{n}": "y" * 1000 for n in range(60)}})
    statuses = await repeat(20, seconds / 2, lambda _: target.exchange(large))
    endless = [0]
    ends = time.monotonic() + seconds / 2
    while time.monotonic() < ends:
        with contextlib.suppress(OSError, TimeoutError):
            async with target.connect() as connection:
                put(connection[1], b"GET / HTTP/1.1\r\nhost: a\r\n")
                endless.append(await push(connection, b"a:b\r\n" * (PIECE // 5), 21 * MIB))
        await asyncio.sleep(0.2)
    taken = sum(count for status, count in statuses.items() if status not in (NO_ANSWER, 400, 431))
    return {
        "statuses": statuses,
        "most_mib_taken": round(max(endless) / MIB, 2),
        "faults": [f"{taken} heads of 60 KB were read"] if taken else [],
    }


FRESH = {"notifications": 25.0, "probes": 4.0}

ATTACKS = {
    "trailers": Attack(summary="21 MiB of trailer fields on one connection", strike=trailers),
    "trailer-authorization": Attack(
        summary="a notification whose only credential is in a trailer", strike=trailer_authorization, seconds=3
    ),
    "silence": Attack(
        summary="900 requests answered before their body, one more byte, then silence",
        strike=silence, configure=only_notifications, files=1024, rates=FRESH, seconds=20,
    ),
    "idle-connections": Attack(
        summary="1,500 idle connections with a signed URL",
        strike=idle_connections, configure=only_notifications, files=1024, rates=FRESH,
    ),
    "slow-bodies": Attack(summary="560 slow bodies without credentials", strike=slow_bodies),
    "endless-bodies": Attack(summary="450 bodies of 1 MiB without end and credentials", strike=endless_bodies),
    "endless-signed-bodies": Attack(
        summary="450 bodies of 1 MiB without end, with one signed URL", strike=endless_signed_bodies
    ),
    "endless-bodies-of-many-orders": Attack(
        summary="450 bodies of 1 MiB without end, with 450 signed URLs", strike=endless_bodies_of_many_orders
    ),
    "unread-answers": Attack(
        summary="300 clients that send thousands of requests and read no answer", strike=unread_answers, seconds=20
    ),
    "drip-heads": Attack(
        summary="1,500 heads of a byte a second",
        strike=drip_heads, configure=only_notifications, files=1024, rates=FRESH, seconds=20,
    ),
    "large-heads": Attack(summary="heads of 60 KB, and without end", strike=large_heads),
}  # fmt: skip
