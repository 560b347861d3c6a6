"""`adapter.callbacks.parsing`: what was sent, whose it is, and which event it is."""

import asyncio
import json
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.callbacks.parsing import (
    BadRequest,
    CallbackInvalid,
    ConfigurationNotFound,
    NotJson,
    Unresolved,
    check_order_id,
    parse_notification,
    parse_unread,
    parse_validation,
)
from adapter.callbacks.senders import RawCallback, Sender, Unauthenticated
from adapter.conditions import Condition
from adapter.identifiers import Channel
from adapter.ledger.inbox import ReceivedNotification
from adapter.offload import SMALL_BYTES
from adapter.orders import order_digest
from adapter.routing.routes import Callback

CHANNELS = {("norce", "1"), ("norce", "2"), ("other", "1")}
NOW = datetime(2026, 2, 3, 9, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)
MODIFIED = "2026-02-03T08:16:35.870Z"

ANYBODY = Sender(scheme="header", key="authorization-1")
SIGNED = Sender(scheme="signed_url", key="k1", channel=Channel("norce", "1"))
STATUS = Callback(
    name="order-status", kind="notification", condition=Condition("/state/currentStatus", {"enum": ["x"]}).compile()
)
RULES = Callback(name="order-rules", kind="validation", deadline=timedelta(seconds=2))

ORDER: dict[str, Any] = {
    "id": "o1",
    "merchant": "norce",
    "channel": "1",
    "lastModified": MODIFIED,
    "state": {"currentStatus": "completed"},
    "total": {"includingVat": 1},
}
ABSENT = object()


def changed(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in (ORDER | members).items() if value is not ABSENT}


def request(body: Any = ORDER, **changes: Any) -> RawCallback:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", "x-merchant": "norce", "x-channel": "1"}
    given_ = {"method": "POST", "order_id": "o1", "callback": "order-status", "query": {}, "headers": headers}
    return RawCallback(body=raw, **(given_ | changes))


def parsed(
    body: Any = ORDER, sender: Sender = ANYBODY, callback: Callback = STATUS, now: int = NOW_MS, **changes: Any
) -> ReceivedNotification:
    return asyncio.run(parse_notification(request(body, **changes), sender, callback, CHANNELS, now))[0]


def order_in(body: Any) -> dict[str, Any]:
    return asyncio.run(parse_notification(request(body), ANYBODY, STATUS, CHANNELS, NOW_MS))[1]


REFERENCES: dict[str, tuple[Any, str | None]] = {
    "a number": ("100245", "100245"),
    "other letters": ("Beställning 7 ☃", "Beställning 7 ☃"),
    "too long": ("x" * 300, "x" * 200),
    "empty": ("", None),
    "null": (None, None),
    "no text": (100245, None),
    "a list": (["100245"], None),
    "NUL": ("1\0", None),
    "half of a pair": ("1\ud800", "1\ufffd"),
    "a new line": ("1\n2", None),
}


@pytest.mark.parametrize(("given_", "kept"), REFERENCES.values(), ids=REFERENCES)
def test_the_reference_of_the_order_is_kept_if_it_can_be_searched(given_: Any, kept: str | None) -> None:
    assert parsed(changed(reference=given_)).reference == kept
    assert (
        parsed({"notification": {"reference": "of the callback"}, "order": changed(reference=given_)}).reference == kept
    )


def test_an_order_without_a_reference_has_none() -> None:
    assert parsed().reference is None


def refusal(kind: type[CallbackInvalid], body: Any = ORDER, **changes: Any) -> str:
    with pytest.raises(kind) as raised:
        parsed(body, **changes)
    return raised.value.inner


# --- form -------------------------------------------------------------------------------------------------------------


def test_a_bare_order_and_an_envelope_are_the_same_event() -> None:
    envelope = {"notification": {"id": "n1", "reference": "export"}, "order": ORDER}

    assert order_in(envelope) == order_in(ORDER) == ORDER
    assert parsed(envelope).identity == parsed(ORDER).identity
    assert parsed(envelope).body != parsed(ORDER).body


def test_the_body_is_kept_byte_for_byte() -> None:
    body = b'  {"id" : "o1",\r\n "x":1.0, "x": 2e0, "y":"\\u00e5" }\n'

    assert parsed(body).body == body
    assert order_in(body) == {"id": "o1", "x": 2.0, "y": "å"}


