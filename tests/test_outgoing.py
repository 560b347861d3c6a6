"""`adapter.outgoing`: hosts, deadlines, and answers as outcomes."""

import asyncio
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.config.json_schema import changeable
from adapter.orders import Order, read_order
from adapter.outgoing import CONNECT_TIMEOUT, MAX_ANSWER_BYTES, Outgoing, Traffic, origins, retry_after
from adapter.plugin import (
    ClientCertificate,
    Misconfigured,
    Outcome,
    PrivateCa,
    Reject,
    Retry,
    Secret,
    Settings,
    Unknown,
    Url,
)
from tests import ROOT
from tests.asynchronous import asynchronous
from tests.scripted_server import Script, ScriptedServer, without_end

NOON = datetime(2026, 2, 3, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
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
    traffic: Traffic | None = None,
    **more: Any,
) -> httpx.Response:
    """Send one request, as a handler with only the success path does."""

    async def handler() -> httpx.Response:
        http = Outgoing(destination).client(settings or ShopSettings(), NOON + left, lambda: NOON, traffic or Traffic())
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
    408: (Retry, Unknown),
    409: (Reject, Reject),
    413: (Reject, Reject),
    422: (Reject, Reject),
    425: (Retry, Retry),
    429: (Retry, Retry),
    500: (Retry, Unknown),
    502: (Retry, Unknown),
    503: (Retry, Unknown),
    504: (Retry, Unknown),
    599: (Retry, Unknown),
}


@pytest.mark.parametrize("method", [*SAFE, *UNSAFE])
@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_an_outcome(status: int, method: str) -> None:
    expected = STATUSES[status][method in UNSAFE]

    raised = outcome(answering(status), method)

    assert type(raised) is expected
    assert raised.message == f"{method} /orders/… was answered {status}"
    assert (raised.host, raised.status) == ("shop.example", status)


@pytest.mark.parametrize("status", [408, 502, 503, 504])
def test_a_status_that_never_follows_an_effect_is_a_retry(status: int) -> None:
    declared = Traffic(not_done={status})

    assert type(outcome(answering(status), "POST", traffic=declared)) is Retry
    assert type(outcome(answering(599), "POST", traffic=declared)) is Unknown


def test_a_status_that_never_follows_an_effect_is_declared_for_one_request() -> None:
    traffic, declared = Traffic(), {"not_done": {503}}

    assert type(outcome(answering(503), "POST", traffic=traffic, extensions=declared)) is Retry
    assert traffic.unanswered == 0
    assert type(outcome(answering(503), "POST", traffic=traffic)) is Unknown
    assert traffic.unanswered == 1


@pytest.mark.parametrize("status", [408, 500, 502, 503])
def test_a_request_that_is_marked_as_no_write_is_retried(status: int) -> None:
    """Such as a request for a token."""
    traffic = Traffic()

    raised = outcome(answering(status), "POST", traffic=traffic, extensions={"write": False})

    assert (type(raised), traffic.close()) == (Retry, False)


# --- the writes of an attempt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SAFE)
def test_a_read_is_no_write(method: str) -> None:
    traffic = Traffic()

    request(answering(200), method, traffic=traffic)

    assert (traffic.close(), traffic.succeeded) == (False, False)


@pytest.mark.parametrize(("status", "succeeded"), [(200, True), (204, True), (303, True), (422, False), (503, False)])
@pytest.mark.parametrize("method", UNSAFE)
def test_a_write_went_out_and_succeeded_unless_it_was_refused(method: str, status: int, succeeded: bool) -> None:
    traffic = Traffic()

    with suppress(Outcome):
        request(answering(status), method, traffic=traffic)

    assert (traffic.close(), traffic.succeeded) == (True, succeeded)


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout])
def test_a_write_without_a_connection_did_not_go_out(error: type[httpx.TransportError]) -> None:
    traffic = Traffic()

    outcome(failing(error("")), "POST", traffic=traffic)

    assert not traffic.close()


def test_a_write_that_could_not_be_sent_leaves_an_earlier_one() -> None:
    traffic = Traffic()

    request(answering(200), "POST", traffic=traffic)
    outcome(failing(httpx.ConnectError("")), "POST", traffic=traffic)

    assert traffic.close()


def test_no_write_begins_after_the_attempt_has_been_judged() -> None:
    """A task that a handler left behind must not act after its delivery has been given to another attempt."""
    traffic, destination = Traffic(), answering(200)
    assert not traffic.close()

    assert outcome(destination, "POST", traffic=traffic).code == "attempt-ended"
    assert destination.requests == []
    request(destination, "GET", traffic=traffic)


