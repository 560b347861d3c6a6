"""`adapter.cli.ledger`: the commands about the ledger, beside and through a running service."""

import getpass
import json
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapter.cli.service import RunningService, run_in_steps
from adapter.cli.shared import printable
from adapter.ledger.commands import Step
from adapter.ledger.queries import Author, DeliveryFilter
from adapter.plugin import Reject, Retry, Unknown
from tests.cli.test_cli import (
    CONFIG,
    CONFIGURATION,
    ENVIRON,
    FAILED,
    NOTHING_MATCHED,
    OK,
    STORE,
    USAGE,
    Serving,
    execute,
    run,
    write,
)
from tests.databases import rows
from tests.ledgers import NOON, Ends, Ledger, opened

pytestmark = pytest.mark.usefixtures("logging_as_before")

BY = ("--why", "the shop is mended", "--who", "anna")
TOKEN = "canary-operations-token"
MERCHANTS = """\
  fjallboden: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
  annan: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
"""
ROUTES = """\
  export: {callback: order-status, handler: log, merchants: [fjallboden, annan]}
  history: {callback: order-status, handler: log, merchants: [fjallboden], refetch: false}
"""
NASTY = "order-[/red]:smile:\x1b[2J\u202e"


def make(folder: Path, *, url: str | None = None) -> Path:
    """Write a configuration. Nothing listens on its socket unless the test starts a service."""
    text = CONFIG.replace("senders:", f"{MERCHANTS}senders:").replace("seen: {", "seen: {merchants: [norce, other], ")
    text += ROUTES
    if url is not None:  # by reference, because an address with a password must be one
        (folder / "store.url").write_text(url)
        text = text.replace("sqlite:///@FOLDER@/ledger.db", "${file:store.url}")
    return write(folder, text=text)


def command(*arguments: Any, config: Path) -> Any:
    return run(*arguments, config=config, env=ENVIRON | {"NORCE_ADAPTER_OPERATIONS_TOKEN": TOKEN})