@pytest.mark.parametrize("media_type", [
    "application/json", "Application/JSON; charset=utf-8", "application/json-patch+json", "application/a+json;b=c",
])  # fmt: skip
def test_every_json_media_type_is_accepted(media_type: str) -> None:
    headers = {"content-type": media_type, "x-merchant": "norce", "x-channel": "1"}

    assert parsed(headers=headers).order_id == "o1"


@pytest.mark.parametrize(
    "media_type",
    ["", "text/plain", "text/json", "application/jsonp", "application/x-www-form-urlencoded", "json", "+json", "é"],
)
def test_another_media_type_is_not_json(media_type: str) -> None:
    assert refusal(NotJson, headers={"content-type": media_type}) == "content-type"


def test_a_body_without_a_media_type_is_not_json() -> None:
    assert refusal(NotJson, headers={}) == "content-type"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"null",
        b"[]",
        b'"order"',
        b"1",
        b'{"a":1}{"a":1}',
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":01}',
        b'{"a":1,}',
        b'{"a":"\xff"}',
        b'{"a":"\n"}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 500_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_json_object_is_malformed(body: bytes) -> None:
    assert refusal(BadRequest, body) == "malformed-json"


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"100245","merchant":"norce","channel":"1","a":"\\ud83d"}',
        b'\xef\xbb\xbf{"id":"100245","merchant":"norce","channel":"1"}',
        b'{"id":"100245","merchant":"norce","channel":"1","a":1e999}',
        b'{"id":"100245","merchant":"norce","channel":"1","a":%s}' % (b"9" * 5000),
    ],
    ids=["half a surrogate pair", "byte order mark", "beyond a double", "5000 digits"],
)
def test_unusual_json_is_received_as_it_came(body: bytes) -> None:
    notification = parsed(body, order_id="100245")

    assert notification.body == body


def test_an_order_member_that_is_no_object_is_not_an_envelope() -> None:
    assert order_in(changed(order="100245"))["order"] == "100245"


# --- the order's id ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order_id", ["o_yClTSySj", "å", "a b", "x" * 64, "a/b", "…", ".x", "a..b", "100%", "{x"[1:]])
def test_an_order_id_is_opaque(order_id: str) -> None:
    check_order_id(order_id)

    assert parsed(changed(id=order_id), order_id=order_id).order_id == order_id


@pytest.mark.parametrize(
    "order_id",
    ["", "x" * 65, "a\0", "a\nb", "a\x7f", "\x1b[2J", "a\u200b", "\u202ea", "\u2028", "\x85", "\ud800", ".", ".."],
    ids=ascii,
)
def test_an_order_id_that_is_too_long_or_not_printable_or_a_path_step_is_refused(order_id: str) -> None:
    assert refusal(BadRequest, order_id=order_id) == "order-id"


@pytest.mark.parametrize("order_id", ["{order_id}", "{order.id}", "{", "a}", "%7Border_id}", "{" * 100])
def test_an_unresolved_placeholder_has_its_own_error(order_id: str) -> None:
    assert refusal(Unresolved, order_id=order_id) == "unresolved-placeholder"


@pytest.mark.parametrize("in_body", ["o2", "O1", "", "o1 ", 1, True, ["o1"], {"o1": 1}], ids=repr)
def test_another_order_id_in_the_body_is_a_contradiction(in_body: Any) -> None:
    assert refusal(BadRequest, changed(id=in_body)) == "order-id-differs"


@pytest.mark.parametrize("in_body", [ABSENT, None], ids=["absent", "null"])
def test_an_order_without_an_id_has_the_one_in_the_path(in_body: Any) -> None:
    assert parsed(changed(id=in_body)).order_id == "o1"


# --- merchant and channel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "headers", "members", "expected"),
    [
        (SIGNED, {}, {"merchant": ABSENT, "channel": ABSENT}, ("norce", "1")),
        (ANYBODY, {"x-merchant": "norce", "x-channel": "2"}, {"merchant": ABSENT, "channel": ABSENT}, ("norce", "2")),
        (ANYBODY, {}, {"merchant": "other", "channel": "1"}, ("other", "1")),
        (ANYBODY, {"x-merchant": "norce"}, {"merchant": None, "channel": "2"}, ("norce", "2")),
        (SIGNED, {"x-merchant": "norce", "x-channel": "1"}, {}, ("norce", "1")),
        (SIGNED, {"x-merchant": "", "x-channel": ""}, {"merchant": "", "channel": ""}, ("norce", "1")),
    ],
    ids=["signed query", "headers", "body", "one from each", "all agree", "empty counts as none"],
)
def test_merchant_and_channel_come_from_the_signature_the_headers_or_the_body(
    sender: Sender, headers: dict[str, str], members: dict[str, Any], expected: tuple[str, str]
) -> None:
    notification = parsed(changed(**members), sender, headers={"content-type": "application/json"} | headers)

    assert notification.channel == expected