@asynchronous
async def test_a_write_that_is_cancelled_while_it_connects_did_not_go_out() -> None:
    steps: list[str] = []

    class Connecting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await request.extensions["trace"]("connection.connect_tcp.started", {})
            steps.append("connects")
            await asyncio.Event().wait()
            raise AssertionError

    traffic = Traffic()
    http = Outgoing(Connecting()).client(ShopSettings(), NOON + timedelta(seconds=30), lambda: NOON, traffic)
    writing = asyncio.create_task(http.post(SHOP))
    while not steps:  # noqa: ASYNC110
        await asyncio.sleep(0)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)

    assert not traffic.close()


@asynchronous
async def test_a_write_that_comes_too_late_for_its_open_connection_did_not_go_out() -> None:
    moments = iter([NOON])

    class Open(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await request.extensions["trace"]("http11.send_request_headers.started", {})
            raise AssertionError

    traffic = Traffic()
    http = Outgoing(Open()).client(ShopSettings(), NOON + SECOND, lambda: next(moments, NOON + SECOND), traffic)
    with pytest.raises(Retry, match="no-time-left"):
        await http.post(SHOP)

    assert not traffic.close()


@pytest.mark.parametrize(("sends", "out"), [(b"", False), (b"order", True)], ids=["refused", "read and dropped"])
def test_over_tcp_a_write_went_out_only_if_something_was_sent(sends: bytes, out: bool) -> None:
    traffic = Traffic()

    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async def handler() -> None:
        server = await asyncio.start_server(drop, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        if not sends:
            server.close()
            await server.wait_closed()
        outgoing = Outgoing()
        http = outgoing.client(ShopSettings(base_url=Url(url)), NOON + timedelta(seconds=30), lambda: NOON, traffic)
        with pytest.raises(Outcome):
            await http.post(url, content=sends)
        await outgoing.aclose()
        server.close()

    asyncio.run(handler())

    assert traffic.close() is out


def test_a_request_that_is_not_http_is_a_bug_and_did_not_go_out() -> None:
    traffic = Traffic()

    async def handler() -> None:
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            outgoing = Outgoing()
            http = outgoing.client(ShopSettings(base_url=Url(url)), NOON + timedelta(seconds=30), lambda: NOON, traffic)
            with pytest.raises(httpx.LocalProtocolError):
                await http.post(url, headers={"idempotency-key": "a\nb"})
            await outgoing.aclose()

    asyncio.run(handler())

    assert not traffic.close()


# --- what a message shows -------------------------------------------------------------------------------------------

PATHS = {
    "words": ("/api/v2/invoices", "/api/v2/invoices"),
    "an order's id": ("/orders/100245", "/orders/…"),
    "a uuid": ("/orders/0d0c3f0a-57a5-4d7a-9a2b-7a3d0e4f4b11/lines", "/orders/…/lines"),
    "an e-mail address": ("/customers/anna%40shop.example", "/customers/…"),
    "a query": ("/invoices?ssn=19811218-9876", "/invoices"),
    "a value of the order": ("/customers/svensson/orders", "/customers/…/orders"),
    "words of values": ("/customers/anna-svensson", "/customers/…"),
    "a value in another case": ("/customers/SVENSSON", "/customers/…"),
    "letters beyond ASCII": ("/kunder/%C3%85sa", "/kunder/…"),
    "a version": ("/v1/rest.php/sales_order", "/v1/rest.php/sales_order"),
    "the root": ("/", "/"),
}


@pytest.mark.parametrize(("path", "shown"), PATHS.values(), ids=PATHS)
def test_a_message_names_the_request_without_its_query_and_values(path: str, shown: str) -> None:
    traffic = Traffic()
    traffic.order = read_order(
        b'{"id": "o-1", "customer": {"billing": {"givenName": "Anna", "familyName": "Svensson "}},'
        b' "notifications": [{"invoke": "https://adapter.example/api/v1/callbacks/orders/o-1"}]}'
    )

    assert outcome(answering(422), "POST", url=SHOP + path, traffic=traffic).message == f"POST {shown} was answered 422"
    lost = outcome(failing(httpx.ReadError("")), "POST", url=SHOP + path, traffic=traffic)
    assert lost.message == f"POST {shown} had no answer: ReadError"


@pytest.mark.parametrize("method", [*SAFE, *UNSAFE])
@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout])
def test_a_request_without_a_connection_is_a_retry(error: type[httpx.TransportError], method: str) -> None:
    raised = outcome(failing(error("canary 10.0.0.1")), method)

    assert (type(raised), raised.code) == (Retry, "destination-unreachable")
    assert (raised.host, raised.status) == ("shop.example", None)
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
    assert (raised.host, raised.status) == ("shop.example", None)
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


