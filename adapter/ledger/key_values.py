"""Small values that all nodes share: watermarks, turns, documents from Norce, and tokens."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import Connection, bindparam, delete, select, text

from adapter.identifiers import Channel
from adapter.ledger.schema import documents, watermarks
from adapter.ledger.store import Store, StoreUnavailable
from adapter.moments import in_milliseconds
from adapter.oauth2 import TokenEntry
from adapter.plugin import Retry

T = TypeVar("T")

SET_WATERMARK = text(
    "INSERT INTO watermarks (name, value) VALUES (:name, :value)"
    " ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE watermarks.value <= :unless_after RETURNING name"
)
WATERMARK = select(watermarks.c.value).where(watermarks.c.name == bindparam("name"))
SET_DOCUMENT = text(
    "INSERT INTO documents (merchant, channel, content) VALUES (:of_merchant, :of_channel, :content)"
    " ON CONFLICT (merchant, channel) DO UPDATE SET content = excluded.content"
)
DELETE_DOCUMENT = delete(documents).where(
    documents.c.merchant == bindparam("of_merchant"), documents.c.channel == bindparam("of_channel")
)
LOCK_TOKEN = text(
    "INSERT INTO tokens (merchant, name, version, locked_until) VALUES (:of_merchant, :named, 0, :until)"
    " ON CONFLICT (merchant, name) DO UPDATE SET locked_until = excluded.locked_until"
    " WHERE tokens.locked_until <= :now RETURNING content, version, locked_until"
)
SET_TOKEN = text(
    "UPDATE tokens SET content = :content, version = version + 1, locked_until = 0"
    " WHERE merchant = :of_merchant AND name = :named AND version = :version"
)
UNLOCK_TOKEN = text(
    "UPDATE tokens SET locked_until = 0 WHERE merchant = :of_merchant AND name = :named AND locked_until = :until"
)
LARGEST = 2**63 - 1


class Watermarks:
    """Watermarks by their names, in milliseconds. All methods raise `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock

    async def value(self, name: str) -> int | None:
        """Return a watermark, or None if it was never set."""
        return await self._store.run(
            lambda connection: connection.execute(WATERMARK, {"name": name}).scalar_one_or_none()
        )

    async def put(self, name: str, value: int) -> None:
        """Set a watermark."""
        await self._set(name, value, unless_after=LARGEST)

    async def has_turn(self, name: str, every: int) -> bool:
        """Take the turn of a periodic task if it is due. Returns whether this node has it.

        The next turn is due `every` milliseconds after this one began, or after the last `put`, even if this one fails.
        """
        now = self._clock()
        return await self._set(name, now, unless_after=now - every)

    async def _set(self, name: str, value: int, *, unless_after: int) -> bool:
        parameters = {"name": name, "value": value, "unless_after": unless_after}
        return await self._store.run(
            lambda connection: connection.execute(SET_WATERMARK, parameters).first() is not None
        )


class StoredDocuments:
    """The last valid configuration document of each channel.

    All methods raise `StoreUnavailable`.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> dict[Channel, bytes]:
        """Return every stored document."""
        statement = select(documents.c.merchant, documents.c.channel, documents.c.content)
        rows = await self._store.run(lambda connection: connection.execute(statement).all())
        return {Channel(merchant, name): bytes(content) for merchant, name, content in rows}

    async def keep(self, channel: Channel, content: bytes | None) -> None:
        """Replace the document of a channel, or delete it if `content` is None."""
        parameters = {"of_merchant": channel.merchant, "of_channel": channel.name, "content": content}
        statement = DELETE_DOCUMENT if content is None else SET_DOCUMENT
        await self._store.run(lambda connection: connection.execute(statement, parameters))


class StoredTokens:
    """The tokens of OAuth2, an `adapter.oauth2.TokenStore`. They are secrets, stored in clear."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def lock(self, merchant: str, name: str, locked_for: timedelta) -> TokenEntry | None:
        def work(connection: Connection) -> TokenEntry | None:
            now = self._store.clock.read(connection)
            given = {"of_merchant": merchant, "named": name, "now": now, "until": now + in_milliseconds(locked_for)}
            row = connection.execute(LOCK_TOKEN, given).first()
            return (
                None if row is None else TokenEntry(row.content and bytes(row.content), row.version, row.locked_until)
            )

        return await self._in_store(work)

    async def unlock(self, merchant: str, name: str, entry: TokenEntry, content: bytes | None = None) -> None:
        given = {"of_merchant": merchant, "named": name, "version": entry.version, "until": entry.locked_until}
        statement = UNLOCK_TOKEN if content is None else SET_TOKEN
        await self._in_store(lambda connection: connection.execute(statement, given | {"content": content}))

    async def _in_store(self, work: Callable[[Connection], T]) -> T:
        try:
            return await self._store.run(work)
        except StoreUnavailable as error:
            raise Retry("store-unavailable", "the ledger of the tokens does not answer") from error
