"""
structlog, set up once: one JSON line per event off a terminal, readable colour on one.

Privacy by construction: only fields on the allow list leave the process, everything else is shown as `[redacted]`, and
of an exception the types and the places are written, never its message and never a local: both may hold an order.
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
        "count", "delivery_id", "duration_ms", "error_type", "events", "handler", "held", "identity", "in_doubt",
        "inner_code", "kept", "key", "kind", "logger", "loop", "merchant", "method", "milliseconds", "missed",
        "next_at", "notification_id", "notifications", "operations_address", "order_id", "others", "outcome",
        "path", "paused_by", "places", "plugin", "queue_id", "reason", "removed", "result", "revision", "route",
        "routes", "running", "scheme", "signal", "source", "state", "status", "status_code", "verdicts", "version",
        "where",
    }
)  # fmt: skip

# Written a few milliseconds later and many in one system call, which costs as much as the line, and lets go of the
# interpreter, which a plugin that spins gives back when it likes. Every other line, and every error, is written at once
# and takes along what waits, as does the end of the process: only a process that is killed loses any.
FREQUENT = frozenset({"callback_answered", "verdict"})
WRITTEN_WITHIN_SECONDS = 0.005

INFO, WARNING = logging.INFO, logging.WARNING
LONGEST_TEXT = 200
PLAIN = frozenset({bool, int, float, type(None)})
MOST_FRAMES = 20


def configure(*, stream: TextIO | None = None, level: int = INFO) -> None:
    """Sets structlog and the standard library's logging up for this process: lines on `stream`, or standard error."""
    out = stream or sys.stderr
    is_ours = out is sys.__stderr__  # of the whole process, and for as long as it runs
    render: structlog.typing.Processor
    if out.isatty():
        render = _for_a_person(structlog.dev.ConsoleRenderer(exception_formatter=lambda _stream, _info: None))
    else:
        render = _json
    structlog.configure(
        processors=[_facts, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Lines(out, gathers=is_ours),
        cache_logger_on_first_use=is_ours,  # a logger made anew at each line costs a quarter of the line
    )
    root = logging.getLogger()
    root.handlers = [_Libraries()]
    root.setLevel(logging.WARNING)


class _Libraries(logging.Handler):
    """What libraries log: who and how bad, never the text, which may quote what it is about."""

    def emit(self, record: logging.LogRecord) -> None:
        event = structlog.get_logger(__name__)
        write = event.error if record.levelno >= logging.ERROR else event.warning
        write("library_logged", logger=record.name, where=f"{record.module}:{record.lineno}", exc_info=record.exc_info)


class _Lines:
    """Where lines go, from whatever thread. Its own factory, too, for structlog asks for a logger at every line."""

    def __init__(self, out: TextIO, *, gathers: bool) -> None:
        self._out = out
        self._gathers = gathers
        self._lines: list[str] = []
        self._due = False
        self._writing = threading.Lock()
        if gathers:
            atexit.register(self._write)

    def __call__(self, *_names: Any) -> "_Lines":
        return self

    def msg(self, line: str, *, frequent: bool = False) -> None:
        self._lines.append(line + "\n")
        loop = asyncio._get_running_loop() if frequent and self._gathers else None
        if loop is None:
            self._write()
        elif not self._due:
            self._due = True
            loop.call_later(WRITTEN_WITHIN_SECONDS, self._write)

    debug = info = warning = error = exception = critical = msg

    def _write(self) -> None:
        self._due = False  # before the lines are taken: whoever comes later starts the time anew
        with self._writing:
            lines = self._lines[:]
            del self._lines[: len(lines)]  # what another thread adds meanwhile stays for its own turn
            self._out.write("".join(lines))
            self._out.flush()


def _facts(_logger: Any, level: str, fields: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """All that a line says, level and time and exception included, and nothing that it may not."""
    info = fields.pop("exc_info", None)
    fields.pop("exception", None)  # ours alone: it is not checked any further
    shown = {  # a call for each of a dozen would cost as much as the line
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


@functools.lru_cache(maxsize=1)
def _to_the_second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def described(error: BaseException) -> list[dict[str, Any]]:
    """An exception and its causes as types and places, outermost first."""
    chain: list[dict[str, Any]] = []
    following: BaseException | None = error
    while following is not None and len(chain) < 5:
        frames = traceback.extract_tb(following.__traceback__)[-MOST_FRAMES:]
        chain.append(
            {
                "type": f"{type(following).__module__}.{type(following).__qualname__}",
                "frames": [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames],
            }
        )
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return chain


def _shown(name: str, value: Any) -> Any:
    if name not in ALLOWED:
        return "[redacted]"
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = str(value).encode(errors="replace").decode()  # an exact `str`, and one that can be written
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    return "[redacted]"  # a repr may be an order


def _for_a_person(render: structlog.dev.ConsoleRenderer) -> structlog.typing.Processor:
    def rendered(logger: Any, name: str, fields: MutableMapping[str, Any]) -> str:
        if "exception" in fields:  # a renderer for terminals takes a text
            chain = (["caused by " * bool(number) + each["type"], *each["frames"]]
                     for number, each in enumerate(fields["exception"]))  # fmt: skip
            fields["exception"] = "\n".join("\n    ".join(each) for each in chain)
        return render(logger, name, fields)

    return rendered


def _json(_logger: Any, name: str, fields: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    frequent = fields["event"] in FREQUENT and name != "error"
    return (msgspec.json.encode(fields).decode(),), {"frequent": frequent}
