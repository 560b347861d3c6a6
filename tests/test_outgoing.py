"""`adapter.outgoing`: hosts, deadlines, and answers as outcomes."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.outgoing import CONNECT_TIMEOUT, MAX_ANSWER_BYTES, Outgoing, origins, retry_after
from adapter.plugin import Misconfigured, Outcome, Reject, Retry, Settings, Unknown, Url

NOON = datetime(2026, 2, 3, 12, 0, tzinfo=UTC)
SHOP = "https://shop.example"
SAFE, UNSAFE = ("GET", "HEAD"), ("POST", "PUT", "PATCH", "DELETE")


class Auth(Settings, frozen=True, kw_only=True):
    token_url: Url


class ShopSettings(Settings, frozen=True, kw_only=True):
    base_url: Url = Url(SHOP)
    name: str = "https://not-an-address-setting.example"
    auth: Auth | None = None
    mirrors: tuple[Url, ...] = ()
    by_country: dict[str, Url] = msgspec.field(default_factory=dict)


class Destination(httpx.AsyncBaseTransport):
    """A transport that answers by a function and remembers the requests."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        self._answer = answer
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self._answer(request)


def answering(status: int = 200, **more: Any) -> Destination:
    return Destination(lambda _request: httpx.Response(status, **more))


def failing(error: Exception) -> Destination:
    def fail(_request: httpx.Request) -> httpx.Response:
        raise error

    return Destination(fail)


def request(
    destination: Destination,
    method: str = "GET",
    url: str = f"{SHOP}/orders/1",
    *,
    settings: Settings | None = None,
    left: timedelta = timedelta(seconds=30),
    **more: Any,
) -> httpx.Response:
    """Send one request, as a handler with only the success path does."""

    async def handler() -> httpx.Response:
        http = Outgoing(destination).client(settings or ShopSettings(), NOON + left, lambda: NOON)
        return (await http.request(method, url, **more)).raise_for_status()

    return asyncio.run(handler())


def outcome(destination: Destination, method: str = "GET", **more: Any) -> Outcome:
    with pytest.raises(Outcome) as raised:
        request(destination, method, **more)
    return raised.value


# --- the table ------------------------------------------------------------------------------------------------------


def test_a_success_is_returned() -> None:
    assert request(answering(201, json={"number": "7"}), "PUT").json() == {"number": "7"}


STATUSES: dict[int, tuple[type[Outcome], type[Outcome]]] = {  # for GET and HEAD, and for other methods
    301: (Reject, Reject),
    302: (Reject, Reject),
    304: (Reject, Reject),
    307: (Reject, Reject),
    400: (Reject, Reject),
    401: (Misconfigured, Misconfigured),
    403: (Misconfigured, Misconfigured),
    404: (Reject, Reject),
    408: (Retry, Retry),
    409: (Reject, Reject),
    413: (Reject, Reject),
    422: (Reject, Reject),
    425: (Retry, Retry),
    429: (Retry, Retry),
    500: (Retry, Unknown),
    502: (Retry, Unknown),
    503: (Retry, Retry),
    504: (Retry, Unknown),
    599: (Retry, Unknown),
}


@pytest.mark.parametrize("method", [*SAFE, *UNSAFE])
@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_an_outcome(status: int, method: str) -> None:
    expected = STATUSES[status][method in UNSAFE]

    raised = outcome(answering(status), method)

    assert type(raised) is expected
    assert raised.message == f"{method} was answered {status}"


@pytest.mark.parametrize("method", [*SAFE, *UNSAFE])
@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout])
def test_a_request_without_a_connection_is_a_retry(error: type[httpx.TransportError], method: str) -> None:
    raised = outcome(failing(error("canary 10.0.0.1")), method)

    assert (type(raised), raised.code) == (Retry, "destination-unreachable")
    assert "canary" not in str(raised)


LOST = [httpx.ReadTimeout, httpx.ReadError, httpx.WriteError, httpx.WriteTimeout, httpx.RemoteProtocolError]


@pytest.mark.parametrize("error", LOST)
@pytest.mark.parametrize(
    ("method", "expected"), [*((each, Retry) for each in SAFE), *((each, Unknown) for each in UNSAFE)]
)
def test_a_write_without_an_answer_is_unknown_and_a_read_is_a_retry(
    error: type[httpx.TransportError], method: str, expected: type[Outcome]
) -> None:
    raised = outcome(failing(error("canary")), method)

    assert (type(raised), raised.code) == (expected, "destination-no-answer")
    assert "canary" not in str(raised)


