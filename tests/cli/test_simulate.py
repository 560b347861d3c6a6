"""The command `simulate`."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import ROOT
from tests.cli.test_cli import run

pytestmark = pytest.mark.usefixtures("logging_as_before")

COMMAND = Path(sys.executable).with_name("norce-adapter")
HEADERS = {"authorization": "Bearer secret", "x-merchant": "norce", "x-channel": "1"}


@contextmanager
def simulating(*words: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run a simulator as a process and yield its URL."""
    arguments = [COMMAND, "simulate", "--port", "0", "--token", "secret", *words]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            yield re.search(r"http://127\.0\.0\.1:\d+/checkout", lines[1])[0], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def test_it_serves_and_prints_requests() -> None:
    with simulating("--switch", "clock_skew_seconds=60") as (address, process):
        created = httpx.post(f"{address}/order/api/v0/checkout/orders", json={}, headers=HEADERS, trust_env=False)
        row = process.stdout.readline()

    assert process.returncode == 0, process.stderr.read()
    assert created.status_code == 201
    assert re.search(r"→ request +201 +\d+ ms +POST +/checkout/order/api/v0/checkout/orders$", row)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--switch", "colour=red"], 2, "there is no switch colour"),
        (["--switch", "colour"], 2, "NAME=VALUE"),
        (["--switch", "hook_seconds=soon"], 2, "hook_seconds"),
        (["--port", "{taken}"], 1, "cannot listen"),
    ],
)
def test_a_wrong_option_ends_it_with_one_line(words: list[str], status: int, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = [each.format(taken=taken.getsockname()[1]) for each in words]
        result = run("simulate", *filled)

    assert result.exit_code == status
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenario", "happy-purchase", "--orders", "3"], "--orders is for the scenario burst"),
        (["--orders", "3"], "need a --scenario"),
        (["--order", "order.json"], "need a --scenario"),
        (
            ["--scenario", "voucher", "--order", "order.json"],
            "voucher needs an order of its own; --order is for happy-",
        ),
        (["--scenario", "happy-purchase", "--order", "/no/such/file"], "/no/such/file cannot be read"),
        (["--scenario", "happy-purchase", "--order", __file__], "holds no order"),
        (["--scenario", "sad-purchase"], "'sad-purchase' is not one of"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: list[str], message: str) -> None:
    environ = {"NORCE_TOKEN": "a token", "NORCE_ADAPTER_URL_KEY": "a-key-of-at-least-thirty-two-bytes"}

    result = run("simulate", *options, config=ROOT / "docs" / "scenarios.yaml", env=environ)

    assert result.exit_code == 2
    assert message in result.stderr


def test_a_scenario_says_first_that_its_port_is_not_that_of_the_configuration() -> None:
    environ = {"NORCE_TOKEN": "a token", "NORCE_ADAPTER_URL_KEY": "a-key-of-at-least-thirty-two-bytes"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ["--scenario", "happy-purchase", "--port", port]
        result = run("simulate", *options, config=ROOT / "docs" / "scenarios.yaml", env=environ)

    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == f"warning: this Norce has port {port}, but norce.base_url leads to http://127.0.0.1:8090/checkout"
    assert "cannot listen" in second
