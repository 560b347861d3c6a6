"""The commands `verdicts`."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.cli.test_cli import NOTHING_MATCHED, OK, STORE, USAGE, execute
from tests.cli.test_ledger import NASTY, command, make
from tests.ledger.test_verdict_log import LATE, SHADOW, Writing
from tests.ledgers import NOON, opened

pytestmark = pytest.mark.usefixtures("logging_as_before")


@pytest.fixture(params=[True, False], ids=["sqlite", "postgresql"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The configuration of a ledger with two late verdicts and one of a shadow route."""
    url = f"sqlite:///{tmp_path}/ledger.db" if request.param else request.getfixturevalue("postgres_url")
    with opened(url) as ledger:
        writing = Writing(ledger)
        for number, each in enumerate((LATE, SHADOW, replace(LATE, order_id=NASTY))):
            ledger.clock.now = NOON + number
            writing.record(each)
        writing.flush()
    return make(tmp_path, url=None if request.param else url)


def orders(*arguments: str, config: Path) -> list[Any]:
    result = command("verdicts", "list", *arguments, "--output", "json", config=config)
    assert result.exit_code == OK
    return [row["order_id"] for row in json.loads(result.stdout)]


def test_verdicts_are_listed(config: Path) -> None:
    result = command("verdicts", "list", config=config)

    assert result.exit_code == OK
    head, newest, _, oldest = result.stdout.splitlines()
    assert head.split() == [
        "at", "kind", "merchant", "channel", "order_id", "route", "decided", "codes", "answered", "took_ms",
    ]  # fmt: skip
    assert newest.split()[:2] == ["2026-02-03T12:00:00.002Z", "late"]
    assert "\x1b" not in newest
    assert oldest.split()[2:] == [
        "fjallboden",
        "1",
        "order-1",
        LATE.route,
        "reject",
        "national-id-missing",
        "no-name",
        "approve",
        "2300",
    ]


def test_verdicts_are_filtered(config: Path) -> None:
    assert orders(config=config) == [NASTY, "order-1", "order-1"]
    assert orders("--limit", "1", config=config) == [NASTY]
    assert orders("--kind", "shadow", config=config) == ["order-1"]
    assert orders("--route", LATE.route, "--order", "order-1", config=config) == ["order-1", "order-1"]
    assert orders("--since", "2026-02-03T12:00:00.002", config=config) == [NASTY]


def test_verdicts_are_counted(config: Path) -> None:
    for_people = command("verdicts", "stats", config=config)
    for_programs = command("verdicts", "stats", "--since", "2026-02-03", "--output", "json", config=config)

    counted = {"route": LATE.route, "late": 2, "shadow": 1, "rejects": 2, "failed": 0, "differs": 2}
    assert json.loads(for_programs.stdout) == [counted]
    head, row = for_people.stdout.splitlines()
    assert dict(zip(head.split(), row.split(), strict=True)) == {name: str(value) for name, value in counted.items()}


@pytest.mark.parametrize(
    "arguments",
    [["list", "--order", "nobody's"], ["list", "--route", "export"], ["list", "--since", "2027-01-01"],
     ["stats", "--since", "2027-01-01"]],
    ids=" ".join,
)  # fmt: skip
def test_no_match_is_3(config: Path, arguments: list[str]) -> None:
    assert command("verdicts", *arguments, config=config).exit_code == NOTHING_MATCHED


@pytest.mark.parametrize(
    "arguments", [["list", "--kind", "early"], ["list", "--since", "lunch"], ["list", "--limit", "0"]], ids=" ".join
)
def test_wrong_usage_is_2(tmp_path: Path, arguments: list[str]) -> None:
    assert command("verdicts", *arguments, config=make(tmp_path)).exit_code == USAGE


@pytest.mark.parametrize("name", ["list", "stats"])
def test_a_missing_store_or_older_tables_are_5(tmp_path: Path, name: str) -> None:
    config = make(tmp_path)
    missing = command("verdicts", name, config=config)
    with opened(f"sqlite:///{tmp_path}/ledger.db"):
        pass
    execute(config, "DROP TABLE verdicts")
    older = command("verdicts", name, config=config)

    assert (missing.exit_code, older.exit_code) == (STORE, STORE)
    assert "there is no database at" in missing.stderr
    assert "norce-adapter store migrate" in older.stderr
