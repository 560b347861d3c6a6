"""Registration on one order: what is added, what is removed, and whose callbacks stay."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.norce.client import NorceRejected, OrderNotFound
from adapter.registrations.on_channels import static_notifications
from adapter.registrations.on_orders import Registered, Registrar, registrations
from tests.registrations.stage import CHANNEL, OURS, TREE, Valid, configured, opened
from tests.simulators import Shop, shop


class Far(Valid):
    """Others are served meanwhile."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        return await super().handle_async_request(request)


class Picky(Valid):
    """Takes no validations."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/validations"):
            return httpx.Response(400, json={"code": "order-validation", "message": "not here"})
        return await super().handle_async_request(request)


class Twice(Valid):
    """Somebody else takes away the same, a moment before."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            await super().handle_async_request(request)
        return await super().handle_async_request(request)


def registered(norce: Shop, config: Config, order_id: str) -> Registered:
    with opened(norce, config.norce.version) as client:
        return norce.loop.run(Registrar(config, client).register(CHANNEL, order_id))


def ours_on(norce: Shop, order_id: str) -> dict[str, list[dict[str, Any]]]:
    order = norce.read(order_id)
    places = ("validations", "hooks", "notifications")
    return {place: [each for each in order[place] if each.get("adapterId") == "our_adapter"] for place in places}


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_all_callbacks_are_put_on_an_order_once_however_often_it_is_asked(tmp_path: Path, version: str) -> None:
    config = configured(tmp_path, norce={"version": version})
    with shop() as norce:
        order_id = norce.create()

        first = registered(norce, config, order_id)
        before = ours_on(norce, order_id)
        again = registered(norce, config, order_id)

        assert first == Registered(added=OURS)
        assert again == Registered(kept=OURS)
        assert ours_on(norce, order_id) == before
        assert [len(each) for each in before.values()] == [1, 1, 1]


def test_what_was_registered_with_one_version_is_known_with_the_other(tmp_path: Path) -> None:
    with shop() as norce:
        order_id = norce.create()

        registered(norce, configured(tmp_path, norce={"version": "v1"}), order_id)

        assert registered(norce, configured(tmp_path, norce={"version": "v0"}), order_id) == Registered(kept=OURS)


def test_what_is_on_the_order_is_what_norce_documents(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)

        order = norce.read(order_id)

    def signed(name: str) -> str:
        return Senders(config.senders).signed_url("http://127.0.0.1:8080", CHANNEL, order_id, name)

    [validation], [hook], [notification] = order["validations"], order["hooks"], order["notifications"]
    for each in (validation, hook, notification):
        del each["id"]
    assert validation == {"adapterId": "our_adapter", "url": signed("order-rules")}
    assert hook == {
        "adapterId": "our_adapter",
        "subscribeTo": "/cart",
        "target": "/cart",
        "invoke": signed("cart-changed"),
        "version": "v0",
    }
    del notification["description"]
    assert notification == {
        "adapterId": "our_adapter",
        "reference": "order-status",
        "scope": "/state/currentStatus",
        "schema": {"const": "completed"},
        "invoke": signed("order-status"),
        "version": "v0",
    }


def test_what_is_stale_goes_and_what_is_missing_comes(tmp_path: Path) -> None:
    with shop() as norce:
        order_id = norce.create()
        registered(norce, configured(tmp_path), order_id)
        callbacks = TREE["callbacks"] | {
            "order-status": {"kind": "notification", "scope": "/cart"},
            "addresses": {"kind": "hook", "watch": "/customer"},
        }
        del callbacks["order-rules"]

        done = registered(norce, configured(tmp_path, callbacks=callbacks), order_id)

        assert done.added == ("addresses", "order-status")
        assert done.kept == ("cart-changed",)
        assert len(done.removed) == 2
        assert "order-status" in done.removed
        ours = ours_on(norce, order_id)
        assert ours["validations"] == []
        assert sorted(each["subscribeTo"] for each in ours["hooks"]) == ["/cart", "/customer"]
        assert [each["scope"] for each in ours["notifications"]] == ["/cart"]


def test_one_that_is_there_twice_is_taken_away_once(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)
        [notification] = ours_on(norce, order_id)["notifications"]
        norce.ask("add_notification", {k: v for k, v in notification.items() if k != "id"}, order_id=order_id)

        assert registered(norce, config, order_id) == Registered(removed=("order-status",), kept=OURS)
        assert len(ours_on(norce, order_id)["notifications"]) == 1


def test_one_that_norce_refuses_keeps_no_other_away(tmp_path: Path) -> None:
    """An order without its notification is one that nobody exports, and no event log shows."""
    callbacks = dict(sorted(TREE["callbacks"].items(), key=lambda each: each[0] != "order-rules"))
    with shop() as norce, opened(norce, transport=Picky(norce.simulator)) as client:
        order_id = norce.create()
        registrar = Registrar(configured(tmp_path, callbacks=callbacks), client)

        with pytest.raises(NorceRejected, match="order-validation"):
            norce.loop.run(registrar.register(CHANNEL, order_id))

        assert [len(each) for each in ours_on(norce, order_id).values()] == [0, 1, 1]


