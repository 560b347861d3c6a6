"""The commands that register and remove callbacks on many orders, and the documents of a merchant that leaves."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapter.identifiers import Channel
from tests.cli.test_cli import FAILED, NOTHING_MATCHED, OK, USAGE, Serving, execute, write
from tests.cli.test_norce import CONFIG, ENVIRON, SENDERS, Norce, command

pytestmark = pytest.mark.usefixtures("logging_as_before")

WHY = ("--why", "the shop leaves")
LEFT = "gone"  # a merchant that is not configured
TOKEN_VARIABLE = "NORCE_ADAPTER_NORCE_TOKEN"
OURS = ["order-rules", "order-status"]


@pytest.fixture
def norce() -> Iterator[Norce]:
    with closing(Norce(ENVIRON["TOKEN"])) as made:
        yield made


@pytest.fixture
def config(norce: Norce, tmp_path: Path) -> Path:
    return write(tmp_path, SENDERS, CONFIG.replace("@NORCE@", norce.url))


def many(*arguments: str, config: Path, **given: Any) -> Any:
    """Run `register`, and return the counts as JSON beside the result."""
    result = command("register", *arguments, "--output", "json", config=config, **given)
    result.counts = json.loads(result.stdout) if result.stdout else None
    return result


def ours_on(norce: Norce, order_id: str) -> int:
    order = norce.simulator.order(order_id)
    places = ("validations", "hooks", "notifications")
    return sum(each.get("adapterId") == "an_adapter" for place in places for each in order[place])


def move(norce: Norce, order_id: str, **members: Any) -> None:
    """Change an order past the simulator's rules."""
    norce.simulator.put(norce.simulator.order(order_id) | members)


def test_open_orders_are_registered_and_the_reason_is_recorded(norce: Norce, config: Path) -> None:
    open_, done, final = norce.order(), norce.order(), norce.order()
    command("register", done, config=config)
    move(norce, final, state={"currentStatus": "completed"})

    with closing(Serving(config, ENVIRON)):
        result = many("--all-open", "--why", "a new rule", "--who", "ann", config=config)

    expected = {"orders": 2, "changed": 1, "unchanged": 1, "failed": 0, "added": 2, "removed": 0}
    assert (result.exit_code, result.stderr) == (OK, "")
    assert expected.items() <= result.counts.items()
    assert [ours_on(norce, order) for order in (open_, done, final)] == [2, 2, 0]
    assert execute(config, "SELECT command, who, why, matching, changed FROM actions") == [
        ("register", "ann", "a new rule", '{"orders":"all-open"}', 1)
    ]


def test_callbacks_are_removed_although_no_service_runs(norce: Norce, config: Path) -> None:
    """Norce refuses changes of an order whose hooks do not answer, so this must not depend on the service."""
    order = norce.order()
    command("register", order, config=config)

    result = command("register", "--remove", "--merchant", "norce", *WHY, config=config)

    assert (result.exit_code, ours_on(norce, order)) == (OK, 0)
    assert result.stdout == "1 orders: 1 changed (0 callbacks added, 2 removed), 0 unchanged, 0 failed\n"
    assert result.stderr == "the reason is not recorded in the ledger, because no service runs on this host\n"


def test_a_dry_run_counts_and_changes_nothing(norce: Norce, config: Path) -> None:
    order = norce.order()

    result = command("register", "--all-open", "--dry-run", config=config)

    assert (result.exit_code, ours_on(norce, order)) == (OK, 0)
    assert result.stdout == "1 orders: 1 would change (2 callbacks added, 0 removed), 0 unchanged, 0 failed\n"
    one = command("register", order, "--dry-run", "--output", "json", config=config)
    assert (json.loads(one.stdout)["added"], ours_on(norce, order)) == (OURS, 0)


