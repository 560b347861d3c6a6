"""Small values that outlive a restart and are shared by all nodes: watermarks, turns and documents from Norce."""

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, delete, select, text

from adapter.identifiers import Channel
from adapter.ledger.schema import documents, watermarks
from adapter.ledger.store import Store

SET_WATERMARK = text(
    "INSERT INTO watermarks (name, value) VALUES (:name, :value)"
    " ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE watermarks.value <= :unless_after RETURNING name"
)
WATERMARK = select(watermarks.c.value).where(watermarks.c.name == bindparam("name"))
SET_DOCUMENT = text(
    "INSERT INTO documents (merchant, channel, content) VALUES (:merchant, :channel, :content)"
    " ON CONFLICT (merchant, channel) DO UPDATE SET content = excluded.content"
)
DELETE_DOCUMENT = delete(documents).where(
    documents.c.merchant == bindparam("of_merchant"), documents.c.channel == bindparam("of_channel")
)
LARGEST = 2**63 - 1


class Watermarks:
    """Watermarks by their names, in milliseconds. All methods raise `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock

    async def value(self, name: str) -> int | None:
        """Return a watermark, or None if it was never set."""
        return await self._store.write(self._read, name)

    async def put(self, name: str, value: int) -> None:
        """Set a watermark."""
        await self._store.write(self._set, (name, value, LARGEST))

    async def has_turn(self, name: str, every: int) -> bool:
        """Take the turn of a periodic task if it is due. Returns whether this node has it.

        The next turn is due `every` milliseconds after this one began, or after the last `put`, even if this one fails.
        """
        now = self._clock()
        return await self._store.write(self._set, (name, now, now - every))

    # --- in the writer's thread, inside its transaction ---

    def _read(self, connection: Connection, names: Sequence[str]) -> list[int | None]:
        return [connection.execute(WATERMARK, {"name": name}).scalar_one_or_none() for name in names]

    def _set(self, connection: Connection, items: Sequence[tuple[str, int, int]]) -> list[bool]:
        changed = []
        for name, value, unless_after in items:
            parameters = {"name": name, "value": value, "unless_after": unless_after}
            changed.append(connection.execute(SET_WATERMARK, parameters).scalar_one_or_none() is not None)
        return changed


class StoredDocuments:
    """The last valid configuration document of each channel, as bytes. All methods raise `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> dict[Channel, bytes]:
        """Return every stored document."""
        return await self._store.write(self._all, None)

    async def keep(self, channel: Channel, content: bytes | None) -> None:
        """Replace the document of a channel, or delete it if `content` is None."""
        await self._store.write(self._keep, (channel, content))

    # --- in the writer's thread, inside its transaction ---

    def _all(self, connection: Connection, items: Sequence[None]) -> list[dict[Channel, bytes]]:
        rows = connection.execute(select(documents.c.merchant, documents.c.channel, documents.c.content))
        found = {Channel(merchant, channel): bytes(content) for merchant, channel, content in rows}
        return [found for _ in items]

    def _keep(self, connection: Connection, items: Sequence[tuple[Channel, bytes | None]]) -> list[None]:
        for (merchant, name), content in items:
            if content is None:
                connection.execute(DELETE_DOCUMENT, {"of_merchant": merchant, "of_channel": name})
            else:
                connection.execute(SET_DOCUMENT, {"merchant": merchant, "channel": name, "content": content})
        return [None for _ in items]