class BreaksOff(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'{"number": '
        raise httpx.ReadError("the connection was reset")


@pytest.mark.parametrize(("method", "expected"), [("GET", Retry), ("PUT", Unknown)])
def test_an_incomplete_answer_is_no_answer(method: str, expected: type[Outcome]) -> None:
    assert type(outcome(answering(200, stream=BreaksOff()), method)) is expected


class Chunks(httpx.AsyncByteStream):
    """A body of unknown length."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.sent = count, size, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.count):
            self.sent += 1
            yield b"x" * self.size


@pytest.mark.parametrize(("method", "expected"), [("GET", Retry), ("PUT", Unknown)])
def test_an_endless_answer_is_cut_off_after_a_mebibyte(method: str, expected: type[Outcome]) -> None:
    chunks = Chunks(count=1000, size=65536)

    raised = outcome(answering(200, stream=chunks), method)

    assert type(raised) is expected
    assert chunks.sent == MAX_ANSWER_BYTES // 65536 + 1


def test_an_answer_of_a_mebibyte_is_read() -> None:
    answer = request(answering(200, stream=Chunks(count=16, size=65536)))

    assert len(answer.content) == MAX_ANSWER_BYTES


def test_compression_is_neither_requested_nor_accepted() -> None:
    bomb = gzip.compress(b"0" * 50_000_000)
    destination = answering(200, content=bomb, headers={"content-encoding": "gzip"})

    raised = outcome(destination, "PUT")

    assert type(raised) is Unknown
    assert destination.requests[0].headers["accept-encoding"] == "identity"


# --- Retry-After ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        pytest.param("120", 120, id="seconds"),
        pytest.param(" 120 ", 120, id="seconds and spaces"),
        pytest.param("0", 0, id="none"),
        pytest.param("9" * 30, 10_000_000, id="for ever"),
        pytest.param("9" * 5000, None, id="a number with too many digits"),
        pytest.param("Tue, 03 Feb 2026 12:01:30 GMT", 90, id="a date"),
        pytest.param("Tue, 03 Feb 2026 12:01:30", 90, id="a date without a zone"),
        pytest.param("Tue, 03 Feb 2026 11:00:00 GMT", 0, id="a date that has passed"),
        pytest.param("soon", None, id="a word"),
        pytest.param("", None, id="nothing"),
        pytest.param("-5", None, id="a negative number"),
        pytest.param("1.5", None, id="a fraction"),
        pytest.param("²", None, id="a digit that is no number"),
        pytest.param("Tue, 99 Feb 2026 12:01:30 GMT", None, id="a date that is none"),
        pytest.param(None, None, id="no header"),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: int | None) -> None:
    after = retry_after(value, NOON)

    assert after == (None if seconds is None else timedelta(seconds=seconds))


@given(st.text(max_size=40) | st.datetimes(timezones=st.just(UTC)).map(format_datetime))
def test_any_retry_after_is_a_delay_or_none(value: str) -> None:
    after = retry_after(value, NOON)

    assert after is None or after >= timedelta(0)


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_a_busy_destination_delays_the_retry(status: int) -> None:
    raised = outcome(answering(status, headers={"retry-after": "120"}), "PUT")

    assert isinstance(raised, Retry)
    assert raised.after == timedelta(seconds=120)


# --- hosts ----------------------------------------------------------------------------------------------------------


def test_the_origins_are_those_of_every_url_in_the_settings() -> None:
    settings = ShopSettings(
        auth=Auth(token_url=Url("https://login.example:8443/token")),
        mirrors=(Url("https://mirror.example"),),
        by_country={"NO": Url("http://127.0.0.1:9000")},
    )

    assert origins(settings) == {
        ("https", "shop.example", 443),
        ("https", "login.example", 8443),
        ("https", "mirror.example", 443),
        ("http", "127.0.0.1", 9000),
    }


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/orders",
        "https://sub.shop.example/orders",
        "https://shop.example.evil.example/",
        "https://shop.example@evil.example/",
        "https://shop.example:8443/",
        "http://shop.example/",
        "http://169.254.169.254/latest/meta-data",
        "https://not-an-address-setting.example/",
    ],
)
def test_a_host_that_is_not_in_the_settings_is_not_reached(url: str) -> None:
    destination = answering()

    raised = outcome(destination, url=url)

    assert (type(raised), raised.code) == (Misconfigured, "host-not-allowed")
    assert destination.requests == []


@pytest.mark.parametrize(
    ("declared", "called"),
    [
        ("https://shop.example", "https://shop.example:443/orders"),
        ("https://Shop.Example/api", "https://shop.example/orders"),
        ("https://fjällboden.example", "https://fjällboden.example/orders"),
        ("https://fjällboden.example", "https://xn--fjllboden-w2a.example/orders"),
        ("https://xn--fjllboden-w2a.example", "https://xn--fjllboden-w2a.example/orders"),
        ("http://[::1]:9000", "http://[::1]:9000/orders"),
    ],
)
def test_a_host_is_recognised_in_every_spelling(declared: str, called: str) -> None:
    destination = answering()

    request(destination, url=called, settings=ShopSettings(base_url=Url(declared)))

    assert len(destination.requests) == 1


def test_a_redirect_is_not_followed() -> None:
    destination = answering(302, headers={"location": "https://evil.example/"})

    raised = outcome(destination, "GET")

    assert (type(raised), len(destination.requests)) == (Reject, 1)


def test_the_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    destination = answering()

    request(destination)

    assert len(destination.requests) == 1


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "read", "connect"),
    [
        (timedelta(seconds=30), 29.9, CONNECT_TIMEOUT.total_seconds()),
        (timedelta(seconds=2), 1.9, 1.9),
    ],
    ids=["long", "short"],
)
def test_a_request_ends_before_the_deadline(left: timedelta, read: float, connect: float) -> None:
    destination = answering()

    request(destination, left=left, timeout=3600)

    timeout = destination.requests[0].extensions["timeout"]
    assert timeout == pytest.approx({"connect": connect, "pool": connect, "read": read, "write": read})


@pytest.mark.parametrize("left", [timedelta(milliseconds=100), timedelta(0), timedelta(seconds=-5)], ids=str)
def test_nothing_is_sent_after_the_deadline(left: timedelta) -> None:
    destination = answering()

    raised = outcome(destination, "PUT", left=left)

    assert (type(raised), raised.code) == (Retry, "no-time-left")
    assert destination.requests == []


def test_the_connections_outlive_the_client_of_one_call() -> None:
    closed: list[str] = []

    class Connections(Destination):
        async def aclose(self) -> None:
            closed.append("closed")

    async def two_calls() -> None:
        outgoing = Outgoing(Connections(lambda _request: httpx.Response(200)))
        for _ in range(2):
            await outgoing.client(ShopSettings(), NOON + timedelta(seconds=30), lambda: NOON).get(SHOP)
        assert closed == []
        await outgoing.aclose()

    work: Coroutine[Any, Any, None] = two_calls()
    asyncio.run(work)

    assert closed == ["closed"]


@pytest.mark.parametrize(
    ("readings", "outcome", "code", "arrived"),
    [
        pytest.param(1, Retry, "no-time-left", b"", id="before-the-head"),
        pytest.param(2, Unknown, "destination-no-answer", b"PUT /orders/1 HTTP/1.1", id="before-the-body"),
    ],
)
def test_a_process_that_was_suspended_past_the_deadline_sends_nothing(
    readings: int, outcome: type[Outcome], code: str, arrived: bytes
) -> None:
    """Send a request over TCP. After so many readings, the clock is past the deadline."""
    read: list[bytes] = []

    async def destination(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        read.append(await reader.read())
        writer.close()
        await writer.wait_closed()
        gone.set()

    gone = asyncio.Event()

    async def handler() -> Outcome:
        moments = iter([NOON] * readings)
        server = await asyncio.start_server(destination, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            outgoing = Outgoing()
            late = NOON + timedelta(minutes=1)
            http = outgoing.client(
                ShopSettings(base_url=Url(url)), NOON + timedelta(seconds=1), lambda: next(moments, late)
            )
            with pytest.raises(Outcome) as raised:
                await http.put(f"{url}/orders/1", content=b"an order")
            await outgoing.aclose()
            await gone.wait()
        return raised.value

    raised = asyncio.run(handler())

    assert (type(raised), raised.code) == (outcome, code)
    assert b"an order" not in b"".join(read)
    assert b"".join(read).startswith(arrived)
