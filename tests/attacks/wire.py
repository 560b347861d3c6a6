"""The service as an attacker sees it: an address, signed URLs, and bytes on a connection."""

import asyncio
import contextlib
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.flows.site import make_order, signed_url

PIECE = 64 * 1024
CONNECT_WITHIN_SECONDS = 5
ANSWER_WITHIN_SECONDS = 30
NO_ANSWER = 0  # in place of a status
MERCHANT, CHANNEL = "fjallboden", "se-b2c"
SECRET = "a secret of the attacks, in a header"
URL_SECRET = "a secret of the attacks, in a URL"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A running service. Values only, because attacks run in processes of their own."""

    address: str
    operations_address: str
    norce_port: int = 0  # of an attacker that plays Norce
    comes_again_seconds: float = 1.0  # after which a caller that was cut off opens another connection

    @property
    def port(self) -> int:
        return urlsplit(self.address).port or 0

    @property
    def operations_port(self) -> int:
        return urlsplit(self.operations_address).port or 0

    def path(self, callback: str, order_id: str) -> str:
        """Return the signed path of a callback of an order."""
        return signed_url("", callback, {"merchant": MERCHANT, "channel": CHANNEL, "id": order_id})

    @contextlib.asynccontextmanager
    async def connect(self, port: int = 0, *, receive_buffer: int = 0) -> AsyncIterator[Connection]:
        """Open a connection to the public port or to another one. It is cut off at the end."""
        raw = socket.socket()
        raw.setblocking(False)
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            async with asyncio.timeout(CONNECT_WITHIN_SECONDS):
                await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port or self.port))
                reader, writer = await asyncio.open_connection(sock=raw)
        except BaseException:
            raw.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def exchange(self, request: bytes, port: int = 0) -> int:
        """Send one request on a connection of its own and return the status of its answer."""
        with contextlib.suppress(OSError, TimeoutError):
            async with self.connect(port) as (reader, writer):
                put(writer, request)
                return await status_of(reader)
        return NO_ANSWER


def request(method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    """Return a whole request. With a body, it is JSON with its length."""
    fields = {"host": "adapter.example", **(headers or {})}
    if body is not None:
        fields = {"content-type": "application/json", "content-length": str(len(body)), **fields}
    return head(method, path, fields) + (body or b"")


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def order_bytes(order_id: str, **changed: object) -> bytes:
    return json.dumps(make_order(order_id, **changed)).encode()


async def status_of(reader: asyncio.StreamReader) -> int:
    """Return the status of the next answer and read it to its end, or return `NO_ANSWER`."""
    try:
        async with asyncio.timeout(ANSWER_WITHIN_SECONDS):
            lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            lengths = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
            await reader.readexactly(sum(lengths))
            return int(lines[0].split()[1])
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return NO_ANSWER


def put(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send bytes, unless the service has closed the connection. uvloop raises an error then, asyncio does not."""
    if not writer.transport.is_closing():
        writer.write(data)


def stop_reading(writer: asyncio.StreamWriter) -> None:
    """Leave everything that the service sends in the buffers of the kernel."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]


async def is_closed(reader: asyncio.StreamReader, within: float) -> bool:
    """Tell whether the service closes the connection within some seconds. What it sends before is dropped."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within):
            try:
                while await reader.read(PIECE):
                    pass
            except OSError:
                pass
            return True
    return False


async def push(connection: Connection, piece: bytes, most: int) -> int:
    """Send a piece again and again, up to `most` bytes. Return the bytes that went out before the service closed."""
    reader, writer = connection
    sent = 0
    closed = asyncio.ensure_future(is_closed(reader, 3600))
    try:
        while sent < most and not closed.done():
            put(writer, piece)
            drained = asyncio.ensure_future(writer.drain())
            await asyncio.wait([drained, closed], return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                drained.cancel()
                break
            if drained.exception() is not None:
                break
            sent += len(piece)
            await asyncio.sleep(0)
    finally:
        closed.cancel()
    return sent


async def repeat(
    callers: int, seconds: float, call: Callable[[int], Awaitable[int]], pause: float = 0.0
) -> Counter[int]:
    """Let callers call again and again, each with its number. Count the statuses.

    Args:
        pause: Between two calls of a caller. After a call without an answer it is at least a tenth of a second.
    """
    counts: Counter[int] = Counter()
    ends = asyncio.get_running_loop().time() + seconds

    async def caller(number: int) -> None:
        while asyncio.get_running_loop().time() < ends:
            status = await call(number)
            counts[status] += 1
            await asyncio.sleep(max(pause, 0.1) if status == NO_ANSWER else pause)

    tasks = [asyncio.ensure_future(caller(number)) for number in range(callers)]
    _, running = await asyncio.wait(tasks, timeout=seconds + 1)
    for task in running:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return counts
