"""`deliveries backfill` through a running service."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import FAILED, NOTHING_MATCHED, OK, USAGE, Serving, execute
from tests.cli.test_ledger import BY, command, make, stub
from tests.ledgers import body_of, opened, receipt

pytestmark = pytest.mark.usefixtures("logging_as_before")

STEP = {"changed": 0, "read": 500, "after": None, "action": 1, "found": [], "unread": [], "paused": []}
ORDER = {"merchant": "fjallboden", "channel": "1", "order_id": "order-1"}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """The configuration of a running service with three orders, of which one has a delivery on the route."""
    with opened(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        ledger.clock.now = int(time.time() * 1000)  # the service prunes what is older
        ledger.owed(1, order_id="has-a-delivery")
        for order_id in ("order-1", "order-2"):
            for snapshot in (1, 2):
                body = body_of(order_id, snapshot, state={"currentStatus": "completed"})
                ledger.receive(receipt(order_id, snapshot, body=body))
    config = make(tmp_path)
    with closing(Serving(config, hold=True)):
        yield config


def deliveries(config: Path) -> list[Any]:
    return execute(config, "SELECT notification_id FROM deliveries ORDER BY notification_id")


def test_a_dry_run_counts_the_orders_of_each_queue(served: Path) -> None:
    before = deliveries(served)
    arguments = ("deliveries", "backfill", "export", "--dry-run", *BY)

    for_people = command(*arguments, config=served)
    for_programs = command(*arguments, "--output", "json", config=served)

    assert (for_people.exit_code, for_programs.exit_code) == (OK, OK)
    assert for_people.stdout.split() == ["route", "merchant", "channel", "count", "export", "fjallboden", "1", "2"]
    assert json.loads(for_programs.stdout) == {
        "counts": [{"route": "export", "merchant": "fjallboden", "channel": "1", "count": 2}],
        "unread": [],
        "paused": [],
    }
    assert deliveries(served) == before


@pytest.mark.parametrize("rate", [(), ("--rate", "1000"), ("--rate", "1")], ids=" ".join)
def test_each_order_gets_one_delivery_and_the_action_is_recorded(served: Path, rate: tuple[str, ...]) -> None:
    result = command("deliveries", "backfill", "export", *rate, *BY, config=served)

    assert (result.exit_code, result.stdout) == (OK, "2 backfilled\n"), result.output
    assert len(deliveries(served)) == 3
    assert execute(served, "SELECT command, who, why, matching, changed FROM actions") == [
        ("backfill", "anna", "the shop is mended", '{"route":"export"}', 2)
    ]


def test_a_second_backfill_matches_nothing(served: Path) -> None:
    command("deliveries", "backfill", "export", *BY, config=served)

    again = command("deliveries", "backfill", "export", "--output", "json", *BY, config=served)

    assert (again.exit_code, json.loads(again.stdout)["backfilled"]) == (NOTHING_MATCHED, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["no-such"], "there are: "), (["export", "--merchant", "nobody"], "has no such queue")],
    ids=["route", "merchant"],
)
def test_a_queue_that_is_gone_is_named(served: Path, arguments: list[str], words: str) -> None:
    result = command("deliveries", "backfill", *arguments, *BY, config=served)

    assert result.exit_code == FAILED
    assert words in result.stderr


def test_a_paused_queue_is_named(served: Path) -> None:
    command("queues", "pause", "export", *BY, config=served)

    result = command("deliveries", "backfill", "export", "--merchant", "fjallboden", *BY, config=served)

    assert result.exit_code == OK
    assert "fjallboden, channel 1, is paused" in result.stderr


def test_steps_continue_where_the_last_one_ended_and_orders_are_named_once(tmp_path: Path) -> None:
    unread = [ORDER | {"reason": "Norce has no such order\x1b"}]
    steps = [STEP | {"changed": 2, "after": "42", "unread": unread}, STEP | {"changed": 1, "unread": unread}]
    with stub(lambda _path, _body: (200, steps.pop(0))) as (url, asked):
        result = command("deliveries", "backfill", "export", "--to", url, *BY, config=make(tmp_path))

    assert (result.exit_code, result.stdout) == (OK, "3 backfilled\n")
    assert [(body.get("after"), body.get("action")) for _, body, _ in asked] == [(None, None), ("42", 1)]
    assert result.stderr.splitlines() == [
        "1 orders could not be read:",
        "fjallboden 1 order-1 Norce has no such order\\x1b",
    ]


def test_an_order_that_several_steps_find_is_counted_once(tmp_path: Path) -> None:
    steps = [STEP | {"after": "42", "found": [ORDER]}, STEP | {"found": [ORDER]}]
    with stub(lambda _path, _body: (200, steps.pop(0))) as (url, _):
        result = command(
            "deliveries", "backfill", "export", "--dry-run", "--output", "json", "--to", url, *BY, config=make(tmp_path)
        )

    assert [each["count"] for each in json.loads(result.stdout)["counts"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "ROUTE"), (["export", "--why", " "], "must not be blank"), (["export", *BY, "--since", "then"], "--since")],
    ids=["no route", "no reason", "no moment"],
)
def test_wrong_usage_is_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = command("deliveries", "backfill", *arguments, config=make(tmp_path))

    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert words in result.stderr
