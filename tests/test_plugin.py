"""`adapter.plugin`: settings, secrets, outcomes, keys and handler classes."""

import asyncio
import copy
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar

import httpx
import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

import adapter.plugin
from adapter.orders import Order, read_order
from adapter.plugin import (
    MAX_CODE_LENGTH,
    ClientCertificate,
    Context,
    Done,
    Misconfigured,
    NoSettings,
    Notification,
    NotificationHandler,
    Orders,
    Outcome,
    Patch,
    PlainUrl,
    PrivateCa,
    Problem,
    Refuse,
    Reject,
    Retry,
    Secret,
    Settings,
    Skip,
    Unknown,
    Url,
    ValidationHandler,
    can_look_up,
)
from tests import ROOT

NOON = datetime(2026, 2, 3, 12, 0, tzinfo=UTC)
CANARY = "canary-19811218"


# --- the public names -----------------------------------------------------------------------------------------------


def test_the_changelog_lists_every_public_name() -> None:
    """A name that is added or removed is a change that plugin authors read about."""
    ((listed,),) = [re.findall(r"- `adapter\.plugin` exports ([^.]+)\.", (ROOT / "CHANGELOG.md").read_text("utf-8"))]

    assert re.findall(r"`(\w+)`", listed) == adapter.plugin.__all__
    assert all(hasattr(adapter.plugin, name) for name in adapter.plugin.__all__)


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept", "origin"),
    [
        ("https://shop.example", "https://shop.example", ("https", "shop.example", 443)),
        ("https://shop.example/", "https://shop.example", ("https", "shop.example", 443)),
        ("https://shop.example/api/v1/", "https://shop.example/api/v1", ("https", "shop.example", 443)),
        ("https://shop.example:8443/api", "https://shop.example:8443/api", ("https", "shop.example", 8443)),
        ("https://shop.example:65535", "https://shop.example:65535", ("https", "shop.example", 65535)),
        ("https://Shop.Example", "https://Shop.Example", ("https", "shop.example", 443)),
        ("https://fjällboden.example", "https://fjällboden.example", ("https", "xn--fjllboden-w2a.example", 443)),
        ("https://shop.example/@people", "https://shop.example/@people", ("https", "shop.example", 443)),
        ("http://localhost:9000", "http://localhost:9000", ("http", "localhost", 9000)),
        ("http://127.0.0.1", "http://127.0.0.1", ("http", "127.0.0.1", 80)),
        ("http://[::1]:9000/", "http://[::1]:9000", ("http", "::1", 9000)),
    ],
)
def test_an_address_is_https_or_loopback(text: str, kept: str, origin: tuple[str, str, int]) -> None:
    url = Url(text)

    assert (url, url.origin) == (kept, origin)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shop.example",
        "//shop.example",
        "https://",
        "https:///orders",
        "http://shop.example",
        "http://127.0.0.2",
        "http://localhost.example",
        "http://2130706433",
        "ftp://shop.example",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://user@shop.example",
        "https://user:password@shop.example",
        "https://@shop.example",
        "https://shop.example\\@evil.example",
        "https://shop.example?a=b",
        "https://shop.example?",
        "https://shop.example#a",
        "https://shop.example#",
        "https://shop.example:0",
        "https://shop.example:99999",
        "https://shop.example:port",
        "https://[::1",
        " https://shop.example",
        "https://shop.example ",
        "https://shop.example\n",
        "https://shop .example",
        "https://shop.example/a\tb",
    ],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"address"):
        Url(text)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("http://erp.internal:8080/api", ("http", "erp.internal", 8080)),
        ("http://10.1.2.3", ("http", "10.1.2.3", 80)),
        ("https://erp.internal", ("https", "erp.internal", 443)),
    ],
)
def test_a_plain_address_may_be_http_on_any_host(text: str, origin: tuple[str, str, int]) -> None:
    url = PlainUrl(text)

    assert (url, url.origin, isinstance(url, Url)) == (text, origin, True)


@pytest.mark.parametrize(
    "text", ["ftp://erp.internal", "erp.internal", "http://a:b@erp.internal", "http://erp.internal?a"]
)
def test_a_plain_address_is_still_an_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"address"):
        PlainUrl(text)


# --- certificates -----------------------------------------------------------------------------------------------------


def tls(name: str) -> str:
    return (ROOT / "tests" / "tls" / name).read_text("ascii")


def test_certificates_are_checked_when_they_are_read() -> None:
    assert PrivateCa(tls("ca.pem")) == tls("ca.pem")
    ClientCertificate(certificate=tls("client.pem"), key=Secret(tls("client.key")))


