"""Registration on one order: what is added, what is removed, and whose callbacks stay."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.norce.client import OrderNotFound
from adapter.registrations.on_channels import static_notifications
from adapter.registrations.on_orders import CallbacksRejected, Registered, Registrar, registrations
from tests.registrations.stage import CHANNEL, OURS, TREE, Valid, configured, opened
from tests.simulators import Shop, shop


class Far(Valid):
    """Lets other tasks run before each request."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        return await super().handle_async_request(request)


class Picky(Valid):
    """Rejects a method for a kind of callback; the body of its answer is no secret of anybody's."""

    def __init__(self, simulator: Any, method: str = "POST", kind: str = "validations", status: int = 400) -> None:
        super().__init__(simulator)
        self._rejected = method, f"/{kind}", status

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        method, kind, status = self._rejected
        if request.method == method and kind in request.url.path:
            return httpx.Response(status, json={"code": "order-validation", "message": "not here"})
        return await super().handle_async_request(request)


class Twice(Valid):
    """Removes every callback just before it is asked to."""

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
def test_repeated_registration_adds_every_callback_once(tmp_path: Path, version: str) -> None:
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


def test_a_registration_with_one_api_version_is_recognised_with_the_other(tmp_path: Path) -> None:
    with shop() as norce:
        order_id = norce.create()

        registered(norce, configured(tmp_path, norce={"version": "v1"}), order_id)

        assert registered(norce, configured(tmp_path, norce={"version": "v0"}), order_id) == Registered(kept=OURS)


def test_registered_callbacks_have_the_documented_form(tmp_path: Path) -> None:
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


def test_stale_callbacks_are_removed_and_missing_ones_added(tmp_path: Path) -> None:
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


def test_a_doubled_callback_is_removed_once(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)
        [notification] = ours_on(norce, order_id)["notifications"]
        norce.ask("add_notification", {k: v for k, v in notification.items() if k != "id"}, order_id=order_id)

        assert registered(norce, config, order_id) == Registered(removed=("order-status",), kept=OURS)
        assert len(ours_on(norce, order_id)["notifications"]) == 1


def test_a_rejected_callback_does_not_prevent_the_others(tmp_path: Path) -> None:
    """An order without its notification is never exported, and the event log does not show it."""
    callbacks = dict(sorted(TREE["callbacks"].items(), key=lambda each: each[0] != "order-rules"))
    with shop() as norce, opened(norce, transport=Picky(norce.simulator)) as client:
        order_id = norce.create()
        registrar = Registrar(configured(tmp_path, callbacks=callbacks), client)

        with pytest.raises(
            CallbacksRejected, match=r"^order-rules: Norce answered 400 .*, order-validation$"
        ) as raised:
            norce.loop.run(registrar.register(CHANNEL, order_id))

        assert raised.value.done == Registered(added=("cart-changed", "order-status"))
        assert [len(each) for each in ours_on(norce, order_id).values()] == [0, 1, 1]


def test_every_rejected_callback_is_named(tmp_path: Path) -> None:
    """v1 declares 403 for a callback that Norce does not take; the token is good, since it has read the order."""
    callbacks = TREE["callbacks"] | {"age": {"kind": "validation"}}
    with shop() as norce, opened(norce, transport=Picky(norce.simulator, status=403)) as client:
        registrar = Registrar(configured(tmp_path, callbacks=callbacks), client)

        with pytest.raises(CallbacksRejected) as raised:
            norce.loop.run(registrar.register(CHANNEL, norce.create()))

    assert set(raised.value.rejected) == {"order-rules", "age"}
    assert raised.value.status == 403
    assert str(raised.value).count("Norce answered 403") == 2


def test_nothing_is_removed_while_norce_rejects_what_takes_its_place(tmp_path: Path) -> None:
    callbacks = TREE["callbacks"] | {"order-status": {"kind": "notification", "scope": "/cart"}}
    with shop() as norce:
        order_id = norce.create()
        registered(norce, configured(tmp_path), order_id)
        with opened(norce, transport=Picky(norce.simulator, kind="notifications")) as client:
            registrar = Registrar(configured(tmp_path, callbacks=callbacks), client)

            with pytest.raises(CallbacksRejected, match="order-status: ") as raised:
                norce.loop.run(registrar.register(CHANNEL, order_id))

        assert raised.value.done == Registered(kept=("cart-changed", "order-rules"))
        assert [each["scope"] for each in ours_on(norce, order_id)["notifications"]] == ["/state/currentStatus"]


def test_a_callback_that_norce_does_not_remove_is_named_and_the_others_are_removed(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)
        with (
            opened(norce, transport=Picky(norce.simulator, "DELETE", "hooks")) as client,
            pytest.raises(CallbacksRejected, match=r"^cart-changed: ") as raised,
        ):
            norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))

        assert raised.value.done == Registered(removed=("order-rules", "order-status"))
        assert [len(each) for each in ours_on(norce, order_id).values()] == [0, 1, 0]


def test_concurrent_registrations_add_each_callback_once(tmp_path: Path) -> None:
    """A shop may repeat a request before it is answered, and a doubled hook patches twice."""
    with shop() as norce, opened(norce, transport=Far(norce.simulator)) as client:
        order_id = norce.create()
        registrar = Registrar(configured(tmp_path), client)

        async def both() -> list[Registered]:
            return await asyncio.gather(*(registrar.register(CHANNEL, order_id) for _ in range(2)))

        done = norce.loop.run(both())

        assert done == [Registered(added=OURS), Registered(kept=OURS)]
        assert [len(each) for each in ours_on(norce, order_id).values()] == [1, 1, 1]


def test_a_callback_with_an_invalid_address_is_removed(tmp_path: Path) -> None:
    config = configured(tmp_path)
    odd = {"adapterId": "our_adapter", "scope": "/cart", "invoke": "http://[x/no-callback-of-ours"}
    with shop() as norce:
        order_id = norce.create(notifications=[odd])
        [there] = ours_on(norce, order_id)["notifications"]

        assert registered(norce, config, order_id) == Registered(added=OURS, removed=(there["id"],))


def test_a_callback_that_somebody_else_removed_counts_as_removed(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce, opened(norce, transport=Twice(norce.simulator)) as client:
        order_id = norce.create()
        registered(norce, config, order_id)

        done = norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))

        assert done == Registered(removed=OURS)
        assert ours_on(norce, order_id) == {"validations": [], "hooks": [], "notifications": []}


def test_a_valid_older_key_is_kept_and_a_retired_one_is_stale(tmp_path: Path) -> None:
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


def test_callbacks_of_others_stay(tmp_path: Path) -> None:
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


def test_a_static_notification_counts_as_registered(tmp_path: Path) -> None:
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
    config = configured(tmp_path, senders={"header_secrets": [{"header": "x-secret", "values": ["${env:STATIC}"]}]})

    with pytest.raises(LookupError, match="signed_urls"):
        list(registrations(config, Senders(config.senders), CHANNEL, "o"))


def test_an_unknown_order_raises_order_not_found(tmp_path: Path) -> None:
    with shop() as norce, pytest.raises(OrderNotFound):
        registered(norce, configured(tmp_path), "nobody")
