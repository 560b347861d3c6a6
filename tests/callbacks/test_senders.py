"""`adapter.callbacks.senders`: who may call, and for whom."""

import base64
import hashlib
import hmac
import json
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.callbacks.senders import RawCallback, Sender, Senders, Unauthenticated, reconciled, sign
from adapter.config import model as config
from adapter.identifiers import Channel
from adapter.plugin import Secret

NEW, OLD = "a-new-key-of-32-bytes-0123456789", "an-old-key-of-32-bytes-012345678"
WHAT = ("norce", "1", "o_yClTSySj", "order-status")

text = st.text(st.characters(codec="utf-8"), max_size=80)


def by_definition(key: str, merchant: str, channel: str, order_id: str, callback: str) -> str:
    """Unpadded base64url of HMAC-SHA256 over the compact UTF-8 JSON array; nothing of ours in it."""
    named = json.dumps(["v1", merchant, channel, order_id, callback], separators=(",", ":"), ensure_ascii=False)
    digest = hmac.new(key.encode(), named.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().replace("=", "")


def senders(
    *,
    keys: dict[str, str] | None = None,
    headers: list[tuple[str, list[str], tuple[str, ...] | None]] = [],  # noqa: B006
    urls: list[tuple[str, list[str], tuple[str, ...] | None]] = [],  # noqa: B006
) -> Senders:
    def secrets(values: list[str]) -> tuple[Secret, ...]:
        return tuple(map(Secret, values))

    return Senders(
        config.SendersConfig(
            signed_urls=config.SignedUrlsConfig(keys={n: Secret(k) for n, k in keys.items()}) if keys else None,
            header_secrets=tuple(
                config.HeaderSecretConfig(header=h, values=secrets(values), merchants=m) for h, values, m in headers
            ),
            url_secrets=tuple(
                config.UrlSecretConfig(parameter=p, values=secrets(values), merchants=m) for p, values, m in urls
            ),
        )
    )


def request(
    query: dict[str, tuple[str, ...]] | None = None, headers: dict[str, str] | None = None, **changes: Any
) -> RawCallback:
    given_ = {"method": "POST", "order_id": WHAT[2], "callback": WHAT[3], "body": b""} | changes
    return RawCallback(query=query or {}, headers=headers or {}, **given_)


def signed(secret: str = NEW, name: str = "new", /, **changes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    query = {"merchant": ("norce",), "channel": ("1",), "key": (name,), "sig": (by_definition(secret, *WHAT),)}
    return {each: values for each, values in (query | changes).items() if values}


def refused(raw: RawCallback, by: Senders) -> str:
    with pytest.raises(Unauthenticated) as raised:
        by.identify(raw)
    return raised.value.reason


def signature(key: bytes, channel: Channel, order_id: str, callback: str) -> str:
    return sign(hmac.new(key, digestmod="sha256"), channel, order_id, callback)


# --- the signature ---------------------------------------------------------------------------------------------------


def test_the_signature_is_the_published_vector() -> None:
    """Made with `printf '["v1","norce","1","o_yClTSySj","order-status"]' | openssl dgst -sha256 -hmac KEY -binary`."""
    made = signature(b"an-old-key-of-32-bytes-012345678", Channel("norce", "1"), *WHAT[2:])

    assert made == "dGM8UkshcHOuYrcszaLUd36LBLyGwecpSv4ENpPpacA"


def test_signed_values_are_utf_8_and_not_escaped() -> None:
    made = signature(NEW.encode(), Channel("norce", "1"), 'å/ä\u2028\u0001\x7f"\\', "order-status")

    assert made == by_definition(NEW, "norce", "1", 'å/ä\u2028\u0001\x7f"\\', "order-status")


@given(st.text(st.characters(codec="ascii"), min_size=16), text, text, text, text)
def test_the_signature_is_the_definition_for_any_values(
    key: str, merchant: str, channel: str, order_id: str, callback: str
) -> None:
    made = signature(key.encode(), Channel(merchant, channel), order_id, callback)

    assert made == by_definition(key, merchant, channel, order_id, callback)


@given(st.lists(text, min_size=4, max_size=4), st.lists(text, min_size=4, max_size=4))
def test_other_values_never_share_a_signature(one: list[str], other: list[str]) -> None:
    """Text that moves from one value to the next is another signature."""
    first, second = (signature(b"k" * 16, Channel(*each[:2]), *each[2:]) for each in (one, other))

    assert (first == second) is (one == other)


@given(text.filter(bool), text.filter(bool), text.filter(bool), text.filter(bool))
def test_a_signed_url_is_read_back_as_what_was_signed(
    merchant: str, channel: str, order_id: str, callback: str
) -> None:
    by = senders(keys={"new": NEW})
    url = urlsplit(by.signed_url("https://adapter.example/", Channel(merchant, channel), order_id, callback))
    *_, in_path, name = url.path.split("/")

    sender = by.identify(
        request(
            {name: tuple(values) for name, values in parse_qs(url.query, keep_blank_values=True).items()},
            order_id=unquote(in_path),
            callback=unquote(name),
        )
    )

    assert url.path.startswith("/api/v1/callbacks/orders/")
    assert sender == Sender(scheme="signed_url", key="new", channel=Channel(merchant, channel))


def test_the_first_key_signs_and_all_verify() -> None:
    by = senders(keys={"new": NEW, "old": OLD})
    url = by.signed_url("https://adapter.example", Channel("norce", "1"), *WHAT[2:])

    assert parse_qs(urlsplit(url).query)["key"] == ["new"]
    assert by.identify(request(signed(NEW, "new"))).key == "new"
    assert by.identify(request(signed(OLD, "old"))).key == "old"


def test_without_a_key_nothing_is_signed() -> None:
    by = senders(headers=[("authorization", ["a-header-secret"], None)])

    with pytest.raises(LookupError, match="signed_urls"):
        by.signed_url("https://adapter.example", Channel("norce", "1"), *WHAT[2:])


@pytest.mark.parametrize(
    "query",
    [
        pytest.param({}, id="none"),
        pytest.param(signed(sig=()), id="no signature"),
        pytest.param(signed(sig=("",)), id="empty signature"),
        pytest.param(signed("a-key-that-was-never-ours-012345"), id="of a key that is not ours"),
        pytest.param(signed(OLD, "new"), id="of the old key under the new one's name"),
        pytest.param(signed(key=("other",)), id="key name unknown"),
        pytest.param(signed(key=("",)), id="key name empty"),
        pytest.param(signed(key=()), id="no key name"),
        pytest.param(signed(key=("new", "new")), id="key repeated"),
        pytest.param(signed(sig=signed()["sig"] * 2), id="signature repeated"),
        pytest.param(signed(merchant=("norce", "norce")), id="merchant repeated"),
        pytest.param(signed(channel=("1", "1")), id="channel repeated"),
        pytest.param(signed(merchant=()), id="no merchant"),
        pytest.param(signed(channel=()), id="no channel"),
        pytest.param(signed(merchant=("other",)), id="of another merchant"),
        pytest.param(signed(channel=("2",)), id="of another channel"),
        pytest.param(signed(sig=(by_definition(NEW, "norce", "1", "another", "order-status"),)), id="another order"),
        pytest.param(signed(sig=(by_definition(NEW, "norce", "1", WHAT[2], "order-rules"),)), id="another callback"),
        pytest.param(signed(sig=(signed()["sig"][0] + "=",)), id="padded"),
        pytest.param(signed(sig=(signed()["sig"][0][:-1],)), id="cut short"),
        pytest.param(signed(sig=("é" * 43,)), id="non-ASCII"),
        pytest.param(signed(sig=("\ufffd",)), id="undecodable"),
        pytest.param(signed(sig=("\0",)), id="nul"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused(query: dict[str, tuple[str, ...]]) -> None:
    by = senders(keys={"new": NEW, "old": OLD})

    assert refused(request(query), by)


def test_a_valid_secret_does_not_excuse_a_wrong_signature() -> None:
    by = senders(keys={"new": NEW}, headers=[("authorization", ["a-header-secret"], None)])
    raw = request(signed(sig=("wrong",)), {"authorization": "a-header-secret"})

    assert refused(raw, by) == "wrong signature"


# --- shared secrets ---------------------------------------------------------------------------------------------------

BEARER = "Bearer a-first-header-secret"
BY_SECRET = senders(
    headers=[("Authorization", [BEARER, "Bearer a-second-header-secret"], None)],
    urls=[("secret", ["a-first-url-secret", "a-second-url-secret"], ("norce",))],
)


@pytest.mark.parametrize(
    ("raw", "scheme", "key"),
    [
        (request(headers={"authorization": BEARER}), "header", "authorization-1"),
        (request(headers={"authorization": "Bearer a-second-header-secret"}), "header", "authorization-2"),
        (request({"secret": ("a-first-url-secret",)}), "url", "secret-1"),
        (request({"secret": ("a-second-url-secret",)}), "url", "secret-2"),
    ],
    ids=["header, first", "header, second", "url, first", "url, second"],
)
def test_either_of_two_secrets_is_valid_and_is_named(raw: RawCallback, scheme: str, key: str) -> None:
    sender = BY_SECRET.identify(raw)

    assert (sender.scheme, sender.key) == (scheme, key)
    assert sender.channel is None


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(request(), id="none"),
        pytest.param(request(headers={"authorization": ""}), id="header, empty"),
        pytest.param(request(headers={"authorization": "Bearer wrong"}), id="header, wrong"),
        pytest.param(request(headers={"authorization": BEARER.lower()}), id="header, other case"),
        pytest.param(request(headers={"authorization": BEARER[:-1]}), id="header, cut short"),
        pytest.param(request(headers={"authorization": f"{BEARER} "}), id="header, a space too many"),
        pytest.param(request(headers={"authorization": f"{BEARER}, {BEARER}"}), id="header, repeated"),
        pytest.param(request(headers={"authorization": "a-first-url-secret"}), id="header, the url's secret"),
        pytest.param(request(headers={"authorization": "\u00e9"}), id="header, non-ASCII"),
        pytest.param(request(headers={"x-other": BEARER}), id="header, another name"),
        pytest.param(request({"secret": ("wrong",)}), id="url, wrong"),
        pytest.param(request({"secret": ("",)}), id="url, empty"),
        pytest.param(request({"secret": (BEARER,)}), id="url, the header's secret"),
        pytest.param(request({"secret": ("a-first-url-secret", "a-first-url-secret")}), id="url, repeated"),
        pytest.param(request({"secret": ("\udcff\ufffd\u00e9",)}), id="url, non-ASCII"),
        pytest.param(request({"other": ("a-first-url-secret",)}), id="url, another name"),
    ],
)
def test_a_secret_that_does_not_fit_is_refused(raw: RawCallback) -> None:
    assert refused(raw, BY_SECRET) == "no valid secret"


def test_a_secret_is_valid_for_its_merchants_and_no_other() -> None:
    bound = BY_SECRET.identify(request({"secret": ("a-first-url-secret",)}))
    free = BY_SECRET.identify(request(headers={"authorization": BEARER}))

    assert bound.may_speak_for("norce")
    assert not bound.may_speak_for("other")
    assert free.may_speak_for("other")


def test_a_wrong_secret_does_not_hide_a_valid_one() -> None:
    by = senders(headers=[("x-one", ["the-first-secret"], ("norce",)), ("x-two", ["the-second-secret"], None)])

    assert by.identify(request(headers={"x-one": "nonsense", "x-two": "the-second-secret"})).key == "x-two-1"


@given(st.text(max_size=40), st.dictionaries(text, st.lists(st.text(max_size=40), max_size=3).map(tuple), max_size=4))
def test_any_header_and_query_gives_a_sender_or_a_refusal(shown: str, query: dict[str, tuple[str, ...]]) -> None:
    by = senders(
        keys={"new": NEW}, headers=[("authorization", [BEARER], None)], urls=[("secret", ["a-url-secret"], None)]
    )

    for raw in (request(query, {"authorization": shown}), request({"sig": (shown,), "key": ("new",)} | query)):
        assert refused(raw, by)


def test_a_refusal_and_a_sender_show_no_secret() -> None:
    by = senders(keys={"new": NEW}, headers=[("authorization", [BEARER], None)])
    shown = [repr(by.identify(request(signed()))), repr(by.identify(request(headers={"authorization": BEARER})))]
    shown += [refused(request(signed(sig=("canary",))), by), refused(request(headers={"authorization": "canary"}), by)]

    assert not any(secret in told for told in shown for secret in (NEW, BEARER, "canary"))


def test_every_sender_that_may_be_identified_is_known_by_scheme_and_key() -> None:
    by = senders(
        keys={"new": NEW, "old": OLD}, headers=[("X-Secret", ["one-secret-value", "other-secret-value"], None)]
    )

    assert list(by.known) == [
        ("signed_url", "new"), ("signed_url", "old"), ("header", "x-secret-1"), ("header", "x-secret-2")
    ]  # fmt: skip
    assert by.headers == ("x-secret",)


def test_notifications_that_reconciliation_reads_have_another_source_than_callbacks() -> None:
    channel = Channel("norce", "1")

    assert reconciled(channel) == Sender(scheme="reconciliation", key="", channel=channel, source="reconciliation")
    assert Sender(scheme="header", key="x-1").source == "callback"
