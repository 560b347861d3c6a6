"""`adapter.callbacks.gone`: calls to callbacks, channels and merchants that are no longer configured."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.callbacks.limits import ByteLimit, CallLimit, WarningCounter
from adapter.identifiers import Channel
from adapter.ledger.names import Names
from adapter.ledger.uses import recent_uses
from tests.callbacks.test_endpoints import (
    BY_HEADER,
    ENVIRON,
    NEW,
    UNSIGNED,
    Answer,
    House,
    encoded,
    is_a_refusal,
    new_order,
    signed,
)
from tests.databases import KINDS, Server

CONFIGURED = Channel("norce", "1")
GONE_CHANNEL, GONE_MERCHANT, NEVER = Channel("norce", "9"), Channel("left", "1"), Channel("norce", "77")
GONE = {"old-rules": "validation", "old-cart": "hook", "old-status": "notification"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Renamed(House):
    """A service whose ledger remembers an earlier configuration."""

    def __init__(self, folder: Path, store_url: str = "") -> None:
        super().__init__(folder, store_url)
        self.seconds = Clock()
        self.endpoint.gone._warnings = WarningCounter(self.seconds)
        earlier = Names(self.store)
        self.runner.run(earlier.add(GONE, [GONE_CHANNEL, GONE_MERCHANT]))
        self.names.known = earlier.known

    def call(
        self,
        callback: str,
        body: Any = b"",
        channel: Channel = CONFIGURED,
        *,
        order_id: str = "",
        **more: Any,
    ) -> Answer:
        """Call with a signed URL."""
        order_id = order_id or (body["id"] if isinstance(body, dict) else new_order()["id"])
        headers = [("content-type", "application/json"), ("x-merchant", channel.merchant), ("x-channel", channel.name)]
        query = signed(NEW, "new", order_id, callback, *channel)
        return self.ask(order_id, callback, body, headers=headers, query=query, **more)

    def call_by_header(self, callback: str, body: Any = b"", channel: Channel = CONFIGURED) -> Answer:
        headers = {**dict(BY_HEADER), "x-merchant": channel.merchant, "x-channel": channel.name}
        return self.ask(body["id"] if body else new_order()["id"], callback, body, headers=tuple(headers.items()))

    def calls(self) -> dict[tuple[str, Channel, str], int]:
        self.runner.run(self.uses.flush())
        with self.store.read_connection() as connection:
            found = recent_uses(connection, self.store.clock())
        return {(use.callback, use.channel, use.key): use.calls for use in found}


@pytest.fixture(params=KINDS, scope="module")
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Renamed]:
    server: Server = request.getfixturevalue("postgres")
    url = server.fresh() if request.param == "postgresql" else ""
    made = Renamed(tmp_path_factory.mktemp("house"), url)
    yield made
    made.close()
    if url:
        server.drop(url)


def order_of(channel: Channel) -> dict[str, Any]:
    return new_order(merchant=channel.merchant, channel=channel.name)


# --- the answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "by header"])
@pytest.mark.parametrize(
    ("callback", "channel"),
    [(callback, channel) for callback in ("old-rules", "old-cart", "order-rules", "cart-changed")
     for channel in (CONFIGURED, GONE_CHANNEL, GONE_MERCHANT, NEVER)
     if callback.startswith("old") or channel != CONFIGURED],
)  # fmt: skip
def test_a_validation_or_hook_whose_name_or_channel_is_gone_stops_no_purchase(
    house: Renamed, callback: str, channel: Channel, *, is_signed: bool
) -> None:
    order = order_of(channel)

    answer = (house.call if is_signed else house.call_by_header)(callback, order, channel)

    assert (answer.status, answer.body) == (200, b"[]" if "cart" in callback else b"")
    assert house.stored(order["id"]) == []


def test_a_gone_validation_is_accepted_by_get_without_a_body_and_a_gone_hook_takes_no_get(house: Renamed) -> None:
    assert house.call("old-rules", method="GET").status == 200
    assert is_a_refusal(house.call("old-cart", method="GET"), 405, "method-not-allowed")


def test_a_gone_hook_whose_body_alone_names_the_channel_is_accepted(house: Renamed) -> None:
    order = new_order()
    headers = [pair for pair in BY_HEADER if pair[0] in ("content-type", "authorization")]

    answer = house.ask(order["id"], "old-cart", order, headers=headers)

    assert (answer.status, answer.body) == (200, b"[]")


@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "by header"])
@pytest.mark.parametrize(
    ("callback", "channel", "code", "inner"),
    [
        ("old-status", CONFIGURED, "callback-not-found", None),
        ("old-status", NEVER, "callback-not-found", None),
        ("order-status", GONE_CHANNEL, "configuration-not-found", "merchant-or-channel"),
        ("order-status", GONE_MERCHANT, "configuration-not-found", "merchant-or-channel"),
    ],
    ids=["callback", "callback and channel", "channel", "merchant"],
)
def test_a_notification_whose_name_or_channel_is_gone_is_404_and_not_stored(
    house: Renamed, callback: str, channel: Channel, code: str, inner: str | None, *, is_signed: bool
) -> None:
    order = order_of(channel)

    answer = (house.call if is_signed else house.call_by_header)(callback, order, channel)

    assert is_a_refusal(answer, 404, code, inner)
    assert house.stored(order["id"]) == []


@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "by header"])
@pytest.mark.parametrize(
    ("callback", "channel", "answered"),
    [("never-known", CONFIGURED, b"[]"), ("never-known", GONE_CHANNEL, b"[]"), ("never-known", NEVER, b"[]"),
     ("order-status", NEVER, b"")],
    ids=["callback", "callback of a gone channel", "callback and channel", "channel"],
)  # fmt: skip
def test_an_order_under_a_name_that_was_never_known_is_stored_without_routes(
    house: Renamed, callback: str, channel: Channel, answered: bytes, *, is_signed: bool
) -> None:
    order = order_of(channel)

    for _ in range(2):  # the second is a repeat
        answer = (house.call if is_signed else house.call_by_header)(callback, order, channel)
        assert (answer.status, answer.body) == (200, answered)

    [(row, owed)] = house.stored(order["id"])
    assert (row.callback, row.merchant, row.channel, row.body) == (callback, *channel, encoded(order))
    assert (row.is_wanted, owed) == (False, [])


def test_a_call_without_a_body_under_a_name_that_was_never_known_is_a_validation(house: Renamed) -> None:
    for method, body in (("POST", b""), ("GET", b""), ("GET", b"anything")):
        answer = house.call("never-known", body, order_id="no-body", method=method)
        assert (answer.status, answer.body) == (200, b"")

    assert house.stored("no-body") == []


def test_a_body_that_is_no_order_under_a_name_that_was_never_known_is_refused(house: Renamed) -> None:
    """It may be a notification that was damaged, and a 200 would lose it."""
    assert is_a_refusal(house.call("never-known", b"{"), 400, "order-bad-request", "malformed-json")
    assert is_a_refusal(house.call("never-known", b"[]"), 400, "order-bad-request", "malformed-json")


def test_names_that_another_node_adds_are_known_after_the_next_reading(house: Renamed) -> None:
    other = Names(house.store)
    house.runner.run(other.add({"of-another-node": "validation"}, []))
    before = house.call("of-another-node", new_order()).body

    house.runner.run(house.names.add({}, []))

    assert (before, house.call("of-another-node", new_order()).body) == (b"[]", b"")


# --- nothing is bypassed ----------------------------------------------------------------------------------------------

CALLBACKS = [*GONE, "never-known"]


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize(
    "query",
    [
        lambda _: "",
        lambda _: "secret=wrong",
        lambda callback: signed(NEW, "new", "another", callback),
        lambda _: signed(NEW, "new", "o1", "another"),
        lambda callback: signed(NEW, "old", "o1", callback),
        lambda callback: signed(NEW, "gone", "o1", callback),
        lambda callback: signed(NEW, "new", "o1", callback).replace("merchant=norce", "merchant=left"),
    ],
    ids=["unsigned", "a wrong secret", "another order", "another callback", "another key", "a key that is gone",
         "another merchant"],
)  # fmt: skip
def test_a_caller_that_is_not_known_is_401_whatever_the_name(
    house: Renamed, callback: str, query: Callable[[str], str]
) -> None:
    answer = house.ask("o1", callback, new_order(id="o1"), headers=UNSIGNED, query=query(callback))

    assert is_a_refusal(answer, 401, "unauthorized")
    assert house.stored("o1") == []


@pytest.mark.parametrize("callback", ["old-rules", "old-cart", "never-known"])
@pytest.mark.parametrize(("name", "value"), [("x-merchant", "other"), ("x-channel", "2")], ids=["merchant", "channel"])
def test_a_header_that_contradicts_the_signature_is_400(house: Renamed, callback: str, name: str, value: str) -> None:
    headers = tuple((each, value if each == name else given) for each, given in UNSIGNED)
    order = new_order()

    answer = house.ask(order["id"], callback, order, headers=headers, query=signed(NEW, "new", order["id"], callback))

    assert answer.status == 400
    assert house.stored(order["id"]) == []


@pytest.mark.parametrize("callback", ["old-rules", "old-cart", "never-known"])
def test_a_secret_of_other_merchants_is_401(house: Renamed, callback: str) -> None:
    order = new_order()
    bound = (*UNSIGNED, ("x-bound", ENVIRON["BOUND"]))

    assert is_a_refusal(house.ask(order["id"], callback, order, headers=bound), 401, "unauthorized")
    assert house.stored(order["id"]) == []


def by_url(house: Renamed, callback: str, body: Any, channel: Channel = CONFIGURED) -> Answer:
    headers = [("content-type", "application/json"), ("x-merchant", channel.merchant), ("x-channel", channel.name)]
    order_id = body["id"] if body else new_order()["id"]
    return house.ask(order_id, callback, body, headers=headers, query=f"secret={ENVIRON['FIRST_STATIC']}")


def test_a_secret_in_the_url_stores_orders_of_its_merchants_only_and_answers_nothing_else(house: Renamed) -> None:
    order, foreign = new_order(), order_of(GONE_MERCHANT)

    assert by_url(house, "never-known", order).status == 200
    assert len(house.stored(order["id"])) == 1
    assert by_url(house, "never-known", b"").status == 400
    assert by_url(house, "old-rules", b"").status == 401
    assert by_url(house, "old-cart", order).status == 401
    assert by_url(house, "old-status", order).status == 404
    assert by_url(house, "never-known", foreign, GONE_MERCHANT).status == 401
    assert house.stored(foreign["id"]) == []


@pytest.mark.parametrize("callback", ["No-Name", "x" * 65, "a b", "drop--table", "å"])
def test_a_text_that_can_be_no_name_is_404_and_not_stored(house: Renamed, callback: str) -> None:
    order = new_order()

    assert is_a_refusal(house.call_by_header(callback, order), 404, "callback-not-found")
    assert house.stored(order["id"]) == []


def test_the_limits_of_an_order_hold_for_every_name(house: Renamed) -> None:
    endpoint = house.endpoint
    before = endpoint.calls_of_order, endpoint.bytes_of_order, endpoint.delay_beyond_limits
    endpoint.delay_beyond_limits = 0
    try:
        endpoint.calls_of_order = CallLimit("order-calls", at_once=5, a_minute=1, clock=Clock())
        for callback, beyond in (("old-rules", 503), ("old-cart", 503), ("old-status", 404), ("never-known", 503)):
            order = new_order()
            house.call(callback, order)
            assert house.call(callback, order | {"note": 1}).status == beyond
        endpoint.calls_of_order = before[0]
        endpoint.bytes_of_order = ByteLimit("order-bytes", most=1, seconds=60, clock=Clock())
        order = new_order()
        assert [house.call("never-known", order | {"note": number}).status for number in range(2)] == [200, 503]
        assert len(house.stored(order["id"])) == 1
    finally:
        endpoint.calls_of_order, endpoint.bytes_of_order, endpoint.delay_beyond_limits = before


def test_without_a_ledger_known_names_are_answered_and_an_order_under_another_is_503(house: Renamed) -> None:
    house.store.capacity = 0
    try:
        assert house.call("old-rules").status == 200
        assert house.call("old-cart", new_order()).status == 200
        assert house.call("old-status", new_order()).status == 404
        assert house.call("order-rules", b"", GONE_CHANNEL).status == 200
        assert house.call("never-known").status == 200
        assert is_a_refusal(house.call("never-known", new_order()), 503, "store-unavailable")
    finally:
        house.store.capacity = 4000


# --- counts and warnings ----------------------------------------------------------------------------------------------


def warned(lines: Sequence[Any]) -> list[tuple[Any, ...]]:
    facts = ("callback", "merchant", "channel", "result", "count")
    return [tuple(each[fact] for fact in facts) for each in lines if each["event"] == "gone_name_called"]


def test_calls_are_counted_and_logged_once_a_minute_for_each_name(house: Renamed) -> None:
    labels = {"callback": "old-cart", "merchant": "norce", "channel": "1", "result": "accepted"}
    before = house.counted("calls_to_gone_names_total", **labels)
    house.seconds.now += 3600

    with capture_logs() as lines:
        for _ in range(3):
            house.call("old-cart", new_order())
        house.call("old-status", new_order())
        house.seconds.now += 60
        house.call("old-cart", new_order())

    assert warned(lines) == [
        ("old-cart", "norce", "1", "accepted", warned(lines)[0][-1]),
        ("old-status", "norce", "1", "not-found", warned(lines)[1][-1]),
        ("old-cart", "norce", "1", "accepted", 3),
    ]
    assert house.counted("calls_to_gone_names_total", **labels) == before + 4


def test_names_that_were_never_known_share_their_labels(house: Renamed) -> None:
    labels = {"callback": "unknown", "merchant": "unknown", "channel": "unknown", "result": "stored"}
    before = house.counted("calls_to_gone_names_total", **labels)
    house.seconds.now += 3600

    with capture_logs() as lines:
        for number in range(20):
            house.call_by_header(f"never-{number}", order_of(NEVER), NEVER)

    assert house.counted("calls_to_gone_names_total", **labels) == before + 20
    assert [each[:4] for each in warned(lines)] == [("unknown", "unknown", "unknown", "stored")]


def test_a_name_that_we_signed_is_logged_and_a_text_of_a_caller_is_not(house: Renamed) -> None:
    house.seconds.now += 3600
    with capture_logs() as lines:
        house.call_by_header("canary-name", order_of(Channel("canary", "9")), Channel("canary", "9"))
        house.seconds.now += 60
        house.call("signed-name", order_of(NEVER), NEVER)

    assert "canary" not in str(lines)
    assert warned(lines)[-1][:4] == ("signed-name", *NEVER, "stored")


def test_calls_are_remembered_by_their_names_and_keys(house: Renamed) -> None:
    house.norce |= {"approved": new_order(id="approved", approved=True)}
    before = house.calls()

    house.call("order-rules", order_id="approved")
    house.call("order-total", new_order())
    for _ in range(2):
        house.call("old-cart", new_order())
    house.call("old-status", new_order())
    house.call("order-rules", b"", GONE_CHANNEL)
    house.call("signed-but-never-known", new_order())
    house.call_by_header("old-cart", new_order())
    house.call_by_header("neither-signed-nor-known", new_order())
    house.ask("o1", "old-cart", headers=UNSIGNED)

    counted = {names: calls - before.get(names, 0) for names, calls in house.calls().items()}
    counted = {names: calls for names, calls in counted.items() if calls}
    assert counted == {
        ("order-rules", CONFIGURED, "new"): 1,
        ("order-total", CONFIGURED, "new"): 1,
        ("old-cart", CONFIGURED, "new"): 2,
        ("old-status", CONFIGURED, "new"): 1,
        ("order-rules", GONE_CHANNEL, "new"): 1,
        ("signed-but-never-known", CONFIGURED, "new"): 1,
        ("old-cart", CONFIGURED, ""): 1,
    }


def test_the_log_line_of_a_call_says_what_became_of_it(house: Renamed) -> None:
    with capture_logs() as lines:
        house.call("old-rules")

    (line,) = [each for each in lines if each["event"] == "callback_answered"]
    assert (line["callback"], line["kind"], line["result"]) == ("old-rules", "validation", "accepted")