@pytest.mark.parametrize(("size", "read"), [(2048, True), (2049, False)])
def test_a_route_sets_the_largest_answer(size: int, read: bool) -> None:
    async def handler() -> None:
        outgoing = Outgoing(answering(200, stream=Chunks(count=1, size=size)))
        deadline = NOON + timedelta(seconds=30)
        http = outgoing.client(ShopSettings(), deadline, lambda: NOON, Traffic(), max_answer_bytes=2048)
        with nullcontext() if read else pytest.raises(Retry, match="larger than 2 KiB"):
            assert len((await http.get(SHOP)).content) == size

    asyncio.run(handler())


def test_a_deep_order_does_not_replace_the_outcome() -> None:
    traffic = Traffic()
    data: dict[str, Any] = {"id": "o"}
    for _ in range(5000):
        data = {"id": "o", "attributes": data}
    traffic.order = Order(b"{}", data)

    assert outcome(answering(422), "POST", traffic=traffic).message == "POST /orders/… was answered 422"


STATUSES_KEPT = [200, 401, 422, 429]
BODY = b'{"number": "7"}'
ENCODED = {
    "none": ("", BODY),
    "identity": ("identity", BODY),
    "identity in another case": ("Identity", BODY),
    "a character set": ("UTF-8", BODY),
    "a comma": (" , identity", BODY),
    "gzip": ("gzip", gzip.compress(BODY)),
    "gzip in another case": ("GZIP", gzip.compress(BODY)),
    "x-gzip": ("x-gzip", gzip.compress(BODY)),
    "gzip of nothing": ("gzip", b""),
}


@pytest.mark.parametrize("status", STATUSES_KEPT)
@pytest.mark.parametrize(("coding", "body"), ENCODED.values(), ids=ENCODED)
def test_an_answer_keeps_its_status_and_body_with_any_content_encoding(coding: str, body: bytes, status: int) -> None:
    answers: list[httpx.Response] = []

    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, stream=httpx.ByteStream(body), headers={"content-encoding": coding})

    async def handler() -> None:
        http = Outgoing(Destination(answer)).client(ShopSettings(), NOON + timedelta(30), lambda: NOON, Traffic())
        answers.append(await http.post(f"{SHOP}/orders"))

    asyncio.run(handler())

    assert (answers[0].status_code, answers[0].content) == (status, BODY if body else b"")
    assert "content-encoding" not in answers[0].headers


UNREADABLE = {
    "br": ("br", b"\x0b\x02\x80"),
    "deflate": ("deflate", zlib.compress(BODY)),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(BODY))),
    "not gzip": ("gzip", BODY),
    "cut off": ("gzip", gzip.compress(BODY)[:-4]),
    "more after it": ("gzip", gzip.compress(BODY) + b"more"),
    "a bomb": ("gzip", gzip.compress(b"0" * 50_000_000)),
}


