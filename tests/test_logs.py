"""Log lines: the fields that leave the process, and those that are redacted."""

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from adapter import logs
from adapter.plugin import Secret, Url
from tests import PATIENCE

CANARY = "19811218-9876"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def lines() -> Callable[[], list[dict[str, Any]]]:
    stream = io.StringIO()
    logging.getLogger().setLevel(logging.DEBUG)
    logs.configure(stream=stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


Lines = Callable[[], list[dict[str, Any]]]


def log() -> Any:
    return structlog.get_logger("test")


def test_an_event_is_one_line_of_json_with_its_facts(lines: Lines) -> None:
    log().info("delivery_retried", attempt=3, order_id="order-1", in_doubt=False, reason=None, duration_ms=1.5)

    (line,) = lines()
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "delivery_retried",
        "level": "info",
        "attempt": 3,
        "order_id": "order-1",
        "in_doubt": False,
        "reason": None,
        "duration_ms": 1.5,
    }


def test_an_event_below_the_level_is_not_written(lines: Lines) -> None:
    log().debug("noise")

    assert lines() == []


def test_a_field_that_is_not_allowed_is_redacted(lines: Lines) -> None:
    log().info("oops", email=CANARY, customer={"id": CANARY}, error=CANARY)

    (line,) = lines()
    assert (line["email"], line["customer"], line["error"]) == ("[redacted]",) * 3
    assert CANARY not in json.dumps(line)


@pytest.mark.parametrize(
    "value",
    [{"id": CANARY}, [CANARY], (CANARY,), CANARY.encode(), ValueError(CANARY), Secret(CANARY), {CANARY}],
    ids=lambda value: type(value).__name__,
)
def test_an_allowed_field_shows_plain_values_only(lines: Lines, value: Any) -> None:
    log().info("oops", code=value)

    assert lines()[0]["code"] == "[redacted]"


@pytest.mark.parametrize("value", [{"order": CANARY}, CANARY, [CANARY]], ids=["dict", "text", "list"])
def test_a_caller_cannot_pass_its_own_exception_field(lines: Lines, value: Any) -> None:
    log().info("oops", exception=value)

    assert CANARY not in json.dumps(lines())


def test_a_long_text_is_cut(lines: Lines) -> None:
    log().info("oops", code="x" * 10_000)

    assert lines()[0]["code"] == "x" * 200 + "…"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param(Url("https://shop.example"), "https://shop.example", id="an address"),
        pytest.param("\ud800", "?", id="no Unicode"),
        pytest.param(2**70, 2**70, id="a large number"),
        pytest.param(float("nan"), None, id="not a number"),
        pytest.param("a\nb", "a\nb", id="two lines"),
    ],
)
def test_an_odd_value_is_still_one_line(lines: Lines, value: Any, shown: Any) -> None:
    log().info("oops", address=value)

    assert [line["address"] for line in lines()] == [shown]


def fails(order: str) -> None:
    number = order
    raise ValueError(f"cannot parse {number}")


def test_an_exception_shows_its_types_and_places_and_never_its_message_or_locals(lines: Lines) -> None:
    try:
        try:
            fails(CANARY)
        except ValueError as error:
            raise RuntimeError(CANARY) from error
    except RuntimeError as error:
        log().error("handler_failed", exc_info=error)

    (line,) = lines()
    assert [each["type"] for each in line["exception"]] == ["builtins.RuntimeError", "builtins.ValueError"]
    assert line["exception"][1]["frames"][-1].endswith(" in fails")
    assert CANARY not in json.dumps(line)


def test_the_current_exception_is_shown_on_request(lines: Lines) -> None:
    try:
        fails(CANARY)
    except ValueError:
        log().exception("handler_failed")
        log().error("handler_failed", exc_info=True)

    assert [line["exception"][0]["type"] for line in lines()] == ["builtins.ValueError"] * 2
    assert CANARY not in json.dumps(lines())


def test_a_suppressed_cause_is_not_shown() -> None:
    def raised() -> BaseException:
        try:
            try:
                fails(CANARY)
            except ValueError:
                raise KeyError(CANARY) from None
        except KeyError as error:
            return error
        raise AssertionError("nothing was raised")

    assert [each["type"] for each in logs.described(raised())] == ["builtins.KeyError"]