def fill(ledger: Ledger) -> None:
    """Add four deliveries: 1 is rejected, 2 exhausted, 3 unknown, and 4 waits."""
    for order in ("order-1", "order-2", "order-3"):
        ledger.owed(1, order_id=order)
    message = "The shop says no."
    results = (Reject("no-such-shop", message), Retry("busy", message), Unknown("lost", message))
    for claim, result in zip(ledger.claim(), results, strict=True):
        ledger.settle(claim, Ends(result))
    ledger.owed(1, order_id=NASTY)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a ledger with the four deliveries. Tests take a copy."""
    path = tmp_path_factory.mktemp("filled") / "ledger.db"
    with opened(f"sqlite:///{path}") as ledger:
        fill(ledger)
    return path


@pytest.fixture
def config(tmp_path: Path, filled: Path) -> Path:
    """The configuration of a ledger that no service uses."""
    shutil.copy(filled, tmp_path / "ledger.db")
    return make(tmp_path)


@pytest.fixture
def served(config: Path) -> Iterator[Path]:
    """Start a service that holds every queue, with the configuration of `config`."""
    with closing(Serving(config, hold=True)):
        yield config


def states(config: Path) -> list[Any]:
    return [row[0] for row in execute(config, "SELECT state FROM deliveries ORDER BY id")]


# --- lists ----------------------------------------------------------------------------------------------------------

LISTS: dict[str, tuple[list[str], int, str]] = {
    "deliveries": (["deliveries", "list"], 4, "order-1"),
    "dead letters": (["deliveries", "list", "--state", "dead"], 3, "no-such-shop"),
    "by reason": (["deliveries", "list", "--reason", "unknown"], 1, "order-3"),
    "by code": (["deliveries", "list", "--code", "busy"], 1, "order-2"),
    "by merchant and channel": (["deliveries", "list", "--merchant", "fjallboden", "--channel", "1"], 4, "order-1"),
    "since a day": (["deliveries", "list", "--since", "2026-02-03"], 4, "order-1"),
    "until noon, UTC": (["deliveries", "list", "--until", "2026-02-03T12:00:00.001"], 4, "order-1"),
    "notifications": (["notifications", "list"], 4, "order-status"),
    "notifications of an order": (["notifications", "list", "--order", "order-2"], 1, "order-2"),
    "queues": (["queues", "list"], 3, "running"),
}


@pytest.mark.parametrize("asked", LISTS.values(), ids=LISTS)
def test_lists_are_printed_as_table_and_json(config: Path, asked: tuple[list[str], int, str]) -> None:
    arguments, number, words = asked

    for_people = command(*arguments, config=config)
    for_programs = command(*arguments, "--output", "json", config=config)

    assert (for_people.exit_code, for_programs.exit_code) == (OK, OK)
    assert len(json.loads(for_programs.stdout)) == number
    assert len(for_people.stdout.splitlines()) == number + 1
    assert words in for_people.stdout


@pytest.mark.parametrize(
    "arguments",
    [["deliveries", "list", "--order", "unknown"], ["notifications", "list", "--callback", "cart"],
     ["deliveries", "list", "--until", "2026-02-03T12:00:00Z"], ["store", "actions"], ["deliveries", "show", "4711"],
     ["notifications", "show", "4711"], ["deliveries", "retry", "4711", *BY],
     ["deliveries", "discard", "4", *BY], ["deliveries", "discard", "1", "--state", "waiting", *BY],
     ["deliveries", "retry", "3", *BY],
     ["deliveries", "retry", "4711", "--dry-run", *BY]],
    ids=" ".join,
)  # fmt: skip
def test_no_match_is_3(config: Path, arguments: list[str]) -> None:
    result = command(*arguments, config=config)

    assert result.exit_code == NOTHING_MATCHED
    assert states(config) == ["dead", "dead", "dead", "waiting"]


def test_the_queues_of_a_route_that_is_gone_are_orphaned_and_their_deliveries_can_only_be_discarded(
    config: Path,
) -> None:
    config.write_text(config.read_text().replace(ROUTES, ROUTES.splitlines()[1]))

    with closing(Serving(config, hold=True)):
        listed = json.loads(command("queues", "list", "--output", "json", config=config).stdout)
        preview = command("deliveries", "retry", "--all", "--dry-run", *BY, config=config)
        of_all = command("deliveries", "retry", "--route", "export", *BY, config=config)
        by_id = command("deliveries", "retry", "1", *BY, config=config)
        before = states(config)
        discarded = command("deliveries", "discard", "--route", "export", *BY, config=config)

    assert {row["state"] for row in listed if row["route"] == "export"} == {"orphaned"}
    assert {row["state"] for row in listed if row["route"] != "export"} == {"held"}
    for refused in (preview, of_all, by_id):
        assert (refused.exit_code, refused.stdout) == (FAILED, "")
        assert "refused, because their queue is orphaned" in refused.stderr
    assert before == ["dead", "dead", "dead", "waiting"]
    assert (discarded.exit_code, discarded.stdout) == (OK, "3 discarded\n")


@pytest.mark.parametrize("name", ["retry", "resend"])
def test_a_retry_or_resend_to_a_route_in_shadow_mode_is_refused_with_the_remedy(config: Path, name: str) -> None:
    shadow = ROUTES.splitlines()[0].replace("handler:", "mode: shadow, handler:")
    config.write_text(config.read_text().replace(ROUTES.splitlines()[0], shadow))

    refused = command("deliveries", name, "--route", "export", *BY, config=config)

    assert (refused.exit_code, refused.stdout) == (FAILED, "")
    assert "refused, because their route is in shadow mode" in refused.stderr
    assert "remove mode: shadow first" in refused.stderr


def test_a_retry_leaves_out_orphaned_queues_and_says_so(config: Path) -> None:
    execute(config, "UPDATE deliveries SET reason = 'exhausted' WHERE id = 3")
    with opened(f"sqlite:///{config.parent}/ledger.db") as ledger:
        ledger.owed(1, order_id="order-5", refetch=False)
        ledger.settle(ledger.claim_one(ledger.history), Ends(Reject("no-such-shop")), refetch=False)
    config.write_text(config.read_text().replace(ROUTES, ROUTES.splitlines()[1]))

    with closing(Serving(config, hold=True)):
        retried = command("deliveries", "retry", "--all", *BY, config=config)

    assert (retried.exit_code, retried.stdout) == (OK, "1 retried\n")
    assert "3 left out, because their queue is orphaned" in retried.stderr
    assert states(config) == ["dead", "dead", "dead", "waiting", "waiting"]


@pytest.mark.parametrize("arguments", [["pause", "nothing"], ["resume", "export", "--channel", "9"]], ids=" ".join)
def test_an_unknown_queue_is_3(served: Path, arguments: list[str]) -> None:
    assert command("queues", *arguments, *BY, config=served).exit_code == NOTHING_MATCHED


def test_text_from_norce_cannot_control_the_terminal(config: Path) -> None:
    for arguments in (["deliveries", "list"], ["notifications", "list"], ["deliveries", "show", "4"]):
        result = command(*arguments, config=config)

        assert result.exit_code == OK
        assert "order-[/red]:smile:\\x1b[2J\\u202e" in result.stdout
        assert "\x1b" not in result.stdout


def test_printable_keeps_letters() -> None:
    assert printable("Åsa Öberg, 東京\n\t\x9b") == "Åsa Öberg, 東京\\n\\t\\x9b"


@pytest.mark.parametrize("kind", ["deliveries", "notifications"])
def test_show_prints_the_record_and_its_rows(config: Path, kind: str) -> None:
    for_people = command(kind, "show", "1", config=config)
    for_programs = command(kind, "show", "1", "--output", "json", config=config)

    assert "order-1" in for_people.stdout
    assert "no-such-shop" in for_people.stdout
    assert len(json.loads(for_programs.stdout)["attempts" if kind == "deliveries" else "deliveries"]) == 1
    assert "snapshot" not in for_people.stdout.replace("snapshot_at", "")


def test_lists_work_if_a_handler_is_broken(config: Path) -> None:
    config.write_text(config.read_text().replace("handler: log", "handler: not-installed"))

    assert command("check", config=config).exit_code == CONFIGURATION
    assert command("deliveries", "list", config=config).exit_code == OK


# --- retry and discard --------------------------------------------------------------------------


def test_a_dry_run_counts_and_changes_nothing(config: Path) -> None:
    before = execute(config, "SELECT * FROM deliveries"), execute(config, "SELECT * FROM lanes")

    result = command("deliveries", "retry", "--all", "--dry-run", "--output", "json", *BY, config=config)

    assert result.exit_code == OK
    assert sum(row["count"] for row in json.loads(result.stdout)) == 2
    assert "1 left out, because their effect is unknown" in result.stderr
    assert before == (execute(config, "SELECT * FROM deliveries"), execute(config, "SELECT * FROM lanes"))
    assert execute(config, "SELECT 1 FROM actions") == []


@pytest.mark.parametrize(
    ("arguments", "printed", "after"),
    [
        (["retry", "1", "2"], "2 retried", ["waiting", "waiting", "dead", "waiting"]),
        (["retry", "--reason", "rejected"], "1 retried", ["waiting", "dead", "dead", "waiting"]),
        (["retry", "--all", "--rate", "100000"], "2 retried", ["waiting", "waiting", "dead", "waiting"]),
        (["retry", "--all", "--unknown", "look-up"], "3 retried", ["waiting"] * 4),
        (["retry", "3", "--unknown", "send"], "1 retried", ["dead", "dead", "waiting", "waiting"]),
        (["discard", "--order", "order-3"], "1 discarded", ["dead", "dead", "done", "waiting"]),
        (["discard", "--all"], "3 discarded", ["done", "done", "done", "waiting"]),
        (["discard", "--all", "--state", "waiting"], "1 discarded", ["dead", "dead", "dead", "done"]),
        (["discard", "4", "--state", "waiting"], "1 discarded", ["dead", "dead", "dead", "done"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_dead_letters_are_retried_and_discarded(
    served: Path, arguments: list[str], printed: str, after: list[str]
) -> None:
    result = command("deliveries", *arguments, *BY, config=served)

    assert (result.exit_code, result.stdout) == (OK, f"{printed}\n"), result.output
    assert states(served) == after
    assert execute(served, "SELECT who, why, changed FROM actions") == [
        ("anna", "the shop is mended", int(printed.split()[0]))
    ]


def test_json_output_has_the_count(served: Path) -> None:
    result = command("deliveries", "retry", "1", "--output", "json", *BY, config=served)
    again = command("deliveries", "retry", "1", "--output", "json", *BY, config=served)

    assert (result.exit_code, json.loads(result.stdout)) == (OK, {"retried": 1})
    assert (again.exit_code, json.loads(again.stdout)) == (NOTHING_MATCHED, {"retried": 0})


# --- resend ---------------------------------------------------------------------------------------------------------

HOW_TO_RESUME = "this is command 1; if it is interrupted, continue it with: norce-adapter deliveries resend --resume 1"
LEFT_UNKNOWN = "1 left out, because their effect is unknown; look at the destination, and see --unknown: 3"


@pytest.mark.parametrize(
    ("arguments", "resent", "told"),
    [
        (["1"], [1], [HOW_TO_RESUME]),
        (["2", "1", "3", "4"], [1, 2], [HOW_TO_RESUME, LEFT_UNKNOWN, "1 left out, because they wait already: 4"]),
        (["--route", "export"], [1, 2], [HOW_TO_RESUME, LEFT_UNKNOWN]),
        (["--all", "--rate", "100000"], [1, 2], [HOW_TO_RESUME, LEFT_UNKNOWN]),
        (["--reason", "exhausted"], [2], [HOW_TO_RESUME]),
        (["3", "--unknown", "send"], [3], [HOW_TO_RESUME]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_deliveries_are_sent_again(served: Path, arguments: list[str], resent: list[int], told: list[str]) -> None:
    result = command("deliveries", "resend", *arguments, *BY, config=served)

    assert (result.exit_code, result.stdout) == (OK, f"{len(resent)} resent\n"), result.output
    assert result.stderr.splitlines() == told
    assert execute(served, "SELECT again_of FROM deliveries WHERE command = 1 ORDER BY id") == [(n,) for n in resent]
    assert [states(served)[number - 1] for number in resent] == ["done"] * len(resent)
    assert execute(served, "SELECT command, who, why, changed FROM actions") == [
        ("resend", "anna", "the shop is mended", len(resent))
    ]


def test_a_resend_is_previewed_with_what_it_leaves_out(config: Path) -> None:
    result = command("deliveries", "resend", "--all", "--dry-run", "--output", "json", *BY, config=config)

    assert result.exit_code == OK
    counted = {row["reason"]: row["count"] for row in json.loads(result.stdout)}
    assert counted == {"rejected": 1, "exhausted": 1}
    assert result.stderr == f"{LEFT_UNKNOWN}\n"
    assert states(config) == ["dead", "dead", "dead", "waiting"]
    assert execute(config, "SELECT 1 FROM actions") == []


def test_a_resend_in_json_names_its_command_and_what_it_left_out(served: Path) -> None:
    result = command("deliveries", "resend", "1", "3", "--output", "json", *BY, config=served)

    assert json.loads(result.stdout) == {"resent": 1, "action": 1, "left_out": {"unknown": [3]}}


def test_a_resend_of_nothing_is_3_and_not_recorded(served: Path) -> None:
    for chosen in (["4711"], ["3"], ["--order", "nobody"]):
        assert command("deliveries", "resend", *chosen, *BY, config=served).exit_code == NOTHING_MATCHED

    assert execute(served, "SELECT 1 FROM actions") == []


def test_show_names_what_a_delivery_repeats_and_what_was_sent_again_from_it(served: Path) -> None:
    for _ in range(2):
        command("deliveries", "resend", "1", *BY, config=served)

    first, again = (
        json.loads(command("deliveries", "show", number, "--output", "json", config=served).stdout)
        for number in ("1", "5")
    )
    assert (first["again_of"], first["resent_as"]) == (None, [5, 6])
    assert (again["again_of"], again["resent_as"]) == (1, [])


def test_a_resend_that_was_interrupted_is_resumed(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service goes away after the first step that sends something."""
    run_command, asked = RunningService.run, []

    def interrupted(service: RunningService, name: str, body: Any) -> Any:
        asked.append(body)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run_command(service, name, body)

    with monkeypatch.context() as patched:
        patched.setattr(RunningService, "run", interrupted)
        patched.setattr("adapter.cli.deliveries.MAX_PER_STEP", 1)
        broken = command("deliveries", "resend", "1", "2", *BY, config=served)
    assert (broken.exit_code, broken.stdout) == (FAILED, "")
    assert HOW_TO_RESUME in broken.stderr

    resumed = command("deliveries", "resend", "--resume", "1", config=served)
    once_more = command("deliveries", "resend", "--resume", "1", config=served)

    assert [(each.exit_code, each.stdout) for each in (resumed, once_more)] == [(OK, "1 resent\n"), (OK, "0 resent\n")]
    assert execute(served, "SELECT again_of FROM deliveries WHERE command = 1 ORDER BY id") == [(1,), (2,)]


