"""Attacks from behind: a Norce that answers without measure, and a browser that is sent to the operations port."""

import asyncio
import contextlib
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from tests.attacks.harness import HOSTILE, MIB, Attack, Result
from tests.attacks.honest import RATES
from tests.attacks.orders import flood
from tests.attacks.wire import PIECE, Target, put, request
from tests.flows.site import Site

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def hostile_norce(site: Site) -> None:
    site.config["norce"] |= {"base_url": HOSTILE, "refresh": "0s"}
    site.config["reconciliation"] = {"every": "0s"}


@contextlib.asynccontextmanager
async def norce(port: int, answer: Answer) -> AsyncIterator[None]:
    """Play a Norce that answers every request with `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                await answer(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()


async def ask(target: Target, seconds: float, answer: Answer) -> Result:
    """Call validations of 20 orders at a time while Norce answers with `answer`."""
    async with norce(target.norce_port, answer):
        return {"statuses": await flood(target, 20, seconds, lambda number: validation(target, number))}


def validation(target: Target, number: int) -> bytes:
    return request("POST", target.path("order-rules", f"read-{number}"), b"")


def bomb(mib: int) -> bytes:
    """Return that many MiB of JSON white space as gzip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([packer.compress(b" " * MIB) for _ in range(mib)]) + packer.flush()


async def gzip(target: Target, seconds: float) -> Result:
    packed = bomb(50)

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        put(writer, OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed) + packed)
        await writer.drain()

    return await ask(target, seconds, answer)


def endless(begin: bytes, piece: bytes) -> Answer:
    """Return an answer that begins once and then repeats a piece until the service closes."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        put(writer, begin)
        while not writer.transport.is_closing():
            put(writer, piece)
            await writer.drain()
            await asyncio.sleep(0.001)

    return answer


async def endless_1xx(target: Target, seconds: float) -> Result:
    piece = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    return await ask(target, seconds, endless(b"", piece * (PIECE // len(piece))))


async def endless_headers(target: Target, seconds: float) -> Result:
    return await ask(target, seconds, endless(OK, b"a: b\r\n" * (PIECE // 6)))


async def endless_trailers(target: Target, seconds: float) -> Result:
    begin = OK + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    return await ask(target, seconds, endless(begin, b"a: b\r\n" * (PIECE // 6)))


async def blanks(target: Target, seconds: float) -> Result:
    """Answer with a field of blanks before a zero byte, which h11 reads in quadratic time."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"a:" + b" " * 60_000 + b"\0\r\n\r\n")
        await writer.drain()

    return await ask(target, seconds, answer)


async def small_chunks(target: Target, seconds: float) -> Result:
    piece = b"1\r\n \r\n"
    begin = OK + b"transfer-encoding: chunked\r\n\r\n"
    return await ask(target, seconds, endless(begin, piece * (PIECE // len(piece))))


async def endless_body(target: Target, seconds: float) -> Result:
    piece = b"1000\r\n" + b" " * 4096 + b"\r\n"
    return await ask(target, seconds, endless(OK + b"transfer-encoding: chunked\r\n\r\n", piece * (PIECE // 4096)))


async def dripping_body(target: Target, seconds: float) -> Result:
    """Answer with a byte a second: no pause is long enough for a time limit between two bytes."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        put(writer, OK + b"content-length: 100000\r\n\r\n")
        while not writer.transport.is_closing():
            put(writer, b" ")
            await asyncio.sleep(1)

    began = time.monotonic()
    async with norce(target.norce_port, answer):
        status = await target.exchange(validation(target, 1))
    waited = time.monotonic() - began
    await asyncio.sleep(max(seconds - waited, 0))
    return {"status": status, "waited_seconds": round(waited, 2)}


OPERATIONS = (
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/startupz"),
    ("GET", "/metrics"),
    ("POST", "/commands/hold"),
    ("GET", "/"),
    ("GET", "/nothing"),
)


async def ask_with_host(target: Target, host: str) -> dict[str, int]:
    """Send a request to every path of the operations port with another host. Return the statuses by path."""
    return {
        path: await target.exchange(request(method, path, headers={"host": host}), target.operations_port)
        for method, path in OPERATIONS
    }


async def wrong_host(target: Target, _seconds: float) -> Result:
    """Ask the operations port as the page of another site could, whose name leads to this machine."""
    statuses = await ask_with_host(target, "attacker.example")
    right = await ask_with_host(target, f"127.0.0.1:{target.operations_port}")
    answered = [path for path, status in statuses.items() if status == 200]
    return {
        "statuses": Counter(statuses.values()),
        "statuses_with_the_right_host": Counter(right.values()),
        "faults": [f"answered with a wrong host: {', '.join(answered)}"] if answered else [],
    }


NO_READS = RATES | {"validations": 0.0, "refused": 0.0}  # an honest validation would meet the hostile Norce

ATTACKS = {
    "gzip": Attack(summary="20 answers of Norce at once, each 50 MiB as gzip", strike=gzip,
                   configure=hostile_norce, rates=NO_READS),
    "endless-1xx": Attack(summary="1xx responses of Norce without end", strike=endless_1xx,
                          configure=hostile_norce, rates=NO_READS),
    "endless-headers": Attack(summary="headers of Norce without end", strike=endless_headers,
                              configure=hostile_norce, rates=NO_READS),
    "endless-trailers": Attack(summary="trailers of Norce without end", strike=endless_trailers,
                               configure=hostile_norce, rates=NO_READS),
    "blanks": Attack(summary="a field of blanks in an answer of Norce", strike=blanks,
                     configure=hostile_norce, rates=NO_READS),
    "small-chunks": Attack(summary="a body of Norce in chunks of a byte", strike=small_chunks,
                           configure=hostile_norce, rates=NO_READS),
    "endless-answer": Attack(summary="a body of Norce without end", strike=endless_body,
                             configure=hostile_norce, rates=NO_READS),
    "dripping-answer": Attack(summary="an answer of Norce of a byte a second", strike=dripping_body,
                              configure=hostile_norce, rates=NO_READS),
    "wrong-host": Attack(summary="the operations port under another host name", strike=wrong_host, seconds=2),
}  # fmt: skip
