"""
What Norce's configuration has to say about our channels: settings that are merged last, and whether we are active.

Each channel's document is read again and again, so that nobody waits for it who answers a shopper. What one would get
wrong: a document that cannot be read, or breaks our schema, changes nothing; the last good one holds until there is a
better one, after a restart and on every node too, and none at all means the settings of `config.yaml`. Hosts and
credentials never come from there: who may write a document, or read it, is not for us to say.

Facts: checkout protocol, sections 8.2 and 9. Every holder of the merchant's token can read every document.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import msgspec
import structlog
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from adapter.config import Config, merged, read_settings
from adapter.identifiers import Channel
from adapter.ledger.key_values import StoredDocuments
from adapter.ledger.store import StoreUnavailable
from adapter.metrics import Metrics
from adapter.norce.client import Norce, NorceError, NotFound
from adapter.plugin import Settings
from adapter.routing.routes import Routes

log = structlog.get_logger(__name__)

AT_ONCE = 4  # of one merchant
LARGEST_DOCUMENT_BYTES = 128 * 1024  # hundreds of rules; a hostile one of that size takes some seconds to check
MOST_PLACES = 10  # that are told of one document
LONGEST_PLACE = 200
KEPT = ("$schema", "id", "active", "routes")  # of a document that was taken; the rest may hold a secret

Said = tuple[dict[str, Settings], bool]  # the settings of every route, and whether we are active


class Documents:
    """
    Our configuration documents. `switched_off` are the channels whose document says `active: false`; `schema` is what
    we publish; `changed` is told where a channel's document was taken.
    """

    def __init__(
        self,
        config: Config,
        routes: Routes,
        norce: Norce,
        schema: Mapping[str, Any],
        *,
        taken: StoredDocuments,
        metrics: Metrics,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.switched_off: set[Channel] = set()
        self.schema = schema
        self._config = config
        self._routes = routes
        self._norce = norce
        self._validator = Draft202012Validator(schema)
        self._taken = taken
        self._metrics = metrics
        self._changed = changed
        self._one_at_a_time = asyncio.Lock()
        self._read: dict[Channel, bytes | None] = {}  # what was decided on the last time, good or not
        self._unreadable: set[Channel] = set()
        self._documented: set[Channel] = set()  # where a document was taken
        self._recalled: dict[Channel, bytes] = {}  # and was not checked yet by this process

    async def recall(self) -> None:
        """
        Has what was taken the last time hold again, until Norce has said more: the switch at once, the settings when
        the next refresh has checked them. Raises `StoreUnavailable`.
        """
        for channel, content in (await self._taken.all()).items():
            if channel in self._config.channels:
                self._documented.add(channel)
                self._recalled[channel] = content
                self._switch(channel, active=msgspec.json.decode(content).get("active", True))

    async def keep(self, every: timedelta) -> None:
        """Reads them again and again, until cancelled; with no time between, not at all."""

        async def of_one(merchant: str) -> None:
            while True:
                await self._refresh_all(merchant)
                await asyncio.sleep(every.total_seconds())

        if not every:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            for merchant in self._config.merchants:
                group.create_task(of_one(merchant))

    async def refresh(self) -> None:
        """Reads every channel's document once. Raises nothing that Norce may do."""
        async with asyncio.TaskGroup() as group:
            for merchant in self._config.merchants:
                group.create_task(self._refresh_all(merchant))

    async def _refresh_all(self, merchant: str) -> None:
        """A merchant's own, in places of its own: where its Norce is silent, no other merchant waits."""
        for channel in [each for each in self._recalled if each.merchant == merchant]:
            await self._consider(channel, self._recalled[channel])
            del self._recalled[channel]
        places = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with places:
                await self._refresh(Channel(merchant, name))

        async with asyncio.TaskGroup() as group:
            for name in self._config.merchants[merchant].channels:
                group.create_task(one(name))

    async def _refresh(self, channel: Channel) -> None:
        try:
            content: bytes | None = await self._norce.call(
                channel, "read_configuration", path={"name": self._config.adapter.id}
            )
        except NorceError as error:
            # A 404 with no code of Norce's may be anybody's on the way: no reason to forget a document.
            if not isinstance(error, NotFound) or (error.code is None and channel in self._documented):
                if channel not in self._unreadable:
                    log.warning("configuration_unreadable", merchant=channel.merchant, channel=channel.name,
                                error_type=type(error).__name__)  # fmt: skip
                self._unreadable.add(channel)
                self._metrics.configuration.labels(*channel, "unreadable").inc()
                return
            content = None
        self._unreadable.discard(channel)
        if channel in self._read and self._read[channel] == content:
            return
        if await self._consider(channel, content):
            try:
                await self._remember(channel, content)
            except StoreUnavailable:  # it holds here, and is remembered the next time
                return
        self._read[channel] = content

    async def _remember(self, channel: Channel, content: bytes | None) -> None:
        if content is not None:
            document = msgspec.json.decode(content)
            kept = {name: document[name] for name in KEPT if name in document}
            await self._taken.keep(channel, msgspec.json.encode(kept))
            self._documented.add(channel)
        elif channel in self._documented:
            await self._taken.keep(channel, None)
            self._documented.discard(channel)

    async def _consider(self, channel: Channel, content: bytes | None) -> bool:
        """Whether it was good, and holds now."""
        async with self._one_at_a_time:  # in a thread, for it may be large: nobody who is answered waits for it
            read = await asyncio.to_thread(self._settings, channel, content)
        wrong = read if isinstance(read, list) else []
        if not isinstance(read, list):
            settings, active = read
            self._take(channel, settings, active=active)
            if content is not None:
                log.info("configuration_taken", merchant=channel.merchant, channel=channel.name)
        self._metrics.configuration.labels(*channel, "refused" if wrong else "taken").inc()
        self._metrics.configuration_valid.labels(*channel).set(not wrong)
        if wrong:
            log.error("configuration_refused", merchant=channel.merchant, channel=channel.name, places=wrong)
        return not wrong

    def _settings(self, channel: Channel, content: bytes | None) -> Said | list[str]:
        """What is so by this document; or else places where it is wrong."""
        try:
            return self._checked(channel, content)
        except Exception as error:  # noqa: BLE001 - a mistake in a handler's own types must not end all other documents
            log.error(
                "configuration_broke", merchant=channel.merchant, channel=channel.name, error_type=type(error).__name__
            )
            return ["$"]

    def _checked(self, channel: Channel, content: bytes | None) -> Said | list[str]:
        document: Any = {}
        if content is not None:
            if len(content) > LARGEST_DOCUMENT_BYTES:
                return ["$"]
            try:
                document = msgspec.json.decode(content)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return ["$"]
            errors = itertools.islice(self._validator.iter_errors(document), MOST_PLACES)
            if wrong := sorted({error.json_path[:LONGEST_PLACE] for error in errors}):
                return wrong
        settings: dict[str, Settings] = {}
        for route in self._routes.all:
            theirs = document.get("routes", {}).get(route.name, {}).get("settings", {})
            tree, paths = self._config.settings(route.name, channel)
            read = read_settings(self._config, type(route.settings[channel]), merged(tree, theirs), paths)
            if isinstance(read, tuple):
                return [f"$.routes.{route.name}.settings"]
            settings[route.name] = read
        return settings, document.get("active", True)

    def _take(self, channel: Channel, settings: Mapping[str, Settings], *, active: bool) -> None:
        """Has it hold from now on."""
        for route in self._routes.all:
            route.settings[channel] = settings[route.name]
        self._switch(channel, active=active)
        self._changed()

    def _switch(self, channel: Channel, *, active: bool) -> None:
        was_off = channel in self.switched_off
        if active:
            self.switched_off.discard(channel)
        else:
            self.switched_off.add(channel)
        self._metrics.channel_active.labels(*channel).set(active)
        if was_off == active:
            log.warning(
                "channel_switched", merchant=channel.merchant, channel=channel.name, state="on" if active else "off"
            )
