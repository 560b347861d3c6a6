"""`adapter.cli`: the commands, their output and their exit codes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import click
import pytest
from anyio.from_thread import start_blocking_portal
from click.testing import CliRunner, Result

from adapter import cli
from adapter import config as configuration
from adapter.app import running
from adapter.cli import handlers
from adapter.routing import routes
from adapter.routing.routes import build
from tests import PATIENCE, ROOT
from tests.databases import rows

pytestmark = pytest.mark.usefixtures("logging_as_before")

OK, FAILED, USAGE, NOTHING_MATCHED, CONFIGURATION, STORE = 0, 1, 2, 3, 4, 5
ENVIRON = {
    "TOKEN": "canary-token",
    "URL_KEY": "canary-url-key-0123456789",
    "HEADER": "Bearer canary-header-secret",
    "STATIC": "canary&url=secret#",
}
SIGNED = '{signed_urls: {keys: {k1: "${env:URL_KEY}"}}}'
CONFIG = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
server: {host: 127.0.0.1, port: 0}
operations: {port: 0, socket: "@FOLDER@/operations.sock"}
store: {url: "sqlite:///@FOLDER@/ledger.db"}
norce: {base_url: "http://127.0.0.1:1"}
merchants:
  norce: {tokens: ["${env:TOKEN}"], channels: {"1": {}, "2": {}}}
  other: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
senders: @SENDERS@
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus}
  order-rules: {kind: validation}
routes:
  seen: {callback: order-status, handler: log, refetch: false}
"""
ORDER = {
    "id": "o1", "merchant": "norce", "channel": "1", "lastModified": "2026-02-03T08:16:35Z",
    "state": {"currentStatus": "completed"},
}  # fmt: skip


def write(folder: Path, senders: str = SIGNED, text: str = CONFIG) -> Path:
    path = folder / "config.yaml"
    path.write_text(text.replace("@FOLDER@", str(folder)).replace("@SENDERS@", senders))
    return path


def run(
    *arguments: Any, config: Path | None = None, env: Mapping[str, str | None] = ENVIRON, input: str | None = None
) -> Result:
    given = env | {"NORCE_ADAPTER_CONFIG": str(config or "/nowhere/config.yaml"), "COLUMNS": "200"}
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], input=input, env=given)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class Serving:
    """A service in a thread."""

    def __init__(self, config: Path, env: dict[str, str] = ENVIRON, *, hold: bool = False) -> None:
        loaded = configuration.load(config, env)
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            service = stack.enter_context(portal.wrap_async_context_manager(running(loaded, build(loaded), hold=hold)))
            self.address, self.operations_address = service.public_address, service.operations_address
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def serving(config: Path) -> Iterator[Serving]:
    service = Serving(config)
    yield service
    service.close()


@pytest.fixture
def order(tmp_path: Path) -> Path:
    return save(tmp_path, ORDER)


def save(folder: Path, body: Any) -> Path:
    path = folder / "order.json"
    path.write_bytes(body if isinstance(body, bytes) else json.dumps(body).encode())
    return path


def execute(config: Path, sql: str) -> list[Any]:
    """Execute a statement on the ledger beside the configuration."""
    return rows(f"sqlite:///{config.parent}/ledger.db", sql)


# --- usage and version ------------------------------------------------------------------------------------------------


