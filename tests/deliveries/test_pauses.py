"""`adapter.deliveries.dispatcher`: pauses of queues while a destination or Norce fails."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    NoSettings,
    Notification,
    NotificationHandler,
    Outcome,
    Retry,
    Skip,
    Unknown,
)
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import Plain, wait_forever
from tests.deliveries.harness import KEY, SECOND, route, working
from tests.ledgers import POLICY


class Shop(NotificationHandler[NoSettings]):
    """A destination that remembers orders. `says` are merchants whose orders it refuses, and how."""

    repeatable = True

    def __init__(self) -> None:
        self.says: dict[str, Callable[[], Awaitable[None]]] = {}
        self.calls = 0
        self.taken: Counter[str] = Counter()

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        self.calls += 1
        if notification.merchant in self.says:
            await self.says[notification.merchant]()
        self.taken[notification.order.id] += 1
        return Done()


def raising(outcome: Callable[[], Outcome]) -> Callable[[], Awaitable[None]]:
    async def say() -> None:
        raise outcome()

    return say


OUTAGES = {
    "busy": raising(lambda: Retry("destination-busy")),
    "busy, and says how long": raising(lambda: Retry("destination-busy", after=90 * SECOND)),
    "without answer": raising(lambda: Unknown("no-answer")),
}


@pytest.mark.parametrize("says", OUTAGES.values(), ids=OUTAGES)
@asynchronous
async def test_an_outage_costs_one_call_for_each_pause_and_loses_no_order(
    store_url: str, says: Callable[[], Awaitable[None]]
) -> None:
    shop = Shop()
    async with working(store_url, route(shop)) as work:
        shop.says["fjallboden"] = says
        for number in range(20):
            await work.owe(f"order-{number}")
        await work.quiet()
        at_first = shop.calls
        assert at_first < 5 + 4  # the failures in a row that pause a queue, and the attempts under way then
        assert work.pauses().keys() == {("export", "fjallboden", "1")}

        for probe in range(6):
            work.move_to(work.paused_until())
            await work.quiet()
            assert shop.calls == at_first + probe + 1
        assert work.states() == {("waiting", None): 20}

        shop.says.clear()
        work.move_to(work.paused_until())
        await work.quiet()
        work.move_to(work.clock.now + 3_600_000)  # orders that wait by their own schedule
        await work.quiet()

        assert work.states() == {("done", "delivered"): 20}
        assert shop.taken == {f"order-{number}": 1 for number in range(20)}
        assert work.pauses() == {}


@asynchronous
async def test_an_outage_that_is_longer_than_any_schedule_exhausts_nothing(store_url: str) -> None:
    shop = Shop()
    async with working(
        store_url, route(shop, schedule=(5 * SECOND,)), policy=replace(POLICY, after_failures=3)
    ) as work:
        shop.says["fjallboden"] = OUTAGES["busy"]
        for number in range(3):
            await work.owe(f"order-{number}")
        await work.quiet()
        for _ in range(9):  # each order is the probe three times; two attempts would be its last
            work.move_to(max(work.paused_until(), work.clock.now + 60_000))  # one of them is due by then
            await work.quiet()
        calls = shop.calls

        assert calls == 3 + 9
        assert work.states() == {("waiting", None): 3}
        assert [work.shown(number)["tries"] for number in (1, 2, 3)] == [1, 1, 1]


async def hang() -> None:
    await asyncio.Event().wait()


TROUBLES = {
    **OUTAGES,
    "refusing the credentials": raising(lambda: Misconfigured("destination-unauthorized")),
    "hanging": hang,
}


@pytest.mark.parametrize("says", TROUBLES.values(), ids=TROUBLES)
@asynchronous
async def test_an_outage_of_one_merchant_does_not_affect_another(
    store_url: str, says: Callable[[], Awaitable[None]]
) -> None:
    shop = Shop()
    async with working(store_url, route(shop), merchants=("fjallboden", "annan")) as work:
        shop.says["annan"] = says
        for number in range(20):
            await work.owe(f"his-{number}", merchant="annan")
        for number in range(5):
            await work.owe(f"hers-{number}")
        while work.states("fjallboden") != {("done", "delivered"): 5}:
            await work.settled()

        assert work.states("annan") == {("waiting", None): 20}
        assert work.pauses().keys() <= {("export", "annan", "1")}


@asynchronous
async def test_a_refused_token_pauses_only_the_queue_of_its_merchant(store_url: str) -> None:
    shop = Shop()
    async with working(store_url, route(shop), merchants=("fjallboden", "annan")) as work:
        work.norce.refuses.add("annan")
        for number in range(5):
            await work.owe(f"his-{number}", merchant="annan")
            await work.owe(f"hers-{number}")
        await work.quiet()

        assert work.states("fjallboden") == {("done", "delivered"): 5}
        assert work.states("annan") == {("waiting", None): 5}
        assert work.pauses() == {("export", "annan", "1"): "norce-unauthorized"}


@asynchronous
async def test_a_pause_for_broken_credentials_ends_by_itself_with_a_probe(store_url: str) -> None:
    shop = Shop()
    async with working(store_url, route(shop)) as work:
        shop.says["fjallboden"] = TROUBLES["refusing the credentials"]
        for number in range(10):
            await work.owe(f"order-{number}")
        await work.quiet()
        assert work.pauses() == {("export", "fjallboden", "1"): "destination-unauthorized"}
        for _ in range(20):
            work.move_to(work.paused_until())
            await work.quiet()
            assert work.paused_until() - work.clock.now <= POLICY.longest // timedelta(milliseconds=1)

        shop.says.clear()
        work.move_to(work.paused_until())
        await work.quiet()
        work.move_to(work.clock.now + 3_600_000)
        await work.quiet()

        assert work.states() == {("done", "delivered"): 10}


@asynchronous
async def test_a_restart_ends_a_pause_for_broken_credentials(store_url: str) -> None:
    shop = Shop()
    async with working(store_url, route(shop)) as work:
        shop.says["fjallboden"] = TROUBLES["refusing the credentials"]
        for number in range(10):
            await work.owe(f"order-{number}")
        await work.quiet()
        shop.says.clear()

        await work.lanes.open_queues([KEY])

        assert work.pauses() == {}


class Picky(Shop):
    """A destination that never takes one order, and has every other one at once."""

    def __init__(self, never: str, says: Outcome) -> None:
        super().__init__()
        self.never, self.says_of_it, self.refused = never, says, 0

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        if notification.order.id == self.never:
            self.refused += 1
            raise self.says_of_it
        return await super().deliver(notification, context)


@pytest.mark.parametrize(
    "says",
    [
        Misconfigured("destination-forbidden"),
        Retry("destination-busy"),
        Retry("destination-busy", after=timedelta(hours=1)),
        Unknown("no-answer", after=timedelta(hours=1)),
    ],
    ids=["refused", "busy", "busy, and says how long", "without an answer, and says how long"],
)
@asynchronous
async def test_one_order_that_is_never_taken_delays_no_other_and_becomes_a_dead_letter(
    store_url: str, says: Outcome
) -> None:
    shop = Picky("order-3", says)
    async with working(store_url, route(shop, schedule=(5 * SECOND, 60 * SECOND, 60 * SECOND))) as work:
        for number in range(26):
            await work.owe(f"order-{number}")
        for turn in range(8):
            await work.quiet()
            work.move_to(work.clock.now + 3_700_000)
            await work.owe(f"later-{turn}")
        await work.quiet()

        assert work.states() == {("done", "delivered"): 33, ("dead", "exhausted"): 1}
        assert shop.refused == 4
        assert work.pauses() == {}


@pytest.mark.parametrize("pause_after", [1, 5])
@asynchronous
async def test_an_order_that_is_never_taken_becomes_a_dead_letter_without_others_beside_it(
    store_url: str, pause_after: int
) -> None:
    """Its queue pauses for it alone, so each probe is one of its attempts."""
    shop = Picky("order-3", Retry("destination-busy", after=timedelta(hours=1)))
    policy = replace(POLICY, after_failures=pause_after)
    async with working(store_url, route(shop, schedule=(5 * SECOND, 60 * SECOND, 60 * SECOND)), policy=policy) as work:
        await work.owe("order-3")
        for _ in range(8):
            await work.quiet()
            work.move_to(work.clock.now + 3_700_000)

        assert work.states() == {("dead", "exhausted"): 1}
        assert shop.refused == 4


@asynchronous
async def test_orders_that_are_never_taken_pause_the_queue_only_until_another_is_the_probe(store_url: str) -> None:
    shop = Shop()
    async with working(store_url, route(shop, concurrency=1, schedule=(5 * SECOND,) * 3)) as work:
        shop.says["fjallboden"] = OUTAGES["busy"]
        for number in range(5):
            await work.owe(f"order-{number}")
        await work.quiet()
        shop.says.clear()
        await work.owe("another")

        work.move_to(work.paused_until())  # by then the first five are due as well, and for longer
        while not shop.taken:
            await work.a_turn()

        assert next(iter(shop.taken)) == "another"


@asynchronous
async def test_attempts_cut_short_by_a_shutdown_pause_no_queue(store_url: str) -> None:
    handler = Plain(*[wait_forever] * 6)
    async with working(store_url, route(handler, concurrency=8)) as work:
        for number in range(6):
            await work.owe(f"order-{number}")
        while len(handler.calls) < 6:
            await work.a_turn()

        await work.dispatcher.stop(timedelta(0))

        assert work.states() == {("dead", "unknown"): 6}
        assert work.rows("SELECT paused_until, failed_lanes FROM queues") == [(None, None)]