@pytest.mark.parametrize(
    ("sender", "headers", "members", "inner"),
    [
        (ANYBODY, {}, {"merchant": ABSENT}, "merchant-unclear"),
        (ANYBODY, {}, {"channel": ABSENT}, "channel-unclear"),
        (SIGNED, {"x-merchant": "other"}, {}, "merchant-unclear"),
        (SIGNED, {"x-channel": "2"}, {}, "channel-unclear"),
        (SIGNED, {}, {"merchant": "other"}, "merchant-unclear"),
        (SIGNED, {}, {"channel": "2"}, "channel-unclear"),
        (ANYBODY, {"x-merchant": "norce"}, {"merchant": "Norce"}, "merchant-unclear"),
        (ANYBODY, {"x-channel": "1"}, {"channel": 1}, "channel-unclear"),
        (ANYBODY, {"x-merchant": "norce"}, {"merchant": ["norce"]}, "merchant-unclear"),
        (ANYBODY, {"x-merchant": "norce, other"}, {}, "merchant-unclear"),
    ],
    ids=[
        "no merchant", "no channel", "signature and header, merchant", "signature and header, channel",
        "signature and body, merchant", "signature and body, channel", "header and body", "a number in the body",
        "a list in the body", "a header with two values",
    ],
)  # fmt: skip
def test_a_merchant_or_channel_that_differs_or_is_missing_is_unclear(
    sender: Sender, headers: dict[str, str], members: dict[str, Any], inner: str
) -> None:
    headers = {"content-type": "application/json"} | headers

    assert refusal(BadRequest, changed(**members), sender=sender, headers=headers) == inner


@pytest.mark.parametrize(("merchant", "channel"), [("nobody", "1"), ("norce", "3"), ("other", "2"), ("é", "1")])
def test_a_merchant_or_channel_that_is_not_configured_is_not_found(merchant: str, channel: str) -> None:
    headers = {"content-type": "application/json"}

    inner = refusal(ConfigurationNotFound, changed(merchant=merchant, channel=channel), headers=headers)

    assert inner == "merchant-or-channel"


def test_a_secret_of_one_merchant_is_not_valid_for_another() -> None:
    bound = Sender(scheme="header", key="x-1", merchants=frozenset({"other"}))

    with pytest.raises(Unauthenticated):
        parsed(sender=bound)
    with pytest.raises(Unauthenticated):
        parse_validation(request(callback="order-rules"), bound, RULES, CHANNELS)


# --- a validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{", b'{"id": "another", "merchant": "other"}', b"\xff" * 100])
def test_the_body_of_a_validation_is_ignored(body: bytes) -> None:
    request_ = parse_validation(request(body), ANYBODY, RULES, CHANNELS)

    assert (request_.channel, request_.order_id) == (("norce", "1"), "o1")


def test_a_validation_needs_a_merchant_and_a_channel() -> None:
    with pytest.raises(BadRequest) as raised:
        parse_validation(request(headers={}), ANYBODY, RULES, CHANNELS)

    assert raised.value.inner == "merchant-unclear"


# --- identity: the same event, or another (decision 11) ---------------------------------------------------------------

SAME, ANOTHER = True, False


