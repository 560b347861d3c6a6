"""The records of the simulator: orders, configuration documents, events and a journal.

The journal holds addresses and statuses. It never holds a body or a query: these may contain a signature or a secret.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_ENTRIES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request that came in or went out."""

    at: str
    kind: str  # request, validation, hook, notification, schema
    method: str
    url: str
    status: int | None  # None if there was no answer
    took_ms: int
    order_id: str | None
    merchant: str | None
    channel: str | None
    note: str


class Journal:
    """The last requests. Calls `on_entry` with each new one."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque(maxlen=MAX_ENTRIES)
        self.on_entry: Callable[[Entry], None] = lambda _entry: None

    def add(self, *, url: str, **facts: Any) -> None:
        parts = urlsplit(url)
        shown = parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()
        entry = Entry(url=shown, **facts)
        self.entries.append(entry)
        self.on_entry(entry)

    def read(self, *, order_id: str | None = None, kind: str | None = None, limit: int = 100) -> list[Entry]:
        """Return the last matching entries, the oldest first."""
        found = (
            each for each in reversed(self.entries) if kind in (None, each.kind) and order_id in (None, each.order_id)
        )
        return list(itertools.islice(found, limit))[::-1]


@dataclass(frozen=True, slots=True)
class Records:
    """All records of a simulator, in the order of their creation."""

    orders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By id."""
    documents: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    """Configuration documents, by merchant, channel and name."""
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By id."""
    journal: Journal = field(default_factory=Journal)

    def documents_of(self, merchant: str, channel: str) -> dict[str, dict[str, Any]]:
        """Return a channel's configuration documents by name."""
        return {name: each for (*its, name), each in self.documents.items() if its == [merchant, channel]}