def test_a_deep_traceback_and_a_long_chain_are_cut() -> None:
    def dive(depth: int) -> None:
        if depth:
            dive(depth - 1)
        raise ValueError

    def chained(length: int) -> BaseException:
        try:
            if length:
                raise RuntimeError from chained(length - 1)
            dive(100)
        except (RuntimeError, ValueError) as error:
            return error
        raise AssertionError

    described = logs.described(chained(0)), logs.described(chained(50))
    assert len(described[0][0]["frames"]) == 20
    assert len(described[1]) == 5


def test_a_librarys_line_has_its_name_and_place_and_never_its_text(lines: Lines) -> None:
    try:
        fails(CANARY)
    except ValueError:
        logging.getLogger("some.library").error("cannot send %s", CANARY, exc_info=True)
    logging.getLogger("some.library").warning("careful with %s", CANARY)
    logging.getLogger("some.library").info("sent %s", CANARY)

    told = [(line["event"], line["level"], line["logger"]) for line in lines()]
    assert told == [("library_logged", level, "some.library") for level in ("error", "warning")]
    assert lines()[0]["where"].startswith("test_logs:")
    assert CANARY not in json.dumps(lines())


def test_a_terminal_shows_the_same_fields_in_colour() -> None:
    terminal = Terminal()
    logs.configure(stream=terminal)
    try:
        fails(CANARY)
    except ValueError as error:
        log().error("handler_failed", route="export", email=CANARY, exc_info=error)

    assert "handler_failed" in terminal.getvalue()
    assert "export" in terminal.getvalue()
    assert CANARY not in terminal.getvalue()


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_buffered_lines_are_written_before_the_process_ends(end: str, code: int) -> None:
    program = f"""
import asyncio, structlog
from adapter import logs

async def main():
    for number in range(1000):
        structlog.get_logger().info("callback_answered", count=number)
    {end}

logs.configure()
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )

    told = [json.loads(line)["count"] for line in ended.stderr.splitlines() if line.startswith("{")]
    assert (ended.returncode, told) == (code, list(range(1000)))


class Writes(io.StringIO):
    """A stream that remembers what each call wrote: the events of its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.flushed = asyncio.Event()

    def write(self, text: str) -> int:
        if text:  # a timer that is late finds no lines
            self.calls.append([json.loads(line)["event"] for line in text.splitlines()])
        return len(text)

    def flush(self) -> None:
        self.flushed.set()


@pytest.fixture
def standard_error(monkeypatch: pytest.MonkeyPatch) -> Writes:
    stream = Writes()
    for name in ("stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, stream)
    logs.configure()
    return stream


def test_frequent_lines_on_standard_error_share_one_write_with_the_next_other_line(standard_error: Writes) -> None:
    async def main() -> None:
        log().info("callback_answered")
        log().warning("verdict")
        assert standard_error.calls == []
        log().info("serving")
        log().info("verdict")
        log().error("verdict")

    asyncio.run(main())

    assert standard_error.calls == [["callback_answered", "verdict", "serving"], ["verdict", "verdict"]]


def test_frequent_lines_on_standard_error_are_written_soon_though_no_other_follows(standard_error: Writes) -> None:
    async def main() -> None:
        for _ in range(2):
            for _ in range(3):
                log().info("verdict")
            standard_error.flushed.clear()
            async with asyncio.timeout(PATIENCE):
                await standard_error.flushed.wait()

    asyncio.run(main())

    assert standard_error.calls == [["verdict"] * 3] * 2
    assert logs.WRITE_WITHIN_SECONDS <= 0.01


def test_a_frequent_line_is_written_at_once_without_an_event_loop(standard_error: Writes) -> None:
    log().info("verdict")

    assert standard_error.calls == [["verdict"]]


def test_every_line_on_another_stream_is_written_at_once(lines: Lines) -> None:
    async def main() -> None:
        log().info("verdict")
        assert len(lines()) == 1

    asyncio.run(main())