@pytest.mark.parametrize(("coding", "body"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_body_that_cannot_be_read_is_no_answer_only_with_2xx(coding: str, body: bytes) -> None:
    def after(status: int, method: str) -> type[Outcome]:
        stream = httpx.ByteStream(body)
        return type(outcome(answering(status, stream=stream, headers={"content-encoding": coding}), method))

    assert (after(200, "POST"), after(200, "GET")) == (Unknown, Retry)
    assert [after(status, "POST") for status in STATUSES_KEPT[1:]] == [Misconfigured, Reject, Retry]


@pytest.mark.parametrize(("status", "expected"), [(401, Misconfigured), (422, Reject), (503, Unknown)])
def test_a_status_counts_although_its_body_breaks_off(status: int, expected: type[Outcome]) -> None:
    assert type(outcome(answering(status, stream=BreaksOff()), "POST")) is expected


def test_compression_is_not_requested() -> None:
    destination = answering(200)

    request(destination, "PUT")

    assert destination.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "page", [b"<html>Maintenance</html>", b"", b"\xff", b"[" * 100_000], ids=["page", "empty", "not UTF-8", "deep"]
)
@pytest.mark.parametrize(("method", "expected"), [("GET", Retry), ("PUT", Unknown)])
def test_a_page_in_place_of_json_is_no_answer(method: str, expected: type[Outcome], page: bytes) -> None:
    with pytest.raises(Outcome) as raised:
        request(answering(200, content=page), method).json()

    assert (type(raised.value), raised.value.code) == (expected, "destination-no-answer")


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


@pytest.mark.parametrize(
    ("status", "expected"), [(408, Unknown), (425, Retry), (429, Retry), (500, Unknown), (503, Unknown)]
)
def test_a_busy_destination_delays_the_next_attempt(status: int, expected: type[Outcome]) -> None:
    raised = outcome(answering(status, headers={"retry-after": "120"}), "PUT")

    assert type(raised) is expected
    assert isinstance(raised, Retry | Unknown)
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


# --- private networks -------------------------------------------------------------------------------------------------


class ErpSettings(Settings, frozen=True, kw_only=True):
    base_url: Url
    ca: PrivateCa | None = None
    certificate: ClientCertificate | None = None


TLS = ROOT / "tests" / "tls"
CA = PrivateCa((TLS / "ca.pem").read_text("ascii"))
OURS = ClientCertificate(
    certificate=(TLS / "client.pem").read_text("ascii"), key=Secret((TLS / "client.key").read_text("ascii"))
)


@pytest.mark.parametrize(
    ("given", "asks", "answered"),
    [
        ({}, False, "ConnectError"),
        ({"ca": CA}, False, "200, no certificate"),
        ({"ca": CA}, True, "ReadError"),
        ({"ca": CA, "certificate": OURS}, True, "200, test client"),
    ],
    ids=["public authorities only", "a private authority", "no certificate", "a client certificate"],
)
@asynchronous
async def test_a_handler_has_its_own_authorities_and_certificate(
    given: dict[str, Any], asks: bool, answered: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            subject = (writer.get_extra_info("peercert") or {}).get("subject", ((("", "no certificate"),),))
            name = subject[0][0][1].encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(name), name))
            await writer.drain()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=CA)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED if asks else ssl.CERT_NONE
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        outgoing, settings = Outgoing(), ErpSettings(base_url=Url(url), **given)
        http = outgoing.client(settings, NOON + timedelta(minutes=1), lambda: NOON, Traffic())
        try:
            response = await http.get(url)
            seen = f"{response.status_code}, {response.text}"
        except Retry as error:
            seen = error.message
        await outgoing.aclose()

    assert answered in seen or (answered == "ReadError" and "had no answer" in seen)


def test_other_handlers_keep_their_connections() -> None:
    async def work() -> list[bool]:
        outgoing, url = Outgoing(), Url(SHOP)
        own = ErpSettings(base_url=url, ca=CA), ErpSettings(base_url=url, ca=CA, certificate=OURS)
        transports = [outgoing._connections(each) for each in (ShopSettings(), ErpSettings(base_url=url), *own, own[0])]
        await outgoing.aclose()
        return [each is transports[0] for each in transports] + [
            transports[2] is transports[4],
            transports[2] is transports[3],
        ]

    assert asyncio.run(work()) == [True, True, False, False, False, True, False]


def test_norce_may_not_change_whom_a_handler_trusts() -> None:
    assert changeable(ErpSettings) == frozenset()


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


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, (5, 29.9, 29.9, 5)),
        ({"timeout": None}, (5, 29.9, 29.9, 5)),
        ({"timeout": 2}, (2, 2, 2, 2)),
        ({"timeout": 9}, (5, 9, 9, 5)),
        ({"timeout": httpx.Timeout(3, read=60, connect=None)}, (5, 29.9, 3, 3)),
    ],
    ids=["the default", "none", "shorter", "longer than a connection may take", "for each step"],
)
def test_a_shorter_timeout_of_a_request_counts(given: dict[str, Any], steps: tuple[float, ...]) -> None:
    destination = answering()

    request(destination, **given)

    timeout = destination.requests[0].extensions["timeout"]
    assert timeout == pytest.approx(dict(zip(("connect", "read", "write", "pool"), steps, strict=True)))


