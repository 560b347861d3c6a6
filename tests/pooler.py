"""A small pooler for PostgreSQL, in session or in transaction mode."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from tests.simulators import in_thread

Server = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(eq=False)
class Pooler:
    """Forwards clients to server connections, which it keeps.

    In transaction mode a client has its server connection only until its transaction ends. The next one goes to the
    client that asks first, as in PgBouncer: the connection that was used last is the first to be used again, or with
    `round_robin` the last.
    """

    socket: str  # of the server
    per_transaction: bool
    round_robin: bool = False
    port: int = 0
    idle: list[Server] = field(default_factory=list)
    greeting: bytes = b""  # of a server connection, for every client

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Pooler"]:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for _, writer in self.idle:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server: Server | None = None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            hello = await _startup(reader)
            while int.from_bytes(hello[4:8], "big") in (80877103, 80877104):  # TLS or GSS: not here
                writer.write(b"N")
                hello = await _startup(reader)
            if not self.greeting or not self.idle:
                server = await self._connect(hello)
            writer.write(self.greeting)
            while True:
                if server is not None and self.per_transaction:
                    self.idle.append(server)
                    server = None
                pending = await _message(reader)
                if pending[:1] == b"X":
                    raise ConnectionResetError
                if server is None and self.idle:
                    server = self.idle.pop(0 if self.round_robin else -1)
                server = server or await self._connect(hello)
                in_transaction = True
                while in_transaction:
                    if pending[:1] == b"X":
                        raise ConnectionResetError
                    server[1].write(pending)
                    if pending[:1] in b"QS":  # a query, or the end of a group of messages
                        in_transaction = await _forward_answer(server[0], writer) != b"I"
                        if not in_transaction:
                            break
                    pending = await _message(reader)
        if server is not None:
            server[1].close()
        writer.close()

    async def _connect(self, hello: bytes) -> Server:
        reader, writer = await asyncio.open_unix_connection(self.socket)
        writer.write(hello)
        messages = [await _message(reader)]
        while messages[-1][:1] != b"Z":
            messages.append(await _message(reader))
        self.greeting = b"".join(messages)
        return reader, writer


async def _startup(reader: asyncio.StreamReader) -> bytes:
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "big") - 4)


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(5)
    return head + await reader.readexactly(int.from_bytes(head[1:], "big") - 4)


async def _forward_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Forward messages until the server is ready. Return the state of its transaction."""
    while True:
        message = await _message(reader)
        writer.write(message)
        if message[:1] == b"Z":
            return message[5:6]


@contextlib.contextmanager
def pooler(socket: str, *, per_transaction: bool, round_robin: bool = False) -> Iterator[Pooler]:
    """Run a pooler in a thread of its own."""
    with in_thread(Pooler(socket, per_transaction, round_robin).serving()) as running:
        yield running
