"""Fixtures of the dispatcher's tests: log lines, and times that are short."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import structlog

from adapter import logs
from adapter.deliveries import dispatcher as dispatcher_module
from tests.deliveries.harness import BEAT_MS


@pytest.fixture(autouse=True)
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The log lines as they leave the process."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure(stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "STORE_RETRY", timedelta(milliseconds=1))


@pytest.fixture
def fast_heartbeat(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT", timedelta(milliseconds=BEAT_MS))