@pytest.mark.parametrize(
    "pem", ["", "/etc/ssl/ca.pem", "-----BEGIN CERTIFICATE-----\ncanary\n-----END CERTIFICATE-----", "å"]
)
def test_a_text_that_holds_no_authority_is_refused(pem: str) -> None:
    with pytest.raises(ValueError, match=r"^must be certificates in PEM$"):
        PrivateCa(pem)


ENCRYPTED = """-----BEGIN ENCRYPTED PRIVATE KEY-----
canary
-----END ENCRYPTED PRIVATE KEY-----"""


@pytest.mark.parametrize(
    ("certificate", "key"),
    [("client.pem", "server.key"), ("client.key", "client.key"), ("client.pem", None)],
    ids=["of another", "no certificate", "not readable"],
)
def test_a_certificate_without_its_key_is_refused(certificate: str, key: str | None) -> None:
    with pytest.raises(ValueError, match="belong together") as raised:
        ClientCertificate(certificate=tls(certificate), key=Secret(ENCRYPTED if key is None else tls(key)))

    assert "canary" not in str(raised.value)


# --- secrets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    secret: Secret


class SecretSettings(Settings, frozen=True, kw_only=True):
    password: Secret


def test_only_reveal_shows_a_secret() -> None:
    secret = Secret(CANARY)

    shown = [
        str(secret),
        repr(secret),
        f"{secret}",
        f"{secret!r:>20}",
        "%s %r" % (secret, secret),  # noqa: UP031
        repr([secret]),
        repr({"password": secret}),
        repr(Holder(secret)),
        repr(SecretSettings(password=secret)),
        str(ValueError(secret)),
    ]
    assert CANARY not in "".join(shown)
    assert secret.reveal() == CANARY


def test_a_secret_cannot_be_encoded_by_mistake() -> None:
    for encode in (json.dumps, msgspec.json.encode, msgspec.to_builtins):
        with pytest.raises(TypeError):
            encode(Secret(CANARY))


def test_secrets_are_compared_by_value_and_never_equal_their_text() -> None:
    assert Secret("a") == copy.copy(Secret("a"))
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"pasword": "x"}, NoSettings)


# --- codes ----------------------------------------------------------------------------------------------------------


class Code(StrEnum):
    SOLD_OUT = "sold-out"


CODED = [Skip, Retry, Reject, Unknown, Misconfigured, lambda code: Problem(code, "We sell in Sweden only.")]
NAMES = ["Skip", "Retry", "Reject", "Unknown", "Misconfigured", "Problem"]


@pytest.mark.parametrize("make", CODED, ids=NAMES)
@pytest.mark.parametrize("code", ["sold-out", "a", "http-404", "4", "a" * MAX_CODE_LENGTH])
def test_a_code_is_kebab_case(make: type, code: str) -> None:
    make(code)


@pytest.mark.parametrize("make", CODED, ids=NAMES)
@pytest.mark.parametrize(
    ("code", "converted"),
    [
        ("", "no-code"),
        ("…", "no-code"),
        ("Sold-Out", "sold-out"),
        ("SOLD_OUT", "sold-out"),
        ("soldOut", "sold-out"),
        ("sold out!", "sold-out"),
        ("-a--b-", "a-b"),
        ("a\n", "a"),
        ("a" * (MAX_CODE_LENGTH + 1), "a" * MAX_CODE_LENGTH),
        ("a" * (MAX_CODE_LENGTH - 1) + "-b", "a" * (MAX_CODE_LENGTH - 1)),
        (404, "404"),
        (None, "none"),
        (Code.SOLD_OUT, "sold-out"),
    ],
    ids=repr,
)
def test_a_code_in_another_form_is_converted_and_logged(make: type, code: Any, converted: str) -> None:
    with capture_logs() as lines:
        made: Any = make(code)

    assert (made.reason if make is Skip else made.code) == converted
    logged = [("code_converted", converted)] if str(code) != converted else []
    assert [(line["event"], line["code"]) for line in lines] == logged


@given(st.text() | st.integers() | st.none())
def test_every_code_becomes_kebab_case(code: Any) -> None:
    converted = Reject(code).code

    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", converted)
    assert len(converted) <= MAX_CODE_LENGTH
    assert Reject(converted).code == converted


def test_the_text_of_an_outcome_is_its_code_and_message() -> None:
    assert str(Reject("no-such-shop", "The shop is unknown.")) == "no-such-shop: The shop is unknown."
    assert str(Unknown("no-answer")) == "no-answer"
    assert Retry("busy", after=timedelta(seconds=5)).after == timedelta(seconds=5)


def test_a_patch_is_one_operation_of_a_json_patch() -> None:
    assert [Patch.add("/cart/a", 1), Patch.replace("/cart/a~1b/0", None), Patch.remove("/cart/")] == [
        Patch("add", "/cart/a", 1),
        Patch("replace", "/cart/a~1b/0", None),
        Patch("remove", "/cart/"),
    ]


