"""Settings of routes from Norce's configuration documents.

Each channel has one document of ours. Its settings are merged last, and it can switch the channel off. It is read
periodically, never while a shopper waits. A document that cannot be
read, or that breaks our schema, changes nothing: the last good one holds until there is a better one, also after a
restart and on every node. Without any, the settings of `config.yaml` hold. A document cannot set hosts or credentials,
because every holder of the merchant's token can read and write it (checkout protocol, sections 8.2 and 9).
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import msgspec
import structlog
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from adapter.config import Config, read_settings
from adapter.config.json_schema import document_schema
from adapter.config.model import merged
from adapter.identifiers import Channel
from adapter.ledger.key_values import StoredDocuments
from adapter.ledger.store import StoreUnavailable
from adapter.metrics import Metrics
from adapter.norce.client import Norce, NorceError, NotFound
from adapter.orders import NotAnOrder, decode
from adapter.plugin import Settings
from adapter.routing.routes import Routes

log = structlog.get_logger(__name__)

LONGEST_FIRST_REFRESH = timedelta(seconds=5)
READS_AT_ONCE = 4  # of one merchant
MAX_DOCUMENT_BYTES = 128 * 1024  # hundreds of rules; a hostile document of this size takes seconds to check
MAX_PLACES = 10  # reported for one document
MAX_PLACE_LENGTH = 200
STORED_MEMBERS = ("$schema", "id", "active", "routes")  # the rest of a document may hold a secret


class NorceSettings:
    """The settings that Norce's documents give to the routes.

    Args:
        schema: The JSON Schema of our documents, which we publish.
        stored: The last good document of each channel.
        changed: Called after a document has taken effect.
    """

    def __init__(
        self,
        config: Config,
        routes: Routes,
        norce: Norce,
        schema: Mapping[str, Any],
        *,
        stored: StoredDocuments,
        metrics: Metrics,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.switched_off: set[Channel] = set()  # channels whose document says `active: false`
        self.schema = schema
        self._config = config
        self._routes = routes
        self._norce = norce
        self._validator = Draft202012Validator(schema)
        self._stored = stored
        self._metrics = metrics
        self._changed = changed
        self._checking = asyncio.Lock()
        self._last_read: dict[Channel, bytes | None] = {}  # good or not; None: there was no document
        self._unreadable: set[Channel] = set()
        self._has_stored: set[Channel] = set()
        self._unchecked: dict[Channel, bytes] = {}  # restored documents whose settings have no effect yet

    async def read_first(self) -> None:
        """Apply the settings in Norce's configuration before the first callback is answered.

        Until Norce answers, its last stored settings apply. The time limit is short, because meanwhile no lease is
        renewed and no signal is handled.
        """
        if self._config.norce.refresh:
            await self.restore()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._config.norce.timeout, LONGEST_FIRST_REFRESH).total_seconds()):
                    await self.refresh()

    async def restore(self) -> None:
        """Apply the switches of the stored documents.

        Their settings take effect at the next refresh, because checking a document takes up to seconds, and no lease is
        renewed while the service starts.

        Raises:
            StoreUnavailable: Nothing was restored.
        """
        for channel, content in (await self._stored.all()).items():
            if channel in self._config.channels:
                self._has_stored.add(channel)
                self._unchecked[channel] = content
                self._switch(channel, active=decode(content).get("active", True))

    async def poll(self, every: timedelta) -> None:
        """Refresh each merchant's documents periodically until cancelled; if `every` is 0, never."""

        async def poll_one(merchant: str) -> None:
            while True:
                await self._refresh_merchant(merchant)
                await asyncio.sleep(every.total_seconds())

        if not every:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            for merchant in self._config.merchants:
                group.create_task(poll_one(merchant))

    async def refresh(self) -> None:
        """Read every channel's document once. Errors of Norce are logged and counted, not raised."""
        async with asyncio.TaskGroup() as group:
            for merchant in self._config.merchants:
                group.create_task(self._refresh_merchant(merchant))

    async def _refresh_merchant(self, merchant: str) -> None:
        for channel in [each for each in self._unchecked if each.merchant == merchant]:
            await self._apply(channel, self._unchecked[channel])
            del self._unchecked[channel]
        # Limited per merchant: a merchant whose Norce is silent must not delay another.
        limit = asyncio.Semaphore(READS_AT_ONCE)

        async def refresh_one(channel: Channel) -> None:
            async with limit:
                await self._refresh_channel(channel)

        async with asyncio.TaskGroup() as group:
            for channel in self._config.channels:
                if channel.merchant == merchant:
                    group.create_task(refresh_one(channel))

    async def _refresh_channel(self, channel: Channel) -> None:
        try:
            content: bytes | None = await self._norce.call(
                channel, "read_configuration", path={"name": self._config.adapter.id}
            )
        except NorceError as error:
            # A 404 without a code of Norce's may come from a proxy: it must not remove a document.
            if not isinstance(error, NotFound) or (error.code is None and channel in self._has_stored):
                if channel not in self._unreadable:
                    log.warning("configuration_unreadable", merchant=channel.merchant, channel=channel.name,
                                error_type=type(error).__name__)  # fmt: skip
                self._unreadable.add(channel)
                self._metrics.configuration_documents.labels(*channel, "unreadable").inc()
                return
            content = None
        self._unreadable.discard(channel)
        if channel in self._last_read and self._last_read[channel] == content:
            return
        if await self._apply(channel, content):
            try:
                await self._store(channel, content)
            except StoreUnavailable:  # it has taken effect here, and is stored at the next refresh
                return
        self._last_read[channel] = content

    async def _store(self, channel: Channel, content: bytes | None) -> None:
        if content is not None:
            document = decode(content)
            kept = {name: document[name] for name in STORED_MEMBERS if name in document}
            await self._stored.keep(channel, msgspec.json.encode(kept))
            self._has_stored.add(channel)
        elif channel in self._has_stored:
            await self._stored.keep(channel, None)
            self._has_stored.discard(channel)

    async def _apply(self, channel: Channel, content: bytes | None) -> bool:
        """Check a document and let it take effect if it is good. Return whether it is."""
        merchant, name = channel
        settings: dict[str, Settings] = {}
        async with self._checking:
            try:
                # In a thread, because it may take seconds.
                places = await asyncio.to_thread(self._check, channel, content, settings)
            except Exception as error:  # noqa: BLE001 - a bug in a settings type must not end the polling
                log.error("document_check_failed", merchant=merchant, channel=name, error_type=type(error).__name__)
                places = ["$"]
        self._metrics.configuration_documents.labels(*channel, "refused" if places else "applied").inc()
        self._metrics.configuration_valid.labels(*channel).set(not places)
        if places:
            log.error("configuration_refused", merchant=merchant, channel=name, places=places)
            return False
        for route in self._routes.all:
            if channel in route.settings:
                route.settings[channel] = settings[route.name]
        self._switch(channel, active=content is None or decode(content).get("active", True))
        self._changed()
        if content is not None:
            log.info("configuration_applied", merchant=merchant, channel=name)
        return True

    def _check(self, channel: Channel, content: bytes | None, settings: dict[str, Settings]) -> list[str]:
        """Read a document's settings for every route into `settings`, or return the wrong places."""
        document: Any = {}
        if content is not None:
            if len(content) > MAX_DOCUMENT_BYTES:
                return ["$"]
            try:
                document = decode(content)
            except NotAnOrder:
                return ["$"]
            errors = itertools.islice(self._validator.iter_errors(document), MAX_PLACES)
            if places := sorted({error.json_path[:MAX_PLACE_LENGTH] for error in errors}):
                return places
        for route in self._routes.all:
            if channel not in route.settings:
                continue
            theirs = document.get("routes", {}).get(route.name, {}).get("settings", {})
            tree, paths = self._config.settings(route.name, channel)
            read = read_settings(self._config, type(route.settings[channel]), merged(tree, theirs), paths)
            if isinstance(read, tuple):
                return [f"$.routes.{route.name}.settings"]
            settings[route.name] = read
        return []

    def _switch(self, channel: Channel, *, active: bool) -> None:
        if active is (channel in self.switched_off):
            log.warning("channel_switched", merchant=channel.merchant, channel=channel.name,
                        state="on" if active else "off")  # fmt: skip
        (self.switched_off.discard if active else self.switched_off.add)(channel)
        self._metrics.channel_active.labels(*channel).set(active)


def published_schema(config: Config, routes: Routes) -> dict[str, Any]:
    """Return the schema of our document in Norce's configuration."""
    types = {route.name: type(next(iter(route.settings.values()))) for route in routes.all}
    return document_schema(config.adapter.id, str(config.adapter.public_url or ""), types)