def test_only_a_resend_is_resumed(served: Path) -> None:
    command("deliveries", "retry", "1", *BY, config=served)

    result = command("deliveries", "resend", "--resume", "1", config=served)

    assert result.exit_code == FAILED
    assert "no resend has the number 1; `norce-adapter store actions` lists them" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deliveries", "resend", *BY], "--all"),
        (["deliveries", "resend", "1"], "--why"),
        (["deliveries", "resend", "--all", "--why", " "], "must not be blank"),
        (["deliveries", "resend", "1", "--resume", "1", *BY], "--resume"),
        (["deliveries", "resend", "--all", "--unknown", "send", *BY], "needs the ids"),
        (["deliveries", "resend", "1", "--unknown", "look-up", *BY], "leave"),
        (["deliveries", "resend", "--reason", "skipped", *BY], "give ids for the others"),
        (["deliveries", "retry", *BY], "--all"),
        (["deliveries", "discard", *BY], "--all"),
        (["deliveries", "discard", "--state", "waiting", *BY], "--all"),
        (["deliveries", "discard", "--state", "done", "--all", *BY], "waiting"),
        (["deliveries", "retry", "--all"], "--why"),
        (["deliveries", "retry", "--all", "--why", " "], "must not be blank"),
        (["deliveries", "retry", "--all", "--why", ""], "$.by.why"),
        (["deliveries", "retry", "1", "--why", "x", "--who", ""], "$.by.who"),
        (["deliveries", "retry", "--all", "--unknown", "send", *BY], "needs the ids"),
        (["deliveries", "retry", "--all", "--rate", "0", *BY], "--rate"),
        (["deliveries", "retry", "99999999999999999999", *BY], "IDS"),
        (["deliveries", "show", "99999999999999999999"], "DELIVERY_ID"),
        (["deliveries", "list", "--reason", "rejcted"], "rejected"),
        (["deliveries", "list", "--since", "yesterday"], "2026-02-03"),
        (["deliveries", "list", "--order", "\udcff"], "UTF-8"),
        (["notifications", "list", "--order", "\udcff"], "UTF-8"),
        (["queues", "pause", "export"], "--why"),
        (["queues", "pause", "export", "--why", "\udcff"], "UTF-8"),
    ],
    ids=lambda value: ascii(" ".join(value)) if isinstance(value, list) else "",
)
def test_wrong_usage_is_2_and_names_the_remedy(config: Path, arguments: list[str], words: str) -> None:
    result = command(*arguments, config=config)

    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert words in result.stderr
    assert states(config) == ["dead", "dead", "dead", "waiting"]


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no user"), ImportError("pwd")], ids=repr)
def test_a_user_without_a_name_is_recorded_by_number(
    served: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_name() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", no_name)

    assert command("deliveries", "discard", "1", "--why", "x", config=served).exit_code == OK
    [(who,)] = execute(served, "SELECT who FROM actions")
    assert who.startswith("uid ")


class Paced:
    """A service and a clock. The clock moves while the service runs a step, and while the command sleeps."""

    def __init__(self, *changed: int, takes: float) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.asked: list[Step] = []
        self._changed = list(changed)
        self._takes = takes

    def ask(self, step: Step) -> dict[str, Any]:
        self.asked.append(step)
        self.now += self._takes
        changed = self._changed.pop(0)
        return {"changed": changed, "after": len(self.asked) * 10 if self._changed else None, "action": 7}

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 3))
        self.now += seconds

    def run(self, rate: int | None) -> list[int]:
        first = Step(matching=DeliveryFilter(), by=Author(who="anna", why="x"))
        return list(run_in_steps(self.ask, first, rate, clock=lambda: self.now, sleep=self.sleep))


