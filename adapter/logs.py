"""
structlog, set up once: one JSON line per event off a terminal, readable colour on one.

Privacy by construction: only fields on the allow list leave the process, everything else is shown as `[redacted]`, and
of an exception the types and the places are written, never its message and never a local: both may hold an order.
"""

import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec
import structlog

ALLOWED = frozenset(
    {
        "event", "level", "timestamp", "exception",
        "adapter_id", "address", "attempt", "callback", "channel", "claim", "code", "count", "delivery_id",
        "duration_ms", "error_type", "handler", "identity", "in_doubt", "inner_code", "key", "kind", "logger",
        "merchant", "method", "next_at", "notification_id", "operations_address", "order_id", "outcome", "path",
        "plugin", "queue_id", "reason", "result", "route", "routes", "running", "scheme", "signal", "source", "state",
        "status", "status_code", "version", "where",
    }
)  # fmt: skip

INFO, WARNING = logging.INFO, logging.WARNING
LONGEST_TEXT = 200
MOST_FRAMES = 20


def configure(*, stream: TextIO | None = None, level: int = INFO) -> None:
    """Sets structlog and the standard library's logging up for this process: lines on `stream`, or standard error."""
    out = stream or sys.stderr
    render: structlog.typing.Processor
    if out.isatty():
        render = _for_a_person(structlog.dev.ConsoleRenderer(exception_formatter=lambda _stream, _info: None))
    else:
        render = _json
    structlog.configure(
        processors=[structlog.processors.add_log_level, _timestamp, _exception, _allow, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
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


def _timestamp(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    fields["timestamp"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return fields


def _exception(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    fields.pop("exception", None)  # ours alone: it is not checked any further
    info = fields.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        fields["exception"] = described(error)
    return fields


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


def _allow(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return {name: _shown(name, value) for name, value in fields.items()}


def _shown(name: str, value: Any) -> Any:
    if name == "exception":
        return value
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


def _json(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> str:
    return msgspec.json.encode(fields).decode()
