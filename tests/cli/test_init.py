"""The command `init`."""

import json
import socket
from contextlib import closing
from pathlib import Path

import pytest

from tests import ROOT
from tests.cli.test_cli import CONFIGURATION, FAILED, OK, Serving, run

pytestmark = pytest.mark.usefixtures("logging_as_before")

ORDERS = ROOT / "adapter" / "sandbox" / "demo" / "orders"
ENVIRON = {"NORCE_TOKEN": "a-token", "NORCE_ADAPTER_URL_KEY": "a-key-of-at-least-thirty-two-bytes"}


def test_it_writes_15_lines_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    result = run("init", config=path, env=ENVIRON)

    assert result.exit_code == OK
    assert len(path.read_text().splitlines()) == 15
    checked = run("check", "--strict", config=path, env=ENVIRON)
    assert (checked.exit_code, checked.stderr) == (OK, "")


def test_a_purchase_in_the_sandbox_is_delivered_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    run("init", config=path, env=ENVIRON)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ports = "server: {host: 127.0.0.1, port: 0}\noperations: {port: 0}\n"  # so that other tests have theirs
    path.write_text(path.read_text().replace(":8090/", f":{port}/") + ports)

    with closing(Serving(path, ENVIRON)) as service:
        options = ["--scenario", "happy-purchase", "--adapter", service.address]
        result = run("simulate", *options, config=path, env=ENVIRON)
        own = run("simulate", *options, "--order", ORDERS / "order-completed.json", config=path, env=ENVIRON)

    assert result.exit_code == OK, result.output
    assert "this Norce has port" not in result.stderr
    assert json.loads(result.stdout)["deliveries"] == {"delivered": 1}
    assert json.loads(own.stdout)["deliveries"] == {"delivered": 1}


def test_it_prints_the_variables_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    result = run("init", config=path, env={"NORCE_TOKEN": "a-token", "NORCE_ADAPTER_URL_KEY": None})

    [line] = [line for line in result.stdout.splitlines() if "export" in line]
    assert "NORCE_TOKEN" not in line
    given = dict(each.split("=", 1) for each in line.split()[1:])
    assert given["NORCE_ADAPTER_CONFIG"] == str(path)
    assert run("check", config=path, env={**given, "NORCE_TOKEN": "a-token"}).exit_code == OK
    assert (
        run("check", config=path, env={"NORCE_TOKEN": "a-token", "NORCE_ADAPTER_URL_KEY": None}).exit_code
        == CONFIGURATION
    )


def test_it_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("mine")

    result = run("init", config=path)

    assert (result.exit_code, path.read_text()) == (FAILED, "mine")
    assert "exists already" in result.stderr


@pytest.mark.parametrize("name", ["missing/config.yaml", "."])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    result = run("init", config=tmp_path / name)

    assert result.exit_code == FAILED
    assert result.stderr.count("\n") == 1