def test_a_rate_limits_the_changes_per_second() -> None:
    paced = Paced(100, 50, 100, takes=0.25)

    assert paced.run(rate=100) == [100, 50, 100]
    assert paced.slept == [0.75, 0.25]
    assert [(step.after, step.action) for step in paced.asked] == [(0, None), (10, 7), (20, 7)]


@pytest.mark.parametrize(("rate", "slept"), [(None, []), (100, [0.0, 0.0])])
def test_a_slow_service_needs_no_sleep(rate: int | None, slept: list[float]) -> None:
    paced = Paced(100, 0, 100, takes=2.0)

    paced.run(rate)

    assert paced.slept == slept


def test_a_low_rate_makes_the_steps_smaller(config: Path) -> None:
    with stub(lambda _path, body: (200, {"changed": 1, "after": None, "action": 1})) as (url, asked):
        command("deliveries", "retry", "--all", "--rate", "3", "--to", url, *BY, config=config)

    assert [body["most"] for _, body, _ in asked] == [3]


# --- queues ---------------------------------------------------------------------------------------------------------


def test_a_queue_is_paused_and_resumed(served: Path) -> None:
    paused = command("queues", "pause", "export", "--merchant", "annan", *BY, config=served)
    listed = command("queues", "list", config=served)
    resumed = command("queues", "resume", "export", "--output", "json", *BY, config=served)
    audit = command("store", "actions", config=served)

    assert (paused.exit_code, paused.stdout) == (OK, "1 paused\n")
    assert "a person resumes it" in listed.stdout
    assert (resumed.exit_code, json.loads(resumed.stdout)) == (OK, {"resumed": 2})
    assert [line.split()[2] for line in audit.stdout.splitlines()[1:]] == ["resume", "pause"]


