"""The reader of Norce's lists: it finds every entry, for each order of the list and each page size."""

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.norce.client import Event, NorceTooLarge, NorceUnavailable, Page
from adapter.reconciliation.listing import MAX_PAGES, PAGE_SIZE, Listing

NOON = datetime(2026, 2, 3, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
OVERLAP = timedelta(hours=1)
Log = list[datetime | None]  # the times of its events; None for an unreadable one


def event(at: datetime) -> Event:
    return Event(
        id=at.isoformat(), created_at=at, merchant="norce", channel="1", order_id="o", payload=msgspec.Raw(b"{}")
    )


class FakeNorce:
    """Serves a log in pages of at most `cap` events. Requests for more than `too_large` fail."""

    def __init__(
        self,
        log: Log,
        *,
        cap: int = 1000,
        total: bool = True,
        too_large: int = 1000,
        window: int = 10**9,
        between: Callable[[Log], None] = lambda _log: None,
    ) -> None:
        self.log, self.cap, self.total, self.too_large = log, cap, total, too_large
        self.window, self.between = window, between
        self.requests = 0

    async def events(self, *, offset: int, limit: int) -> Page[Event]:
        self.requests += 1
        if limit > self.too_large:
            raise NorceTooLarge("too large")
        given_ = self.log[offset : min(offset + min(limit, self.cap), self.window)]
        items = [event(at) for at in given_ if at is not None]
        page = Page(offset=offset, items=items, count=len(given_), total=len(self.log) if self.total else None)
        self.between(self.log)
        return page


def read(norce: Any, begins: datetime) -> set[datetime]:
    async def work() -> set[datetime]:
        pages = Listing[Event](norce.events, overlap=OVERLAP).newest_pages(begins)
        return {each.created_at async for page in pages for each in page.items}

    return asyncio.run(work())


def every_minute(count: int, *, late: timedelta = timedelta(0), chance: random.Random | None = None) -> list[datetime]:
    """Oldest first; each was written up to `late` after its own time."""
    drawn = chance or random.Random(0)
    return [NOON + number * MINUTE - drawn.random() * late for number in range(count)]


@given(
    count=st.integers(0, 400),
    order=st.sampled_from(["newest", "oldest", "none"]),
    cap=st.integers(1, 120),
    total=st.booleans(),
    too_large=st.sampled_from([1, 7, 1000]),
    begins=st.integers(0, 400),
    late=st.sampled_from([timedelta(0), OVERLAP]),
    seed=st.integers(0, 1000),
)
def test_every_event_since_the_beginning_is_read(
    *, count: int, order: str, cap: int, total: bool, too_large: int, begins: int, late: timedelta, seed: int
) -> None:
    chance = random.Random(seed)
    log: Log = [*every_minute(count, late=late, chance=chance)]
    if order == "newest":
        log.reverse()
    elif order == "none":
        chance.shuffle(log)
    since = NOON + begins * MINUTE

    found = read(FakeNorce(log, cap=cap, total=total, too_large=too_large), since)

    assert {at for at in log if at is not None and at >= since + late} <= found


@given(
    order=st.sampled_from(["newest", "oldest"]),
    cap=st.integers(1, 120),
    gone=st.integers(0, 150),
    seed=st.integers(0, 1000),
)
def test_a_log_that_changes_while_it_is_read_leaves_no_gap(order: str, cap: int, gone: int, seed: int) -> None:
    """Events from before the beginning fall out, new ones come in."""
    chance = random.Random(seed)
    log: Log = [*every_minute(500)]
    new, since = NOON + timedelta(days=1), NOON + 450 * MINUTE

    def change(log: Log) -> None:
        if norce.requests > 20:
            return
        oldest = min(chance.randint(0, gone), sum(at is not None and at < since for at in log))
        if order == "oldest":
            log[:] = [*log[oldest:], new]
        else:
            log[:] = [new, *log[: len(log) - oldest]]

    if order == "newest":
        log.reverse()
    norce = FakeNorce(log, cap=cap, between=change)

    found = read(norce, since)

    assert {NOON + number * MINUTE for number in range(450, 500)} <= found


@pytest.mark.parametrize("order", ["newest", "oldest"])
def test_a_short_log_that_changes_between_the_first_requests_leaves_no_gap(order: str) -> None:
    """Its first and last page overlap, so either may have the newest event."""
    events = every_minute(PAGE_SIZE + 1)
    log: Log = events[::-1] if order == "newest" else [*events]

    def change(log: Log) -> None:
        if norce.requests < 3:
            new = [NOON + timedelta(days=1, minutes=norce.requests), NOON + timedelta(days=2, minutes=norce.requests)]
            log[:] = [*new[::-1], *log] if order == "newest" else [*log[2:], *new]

    norce = FakeNorce(log, between=change)

    found = read(norce, NOON)

    assert set(events if order == "newest" else events[2:]) <= found


@pytest.mark.parametrize("newest_first", [True, False])
def test_a_long_log_is_read_from_its_newest_end(*, newest_first: bool) -> None:
    log: Log = sorted(every_minute(100 * PAGE_SIZE), reverse=newest_first)
    norce = FakeNorce(log)

    read(norce, NOON + 99 * PAGE_SIZE * MINUTE)

    assert norce.requests <= 4


def test_an_oldest_first_log_without_a_length_is_read_completely() -> None:
    norce = FakeNorce([*every_minute(5 * PAGE_SIZE)], total=False)

    found = read(norce, NOON + 499 * MINUTE)

    assert len(found) == 5 * PAGE_SIZE


@pytest.mark.parametrize(
    "page",
    [
        pytest.param([8, 7, 6, 5, 4, 3, 2, 1], id="too few events"),
        pytest.param([1] * PAGE_SIZE, id="equal times"),
        pytest.param([200, *range(1, PAGE_SIZE)], id="one is out of order"),
        pytest.param([*range(1000, 967, -1), 5, 900, *range(600, 567, -1), *range(300, 268, -1)], id="a jump"),
    ],
)
def test_an_old_page_that_does_not_show_the_order_does_not_end_the_log(page: list[int]) -> None:
    """The log is in no order and does not tell its length; a new event is on its last page."""
    old = NOON - timedelta(days=30)
    log: Log = [*(old + minutes * MINUTE for minutes in page), NOON]

    found = read(FakeNorce(log, total=False, cap=len(page)), NOON - timedelta(hours=1))

    assert NOON in found


def test_a_page_that_shows_the_order_ends_the_log() -> None:
    old = NOON - timedelta(days=30)
    log: Log = [*(old - number * MINUTE for number in range(9)), NOON]

    assert NOON not in read(FakeNorce(log, total=False, cap=9), NOON - timedelta(hours=1))


def test_a_page_whose_newest_event_is_at_the_beginning_does_not_end_the_log() -> None:
    log: Log = [*(NOON - number * MINUTE for number in range(9)), NOON]
    norce = FakeNorce(log, total=False, cap=9)

    read(norce, NOON)

    assert norce.requests == 3  # another event of that moment may be on the next page


def test_unreadable_events_do_not_end_the_log() -> None:
    log: Log = [*every_minute(PAGE_SIZE), *[None] * PAGE_SIZE, *every_minute(PAGE_SIZE)]

    assert len(read(FakeNorce(log, total=False), NOON)) == PAGE_SIZE


@pytest.mark.parametrize("newest_first", [True, False])
def test_a_log_that_gives_fewer_events_than_it_counts_is_an_error(*, newest_first: bool) -> None:
    """Search engines count all events and give only the first so many."""
    log: Log = sorted(every_minute(5 * PAGE_SIZE), reverse=newest_first)

    with pytest.raises(NorceUnavailable, match="more entries than it gives"):
        read(FakeNorce(log, window=150), NOON)


def test_a_log_without_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PAGES * PAGE_SIZE == 10_000_000  # a busy merchant has a few hundred thousand orders a day
    monkeypatch.setattr("adapter.reconciliation.listing.MAX_PAGES", 2)
    norce = FakeNorce([*every_minute(5 * PAGE_SIZE)], total=False)

    with pytest.raises(NorceUnavailable, match="no end"):
        read(norce, NOON)

    assert norce.requests == 3


def test_an_event_that_is_too_large_by_itself_is_an_error() -> None:
    with pytest.raises(NorceTooLarge):
        read(FakeNorce([*every_minute(3)], too_large=0), NOON)
