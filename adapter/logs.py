"""The log, by structlog: one JSON line per event, or readable colours on a terminal.

Only allowed fields leave the process; every other field is shown as `[redacted]`. Of an exception its types and places
are written, never its message and never a local variable, because both may contain an order.
"""

import asyncio
import atexit
import functools
import logging
import sys
import threading
import time
import traceback
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec
import structlog

ALLOWED = frozenset(
    {
        "event", "level", "timestamp", "exception",
        "adapter_id", "added", "address", "attempt", "bodies", "callback", "channel", "claim", "code", "command",
        "count", "decided", "delivery_id", "duration_ms", "error_type", "events", "handler", "held", "identity",
        "in_doubt", "inner_code", "kept", "key", "kind", "logger", "loop", "merchant", "method", "milliseconds",
        "missed", "next_at", "no_answer", "notification_id", "notifications", "operations_address", "order_id",
        "others", "outcome", "path", "paused_by", "places", "queue_id", "reason", "removed", "result", "revision",
        "route", "routes", "running", "scheme", "source", "state", "status", "status_code", "verdicts", "version",
        "where",
    }
)  # fmt: skip

# These events are written within a few milliseconds, many in one system call. The call costs as much as the line, and
# it releases the interpreter, which a plugin's thread that computes may keep for long. Every other line, and every
# error, is written at once, with the lines that wait. The end of the process writes the rest: only a killed process
# loses lines.
FREQUENT = frozenset({"callback_answered", "verdict"})
WRITE_WITHIN_SECONDS = 0.005

INFO, WARNING = logging.INFO, logging.WARNING
LONGEST_TEXT = 200
MOST_FRAMES = 20
MOST_CAUSES = 5
PLAIN = frozenset({bool, int, float, type(None)})


def configure(*, stream: TextIO | None = None, level: int = INFO) -> None:
    """Configure structlog and the standard library's logging for this process.

    Args:
        stream: Takes the lines, in place of standard error.
    """
    out = stream or sys.stderr
    is_stderr = out is sys.__stderr__  # and stays so until the process ends
    render: structlog.typing.Processor
    if out.isatty():
        render = _for_terminals(structlog.dev.ConsoleRenderer(exception_formatter=lambda _stream, _info: None))
    else:
        render = _as_json
    structlog.configure(
        processors=[_keep_allowed, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_LineWriter(out, buffers=is_stderr),
        cache_logger_on_first_use=is_stderr,  # to make a logger for each line costs a quarter of the line
    )
    root = logging.getLogger()
    root.handlers = [_LibraryHandler()]
    root.setLevel(logging.WARNING)


def described(error: BaseException) -> list[dict[str, Any]]:
    """Return the types and places of an exception and its causes, the outermost first."""
    chain: list[dict[str, Any]] = []
    following: BaseException | None = error
    while following is not None and len(chain) < MOST_CAUSES:
        frames = traceback.extract_tb(following.__traceback__)[-MOST_FRAMES:]
        chain.append(
            {
                "type": f"{type(following).__module__}.{type(following).__qualname__}",
                "frames": [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames],
            }
        )
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return chain


class _LibraryHandler(logging.Handler):
    """Logs that a library logged something, without its text, which may quote an order."""

    def emit(self, record: logging.LogRecord) -> None:
        event = structlog.get_logger(__name__)
        write = event.error if record.levelno >= logging.ERROR else event.warning
        write("library_logged", logger=record.name, where=f"{record.module}:{record.lineno}", exc_info=record.exc_info)


class _LineWriter:
    """A logger that writes lines from any thread, and its own factory."""

    def __init__(self, out: TextIO, *, buffers: bool) -> None:
        self._out = out
        self._buffers = buffers
        self._lines: list[str] = []
        self._is_due = False
        self._writing = threading.Lock()
        if buffers:
            atexit.register(self._write_lines)

    def __call__(self, *_names: Any) -> "_LineWriter":
        return self

    def msg(self, line: str, *, frequent: bool = False) -> None:
        self._lines.append(line + "\n")
        loop = asyncio._get_running_loop() if frequent and self._buffers else None
        if loop is None:
            self._write_lines()
        elif not self._is_due:
            self._is_due = True
            loop.call_later(WRITE_WITHIN_SECONDS, self._write_lines)

    debug = info = warning = error = exception = critical = msg

    def _write_lines(self) -> None:
        self._is_due = False  # before the lines are taken, so that a later line starts a new timer
        with self._writing:
            lines = self._lines[:]
            del self._lines[: len(lines)]  # a line that another thread adds meanwhile stays for its own call
            self._out.write("".join(lines))
            self._out.flush()


def _keep_allowed(_logger: Any, level: str, fields: MutableMapping[str, Any]) -> Mapping[str, Any]:
    info = fields.pop("exc_info", None)
    fields.pop("exception", None)  # only this function sets it, because it is not checked any further
    shown = {  # inline, because a function call for each of a dozen fields would cost as much as the line
        name: value
        if name in ALLOWED
        and ((kind := type(value)) in PLAIN or (kind is str and len(value) <= LONGEST_TEXT and value.isascii()))
        else _shown(name, value)
        for name, value in fields.items()
    }
    shown["level"] = level
    now = time.time()
    shown["timestamp"] = f"{_to_the_second(int(now))}.{int(now % 1 * 1000):03d}Z"
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        shown["exception"] = described(error)
    return shown


def _shown(name: str, value: Any) -> Any:
    if name not in ALLOWED:
        return "[redacted]"
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = str(value).encode(errors="replace").decode()  # an exact `str`, with valid Unicode
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    return "[redacted]"  # a repr may contain an order


@functools.lru_cache(maxsize=1)
def _to_the_second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _for_terminals(render: structlog.dev.ConsoleRenderer) -> structlog.typing.Processor:
    def rendered(logger: Any, name: str, fields: MutableMapping[str, Any]) -> str:
        if "exception" in fields:  # the renderer takes text
            chain = (["caused by " * bool(number) + each["type"], *each["frames"]]
                     for number, each in enumerate(fields["exception"]))  # fmt: skip
            fields["exception"] = "\n".join("\n    ".join(each) for each in chain)
        return render(logger, name, fields)

    return rendered


def _as_json(_logger: Any, name: str, fields: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    frequent = fields["event"] in FREQUENT and name != "error"
    return (msgspec.json.encode(fields).decode(),), {"frequent": frequent}