# --- through a service ----------------------------------------------------------------------------------------------


@contextmanager
def stub(answer: Callable[[str, Any], tuple[int, Any]]) -> Iterator[tuple[str, list[tuple[str, Any, Any]]]]:
    """Serve answers on a port. Yield its URL, and the requests: path, body and authorization."""
    asked: list[tuple[str, Any, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body, self.headers["authorization"]))
            status, content = answer(self.path, body)
            if status:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *_arguments: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_changes_and_store_commands_work_beside_a_running_service(served: Path) -> None:
    kept = served.parent / "copy.db"

    done = command("deliveries", "discard", "1", *BY, config=served)
    paused = command("queues", "pause", "seen", "--merchant", "norce", *BY, config=served)
    listed = command("queues", "list", config=served)
    checked = command("store", "check", config=served)
    migrated = command("store", "migrate", config=served)
    copied = command("store", "backup", kept, config=served)

    assert (done.exit_code, done.stdout) == (OK, "1 discarded\n"), done.output
    assert (paused.exit_code, paused.stdout) == (OK, "2 paused\n")
    assert "the shop is mended" in listed.stdout
    assert (checked.exit_code, copied.exit_code) == (OK, OK)
    assert (migrated.exit_code, migrated.stdout) == (STORE, "")
    assert "stop it first" in migrated.stderr
    assert rows(f"sqlite:///{kept}", "SELECT state FROM deliveries WHERE id = 1") == [("done",)]


