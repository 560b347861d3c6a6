"""
The configuration documents that were taken last: what holds after a restart, and on a new node, until Norce answers.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, delete, select, text

from adapter.ledger.schema import documents
from adapter.ledger.store import Store

OF_ALL = select(documents.c.merchant, documents.c.channel, documents.c.content)
SET = text(
    "INSERT INTO documents (merchant, channel, content) VALUES (:merchant, :channel, :content)"
    " ON CONFLICT (merchant, channel) DO UPDATE SET content = excluded.content"
)
FORGET = delete(documents).where(
    documents.c.merchant == bindparam("of_merchant"), documents.c.channel == bindparam("of_channel")
)


class TakenDocuments:
    """One document of each merchant and channel, as bytes. Raises `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> dict[tuple[str, str], bytes]:
        return await self._store.write(self._all, None)

    async def keep(self, merchant: str, channel: str, content: bytes | None) -> None:
        """In place of the one before; None: there is none any more."""
        await self._store.write(self._keep, (merchant, channel, content))

    # --- in the writer's thread, inside its transaction ---

    def _all(self, connection: Connection, asked: Sequence[None]) -> list[dict[tuple[str, str], bytes]]:
        found = {(merchant, channel): bytes(content) for merchant, channel, content in connection.execute(OF_ALL)}
        return [found for _ in asked]

    def _keep(self, connection: Connection, items: Sequence[tuple[str, str, bytes | None]]) -> list[None]:
        for merchant, channel, content in items:
            if content is None:
                connection.execute(FORGET, {"of_merchant": merchant, "of_channel": channel})
            else:
                connection.execute(SET, {"merchant": merchant, "channel": channel, "content": content})
        return [None for _ in items]