@pytest.mark.parametrize(
    ("change", "same"),
    [
        pytest.param({"lastModified": "2026-02-03T08:16:35.87Z"}, SAME, id="fraction of two digits"),
        pytest.param({"lastModified": "2026-02-03T08:16:35.8700000Z"}, SAME, id="fraction of seven digits"),
        pytest.param({"lastModified": "2026-02-03T08:16:35.870+00:00"}, SAME, id="offset of zero"),
        pytest.param({"lastModified": "2026-02-03T09:16:35.870+01:00"}, SAME, id="offset of an hour"),
        pytest.param({"lastModified": "2026-02-03T03:16:35.870-05:00"}, SAME, id="offset before"),
        pytest.param({"lastModified": "2026-02-03T08:16:35.870"}, SAME, id="no zone is UTC"),
        pytest.param({"lastModified": "2026-02-03T08:16:35.871Z"}, ANOTHER, id="a millisecond later"),
        pytest.param({"lastModified": "2026-02-03T08:16:35.870001Z"}, ANOTHER, id="a microsecond later"),
        pytest.param({"lastModified": "2026-02-03T08:16:35.870+01:00"}, ANOTHER, id="another zone"),
        pytest.param({"lastModified": ABSENT}, ANOTHER, id="no lastModified"),
        pytest.param({"state": {"currentStatus": "accepted"}}, ANOTHER, id="another value at the scope"),
        pytest.param({"state": {"currentStatus": None}}, ANOTHER, id="null at the scope"),
        pytest.param({"state": {}}, ANOTHER, id="nothing at the scope"),
        pytest.param({"state": {"currentStatus": "completed", "transitions": [1]}}, SAME, id="beside the scope"),
        pytest.param({"total": {"includingVat": 2}}, SAME, id="elsewhere in the order"),
    ],
)
def test_an_event_is_the_moment_and_the_value_at_the_scope(change: dict[str, Any], same: bool) -> None:
    assert (parsed(changed(**change)).identity == parsed().identity) is same


def test_null_and_an_absent_value_at_the_scope_are_two_events() -> None:
    null, nothing = parsed(changed(state={"currentStatus": None})), parsed(changed(state={}))

    assert null.identity != nothing.identity


@pytest.mark.parametrize("garbage", [
    ABSENT, None, "", "yesterday", 1770106595, 1.5, True, [], {}, "2026-02-30T00:00:00Z", "2026-02-03T08:16:60Z",
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999Z", "10000-01-01T00:00:00Z", "-2026-02-03T08:16:35Z", "2026-02-03T08:16:35+99:00",
    (NOW + timedelta(minutes=10, milliseconds=1)).isoformat(), "٢٠٢٦-02-03",
], ids=lambda each: "absent" if each is ABSENT else repr(each))  # fmt: skip
def test_without_a_usable_last_modified_the_whole_order_is_the_event(garbage: Any) -> None:
    one = parsed(changed(lastModified=garbage))
    again = parsed(changed(lastModified=garbage))
    other = parsed(changed(lastModified=garbage, total={"includingVat": 2}))

    assert one.identity == again.identity != other.identity
    assert one.snapshot_at is None


def test_a_last_modified_up_to_ten_minutes_ahead_counts() -> None:
    ahead = NOW + timedelta(minutes=10)

    one = parsed(changed(lastModified=ahead.isoformat()))
    other = parsed(changed(lastModified=ahead.isoformat(), total={"includingVat": 2}))

    assert one.snapshot_at == NOW_MS + 600_000
    assert one.identity == other.identity


def test_an_unread_notification_is_the_same_for_every_body_and_no_other_event() -> None:
    events = [parse_unread(request(body), SIGNED, STATUS, CHANNELS) for body in (ORDER, b"", b"no JSON")]

    assert [event.identity for event in events] == [events[0].identity] * 3
    assert {event.body for event in events} == {None}
    assert (events[0].channel, events[0].order_id, events[0].snapshot_at) == (("norce", "1"), "o1", None)
    assert events[0].identity not in (parsed().identity, parsed(changed(lastModified=ABSENT)).identity)


def test_an_unread_notification_needs_an_address_that_names_the_channel() -> None:
    with pytest.raises(BadRequest, match="merchant is missing"):
        parse_unread(request(headers={}), ANYBODY, STATUS, CHANNELS)
    with pytest.raises(Unresolved):
        parse_unread(request(order_id="{orderId}"), SIGNED, STATUS, CHANNELS)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_the_identity_of_a_large_order_is_computed_beside_the_loop(large: bool) -> None:
    threads: list[str] = []

    class Scope(Condition):
        def value(self, order: Any) -> Any:
            threads.append(threading.current_thread().name)
            return order

    callback = Callback(name="order-status", kind="notification", condition=Scope("", {}))
    order = changed(attributes={"text": "x" * (SMALL_BYTES if large else 1)})

    parsed(order, callback=callback)

    assert threads == ["large-bodies_0" if large else "MainThread"]


