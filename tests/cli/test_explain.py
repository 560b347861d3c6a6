"""`explain`: results and reasons of conditions, as text and as JSON, and never a value."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter import config as configuration
from adapter.conditions import MISSING, Condition
from adapter.identifiers import Channel
from adapter.routing.explanations import explained, in_words, kind
from adapter.routing.routes import Routes, build, wants
from tests.cli.test_cli import CONFIGURATION, ENVIRON, NOTHING_MATCHED, OK, STORE, USAGE, run, write
from tests.conditions.test_conditions import CANARY, ORDINARY_SCHEMAS, PLAIN, QUIET, is_accepted
from tests.ledgers import opened, receipt

pytestmark = pytest.mark.usefixtures("logging_as_before")

CONFIG = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
server: {host: 127.0.0.1, port: 0}
operations: {port: 0, socket: null}
store: {url: "sqlite:///@FOLDER@/ledger.db"}
norce: {base_url: "http://127.0.0.1:1"}
merchants:
  fjallboden: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
senders: @SENDERS@
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus, schema: {enum: [accepted, completed]}}
  order-rules: {kind: validation}
routes:
  everything: {callback: order-status, handler: log}
  swedish: {callback: order-status, handler: log, when: {scope: /country, schema: {const: SE}}}
  expensive:
    callback: order-status
    handler: log
    when: {scope: /total, schema: {properties: {includingVat: {multipleOf: 0.01, minimum: 1000}}}}
  paid: {callback: order-status, handler: log, when: {scope: /payments/0/state}}
  identified:
    callback: order-rules
    handler: rules
    no_answer: approve
    when: {scope: /customer}
    settings:
      rules:
        - {scope: /customer/billing, schema: {required: [email, phone]}, code: no-phone, message: A phone number}
        - {scope: /cart/items, schema: {maxItems: 1}, code: too-much, message: One thing at a time.}
        - {scope: /customer/loyalty, code: no-member, message: Members only.}
"""
ORDER: dict[str, Any] = {
    "id": "order-1",
    "merchant": "fjallboden",
    "channel": "1",
    "country": CANARY,
    "state": {"currentStatus": "completed"},
    "total": {"includingVat": 19.99},
    "payments": [{"state": CANARY}],
    "cart": {"items": [{"name": CANARY}]},
    "customer": {"billing": {"email": CANARY}},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path, text=CONFIG)


def explain(config: Path, order: Any, *arguments: str, callback: str = "order-status") -> Any:
    file = config.parent / "order.json"
    file.write_text(json.dumps(order))
    return run("explain", file, "--callback", callback, *arguments, config=config)


def for_programs(config: Path, order: Any, callback: str) -> Any:
    result = explain(config, order, "--output", "json", callback=callback)
    assert result.exit_code == OK
    return json.loads(result.stdout)


def test_a_file_is_read_as_the_service_reads_a_body(config):
    file = config.parent / "odd.json"
    odd = json.dumps(ORDER)[:-1] + ', "a": "\\ud83d", "b": 1e400}'
    file.write_bytes(b"\xef\xbb\xbf" + odd.encode())

    result = run("explain", file, "--callback", "order-status", "--output", "json", config=config)

    assert json.loads(result.stdout) == for_programs(config, ORDER, "order-status")


# --- what is said -----------------------------------------------------------------------------------------------------


def test_it_shows_for_each_route_whether_it_wants_the_event_and_why(config):
    result = explain(config, ORDER)

    assert (result.exit_code, result.stderr) == (OK, "")
    assert result.stdout.splitlines() == [
        "callback order-status, a notification",
        "  /state/currentStatus (string) holds",
        "route everything (handler log) wants it",
        "route swedish (handler log) does not want it",
        "  when /country (string) does not hold: const fails at /country (string); in the schema at /const",
        "route expensive (handler log) does not want it",
        "  when /total (object of 1) does not hold: minimum fails at /total/includingVat (number); in the schema at "
        "/properties/includingVat/minimum",
        "route paid (handler log) cannot be evaluated: a dead letter with reason condition",
        "  when /payments/0/state (missing) cannot be evaluated: "
        "the scope leads through an array, which is not possible, at /payments (array of 1)",
    ]


