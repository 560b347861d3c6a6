"""The command `config show`."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import ENVIRON, NOTHING_MATCHED, OK, Result, run
from tests.databases import rows
from tests.ledgers import opened

pytestmark = pytest.mark.usefixtures("logging_as_before")

PASSWORD = "canary-password"
CONFIG = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
store: {url: "sqlite:///@FOLDER@/ledger.db"}
norce: {base_url: "http://127.0.0.1:1"}
merchants:
  norce:
    tokens: ["${env:TOKEN}"]
    routes: {export: {settings: {shop_id: of-the-merchant, customer: contact}}}
    channels:
      "1": {}
      "2": {routes: {export: {settings: {shop_id: of-the-channel}}}}
  other: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
senders: {signed_urls: {keys: {k1: "${env:URL_KEY}"}}}
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus}
  order-rules: {kind: validation}
routes:
  export:
    callback: order-status
    handler: jetshop
    timeout: 20s
    settings:
      base_url: https://shop.example
      shop_id: of-the-route
      unmapped: passthrough
      headers: {x-language: sv}
      auth: {type: basic, username: u, password: "${env:PASSWORD}"}
  rules:
    callback: order-rules
    merchants: [norce]
    handler: rules
    no_answer: approve
    settings: {rules: [{scope: /country, schema: {const: SE}, code: no-country, message: "No."}]}
"""


def line_of(words: str) -> str:
    (number,) = [number for number, line in enumerate(CONFIG.splitlines(), 1) if words in line]
    return str(number)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("@FOLDER@", str(tmp_path)))
    return path


def show(config: Path, *arguments: str) -> Result:
    return run("config", "show", *arguments, config=config, env=ENVIRON | {"PASSWORD": PASSWORD})


def settings(config: Path, *arguments: str) -> dict[tuple[str, str], Any]:
    """Return value, origin and line by route with channel and by setting."""
    shown = show(config, *arguments, "--output", "json")
    assert shown.exit_code == OK, shown.output
    return {
        (f"{row['route']} {row['merchant']}/{row['channel']}", row["setting"]): (
            row["value"], row["from"], row["at"] and row["at"].rpartition(":")[2],
        )
        for row in json.loads(shown.stdout)
    }  # fmt: skip


def test_each_setting_is_shown_with_the_layer_and_line_that_it_comes_from(config: Path) -> None:
    found = settings(config)

    assert found["export other/1", "settings.shop_id"] == ("of-the-route", "route", line_of("shop_id: of-the-route"))
    assert found["export norce/1", "settings.shop_id"] == ("of-the-merchant", "merchant", line_of("of-the-merchant"))
    assert found["export norce/2", "settings.shop_id"] == ("of-the-channel", "channel", line_of("of-the-channel"))
    assert found["export norce/2", "settings.customer"] == ("contact", "merchant", line_of("of-the-merchant"))
    assert found["export norce/2", "settings.headers.x-language"] == ("sv", "route", line_of("x-language"))
    assert found["export norce/2", "settings.auth.type"] == ("basic", "route", line_of("password"))
    assert found["export other/1", "settings.money_scale"] == (2, "default", None)
    assert found["export other/1", "settings.key_source"] == (["reference", "cart.reference"], "default", None)
    assert found["export other/1", "timeout"] == ("20s", "route", line_of("timeout"))
    assert found["export other/1", "concurrency"] == (8, "default", None)
    assert found["rules norce/1", "no_answer"] == ("approve", "route", line_of("no_answer"))
    assert found["rules norce/1", "settings.rules"][1:] == ("route", line_of("rules: ["))
    assert ("export other/1", "no_answer") not in found
    assert ("rules norce/1", "timeout") not in found
    assert ("rules other/1", "handler") not in found


def test_all_other_settings_are_shown_with_their_lines(config: Path) -> None:
    found = {setting: shown for (of, setting), shown in settings(config).items() if of == "None None/None"}

    assert found["adapter.id"] == ("an_adapter", "file", line_of("an_adapter"))
    assert found["callbacks.order-status.kind"] == ("notification", "file", line_of("order-status: {"))
    assert found["callbacks.order-rules.deadline"] == ("2s", "default", None)
    assert found["reconciliation.orders"] == ("1d", "default", None)
    assert found["store.retention.unwanted"] == ("1d", "default", None)
    assert found["queues.pause_after"][1:] == ("default", None)
    assert found["merchants.other.tokens"] == (["***"], "file", line_of("other: {tokens"))
    assert found["senders.signed_urls.keys"][0] == {"k1": "***"}
    assert not [setting for setting in found if "routes" in setting]


def test_a_secret_is_shown_as_its_reference_in_every_form(config: Path) -> None:
    assert settings(config)["export norce/1", "settings.auth.password"] == (
        "${env:PASSWORD}",
        "route",
        line_of("password"),
    )
    for form in ("table", "json", "csv"):
        shown = show(config, "--output", form)
        assert shown.exit_code == OK
        assert "${env:PASSWORD}" in shown.stdout
        assert PASSWORD not in shown.output


def test_route_merchant_and_channel_are_filters(config: Path) -> None:
    assert {of for of, _ in settings(config, "--route", "rules")} == {"rules norce/1", "rules norce/2"}
    assert {of for of, _ in settings(config, "--merchant", "norce", "--channel", "2")} == {
        "export norce/2", "rules norce/2",
    }  # fmt: skip
    nothing = show(config, "--route", "rules", "--merchant", "other")
    assert (nothing.exit_code, nothing.stdout) == (NOTHING_MATCHED, "")
    assert "no route is for this merchant and channel" in nothing.stderr


def test_the_document_of_norce_is_the_strongest(config: Path) -> None:
    without_a_ledger = show(config)
    with opened(f"sqlite:///{config.parent}/ledger.db"):
        pass
    url = f"sqlite:///{config.parent}/ledger.db"
    document = {"active": False, "routes": {"export": {"settings": {"shop_id": "theirs", "headers": {"x-a": "b"}}}}}
    rows(url, f"INSERT INTO documents (merchant, channel, content) VALUES ('norce', '2', '{json.dumps(document)}')")
    wrong = {"routes": {"export": {"settings": {"shop_id": 7}}}}
    rows(url, f"INSERT INTO documents (merchant, channel, content) VALUES ('norce', '1', '{json.dumps(wrong)}')")

    found, shown = settings(config), show(config)

    assert "there is no ledger yet" in without_a_ledger.stderr
    assert found["export norce/2", "settings.shop_id"] == ("theirs", "norce", None)
    assert found["export norce/2", "settings.headers.x-a"] == ("b", "norce", None)
    assert found["export norce/2", "settings.headers.x-language"] == ("sv", "route", line_of("x-language"))
    assert found["export norce/1", "settings.shop_id"] == ("of-the-merchant", "merchant", line_of("of-the-merchant"))
    assert "norce, channel 1: the document at Norce does not fit route export" in shown.stderr
    assert "norce, channel 2: switched off by the document at Norce" in shown.stderr