@pytest.mark.parametrize(("method", "expected"), [("GET", Retry), ("PUT", Unknown)])
@asynchronous
async def test_an_answer_that_comes_later_than_the_timeout_is_no_answer(method: str, expected: type[Outcome]) -> None:
    silent = asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.close()

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    outgoing = Outgoing()
    http = outgoing.client(ShopSettings(base_url=Url(url)), NOON + timedelta(days=1), lambda: NOON, Traffic())
    with pytest.raises(expected, match="ReadTimeout"):
        await http.request(method, url, timeout=httpx.Timeout(None, read=0.01))
    await outgoing.aclose()
    silent.set()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("left", [timedelta(milliseconds=100), timedelta(0), timedelta(seconds=-5)], ids=str)
def test_nothing_is_sent_after_the_deadline(left: timedelta) -> None:
    destination = answering()

    raised = outcome(destination, "PUT", left=left)

    assert (type(raised), raised.code) == (Retry, "no-time-left")
    assert destination.requests == []


HEAD_OF_CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
SLOW = {
    "in its head": (without_end(b"HTTP/1.1 200 ", b"O"), None),
    "in its body": (without_end(HEAD_OF_CHUNKS + b"fffff\r\n", b"x"), None),
    "in a chunk line": (without_end(HEAD_OF_CHUNKS + b"1;", b"a"), None),
    "in its trailers": (without_end(HEAD_OF_CHUNKS + b"0\r\na: ", b"a"), None),
    "in the body of an error": (without_end(b"HTTP/1.1 422 No\r\ncontent-length: 999999\r\n\r\n", b"x"), 422),
}


@pytest.mark.parametrize(("method", "expected"), [("GET", Retry), ("PUT", Unknown)])
@pytest.mark.parametrize(("script", "status"), SLOW.values(), ids=SLOW)
@asynchronous
async def test_an_answer_that_comes_byte_by_byte_ends_at_the_deadline(
    script: Script, status: int | None, method: str, expected: type[Outcome]
) -> None:
    """The time between two bytes is short, so a limit on each read would never be reached."""
    async with ScriptedServer(script).listening() as server:
        outgoing, settings = Outgoing(), ShopSettings(base_url=Url(server.url))
        http = outgoing.client(settings, NOON + timedelta(milliseconds=200), lambda: NOON, Traffic())
        with pytest.raises(Outcome) as raised:
            (await http.request(method, server.url)).raise_for_status()
        await outgoing.aclose()

    outcome = raised.value
    assert (type(outcome), outcome.status) == (expected if status is None else Reject, status)


@pytest.mark.parametrize(("method", "expected"), [("GET", Retry), ("PUT", Unknown)])
@asynchronous
async def test_an_answer_without_end_before_its_body_is_no_answer(method: str, expected: type[Outcome]) -> None:
    async with ScriptedServer(without_end(b"", b"HTTP/1.1 102 Processing\r\n\r\n")).listening() as server:
        outgoing, settings = Outgoing(), ShopSettings(base_url=Url(server.url))
        http = outgoing.client(settings, NOON + timedelta(days=1), lambda: NOON, Traffic())
        with pytest.raises(expected, match="RemoteProtocolError"):
            await http.request(method, server.url)
        await outgoing.aclose()


def test_a_write_that_cannot_connect_before_the_deadline_did_not_go_out() -> None:
    class Connecting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await request.extensions["trace"]("connection.connect_tcp.started", {})
            await asyncio.Event().wait()
            raise AssertionError

    traffic = Traffic()
    raised = outcome(Connecting(), "PUT", left=timedelta(milliseconds=150), traffic=traffic)  # type: ignore[arg-type]

    assert (type(raised), raised.code) == (Retry, "destination-unreachable")
    assert not traffic.close()


