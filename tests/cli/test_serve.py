"""`norce-adapter serve` as a process: its log, its signals, its descriptors."""

import fcntl
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter import config as configuration
from adapter.callbacks.senders import Senders
from adapter.identifiers import Channel
from tests import PATIENCE, ROOT
from tests.cli.test_cli import CONFIG, ENVIRON, ORDER, write

COMMAND = Path(sys.executable).with_name("norce-adapter")
QUIET = CONFIG.replace("norce: {base_url:", "norce: {refresh: 0s, base_url:") + "reconciliation: {every: 0s}\n"


class Process:
    """A service whose standard error is any file. Its Unix socket tells whether it serves."""

    def __init__(self, folder: Path, stderr: Any, text: str = QUIET, **options: Any) -> None:
        self.path = write(folder, text=text)
        environ = os.environ | ENVIRON | {"NORCE_ADAPTER_CONFIG": str(self.path)} | options.pop("env", {})
        options |= {"stdin": subprocess.DEVNULL, "stdout": stderr, "stderr": stderr}
        self.process = subprocess.Popen([COMMAND, "serve"], env=environ, cwd=folder, **options)
        self._socket = folder / "operations.sock"

    def ask(self, path: str) -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self._socket)), timeout=PATIENCE) as http:
            return http.get(f"http://operations{path}")

    def wait_until_serving(self) -> "Process":
        def serves() -> bool:
            assert self.process.poll() is None, "the service has ended"
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self._socket))  # httpx leaves its own socket open if it cannot connect
                return self.ask("/startupz").status_code == 200
            return False

        wait_until(serves)
        return self

    def dropped(self) -> float:
        return float(re.search(r"^norce_adapter_log_lines_dropped_total (.*)$", self.ask("/metrics").text, re.M)[1])

    def notify(self, address: str, order_id: str) -> int:
        url = Senders(configuration.load(self.path, ENVIRON).senders).signed_url(
            address, Channel("norce", "1"), order_id, "order-status"
        )
        return httpx.post(url, json=ORDER | {"id": order_id}, trust_env=False, timeout=PATIENCE).status_code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def address_in(line: bytes) -> str:
    return re.search(rb'"address":"([^"]+)"', line)[1].decode()


# --- a log that takes no lines --------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    for each in (reading, writing):
        with suppress(OSError):
            os.close(each)


def test_a_log_whose_reader_has_gone_does_not_end_the_service(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with closing(Process(tmp_path, writing)) as service:
        service.wait_until_serving()
        address = address_in(os.read(reading, 4096))
        os.close(writing)
        os.close(reading)

        statuses = [service.notify(address, f"o{number}") for number in range(10)]

        assert statuses == [200] * 10
        wait_until(lambda: service.dropped() >= 20)  # one for each callback and each attempt
        assert service.ask("/livez").status_code == 200
        assert service.stop() == 0


def test_a_log_whose_reader_has_stopped_delays_nothing(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with closing(Process(tmp_path, writing)) as service:
        service.wait_until_serving()
        address = address_in(os.read(reading, 4096))
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 64)
        os.set_blocking(writing, True)

        statuses = [service.notify(address, f"o{number}") for number in range(30)]

        assert statuses == [200] * 30
        assert service.ask("/livez").status_code == 200
        assert service.stop() == 0


@pytest.mark.parametrize("file", ["/dev/full", None], ids=["a full disk", "closed"])
def test_the_service_starts_and_stops_without_a_log(tmp_path: Path, file: str | None) -> None:
    stderr = os.open(file or os.devnull, os.O_WRONLY)
    options = {} if file else {"preexec_fn": lambda: os.closerange(1, 3)}
    with closing(Process(tmp_path, stderr, **options)) as service:
        service.wait_until_serving()

        wait_until(lambda: service.dropped() == 1)

        descriptors = {number: os.readlink(f"/proc/{service.process.pid}/fd/{number}") for number in (1, 2)}
        assert set(descriptors.values()) == {file or os.devnull}
        assert service.stop() == 0
    os.close(stderr)


def test_problems_of_the_configuration_end_with_4_on_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, closing(Process(tmp_path, full, text="adapter: {}")) as service:
        assert service.process.wait(PATIENCE) == 4


# --- descriptors, signals, format -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service with a low soft limit on open files and a log for people."""
    folder = tmp_path_factory.mktemp("service")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    text = QUIET + "logs: {level: info, format: text}\n"
    with (folder / "log").open("w") as file, closing(Process(folder, file, text=text, preexec_fn=limit)) as service:
        yield service.wait_until_serving()


def test_the_format_of_the_log_is_configured(service: Process) -> None:
    path = service.path.with_name("log")
    wait_until(lambda: "serving" in path.read_text())

    assert "{" not in path.read_text()


def test_a_soft_limit_on_open_files_is_raised(service: Process) -> None:
    soft, hard = resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE)

    assert soft == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_sighup_does_not_end_the_service(service: Process) -> None:
    service.process.send_signal(signal.SIGHUP)

    assert service.ask("/livez").status_code == 200
    assert service.process.poll() is None


HANGS_UP_DURING_THE_IMPORTS = """
import os, signal, sys
from adapter import cli

class Terminal:
    def find_spec(self, name, *_):
        if name == "adapter.cli.serve":
            os.kill(os.getpid(), signal.SIGHUP)
            sys.exit(7)

sys.meta_path.insert(0, Terminal())
cli.main(["serve"])
"""


def test_sighup_does_not_end_a_start() -> None:
    """The imports of `serve` take a second."""
    ended = subprocess.run([sys.executable, "-c", HANGS_UP_DURING_THE_IMPORTS], check=False, timeout=PATIENCE)

    assert ended.returncode == 7


def test_a_limit_on_open_files_that_is_too_low_is_one_sentence(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    with (tmp_path / "log").open("w") as file, closing(Process(tmp_path, file, preexec_fn=limit)) as service:
        assert service.process.wait(PATIENCE) == 1

    told = (tmp_path / "log").read_text()
    # 928, and 4 for each of the two further queues: a queue may start a delivery beyond the slots.
    assert told == "the limit on open files is 512, but 936 are needed; raise it (ulimit -n)\n"
    assert "928" in (ROOT / "docs" / "deployment.md").read_text("utf-8")


def test_the_service_outlives_its_terminal(tmp_path: Path) -> None:
    terminal, side = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)

    with closing(Process(tmp_path, side, preexec_fn=take_terminal)) as service:
        service.wait_until_serving()
        os.close(side)
        os.close(terminal)  # sends SIGHUP, and every further line fails

        assert service.ask("/livez").status_code == 200
        assert service.stop() == 0
