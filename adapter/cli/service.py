"""The client for the running service, on this host or another."""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from adapter.cli.shared import FAILED, STORE, USAGE, end, load_config, printable
from adapter.config import Config

AnyStep = TypeVar("AnyStep", bound=msgspec.Struct)

TIMEOUT_SECONDS = 30.0
# A line comes after each page of an event log. A page may take two requests, and `norce.timeout` is at most a minute.
TIMEOUT_OF_A_LINE_SECONDS = 180.0


class RunningService:
    """A client for the commands of a running service. An error ends the process."""

    def __init__(self, http: httpx.Client, name: str, remedy: str) -> None:
        self._http = http
        self._name = name
        self._remedy = remedy

    def run(self, command: str, body: Any, *, seconds: float = TIMEOUT_SECONDS) -> Any:
        """Run a command and return its answer, which may take that many seconds."""
        with self._end_on_error("the change may have been made; `norce-adapter store actions` lists the changes"):
            answer = self._http.post(f"/commands/{command}", content=msgspec.json.encode(body), timeout=seconds)
            return self._parse(answer)

    def run_line_by_line(self, command: str, body: Any) -> Iterator[dict[str, Any]]:
        """Run a command and yield each line of its answer as it comes."""
        content = msgspec.json.encode(body)
        with (
            self._end_on_error("run the command again"),
            self._http.stream(
                "POST", f"/commands/{command}", content=content, timeout=TIMEOUT_OF_A_LINE_SECONDS
            ) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                self._parse(answer)
            for line in answer.iter_lines():
                yield msgspec.json.decode(line, type=dict[str, Any])

    def _parse(self, answer: httpx.Response) -> Any:
        content = answer.json()
        if answer.status_code != 200:
            message = content.get("message") if isinstance(content, dict) else None
            code = STORE if answer.status_code == 503 else FAILED
            end(code, f"{self._name} answered {answer.status_code}: {printable(message or 'no message')}")
        return content

    @contextlib.contextmanager
    def _end_on_error(self, advice: str) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            end(FAILED, f"no service answers at {self._name}. {self._remedy}")
        except httpx.HTTPError as error:
            end(FAILED, f"no answer from {self._name} ({type(error).__name__}): {advice}")
        except ValueError:
            end(FAILED, f"the server at {self._name} is no norce-adapter")


def run_in_steps(
    run: Callable[[AnyStep], Any],
    step: AnyStep,
    rate: int | None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[int]:
    """Run a command in steps, at most `rate` changes per second. Yield the changes of each."""
    while True:
        started_at = clock()
        answer = run(step)
        yield answer["changed"]
        if answer["after"] is None:
            return
        step = msgspec.structs.replace(step, after=answer["after"], action=answer["action"])
        if rate:
            sleep(max(0.0, answer["changed"] / rate - (clock() - started_at)))


@contextlib.contextmanager
def running_service(config_path: Path, to: str | None, token: str | None) -> Iterator[RunningService]:
    """Connect to the service at `to`, or else to the Unix socket of the service on this host."""
    if to is not None:
        if not re.fullmatch(r"https?://([^/?#\s\[\]@]+|\[[0-9a-fA-F:.]+\](:\d+)?)/?", to):
            end(USAGE, "--to must be a URL such as http://10.0.0.5:8081")
        headers = {b"authorization": b"Bearer " + token.encode()} if token else {}
        remedy = "Start it, or correct the URL of --to"
        with httpx.Client(base_url=to, headers=headers, trust_env=False, timeout=TIMEOUT_SECONDS) as http:
            yield RunningService(http, to, remedy)
        return
    socket_path = load_config(config_path).operations.socket
    if socket_path is None:
        end(USAGE, "operations.socket is null, so give the URL of the operations port (--to) and its token")
    name = str(Path(socket_path).absolute())
    remedy = (
        "Start it with `norce-adapter serve`, or with `norce-adapter serve --hold` to change the ledger while nothing "
        "is delivered; for a service on another host, give --to"
    )
    try:
        client = _over_socket(socket_path)
    except PermissionError:
        end(FAILED, f"only the user of the service may use {name}; run the command as that user")
    except OSError:
        end(FAILED, f"no service answers at {name}. {remedy}")
    with client as http:
        yield RunningService(http, name, remedy)


def is_held(config: Config) -> bool:
    """Return whether a service on this host runs that was started with `serve --hold`."""
    if config.operations.socket is None:
        return False
    try:
        with _over_socket(config.operations.socket) as http:
            return bool(http.get("/readyz").json().get("held"))
    except (OSError, httpx.HTTPError, ValueError):
        return False


def record_change(config: Config, change: dict[str, Any]) -> int | None:
    """Record a change at Norce in the ledger of the service on this host.

    Returns:
        The id of the record, or None if no service runs here: such a change must be possible without one.
    """
    if config.operations.socket is None:
        return None
    try:
        with _over_socket(config.operations.socket) as http:
            answer = http.post("/commands/record", content=msgspec.json.encode(change))
            return int(answer.json()["action"]) if answer.status_code == 200 else None
    except (OSError, httpx.HTTPError, ValueError):
        return None


def _over_socket(path: str) -> httpx.Client:
    """Return a client for the socket. Raises `OSError` if no service listens there."""
    # httpx leaves its socket open if it cannot connect, so this connection finds the error first.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(path)
    transport = httpx.HTTPTransport(uds=path)
    return httpx.Client(base_url="http://operations", transport=transport, trust_env=False, timeout=TIMEOUT_SECONDS)