def test_the_orders_of_a_file_are_registered_and_an_unknown_one_is_named(
    norce: Norce, config: Path, tmp_path: Path
) -> None:
    first, second = norce.order(), norce.order()
    listing = tmp_path / "ids"
    listing.write_text(f"# last week\n{first}\n\n nobody \r\n{second}\n{first}\n")

    result = command("register", "--file", str(listing), *WHY, config=config)

    assert result.exit_code == FAILED
    assert [ours_on(norce, order) for order in (first, second)] == [2, 2]
    assert result.stdout == "3 orders: 2 changed (4 callbacks added, 0 removed), 0 unchanged, 1 failed\n"
    assert result.stderr.splitlines()[1:] == [
        "norce, channel 1, order nobody: Norce has no such order",
        "failed: 1 times 404",
    ]
    again = many("--file", "-", *WHY, config=config, input=f"{first}\n{second}\n")
    assert (again.exit_code, again.counts["unchanged"]) == (OK, 2)


def test_the_orders_of_a_file_may_be_of_several_channels(norce: Norce, config: Path) -> None:
    config.write_text(config.read_text().replace('channels: {"1": {}}', 'channels: {"1": {}, "2": {}}', 1))
    first, second = norce.order(), norce.run(norce.caller.create({"currency": "SEK"}, channel=Channel("norce", "2")))
    lines = f"norce 1 {first}\nnorce 2 {second}\nnorce 9 {first}\n"

    unknown = many("--file", "-", *WHY, config=config, input=lines)
    result = many("--file", "-", *WHY, config=config, input=lines.replace("norce 9", "norce 1"))

    assert (unknown.exit_code, result.exit_code) == (USAGE, OK), unknown.output + result.output
    assert (result.counts["orders"], result.counts["changed"]) == (2, 2)


def test_a_channel_that_norce_has_switched_off_is_not_registered_and_still_removed(norce: Norce, config: Path) -> None:
    order = norce.order()
    command("register", order, config=config)
    document = {"id": "an_adapter", "$schema": "x", "active": False}
    norce.simulator.records.documents["norce", "1", "an_adapter"] = document
    move(norce, order, hooks=[], validations=[])

    one, all_ = command("register", order, config=config), many("--all-open", *WHY, config=config)

    said = "norce, channel 1: Norce's configuration has this adapter switched off"
    assert (one.exit_code, one.stderr) == (FAILED, f"nothing was registered: {said}\n")
    assert (all_.exit_code, all_.counts["switched_off"]) == (NOTHING_MATCHED, [said])
    assert ours_on(norce, order) == 1
    assert many("--all-open", "--remove", *WHY, config=config).counts["removed"] == 1
    never = config.read_text().replace("norce: {base_url", "norce: {refresh: 0s, base_url")
    config.write_text(never)  # the service does not read documents either
    assert command("register", order, config=config).exit_code == OK


def test_a_document_that_cannot_be_read_changes_nothing(norce: Norce, config: Path) -> None:
    too_large = {"id": "an_adapter", "$schema": "x", "active": False, "more": "x" * 5_000_000}
    norce.simulator.records.documents["norce", "1", "an_adapter"] = too_large

    result = command("register", norce.order(), config=config)

    assert (result.exit_code, "cannot be read" in result.stderr) == (OK, True)


def test_the_failure_of_one_merchant_stops_no_other(norce: Norce, config: Path) -> None:
    another = '{tokens: ["${env:URL_KEY}"], channels: {"1": {}}}'
    config.write_text(config.read_text().replace("merchants:\n", f"merchants:\n  another: {another}\n"))
    order = norce.order()

    result = many("--all-open", *WHY, config=config)

    assert (result.exit_code, ours_on(norce, order)) == (FAILED, 2)
    assert (result.counts["failed"], result.counts["causes"]) == (1, {"401": 1})
    assert [(each["merchant"], each["order_id"]) for each in result.counts["failures"]] == [("another", None)]
    assert many("--all-open", "--merchant", "norce", *WHY, config=config).exit_code == OK


