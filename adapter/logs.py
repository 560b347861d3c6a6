"""The log, by structlog: one JSON line per event, or readable colours on a terminal.

Only allowed fields leave the process; every other field is shown as `[redacted]`. Of an exception its types and places
are written, never its message and never a local variable, because both may contain an order. Handlers get a
`HandlerLog`, which lets fewer texts through, and the fields that a handler declares.
"""

import atexit
import contextlib
import functools
import io
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any, Literal, TextIO

import msgspec
import structlog

ALLOWED = frozenset(
    {
        "event", "level", "timestamp", "exception",
        "adapter_id", "added", "address", "attempt", "bodies", "callback", "channel", "claim", "code", "codes",
        "command", "count", "decided", "delivery_id", "duration_ms", "error_type", "events", "handler", "held", "host",
        "identity", "in_doubt", "inner_code", "kept", "key", "kind", "limit", "logger", "loop", "merchant", "method",
        "milliseconds", "missed", "next_at", "no_answer", "notification_id", "notifications", "operations_address",
        "order_id", "order_ids", "others", "outcome", "path", "paths", "paused_by", "places", "queue_id", "reason",
        "removed", "result", "revision", "route", "routes", "running", "scheme", "since", "source", "state", "status",
        "status_code", "verdicts", "version", "where",
    }
)  # fmt: skip

WRITE_WITHIN_SECONDS = 0.005  # lines that come within this time share one system call
CLOSE_WITHIN_SECONDS = 1.0  # at the end of the process, if the reader of the log has stopped
MAX_LINES = 10_000  # that wait to be written; further ones are dropped
MAX_LINES_AT_ONCE = 1_000
MAX_PRINTED_BYTES = 10_000  # of one line

REDACTED = "[redacted]"
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")  # of an event, and of a code
LONGEST_NAME = 64
LONGEST_TEXT = 200
MOST_FRAMES = 20
MOST_CAUSES = 5
PLAIN = frozenset({bool, int, float, type(None)})

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "text"]