@pytest.mark.parametrize("op", ["test", "move", "copy", "Add", ""])
def test_a_patch_of_another_operation_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match="add, replace or remove"):
        Patch(op, "/cart/a")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["", "cart", "cart/a", "/cart/~2", "/cart/~", "#/cart"])
def test_a_patch_of_the_root_or_without_a_pointer_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="JSON Pointer"):
        Patch.add(path, 1)


def test_a_refusal_has_a_code_a_message_and_a_cause() -> None:
    refusal = Refuse("out-of-stock", "One item is sold out.", inner="E17")

    assert (str(refusal), refusal.code, refusal.inner) == ("out-of-stock: One item is sold out.", "out-of-stock", "E17")
    assert Refuse("no", "").inner is None
    assert Refuse("Out_Of_Stock", "").code == "out-of-stock"


@pytest.mark.parametrize("outcome", [Retry, Reject, Unknown, Misconfigured])
def test_an_outcome_passes_through_context_managers(outcome: type[Outcome]) -> None:
    @asynccontextmanager
    async def around() -> AsyncIterator[None]:
        yield

    async def raised_through_a_context_manager() -> None:
        async with around():
            raise outcome("code") from ValueError()

    with pytest.raises(outcome):
        asyncio.run(raised_through_a_context_manager())


# --- the context ----------------------------------------------------------------------------------------------------


class NoOrders:
    async def read(self, order_id: str) -> Order:
        raise Reject("order-not-found")


def context(identity: str = "ab", route: str = "export", attempt: int = 1) -> Context[NoSettings]:
    orders: Orders = NoOrders()
    return Context(
        settings=NoSettings(),
        log=structlog.get_logger(),
        http=httpx.AsyncClient(transport=httpx.MockTransport(lambda _request: httpx.Response(200))),
        orders=orders,
        clock=lambda: NOON,
        identity=identity,
        route=route,
        deadline=NOON,
        attempt=attempt,
        first_attempt_at=NOON,
    )


def test_a_key_is_the_same_for_every_attempt_and_after_a_restart() -> None:
    # Spelled out: a key that changes with a new version would send an order twice.
    assert context().key() == "6532d2086f8ae1f16cae43d43efa76cc34e2a566ce09ff16889127eaac9fc408"
    assert context(attempt=1).key("order") == context(attempt=9).key("order")


def test_a_key_differs_by_name_by_route_and_by_event() -> None:
    keys = [
        context().key(),
        context().key("order"),
        context().key("payment"),
        context(route="other").key(),
        context(identity="cd").key(),
    ]

    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in keys)


def test_the_repr_of_a_notification_shows_no_values() -> None:
    order = read_order(json.dumps({"id": "order-1", "customer": {"billing": {"email": CANARY}}}).encode())
    notification = Notification(
        id=1,
        merchant="m",
        channel="1",
        callback="order-status",
        order=order,
        received=order,
        raw=order.raw,
        received_at=NOON,
    )

    assert CANARY not in repr(notification)


# --- handlers -------------------------------------------------------------------------------------------------------

Own = TypeVar("Own", bound=Settings)


class ShopSettings(Settings, frozen=True, kw_only=True):
    base_url: Url


class Plain(NotificationHandler):  # type: ignore[type-arg]
    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        return Done()


class Shop(NotificationHandler[ShopSettings]):
    async def deliver(self, notification: Notification, context: Context[ShopSettings]) -> Done | Skip:
        return Done()


class Child(Shop):
    pass


class Family(NotificationHandler[Own], Generic[Own]):
    async def deliver(self, notification: Notification, context: Context[Own]) -> Done | Skip:
        return Done()


class Member(Family[ShopSettings]):
    async def lookup(self, notification: Notification, context: Context[ShopSettings]) -> Done | None:
        return None


class Rule(ValidationHandler[ShopSettings]):
    async def validate(self, order: Order, context: Context[ShopSettings]) -> list[Problem]:
        return []


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (Plain, NoSettings),
        (Shop, ShopSettings),
        (Child, ShopSettings),
        (Family, NoSettings),
        (Member, ShopSettings),
        (Rule, ShopSettings),
    ],
)
def test_the_settings_type_is_the_parameter_of_the_base_class(handler: type[Shop], expected: type[Settings]) -> None:
    assert handler.settings_type is expected


@pytest.mark.parametrize(("handler", "expected"), [(Shop, False), (Child, False), (Member, True)])
def test_a_handler_can_look_up_if_it_has_a_lookup(handler: type[Shop], expected: bool) -> None:
    assert can_look_up(handler) is expected


def test_a_handler_without_its_method_cannot_be_created() -> None:
    class Half(NotificationHandler[NoSettings]):
        pass

    with pytest.raises(TypeError, match="deliver"):
        Half()  # type: ignore[abstract]
