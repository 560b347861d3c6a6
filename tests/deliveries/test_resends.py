"""`adapter.deliveries`: a handler knows a resend, its keys are its own, and doubt about it has its own rules."""

from typing import Any

import pytest

from adapter.ledger.commands import Commands, Step
from adapter.ledger.queries import Author, DeliveryFilter
from adapter.plugin import Done, NotificationHandler, Unknown
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import LooksUp, Plain, Repeatable
from tests.deliveries.harness import Work, route, working


class LooksUpByKey(LooksUp):
    lookup_by_key = True


class RepeatableByKey(LooksUpByKey):
    repeatable = True


class KeyWithoutLookup(Plain):
    lookup_by_key = True


async def resend(work: Work, *ids: int, unknown: Any = "leave") -> None:
    commands = Commands(work.store, refetching=["export"])
    step = Step(matching=DeliveryFilter(ids=ids), by=Author(who="anna", why="a test"), unknown=unknown)
    first = await commands.resend(step)
    await commands.resend(Step(matching=DeliveryFilter(), by=step.by, action=first.action))
    work.dispatcher.wake()


@asynchronous
async def test_a_handler_sees_the_last_result_and_that_a_person_wants_it_again(store_url: str) -> None:
    handler = Plain(Done("JS-1", {"payload": "a"}))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        await work.settled()
        await resend(work, 1)
        await work.settled()

    (_, first), (notification, again) = handler.seen
    assert (first.is_resend, again.is_resend) == (False, True)
    assert again.previous is not None
    assert (again.previous.reference, again.previous.facts) == ("JS-1", {"payload": "a"})
    assert notification.order.id == "order-1"


@asynchronous
async def test_a_resend_has_one_key_for_its_attempts_and_shares_it_with_no_other_delivery(store_url: str) -> None:
    handler = LooksUpByKey(Done(), Unknown("no-answer"), Done("found"), Done())
    async with working(store_url, route(handler)) as work:
        await work.owe()
        await work.settled()
        await resend(work, 1)
        shown = await work.settled()
        work.move_to(shown["next_at"])
        await work.settled()
        await resend(work, 1)
        await work.settled()

    keys = [context.key() for _, context in handler.seen]
    assert handler.calls == ["deliver", "deliver", "lookup", "deliver"]
    assert keys[1] == keys[2]
    assert len({keys[0], keys[1], keys[3]}) == 3


DOUBTS: dict[str, tuple[type[Plain], tuple[str, str | None], list[str]]] = {
    "a lookup of the order would find the earlier delivery": (LooksUp, ("dead", "unknown"), []),
    "a lookup by the key": (LooksUpByKey, ("done", "delivered"), ["lookup"]),
    "repeatable": (Repeatable, ("dead", "unknown"), []),
    "repeatable, and a lookup by the key": (RepeatableByKey, ("done", "delivered"), ["lookup"]),
    "neither": (Plain, ("dead", "unknown"), []),
    "a key without a lookup": (KeyWithoutLookup, ("dead", "unknown"), []),
}


@pytest.mark.parametrize(("kind", "ends", "calls"), DOUBTS.values(), ids=DOUBTS)
@asynchronous
async def test_doubt_about_a_resend(
    store_url: str, kind: type[Plain], ends: tuple[str, str | None], calls: list[str]
) -> None:
    handler: NotificationHandler[Any] = kind(Done(), Unknown("no-answer"), Done("found"))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        await work.settled()
        await resend(work, 1)
        shown = await work.settled()
        if shown["state"] == "waiting":
            work.move_to(shown["next_at"])
            shown = await work.settled()

    assert (shown["state"], shown["reason"]) == ends
    assert handler.calls[2:] == calls  # type: ignore[attr-defined]


@asynchronous
async def test_an_order_whose_body_is_pruned_is_read_again_and_sent_again(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        await work.owe(total=1)
        await work.settled()
        work.rows("UPDATE notifications SET body = NULL")
        await resend(work, 1)
        shown = await work.settled()

    assert (shown["state"], shown["reason"]) == ("done", "delivered")
    notification, _ = handler.seen[1]
    assert (notification.received, notification.order.data["total"]) == (None, 1)
