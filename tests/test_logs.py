"""Log lines: the fields that leave the process, and those that are redacted."""

import contextlib
import fcntl
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


# --- the log of a handler -------------------------------------------------------------------------------------------


def test_a_handler_writes_names_and_numbers_beside_the_bound_fields(lines: Lines) -> None:
    logs.HandlerLog(route="export", order_id="O 1").info("order_sent", code="new-order", count=2, status=None)

    (line,) = lines()
    assert (line["event"], line["code"], line["count"], line["status"]) == ("order_sent", "new-order", 2, None)
    assert (line["route"], line["order_id"]) == ("export", "O 1")


@pytest.mark.parametrize("name", ["route", "order_id", "attempt"])
def test_a_handler_cannot_replace_what_is_bound(lines: Lines, name: str) -> None:
    bound: dict[str, Any] = {"route": "export", "order_id": "order-1", "attempt": 1}

    logs.HandlerLog({name}, **bound).error("shouted", **{name: CANARY}, event=CANARY, level=CANARY, timestamp=CANARY)

    (line,) = lines()
    assert {key: line[key] for key in bound} == bound
    assert (line["event"], line["level"]) == ("shouted", "error")
    assert CANARY not in json.dumps(line)


@pytest.mark.parametrize(
    "text",
    ["Anna Svensson", "anna@shop.example", CANARY, "Anna", "a" * 65, "", "a__b", "name\n", Secret(CANARY), {"id": 1}],
)
def test_a_text_of_a_handler_that_is_no_name_is_replaced(lines: Lines, text: Any) -> None:
    logs.HandlerLog(attempt=1).warning("order_sent", code=text, email="a-name")
    logs.HandlerLog(attempt=1).warning(text)

    field, event = lines()
    assert (field["code"], field["email"]) == ("[redacted]", "[redacted]")
    assert event["event"] == "plugin_logged"
    assert event["where"].startswith(f"{__name__}:")


def test_the_fields_that_a_handler_declares_leave_the_process(lines: Lines) -> None:
    log = logs.HandlerLog({"invoice", "lines"}, attempt=1)

    log.info("order_sent", invoice="INV 7/2026", lines=3, other="INV 7/2026")
    log.info("order_sent", invoice={"id": CANARY}, lines="x" * 300)
    structlog.get_logger().info("order_sent", invoice="INV 7/2026")

    first, second, ours = lines()
    assert (first["invoice"], first["lines"], first["other"]) == ("INV 7/2026", 3, "[redacted]")
    assert (second["invoice"], second["lines"]) == ("[redacted]", "x" * 200 + "…")
    assert ours["invoice"] == "[redacted]"
    assert "log_fields" not in first


def test_a_handler_can_log_where_an_exception_was_raised(lines: Lines) -> None:
    try:
        raise KeyError(CANARY)
    except KeyError as error:
        logs.HandlerLog(attempt=1).error("lookup_failed", exc_info=error)

    (line,) = lines()
    assert line["exception"][0]["type"] == "builtins.KeyError"
    assert CANARY not in json.dumps(line)


# --- odd values -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise SystemExit(3)", 3), ("logs.close(); os._exit(4)", 4)])
def test_buffered_lines_are_written_before_the_process_ends(end: str, code: int) -> None:
    program = f"""
import asyncio, os, structlog
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


# --- the thread that writes -----------------------------------------------------------------------------------------


class Pipe:
    """A pipe with a small buffer, and a writer at one end."""

    def __init__(self, max_lines: int = 10) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)
        self.out = os.fdopen(self.writing, "w")
        self.max_lines = max_lines
        self.writer = logs.LineWriter(self.out, max_lines=max_lines)
        self.dropped: list[int] = []
        self.writer.count_dropped(self.dropped.append)
        structlog.configure(
            processors=[structlog.processors.JSONRenderer()],
            logger_factory=self.writer,
            cache_logger_on_first_use=False,
        )

    def read(self) -> bytes:
        return os.read(self.reading, 1_000_000)

    def read_until(self, words: bytes) -> list[bytes]:
        """Read until these words have come at the end, and return the lines."""
        data = b""
        while not data.endswith(words):
            data += self.read()
        return data.splitlines()

    def read_until_reported(self) -> list[bytes]:
        """Read until every dropped line is reported, and return the other lines."""
        data, lines, reported = b"", [], 0
        while reported < self.writer.dropped:
            data += self.read()
            *whole, data = data.split(b"\n")
            lines += [each for each in whole if not each.startswith(b"{")]
            reported += sum(json.loads(each)["count"] for each in whole if each.startswith(b"{"))
        assert reported == self.writer.dropped == sum(self.dropped)
        return lines

    def fill(self) -> None:
        """Write lines until no more fit: into the pipe, the thread's hands and the buffer."""
        accepted, is_full = 0, False
        while not (is_full and accepted > 4096 // 101 + self.max_lines):
            before = self.writer.dropped
            self.writer.msg("x" * 100)
            is_full = self.writer.dropped > before
            accepted += not is_full

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.reading)
        self.writer.close()
        with contextlib.suppress(OSError):
            self.out.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def wait_until(holds: Callable[[], Any]) -> None:
    ends = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_lines_are_written_in_their_order(pipe: Pipe) -> None:
    for number in range(5):
        pipe.writer.msg(str(number))

    assert pipe.read_until(b"4\n") == [b"0", b"1", b"2", b"3", b"4"]


def test_a_reader_that_stops_costs_lines_but_no_time_and_they_are_counted(pipe: Pipe) -> None:
    pipe.fill()
    for _ in range(1000):
        pipe.writer.msg("dropped")

    lines = pipe.read_until_reported()

    assert pipe.writer.dropped > 1000
    assert b"dropped" not in lines
    pipe.writer.msg("again")
    assert pipe.read_until(b"again\n") == [b"again"]