def test_a_rejected_callback_is_named_and_the_others_are_added(norce: Norce, config: Path) -> None:
    """Norce supports no scope through an array."""
    array = "order-status: {kind: notification, scope: /payments/0/state}"
    config.write_text(
        config.read_text().replace("order-status: {kind: notification, scope: /state/currentStatus}", array)
    )
    order = norce.order()

    one = command("register", order, "--output", "json", config=config)
    all_ = many("--all-open", *WHY, config=config)

    assert one.exit_code == all_.exit_code == FAILED
    assert one.stderr.startswith("order-status: Norce answered 400")
    assert json.loads(one.stdout)["added"] == ["order-rules"]
    assert set(json.loads(one.stdout)["rejected"]) == {"order-status"}
    assert all_.counts["failures"][0]["error"].startswith("order-status: Norce answered 400")


def test_an_interrupted_run_says_how_to_go_on_and_the_next_one_skips_what_is_done(norce: Norce, config: Path) -> None:
    for _ in range(60):
        norce.order()

    class Interrupting(dict[str, Any]):
        """Sends SIGINT after twenty changes of orders."""

        changes = 0

        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            self.changes += 1
            if self.changes == 20:
                os.kill(os.getpid(), signal.SIGINT)

    object.__setattr__(norce.simulator.records, "orders", Interrupting(norce.simulator.records.orders))

    first = many("--all-open", *WHY, config=config)
    second = many("--all-open", *WHY, config=config)

    assert (first.exit_code, first.counts["interrupted"]) == (FAILED, True)
    assert "interrupted; run the same command again to go on" in first.stderr
    assert 0 < first.counts["changed"] < 60
    assert (second.exit_code, second.counts["orders"]) == (OK, 60)
    assert second.counts["changed"] == 60 - first.counts["changed"]


# --- a merchant that is no longer configured --------------------------------------------------------------------------


