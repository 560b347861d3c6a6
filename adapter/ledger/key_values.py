"""
How far something has come, remembered across restarts and nodes: a watermark, or whose turn it is.

What has a turn is done by one node at a time, every so often: the first that asks when it is due has it, and the next
turn is a while after that, whatever becomes of this one.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, delete, select, text

from adapter.identifiers import Channel
from adapter.ledger.schema import documents, watermarks
from adapter.ledger.store import Store

SET = text(
    "INSERT INTO watermarks (name, value) VALUES (:name, :value)"
    " ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE watermarks.value <= :until RETURNING name"
)
READ = select(watermarks.c.value).where(watermarks.c.name == bindparam("name"))
LARGEST = 2**63 - 1


class Watermarks:
    """Watermarks by their names; values are milliseconds. Raises `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock

    async def value(self, name: str) -> int | None:
        return await self._store.write(self._read, name)

    async def put(self, name: str, value: int) -> None:
        await self._store.write(self._set, (name, value, LARGEST))

    async def has_turn(self, name: str, every: int) -> bool:
        """Whether it is due and nobody else has it: the last one began, or went on, `every` milliseconds ago."""
        now = self._clock()
        return await self._store.write(self._set, (name, now, now - every))

    # --- in the writer's thread, inside its transaction ---

    def _read(self, connection: Connection, names: Sequence[str]) -> list[int | None]:
        return [connection.execute(READ, {"name": name}).scalar_one_or_none() for name in names]

    def _set(self, connection: Connection, items: Sequence[tuple[str, int, int]]) -> list[bool]:
        return [
            connection.execute(SET, {"name": name, "value": value, "until": until}).scalar_one_or_none() is not None
            for name, value, until in items
        ]


DOCUMENTS = select(documents.c.merchant, documents.c.channel, documents.c.content)
SET_DOCUMENT = text(
    "INSERT INTO documents (merchant, channel, content) VALUES (:merchant, :channel, :content)"
    " ON CONFLICT (merchant, channel) DO UPDATE SET content = excluded.content"
)
FORGET_DOCUMENT = delete(documents).where(
    documents.c.merchant == bindparam("of_merchant"), documents.c.channel == bindparam("of_channel")
)


class StoredDocuments:
    """One document of each merchant and channel, as bytes. Raises `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> dict[Channel, bytes]:
        return await self._store.write(self._all, None)

    async def keep(self, channel: Channel, content: bytes | None) -> None:
        """In place of the one before; None: there is none any more."""
        await self._store.write(self._keep, (channel, content))

    # --- in the writer's thread, inside its transaction ---

    def _all(self, connection: Connection, asked: Sequence[None]) -> list[dict[Channel, bytes]]:
        found = {Channel(merchant, name): bytes(content) for merchant, name, content in connection.execute(DOCUMENTS)}
        return [found for _ in asked]

    def _keep(self, connection: Connection, items: Sequence[tuple[Channel, bytes | None]]) -> list[None]:
        for channel, content in items:
            if content is None:
                connection.execute(FORGET_DOCUMENT, {"of_merchant": channel.merchant, "of_channel": channel.name})
            else:
                connection.execute(
                    SET_DOCUMENT, {"merchant": channel.merchant, "channel": channel.name, "content": content}
                )
        return [None for _ in items]