def test_it_shows_which_rules_hold(config):
    result = explain(config, ORDER, callback="order-rules")

    assert result.stdout.splitlines() == [
        "callback order-rules, a validation",
        "route identified (handler rules) wants it",
        "  when /customer (object of 1) holds",
        "  rule no-phone: /customer/billing (object of 1) does not hold: required fails at /customer/billing/phone "
        "(missing); in the schema at /required",
        "  rule too-much: /cart/items (array of 1) holds",
        "  rule no-member: /customer/loyalty (missing) does not hold: there is no /customer/loyalty",
    ]


def test_rules_are_shown_only_for_a_wanted_event_of_a_configured_channel(config):
    anonymous = {name: part for name, part in ORDER.items() if name != "customer"}
    unwanted = explain(config, anonymous, callback="order-rules")
    elsewhere = explain(config, ORDER | {"channel": ["9"]}, callback="order-rules")

    assert "does not want it" in unwanted.stdout
    assert "  rule " not in unwanted.stdout + elsewhere.stdout
    assert elsewhere.stderr == "the order's merchant and channel are not configured, so no rules are shown\n"


def test_json_output_has_the_same_explanation(config):
    told = for_programs(config, ORDER, "order-status")

    assert [(route["route"], route["result"]) for route in told["routes"]] == [
        ("everything", "matched"),
        ("swedish", "not_matched"),
        ("expensive", "not_matched"),
        ("paid", "error"),
    ]
    assert (told["callback"], told["kind"], told["condition"]["result"]) == ("order-status", "notification", "matched")
    assert told["routes"][2]["when"][0] == {
        "scope": "/total",
        "kind": "object of 1",
        "result": "not_matched",
        "code": "schema",
        "at": "/total/includingVat",
        "kind_at": "number",
        "keyword": "minimum",
        "schema_at": "/properties/includingVat/minimum",
    }
    (identified,) = for_programs(config, ORDER, "order-rules")["routes"]
    assert [(rule["code"], rule["rule"]["result"]) for rule in identified["rules"]] == [
        ("no-phone", "not_matched"),
        ("too-much", "matched"),
        ("no-member", "not_matched"),
    ]
    assert identified["no_answer"] == "approve"


def test_no_route_wants_an_event_if_the_callbacks_condition_does_not_hold(config):
    told = for_programs(config, ORDER | {"state": {}}, "order-status")

    assert {route["result"] for route in told["routes"]} == {"not_matched"}
    assert (told["condition"]["code"], told["condition"]["at"]) == ("scope_missing", "/state/currentStatus")


@pytest.mark.parametrize("callback", ["order-status", "order-rules"])
def test_no_value_is_shown(config, callback):
    for arguments in [(), ("--output", "json")]:
        result = explain(config, ORDER, *arguments, callback=callback)

        assert result.exit_code == OK
        assert CANARY not in result.output


def test_control_characters_in_names_are_escaped(config):
    text = CONFIG.replace("scope: /total, schema: {properties", 'scope: "/\\e[2Jtotal", schema: {properties')

    result = explain(write(config.parent, text=text), ORDER)

    assert result.exit_code == OK
    assert "\x1b" not in result.stdout
    assert r"there is no /\x1b[2Jtotal" in result.stdout


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (MISSING, "missing"),
        (None, "null"),
        (True, "boolean"),
        (0, "number"),
        (1.5, "number"),
        ("x", "string"),
        ([], "array of 0"),
        ({"a": 1}, "object of 1"),
    ],
)
def test_only_the_kind_of_a_value_is_shown(value, expected):
    assert kind(value) == expected


# --- what it is given -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [ORDER, {"notification": {}, "order": ORDER}, {"id": 7, "payload": {"notification": {}, "order": ORDER}}],
    ids=["order", "envelope", "event-record"],
)
def test_an_order_an_envelope_and_an_event_record_have_the_same_explanation(config, body):
    assert explain(config, body).stdout == explain(config, ORDER).stdout != ""


def test_the_order_may_come_by_standard_input(config):
    result = run("explain", "-", "--callback", "order-status", config=config, input=json.dumps(ORDER))

    assert result.stdout == explain(config, ORDER).stdout


