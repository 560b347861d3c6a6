"""`norce-adapter simulate`: what it prints, and what it refuses to start with."""

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

from tests import PATIENCE

COMMAND = Path(sys.executable).with_name("norce-adapter")
HEADERS = {"authorization": "Bearer secret", "x-merchant": "norce", "x-channel": "1"}


@contextmanager
def simulating(*words: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A simulator in a process of its own, and its address."""
    arguments = [COMMAND, "simulate", "--port", "0", "--token", "secret", *words]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stdout.readline() for _ in range(4)]
            yield re.search(r"http://127\.0\.0\.1:\d+/checkout", lines[1])[0], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def test_it_serves_prints_and_remembers(tmp_path: Path) -> None:
    store = str(tmp_path / "norce.db")
    with simulating("--store", store, "--switch", "order_id_underscore=true") as (address, process):
        created = httpx.post(f"{address}/order/api/v0/checkout/orders", json={}, headers=HEADERS, trust_env=False)
        row = process.stdout.readline()
    order_id = created.json()["id"]

    assert process.returncode == 0, process.stderr.read()
    assert order_id.startswith("o_")
    assert re.search(r"→ request +201 +\d+ ms +POST +/checkout/order/api/v0/checkout/orders$", row)
    with simulating("--store", store) as (address, _):
        url = f"{address}/order/api/v0/checkout/orders/{order_id}"
        assert httpx.get(url, headers=HEADERS, trust_env=False).json()["id"] == order_id


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--switch", "colour=red"], 2, "there is no switch colour"),
        (["--switch", "colour"], 2, "NAME=VALUE"),
        (["--switch", "hook_seconds=soon"], 2, "hook_seconds"),
        (["--store", "{mine}"], 5, "notes.txt"),
        (["--port", "{taken}"], 1, "cannot listen"),
    ],
)
def test_what_it_cannot_start_with_ends_it_in_one_line(
    tmp_path: Path, words: list[str], status: int, says: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = [each.format(mine=tmp_path / "notes.txt", taken=taken.getsockname()[1]) for each in words]
        result = subprocess.run(
            [COMMAND, "simulate", *filled], capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    assert result.returncode == status
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