@pytest.fixture
def left(norce: Norce, config: Path) -> str:
    """Register an order of a merchant, with its documents, and take the merchant out of the configuration."""
    order = norce.order()
    move(norce, order, merchant=LEFT)
    before = config.read_text()
    config.write_text(before.replace("  norce: {tokens", f"  {LEFT}: {{tokens").replace("[norce]", f"[{LEFT}]"))
    assert command("register", order, config=config).exit_code == OK
    config.write_text(before)
    theirs = {"adapterId": "another", "scope": "/cart", "schema": True, "invoke": "http://127.0.0.1:9/x"}
    ours = theirs | {"adapterId": "an_adapter"}
    norce.simulator.records.documents[LEFT, "1", "an_adapter"] = {"id": "an_adapter", "$schema": "x"}
    norce.simulator.records.documents[LEFT, "1", "static_notifications"] = {
        "id": "static_notifications",
        "$schema": "http://norce/configuration/openapi/v1/schemas/configuration.json",
        "adapter": {"publicUrl": "http://norce"},
        "order": {"own": 1, "notifications": [theirs, ours]},
    }
    assert ours_on(norce, order) == 2
    return order


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("arguments", [(), ("--all-open",), ("--channel", "1")])
def test_the_callbacks_of_a_merchant_that_has_left_are_removed(
    norce: Norce, config: Path, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_file: bool,
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    token: tuple[str, ...] = ()
    if from_file:
        (tmp_path / "token").write_text(ENVIRON["TOKEN"] + "\n")
        token = ("--norce-token-file", str(tmp_path / "token"))
    else:
        monkeypatch.setenv(TOKEN_VARIABLE, ENVIRON["TOKEN"])

    result = many("--remove", "--merchant", LEFT, "--slug", "old-slug", *token, *arguments, *WHY, config=config)

    assert (result.exit_code, result.counts["removed"], ours_on(norce, left)) == (OK, 2, 0)


def test_the_documents_of_a_merchant_that_has_left_are_removed(
    norce: Norce, config: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, ENVIRON["TOKEN"])
    removing = ("config", "norce", "--remove", "--merchant", LEFT, "--slug", "old-slug")
    documents = norce.simulator.records.documents

    dry = command(*removing, "--dry-run", "--output", "json", config=config)
    before = dict(documents)
    with closing(Serving(config, ENVIRON)):
        result = command(*removing, *WHY, config=config)
    again = command(*removing, *WHY, config=config)

    place = {"merchant": LEFT, "channel": "1"}
    assert json.loads(dry.stdout) == [
        place | {"document": "static_notifications", "change": "changed"},
        place | {"document": "an_adapter", "change": "removed"},
    ]
    assert (LEFT, "1", "an_adapter") in before
    assert (result.exit_code, result.stderr) == (OK, "")
    assert (LEFT, "1", "an_adapter") not in documents
    order = documents[LEFT, "1", "static_notifications"]["order"]
    assert (order["own"], [each["adapterId"] for each in order["notifications"]]) == (1, ["another"])
    assert execute(config, "SELECT command, why, matching, changed FROM actions") == [
        ("remove-documents", WHY[1], '{"merchant":"gone"}', 2)
    ]
    assert again.exit_code == NOTHING_MATCHED


def test_the_last_document_of_a_channel_stays(norce: Norce, config: Path) -> None:
    """Norce removes a channel with its last document."""
    norce.simulator.records.documents["norce", "1", "an_adapter"] = {"id": "an_adapter", "$schema": "x"}

    result = command("config", "norce", "--remove", "--merchant", "norce", *WHY, config=config)

    assert (result.exit_code, "last document" in result.stderr) == (FAILED, True)
    assert ("norce", "1", "an_adapter") in norce.simulator.records.documents


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "choose ORDER, --all-open, --file IDS"),
        (["--remove"], "choose ORDER"),
        (["--merchant", "norce"], "choose ORDER"),
        (["o1", "--all-open", "--why", "x"], "choose ORDER"),
        (["--all-open"], "--why is needed"),
        (["--all-open", "--why", " "], "--why is needed"),
        (["--file", "/nowhere/ids", "--why", "x"], "/nowhere/ids cannot be read: No such file"),
        (["--file", "/", "--why", "x"], "/ cannot be read: Is a directory"),
        (["--all-open", "--channel", "9", "--why", "x"], "no such merchant and channel"),
        (["--remove", "--merchant", "gone", "--why", "x"], "give --slug"),
        (["--remove", "--merchant", "gone", "--slug", "a.b", "--why", "x"], "--slug must be"),
        (["--remove", "--merchant", "gone", "--slug", "gone", "--why", "x"], TOKEN_VARIABLE),
        (["--remove", "--merchant", "norce", "--slug", "norce", "--why", "x"], "no longer configured"),
        (["--all-open", "--merchant", "gone", "--slug", "gone", "--why", "x"], "no longer configured"),
        (["--remove", "--merchant", "gone", "--norce-token-file", "t", "--why", "x"], "needs --slug"),
        (["--remove", "--merchant", "g", "--slug", "g", "--norce-token-file", "no", "--why", "x"], "cannot be read"),
    ],
)
def test_a_wrong_choice_is_refused_before_norce_is_called(config: Path, arguments: list[str], says: str) -> None:
    result = command("register", *arguments, config=config)

    assert (result.exit_code, says in result.stderr) == (USAGE, True), result.stderr


def test_a_file_with_an_invalid_id_is_refused_with_its_lines(norce: Norce, config: Path, tmp_path: Path) -> None:
    order = norce.order()
    listing = tmp_path / "ids"
    listing.write_text(f"{order}\n{'x' * 65}\n{{order.id}}\n")

    result = command("register", "--file", str(listing), *WHY, config=config)

    assert (result.exit_code, ours_on(norce, order)) == (USAGE, 0)
    assert [each.split(": ")[0] for each in result.stderr.splitlines()] == [f"{listing}:2", f"{listing}:3"]


def test_without_an_order_nothing_matched(norce: Norce, config: Path) -> None:
    assert many("--all-open", *WHY, config=config).exit_code == NOTHING_MATCHED
