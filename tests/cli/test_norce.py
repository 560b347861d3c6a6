"""The commands that call Norce: `orders`, `register`, `config norce`, `reconcile`."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import FAILED, NOTHING_MATCHED, OK, SIGNED, USAGE, Serving, execute, run, write
from tests.simulators import Served

pytestmark = pytest.mark.usefixtures("logging_as_before")

SENDERS = (
    '{signed_urls: {keys: {k1: "${env:URL_KEY}"}},'
    ' url_secrets: [{parameter: s, values: ["${env:STATIC}"], merchants: [norce]}]}'
)
CONFIG = """\
adapter: {id: an_adapter, public_url: "http://127.0.0.1:1"}
server: {host: 127.0.0.1, port: 0}
operations: {port: 0, socket: "@FOLDER@/operations.sock"}
store: {url: "sqlite:///@FOLDER@/ledger.db"}
norce: {base_url: "@NORCE@"}
merchants:
  norce: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
senders: @SENDERS@
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus}
  order-rules: {kind: validation}
routes:
  seen: {callback: order-status, handler: log, refetch: false}
"""
ENVIRON = {
    "TOKEN": "canary-token",
    "URL_KEY": "canary-url-key-0123456789",
    "STATIC": "canary&static",
}
PERSON = {"type": "person", "billing": {"givenName": "Canaria", "email": "canaria@example.com"}}


class Norce(Served):
    def order(self, **members: Any) -> str:
        order = {"currency": "SEK", "customer": PERSON, "cart": {"reference": "7", "items": []}} | members
        return str(self.ask("create_order", order)["id"])


@pytest.fixture
def norce() -> Iterator[Norce]:
    made = Norce(ENVIRON["TOKEN"])
    yield made
    made.close()


@pytest.fixture
def config(norce: Norce, tmp_path: Path) -> Path:
    return write(tmp_path, SENDERS, CONFIG.replace("@NORCE@", norce.url))


def command(*arguments: str, config: Path, **given: Any) -> Any:
    result = run(*arguments, config=config, env=ENVIRON, **given)
    assert "canary" not in result.stderr
    return result


def test_orders_are_listed_without_customers(norce: Norce, config: Path) -> None:
    first, second = norce.order(reference="100245"), norce.order()

    result = command("orders", "list", config=config)

    assert result.exit_code == OK
    head, *listed = result.stdout.splitlines()
    assert head.split() == ["id", "reference", "status", "created", "total", "currency"]
    assert [line.split()[0] for line in listed] == [second, first]
    assert "100245" in listed[1]
    assert "anaria" not in result.stdout


def test_orders_are_filtered(norce: Norce, config: Path) -> None:
    made = [norce.order(reference=f"r-{number}") for number in range(3)]
    norce.ask("put_state", {"currentStatus": "processing"}, order_id=made[0])

    def ids(*arguments: str) -> list[str]:
        result = command("orders", "list", *arguments, "--output", "json", config=config)
        assert result.exit_code == OK
        return [row["id"] for row in json.loads(result.stdout)]

    assert ids() == made[::-1]
    assert ids("--limit", "2") == made[:0:-1]
    assert ids("--reference", "r-1") == [made[1]]
    assert ids("--status", "processing") == [made[0]]
    assert command("orders", "list", "--reference", "none", config=config).exit_code == NOTHING_MATCHED


def test_an_order_is_shown_without_signatures(norce: Norce, config: Path) -> None:
    order = norce.order()
    command("register", order, config=config)

    result = command("orders", "show", order, config=config)

    assert result.exit_code == OK
    assert f"http://127.0.0.1:1/api/v1/callbacks/orders/{order}/order-status" in result.stdout
    assert "sig=" not in result.stdout
    assert "anaria" not in result.stdout
    whole = json.loads(command("orders", "show", order, "--output", "json", config=config).stdout)
    assert whole["customer"]["billing"]["email"] == "canaria@example.com"


def test_an_order_is_deleted_after_confirmation(norce: Norce, config: Path) -> None:
    order = norce.order()

    assert command("orders", "delete", order, config=config, input="n\n").exit_code == FAILED
    assert [each["id"] for each in norce.simulator.orders()] == [order]
    assert command("orders", "delete", order, "--yes", config=config).exit_code == OK
    assert norce.simulator.orders() == []
    assert command("orders", "delete", order, "--yes", config=config).exit_code == NOTHING_MATCHED


def test_callbacks_are_registered_and_removed(norce: Norce, config: Path) -> None:
    order = norce.order()

    first = command("register", order, "--output", "json", config=config)
    again = command("register", order, config=config)
    off = command("register", order, "--remove", "--output", "json", config=config)

    assert json.loads(first.stdout) == {"added": ["order-rules", "order-status"], "removed": [], "kept": []}
    assert again.stdout.split("\n")[2].split() == ["kept", "order-rules,", "order-status"]
    assert json.loads(off.stdout)["removed"] == ["order-rules", "order-status"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["register", "nobody"], NOTHING_MATCHED, "no such order"),
        (["orders", "show", "nobody"], NOTHING_MATCHED, "no such order"),
        (["orders", "delete", "..", "--yes"], NOTHING_MATCHED, "of this id"),
        (["orders", "show", "o", "--merchant", "another"], USAGE, "only norce"),
        (["orders", "list", "--channel", "9"], USAGE, "only 1"),
    ],
)
def test_an_unknown_name_is_an_error_in_one_line(config: Path, arguments: list[str], status: int, says: str) -> None:
    result = command(*arguments, config=config)

    assert result.exit_code == status
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_norce_is_an_error_in_one_line(tmp_path: Path) -> None:
    config = write(tmp_path, SENDERS, CONFIG.replace("@NORCE@", "http://127.0.0.1:1/checkout"))

    result = command("orders", "list", config=config)

    assert (result.exit_code, result.stderr) == (FAILED, "no answer from Norce to GET /checkout/orders: ConnectError\n")


def test_a_refused_token_is_reported(norce: Norce, config: Path) -> None:
    result = run("orders", "list", config=config, env=ENVIRON | {"TOKEN": "canary-another"})

    assert result.exit_code == FAILED
    assert "tokens" in result.stderr
    assert "canary" not in result.stderr


# --- config norce -----------------------------------------------------------------------------------------------------


def test_documents_are_printed_without_secrets_and_not_written(norce: Norce, config: Path) -> None:
    theirs = {"adapterId": "another", "invoke": "https://other.example/?key=canary", "headers": {"key": "canary"}}
    static = {"id": "static_notifications", "$schema": "x", "order": {"notifications": [theirs, "canary"]}}
    norce.simulator.records.documents["norce", "1", "static_notifications"] = static

    result = command("config", "norce", config=config)

    assert result.exit_code == OK
    assert "canary" not in result.stdout
    assert '"secret": "***"' in result.stdout
    assert '"adapterId": "another"' in result.stdout
    assert "static_notifications" in result.stdout
    assert list(norce.simulator.records.documents.values()) == [static]


def test_a_refused_token_of_one_merchant_does_not_stop_the_others(norce: Norce, config: Path) -> None:
    another = '{tokens: ["${env:URL_KEY}"], channels: {"1": {}}}'
    its = '{parameter: a, values: ["${env:STATIC}"], merchants: [another]}'
    both = config.read_text().replace("merchants:\n", f"merchants:\n  another: {another}\n")
    config.write_text(both.replace("url_secrets: [", f"url_secrets: [{its}, "))

    result = command("config", "norce", config=config)

    assert result.exit_code == FAILED
    assert result.stderr.startswith("another, channel 1: Norce answered 401")
    assert "static_notifications" in result.stdout


def test_a_merchant_without_a_secret_does_not_stop_the_others(norce: Norce, config: Path) -> None:
    another = '{tokens: ["${env:TOKEN}"], channels: {"1": {}}}'
    config.write_text(config.read_text().replace("merchants:\n", f"merchants:\n  another: {another}\n"))

    result = command("config", "norce", config=config)

    assert result.exit_code == USAGE
    assert result.stderr.startswith("another, channel 1: senders.url_secrets has no secret")
    assert "static_notifications" in result.stdout


def test_documents_are_written(norce: Norce, tmp_path: Path, config: Path) -> None:
    with closing(Serving(config, ENVIRON)) as service:
        # Norce reads our schema from where we are.
        config.write_text(config.read_text().replace("http://127.0.0.1:1", service.address))
        without_a_reason = command("config", "norce", "--write", config=config)
        before = dict(norce.simulator.records.documents)
        result = command("config", "norce", "--write", "--why", "a new shop", config=config)

    assert (without_a_reason.exit_code, before) == (USAGE, {})
    assert "--why" in without_a_reason.stderr
    assert (result.exit_code, len(result.stdout.splitlines())) == (OK, 2), result.output
    assert execute(config, "SELECT command, why, changed FROM actions") == [("write-documents", "a new shop", 2)]
    ours = norce.simulator.records.documents["norce", "1", "an_adapter"]
    assert ours["callbacks"]["secret"] == "canary%26static"


def test_orders_of_a_written_channel_notify_without_registration(norce: Norce, config: Path) -> None:
    with closing(Serving(config, ENVIRON)) as service:
        config.write_text(config.read_text().replace("http://127.0.0.1:1", service.address))
        command("config", "norce", "--write", "--why", "a new shop", config=config)
        order = norce.order()
        norce.ask("put_state", {"currentStatus": "processing"}, order_id=order)

    assert execute(config, "SELECT order_id, source FROM notifications") == [(order, "callback")]


def test_documents_need_a_url_secret(norce: Norce, tmp_path: Path) -> None:
    config = write(tmp_path, SIGNED, CONFIG.replace("@NORCE@", norce.url))

    result = command("config", "norce", config=config)

    assert result.exit_code == USAGE
    assert "url_secrets" in result.stderr


def test_the_schema_is_written_beside_the_configuration(config: Path) -> None:
    result = command("config", "schema", "--write", config=config)

    assert result.exit_code == OK
    written = config.with_name("config.schema.json").read_text("utf-8")
    assert json.loads(written) == json.loads(command("config", "schema", config=config).stdout)


# --- reconcile --------------------------------------------------------------------------------------------------------


def lose_notification(norce: Norce, config: Path) -> str:
    """Create an order whose notification is lost."""
    order = norce.order()
    command("register", order, config=config)
    norce.ask("put_state", {"currentStatus": "processing"}, order_id=order)
    return order


def stored(config: Path) -> list[Any]:
    return execute(config, "SELECT order_id, source FROM notifications")


def test_reconcile_receives_missing_notifications(norce: Norce, config: Path) -> None:
    with closing(Serving(config, ENVIRON)):
        order = lose_notification(norce, config)

        dry = command("reconcile", "--dry-run", "--since", "2026-01-01", "--output", "json", config=config)
        before = stored(config)
        done = command("reconcile", "--since", "2026-01-01", config=config)

        assert json.loads(dry.stdout) == [{"merchant": "norce", "events": 1, "received": 0, "missed": 1, "others": 0}]
        assert before == []
        assert done.exit_code == OK
        assert done.stdout.splitlines()[1].split() == ["norce", "1", "0", "1", "0"]
        assert stored(config) == [(order, "reconciliation")]


def test_an_unreadable_event_log_is_reported_with_the_counts(norce: Norce, config: Path) -> None:
    with closing(Serving(config, ENVIRON)):
        norce.simulator.set_switches(server_errors=1.0)
        result = command("reconcile", config=config)

    assert result.exit_code == FAILED
    assert "Norce answered 500" in result.stderr
    assert result.stdout.splitlines()[1].split() == ["norce", "0", "0", "0", "0"]


def unregistered(norce: Norce) -> str:
    """Create an order an hour ago of which our callbacks hear nothing."""
    norce.simulator.set_switches(clock_skew_seconds=-3600.0)
    order = norce.order()
    norce.ask("put_state", {"currentStatus": "processing"}, order_id=order)
    return order


def test_orders_that_never_came_are_listed_and_brought_with_a_reason(norce: Norce, config: Path) -> None:
    order = unregistered(norce)
    with closing(Serving(config, ENVIRON)):
        listed = command("reconcile", "--orders", config=config)
        for_programs = command("reconcile", "--orders", "--output", "json", config=config)
        as_csv = command("reconcile", "--orders", "--output", "csv", config=config)
        preview = command("reconcile", "--orders", "--bring", "--dry-run", "--why", "x", config=config)
        before = stored(config)
        brought = command(
            "reconcile", "--orders", "--bring", "--why", "not registered", "--output", "json", config=config
        )

        assert listed.exit_code == preview.exit_code == OK
        assert f"missing: {order} (norce, channel 1)" in listed.stdout
        assert "--bring" in listed.stderr
        first = json.loads(for_programs.stdout)[0]
        assert (first["orders"], first["missing"], first["brought"], first["ids"]) == (1, 1, 0, [order])
        assert as_csv.stdout.splitlines() == [
            "merchant,channel,orders,missing,brought,young,others,ids",
            f'norce,1,1,1,0,0,0,"[""{order}""]"',
        ]
        assert before == []
        assert json.loads(brought.stdout)[0]["brought"] == 1
        assert stored(config) == [(order, "orders")]
        assert execute(config, "SELECT command, why, changed FROM actions") == [
            ("reconcile-orders", "not registered", 1)
        ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--bring", "--why", "x"], "--orders"), (["--orders", "--bring"], "--why"),
     (["--orders", "--bring", "--why", " "], "--why"), (["--orders", "--since", "then"], "--since")],
    ids=str,
)  # fmt: skip
def test_bringing_orders_needs_a_reason(config: Path, arguments: list[str], words: str) -> None:
    result = command("reconcile", *arguments, config=config)

    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert words in result.stderr


def test_orders_that_cannot_be_listed_are_reported_with_the_counts(norce: Norce, config: Path) -> None:
    with closing(Serving(config, ENVIRON)):
        norce.simulator.set_switches(server_errors=1.0)
        result = command("reconcile", "--orders", config=config)

    assert result.exit_code == FAILED
    assert "Norce answered 500" in result.stderr
