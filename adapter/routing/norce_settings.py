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

Shop = tuple[str, str]
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
        self.switched_off: set[Shop] = set()
        self.schema = schema
        self._config = config
        self._routes = routes
        self._norce = norce
        self._validator = Draft202012Validator(schema)
        self._taken = taken
        self._metrics = metrics
        self._changed = changed
        self._one_at_a_time = asyncio.Lock()
        self._read: dict[Shop, bytes | None] = {}  # what was decided on the last time, good or not
        self._unreadable: set[Shop] = set()
        self._documented: set[Shop] = set()  # where a document was taken
        self._recalled: dict[Shop, bytes] = {}  # and was not checked yet by this process

    async def recall(self) -> None:
        """
        Has what was taken the last time hold again, until Norce has said more: the switch at once, the settings when
        the next refresh has checked them. Raises `StoreUnavailable`.
        """
        for (merchant, channel), content in (await self._taken.all()).items():
            if merchant in self._config.merchants and channel in self._config.merchants[merchant].channels:
                self._documented.add((merchant, channel))
                self._recalled[merchant, channel] = content
                self._switch(merchant, channel, active=msgspec.json.decode(content).get("active", True))

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
        for shop in [each for each in self._recalled if each[0] == merchant]:
            await self._consider(*shop, self._recalled[shop])
            del self._recalled[shop]
        places = asyncio.Semaphore(AT_ONCE)

        async def one(channel: str) -> None:
            async with places:
                await self._refresh(merchant, channel)

        async with asyncio.TaskGroup() as group:
            for channel in self._config.merchants[merchant].channels:
                group.create_task(one(channel))

    async def _refresh(self, merchant: str, channel: str) -> None:
        shop = (merchant, channel)
        try:
            content: bytes | None = await self._norce.call(
                merchant, channel, "read_configuration", path={"name": self._config.adapter.id}
            )
        except NorceError as error:
            # A 404 with no code of Norce's may be anybody's on the way: no reason to forget a document.
            if not isinstance(error, NotFound) or (error.code is None and shop in self._documented):
                if shop not in self._unreadable:
                    log.warning("configuration_unreadable", merchant=merchant, channel=channel,
                                error_type=type(error).__name__)  # fmt: skip
                self._unreadable.add(shop)
                self._metrics.configuration.labels(merchant, channel, "unreadable").inc()
                return
            content = None
        self._unreadable.discard(shop)
        if shop in self._read and self._read[shop] == content:
            return
        if await self._consider(merchant, channel, content):
            try:
                await self._remember(merchant, channel, content)
            except StoreUnavailable:  # it holds here, and is remembered the next time
                return
        self._read[shop] = content

    async def _remember(self, merchant: str, channel: str, content: bytes | None) -> None:
        shop = (merchant, channel)
        if content is not None:
            document = msgspec.json.decode(content)
            kept = {name: document[name] for name in KEPT if name in document}
            await self._taken.keep(merchant, channel, msgspec.json.encode(kept))
            self._documented.add(shop)
        elif shop in self._documented:
            await self._taken.keep(merchant, channel, None)
            self._documented.discard(shop)

    async def _consider(self, merchant: str, channel: str, content: bytes | None) -> bool:
        """Whether it was good, and holds now."""
        async with self._one_at_a_time:  # in a thread, for it may be large: nobody who is answered waits for it
            read = await asyncio.to_thread(self._settings, merchant, channel, content)
        wrong = read if isinstance(read, list) else []
        if not isinstance(read, list):
            settings, active = read
            self._take(merchant, channel, settings, active=active)
            if content is not None:
                log.info("configuration_taken", merchant=merchant, channel=channel)
        self._metrics.configuration.labels(merchant, channel, "refused" if wrong else "taken").inc()
        self._metrics.configuration_valid.labels(merchant, channel).set(not wrong)
        if wrong:
            log.error("configuration_refused", merchant=merchant, channel=channel, places=wrong)
        return not wrong

    def _settings(self, merchant: str, channel: str, content: bytes | None) -> Said | list[str]:
        """What is so by this document; or else places where it is wrong."""
        try:
            return self._checked(merchant, channel, content)
        except Exception as error:  # noqa: BLE001 - a mistake in a handler's own types must not end all other documents
            log.error("configuration_broke", merchant=merchant, channel=channel, error_type=type(error).__name__)
            return ["$"]

    def _checked(self, merchant: str, channel: str, content: bytes | None) -> Said | list[str]:
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
            tree, paths = self._config.settings(route.name, merchant, channel)
            read = read_settings(self._config, type(route.settings[merchant, channel]), merged(tree, theirs), paths)
            if isinstance(read, tuple):
                return [f"$.routes.{route.name}.settings"]
            settings[route.name] = read
        return settings, document.get("active", True)

    def _take(self, merchant: str, channel: str, settings: Mapping[str, Settings], *, active: bool) -> None:
        """Has it hold from now on."""
        for route in self._routes.all:
            route.settings[merchant, channel] = settings[route.name]
        self._switch(merchant, channel, active=active)
        self._changed()

    def _switch(self, merchant: str, channel: str, *, active: bool) -> None:
        was_off = (merchant, channel) in self.switched_off
        if active:
            self.switched_off.discard((merchant, channel))
        else:
            self.switched_off.add((merchant, channel))
        self._metrics.channel_active.labels(merchant, channel).set(active)
        if was_off == active:
            log.warning("channel_switched", merchant=merchant, channel=channel, state="on" if active else "off")
