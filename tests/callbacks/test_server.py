"""Connections whose request never gets a complete head."""

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import uvloop
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from adapter.callbacks.endpoints import BODY_IS_COMPLETE, ON_HANG_UP, RECEIVED_AT
from adapter.callbacks.server import (
    LARGEST_HEAD_BYTES,
    LONGEST_HEAD_SECONDS,
    MOST_AT_ONCE,
    MOST_WAITING,
    REFUSAL,
    GuardedProtocol,
    _HeadBuffer,
    http_server,
)
from adapter.config.model import ServerConfig
from tests import PATIENCE

HEAD = b"POST / HTTP/1.1\r\nhost: adapter\r\ncontent-length: 2\r\n\r\n"


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose timers go off when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.timers: list[tuple[float, asyncio.TimerHandle, Callable[[], object]]] = []

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        timer = super().call_later(3600, callback, *args, context=context)
        self.timers.append((delay, timer, lambda: callback(*args)))
        return timer

    def after(self, delay: float) -> None:
        for due, timer, call in [*self.timers]:
            if due <= delay and not timer.cancelled():
                timer.cancel()
                call()


class Wire(asyncio.Transport):
    """The far end of a connection: what was written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.written = b""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@pytest.fixture
def connection():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = Config(app, http=GuardedProtocol, log_config=None, lifespan="off", ws="none", timeout_keep_alive=3000)
    config.load()
    loop = Loop()
    asyncio.set_event_loop(loop)
    protocol, wire = GuardedProtocol(config, ServerState(), {}, loop), Wire()
    protocol.connection_made(wire)
    yield loop, protocol, wire
    protocol.connection_lost(None)
    loop.run_until_complete(asyncio.sleep(0))
    asyncio.set_event_loop(None)
    loop.close()


def settle(loop: Loop) -> None:
    for _ in range(10):
        loop.run_until_complete(asyncio.sleep(0))


def test_a_connection_that_sends_nothing_is_closed(connection) -> None:
    loop, _, wire = connection

    loop.after(LONGEST_HEAD_SECONDS)

    assert wire.closed


def test_an_idle_connection_is_kept_for_the_configured_time_and_longer_than_by_proxies(connection) -> None:
    """Nginx keeps one for 60 s. A request that meets a connection being closed gets no answer."""
    loop, protocol, wire = connection
    protocol.data_received(HEAD + b"{}")
    settle(loop)

    loop.after(2999)
    is_kept = not wire.closed
    loop.after(3000)

    assert is_kept
    assert wire.closed
    assert ServerConfig().keep_alive > timedelta(seconds=60)


def test_a_head_that_arrives_byte_by_byte_is_closed_at_the_time_limit(connection) -> None:
    loop, protocol, wire = connection
    for byte in HEAD[:-4]:
        protocol.data_received(bytes([byte]))

    loop.after(LONGEST_HEAD_SECONDS)

    assert wire.closed


def test_a_head_beyond_the_size_limit_is_closed(connection) -> None:
    _, protocol, wire = connection
    protocol.data_received(b"POST / HTTP/1.1\r\n")
    for number in range(LARGEST_HEAD_BYTES // 1000 + 1):
        protocol.data_received(b"x-%d: " % number + b"y" * 1000 + b"\r\n")

    assert wire.closed


def test_a_body_is_not_limited_by_the_protocol(connection) -> None:
    loop, protocol, wire = connection
    protocol.data_received(HEAD)

    loop.after(LONGEST_HEAD_SECONDS)

    assert not wire.closed


def test_a_request_with_a_complete_body_is_marked(connection) -> None:
    loop, protocol, _ = connection
    told = []
    for data in (HEAD, b"{", b"}", HEAD + b"{}", HEAD):
        protocol.data_received(data)
        told.append(BODY_IS_COMPLETE in protocol.scope)
        settle(loop)

    assert told == [False, False, True, True, False]


def test_a_request_is_marked_with_the_moment_of_its_first_byte(connection) -> None:
    loop, protocol, _ = connection
    before = time.monotonic()

    protocol.data_received(HEAD[:10])
    first = protocol.scope[RECEIVED_AT]
    protocol.data_received(HEAD[10:] + b"{")
    settle(loop)
    protocol.data_received(b"}")

    assert before <= first <= time.monotonic()
    assert protocol.scope[RECEIVED_AT] == first
    settle(loop)
    protocol.data_received(HEAD + b"{}")
    assert protocol.scope[RECEIVED_AT] >= first


def test_a_caller_that_closes_the_connection_before_its_answer_is_noted(connection) -> None:
    loop, protocol, _ = connection
    noted = []
    protocol.data_received(HEAD + b"{}")
    protocol.scope[ON_HANG_UP] = lambda: noted.append("first")
    settle(loop)
    protocol.data_received(HEAD + b"{")
    protocol.scope[ON_HANG_UP] = lambda: noted.append("second")

    protocol.connection_lost(None)

    assert noted == ["second"]


def test_each_request_of_a_connection_has_its_own_time_limit(connection) -> None:
    loop, protocol, wire = connection
    for _ in range(2):
        protocol.data_received(HEAD + b"{}")
        settle(loop)
    assert wire.written.count(b"HTTP/1.1 200") == 2
    loop.after(LONGEST_HEAD_SECONDS)
    assert not wire.closed

    protocol.data_received(HEAD[:20])
    loop.after(LONGEST_HEAD_SECONDS)

    assert wire.closed


def test_a_request_beyond_the_limit_is_refused_unread_and_its_connection_stays_open(connection) -> None:
    loop, protocol, wire = connection
    others = [loop.create_future() for _ in range(MOST_AT_ONCE)]
    protocol.tasks.update(others)

    protocol.data_received(HEAD + b"{}" + HEAD + b"{")
    protocol.data_received(b"}")

    assert wire.written == REFUSAL * 2
    assert b"retry-after" in REFUSAL
    assert not wire.closed
    protocol.tasks.clear()
    protocol.data_received(HEAD + b"{}")
    settle(loop)
    assert wire.written.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize(
    ("waiting", "at_once", "is_refused"),
    [(0, MOST_AT_ONCE, True), (1, MOST_AT_ONCE, False), (MOST_WAITING, MOST_WAITING, True)],
)
def test_waiting_requests_count_only_towards_their_own_limit(
    connection, waiting: int, at_once: int, is_refused: bool
) -> None:
    loop, protocol, wire = connection
    protocol._waiting = lambda: waiting
    protocol.tasks.update(loop.create_future() for _ in range(at_once))

    protocol.data_received(HEAD + b"{}")
    protocol.tasks.clear()
    settle(loop)

    assert (wire.written == REFUSAL) is is_refused


def test_a_caller_that_expects_100_continue_is_refused_at_once(connection) -> None:
    loop, protocol, wire = connection
    protocol.tasks.update(loop.create_future() for _ in range(MOST_AT_ONCE))

    protocol.data_received(HEAD.replace(b"host", b"expect: 100-continue\r\nhost"))

    assert wire.written == REFUSAL
    assert wire.closed
    protocol.tasks.clear()


def test_a_refusal_honours_connection_close(connection) -> None:
    loop, protocol, wire = connection
    protocol.tasks.update(loop.create_future() for _ in range(MOST_AT_ONCE))

    protocol.data_received(HEAD.replace(b"host", b"connection: close\r\nhost") + b"{}")

    assert wire.written == REFUSAL
    assert wire.closed
    protocol.tasks.clear()


def test_many_new_connections_are_accepted_at_once() -> None:
    """On the loop that the service runs on, and though it goes round only a few times in all that time."""

    async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def answered() -> int:
        with contextlib.ExitStack() as closing:
            listening = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
            listening.setblocking(False)
            async with http_server(answer, listening):
                callers = [closing.enter_context(socket.create_connection(listening.getsockname())) for _ in range(40)]
                for caller in callers:
                    caller.setblocking(False)
                    caller.sendall(b"GET / HTTP/1.1\r\nhost: adapter\r\n\r\n")
                for _ in range(10):
                    await asyncio.sleep(0)
                return len(select.select(callers, [], [], 0)[0])

    assert uvloop.run(answered()) == 40


# --- offers of an upgrade, and callers that close their side ----------------------------------------------------------

H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQ\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: adapter\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


def offering(request: bytes, offer: bytes = H2C) -> bytes:
    return request.replace(b"host", offer + b"host", 1)


@pytest.fixture
def echoing() -> Callable[..., bytes]:
    """The answers of a server that answers with the request's headers and body, on the service's own loop."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        names = b",".join(sorted(name for name, _ in scope["headers"]))
        answer = b"[%s %s %s]" % (scope["method"].encode(), names, body)
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]}
        )
        await send({"type": "http.response.body", "body": answer})

    async def ask(pieces: tuple[bytes, ...], *, closes: bool) -> bytes:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
            listening.setblocking(False)
            async with http_server(app, listening):
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    for _ in range(20):
                        await asyncio.sleep(0)
                if closes:
                    writer.write_eof()
                async with asyncio.timeout(PATIENCE):
                    answers = await reader.read() if closes else await reader.readuntil(b"]")
                writer.close()
                return answers

    return lambda *pieces, closes=True: uvloop.run(ask(pieces, closes=closes))