def test_an_order_without_a_moment_is_digested_once() -> None:
    without = changed(lastModified=ABSENT)

    assert parsed(without).digest == order_digest(without)
    assert parsed().digest is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b'{"total":{"a":1}}', b'{"total":{"a":1.0}}', SAME),
        (b'{"total":{"a":100}}', b'{"total":{"a":1e2}}', SAME),
        (b'{"total":{"a":0}}', b'{"total":{"a":-0.0}}', SAME),
        (b'{"total":{"a":1,"b":2}}', b'{ "total": {"b":2, "a":1} }', SAME),
        (b'{"total":{"a":"\\u00e5"}}', '{"total":{"a":"å"}}'.encode(), SAME),
        (b'{"total":{"a":1}}', b'{"total":{"a":1.5}}', ANOTHER),
        (b'{"total":{"a":1}}', b'{"total":{"a":"1"}}', ANOTHER),
        (b'{"total":{"a":1}}', b'{"total":{"a":true}}', ANOTHER),
        (b'{"total":{"a":0}}', b'{"total":{"a":false}}', ANOTHER),
        (b'{"total":{"a":null}}', b'{"total":{}}', ANOTHER),
        (b'{"total":[1,2]}', b'{"total":[2,1]}', ANOTHER),
    ],
    ids=lambda body: body.decode() if isinstance(body, bytes) else None,
)
@pytest.mark.parametrize("moment", [b"", b'"lastModified":"2026-02-03T08:16:35Z",'], ids=["without", "with a moment"])
def test_values_are_equal_as_json_and_not_as_text(one: bytes, other: bytes, same: bool, moment: bytes) -> None:
    total = Callback(name="total", kind="notification", condition=Condition("/total").compile())
    first, second = (parsed(b"{" + moment + body[1:], callback=total).identity for body in (one, other))

    assert (first == second) is same


def test_merchant_channel_callback_and_order_each_make_another_event() -> None:
    nameless = changed(merchant=ABSENT, channel=ABSENT, id=ABSENT)
    other_callback = Callback(name="order-state", kind="notification", condition=STATUS.condition)

    def told(merchant: str, channel: str, order_id: str = "o1", callback: Callback = STATUS) -> bytes:
        headers = {"content-type": "application/json", "x-merchant": merchant, "x-channel": channel}
        return parsed(nameless, callback=callback, headers=headers, order_id=order_id).identity

    events = [
        told("norce", "1"),
        told("norce", "2"),
        told("other", "1"),
        told("norce", "1", "o2"),
        told("norce", "1", "o1", other_callback),
    ]

    assert len(set(events)) == len(events)


@given(st.datetimes(datetime(1970, 1, 2), datetime(2026, 2, 3)), st.integers(-14 * 60, 14 * 60))  # noqa: DTZ001
def test_one_instant_has_one_identity_in_every_zone(moment: datetime, offset: int) -> None:
    utc = moment.replace(tzinfo=UTC)
    sign, minutes = "-" if offset < 0 else "+", abs(offset)
    local = (moment + timedelta(minutes=offset)).isoformat()
    elsewhere = f"{local}{sign}{minutes // 60:02}:{minutes % 60:02}"

    one, other = parsed(changed(lastModified=utc.isoformat())), parsed(changed(lastModified=elsewhere))

    assert one.identity == other.identity
    assert one.snapshot_at == other.snapshot_at == int(utc.timestamp() * 1000)


# --- nothing else comes out of it -------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()), st.text(max_size=70))
def test_any_body_and_path_is_a_notification_or_a_refusal(body: bytes, order_id: str) -> None:
    with suppress(CallbackInvalid):
        assert parsed(body, order_id=order_id).body == body


@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*ORDER, "order", "notification"), json_values)))
def test_any_members_make_a_notification_or_a_refusal(members: dict[str, Any]) -> None:
    with suppress(CallbackInvalid):
        assert len(parsed(members).identity) == 24


@given(st.integers(0, 1200), st.sampled_from([("[", "]"), ('{"a":', "}"), ('{"items":[', "]}")]), st.booleans())
def test_nesting_up_to_and_beyond_the_decoders_limit_is_a_notification_or_a_refusal(
    depth: int, brackets: tuple[str, str], at_the_scope: bool
) -> None:
    opening, closing = brackets
    deep = opening * depth + "1" + closing * depth
    members = f'"state":{{"currentStatus":{deep}}}' if at_the_scope else f'"attributes":{deep}'
    body = f'{{"lastModified":"{MODIFIED}",{members}}}'.encode()
    for sent in (body, b'{"id":null,' + members.encode() + b"}"):
        with suppress(BadRequest):
            assert parsed(sent).body == sent