def test_a_notification_is_explained_from_the_ledger(config):
    with opened(f"sqlite:///{config.parent}/ledger.db") as ledger:
        ledger.receive(receipt(body=json.dumps({"order": ORDER}).encode()))

    by_itself = run("explain", 1, config=config)
    other = run("explain", 1, "--callback", "order-rules", config=config)

    assert by_itself.stdout == explain(config, ORDER).stdout
    assert other.stdout == explain(config, ORDER, callback="order-rules").stdout


def test_a_missing_notification_or_body_exits_with_3(config):
    with opened(f"sqlite:///{config.parent}/ledger.db") as ledger:
        ledger.receive(receipt())
        ledger.rows("UPDATE notifications SET body = NULL")

    pruned, absent = run("explain", 1, config=config), run("explain", 2, config=config)

    assert (pruned.exit_code, pruned.stderr) == (
        NOTHING_MATCHED,
        "the body of notification 1 is not kept; see store.retention\n",
    )
    assert (absent.exit_code, absent.stderr) == (
        NOTHING_MATCHED,
        "there is no notification 2; a file of that name is ./2\n",
    )


def test_a_missing_ledger_exits_with_5(config):
    assert run("explain", 1, config=config).exit_code == STORE


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{file}"], "a file needs --callback: the name of a configured callback"),
        (["{file}", "--callback", "x"], "no callback x is configured; there are: order-rules, order-status"),
        (["/no/such/file", "--callback", "order-status"], "/no/such/file cannot be read: No such file or directory"),
        (["{text}", "--callback", "order-status"], "holds no order: not valid JSON"),
        (["{list}", "--callback", "order-status"], "holds no order: the body is not a JSON object"),
        (["99999999999999999999"], "not in the range"),
    ],
)
def test_wrong_arguments_exit_with_2_and_the_reason(config, arguments, text):
    names = {"file": json.dumps(ORDER), "text": f"{{{CANARY}", "list": "[]"}
    for name, body in names.items():
        (config.parent / name).write_text(body)

    result = run(
        "explain",
        *(each.format_map({name: config.parent / name for name in names}) for each in arguments),
        config=config,
    )

    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert text in result.stderr
    assert CANARY not in result.stderr


def test_a_configuration_with_problems_exits_with_4(tmp_path):
    config = write(tmp_path, text=CONFIG.replace("handler: rules", "handler: rulez"))

    assert explain(config, ORDER).exit_code == CONFIGURATION


# --- it says what the service does ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Routes:
    return build(configuration.load(write(tmp_path_factory.mktemp("built"), text=CONFIG), ENVIRON))


SCOPES = st.sampled_from(["/a", "/a/b", "/b/0"])
CONDITIONS = st.none() | st.builds(Condition, SCOPES, ORDINARY_SCHEMAS.filter(is_accepted)).map(Condition.compile)


@QUIET
@given(
    callback=CONDITIONS, whens=st.lists(CONDITIONS, max_size=3), order=st.dictionaries(st.sampled_from("abc"), PLAIN)
)
def test_explain_and_the_service_have_the_same_result(built, callback, whens, order):
    asked = replace(built.callbacks["order-status"], condition=callback)
    like = built.of("order-status")[0]
    routes = Routes(
        {asked.name: asked},
        [
            replace(like, name=str(number), callback=asked, when=() if when is None else (when,))
            for number, when in enumerate(whens)
        ],
        (),
    )

    told = explained(routes, asked, order, Channel("fjallboden", "1"))

    assert [route["result"] for route in told["routes"]] == [wants(route, order).value for route in routes.all]
    assert {route["route"]: route["result"] for route in told["routes"] if route["result"] != "not_matched"} == {
        route.name: result.value for route, result in routes.wanting(asked, Channel("fjallboden", "1"), order).routes
    }
    for condition, seen in [
        (callback, told["condition"]),
        *zip(whens, (next(iter(route["when"]), None) for route in told["routes"]), strict=True),
    ]:
        assert (seen is None) is (condition is None)
        if condition is not None:
            evaluation = condition.evaluate(order)
            assert (seen["result"], seen["code"]) == (evaluation.result.value, evaluation.code)
            assert (seen["schema_at"] is not None) is (seen["code"] == "schema")
            assert seen["at"] == evaluation.where or seen["code"] == "schema"
    assert list(in_words(told))