def test_queues_of_a_held_service_are_listed_as_held(served: Path) -> None:
    command("queues", "pause", "export", "--merchant", "annan", *BY, config=served)

    listed = json.loads(command("queues", "list", "--output", "json", config=served).stdout)

    assert {row["merchant"]: row["state"] for row in listed if row["route"] == "export"} == {
        "fjallboden": "held", "annan": "paused",
    }  # fmt: skip


CHANGES = [
    ["deliveries", "retry", "1", *BY], ["deliveries", "discard", "1", *BY], ["queues", "pause", "export", *BY],
    ["queues", "resume", "export", *BY], ["reconcile"],
]  # fmt: skip


@pytest.mark.parametrize("left_behind", [False, True], ids=["no socket", "a socket of a killed service"])
@pytest.mark.parametrize("arguments", CHANGES, ids=lambda arguments: " ".join(arguments[:2]))
def test_without_a_service_a_change_fails_and_names_the_remedy(
    config: Path, arguments: list[str], left_behind: bool
) -> None:
    path = config.parent / "operations.sock"
    if left_behind:
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))

    result = command(*arguments, config=config)

    assert (result.exit_code, result.stdout) == (FAILED, "")
    assert f"no service answers at {path}" in result.stderr
    assert "`norce-adapter serve --hold`" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert states(config) == ["dead", "dead", "dead", "waiting"]


def test_without_a_socket_the_error_names_the_port(config: Path) -> None:
    path = write(config.parent, text=CONFIG.replace('socket: "@FOLDER@/operations.sock"', "socket: null"))

    result = command("queues", "pause", "export", *BY, config=path)

    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert "--to" in result.stderr


