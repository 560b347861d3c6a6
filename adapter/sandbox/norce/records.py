"""
What the simulator remembers: orders, configuration documents and events, in memory and, where asked, in a file; and the
journal of what went in and out, in memory only.

The journal names places and outcomes, never bodies, and no query of a URL: a signature or a secret may stand there.
"""

import itertools
import json
import sqlite3
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

MOST_ENTRIES = 20_000


class StoreUnusable(Exception):
    """The file is there and is none of ours, or cannot be written."""


class Records:
    """Orders by id, documents by merchant, channel and name, events by id; in the order in which they came."""

    def __init__(self, path: Path | None = None) -> None:
        self.orders: dict[str, dict[str, Any]] = {}
        self.documents: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self._file = None if path is None else self._open(path)

    def _open(self, path: Path) -> sqlite3.Connection:
        file = None
        try:
            path.touch(mode=0o600)  # orders may be of real people
            file = sqlite3.connect(path, isolation_level=None)
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = OFF")  # a restart is to be survived, not a power cut
            file.execute(
                "CREATE TABLE IF NOT EXISTS records (kind TEXT, key TEXT, value BLOB, PRIMARY KEY (kind, key))"
            )
            for kind, key, value in file.execute("SELECT kind, key, value FROM records ORDER BY rowid"):
                getattr(self, kind)[key] = msgspec.json.decode(value)
        except (OSError, sqlite3.Error) as error:
            if file is not None:
                file.close()
            raise StoreUnusable(f"{path}: {error}") from error
        return file

    def keep(self, kind: str, key: str, value: dict[str, Any]) -> None:
        getattr(self, kind)[key] = value
        if self._file is not None:
            self._file.execute(
                "INSERT INTO records VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                (kind, key, msgspec.json.encode(value)),
            )

    def drop(self, kind: str, key: str) -> None:
        getattr(self, kind).pop(key, None)
        if self._file is not None:
            self._file.execute("DELETE FROM records WHERE kind = ? AND key = ?", (kind, key))

    def documents_of(self, merchant: str, channel: str) -> dict[str, dict[str, Any]]:
        """By name."""
        keys = {key: json.loads(key) for key in self.documents}
        return {named[2]: self.documents[key] for key, named in keys.items() if named[:2] == [merchant, channel]}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def document_key(merchant: str, channel: str, name: str) -> str:
    return json.dumps([merchant, channel, name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request that came, or one that went out."""

    number: int
    at: str
    kind: str  # request, validation, hook, notification, action, schema
    method: str
    url: str
    status: int | None  # None where no answer came
    took_ms: int
    order_id: str | None
    merchant: str | None
    channel: str | None
    note: str


class Journal:
    """The last entries. `told` hears of each as it is written."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque(maxlen=MOST_ENTRIES)
        self.told: Callable[[Entry], None] = lambda _entry: None
        self._numbers = itertools.count(1)

    def write(self, *, url: str, **facts: Any) -> None:
        parts = urlsplit(url)
        shown = parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()
        entry = Entry(number=next(self._numbers), url=shown, **facts)
        self.entries.append(entry)
        self.told(entry)

    def read(
        self, *, order_id: str | None = None, kind: str | None = None, after: int = 0, limit: int = 100
    ) -> list[Entry]:
        """The last that fit, the oldest first."""
        fitting = (
            each
            for each in reversed(self.entries)
            if each.number > after and kind in (None, each.kind) and order_id in (None, each.order_id)
        )
        return list(itertools.islice(fitting, limit))[::-1]