@pytest.mark.parametrize("request_", [HEAD + b"{}", CHUNKED], ids=["length", "chunked"])
@pytest.mark.parametrize("offer", [
    H2C, b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"connection: keep-alive\r\nconnection: upgrade\r\nUPGRADE: h2c\r\n",
], ids=["h2c", "websocket", "two fields"])  # fmt: skip
@pytest.mark.parametrize("at", [None, 30, -1], ids=["in one piece", "cut in the head", "cut in the body"])
def test_a_request_that_offers_an_upgrade_keeps_its_body(
    echoing: Callable[..., bytes], request_: bytes, offer: bytes, at: int | None
) -> None:
    sent = offering(request_, offer)

    answer = echoing(sent[:at], sent[at:] if at else b"")

    assert answer.count(b"HTTP/1.1 200") == 1
    assert b" {}]" in answer
    assert b"upgrade" not in answer
    assert b"http2-settings" not in answer


@pytest.mark.parametrize(
    "request_",
    [
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HEAD.replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\nconnection: keep-alive\r\n"),
        HEAD.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nconnection: close\r\n"),
    ],
    ids=["HTTP/1.0", "HTTP/1.0 with keep-alive", "close"],
)
def test_an_offer_of_an_upgrade_on_a_connection_that_ends_is_ignored(
    echoing: Callable[..., bytes], request_: bytes
) -> None:
    answer = echoing(offering(request_) + b"{}")

    assert answer.count(b"HTTP/1.1 200") == 1
    assert b" {}]" in answer