def test_a_socket_of_another_user_is_reported(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(socket.socket, "connect", refuse)

    result = command("queues", "pause", "export", *BY, config=served)

    assert (result.exit_code, result.stdout) == (FAILED, "")
    assert f"only the user of the service may use {served.parent}/operations.sock" in result.stderr


@pytest.mark.parametrize("url", ["10.0.0.5:8081", "ftp://host", "http://", "http://[", "http://a/b", "http://a b"])
def test_an_invalid_url_is_2(config: Path, url: str) -> None:
    result = command("queues", "pause", "export", "--to", url, *BY, config=config)

    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert "--to" in result.stderr


def test_a_service_on_another_host_needs_no_configuration_here() -> None:
    answers = iter([{"changed": 2, "after": 9, "action": 5}, {"changed": 1, "after": None, "action": 5}])
    with stub(lambda _path, _body: (200, next(answers))) as (url, asked):
        result = command("deliveries", "retry", "--all", "--to", url, *BY, config=Path("/nowhere/config.yaml"))

    assert (result.exit_code, result.stdout) == (OK, "3 retried\n")
    assert [(path, body["after"], body["action"], token) for path, body, token in asked] == [
        ("/commands/retry", 0, None, f"Bearer {TOKEN}"),
        ("/commands/retry", 9, 5, f"Bearer {TOKEN}"),
    ]


def test_no_match_on_another_host_is_3(config: Path) -> None:
    with stub(lambda _path, _body: (200, {"changed": 0, "after": None, "action": 5})) as (url, _):
        result = command("deliveries", "retry", "--all", "--to", url, *BY, config=config)

    assert (result.exit_code, result.stdout) == (NOTHING_MATCHED, "0 retried\n")


def test_no_listener_on_another_host_is_1(config: Path) -> None:
    result = command("queues", "pause", "export", "--to", "http://127.0.0.1:1", *BY, config=config)

    assert (result.exit_code, result.stdout) == (FAILED, "")
    assert "no service answers at http://127.0.0.1:1" in result.stderr


@pytest.mark.parametrize(
    ("status", "content", "code", "words"),
    [
        (401, {"message": "The bearer token is not the one of operations.token."}, FAILED, "operations.token"),
        (403, {"message": "set operations.token"}, FAILED, "answered 403: set operations.token"),
        (404, {"message": "no command"}, FAILED, "404"),
        (500, b"Internal Server Error", FAILED, "no norce-adapter"),
        (503, {"message": "Nothing was done. Please send it again."}, STORE, "Nothing was done"),
        (503, b"<html>", FAILED, "no norce-adapter"),
        (200, b"<html>", FAILED, "no norce-adapter"),
        (404, [], FAILED, "no message"),
        (0, b"", FAILED, "store actions"),
    ],
)
def test_an_error_of_the_service_is_printed_with_a_remedy(
    config: Path, status: int, content: Any, code: int, words: str
) -> None:
    with stub(lambda _path, _body: (status, content)) as (url, _):
        result = command("queues", "pause", "export", "--to", url, *BY, config=config)

    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "canary" not in result.output


# --- the store ------------------------------------------------------------------------------------------------------


def test_store_check_stats_and_migrate(config: Path) -> None:
    checked = command("store", "check", config=config)
    measured = command("store", "stats", config=config)
    for_programs = command("store", "stats", "--output", "json", config=config)
    migrated = command("store", "migrate", config=config)

    assert (checked.exit_code, checked.stdout) == (OK, f"{config.parent}/ledger.db has no faults\n")
    assert measured.stdout.splitlines()[0].split() == ["notifications", "4"]
    assert json.loads(for_programs.stdout)["deliveries"] == 4
    assert (migrated.exit_code, migrated.stdout) == (OK, f"{config.parent}/ledger.db is up to date\n")


def test_faults_are_printed_and_are_1(config: Path) -> None:
    execute(config, "UPDATE lanes SET next_at = NULL WHERE next_at IS NOT NULL")

    result = command("store", "check", config=config)

    assert (result.exit_code, result.stdout) == (FAILED, "")
    assert result.stderr.splitlines()[0] == "lanes that no process will claim although a delivery waits: 1"


def test_a_backup_overwrites_nothing(config: Path) -> None:
    target = config.parent / "copy.db"

    first, again = (command("store", "backup", target, config=config) for _ in range(2))
    nowhere = command("store", "backup", "/no/such/folder/copy.db", config=config)

    assert (first.exit_code, again.exit_code, nowhere.exit_code) == (OK, USAGE, STORE)
    assert "exists already" in again.stderr
    assert "cannot write" in nowhere.stderr


NEED_A_STORE = [
    ["deliveries", "list"], ["deliveries", "show", "1"], ["deliveries", "retry", "1", *BY],
    ["notifications", "list"], ["queues", "list"], ["store", "check"],
    ["store", "stats"], ["store", "actions"], ["store", "backup", "/tmp/never-written.db"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", NEED_A_STORE, ids=lambda arguments: " ".join(arguments[:2]))
def test_a_missing_store_is_5_and_is_not_created(tmp_path: Path, arguments: list[str]) -> None:
    result = command(*arguments, config=make(tmp_path))

    assert (result.exit_code, result.stdout) == (STORE, "")
    assert "there is no database at" in result.stderr
    assert not (tmp_path / "ledger.db").exists()


def test_older_tables_are_5_with_a_remedy(config: Path) -> None:
    execute(config, "DROP TABLE actions")

    result = command("store", "actions", config=config)

    assert result.exit_code == STORE
    assert "norce-adapter store migrate" in result.stderr


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


class Refusing:
    """A PostgreSQL server that refuses every password."""

    def __enter__(self) -> int:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return int(self._socket.getsockname()[1])

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                while True:
                    (length,) = struct.unpack("!i", connection.recv(4))
                    startup = connection.recv(length - 4)
                    if struct.unpack("!i", startup[:4])[0] in (80877103, 80877104):  # TLS, GSS: no
                        connection.sendall(b"N")
                        continue
                    break
                connection.sendall(b"R" + struct.pack("!ii", 8, 3))  # the password, in clear text
                connection.recv(1024)
                fields = b'SFATAL\0C28P01\0Mpassword authentication failed for user "norce"\0\0'
                connection.sendall(b"E" + struct.pack("!i", 4 + len(fields)) + fields)


@pytest.mark.parametrize("arguments", [*NEED_A_STORE[:-1], ["store", "migrate"], ["serve"]],
                         ids=lambda arguments: " ".join(arguments[:2]))  # fmt: skip
def test_a_wrong_password_is_5_in_one_line_and_not_printed(tmp_path: Path, arguments: list[str]) -> None:
    with Refusing() as port:
        url = f"postgresql+psycopg://norce:canary-password@127.0.0.1:{port}/norce"
        result = command(*arguments, config=make(tmp_path, url=url))

    assert (result.exit_code, result.stdout) == (STORE, ""), result.output
    assert 'password authentication failed for user "norce"' in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "canary" not in result.output


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid:5432"])
@pytest.mark.parametrize("arguments", [["deliveries", "list"], ["serve"]],
                         ids=lambda arguments: " ".join(arguments[:2]))  # fmt: skip
def test_a_missing_server_is_5_in_one_line(tmp_path: Path, arguments: list[str], host: str) -> None:
    url = f"postgresql+psycopg://norce:canary-password@{host}/norce"

    result = command(*arguments, config=make(tmp_path, url=url))

    assert (result.exit_code, result.stdout) == (STORE, "")
    assert len(result.stderr.splitlines()) == 1
    assert "canary" not in result.output


def test_commands_work_on_both_stores(store_url: str, tmp_path: Path) -> None:
    with opened(store_url) as ledger:
        fill(ledger)
    path = make(tmp_path, url=store_url)

    with closing(Serving(path, hold=True)):
        done = command("deliveries", "retry", "--all", *BY, config=path)
    listed = command("deliveries", "list", "--state", "waiting", "--output", "json", config=path)
    checked = command("store", "check", config=path)
    stats = command("store", "stats", config=path)
    copied = command("store", "backup", tmp_path / "copy.db", config=path)

    assert (done.exit_code, done.stdout) == (OK, "2 retried\n")
    assert [row["id"] for row in json.loads(listed.stdout)] == [4, 2, 1]
    assert (checked.exit_code, stats.exit_code) == (OK, OK)
    assert copied.exit_code == (OK if store_url.startswith("sqlite") else USAGE)
    assert store_url.startswith("sqlite") or "pg_dump" in copied.stderr


def test_exit_codes_are_in_the_help() -> None:
    assert "3 nothing matched, 4 configuration, 5 store" in " ".join(run("--help").stdout.split())


def test_moments_without_a_zone_are_utc(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")

    result = command(
        "deliveries", "list", "--since", "2026-02-03T12:00:00", "--until", "2026-02-03T12:00:00.001", config=config
    )

    assert result.exit_code == OK
    assert NOON == 1_770_120_000_000