def test_the_connections_outlive_the_client_of_one_call() -> None:
    closed: list[str] = []

    class Connections(Destination):
        async def aclose(self) -> None:
            closed.append("closed")

    async def two_calls() -> None:
        outgoing = Outgoing(Connections(lambda _request: httpx.Response(200)))
        for _ in range(2):
            http = outgoing.client(ShopSettings(), NOON + timedelta(seconds=30), lambda: NOON, Traffic())
            await http.get(SHOP)
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

    gone, traffic = asyncio.Event(), Traffic()

    async def handler() -> Outcome:
        moments = iter([NOON] * readings)
        server = await asyncio.start_server(destination, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            outgoing = Outgoing()
            late = NOON + timedelta(minutes=1)
            http = outgoing.client(
                ShopSettings(base_url=Url(url)), NOON + timedelta(seconds=1), lambda: next(moments, late), traffic
            )
            with pytest.raises(Outcome) as raised:
                await http.put(f"{url}/orders/1", content=b"an order")
            await outgoing.aclose()
            await gone.wait()
        return raised.value

    raised = asyncio.run(handler())

    assert (type(raised), raised.code, traffic.close()) == (outcome, code, arrived != b"")
    assert b"an order" not in b"".join(read)
    assert b"".join(read).startswith(arrived)


# --- what a refusal says --------------------------------------------------------------------------------------------


def reason_of(answer: httpx.Response) -> str | None:
    return answer.json()["reason"]  # type: ignore[no-any-return]


EXPLAINED: dict[str, tuple[dict[str, Any], str | None]] = {
    "a reason": ({"json": {"reason": "unknown article"}}, "unknown article"),
    "a long reason": ({"json": {"reason": "x" * 300}}, "x" * 200),
    "several lines": ({"json": {"reason": "no\n\x00stock "}}, "no  stock"),
    "no reason": ({"json": {"reason": None}}, None),
    "an empty reason": ({"json": {"reason": " "}}, None),
    "another type": ({"json": {"reason": ["canary"]}}, None),
    "another body": ({"content": b"<html>canary"}, None),
    "no body": ({}, None),
}


@pytest.mark.parametrize(("answer", "explained"), EXPLAINED.values(), ids=EXPLAINED)
@pytest.mark.parametrize(("status", "expected"), [(422, Reject), (401, Misconfigured), (500, Unknown)])
def test_an_outcome_has_the_explanation_of_the_handler(
    answer: dict[str, Any], explained: str | None, status: int, expected: type[Outcome]
) -> None:
    raised = outcome(answering(status, **answer), "POST", traffic=Traffic(explain=reason_of))

    assert (type(raised), raised.explanation) == (expected, explained)
    assert raised.message == f"POST /orders/… was answered {status}"
    assert outcome(answering(status, **answer), "POST").explanation is None


# --- JSON that is sent ----------------------------------------------------------------------------------------------


class Name(str):
    """A text of another type, as a `Url` is."""


JSON_SENT = {
    "money": (
        {"total": Decimal("1234.50"), "sum": [Decimal("0.1"), Decimal("-0.00")]},
        b'{"total":1234.50,"sum":[0.1,-0.00]}',
    ),
    "more digits than a float has": (Decimal("12345678901234567890.123456789"), b"12345678901234567890.123456789"),
    "an exponent": ([Decimal("1E+2")], b"[1E+2]"),
    "other types beside it": (
        {"url": Url(SHOP), "name": Name("\u00e5"), "pair": (1, None), 3: True, "amount": Decimal(1)},
        '{"url":"https://shop.example","name":"\u00e5","pair":[1,null],"3":true,"amount":1}'.encode(),
    ),
    "no decimal": (
        {"name": "\u00e5", "price": 0.1, "many": 1e16},
        '{"name":"\u00e5","price":0.1,"many":1e+16}'.encode(),
    ),
}


@pytest.mark.parametrize(("value", "written"), JSON_SENT.values(), ids=JSON_SENT)
def test_json_is_written_exactly(value: Any, written: bytes) -> None:
    destination = answering()

    request(destination, "POST", json=value)

    sent = destination.requests[0]
    assert sent.content == written
    assert (sent.headers["content-type"], sent.headers["content-length"]) == ("application/json", str(len(written)))


def test_the_content_type_of_a_handler_is_kept() -> None:
    destination = answering()

    request(destination, "POST", json={"total": Decimal(1)}, headers={"content-type": "application/hal+json"})
    request(destination, "POST", json=None)

    assert [each.headers.get("content-type") for each in destination.requests] == ["application/hal+json", None]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (Decimal("NaN"), ValueError),
        ([Decimal("Infinity")], ValueError),
        ([Decimal(1), float("nan")], ValueError),
        ([Decimal(1), b"bytes"], TypeError),
        ([Decimal(1), Secret("canary")], TypeError),
        ([Decimal(1), read_order(b'{"id": "canary"}')], TypeError),
    ],
    ids=["no number", "infinite", "a float that is no number", "bytes", "a secret", "an order"],
)
def test_nothing_is_sent_that_is_not_json(value: Any, error: type[Exception]) -> None:
    destination = answering()

    with pytest.raises(error) as raised:
        request(destination, "POST", json=value)

    assert destination.requests == []
    assert "canary" not in str(raised.value)
