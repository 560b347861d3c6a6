"""A stand-in for Norce that answers every read with an order of 3.9 MiB: `python benchmarks/large_orders.py PORT`."""

import asyncio
import sys

import orders

SIZE = int(3.9 * 1024 * 1024)
PLACEHOLDER = "ID-OF-THE-ORDER"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection."""
    before, _, after = orders.large(PLACEHOLDER, SIZE).partition(PLACEHOLDER.encode())
    while head := await _head(reader):
        order_id = head.split(b" ", 2)[1].rpartition(b"/")[2]
        body = before + order_id + after
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await writer.drain()
    writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


async def serve(port: int) -> None:
    """Listen until the process is stopped."""
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
