"""`norce-adapter check` against an existing ledger: names that are gone, kinds, orphaned queues, the ledger's Norce."""

import asyncio
import re
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from adapter.identifiers import Channel
from adapter.ledger.store import Store
from adapter.ledger.uses import DAY_MS, Uses
from tests.cli.test_cli import CONFIGURATION, OK, STORE, Serving, execute, run, write

pytestmark = pytest.mark.usefixtures("logging_as_before")

KEYS = 'keys: {k1: "${env:URL_KEY}"'
HERE = Channel("norce", "1")


@pytest.fixture(scope="module")
def served_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a ledger that has served `CONFIG`. Tests take a copy."""
    config = write(tmp_path_factory.mktemp("served"))
    Serving(config, hold=True).close()
    return config.with_name("ledger.db")


@pytest.fixture
def config(tmp_path: Path, served_once: Path) -> Path:
    shutil.copy(served_once, tmp_path / "ledger.db")
    return write(tmp_path)


def change(config: Path, *changes: tuple[str, str]) -> None:
    text = config.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    config.write_text(text)


def call(config: Path, *calls: tuple[str, Channel, str], days_ago: int = 0) -> None:
    """Record calls as a service does."""

    async def record() -> None:
        store = Store.open(f"sqlite:///{config.parent}/ledger.db")
        uses = Uses(store)
        for each in calls:
            uses.record(*each)
        await uses.flush()
        store.close()

    asyncio.run(record())
    execute(config, f"UPDATE uses SET day = day - {days_ago}, last_at = last_at - {days_ago * DAY_MS}")


def warnings(config: Path) -> list[str]:
    result = run("check", config=config)
    assert result.exit_code == OK, result.stderr
    lines = [line.removeprefix("warning: ") for line in result.stderr.splitlines()]
    ours = [line for line in lines if not line.startswith(str(config))]  # the others have a place in the file
    return [re.sub(r" \(last call \d{4}-\d\d-\d\dT[\d:.]+Z\)", "", line) for line in ours]


def test_names_in_use_and_names_that_nobody_calls_are_no_warnings(config: Path) -> None:
    call(config, ("order-rules", HERE, "k1"))
    change(config, ("order-status", "order-state"))

    assert warnings(config) == []


GONE = {
    "callback": ("order-rules:", "rules:", "callback `order-rules` was called 3 times today"),
    "channel": ('"2": {}', '"3": {}', "channel `2` of `norce` was called once today"),
    "merchant": ("  other:", "  another:", "merchant `other` was called once today"),
    "key": ("k1:", "k2:", "URL key `k1` verified 2 calls today"),
}


@pytest.mark.parametrize(("before", "after", "expected"), GONE.values(), ids=GONE)
def test_each_name_that_is_gone_and_was_called_is_a_warning(
    config: Path, before: str, after: str, expected: str
) -> None:
    call(config, ("order-rules", HERE, "k1"), ("order-rules", Channel("norce", "2"), "k1"),
         ("order-rules", Channel("other", "1"), ""))  # fmt: skip
    change(config, (before, after))

    (found,) = warnings(config)

    assert found.startswith(f"{expected} and is gone: its ")


@pytest.mark.parametrize(
    ("days_ago", "expected"), [(6, "was called once in the last 7 days and is gone"), (7, None)], ids=str
)
def test_calls_of_the_last_seven_days_count(config: Path, days_ago: int, expected: str | None) -> None:
    call(config, ("order-rules", HERE, "k1"), days_ago=days_ago)
    change(config, ("order-rules:", "rules:"))

    found = warnings(config)

    assert [each.partition(":")[0] for each in found] == ([f"callback `order-rules` {expected}"] if expected else [])


def test_an_orphaned_queue_with_deliveries_is_a_warning(config: Path) -> None:
    now = time.time_ns() // 1_000_000
    queue = "(SELECT id FROM queues WHERE merchant = 'other')"
    columns = "id, identity, merchant, channel, callback, order_id, snapshot_at, received_at, source"
    values = f"1, x'00', 'other', '1', 'order-status', 'o1', 1, {now}, 'callback'"
    execute(config, f"INSERT INTO notifications ({columns}) VALUES ({values})")
    execute(config, f"INSERT INTO lanes (id, queue_id, order_id, next_at) VALUES (1, {queue}, 'o1', {now})")
    for state in ("waiting", "dead", "dead"):
        execute(config, "INSERT INTO deliveries (notification_id, lane_id, position, state, reason)"
                f" VALUES (1, 1, 0, '{state}', NULL)")  # fmt: skip
    before = warnings(config)
    change(config, ("  other:", "  another:"))

    (found,) = warnings(config)

    assert before == []
    assert found.startswith("queue seen of other/1 is orphaned, with 1 waiting and 2 dead deliveries: ")


def test_the_service_logs_the_same_warnings_at_its_start(config: Path) -> None:
    call(config, ("order-rules", HERE, "k1"), ("order-rules", Channel("other", "1"), "k1"))
    change(config, ("order-rules:", "rules:"), ("  other:", "  another:"), ("k1:", "k2:"))

    with capture_logs() as lines, closing(Serving(config, hold=True)):
        pass

    logged = [each for each in lines if each["event"] == "gone_name_used"]
    assert [(each.get("callback"), each.get("merchant"), each.get("key"), each["count"]) for each in logged] == [
        ("order-rules", None, None, 2),
        (None, "other", None, 1),
        (None, None, "k1", 2),
    ]


@pytest.mark.parametrize("command", ["check", "serve"])
def test_another_kind_for_a_known_name_is_a_problem_with_its_line(config: Path, command: str) -> None:
    change(config, ("order-rules: {kind: validation}", "order-rules: {kind: hook, watch: /cart}"))

    result = run(command, config=config)

    assert result.exit_code == CONFIGURATION
    (problem, last) = [line for line in result.stderr.splitlines() if "warning" not in line and "{" not in line[:1]][
        -2:
    ]
    line = 1 + config.read_text().splitlines().index("  order-rules: {kind: hook, watch: /cart}")
    assert problem == (
        f"{config}:{line}: callbacks.order-rules.kind: the ledger knows this name as a validation, and open orders may "
        "carry it; give the callback another name"
    )
    assert last == "1 problem in the configuration; nothing was started"


def test_without_a_ledger_nothing_is_compared(tmp_path: Path) -> None:
    assert warnings(write(tmp_path)) == []
    assert not (tmp_path / "ledger.db").exists()


def test_a_ledger_that_cannot_be_read_is_a_warning(config: Path) -> None:
    (config.parent / "ledger.db").write_bytes(b"no database" * 100)

    (found,) = warnings(config)

    assert found.startswith(f"cannot read {config.parent}/ledger.db, so it was not compared with the configuration: ")


def test_a_ledger_of_another_norce_is_5(config: Path) -> None:
    change(config, ('base_url: "http://127.0.0.1:1"', "environment: stage"))

    result = run("check", config=config)

    assert result.exit_code == STORE
    assert "belongs to adapter an_adapter at localhost, and the configuration names" in result.stderr
