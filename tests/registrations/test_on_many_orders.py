"""Registration on many orders: which are handled, how many at a time, and what one failure means for the others."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter.config import Config
from adapter.norce.client import Account, Norce, NorceError
from adapter.plugin import Secret
from adapter.registrations.on_many_orders import AT_ONCE, TRIES, Candidate, HandledOrder, OrderBatch, candidates
from adapter.registrations.on_orders import Registered, Registrar
from adapter.testing.virtual_time import run
from tests.registrations.stage import CHANNEL, OURS, configured

Answer = httpx.Response | Exception
NOT_FOUND = httpx.Response(404, json={"code": "order-not-found", "message": "no"})
CONFLICT = httpx.Response(409, json={"code": "order-conflict", "message": "no"})


def later(seconds: int) -> httpx.Response:
    return httpx.Response(429, headers={"retry-after": str(seconds)}, json={"code": "order-error"})


class ManyOrdersAtNorce(httpx.AsyncBaseTransport):
    """Norce with many orders. It remembers its requests, and how many were answered at the same time."""

    def __init__(self, *orders: dict[str, Any]) -> None:
        self.orders = {order["id"]: order for order in orders}
        self.first: dict[str, list[Answer]] = {}  # by order or place: what it answers first
        self.requests: list[tuple[str, str]] = []
        self.pages: Callable[[list[Any], int, int], list[Any]] = lambda all_, offset, limit: all_[offset:][:limit]
        self.most_at_once = 0
        self.on_request: Callable[[], None] = lambda: None
        self._running = 0
        self._ids = itertools.count(1)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        try:
            await asyncio.sleep(0)
            return await self._answer(request)
        finally:
            self._running -= 1

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        _, _, path = request.url.path.partition("/checkout/orders")
        self.requests.append((request.method, path))
        self.on_request()
        order_id, place, callback_id = (*path.strip("/").split("/"), "", "")[:3]
        script = self.first.get(order_id) or self.first.get(place)
        if script:
            answer = script.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)
        if not order_id:
            query = request.url.params
            page = self.pages(list(self.orders.values()), int(query["offset"]), int(query["limit"]))
            return httpx.Response(200, json={"data": page, "pagination": {"totalSize": len(self.orders)}})
        order = self.orders[order_id]
        if request.method == "POST":
            order[place].append(json.loads(request.content) | {"id": f"c{next(self._ids)}"})
        elif request.method == "DELETE":
            order[place] = [each for each in order[place] if each["id"] != callback_id]
        return httpx.Response(200, json=order if request.method == "GET" else None)

    def ours_on(self, order_id: str) -> int:
        order = self.orders[order_id]
        return sum(len(order[place]) for place in ("validations", "hooks", "notifications"))

    def changes(self) -> Counter[str]:
        return Counter(method for method, _ in self.requests if method != "GET")


def an_order(order_id: str, status: str = "checkout", **more: Any) -> dict[str, Any]:
    places: dict[str, Any] = {"validations": [], "hooks": [], "notifications": []}
    return {"id": order_id, "state": {"currentStatus": status}} | places | more


def some(number: int) -> list[dict[str, Any]]:
    return [an_order(f"o{each}") for each in range(1, number + 1)]


class Handled:
    """The result of a run."""

    def __init__(self) -> None:
        self.all: list[HandledOrder] = []
        self.error: NorceError | None = None
        self.progress: list[tuple[int, int | None]] = []
        self.took = 0.0

    @property
    def failed(self) -> dict[str, str]:
        return {each.order_id: str(each.error) for each in self.all if each.error is not None}

    def changed(self) -> set[str]:
        return {each.order_id for each in self.all if each.done.added or each.done.removed}


def handle(
    config: Config,
    norce: ManyOrdersAtNorce,
    order_ids: Sequence[str] | None = None,
    *,
    only_open: bool = True,
    removes: bool = False,
    dry_run: bool = False,
    stop_after: int | None = None,
) -> Handled:
    handled = Handled()

    async def work() -> None:
        began_at = asyncio.get_running_loop().time()
        account = Account(base_url="http://norce/checkout", tokens=(Secret("first"), Secret("second")))
        client = Norce({"norce": account}, adapter_id="our_adapter", timeout=timedelta(minutes=5), transport=norce)
        stop = asyncio.Event()
        batch = OrderBatch(Registrar(config, client), client, CHANNEL, removes=removes, dry_run=dry_run, stop=stop)

        def progress(done: int, total: int | None) -> None:
            handled.progress.append((done, total))

        orders = (
            batch.listed(only_open=only_open, progress=progress)
            if order_ids is None
            else candidates(order_ids, progress)
        )
        try:
            async for each in batch.handle(orders):
                handled.all.append(each)
                if len(handled.all) == stop_after:
                    stop.set()
        except NorceError as error:
            handled.error = error
        finally:
            handled.took = asyncio.get_running_loop().time() - began_at
            await client.aclose()

    # A page of a list is decoded in a thread, for which virtual time cannot wait.
    (asyncio.run if order_ids is None else run)(work())
    return handled


def test_all_open_orders_are_registered_and_final_ones_are_left_alone(tmp_path: Path) -> None:
    states = ["checkout", "processing", "accepted", "Accepted", "a-new-one", "completed", "Declined", "removed"]
    norce = ManyOrdersAtNorce(*(an_order(state, state) for state in states), an_order("stateless", state=None))

    handled = handle(configured(tmp_path), norce)

    assert handled.changed() == {"checkout", "processing", "accepted", "Accepted", "a-new-one", "stateless"}
    assert {order for order in norce.orders if norce.ours_on(order)} == handled.changed()
    assert handled.progress == [(9, 9)]


def test_a_second_run_costs_nothing_but_the_list(tmp_path: Path) -> None:
    config, norce = configured(tmp_path), ManyOrdersAtNorce(*some(250))

    first = handle(config, norce)
    changes = norce.changes()
    norce.requests.clear()
    second = handle(config, norce)

    assert (len(first.changed()), changes) == (250, {"POST": 750})
    assert [each.done for each in second.all] == [Registered(kept=OURS)] * 250
    assert norce.requests == [("GET", "")] * 3
    assert second.progress == [(100, 250), (200, 250), (250, 250)]


def test_sixteen_orders_are_handled_at_a_time(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(100))

    handle(configured(tmp_path), norce, [order["id"] for order in some(100)])

    assert norce.most_at_once == AT_ONCE == 16


def test_every_failure_is_named_and_the_other_orders_are_handled(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(30))
    refused = httpx.Response(401, json={"code": "unauthorized"})
    norce.first = {
        "o1": [refused, refused],  # of two tokens
        "o2": [refused],  # of one
        "o3": [NOT_FOUND],
        "o4": [CONFLICT],
        "o5": [httpx.Response(500)],
        "o6": [httpx.ReadTimeout("slow"), httpx.ReadTimeout("slow")],
        "o7": [httpx.Response(200, text="<html>a proxy</html>")],
    }

    handled = handle(configured(tmp_path), norce)

    assert set(handled.failed) == {"o1", "o3", "o4", "o5", "o6", "o7"}
    assert {key: each.partition(" to ")[0] for key, each in handled.failed.items()} == {
        "o1": "Norce answered 401",
        "o3": "Norce has no such order",
        "o4": "Norce answered 409",
        "o5": "Norce answered 500",
        "o6": "no answer from Norce",
        "o7": "Norce's answer is no order",
    }
    assert len(handled.changed()) == 24
    assert {norce.ours_on(order) for order in handled.changed()} == {3}


def test_a_callback_that_norce_rejects_is_named_and_the_others_are_added_on_every_order(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(3))
    norce.first = {"validations": [CONFLICT] * 3}

    handled = handle(configured(tmp_path), norce)

    assert {each.partition(":")[0] for each in handled.failed.values()} == {"order-rules"}
    assert [each.done.added for each in handled.all] == [("cart-changed", "order-status")] * 3


def test_norce_is_given_the_time_that_it_asks_for(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(3))
    norce.first = {"o1": [later(20), later(3600)], "o2": [later(1)] * TRIES}

    handled = handle(configured(tmp_path), norce, list(norce.orders))

    assert handled.changed() == {"o1", "o3"}
    assert "Norce answered 429" in handled.failed["o2"]
    assert handled.took == 80  # 20 s, and then a minute at most


def test_a_run_that_is_stopped_ends_what_it_has_begun_and_the_next_one_goes_on(tmp_path: Path) -> None:
    config, norce = configured(tmp_path), ManyOrdersAtNorce(*some(100))

    first = handle(config, norce, stop_after=20)
    half_done = [order for order in norce.orders if 0 < norce.ours_on(order) < 3]
    posts = norce.changes()["POST"]
    second = handle(config, norce)

    assert 20 <= len(first.all) < 20 + AT_ONCE
    assert half_done == []
    assert posts == 3 * len(first.all)
    assert first.changed() | second.changed() == set(norce.orders)
    assert norce.changes()["POST"] == 300  # each callback once


def test_a_stop_ends_the_wait_for_norce(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(2))
    norce.first = {"o1": [later(60)] * TRIES}

    handled = handle(configured(tmp_path), norce, list(norce.orders), stop_after=1)

    assert handled.took < 1
    assert set(handled.failed) == {"o1"}


@pytest.mark.parametrize("listed", [True, False])
def test_a_dry_run_counts_what_a_run_then_does(tmp_path: Path, listed: bool) -> None:
    config, norce = configured(tmp_path), ManyOrdersAtNorce(*some(5))
    order_ids = None if listed else list(norce.orders)
    handle(config, norce, ["o1", "o2"])
    norce.requests.clear()

    dry = handle(config, norce, order_ids, dry_run=True)
    assert norce.changes() == Counter()
    real = handle(config, norce, order_ids)

    def by_order(handled: Handled) -> dict[str, Registered]:
        return {each.order_id: each.done for each in handled.all}

    assert by_order(dry) == by_order(real)
    assert dry.changed() == {"o3", "o4", "o5"}


def test_orders_before_an_unreadable_page_are_handled(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(150))

    def fail_on_the_second_page() -> None:
        if norce.requests[-1] == ("GET", "") and norce.requests.count(("GET", "")) == 2:
            norce.first[""] = [httpx.Response(500)]

    norce.on_request = fail_on_the_second_page
    handled = handle(configured(tmp_path), norce)

    assert "Norce answered 500" in str(handled.error)
    assert len(handled.changed()) == 100


def test_a_page_is_read_again_after_the_time_that_norce_asks_for(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(150))

    def ask_for_time() -> None:
        if norce.requests[-1] == ("GET", "") and norce.requests.count(("GET", "")) == 2:
            norce.first[""] = [later(0)]

    norce.on_request = ask_for_time
    handled = handle(configured(tmp_path), norce)

    assert handled.error is None
    assert len(handled.all) == len(handled.changed()) == 150


def test_an_order_that_cannot_be_read_in_the_list_is_a_failure(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(2))
    norce.pages = lambda all_, offset, limit: ["no order", *all_][offset:][:limit]

    handled = handle(configured(tmp_path), norce)

    assert str(handled.error) == "1 orders of Norce's list cannot be read"
    assert handled.changed() >= {"o1"}


def test_an_order_that_moves_to_the_next_page_is_handled_once(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(*some(150))
    norce.pages = lambda all_, offset, limit: all_[max(offset - 10, 0) :][:limit]

    handled = handle(configured(tmp_path), norce)

    assert len(handled.all) == len(handled.changed()) == 150


def test_removal_takes_our_callbacks_from_orders_in_every_state_and_leaves_those_of_others(tmp_path: Path) -> None:
    config = configured(tmp_path)
    theirs = {"adapterId": "another", "subscribeTo": "/cart", "invoke": "http://127.0.0.1:9/x", "id": "theirs"}
    norce = ManyOrdersAtNorce(
        an_order("o1"), an_order("o2", "completed", hooks=[theirs]), an_order("o3", hooks=[theirs])
    )
    handle(config, norce, ["o1", "o2"])
    norce.requests.clear()

    handled = handle(config, norce, only_open=False, removes=True)

    assert handled.changed() == {"o1", "o2"}
    assert {each.done for each in handled.all} == {Registered(removed=OURS), Registered()}
    assert [norce.orders[each]["hooks"] for each in norce.orders] == [[], [theirs], [theirs]]
    assert not [path for _, path in norce.requests if path.startswith("/o3")]


def test_an_order_that_is_listed_without_its_callbacks_is_read(tmp_path: Path) -> None:
    norce = ManyOrdersAtNorce(an_order("o1"))
    handle(configured(tmp_path), norce)
    norce.pages = lambda all_, offset, _: [{"id": "o1"}][offset:]

    assert handle(configured(tmp_path), norce, removes=True).changed() == {"o1"}


def test_without_a_key_nothing_is_begun(tmp_path: Path) -> None:
    senders = {"header_secrets": [{"header": "x-secret", "values": ["${env:STATIC}"]}]}
    norce = ManyOrdersAtNorce(*some(3))

    with pytest.raises(LookupError, match="signed_urls"):
        handle(configured(tmp_path, senders=senders), norce)

    assert norce.changes() == Counter()


def test_a_list_of_orders_may_come_from_anywhere(tmp_path: Path) -> None:
    """The candidates are any iterator, so that a list can be read while its first orders are handled."""
    norce = ManyOrdersAtNorce(*some(2))

    async def work() -> list[str]:
        async def candidates() -> AsyncIterator[Candidate]:
            for order_id in ("o1", "o1", "o2"):
                yield Candidate(order_id)

        account = Account(base_url="http://norce/checkout", tokens=(Secret("a token"),))
        client = Norce({"norce": account}, adapter_id="our_adapter", timeout=timedelta(minutes=1), transport=norce)
        registrar = Registrar(configured(tmp_path), client)
        batch = OrderBatch(registrar, client, CHANNEL, removes=False, dry_run=False, stop=asyncio.Event())
        return [each.order_id async for each in batch.handle(candidates())]

    assert sorted(run(work())) == ["o1", "o2"]
