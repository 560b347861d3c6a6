"""A server on loopback that answers by a script, however hostile, and remembers what it was asked."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable

Script = Callable[[], Iterable[bytes]]


class ScriptedServer:
    """A server that gives each request the next script, and the last one to all further requests.

    A script yields parts of an answer, perhaps for ever; it ends when the client closes the connection. An answer that
    does not end by itself ends with the script: then the server waits for the client's next request.
    """

    def __init__(self, *scripts: Script) -> None:
        self._scripts = iter(scripts) if len(scripts) != 1 else itertools.repeat(scripts[0])
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.heads: list[bytes] = []
        self.connections = 0
        self.url = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["ScriptedServer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for writer in self._open.values():
                writer.close()
            await asyncio.gather(*self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                for part in next(self._scripts)():
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)  # also while the client's buffers are empty
                    if writer.is_closing():
                        return


def once(*parts: bytes) -> Script:
    """Return a script that sends these parts."""
    return lambda: parts


def without_end(start: bytes, part: bytes) -> Script:
    """Return a script that sends `start`, and then `part` for ever."""
    return lambda: itertools.chain((start,), itertools.repeat(part))
