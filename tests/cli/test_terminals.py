"""Commands on a terminal that does not take UTF-8, on a full disk, and with signals."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from adapter import cli
from adapter.cli.shared import stop_signal
from tests import PATIENCE
from tests.cli.test_cli import CONFIG, ENVIRON, NOTHING_MATCHED, ORDER, save, write
from tests.ledgers import opened

pytestmark = pytest.mark.usefixtures("logging_as_before")

COMMAND = Path(sys.executable).with_name("norce-adapter")
ORDER_ID = "order-åäö-☃"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminals")
    write(folder, text=CONFIG.replace("seen: {", "seen: {settings: {}, "))
    with opened(f"sqlite:///{folder}/ledger.db") as ledger:
        ledger.owed(1, order_id=ORDER_ID)
    save(folder, ORDER | {"id": ORDER_ID})
    return folder


def run(folder: Path, *arguments: str, charset: str = "ascii") -> Result:
    environ = ENVIRON | {"NORCE_ADAPTER_CONFIG": str(folder / "config.yaml")}
    return CliRunner(charset=charset).invoke(cli.main, arguments, env=environ)


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["serve", "--help"], ["simulate", "--help"], ["version"], ["check"], ["handlers", "list"],
        ["config", "schema"], ["deliveries", "list"], ["deliveries", "show", "1"], ["notifications", "list"],
        ["notifications", "show", "1"], ["queues", "list"], ["store", "stats"], ["store", "check"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_command_fails_at_a_character(folder: Path, arguments: list[str], charset: str) -> None:
    result = run(folder, *arguments, charset=charset)

    assert result.exception is None, result.output
    assert result.exit_code == 0


def test_a_character_that_cannot_be_shown_is_a_question_mark(folder: Path) -> None:
    assert "order-???-?" in run(folder, "deliveries", "list").stdout
    assert "order-åäö-?" in run(folder, "deliveries", "list", charset="latin-1").stdout
    assert ORDER_ID in run(folder, "deliveries", "list", charset="utf-8").stdout


@pytest.mark.parametrize("charset", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    "arguments", [["deliveries", "list"], ["deliveries", "show", "1"], ["notifications", "list"]], ids=" ".join
)
def test_json_loses_no_character(folder: Path, arguments: list[str], charset: str) -> None:
    result = run(folder, *arguments, "--output", "json", charset=charset)

    found: Any = json.loads(result.stdout)
    assert (found[0] if isinstance(found, list) else found)["order_id"] == ORDER_ID


def test_an_error_about_such_a_text_is_one_line(folder: Path) -> None:
    result = run(folder, "explain", "ö.json", "--callback", "order-status")

    assert result.exit_code == 2
    assert result.stderr == "?.json cannot be read: No such file or directory\n"


def test_an_order_that_is_not_there_is_still_3(folder: Path) -> None:
    assert run(folder, "deliveries", "list", "--order", "å").exit_code == NOTHING_MATCHED


def test_an_output_that_cannot_be_written_is_one_line_and_1() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [COMMAND, "version"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False
        )

    assert (ended.returncode, ended.stderr) == (1, "the output cannot be written: No space left on device\n")


# --- signals --------------------------------------------------------------------------------------------------------


def ends(number: signal.Signals) -> None:
    async def main() -> None:
        with stop_signal() as stop:
            os.kill(os.getpid(), number)
            async with asyncio.timeout(PATIENCE):
                await stop.wait()

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_command_in_good_order(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # `serve`, run by another test, ignores SIGHUP
    try:
        ends(number)
    finally:
        signal.signal(number, before)


def test_an_ignored_sighup_stays_ignored() -> None:
    """`nohup` and `serve` ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(TimeoutError):
            asyncio.run(_wait_for_sighup())
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def _wait_for_sighup() -> None:
    with stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(0.05):
            await stop.wait()
