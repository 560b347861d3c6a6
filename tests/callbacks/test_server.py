"""The protocol of a connection: its limits, offers of an upgrade, callers that close their side, answers."""

import asyncio
import contextlib
import gc
import select
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import uvloop
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from adapter.callbacks.connection_table import CONNECTION, ConnectionTable, note_identified
from adapter.callbacks.endpoints import ON_HANG_UP, RECEIVED_AT
from adapter.callbacks.limits import MOST_AT_ONCE, Load
from adapter.callbacks.protocol import (
    LARGEST_FRAMING_BYTES,
    LARGEST_HEAD_BYTES,
    LINGER_SECONDS,
    LONGEST_HEAD_SECONDS,
    LONGEST_UNREAD_SECONDS,
    MOST_FIELDS,
    MOST_PIPELINED,
    OVERLOADED,
    OVERLOADED_AND_CLOSED,
    PIECE_BYTES,
    TOO_SLOW,
    GuardedProtocol,
    _HeadBuffer,
)
from adapter.callbacks.server import http_server
from adapter.config.model import ServerConfig
from tests import PATIENCE

RECEIVE_SECONDS = 20
HEAD = b"POST / HTTP/1.1\r\nhost: adapter\r\ncontent-length: 2\r\n\r\n"
CHUNKED_HEAD = b"POST / HTTP/1.1\r\nhost: adapter\r\ntransfer-encoding: chunked\r\n\r\n"