def test_two_who_register_at_the_same_moment_put_each_there_once(tmp_path: Path) -> None:
    """A shop that does not wait for the answer, and asks again: a hook that is there twice patches twice."""
    with shop() as norce, opened(norce, transport=Far(norce.simulator)) as client:
        order_id = norce.create()
        registrar = Registrar(configured(tmp_path), client)

        async def both() -> list[Registered]:
            return await asyncio.gather(*(registrar.register(CHANNEL, order_id) for _ in range(2)))

        done = norce.loop.run(both())

        assert done == [Registered(added=OURS), Registered(kept=OURS)]
        assert [len(each) for each in ours_on(norce, order_id).values()] == [1, 1, 1]


def test_what_is_no_address_is_taken_away_like_any_other(tmp_path: Path) -> None:
    config = configured(tmp_path)
    odd = {"adapterId": "our_adapter", "scope": "/cart", "invoke": "http://[x/no-callback-of-ours"}
    with shop() as norce:
        order_id = norce.create(notifications=[odd])
        [there] = ours_on(norce, order_id)["notifications"]

        assert registered(norce, config, order_id) == Registered(added=OURS, removed=(there["id"],))


def test_two_who_take_the_same_away_are_both_done(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce, opened(norce, transport=Twice(norce.simulator)) as client:
        order_id = norce.create()
        registered(norce, config, order_id)

        done = norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))

        assert done == Registered(removed=OURS)
        assert ours_on(norce, order_id) == {"validations": [], "hooks": [], "notifications": []}


def test_a_key_that_is_still_good_is_good_enough_and_a_retired_one_is_stale(tmp_path: Path) -> None:
    both = {"signed_urls": {"keys": {"new": "${env:NEW}", "old": "${env:OLD}"}}}
    new = {"signed_urls": {"keys": {"new": "${env:NEW}"}}}
    with shop() as norce:
        order_id = norce.create()
        registered(norce, configured(tmp_path), order_id)

        assert registered(norce, configured(tmp_path, senders=both), order_id) == Registered(kept=OURS)
        assert registered(norce, configured(tmp_path, senders=new), order_id) == Registered(added=OURS, removed=OURS)
        for entries in ours_on(norce, order_id).values():
            assert ["key=new" in str(each) for each in entries] == [True]


def test_a_signature_that_was_changed_is_stale(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)
        [validation] = ours_on(norce, order_id)["validations"]
        forged = {**validation, "url": validation["url"][:-1]}
        norce.ask("put_validation", forged, order_id=order_id, validation_id=validation["id"], status=200)

        done = registered(norce, config, order_id)

        assert (done.added, done.removed) == (("order-rules",), ("order-rules",))


def test_nobody_elses_are_touched(tmp_path: Path) -> None:
    config = configured(tmp_path)
    others = [{"adapterId": "another_adapter", "scope": "/cart", "invoke": "http://127.0.0.1:9/order-status"}]
    anonymous = [{"subscribeTo": "/cart", "invoke": "http://127.0.0.1:9/hook"}]
    with shop() as norce:
        order_id = norce.create(notifications=others, hooks=anonymous)
        before = norce.read(order_id)

        registered(norce, config, order_id)
        with opened(norce) as client:
            off = norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))
            again = norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))

        assert off == Registered(removed=OURS)
        assert again == Registered()
        after = norce.read(order_id)
        for place in ("validations", "hooks", "notifications"):
            assert after[place] == before[place]


def test_a_notification_of_the_channels_configuration_is_enough(tmp_path: Path) -> None:
    senders = TREE["senders"] | {"url_secrets": [{"parameter": "secret", "values": ["${env:STATIC}"]}]}
    config = configured(tmp_path, senders=senders)
    [standing] = static_notifications(config, "norce")
    with shop() as norce:
        order_id = norce.create(notifications=[standing])

        done = registered(norce, config, order_id)

        assert done == Registered(added=("cart-changed", "order-rules"), kept=OURS[2:])
        assert standing["invoke"] == (
            "{configuration.adapter.internalUrl}/api/v1/callbacks/orders/{order.id}/order-status"
            "?secret={configuration.callbacks.secret}"
        )


def test_without_a_key_nothing_can_be_registered(tmp_path: Path) -> None:
    config = configured(tmp_path, senders={"url_secrets": [{"parameter": "secret", "values": ["${env:STATIC}"]}]})

    with pytest.raises(LookupError, match="signed_urls"):
        list(registrations(config, Senders(config.senders), CHANNEL, "o"))


def test_an_order_that_norce_does_not_know_is_not_registered_on(tmp_path: Path) -> None:
    with shop() as norce, pytest.raises(OrderNotFound):
        registered(norce, configured(tmp_path), "nobody")