def test_a_closed_pipe_costs_lines_and_nothing_else(pipe: Pipe) -> None:
    os.close(pipe.reading)
    for _ in range(3):
        pipe.writer.msg("lost")

    wait_until(lambda: sum(pipe.dropped) == 3)
    pipe.writer.msg("lost too")
    wait_until(lambda: sum(pipe.dropped) == 4)


def test_a_pipe_that_does_not_block_is_waited_for(pipe: Pipe) -> None:
    """Another process that shares the pipe can make it non-blocking."""
    os.set_blocking(pipe.writing, False)
    pipe.fill()

    lines = pipe.read_until_reported()

    assert set(lines) == {b"x" * 100}


def test_a_full_disk_ends_no_line_in_the_middle_of_another(tmp_path: Path) -> None:
    """A process of its own has the limit on the size of a file, which is the same to a writer as a full disk."""
    program = """
import resource, signal, structlog, sys, time
from adapter import logs

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
logs.configure()
dropped = []
logs.count_dropped(dropped.append)
log = structlog.get_logger()
for number in range(100):
    log.info("callback_answered", count=number)
while not sum(dropped):
    time.sleep(0.001)
log.info("callback_answered", count=100)
while sum(dropped) < 2:
    time.sleep(0.001)
logs.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.info("serving")
logs.close()
print(sum(dropped))
"""
    path = tmp_path / "log"
    with path.open("w") as file:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            timeout=PATIENCE,
            check=True,
        )

    lines = path.read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    written = [each["count"] for each in events if each["event"] == "callback_answered"]
    assert written == list(range(len(written)))
    assert len(lines) - len(events) <= 1  # the line that was cut by the full disk
    assert [each["event"] for each in events[-2:]] == ["serving", "log_lines_dropped"]
    assert len(written) + int(ended.stdout) == 101
    assert events[-1]["count"] == int(ended.stdout)


def test_closing_gives_up_if_the_reader_has_stopped(pipe: Pipe) -> None:
    pipe.fill()

    began = time.monotonic()
    pipe.writer.close()

    assert logs.CLOSE_WITHIN_SECONDS <= time.monotonic() - began < PATIENCE
    assert logs.CLOSE_WITHIN_SECONDS <= 2


def test_a_line_after_the_close_is_written(pipe: Pipe) -> None:
    pipe.writer.msg("one")
    pipe.writer.close()
    pipe.writer.msg("two")

    assert pipe.read_until(b"two\n") == [b"one", b"two"]


def test_without_a_standard_error_lines_are_counted_as_dropped() -> None:
    dropped: list[int] = []
    writer = logs.LineWriter(None)
    writer.msg("before")
    wait_until(lambda: writer.dropped == 1)

    writer.count_dropped(dropped.append)
    writer.msg("lost")

    wait_until(lambda: dropped == [1, 1])
    writer.close()


def test_the_shipped_buffer_is_bounded() -> None:
    assert logs.MAX_LINES == 10_000
    assert logs.WRITE_WITHIN_SECONDS <= 0.01


def test_a_printed_line_becomes_a_line_of_the_log(pipe: Pipe) -> None:
    with logs.printed_lines():
        print("to standard output", end="")  # noqa: T201
        print(", in two parts")  # noqa: T201
        print("to standard error", file=sys.stderr)  # noqa: T201
        print("å", "x" * 20_000)  # noqa: T201

    lines = pipe.read_until(b"x" * 100 + b"\n")
    assert lines[:2] == [b"to standard output, in two parts", b"to standard error"]
    assert lines[2] == b"\xc3\xa5 " + b"x" * (10_000 - 3)


def test_printing_does_not_wait_for_a_reader_that_has_stopped(pipe: Pipe) -> None:
    pipe.fill()
    before = sum(pipe.dropped)

    with logs.printed_lines():
        for _ in range(1000):
            print("lost")  # noqa: T201

    assert sum(pipe.dropped) == before + 1000


def test_a_warning_and_the_failure_of_a_thread_are_lines_without_their_text() -> None:
    program = f"""
import threading, warnings
from adapter import logs

logs.configure()
warnings.warn({CANARY!r}, RuntimeWarning)
thread = threading.Thread(target=lambda: int({CANARY!r}))
thread.start()
thread.join()
"""
    ended = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True
    )

    warning, failure = map(json.loads, ended.stderr.splitlines())
    assert (warning["event"], warning["error_type"], warning["where"]) == (
        "python_warning",
        "RuntimeWarning",
        "<string>:6",
    )
    assert (failure["event"], failure["exception"][0]["type"]) == ("thread_failed", "builtins.ValueError")
    assert CANARY not in ended.stderr


# --- level and format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "events"),
    [("debug", ["a", "b", "c", "d"]), ("info", ["b", "c", "d"]), ("warning", ["c", "d"]), ("error", ["d"])],
)
def test_lines_below_the_level_are_left_out(level: Any, events: list[str]) -> None:
    stream = io.StringIO()
    logs.configure(stream=stream, level=level)

    log().debug("a")
    log().info("b")
    log().warning("c")
    log().error("d")

    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == events


@pytest.mark.parametrize(
    ("stream", "format", "start"),
    [
        (Terminal(), "json", "{"),
        (Terminal(), "auto", "\x1b["),
        (io.StringIO(), "text", "20"),
        (io.StringIO(), "auto", "{"),
    ],
)
def test_the_format_can_be_chosen(stream: io.StringIO, format: Any, start: str) -> None:
    logs.configure(stream=stream, format=format)

    log().info("serving", route="export")

    assert stream.getvalue().startswith(start)
    assert "export" in stream.getvalue()