class Wire(asyncio.Transport):
    """The far end of a connection: what was written, and how the connection ended."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.aborted = False
        self.ended = False  # our side: the caller may still send
        self.reading = True
        self.written = b""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 50000) if name == "peername" else default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def write_eof(self) -> None:
        self.ended = True

    def write(self, data: Any) -> None:
        assert not self.ended
        self.written += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Guarded:
    """A connection to an application, on a clock that the test moves."""

    def __init__(self, app: Any) -> None:
        self.loop = asyncio.SelectorEventLoop()
        asyncio.set_event_loop(self.loop)
        self.limits: list[str] = []
        self.load = Load(on_limit=self.limits.append)
        self.connections = ConnectionTable(on_limit=self.limits.append)
        self.config = Config(app, lifespan="off", log_config=None, ws="none", timeout_keep_alive=3000)
        self.config.load()
        self.began_at = time.monotonic()
        self.protocol: Any
        self.protocol, self.wire = self.connect()

    def connect(self) -> tuple[GuardedProtocol, Wire]:
        named = {"connections": self.connections, "load": self.load, "receive_seconds": RECEIVE_SECONDS}
        protocol, wire = GuardedProtocol(self.config, ServerState(), {}, self.loop, **named), Wire()
        protocol.connection_made(wire)
        return protocol, wire

    def send(self, data: bytes) -> None:
        """Let the caller send bytes, and everything run that can run."""
        self.protocol.data_received(data)
        self.settle()

    def settle(self) -> None:
        for _ in range(10):
            self.loop.run_until_complete(asyncio.sleep(0))

    def after(self, seconds: float) -> None:
        """Let time pass, at least these seconds since everything before."""
        self.connections.expire(time.monotonic() + seconds)
        self.settle()

    def before(self, seconds: float) -> None:
        """Let time pass, less than these seconds since anything."""
        self.connections.expire(self.began_at + seconds - 0.001)
        self.settle()

    def close(self) -> None:
        self.protocol.connection_lost(None)
        self.settle()
        asyncio.set_event_loop(None)
        self.loop.close()


@pytest.fixture
def answering() -> Iterator[Callable[[Any], Guarded]]:
    """A function that connects to an application."""
    with contextlib.ExitStack() as closing:

        def connect(app: Any) -> Guarded:
            guarded = Guarded(app)
            closing.callback(guarded.close)
            return guarded

        yield connect


async def answer_empty(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def read_and_answer(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive())["type"] != "http.disconnect" and message["more_body"]:
        pass
    await answer_unread(scope, receive, send)


async def answer_unread(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def guarded(answering: Callable[[Any], Guarded]) -> Guarded:
    """A connection to an application that answers after the first part of the body."""
    return answering(answer_empty)


@pytest.fixture
def connection(guarded: Guarded) -> tuple[asyncio.AbstractEventLoop, GuardedProtocol, Wire]:
    return guarded.loop, guarded.protocol, guarded.wire


def settle(loop: asyncio.AbstractEventLoop) -> None:
    for _ in range(10):
        loop.run_until_complete(asyncio.sleep(0))


def test_a_lost_connection_leaves_no_garbage() -> None:
    """The garbage collector runs rarely, and a connection may hold a part of a body."""

    async def wait(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    guarded = Guarded(wait)
    left = []
    gc.disable()
    try:
        for sent in (b"", HEAD[:20], HEAD, HEAD + b"{", HEAD + b"{}", (HEAD + b"{}") * 3, (HEAD + b"{}") * 20):
            protocol, _ = guarded.connect()
            protocol.data_received(sent)
            guarded.settle()
            protocol.connection_lost(None)
            guarded.settle()
            left.append(weakref.ref(protocol))
            del protocol
        guarded.settle()
        kept = [each() is not None for each in left]
    finally:
        gc.enable()
        guarded.close()

    assert kept == [False] * len(left)


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_connection_that_sends_nothing_is_closed_without_a_warning(guarded: Guarded) -> None:
    guarded.before(LONGEST_HEAD_SECONDS)
    is_kept = not guarded.wire.closed
    guarded.after(LONGEST_HEAD_SECONDS)

    assert is_kept
    assert guarded.wire.closed
    assert guarded.limits == []


def test_an_idle_connection_is_kept_for_the_configured_time_and_longer_than_by_proxies(guarded: Guarded) -> None:
    """Nginx keeps one for 60 s. A request that meets a connection being closed gets no answer."""
    guarded.send(HEAD + b"{}")

    guarded.before(3000)
    is_kept = not guarded.wire.closed
    guarded.after(3000)

    assert is_kept
    assert guarded.wire.closed
    assert not guarded.wire.aborted
    assert guarded.limits == []
    assert ServerConfig().keep_alive > timedelta(seconds=60)


@pytest.mark.parametrize("sent", [b"\r\n", b"\r\n\r\n\r\n"])
def test_empty_lines_between_requests_do_not_keep_an_idle_connection(guarded: Guarded, sent: bytes) -> None:
    guarded.send(HEAD + b"{}")
    guarded.send(sent)

    guarded.after(3000)

    assert guarded.wire.closed


def test_a_head_that_arrives_byte_by_byte_is_closed_at_the_time_limit(guarded: Guarded) -> None:
    for byte in HEAD[:-4]:
        guarded.protocol.data_received(bytes([byte]))

    guarded.before(LONGEST_HEAD_SECONDS)
    is_kept = not guarded.wire.closed
    guarded.after(LONGEST_HEAD_SECONDS)

    assert is_kept
    assert guarded.wire.aborted
    assert guarded.limits == ["request-time"]


@pytest.mark.parametrize("rest", [b"", b"{", b"\r\n"], ids=["no body", "half a body", "other bytes"])
def test_a_body_that_does_not_come_is_answered_408_and_closed(guarded: Guarded, rest: bytes) -> None:
    """The application waits for the rest, and is told that the caller is gone."""
    told = []

    async def read(_scope: Any, receive: Any, _send: Any) -> None:
        while (message := await receive())["type"] != "http.disconnect" and message["more_body"]:
            pass
        told.append(message["type"])

    guarded.protocol.app = read
    guarded.send(HEAD.replace(b"length: 2", b"length: 3") + rest)

    guarded.before(RECEIVE_SECONDS)
    is_kept = not guarded.wire.written
    guarded.after(RECEIVE_SECONDS)

    assert is_kept
    assert guarded.wire.written == TOO_SLOW
    assert guarded.wire.ended
    assert guarded.limits == ["request-time"]
    assert told == ["http.disconnect"]
    guarded.after(LINGER_SECONDS)
    assert guarded.wire.aborted
    assert guarded.limits == ["request-time"]


def test_a_whole_request_has_no_deadline_of_its_caller(answering: Callable[[Any], Guarded]) -> None:
    """A handler may take as long as its own deadline allows."""
    answer = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await answer.wait()
        await answer_empty(scope, receive, send)

    guarded = answering(wait)
    guarded.send(HEAD + b"{}")
    guarded.after(24 * 3600)
    answer.set()
    guarded.settle()

    assert b"HTTP/1.1 200" in guarded.wire.written
    assert not guarded.wire.closed


def test_each_request_of_a_connection_has_its_own_deadline(guarded: Guarded) -> None:
    for _ in range(2):
        guarded.send(HEAD + b"{}")
    assert guarded.wire.written.count(b"HTTP/1.1 200") == 2
    guarded.after(LONGEST_HEAD_SECONDS)
    assert not guarded.wire.closed

    guarded.send(HEAD[:20])
    guarded.after(LONGEST_HEAD_SECONDS)

    assert guarded.wire.closed


def test_an_offer_of_an_upgrade_does_not_prolong_the_deadline(guarded: Guarded) -> None:
    guarded.protocol.data_received(offering(HEAD)[:10])
    began = guarded.protocol.scope[RECEIVED_AT]

    guarded.protocol.data_received(offering(HEAD)[10:] + b"{")

    assert guarded.protocol.scope[RECEIVED_AT] == began
    assert guarded.protocol.deadline == began + RECEIVE_SECONDS


def test_an_answer_that_is_not_taken_is_cut(guarded: Guarded) -> None:
    guarded.send(HEAD + b"{}")
    guarded.protocol.pause_writing()  # as the transport does while anything is unsent

    guarded.before(LONGEST_UNREAD_SECONDS)
    is_kept = not guarded.wire.closed
    guarded.after(LONGEST_UNREAD_SECONDS)

    assert is_kept
    assert guarded.wire.aborted
    assert guarded.limits == ["unread-answer"]


def test_an_answer_that_is_taken_late_is_complete(guarded: Guarded) -> None:
    guarded.send(HEAD + b"{}")
    guarded.protocol.pause_writing()
    guarded.protocol.resume_writing()

    guarded.after(LONGEST_UNREAD_SECONDS)

    assert not guarded.wire.closed


def test_a_last_answer_that_is_not_taken_is_cut(guarded: Guarded) -> None:
    guarded.protocol.pause_writing()
    guarded.protocol.data_received(HEAD.replace(b"host", b"connection: close\r\nhost") + b"{}")
    guarded.after(LONGEST_UNREAD_SECONDS)

    assert guarded.wire.aborted


# --- answers before the end of a request ------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [b"", b"{"], ids=["silence", "one more byte"])
def test_an_answer_before_the_body_ends_the_connection(answering: Callable[[Any], Guarded], rest: bytes) -> None:
    guarded = answering(answer_unread)
    guarded.send(HEAD)
    guarded.send(rest)

    assert guarded.wire.written.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in guarded.wire.written
    assert guarded.wire.ended
    guarded.before(LINGER_SECONDS)
    is_kept = not guarded.wire.closed
    guarded.after(LINGER_SECONDS)
    assert is_kept
    assert guarded.wire.aborted
    assert guarded.limits == []


def test_everything_behind_such_an_answer_is_dropped(answering: Callable[[Any], Guarded]) -> None:
    guarded = answering(answer_unread)
    guarded.send(HEAD)

    guarded.send(b"{}" + HEAD + b"{}" + b"x" * 100_000)

    assert guarded.wire.written.count(b"HTTP/1.1") == 1
    assert guarded.wire.reading
    assert not guarded.protocol.cycle.body


def test_a_caller_that_takes_such_an_answer_and_goes_ends_the_connection(answering: Callable[[Any], Guarded]) -> None:
    guarded = answering(answer_unread)
    guarded.send(HEAD)

    assert not guarded.protocol.eof_received()  # the transport closes the connection


def test_a_body_that_has_come_before_the_answer_keeps_the_connection(answering: Callable[[Any], Guarded]) -> None:
    answer = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await answer.wait()
        await answer_unread(scope, receive, send)

    guarded = answering(wait)
    guarded.send(HEAD)
    guarded.send(b"{}")
    answer.set()
    guarded.settle()

    assert b"connection: close" not in guarded.wire.written
    assert not guarded.wire.ended
    assert not guarded.wire.closed


def test_a_discarded_body_takes_no_memory_and_keeps_the_connection(answering: Callable[[Any], Guarded]) -> None:
    answer = asyncio.Event()

    async def discard(scope: Any, receive: Any, send: Any) -> None:
        scope[CONNECTION].discard_body()
        await answer.wait()
        await answer_unread(scope, receive, send)

    guarded = answering(discard)
    guarded.send(HEAD.replace(b"length: 2", b"length: 400000") + b"x" * 100_000)
    for _ in range(3):
        assert guarded.wire.reading
        assert not guarded.protocol.cycle.body
        guarded.send(b"x" * 100_000)
    guarded.after(RECEIVE_SECONDS)
    answer.set()
    guarded.settle()

    assert b"HTTP/1.1 200" in guarded.wire.written
    assert not guarded.wire.ended
    guarded.protocol.data_received(HEAD + b"{")
    assert guarded.protocol.cycle.body == b"{"


def test_an_unfinished_body_that_takes_others_room_is_refused(answering: Callable[[Any], Guarded]) -> None:
    told = []

    async def read(scope: Any, receive: Any, send: Any) -> None:
        note_identified(scope)
        while (message := await receive())["type"] != "http.disconnect" and message["more_body"]:
            pass
        told.append(message["type"])
        await answer_unread(scope, receive, send)

    guarded = answering(read)
    guarded.connections.most_body_bytes = 100_000
    guarded.send(HEAD.replace(b"length: 2", b"length: 1000000") + b"x" * 50_000)
    stranger, _ = guarded.connect()
    stranger.data_received(HEAD.replace(b"length: 2", b"length: 1000000") + b"x" * 90_000)
    other, other_wire = guarded.connect()
    other.data_received(HEAD.replace(b"length: 2", b"length: 50002") + b"x" * 50_001)
    stranger.connection_lost(None)
    guarded.settle()
    other.data_received(b"x")
    guarded.settle()

    assert guarded.wire.written == OVERLOADED_AND_CLOSED
    assert guarded.wire.ended
    assert sorted(told) == ["http.disconnect", "http.disconnect", "http.request"]
    assert guarded.limits == ["unfinished-bodies"]
    assert b"HTTP/1.1 200" in other_wire.written
    other.connection_lost(None)


def test_a_connection_that_waits_for_a_refusal_gives_way_to_others(answering: Callable[[Any], Guarded]) -> None:
    """Otherwise the calls of one order could take all connections while their refusals are delayed."""

    async def refuse(scope: Any, receive: Any, _send: Any) -> None:
        scope[CONNECTION].note_identified()
        scope[CONNECTION].note_refusal()
        while (await receive())["type"] != "http.disconnect":
            pass

    guarded = answering(refuse)
    guarded.connections.most = 1
    guarded.send(HEAD + b"{")

    other, other_wire = guarded.connect()

    assert guarded.wire.aborted
    assert not other_wire.closed
    other.connection_lost(None)


def test_a_body_in_one_piece_is_never_unfinished(guarded: Guarded) -> None:
    guarded.connections.most_body_bytes = 0

    guarded.send(HEAD.replace(b"length: 2", b"length: 100000") + b"x" * 100_000)

    assert b"HTTP/1.1 200" in guarded.wire.written


# --- sizes ------------------------------------------------------------------------------------------------------------


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def head_with(fields: bytes) -> bytes:
    return HEAD.replace(b"host", fields + b"host", 1)


@pytest.mark.parametrize("size", [1_000, 65_536, 1_000_000], ids=str)
@pytest.mark.parametrize(
    "head",
    [
        HEAD[:-2] + b"".join(b"x-%d: %s\r\n" % (number, b"y" * 1000) for number in range(60)),
        HEAD[:-2] + b"x: " + b" " * 60_000,
        b"POST /" + b"x" * 60_000,
        head_with(b"x: " + b"y" * 60_000 + b"\r\n") + b"{}",
        head_with(b"x:" + b" " * 60_000 + b"y\r\n") + b"{}",
        head_with(b"".join(b"x: y\r\n" for _ in range(MOST_FIELDS))) + b"{}",
        b"POST / HTTP/1.1\r\n" + b"a:\r\n" * 8_000,
    ],
    ids=["fields", "spaces", "address", "complete", "complete with spaces", "many fields", "many small fields"],
)
def test_a_head_beyond_its_limit_is_closed(guarded: Guarded, head: bytes, size: int) -> None:
    for piece in in_pieces(head, size):
        guarded.send(piece)

    assert guarded.wire.aborted
    assert guarded.limits == ["head"]
    assert guarded.wire.written == b""


@pytest.mark.parametrize("first", [10, 1000, LARGEST_HEAD_BYTES - 1000], ids=str)
@pytest.mark.parametrize(("size", "is_answered"), [(LARGEST_HEAD_BYTES, True), (LARGEST_HEAD_BYTES + 10, False)])
def test_a_head_is_measured_to_the_byte_wherever_it_is_cut(
    guarded: Guarded, first: int, size: int, is_answered: bool
) -> None:
    """The body behind it does not count, though it comes in the same packet."""
    head = HEAD.replace(b"length: 2", b"length: 90000")
    sent = head.replace(b"host", b"x: %s\r\nhost" % (b"y" * (size - len(head) - 5))) + b"z" * 90_000

    guarded.send(sent[:first])
    guarded.send(sent[first:])

    assert (b"HTTP/1.1 200" in guarded.wire.written) is is_answered
    assert guarded.limits == ([] if is_answered else ["head"])


@pytest.mark.parametrize("size", [1, 100, 20_000], ids=str)
@pytest.mark.parametrize(("fields", "is_answered"), [(8, True), (9, False)])
def test_trailers_are_measured_wherever_they_are_cut(
    answering: Callable[[Any], Guarded], size: int, fields: int, is_answered: bool
) -> None:
    guarded = answering(read_and_answer)
    sent = CHUNKED + CHUNKED[:-2] + (b"x: %s\r\n" % (b"y" * 1000)) * fields + b"\r\n"
    for piece in in_pieces(sent, size):
        guarded.protocol.data_received(piece)
    guarded.settle()

    assert guarded.wire.aborted is not is_answered
    assert guarded.limits == ([] if is_answered else ["framing"])


def test_a_head_within_its_limit_is_answered(guarded: Guarded) -> None:
    fields = b"".join(b"x: %s\r\n" % (b"y" * 200) for _ in range(MOST_FIELDS - 2))

    guarded.send(head_with(fields) + b"{}")

    assert b"HTTP/1.1 200" in guarded.wire.written


@pytest.mark.parametrize("size", [1, 1_000, 65_536, 1_000_000], ids=str)
@pytest.mark.parametrize(
    "sent",
    [
        b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 10_000,
        b"2\r\n{}\r\n0\r\nx: " + b"y" * 60_000,
        b"2;" + b"x" * 60_000,
        b"2;x=" + b"y" * 60_000 + b"\r\n{}\r\n0\r\n\r\n",
        b"1;" + b"x" * 1000 + b"\r\n \r\n",
    ],
    ids=["trailers", "a trailer", "an extension", "a complete extension", "many extensions"],
)
def test_framing_beyond_its_limit_is_closed(guarded: Guarded, sent: bytes, size: int) -> None:
    guarded.protocol.data_received(CHUNKED_HEAD)
    for piece in in_pieces(sent * (1 + 60_000 // len(sent)), size):
        guarded.protocol.data_received(piece)

    assert guarded.wire.aborted
    assert guarded.limits == ["framing"]


def test_bytes_between_requests_beyond_their_limit_are_closed(guarded: Guarded) -> None:
    guarded.send(HEAD + b"{}")

    guarded.send(b"\r\n" * (LARGEST_FRAMING_BYTES + PIECE_BYTES))

    assert guarded.wire.aborted


@pytest.mark.parametrize("size", [1, 100, 10_000], ids=str)
def test_a_body_in_the_smallest_chunks_is_read(echoing: Callable[..., bytes], size: int) -> None:
    sent = CHUNKED_HEAD + b"1\r\nx\r\n" * 30_000 + b"0\r\nx: y\r\n\r\n"

    assert echoing(*in_pieces(sent, size * 100)).count(b"x" * 30_000) == 1


def test_a_field_of_a_trailer_never_becomes_a_header(echoing: Callable[..., bytes]) -> None:
    trailer = b"authorization: Bearer x\r\nexpect: 100-continue\r\nx-merchant: y\r\n"

    answers = echoing(CHUNKED_HEAD, b"2\r\n{}\r\n0\r\n" + trailer, b"\r\n" + HEAD + b"12")

    assert b"[POST host,transfer-encoding {}]" in answers
    assert b"[POST content-length,host 12]" in answers


def test_a_body_is_not_limited_by_the_protocol(answering: Callable[[Any], Guarded]) -> None:
    read = bytearray()

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            read.extend(message["body"])

    guarded = answering(app)
    guarded.send(HEAD.replace(b"length: 2", b"length: 5000001"))
    for _ in range(50):
        guarded.send(b"x" * 100_000)

    assert len(read) == 5_000_000
    assert not guarded.wire.closed


def test_pipelined_requests_are_answered_in_order_up_to_their_limit(guarded: Guarded) -> None:
    guarded.send((HEAD + b"{}") * (MOST_PIPELINED + 100))
    for _ in range(MOST_PIPELINED):
        guarded.settle()

    assert guarded.wire.written.count(b"HTTP/1.1 200") == 1 + MOST_PIPELINED
    assert guarded.wire.written.count(b"connection: close") == 1
    assert guarded.limits == ["pipelined-requests"]
    assert guarded.wire.ended
    guarded.after(LINGER_SECONDS)
    assert guarded.wire.aborted


def test_the_first_pipelined_request_has_the_time_that_it_needs(answering: Callable[[Any], Guarded]) -> None:
    answer = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await answer.wait()
        await answer_empty(scope, receive, send)

    guarded = answering(wait)
    guarded.send((HEAD + b"{}") * (MOST_PIPELINED + 2))
    guarded.after(24 * 3600)
    answer.set()
    for _ in range(MOST_PIPELINED):
        guarded.settle()

    assert guarded.wire.written.count(b"HTTP/1.1 200") == 1 + MOST_PIPELINED


# --- marks, and requests beyond the limit -----------------------------------------------------------------------------


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


@pytest.fixture
def known(guarded: Guarded) -> Guarded:
    """A connection whose caller has been identified."""
    guarded.send(HEAD + b"{}")
    guarded.protocol.note_identified()
    guarded.wire.written = b""
    return guarded


def test_a_request_beyond_the_limit_is_refused_unread_and_its_connection_stays_open(known: Guarded) -> None:
    known.load.running = MOST_AT_ONCE

    known.send(HEAD + b"{}" + HEAD + b"{")
    known.send(b"}")

    assert known.wire.written == OVERLOADED * 2
    assert b"retry-after" in OVERLOADED
    assert known.limits == ["requests"] * 2
    known.after(RECEIVE_SECONDS)
    assert not known.wire.closed
    known.load.running = 0
    known.send(HEAD + b"{}")
    assert known.wire.written.count(b"HTTP/1.1 200") == 1


def test_the_first_request_of_a_connection_is_passed_on_to_be_identified(guarded: Guarded) -> None:
    guarded.load.running = MOST_AT_ONCE

    guarded.send(HEAD + b"{}")

    assert b"HTTP/1.1 200" in guarded.wire.written


def test_health_is_answered_beyond_the_limit(known: Guarded) -> None:
    known.load.running = MOST_AT_ONCE

    known.send(b"GET /livez HTTP/1.1\r\nhost: adapter\r\n\r\n")

    assert b"HTTP/1.1 200" in known.wire.written


def test_a_refused_request_whose_body_does_not_come_is_closed(known: Guarded) -> None:
    known.load.running = MOST_AT_ONCE
    known.send(HEAD)

    known.after(RECEIVE_SECONDS)

    assert known.wire.aborted
    assert known.limits == ["request-time"]


def test_a_caller_that_expects_100_continue_is_refused_at_once(known: Guarded) -> None:
    known.load.running = MOST_AT_ONCE

    known.send(HEAD.replace(b"host", b"expect: 100-continue\r\nhost"))

    assert known.wire.written == OVERLOADED
    assert known.wire.ended


def test_a_refusal_honours_connection_close(known: Guarded) -> None:
    known.load.running = MOST_AT_ONCE

    known.send(HEAD.replace(b"host", b"connection: close\r\nhost") + b"{}")

    assert known.wire.written == OVERLOADED
    assert known.wire.closed


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
CHUNKED = CHUNKED_HEAD + b"2\r\n{}\r\n0\r\n\r\n"


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


def test_many_offers_of_an_upgrade_in_one_packet_are_answered(guarded: Guarded) -> None:
    guarded.send(offering(HEAD + b"{}") * (1 + MOST_PIPELINED))
    for _ in range(MOST_PIPELINED):
        guarded.settle()

    assert guarded.wire.written.count(b"HTTP/1.1 200") == 1 + MOST_PIPELINED
    assert guarded.limits == []


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

    def finish(self, transport: object) -> None:
        assert transport is self
        self.closed = True

    def get_extra_info(self, name: str) -> str:
        return f"the {name} of the connection"


def through(wire: Pieces) -> Any:
    return _HeadBuffer(wire, wire.finish)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("data", [b"HTTP/1.1 100 Continue\r\n\r\n", OVERLOADED, b"0\r\n\r\n", b"anything"])
def test_other_bytes_are_written_at_once(data: bytes) -> None:
    wire = Pieces()

    through(wire).write(data)

    assert wire.pieces == [data]


def test_other_attributes_are_those_of_the_connection() -> None:
    assert through(Pieces()).get_extra_info("peername") == "the peername of the connection"