def configure(*, stream: TextIO | None = None, level: Level = "info", format: Format = "auto") -> None:
    """Configure structlog and the standard library's logging for this process.

    Lines for standard error are written by a thread, so that no caller waits for a slow or stopped reader.

    Args:
        stream: Takes the lines at once, in place of standard error.
        level: The lowest level that is written.
        format: `text` is for people. `auto` is `text` on a terminal and `json` elsewhere.
    """
    out = stream or sys.stderr
    is_stderr = out is sys.__stderr__  # and stays so until the process ends
    is_terminal = out is not None and out.isatty()
    render: structlog.typing.Processor = _as_json
    if format == "text" or (format == "auto" and is_terminal):
        console = structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=lambda _stream, _info: None)
        render = _as_text(console)
    close()
    writer = LineWriter(out) if is_stderr else structlog.PrintLoggerFactory(out)
    structlog.configure(
        processors=[_keep_allowed, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=writer,
        cache_logger_on_first_use=is_stderr,  # to make a logger for each line costs a quarter of the line
    )
    root = logging.getLogger()
    root.handlers = [_LibraryHandler()]
    root.setLevel(logging.WARNING)
    if is_stderr:
        warnings.showwarning = _log_warning  # type: ignore[assignment]
        threading.excepthook = _log_thread_failure
        atexit.register(close)


def close() -> None:
    """Write the waiting lines within `CLOSE_WITHIN_SECONDS`, or lose them."""
    if (writer := _writer()) is not None:
        writer.close()


def count_dropped(count: Callable[[int], None]) -> None:
    """Call `count` with the number of dropped lines, now and whenever more are dropped."""
    if (writer := _writer()) is not None:
        writer.count_dropped(count)


@contextlib.contextmanager
def printed_lines() -> Iterator[None]:
    """Write printed text as lines of the log while the context lasts.

    So `print` in a handler cannot block the service. The text is not changed.
    """
    if (writer := _writer()) is None:
        yield
        return
    stream = io.TextIOWrapper(_Printed(writer), "utf-8", "replace", write_through=True)  # type: ignore[type-var]
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


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


class HandlerLog:
    """The log of one call of a handler (`adapter.plugin.Log`).

    The bound fields are on each line, and the handler cannot replace them. A text is replaced unless it looks like the
    name of an event, or its field is declared (`log_fields`). A replaced event is `plugin_logged`, with its place.
    """

    def __init__(self, declared: Collection[str] = (), **bound: Any) -> None:
        self._logger = structlog.get_logger("plugin")
        self._declared = declared
        self._bound = bound

    def debug(self, event: str, /, **fields: Any) -> None:
        self._write(self._logger.debug, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        self._write(self._logger.info, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._write(self._logger.warning, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._write(self._logger.error, event, fields)

    def _write(self, write: Callable[..., Any], event: str, fields: dict[str, Any]) -> None:
        shown = {
            name: value
            if name in self._declared or name == "exc_info" or type(value) in PLAIN or _is_name(value)
            else REDACTED
            for name, value in fields.items()
            if name != "event"
        }
        if not _is_name(event):
            caller = sys._getframe(2)
            event, shown["where"] = "plugin_logged", f"{caller.f_globals.get('__name__')}:{caller.f_lineno}"
        declared = {"log_fields": self._declared} if self._declared else {}
        write(event, **{**shown, **self._bound, **declared})


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= LONGEST_NAME and NAME.fullmatch(text) is not None


class _LibraryHandler(logging.Handler):
    """Logs that a library logged something, without its text, which may quote an order."""

    def emit(self, record: logging.LogRecord) -> None:
        event = structlog.get_logger(__name__)
        write = event.error if record.levelno >= logging.ERROR else event.warning
        write("library_logged", logger=record.name, where=f"{record.module}:{record.lineno}", exc_info=record.exc_info)


class LineWriter:
    """A logger that writes lines from a thread of its own, and its own factory.

    A caller never waits. Lines are dropped and counted while the buffer is full, and while the file takes none, as a
    closed pipe or a full disk. The line `log_lines_dropped` follows when all that waited is written.
    """

    def __init__(self, out: TextIO | None, *, max_lines: int = MAX_LINES) -> None:
        """Create a writer for a file, or for none. `max_lines` wait at most."""
        self.descriptor = -1 if out is None else out.fileno()
        self._max_lines = max_lines
        self._encoding = "utf-8" if out is None else out.encoding
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()  # None ends the thread
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # a finalizer may log while a line is dropped
        self.dropped = self._unreported = 0
        self._count: Callable[[int], None] = lambda _number: None
        self._is_in_line = False  # the last line was written in part

    def __call__(self, *_names: Any) -> "LineWriter":
        return self

    def msg(self, line: str) -> None:
        self.add(line.encode(self._encoding, "replace") + b"\n")

    debug = info = warning = error = exception = critical = msg

    def add(self, line: bytes) -> None:
        """Write a line soon, or drop it if too many wait."""
        if self._waiting.qsize() >= self._max_lines and threading.current_thread() is not self._thread:
            self._drop(1)
            return
        self._waiting.put(line)
        if self._thread is None:
            self._start()

    def count_dropped(self, count: Callable[[int], None]) -> None:
        with self._lock:
            self._count = count
            count(self.dropped)

    def close(self) -> None:
        """Write the waiting lines, and end the thread. A further line starts it again."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(CLOSE_WITHIN_SECONDS)
            if not self._thread.is_alive():
                self._thread = None

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="log", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter ends
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        is_open = True
        while is_open or not self._waiting.empty():
            lines = [self._waiting.get()]
            if lines != [None]:
                time.sleep(WRITE_WITHIN_SECONDS)
            with contextlib.suppress(Empty):
                while len(lines) < MAX_LINES_AT_ONCE:
                    lines.append(self._waiting.get_nowait())
            is_open = is_open and None not in lines
            if self._write(b"".join(filter(None, lines))) and self._unreported and self._waiting.empty():
                self._report()

    def _write(self, data: bytes) -> bool:
        """Write whole lines. Return False if some were dropped."""
        data = b"\n" * self._is_in_line + data
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[os.write(self.descriptor, rest) :]
                except BlockingIOError:  # another process has made the file non-blocking
                    poll = select.poll()
                    poll.register(self.descriptor, select.POLLOUT)
                    poll.poll()
        except OSError:
            lost = bytes(rest).count(b"\n")
            if written := data[: len(data) - len(rest)]:
                self._is_in_line = not written.endswith(b"\n")
            elif self._is_in_line:
                lost -= 1  # the first line break ends an earlier line
            self._drop(lost)
            return False
        self._is_in_line = False
        return True

    def _drop(self, number: int) -> None:
        with self._lock:
            self.dropped += number
            self._unreported += number
            self._count(number)

    def _report(self) -> None:
        with self._lock:
            number, self._unreported = self._unreported, 0
        structlog.get_logger(__name__).warning("log_lines_dropped", count=number)


class _Printed(io.RawIOBase):
    """A file whose lines become lines of the log."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer
        self._begun = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.descriptor

    def write(self, data: Any) -> int:
        *lines, begun = (self._begun + bytes(data)).split(b"\n")
        self._begun = begun[:MAX_PRINTED_BYTES]
        for line in lines:
            self._writer.add(line[:MAX_PRINTED_BYTES] + b"\n")
        return len(data)


def _writer() -> LineWriter | None:
    writer = structlog.get_config()["logger_factory"]
    return writer if isinstance(writer, LineWriter) else None


def _log_warning(_message: Any, category: type[Warning], filename: str, lineno: int, *_more: Any) -> None:
    place = f"{filename}:{lineno}"
    structlog.get_logger(__name__).warning("python_warning", error_type=category.__name__, where=place)


def _log_thread_failure(arguments: threading.ExceptHookArgs) -> None:
    structlog.get_logger(__name__).error("thread_failed", exc_info=arguments.exc_value)


def _keep_allowed(_logger: Any, level: str, fields: MutableMapping[str, Any]) -> Mapping[str, Any]:
    info = fields.pop("exc_info", None)
    fields.pop("exception", None)  # only this function sets it, because it is not checked any further
    declared = fields.pop("log_fields", ())  # by a handler
    shown = {  # inline, because a function call for each of a dozen fields would cost as much as the line
        name: value
        if name in ALLOWED
        and ((kind := type(value)) in PLAIN or (kind is str and len(value) <= LONGEST_TEXT and value.isascii()))
        else _shown(name, value, declared)
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


def _shown(name: str, value: Any, declared: Collection[str]) -> Any:
    if name not in ALLOWED and name not in declared:
        return REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = str(value).encode(errors="replace").decode()  # an exact `str`, with valid Unicode
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    return REDACTED  # a repr may contain an order


@functools.lru_cache(maxsize=1)
def _to_the_second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _as_text(render: structlog.dev.ConsoleRenderer) -> structlog.typing.Processor:
    def rendered(logger: Any, name: str, fields: MutableMapping[str, Any]) -> str:
        if "exception" in fields:  # the renderer takes text
            chain = (["caused by " * bool(number) + each["type"], *each["frames"]]
                     for number, each in enumerate(fields["exception"]))  # fmt: skip
            fields["exception"] = "\n".join("\n    ".join(each) for each in chain)
        return render(logger, name, fields)

    return rendered


def _as_json(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> str:
    return msgspec.json.encode(fields).decode()