def test_requests_behind_an_offer_of_an_upgrade_are_answered_in_order(echoing: Callable[..., bytes]) -> None:
    answers = echoing(HEAD + b"{}" + offering(HEAD) + b"[]" + offering(CHUNKED) + HEAD + b"12")

    assert [part[-2:] for part in answers.split(b"]HTTP")] == [b"{}", b"[]", b"{}", b"2]"]
    assert answers.endswith(b" 12]")


def test_a_head_that_offers_an_upgrade_without_end_is_closed(connection) -> None:
    _, protocol, wire = connection

    protocol.data_received(offering(HEAD)[:-2] + b"x: " + b"x" * LARGEST_HEAD_BYTES)

    assert wire.closed


def test_a_malformed_request_behind_an_offer_of_an_upgrade_is_400(echoing: Callable[..., bytes]) -> None:
    answer = echoing(offering(CHUNKED.replace(b"2\r\n{}", b"-2\r\n{}")))

    assert b"HTTP/1.1 400" in answer


def test_a_caller_that_closes_its_side_gets_every_answer(echoing: Callable[..., bytes]) -> None:
    answers = echoing(HEAD + b"{}" + HEAD + b"[]")

    assert answers.count(b"HTTP/1.1 200") == 2


def test_a_caller_that_closes_its_side_in_the_middle_of_a_body_gets_no_answer(connection) -> None:
    loop, protocol, _ = connection
    protocol.data_received(HEAD + b"{")
    settle(loop)

    assert not protocol.eof_received()  # the transport closes the connection


def test_a_caller_that_closes_its_side_before_its_answer_is_noted_once(connection) -> None:
    loop, protocol, wire = connection
    noted = []
    protocol.data_received(HEAD + b"{}")
    protocol.scope[ON_HANG_UP] = lambda: noted.append("hang-up")

    assert protocol.eof_received()
    settle(loop)

    assert noted == ["hang-up"]
    assert b"connection: close" in wire.written
    assert wire.closed


def test_many_offers_of_an_upgrade_in_one_packet_are_answered(connection) -> None:
    loop, protocol, wire = connection

    protocol.data_received(offering(HEAD + b"{}") * 1500)
    for _ in range(1500):
        loop.run_until_complete(asyncio.sleep(0))
    settle(loop)

    assert wire.written.count(b"HTTP/1.1 200") == 1500


def test_a_large_body_behind_an_offer_of_an_upgrade_counts_as_body(connection) -> None:
    loop, protocol, wire = connection
    body = b" " * (LARGEST_HEAD_BYTES + 1)

    protocol.data_received(offering(HEAD.replace(b"length: 2", b"length: %d" % len(body))) + body)
    settle(loop)

    assert b"HTTP/1.1 200" in wire.written
    assert not wire.closed


# --- an answer in one piece -------------------------------------------------------------------------------------------

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Pieces:
    """A transport that remembers what went out, and in how many pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str) -> str:
        return f"the {name} of the connection"


def through(wire: Pieces) -> Any:
    return _HeadBuffer(wire)  # type: ignore[arg-type]


def test_head_and_body_are_written_together() -> None:
    wire = Pieces()
    transport = through(wire)

    transport.write(ANSWER)
    transport.write(b"[]")
    transport.flush()
    transport.write(ANSWER)
    transport.write(b"")

    assert wire.pieces == [ANSWER + b"[]", ANSWER]


@pytest.mark.parametrize("ends", ["flush", "close"])
def test_a_head_without_a_body_is_written_at_the_end(ends: str) -> None:
    wire = Pieces()
    transport = through(wire)

    transport.write(ANSWER)
    getattr(transport, ends)()

    assert wire.pieces == [ANSWER]
    assert wire.closed == (ends == "close")


@pytest.mark.parametrize("data", [b"HTTP/1.1 100 Continue\r\n\r\n", REFUSAL, b"0\r\n\r\n", b"anything"])
def test_other_bytes_are_written_at_once(data: bytes) -> None:
    wire = Pieces()

    through(wire).write(data)

    assert wire.pieces == [data]


def test_other_attributes_are_those_of_the_connection() -> None:
    assert through(Pieces()).get_extra_info("peername") == "the peername of the connection"
