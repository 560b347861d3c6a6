"""Lists: times, forms, columns and counts."""

import csv
import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from adapter.cli.shared import moment_in, print_rows
from adapter.identifiers import Channel
from tests.cli.test_cli import CONFIG, NOTHING_MATCHED, OK, USAGE, write
from tests.cli.test_ledger import command
from tests.ledger.test_verdict_log import LATE, Writing
from tests.ledgers import opened, receipt

pytestmark = pytest.mark.usefixtures("logging_as_before")

NOW = datetime(2026, 2, 3, 12, tzinfo=UTC)
MOMENTS: dict[str, str | None] = {
    "1h": "2026-02-03T11:00:00+00:00",
    "30d": "2026-01-04T12:00:00+00:00",
    "02:10": "2026-02-03T02:10:00+00:00",
    "12:00": "2026-02-03T12:00:00+00:00",
    "12:01": "2026-02-02T12:01:00+00:00",
    "13:00+02:00": "2026-02-03T11:00:00+00:00",
    "23:30-02:00": "2026-02-03T01:30:00+00:00",
    "2026-02-03": "2026-02-03T00:00:00+00:00",
    "2026-02-03 02:10": "2026-02-03T02:10:00+00:00",
    "2026-02-03T12:00:00.001Z": "2026-02-03T12:00:00.001000+00:00",
    "2027-01-01": "2027-01-01T00:00:00+00:00",
    "999999999d": None,
    "-1h": None,
    "1h30m": None,
    "24:00": None,
    "12": None,
    "yesterday": None,
    "": None,
}


@pytest.mark.parametrize(("text", "expected"), MOMENTS.items(), ids=repr)
def test_a_time_is_a_duration_before_now_or_a_time_of_the_last_day_or_a_moment(text: str, expected: str | None) -> None:
    moment = moment_in(text, NOW)

    assert (moment and moment.isoformat()) == expected


# --- forms ----------------------------------------------------------------------------------------------------------

ID = "o_yClTSySjyAuuBjmiBlHCjuEcTf"
ROW: dict[str, Any] = {
    "id": 7, "merchant": "norce", "channel": "1", "order_id": ID, "message": "the shop says no, " * 10, "code": None,
}  # fmt: skip