def test_version_prints_the_version_of_the_distribution() -> None:
    result = run("version")

    assert (result.exit_code, result.stdout) == (OK, f"{version('norce-adapter')}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["check", "--nonsense"],
        ["send"],
        ["send", "/no/such/file.json", "--callback", "order-status"],
        ["deliveries", "show", "one"],
        ["deliveries", "list", "--state", "lost"],
        ["deliveries", "list", "--limit", "0"],
        ["deliveries", "list", "--output", "xml"],
        ["demo", "--output", "xml"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_with_an_explanation(arguments: list[str]) -> None:
    result = run(*arguments)

    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert "Error: " in result.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(flag: str) -> None:
    def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            yield (*path, name)
            command = group.get_command(context, name)
            if isinstance(command, click.Group):
                yield from commands(command, (*path, name))

    for path in [(), *commands(cli.main)]:
        result = run(*path, flag)

        assert result.exit_code == OK
        assert "Usage: " in result.stdout


# --- what a command imports -------------------------------------------------------------------------------------------

IMPORTED = """
import atexit, sys
from adapter.cli import main
atexit.register(lambda: print(*sys.modules, sep="\\n", file=sys.stderr))
main()
"""
SLOW = {"adapter.app", "adapter.sandbox", "adapter.routing", "uvicorn", "starlette", "alembic"}


@pytest.mark.parametrize(
    ("arguments", "never"),
    [
        (["version"], SLOW | {"sqlalchemy", "httpx", "rich", "adapter.config"}),
        (["deliveries", "list"], SLOW | {"httpx", "jsonschema"}),
        (["orders", "list"], {"adapter.app", "adapter.sandbox", "uvicorn", "alembic"}),
        (["queues", "pause", "seen", "--why", "a test"], SLOW),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_only_what_it_uses(worked: Path, arguments: list[str], never: set[str]) -> None:
    """Importing the whole service takes almost a second."""
    environ = os.environ | ENVIRON | {"NORCE_ADAPTER_CONFIG": str(worked)}
    command = [sys.executable, "-c", IMPORTED, *arguments]

    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=PATIENCE)

    imported = set(ended.stderr.split())
    assert "Traceback" not in imported
    assert "adapter.cli" in imported
    assert not never & imported


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_reports_no_problems(config: Path) -> None:
    config.write_text(config.read_text().replace(", refetch: false", ""))

    result = run("check", config=config)

    assert result.exit_code == OK
    assert result.stdout == f"{config}: 2 callbacks, 1 routes; no problems\n"
    assert [line for line in result.stderr.splitlines() if "has no route" not in line] == []


def test_check_accepts_the_file_as_an_option(config: Path) -> None:
    assert run("check", "--config", config).exit_code == OK


def test_check_prints_every_problem_with_file_line_and_path(tmp_path: Path) -> None:
    path = write(tmp_path, "{header_secrets: [{header: authorization, values: []}]}")
    text = re.sub(r"port: 0\b", "port: zero", path.read_text())
    path.write_text(text.replace("kind: validation", "kind: wish"))

    result = run("check", config=path)

    assert (result.exit_code, result.stdout) == (CONFIGURATION, "")
    *problems, last = result.stderr.splitlines()
    assert [problem.split(": ")[:2] for problem in problems] == [
        [f"{path}:2", "server.port"],
        [f"{path}:3", "operations.port"],
        [f"{path}:9", "senders.header_secrets[0].values"],
        [f"{path}:12", "callbacks.order-rules.kind"],
    ]
    assert last == "4 problems in the configuration; nothing was started"


def test_check_prints_problems_of_handlers_and_conditions(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("handler: log", "handler: nothing").replace("/state/currentStatus", "x"))

    result = run("check", config=path)

    assert result.exit_code == CONFIGURATION
    assert [line.split(": ")[:2] for line in result.stderr.splitlines()[:-1]] == [
        [f"{path}:11", "callbacks.order-status.scope"],
        [f"{path}:14", "routes.seen.handler"],
    ]


def test_check_prints_warnings_and_succeeds(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text().replace("/state/currentStatus}", "/state/currentStatus, schema: {const: accepted}}")
    path.write_text(text.replace(", refetch: false", ""))

    result = run("check", config=path)

    assert result.exit_code == OK
    assert result.stderr.startswith(f"warning: {path}:11: callbacks.order-status.schema: ")


def test_check_compares_the_configuration_with_norces_order(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text().replace("/state/currentStatus}", "/state/currentStatus, schema: {const: complete}}")
    path.write_text(text)

    result, strict = run("check", config=path), run("check", "--strict", config=path)

    assert result.exit_code == OK
    assert [line.partition("; did")[0].rpartition(": ")[0] for line in result.stderr.splitlines()[:1]] == [
        f"warning: {path}:11: callbacks.order-status.schema.const: the condition can never hold"
    ]
    assert "did you mean completed?" in result.stderr
    assert "has no route" in result.stderr  # of order-rules
    assert strict.exit_code == CONFIGURATION
    assert strict.stdout == ""
    assert strict.stderr.splitlines()[:-1] == result.stderr.splitlines()


def test_check_with_strict_succeeds_without_warnings() -> None:
    names = ("NORCE_TOKEN", "NORCE_ADAPTER_URL_KEY", "JETSHOP_PASSWORD")

    result = run("check", "--strict", config=ROOT / "config.yaml", env=dict.fromkeys(names, "a-secret-of-16-bytes"))

    assert (result.exit_code, result.stderr) == (OK, "")


@pytest.mark.parametrize(
    "arguments", [["check"], ["serve"], ["deliveries", "list"], ["deliveries", "show", "1"]], ids=" ".join
)
def test_a_missing_configuration_is_4(arguments: list[str]) -> None:
    result = run(*arguments)

    assert result.exit_code == CONFIGURATION
    assert "/nowhere/config.yaml" in result.stderr


def test_a_missing_secret_is_a_problem_and_no_secret_is_printed(tmp_path: Path) -> None:
    path = write(tmp_path)
    result = run("check", config=path, env={name: value for name, value in ENVIRON.items() if name != "URL_KEY"})

    assert result.exit_code == CONFIGURATION
    assert "URL_KEY" in result.stderr
    assert "canary" not in result.output


# --- serve ------------------------------------------------------------------------------------------------------------


def test_serve_with_a_store_in_use_is_5(serving: Serving, config: Path) -> None:
    result = run("serve", config=config)

    assert result.exit_code == STORE
    assert "stop it first" in result.stderr.splitlines()[-1]


def test_serve_with_a_store_that_cannot_be_opened_is_5(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "ledger.db").mkdir()

    assert run("serve", config=path).exit_code == STORE


def test_serve_on_a_port_in_use_is_1_and_names_the_port(serving: Serving, tmp_path: Path) -> None:
    port = serving.address.rpartition(":")[2]
    path = write(tmp_path)
    path.write_text(path.read_text().replace("127.0.0.1, port: 0", f"127.0.0.1, port: {port}"))

    result = run("serve", config=path)

    assert result.exit_code == FAILED
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


# --- send -------------------------------------------------------------------------------------------------------------


NEW = "new: 1 (it is stored, and each route that wants it delivers it)"
HOOKS = """\
  cart-changed: {kind: hook, watch: /cart, target: /attributes}
  cart-kept: {kind: hook, watch: /cart, target: /attributes}
routes:
  marks:
    callback: cart-changed
    handler: patch
    no_answer: reject
    settings: {changes: [{scope: /id, path: /attributes, value: {seen: true}}]}
  keeps:
    callback: cart-kept
    handler: patch
    no_answer: reject
    settings: {changes: [{scope: /nothing, path: /attributes, value: {seen: true}}]}
"""


def run_send(serving: Serving, config: Path, file: Path, *arguments: Any, callback: str = "order-status") -> Result:
    return run("send", file, "--callback", callback, "--to", serving.address, *arguments, config=config)


def test_send_posts_a_signed_order(serving: Serving, config: Path, order: Path) -> None:
    result = run_send(serving, config, order)

    assert (result.exit_code, result.stdout) == (OK, f"200: 1\n{NEW}\n")


def test_send_says_that_the_event_came_with_another_order(serving: Serving, config: Path, tmp_path: Path) -> None:
    for total in (1, 2):
        file = save(tmp_path, ORDER | {"id": "contradicted", "total": total})
        result = run_send(serving, config, file)

    assert result.stdout.splitlines()[1].startswith("conflict: 1 (the ledger has this event with another order")


def test_send_prints_the_answer_of_a_validation_or_hook(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("routes:\n", HOOKS))
    with closing(Serving(path)) as service:
        printed = [
            run_send(service, path, save(tmp_path, ORDER), callback=name).stdout.splitlines()[1:]
            for name in ("order-rules", "cart-changed", "cart-kept")
        ]

    patch = '[{"op":"add","path":"/attributes","value":{"seen":true}}]'
    assert printed == [["approved: 1"], [f"patch {patch}: 1"], ["accepted without a patch: 1"]]


def test_send_repeats_and_counts_the_answers(serving: Serving, config: Path, tmp_path: Path) -> None:
    file = save(tmp_path, ORDER | {"id": "repeated"})

    result = run_send(serving, config, file, "--repeat", 5, "--expect", 200)

    assert result.exit_code == OK
    assert result.stdout.splitlines() == [
        "200: 5",
        NEW,
        "repeat: 4 (the ledger has this event already, so nothing is delivered; to deliver it again: norce-adapter"
        " deliveries resend --order repeated --merchant norce --channel 1 --why …)",
    ]
    assert len(execute(config, "SELECT id FROM notifications WHERE order_id = 'repeated'")) == 1


def test_send_fails_if_an_answer_has_another_status_than_expected(serving: Serving, config: Path, order: Path) -> None:
    result = run_send(serving, config, order, "--expect", 400)

    assert result.exit_code == FAILED
    assert result.stdout.splitlines()[0] == "200: 1"
    assert "expected 400" in result.stderr


def test_send_prints_the_reason_of_a_refusal(serving: Serving, config: Path, tmp_path: Path) -> None:
    file = save(tmp_path, ORDER | {"id": "x" * 300})

    result = run_send(serving, config, file, "--expect", 400)

    assert (result.exit_code, result.stdout) == (OK, "400: 1\n")
    assert "order-bad-request" in result.stderr


def test_send_calls_validations(serving: Serving, config: Path, order: Path) -> None:
    assert run_send(serving, config, order, callback="order-rules").stdout == "200: 1\napproved: 1\n"


@pytest.mark.parametrize("member", ["payload", "order"])
def test_send_unwraps_an_event_record_and_keeps_an_envelope(
    serving: Serving, config: Path, tmp_path: Path, member: str
) -> None:
    envelope = {"notification": {"reference": "x"}, "order": ORDER | {"id": f"wrapped-{member}"}}
    file = save(tmp_path, {"id": "018f1ac8", "payload": envelope} if member == "payload" else envelope)

    result = run_send(serving, config, file, "--expect", 200)

    assert result.exit_code == OK
    [(body,)] = execute(config, f"SELECT body FROM notifications WHERE order_id = 'wrapped-{member}'")
    assert json.loads(body) == envelope


def test_send_sends_an_order_byte_for_byte(serving: Serving, config: Path, tmp_path: Path) -> None:
    raw = b'{ "id":"raw",\r\n "merchant":"norce", "channel":"1", "x": 1.50 }\n'

    run_send(serving, config, save(tmp_path, raw))

    assert execute(config, "SELECT body FROM notifications WHERE order_id = 'raw'") == [(raw,)]


def test_send_reads_a_file_as_the_service_reads_a_body(serving: Serving, config: Path, tmp_path: Path) -> None:
    raw = b'\xef\xbb\xbf{"id":"odd","merchant":"norce","channel":"1","a":"\\ud83d","b":1e400}'

    run_send(serving, config, save(tmp_path, raw))

    assert execute(config, "SELECT body FROM notifications WHERE order_id = 'odd'") == [(raw,)]


def test_send_replaces_id_merchant_and_channel_by_options(serving: Serving, config: Path, tmp_path: Path) -> None:
    file = save(tmp_path, {"total": {}})
    given = ["--order", "an odd?id#å", "--merchant", "other", "--channel", "1"]

    without = run_send(serving, config, file)
    refused = run_send(serving, config, file, *given[:2])
    sent = run_send(serving, config, file, *given)

    assert (without.exit_code, refused.exit_code) == (USAGE, USAGE)
    assert (sent.exit_code, sent.stdout) == (OK, f"200: 1\n{NEW}\n")
    assert execute(config, "SELECT order_id FROM notifications WHERE merchant = 'other'") == [("an odd?id#å",)]
    assert "give --order, --merchant and --channel" in without.stderr


@pytest.mark.parametrize(
    "senders",
    [
        SIGNED,
        '{header_secrets: [{header: x-secret, values: ["${env:HEADER}"]}]}',
        '{header_secrets: [{header: x-secret, values: ["${env:HEADER}"], merchants: [other]}],'
        ' url_secrets: [{parameter: secret, values: ["${env:STATIC}"]}]}',
    ],
    ids=["signed", "header", "url"],
)
def test_send_authenticates_by_any_configured_method(tmp_path: Path, senders: str) -> None:
    path, order_ids = write(tmp_path, senders), ["an odd?id#å%41", "a&b=c", "o+1"]
    with closing(Serving(path)) as service:
        results = [
            run_send(service, path, save(tmp_path, ORDER | {"id": order_id}), "--expect", 200) for order_id in order_ids
        ]

    assert [(result.exit_code, result.stdout) for result in results] == [(OK, f"200: 1\n{NEW}\n")] * 3
    assert not any("canary" in result.output for result in results)
    assert execute(path, "SELECT order_id FROM notifications ORDER BY id") == [(each,) for each in order_ids]


def test_send_chooses_a_secret_for_the_merchant(tmp_path: Path) -> None:
    header = '{header: x-one, values: ["${env:HEADER}"], merchants: [other]}'
    url = '{parameter: secret, values: ["${env:STATIC}"], merchants: [norce]}'
    path = write(tmp_path, f"{{header_secrets: [{header}], url_secrets: [{url}]}}")
    with closing(Serving(path)) as service:
        results = [
            run_send(service, path, save(tmp_path, ORDER | {"merchant": merchant})).stdout
            for merchant in ("norce", "other")
        ]

    assert results == [f"200: 1\n{NEW}\n"] * 2


def test_send_does_not_use_a_secret_in_the_url_for_a_validation(tmp_path: Path) -> None:
    header = '{header: x-one, values: ["${env:HEADER}"], merchants: [other]}'
    path = write(
        tmp_path, f'{{header_secrets: [{header}], url_secrets: [{{parameter: s, values: ["${{env:STATIC}}"]}}]}}'
    )

    result = run("send", save(tmp_path, ORDER), "--callback", "order-rules", config=path)

    assert result.exit_code == USAGE
    assert "no secret for a validation or hook is for merchant norce" in result.stderr


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"order": 1}', b'{"id": 5, "merchant": "norce", "channel": "1"}'], ids=repr
)
def test_send_refuses_a_file_without_an_order(config: Path, tmp_path: Path, body: bytes) -> None:
    result = run("send", save(tmp_path, body), "--callback", "order-status", config=config)

    assert (result.exit_code, result.stdout) == (USAGE, "")


def test_send_to_an_unknown_callback_names_the_configured_ones(config: Path, order: Path) -> None:
    result = run("send", order, "--callback", "nothing", config=config)

    assert result.exit_code == USAGE
    assert "order-rules, order-status" in result.stderr


def test_send_without_a_listener_is_1(config: Path, order: Path) -> None:
    result = run("send", order, "--callback", "order-status", "--to", "http://127.0.0.1:1", config=config)

    assert result.exit_code == FAILED
    assert "no answer from http://127.0.0.1:1" in result.stderr
    assert "canary" not in result.output


# --- deliveries -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with three delivered orders, whose service has ended."""
    path = write(tmp_path_factory.mktemp("worked"))
    with closing(Serving(path)) as service:
        for number in range(3):
            file = save(path.parent, ORDER | {"id": f"order-{number}"})
            assert run_send(service, path, file, "--expect", 200).exit_code == OK
    return path


def list_deliveries(worked: Path, *arguments: str) -> list[dict[str, Any]]:
    result = run("deliveries", "list", "--output", "json", *arguments, config=worked)
    assert result.exit_code in (OK, NOTHING_MATCHED)
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_deliveries_are_listed_newest_first(worked: Path) -> None:
    found = list_deliveries(worked)

    assert [each["order_id"] for each in found] == ["order-2", "order-1", "order-0"]
    assert {each["route"] for each in found} == {"seen"}
    assert {"id", "state", "reason", "tries", "next_at", "code", "message", "reference"} <= found[0].keys()


@pytest.mark.parametrize(
    ("filters", "orders"),
    [
        (["--order", "order-1"], ["order-1"]),
        (["--route", "seen", "--limit", "2"], ["order-2", "order-1"]),
        (["--route", "another"], []),
        (["--order", "' OR 1=1 --"], []),
        (["--state", "dead"], []),
    ],
)
def test_deliveries_are_filtered(worked: Path, filters: list[str], orders: list[str]) -> None:
    assert [each["order_id"] for each in list_deliveries(worked, *filters)] == orders


@pytest.mark.parametrize("output", ["json", "table"])
def test_no_match_is_3(worked: Path, output: str) -> None:
    result = run("deliveries", "list", "--order", "nobody", "--output", output, config=worked)

    assert (result.exit_code, result.stdout) == (NOTHING_MATCHED, {"json": "[]\n", "table": ""}[output])


@pytest.mark.parametrize("content", [b"", b"this is not a database but a long text" * 100], ids=["empty", "text"])
@pytest.mark.parametrize("command", [["list"], ["show", "1"]], ids=["list", "show"])
def test_an_unreadable_store_is_5(tmp_path: Path, content: bytes, command: list[str]) -> None:
    path = write(tmp_path)
    (tmp_path / "ledger.db").write_bytes(content)

    result = run("deliveries", *command, config=path)

    assert (result.exit_code, result.stdout) == (STORE, "")
    assert str(tmp_path / "ledger.db") in result.stderr


# --- handlers ---------------------------------------------------------------------------------------------------------


def test_installed_handlers_are_listed_as_json() -> None:
    result = run("handlers", "list", "--output", "json")

    found = {row["name"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == OK
    assert found["rules"] | {"says": ""} == {
        "name": "rules", "from": "norce-adapter", "kind": "validation, hook", "says": "",
    }  # fmt: skip
    assert found["log"]["kind"] == found["jetshop"]["kind"] == "notification"
    assert (found["patch"]["kind"], found["rules"]["kind"]) == ("hook", "validation, hook")
    assert all(row["says"] for row in found.values())


def test_installed_handlers_are_listed_as_a_table() -> None:
    lines = run("handlers", "list").stdout.splitlines()

    assert lines[0].split() == ["name", "from", "kind", "says"]
    assert [line.split()[0] for line in lines[1:]] == sorted(line.split()[0] for line in lines[1:])


@pytest.mark.parametrize(
    ("loaded", "kind", "says"),
    [
        (ImportError("no such module"), None, "cannot be imported: ImportError"),
        (SystemExit(0), None, "cannot be imported: SystemExit"),
        (dict, "none", None),
        (run, "none", None),
        ("text", "none", None),
    ],
    ids=["cannot be imported", "ends the process", "another class", "a function", "no class"],
)
def test_a_broken_handler_is_listed_as_broken(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, kind: str | None, says: str | None
) -> None:
    class Point:
        name = "broken"
        dist = None

        def load(self) -> Any:
            if isinstance(loaded, BaseException):
                raise loaded
            return loaded

    others = entry_points(group=routes.GROUP)
    monkeypatch.setattr(handlers, "entry_points", lambda group: [Point(), *others])

    result = run("handlers", "list", "--output", "json")

    broken, *rest = json.loads(result.stdout)
    assert (broken["name"], broken["from"], broken["kind"]) == ("broken", None, kind)
    assert says is None or broken["says"] == says
    assert len(rest) == len(others)


# --- demo -------------------------------------------------------------------------------------------------------------


def test_the_demo_prints_one_line_of_json() -> None:
    result = run("demo", "--exit", "--output", "json")

    assert result.exit_code == OK
    [line] = result.stdout.splitlines()
    summary = json.loads(line)
    assert {name: summary[name] for name in ("validation", "notification", "exports", "rejected")} == {
        "validation": {"denied": 400, "approved": 200}, "notification": 200, "exports": 1, "rejected": 1,
    }  # fmt: skip
    assert "The shopper pays" in result.stderr


def test_the_demo_prints_its_walk() -> None:
    result = run("demo", "--exit")

    assert result.exit_code == OK
    assert "denied: 400" in result.stdout
    assert "{" not in result.stdout.splitlines()[-1]
