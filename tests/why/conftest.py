"""An order between a Norce on a port and a ledger that the test drives, and the answers of `why` about it."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapter import config as configuration
from adapter.callbacks.senders import Senders
from adapter.identifiers import Channel
from adapter.registrations.on_orders import PLACES, registrations
from tests.cli.test_cli import NOTHING_MATCHED, OK, run
from tests.databases import rows
from tests.ledgers import DAY, NOON, Ledger, receipt
from tests.simulators import COMPLETED, Served

ENVIRON = {"TOKEN": "canary-token", "URL_KEY": "canary-url-key-0123456789"}
HERE = Channel("fjallboden", "1")
CONFIG: dict[str, Any] = {
    "adapter": {"id": "an_adapter", "public_url": "https://adapter.example"},
    "server": {"host": "127.0.0.1", "port": 0},
    "operations": {"port": 0, "socket": None},
    "merchants": {
        "fjallboden": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}}},
        "annan": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}}},
    },
    "senders": {"signed_urls": {"keys": {"k1": "${env:URL_KEY}"}}},
    "callbacks": {
        "order-status": {
            "kind": "notification",
            "scope": "/state/currentStatus",
            "schema": {"enum": ["accepted", "completed"]},
        },
    },
    "routes": {
        "export": {
            "callback": "order-status",
            "when": [
                {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
                {"scope": "/country", "schema": {"const": "SE"}},
            ],
            "handler": "log",
        },
    },
}


class Site:
    """A Norce, a ledger, a configuration, and the command `why`."""

    def __init__(self, norce: Served, ledger: Ledger, folder: Path) -> None:
        self.norce = norce
        self.ledger = ledger
        self.folder = folder
        self.config = json.loads(json.dumps(CONFIG)) | {"store": {"url": ledger.url}, "norce": {"base_url": norce.url}}
        norce.simulator.records.orders.clear()
        self.move_clock(NOON)
        ledger.rows(f"UPDATE processes SET lease_until = {NOON + 365 * DAY}")

    def move_clock(self, moment: int) -> None:
        """Set the clock of the ledger, which `why` reads beside the service."""
        self.ledger.clock.now = moment
        offset = moment - time.time_ns() // 1_000_000
        rows(self.ledger.url, f"UPDATE watermarks SET value = {offset} WHERE name = 'clock_offset'")

    def order(self, order_id: str = "order-1", *, registered: bool = True, **members: Any) -> dict[str, Any]:
        """Put a completed order of fjallboden at Norce."""
        order = {
            **COMPLETED,
            "id": order_id,
            "reference": "100245",
            "merchant": HERE.merchant,
            "channel": HERE.name,
            "country": "SE",
            "validations": [],
            "hooks": [],
            "notifications": [],
            **members,
        }
        if registered:
            loaded = configuration.load(self.write_config(), ENVIRON)
            for number, each in enumerate(registrations(loaded, Senders(loaded.senders), HERE, order_id)):
                order[PLACES[each.kind][0]].append({"id": f"n{number}", **each.body})
        self.norce.simulator.put(order)
        return order

    def receive(self, order: dict[str, Any], *, wanted: bool = True, **given: Any) -> None:
        """Receive the notification of an order that the route wants, or does not want."""
        queues = [(self.ledger.export, True)] if wanted else []
        body = json.dumps(order).encode()
        self.ledger.receive(receipt(order["id"], self.ledger.clock.now, wanted=queues, body=body, **given))

    def write_config(self) -> Path:
        path = self.folder / "config.yaml"
        (self.folder / "store.url").write_text(self.config["store"]["url"])
        shown = self.config | {"store": {"url": f"${{file:{self.folder / 'store.url'}}}"}}
        path.write_text(json.dumps(shown))
        return path

    def ask(self, asked: str = "order-1", *options: str) -> list[dict[str, Any]]:
        """Ask `why` and return its answers."""
        result = run("why", asked, *options, "--output", "json", config=self.write_config(), env=ENVIRON)
        answers: list[dict[str, Any]] = json.loads(result.stdout)
        assert result.exit_code == (OK if all(each["exported"] for each in answers) else NOTHING_MATCHED)
        return answers

    def ask_one(self, asked: str = "order-1", *options: str) -> dict[str, Any]:
        (answer,) = self.ask(asked, *options)
        return answer

    def print(self, asked: str = "order-1", *options: str) -> Any:
        return run("why", asked, *options, config=self.write_config(), env=ENVIRON)


@pytest.fixture(scope="session")
def served_norce() -> Iterator[Served]:
    with closing(Served(ENVIRON["TOKEN"])) as served:
        yield served


@pytest.fixture
def site(served_norce: Served, ledger: Ledger, tmp_path: Path) -> Site:
    return Site(served_norce, ledger, tmp_path)