def use_terminal(monkeypatch: pytest.MonkeyPatch, *, columns: int) -> None:
    """Make standard output, as it is now, a terminal of this width."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": str(columns)}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 300])
def test_no_value_is_cut_on_any_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    use_terminal(monkeypatch, columns=columns)

    print_rows([ROW, ROW | {"id": 8}], "table")

    shown = capsys.readouterr().out
    assert shown.count(ID) == 2
    assert "…" not in shown
    assert shown.split().count("says") == 20
    is_table = any(line.split()[:1] == ["7"] and ID in line for line in shown.splitlines())
    assert is_table == (columns > 80)


def test_a_terminal_that_is_too_narrow_has_a_paragraph_for_each_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_terminal(monkeypatch, columns=40)

    print_rows([ROW, ROW | {"id": 8}], "table", ("id", "merchant", "order_id", "code"))

    assert capsys.readouterr().out == (
        f"id        7\nmerchant  norce\norder_id  {ID}\n\nid        8\nmerchant  norce\norder_id  {ID}\n"
    )


def test_a_pipe_gets_one_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([ROW, ROW | {"message": "x" * 3000}], "table")

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "x" * 3000 in lines[2]


def test_csv_has_all_columns_and_survives_every_text(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": 7, "text": 'a "b", c', "codes": ["x", "y"], "nothing": None, "yes": True, "nasty": "\x1b[2J\n"}

    print_rows([row, row], "csv", ("id",))

    head, first, second = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head == [*row]
    assert first == second == ["7", 'a "b", c', '["x", "y"]', "", "true", "\\x1b[2J\\n"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\uff1d1"])
def test_a_text_in_csv_is_no_formula(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """A reference comes from the shop, and a person opens the list in a spreadsheet."""
    print_rows([{"text": text, "listed": [text], "number": -1}], "csv")

    _, (first, *others) = csv.reader(io.StringIO(capsys.readouterr().out))
    assert first == f"'{text}"
    assert others == [f'["{text}"]', "-1"]


CHANNELS: dict[str, tuple[list[Channel], dict[str, Any], set[str]]] = {
    "one channel": ([Channel("norce", "1")], {}, set()),
    "two channels": ([Channel("norce", "1"), Channel("norce", "2")], {}, {"channel"}),
    "two merchants": ([Channel("norce", "1"), Channel("other", "1")], {}, {"merchant"}),
    "a merchant that is gone": ([Channel("norce", "1")], {"merchant": "gone"}, {"merchant"}),
    "a channel that is gone": ([Channel("norce", "1")], {"channel": "9"}, {"channel"}),
}


@pytest.mark.parametrize(("channels", "more", "shown"), CHANNELS.values(), ids=CHANNELS)
def test_merchant_and_channel_are_shown_if_there_are_several(
    capsys: pytest.CaptureFixture[str], channels: list[Channel], more: dict[str, Any], shown: set[str]
) -> None:
    print_rows([ROW | more], "table", ("id", "merchant", "channel", "order_id"), channels=channels)

    assert {*capsys.readouterr().out.splitlines()[0].split()} == {"id", "order_id", *shown}


# --- of the ledger --------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a ledger with 3 deliveries, 5 notifications and 2 verdicts."""
    with opened(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        for number in range(3):
            ledger.receive(receipt(f"o_yClT-{number}", wanted=[(ledger.export, True)], reference=f"100-{number}"))
        ledger.receive(receipt("o_yClT-0", 2))
        ledger.receive(receipt("oXyClT-0"))
        writing = Writing(ledger)
        refused = replace(LATE, kind="answer", order_id="o_yClT-0", answered=None)
        patched = replace(refused, route="freight", decided="patch", codes=("/cart/items/0/price",))
        writing.record(refused, patched, replace(refused, order_id="another"))
        writing.flush()
    return write(tmp_path, text=CONFIG)


LISTS: dict[str, tuple[list[str], int]] = {
    "deliveries": (["deliveries", "list"], 3),
    "notifications": (["notifications", "list"], 5),
    "verdicts": (["verdicts", "list"], 3),
}


@pytest.mark.parametrize(("arguments", "number"), LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_a_list_that_is_not_whole_says_so(config: Path, arguments: list[str], number: int, form: str) -> None:
    part = command(*arguments, "--limit", "2", "--output", form, config=config)
    whole = command(*arguments, "--output", form, config=config)

    assert part.stderr == f"2 of {number}; --limit changes the number\n"
    assert whole.stderr == ""
    assert "of" not in part.stdout.split()


EMPTY: dict[str, tuple[list[str], str]] = {
    "deliveries": (["deliveries", "list", "--since", "1h"], "no delivery matches"),
    "notifications": (["notifications", "list", "--reference", "nothing"], "no notification matches"),
    "verdicts": (["verdicts", "list", "--order", "nobody"], "no recorded verdict matches"),
    "stats": (["verdicts", "stats"], "no route had a late or shadow verdict"),
    "actions": (["store", "actions"], "nobody has changed anything yet"),
}


@pytest.mark.parametrize(("arguments", "words"), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_an_empty_list_is_a_sentence(config: Path, arguments: list[str], words: str, form: str) -> None:
    result = command(*arguments, "--output", form, config=config)

    assert (result.exit_code, result.stdout) == (NOTHING_MATCHED, "[]\n" if form == "json" else "")
    assert words in result.stderr


def found(config: Path, *arguments: str) -> list[Any]:
    result = command(*arguments, "--output", "json", config=config)
    assert result.exit_code in (OK, NOTHING_MATCHED)
    return [row["order_id"] for row in json.loads(result.stdout)]


def test_orders_are_found_by_the_beginning_of_their_id_and_by_a_reference(config: Path) -> None:
    assert sorted(found(config, "deliveries", "list", "--order", "o_yClT")) == ["o_yClT-0", "o_yClT-1", "o_yClT-2"]
    assert found(config, "notifications", "list", "--order", "o_yClT-0") == ["o_yClT-0", "o_yClT-0"]
    assert found(config, "notifications", "list", "--order", "oXyClT") == ["oXyClT-0"]
    assert found(config, "notifications", "list", "--order", "o_yCl") == []
    assert found(config, "deliveries", "list", "--reference", "100-1") == ["o_yClT-1"]
    assert found(config, "verdicts", "list", "--reference", "100-0") == ["o_yClT-0", "o_yClT-0"]


def test_a_change_refuses_the_beginning_of_several_ids(config: Path) -> None:
    result = command("deliveries", "discard", "--state", "waiting", "--order", "o_yClT", "--dry-run", "--why", "x",
                      config=config)  # fmt: skip

    assert result.exit_code == USAGE
    assert "several orders begin like this" in result.stderr


def test_the_verdicts_of_an_order_say_who_refused_it_and_which_hook_changed_it(config: Path) -> None:
    result = command("verdicts", "list", "--order", "o_yClT-0", config=config)

    _, changed, refused = result.stdout.splitlines()
    assert changed.split()[1:] == [
        "answer", "fjallboden", "1", "o_yClT-0", "freight", "patch", "/cart/items/0/price", "2300",
    ]  # fmt: skip
    assert refused.split()[5:8] == [LATE.route, "reject", "national-id-missing"]


@pytest.mark.parametrize("option", ["--since", "--until"])
def test_a_text_that_names_no_time_is_wrong_usage(config: Path, option: str) -> None:
    result = command("deliveries", "list", option, "lunch", config=config)

    assert result.exit_code == USAGE
    assert "02:10" in result.stderr
