"""Warnings about names that are gone and still used, and about orphaned queues.

`check` prints them before a change is made, and `serve` logs them at its start.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from adapter.config import Config
from adapter.ledger.queries import ORPHANED, Queries
from adapter.ledger.store import Store
from adapter.ledger.uses import RECENT_DAYS, RecentUse, recent_uses
from adapter.moments import to_text

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoneName:
    """A name that is not configured, and its calls in the last `RECENT_DAYS`."""

    title: str  # for people
    verb: str
    facts: dict[str, str]  # for the log
    remedy: str
    uses: tuple[RecentUse, ...]

    @property
    def calls(self) -> int:
        return sum(use.calls for use in self.uses)

    def __str__(self) -> str:
        today = sum(use.today for use in self.uses)
        when = "today" if today == self.calls else f"in the last {RECENT_DAYS} days"
        calls = "once" if self.calls == 1 else f"{self.calls} times"
        counted = f"was called {calls} {when}" if self.verb == "called" else f"verified {self.calls} calls {when}"
        last = to_text(max(use.last_at for use in self.uses))
        return f"{self.title} {counted} and is gone (last call {last}): {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanedQueue:
    """A queue that is not configured, with deliveries in it."""

    route: str
    merchant: str
    channel: str
    waiting: int
    dead: int

    def __str__(self) -> str:
        return (
            f"queue {self.route} of {self.merchant}/{self.channel} is {ORPHANED}, with {self.waiting} waiting and "
            f"{self.dead} dead deliveries: configure it again, or end them with `norce-adapter deliveries discard`"
        )


ANSWERED = "its validations and hooks are answered 200 without asking a route, its notifications 404"
REFUSED = "its calls are answered 401"


def gone_names(config: Config, uses: list[RecentUse]) -> Iterator[GoneName]:
    """Yield the names that were used in the last days and are not configured."""
    keys = config.senders.signed_urls.keys if config.senders.signed_urls else {}
    for name in sorted({use.callback for use in uses} - config.callbacks.keys()):
        of_name = tuple(use for use in uses if use.callback == name)
        yield GoneName(
            title=f"callback `{name}`", verb="called", facts={"callback": name}, remedy=ANSWERED, uses=of_name
        )
    for merchant in sorted({use.channel.merchant for use in uses} - config.merchants.keys()):
        of_name = tuple(use for use in uses if use.channel.merchant == merchant)
        yield GoneName(
            title=f"merchant `{merchant}`", verb="called", facts={"merchant": merchant}, remedy=ANSWERED, uses=of_name
        )
    for channel in sorted({use.channel for use in uses} - set(config.channels)):
        if channel.merchant in config.merchants:
            of_name = tuple(use for use in uses if use.channel == channel)
            facts = {"merchant": channel.merchant, "channel": channel.name}
            title = f"channel `{channel.name}` of `{channel.merchant}`"
            yield GoneName(title=title, verb="called", facts=facts, remedy=ANSWERED, uses=of_name)
    for key in sorted({use.key for use in uses} - keys.keys() - {""}):
        of_name = tuple(use for use in uses if use.key == key)
        yield GoneName(title=f"URL key `{key}`", verb="verified", facts={"key": key}, remedy=REFUSED, uses=of_name)


def orphaned_queues(config: Config, connection: Connection, now: int) -> Iterator[OrphanedQueue]:
    """Yield the orphaned queues in which deliveries wait or are dead.

    `now` is the ledger's clock.
    """
    for row in Queries(connection).queues(now, config.queue_keys):
        if row["state"] == ORPHANED and (row["waiting"] or row["dead"]):
            yield OrphanedQueue(**{name: row[name] for name in OrphanedQueue.__slots__})


def warnings_of(config: Config, connection: Connection, now: int) -> list[GoneName | OrphanedQueue]:
    """Return all warnings about a ledger. `now` is its clock."""
    return [*gone_names(config, recent_uses(connection, now)), *orphaned_queues(config, connection, now)]


async def log_warnings(config: Config, store: Store) -> None:
    """Log all warnings about the ledger. Never raises: they change nothing."""

    def read() -> list[GoneName | OrphanedQueue]:
        with store.read_connection() as connection:
            return warnings_of(config, connection, store.clock())

    try:
        found = await asyncio.to_thread(read)
    except DBAPIError as error:
        log.warning("ledger_unreadable", error_type=type(error).__name__)
        return
    for each in found:
        if isinstance(each, GoneName):
            log.warning("gone_name_used", **each.facts, count=each.calls)
        else:
            log.warning("queue_orphaned", route=each.route, merchant=each.merchant, channel=each.channel,
                        count=each.waiting + each.dead)  # fmt: skip
