"""`adapter.connections`: everything that an answer may be has a limit."""

import asyncio
import contextlib
import gc
import gzip
import os
import resource
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.connections import (
    MAX_LINES,
    READ_BYTES,
    ContentTooLarge,
    ContentUnreadable,
    connections,
    read_content,
)
from tests.asynchronous import asynchronous
from tests.scripted_server import Script, ScriptedServer, once, without_end

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
CLOSED = OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}"
HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
BLANKS = b" " * 100_000  # h11 needs minutes for such a line

ENDLESS: dict[str, Script] = {
    "1xx answers": without_end(b"", HINTS),
    "fields": without_end(OK, b"a: b\r\n"),
    "one field": without_end(OK + b"a: ", b"b" * 1000),
    "a field folded over lines": without_end(OK + b"a: b\r\n", b" b\r\n"),
    "blanks in a field": without_end(OK + b"a:", BLANKS),
    "a status line": without_end(b"HTTP/1.1 200 ", b"O" * 1000),
    "empty lines before the answer": without_end(b"", b"\r\n" * 500),
    "trailers": without_end(CHUNKED + b"0\r\n", b"a: b\r\n"),
    "one trailer": without_end(CHUNKED + b"0\r\na: ", b"b" * 1000),
    "a trailer folded over lines": without_end(CHUNKED + b"0\r\na: b\r\n", b" b\r\n"),
    "one chunk extension": without_end(CHUNKED + b"1;a=", b"b" * 1000),
    "chunk extensions": without_end(CHUNKED, b"1;a=" + b"b" * 200 + b"\r\nx\r\n"),
    "chunks of a byte": without_end(CHUNKED, b"1\r\nx\r\n" * 100),
    "a chunk's size": without_end(CHUNKED, b"0" * 1000),
}
NO_HTTP: dict[str, Script] = {
    "another protocol": once(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "blanks before a zero byte": once(OK + b"a:" + BLANKS[: READ_BYTES // 2] + b"\0\r\n\r\n"),
    "blanks before a vertical tab": once(OK + b"a:" + BLANKS[: READ_BYTES // 2] + b"\x0b\r\n\r\n"),
    "blanks in a chunk line": once(CHUNKED + b"5;" + BLANKS[: READ_BYTES // 2] + b"\nx\r\nhello\r\n0\r\n\r\n"),
    "blanks in a quoted chunk extension": once(CHUNKED + b'5;a="' + BLANKS[: READ_BYTES // 2] + b'\n"\r\nhello\r\n'),
    "a folded field": once(OK + b"a: b\r\n  c\r\ncontent-length: 2\r\n\r\n{}"),
    "two lengths": once(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
    "a switch of protocols": once(
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\nPRI * HTTP/2.0\r\n\r\n"
    ),
}
MORE_THAN_THE_ANSWER: dict[str, Script] = {
    "another answer": once(OK + b"content-length: 2\r\n\r\n{}" + OK + b"content-length: 0\r\n\r\n"),
    "blanks": once(OK + b"content-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\na:" + BLANKS[:1000] + b"\0\r\n\r\n"),
}


async def fetch(*scripts: Script, method: str = "GET", count: int = 1) -> tuple[ScriptedServer, list[httpx.Response]]:
    """Send requests one after another over one pool of connections."""
    async with (
        ScriptedServer(*scripts).listening() as server,
        httpx.AsyncClient(transport=connections(), timeout=None) as client,
    ):
        return server, [await client.request(method, server.url) for _ in range(count)]


@pytest.mark.parametrize("script", ENDLESS.values(), ids=ENDLESS)
def test_an_answer_that_goes_on_for_ever_outside_its_body_is_broken_off(script: Script) -> None:
    @asynchronous
    async def test() -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await fetch(script)

    test()


@pytest.mark.parametrize("script", NO_HTTP.values(), ids=NO_HTTP)
def test_httpx_never_sees_what_is_not_http(script: Script) -> None:
    @asynchronous
    async def test() -> None:
        with pytest.raises(httpx.RemoteProtocolError, match=r"the answer is not HTTP/1\.1"):
            await fetch(script)

    test()


@pytest.mark.parametrize("script", MORE_THAN_THE_ANSWER.values(), ids=MORE_THAN_THE_ANSWER)
def test_bytes_after_an_answer_are_not_the_answer_to_the_next_request(script: Script) -> None:
    @asynchronous
    async def test() -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await fetch(script)

    test()


@pytest.mark.parametrize("length", [b"content-length: 30000", b"transfer-encoding: chunked", b"a: b"])
@asynchronous
async def test_bytes_after_the_answer_to_a_head_request_are_refused(length: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await fetch(once(OK + length + b"\r\n\r\n5\r\n" + OK), method="HEAD")


def many(lines: int) -> bytes:
    return OK + b"a: b\r\n" * lines + b"content-length: 2\r\n\r\n{}"


@asynchronous
async def test_an_answer_has_a_limited_number_of_lines() -> None:
    _, [answer] = await fetch(once(many(MAX_LINES - 2)))
    assert answer.json() == {}

    with pytest.raises(httpx.RemoteProtocolError, match="too much that is not body"):
        await fetch(once(many(MAX_LINES - 1)))


@asynchronous
async def test_small_chunks_are_read_unless_their_lines_outweigh_the_body() -> None:
    body = b"".join(b"10\r\n0123456789abcdef\r\n" for _ in range(50_000))

    _, [answer] = await fetch(once(CHUNKED + body + b"0\r\n\r\n"))

    assert len(answer.content) == 16 * 50_000


@asynchronous
async def test_a_large_body_is_read() -> None:
    size = 5_000_000

    _, [answer] = await fetch(once(OK + b"content-length: %d\r\n\r\n" % size, b"x" * size))

    assert len(answer.content) == size


HONEST: dict[str, tuple[str, bytes, int, bytes]] = {
    "a length": ("GET", OK + b"Content-Length: 2\r\n\r\n{}", 200, b"{}"),
    "chunks": ("GET", CHUNKED + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", 200, b"{}"),
    "chunks with extensions and trailers": (
        "GET",
        CHUNKED + b'2;name=value;other="quoted"\r\n{}\r\n0\r\nserver-timing: db\r\n\r\n',
        200,
        b"{}",
    ),
    "spaces after the size of a chunk": ("GET", CHUNKED + b"2  \r\n{}\r\n0  \r\n\r\n", 200, b"{}"),
    "a length beside chunks": (
        "GET",
        OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        200,
        b"{}",
    ),
    "no reason": ("GET", b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\n{}", 200, b"{}"),
    "hints": ("GET", HINTS * 3 + OK + b"content-length: 2\r\n\r\n{}", 200, b"{}"),
    "continue": ("PUT", b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 2\r\n\r\n{}", 200, b"{}"),
    "an offer to upgrade": (
        "GET",
        OK + b"upgrade: h2,h2c\r\nconnection: Upgrade\r\ncontent-length: 2\r\n\r\n{}",
        200,
        b"{}",
    ),
    "a field of 8 KiB": ("GET", OK + b"a: " + b"b" * 8192 + b"\r\ncontent-length: 2\r\n\r\n{}", 200, b"{}"),
    "Latin-1 in a field": ("GET", OK + b"a: \xe5\xe4\xf6\r\ncontent-length: 2\r\n\r\n{}", 200, b"{}"),
    "no content": ("PUT", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "no content with a length": ("PUT", b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", 204, b""),
    "not modified": ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 100\r\n\r\n", 304, b""),
    "the head alone": ("HEAD", OK + b"content-length: 100\r\n\r\n", 200, b""),
    "the head alone of chunks": ("HEAD", CHUNKED, 200, b""),
    "an error": ("POST", b"HTTP/1.1 422 No\r\ncontent-length: 2\r\n\r\n{}", 422, b"{}"),
}
UNTIL_CLOSED: dict[str, bytes] = {
    "an old answer": b"HTTP/1.0 200 OK\r\n\r\n{}",
    "no length": OK + b"connection: close\r\n\r\n{}",
    "a line end after the body": OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}\r\n",
}


@pytest.mark.parametrize(("method", "sent", "status", "body"), HONEST.values(), ids=HONEST)
@asynchronous
async def test_honest_answers_are_read_and_leave_the_connection_open(
    method: str, sent: bytes, status: int, body: bytes
) -> None:
    server, answers = await fetch(once(sent), method=method, count=3)

    assert [(each.status_code, each.content) for each in answers] == [(status, body)] * 3
    assert server.connections == 1


@asynchronous
async def test_requests_and_answers_of_all_kinds_follow_one_another_on_a_connection() -> None:
    head, body = OK + b"content-length: 2\r\n\r\n", b"{}"
    no_content = b"HTTP/1.1 204 No Content\r\n\r\n"
    server = ScriptedServer(*(once(each) for each in (head, head + body, head, head, no_content, head + body)))
    async with server.listening(), httpx.AsyncClient(transport=connections(), timeout=None) as client:
        methods = ("HEAD", "GET", "HEAD", "HEAD", "DELETE", "GET")
        contents = [(await client.request(method, server.url)).content for method in methods]

    assert contents == [b"", body, b"", b"", b"", body]
    assert server.connections == 1


@asynchronous
async def test_a_body_that_looks_like_a_head_request_has_an_answer_with_a_body() -> None:
    async with (
        ScriptedServer(once(OK + b"content-length: 2\r\n\r\n{}")).listening() as server,
        httpx.AsyncClient(transport=connections(), timeout=None) as client,
    ):
        answer = await client.post(server.url, content=b"HEAD / HTTP/1.1")

    assert answer.content == b"{}"


@asynchronous
async def test_an_answer_that_is_broken_off_leaves_nothing_in_memory() -> None:
    """Without a collection of garbage, which is rare: httpx makes a circle of an answer and its connection."""
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(httpx.RemoteProtocolError):
            await fetch(ENDLESS["chunks of a byte"])
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kept = [each for each in gc.garbage if type(each).__name__ in ("SocketStream", "StreamProtocol")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()

    assert kept == []


@pytest.mark.parametrize("sent", UNTIL_CLOSED.values(), ids=UNTIL_CLOSED)
@asynchronous
async def test_an_answer_may_end_with_its_connection(sent: bytes) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    async with server, httpx.AsyncClient(transport=connections(), timeout=None) as client:
        answer = await client.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    assert (answer.status_code, answer.content) == (200, b"{}")


# --- content --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"", OK + b"content-length: 2\r\n", OK + b"content-length: 2\r\n\r\n{", CLOSED])
@asynchronous
async def test_a_cancelled_request_keeps_no_connection(answer: bytes) -> None:
    """It is cancelled after every number of turns of the loop."""
    opened: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.add(writer)
        with contextlib.suppress(ConnectionError):
            while await reader.readline():
                if (await reader.readuntil(b"\r\n\r\n")) and answer:
                    writer.write(answer)
                if answer == CLOSED:
                    break
        writer.close()
        opened.discard(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, httpx.AsyncClient(transport=connections(), timeout=None) as client:
        for turns in [*range(60)] * 2:
            request = asyncio.create_task(client.get(url))
            for _ in range(turns):
                await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait([request])
            if not request.cancelled():
                request.exception()
            del request
        pool: Any = client._transport
        gc.collect()  # a request that was cancelled while it closed its answer goes with that
        pool._pool._assign_requests_to_connections()
        assert (pool._pool._requests, [each for each in pool._pool.connections if not each.is_idle()]) == ([], [])
        while len(opened) > len(pool._pool.connections):  # noqa: ASYNC110 - the handlers end in their own time
            await asyncio.sleep(0.001)


async def read(body: bytes, coding: str, max_bytes: int, size: int = 1000) -> list[bytes]:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    class Body(httpx.AsyncByteStream):
        def __aiter__(self) -> AsyncIterator[bytes]:
            return chunks()

    response = httpx.Response(200, headers={"content-encoding": coding}, stream=Body())
    return [piece async for piece in read_content(response, max_bytes)]


@given(
    st.one_of(st.binary(max_size=1000), st.integers(0, 300_000).map(bytes), st.binary().map(lambda part: part * 997)),
    st.integers(1, 200_000),
    st.sampled_from([1, 6, 9]),
)
def test_gzip_is_read_completely(body: bytes, size: int, level: int) -> None:
    pieces = asyncio.run(read(gzip.compress(body, level), "gzip", len(body) + 1000, size))

    assert b"".join(pieces) == body


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_content_may_have_exactly_its_limit(coding: str) -> None:
    body = os.urandom(100_000)
    sent = gzip.compress(body, 0) if coding else body
    limit = len(sent)

    assert len(b"".join(asyncio.run(read(sent, coding, limit)))) == len(body)
    with pytest.raises(ContentTooLarge):
        asyncio.run(read(sent, coding, limit - 1))


def test_a_bomb_is_broken_off_at_the_limit() -> None:
    """Half a gigabyte in half a megabyte."""
    packer = zlib.compressobj(level=1, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(512)) + packer.flush()
    limit = 2 * len(bomb)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    with pytest.raises(ContentTooLarge):
        asyncio.run(read(bomb, "gzip", limit, 2**16))
    assert peak() - before < 100 * 2**20


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "compress", "gzip, gzip", "gzip, br"])
def test_other_codings_are_refused_unread(coding: str) -> None:
    with pytest.raises(ContentUnreadable, match="not requested"):
        asyncio.run(read(b"x" * 1000, coding, 10))


@asynchronous
async def test_other_tasks_run_while_a_body_is_read() -> None:
    """The loop answers shoppers, and a body of small chunks may be there completely."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def turns_during(reading: Callable[[], Any]) -> int:
        nonlocal turns
        turns = 0
        counting = asyncio.create_task(count())
        await reading()
        counting.cancel()
        return turns

    assert await turns_during(lambda: read(b"x" * 1000, "", 1000, size=1)) >= 100
