"""The callbacks of the simulator: what it sends, how it takes the answers, and that it calls only this machine."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from adapter.norce.api import CHANNEL, MERCHANT
from adapter.sandbox.norce import Simulator
from tests.simulators import PRICE, SAMPLE, Shop, shop, validator

REFUSAL = httpx.Response(400, json=[{"adapterId": "a", "code": "too-cold", "message": "It is too cold."}])


@pytest.fixture
def norce() -> Iterator[Shop]:
    with shop() as made:
        yield made


async def never(_request: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("no connection", request=request)


# --- validations ------------------------------------------------------------------------------------------------------


def validate(norce: Shop, *answers: Any, order_id: str | None = None) -> httpx.Response:
    """Return the answer of `validate` for a paid order with a validation for each answer."""
    order_id = order_id or norce.create()
    norce.pay(order_id)
    for number, answer in enumerate(answers):
        url = norce.receiver.to(f"/v{number}", answer)
        norce.ask("add_validation", {"adapterId": f"a{number}", "url": url}, order_id=order_id, status=200)
    return norce.ask("validate", order_id=order_id)


@pytest.mark.parametrize(
    ("answer", "codes"),
    [
        (None, None),
        (httpx.Response(204), None),
        (REFUSAL, [("a", "too-cold")]),
        (httpx.Response(400, json=[{"code": "x"}, {"message": 1}]), [("a0", "x"), ("a0", "validation-failed")]),
        (httpx.Response(400), [("a0", "validation-failed")]),
        (httpx.Response(400, json={"code": "order-not-found"}), [("a0", "validation-failed")]),
        (httpx.Response(404, json={"code": "order-not-found"}), [("a0", "validation-failed")]),
        (httpx.Response(302, headers={"location": "/elsewhere"}), [("a0", "validation-failed")]),
        (httpx.Response(500), [("a0", "validation-failed")]),
        (unreachable, [("a0", "validation-failed")]),
        (httpx.Response(200, content=b"x" * 3_000_000), [("a0", "validation-failed")]),
    ],
)
def test_only_a_success_lets_an_order_pass(norce: Shop, answer: Any, codes: Any) -> None:
    got = validate(norce, answer)

    assert got.status_code == (400 if codes else 200)
    assert not codes or [(each["adapterId"], each["code"]) for each in got.json()] == codes


def test_validations_run_in_parallel_and_their_errors_are_one_list(norce: Shop) -> None:
    meeting = [asyncio.Event(), asyncio.Event()]

    def meets(mine: int) -> Callable[[httpx.Request], Any]:
        async def answer(_request: httpx.Request) -> httpx.Response:
            meeting[mine].set()
            await meeting[1 - mine].wait()
            return httpx.Response(400, json=[{"code": f"c{mine}"}])

        return answer

    got = validate(norce, meets(0), meets(1), order_id=norce.create(cart={"items": []}))

    assert [each["code"] for each in got.json()] == ["cart-empty", "payment-amount-mismatch", "c0", "c1"]


def test_a_late_validation_passes(norce: Shop) -> None:
    norce.simulator.set_switches(validation_seconds=0.02)

    assert validate(norce, never).status_code == 200
    assert validate(norce, never, REFUSAL).status_code == 400


@pytest.mark.parametrize(
    ("payments", "codes"),
    [
        ([], ["payment-missing"]),
        ([{"amount": 100}], ["payment-amount-mismatch"]),
        ([{"amount": 100}, {"amount": 50, "type": "voucher"}], []),
        ([{"amount": 150}, {"amount": 50, "state": "removed"}], []),
        ([{"amount": 150, "state": "removed"}], ["payment-missing"]),
        ([{"amount": 150.01}], ["payment-amount-mismatch"]),
        ([{"amount": 149.9}, {"amount": 0.1}], []),
    ],
)
def test_payments_must_add_up_to_the_total(norce: Shop, payments: Any, codes: list[str]) -> None:
    order_id = norce.create()
    for each in payments:
        norce.pay(order_id, **each)

    answer = norce.ask("validate", order_id=order_id)

    assert [each["code"] for each in (answer.json() if answer.content else ())] == codes


def test_a_validation_has_norces_headers_and_no_body(norce: Shop) -> None:
    validate(norce, None)
    norce.simulator.set_switches(callback_authorization="Bearer s")
    validate(norce, None)

    first, second = norce.receiver.got
    assert (first.method, first.content, first.headers[MERCHANT], first.headers[CHANNEL]) == ("POST", b"", "norce", "1")
    assert "authorization" not in first.headers
    assert second.headers["authorization"] == "Bearer s"


# --- hooks ------------------------------------------------------------------------------------------------------------


def hook(norce: Shop, order_id: str, path: str, scope: str, answer: Any, **members: Any) -> None:
    body = {"adapterId": "a", "scope": scope, "invoke": norce.receiver.to(path, answer), "version": "v0"} | members
    norce.ask("add_hook", body, version="v1", order_id=order_id, status=200)


def paths(norce: Shop) -> list[str]:
    return [each.url.path for each in norce.receiver.got]


def test_a_hook_sees_the_change_before_it_is_stored(norce: Shop) -> None:
    order_id = norce.create()
    stored: list[Any] = []

    def look(_request: httpx.Request) -> list[Any]:
        stored.append(norce.simulator.order(order_id)["cart"]["items"])
        return []

    hook(norce, order_id, "/h", "/cart", look)
    norce.ask("put_cart", {"items": []}, order_id=order_id, status=200)

    [body] = norce.receiver.bodies("/h")
    assert body["cart"]["items"] == []
    assert len(stored[0]) == 2
    assert validator("order").is_valid(body)
    assert body["lastModified"] == norce.read(order_id)["lastModified"]


@pytest.mark.parametrize(
    ("scope", "name", "body", "calls"),
    [
        ("/cart", "put_cart", {"items": []}, 1),
        ("/cart/total/includingVat", "put_cart", {"items": []}, 1),
        ("/cart/attributes", "put_cart", {"items": []}, 0),
        ("/customer", "put_billing", {"city": "Umeå"}, 1),
        ("/customer/shipping", "put_billing", {"city": "Umeå"}, 0),
        ("/state/currentStatus", "put_state", {"currentStatus": "processing"}, 1),
        ("/state", "put_state", {"currentStatus": "checkout"}, 0),
        ("/payments", "add_payment", {"amount": 1}, 1),
        ("/shippings", "add_shipping", {"total": PRICE, "vatRate": 0}, 1),
        ("/consents", "patch_consents", [{"id": "c1", "checked": True}], 1),
        ("/reference", "put_reference", "r", 1),
        ("/attributes", "patch_attributes", {"a": 1}, 0),
        ("/total", "put_cart", {"items": []}, 0),
    ],
)
def test_a_hook_is_called_when_its_scope_changes(norce: Shop, scope: str, name: str, body: Any, calls: int) -> None:
    order_id = norce.create(consents=[{"id": "c1"}])
    hook(norce, order_id, "/h", scope, [])

    assert norce.ask(name, body, order_id=order_id).is_success
    assert len(norce.receiver.got) == calls


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (httpx.Response(400, json={"code": "cart-locked", "message": "No."}), "cart-locked"),
        (httpx.Response(400), "order-error"),
        (httpx.Response(404, json={"code": "order-not-found"}), "order-error"),
        (httpx.Response(418), "order-error"),
        (unreachable, "order-error"),
        (never, "order-error"),
        ({"op": "add"}, "order-error"),
        (httpx.Response(200, content=b"nonsense"), "order-error"),
        ([{"op": "replace", "path": "/cart/no/such", "value": 1}], "order-error"),
        ([{"op": "replace", "path": "/cart/items", "value": 1}], "order-error"),
        ([{"op": "remove", "path": "/cart"}], "order-error"),
        ([{"op": "test", "path": "/cart/items", "value": 1}], "order-error"),
        ([{"op": "bless", "path": "/cart/items"}], "order-error"),
        ([{"op": "add", "path": "/cart/items/-", "value": {"quantity": "many"}}], "order-error"),
    ],
)
def test_a_change_is_not_stored_if_a_hook_does_not_agree(norce: Shop, answer: Any, code: str) -> None:
    norce.simulator.set_switches(hook_seconds=0.02)
    order_id = norce.create()
    hook(norce, order_id, "/first", "/cart", [{"op": "add", "path": "/cart/attributes/a", "value": 1}], target="/cart")
    hook(norce, order_id, "/h", "/cart", answer, target="/cart")
    before = norce.read(order_id)

    refused = norce.ask("put_cart", {"items": []}, order_id=order_id, status=400)

    assert refused.json()["code"] == code
    assert norce.read(order_id) == before


def test_a_patch_is_stored_with_the_change_and_calls_further_hooks(norce: Shop) -> None:
    order_id = norce.create()
    payment_id = norce.pay(order_id)

    def covered(request: httpx.Request) -> list[dict[str, Any]]:
        total = norce.receiver.bodies("/payment")[-1]["total"]["includingVat"]
        return [{"op": "replace", "path": "/payments/0/amount", "value": total}]

    hook(norce, order_id, "/payment", "/cart", covered, target="/payments")
    hook(norce, order_id, "/watcher", "/payments", [])

    norce.ask("put_cart", {"items": [{"total": {"includingVat": 80}}]}, order_id=order_id, status=200)

    order = norce.read(order_id)
    assert (order["payments"][0]["id"], order["payments"][0]["amount"]) == (payment_id, 80)
    assert paths(norce) == ["/payment", "/watcher"]
    assert norce.receiver.bodies("/watcher")[0]["payments"][0]["amount"] == 80


def test_a_hook_is_called_for_its_own_patch_until_it_patches_nothing_more(norce: Shop) -> None:
    order_id = norce.create()
    wish = [{"op": "add", "path": "/cart/attributes/seen", "value": True}]
    hook(norce, order_id, "/h", "/cart", wish, target="/cart")

    norce.ask("put_cart", {"items": []}, order_id=order_id, status=200)

    assert len(norce.receiver.got) == 2


def test_hooks_that_never_agree_refuse_the_change(norce: Shop) -> None:
    order_id = norce.create()
    for which in "ab":
        counter = iter(range(100))

        def count(_request: httpx.Request, counter: Iterator[int] = counter, which: str = which) -> Any:
            return [{"op": "add", "path": f"/cart/attributes/{which}", "value": next(counter)}]

        hook(norce, order_id, f"/{which}", "/cart", count, target="/cart")

    refused = norce.ask("put_cart", {"items": []}, order_id=order_id, status=400)

    assert "rounds" in refused.json()["message"]
    assert len(norce.receiver.got) == 20


def test_the_hooks_of_the_adapter_that_makes_the_change_are_not_called(norce: Shop) -> None:
    order_id = norce.create()
    hook(norce, order_id, "/own", "/reference", [])
    hook(norce, order_id, "/other", "/reference", [], adapterId="b")

    norce.ask("put_reference", "1", headers={"x-adapterid": "a"}, order_id=order_id, status=200)

    assert paths(norce) == ["/other"]


def test_hooks_are_called_by_the_part_that_they_watch(norce: Shop) -> None:
    order_id = norce.create()
    hook(norce, order_id, "/pay", "/state/transitions", [], target="/payments")
    hook(norce, order_id, "/late", "/state", [], target="/shippings")
    hook(norce, order_id, "/cart", "/state", [], target="/cart")

    norce.move(order_id, "processing")

    assert paths(norce) == ["/cart", "/late", "/pay"]


def test_a_patch_outside_the_target_is_dropped(norce: Shop) -> None:
    patches = [
        {"op": "add", "path": "/cart/attributes/in", "value": 1},
        {"op": "copy", "from": "/cart/items/0/total", "path": "/cart/attributes/copied"},
        {"op": "add", "path": "/customer", "value": {"type": "person"}},
        {"op": "add", "path": "/merchant", "value": "another"},
        {"op": "move", "from": "/customer", "path": "/cart/attributes/moved"},
    ]
    order_id = norce.create(customer={"type": "organization"})
    hook(norce, order_id, "/h", "/reference", patches, target="/cart")

    norce.ask("put_reference", "r", order_id=order_id, status=200)

    order = norce.read(order_id)
    assert order["cart"]["attributes"] == {"in": 1, "copied": {"includingVat": 100}}
    assert (order["customer"]["type"], order["merchant"]) == ("organization", "norce")


def test_a_patch_cannot_break_the_rules_of_the_state(norce: Shop) -> None:
    order_id = norce.create()
    patches = [{"op": "replace", "path": "/state", "value": {"currentStatus": "accepted", "transitions": []}}]
    hook(norce, order_id, "/h", "/state", patches, target="/state")
    norce.ask("put_state", {"currentStatus": "processing"}, order_id=order_id, status=400)
    norce.receiver.to("/h", [{"op": "replace", "path": "/state/currentStatus", "value": "removed"}])

    norce.move(order_id, "processing")

    assert [each["status"] for each in norce.read(order_id)["state"]["transitions"]] == ["checkout", "removed"]


def write_attributes(norce: Shop, order_id: str, **attributes: Any) -> Callable[[httpx.Request], Any]:
    """Return the answer of a hook that changes the order through the API; counts `n` up."""
    counter = iter(range(100))

    async def answer(_request: httpx.Request) -> httpx.Response:
        url = f"http://simulator/checkout/order/api/v0/checkout/orders/{order_id}/attributes"
        await norce.http.patch(url, json=attributes or {"n": next(counter)}, headers=norce.headers)
        return httpx.Response(200, json=[])

    return answer


def test_a_hook_may_change_the_same_order_through_the_api(norce: Shop) -> None:
    order_id = norce.create()
    hook(norce, order_id, "/h", "/reference", write_attributes(norce, order_id, written=True))

    norce.ask("put_reference", "r", order_id=order_id, status=200)

    order = norce.read(order_id)
    assert (order["reference"], order["attributes"]) == ("r", {"written": True})


def test_a_change_that_is_always_overtaken_is_a_conflict(norce: Shop) -> None:
    order_id = norce.create()
    hook(norce, order_id, "/h", "/reference", write_attributes(norce, order_id))

    assert norce.ask("put_reference", "r", order_id=order_id, status=409).json()["code"] == "order-conflict"


# --- notifications ----------------------------------------------------------------------------------------------------


def notify(norce: Shop, order_id: str, path: str = "/n", **members: Any) -> None:
    body = {"adapterId": "a", "reference": "r", "scope": "/state/currentStatus"}
    body |= {"invoke": norce.receiver.to(path, None), "version": "v0"} | members
    norce.ask("add_notification", body, order_id=order_id, status=200)


def walk(norce: Shop, order_id: str) -> None:
    norce.move(order_id, "processing", "checkout", "processing", "accepted", "completed")


@pytest.mark.parametrize(
    ("scope", "schema", "statuses"),
    [
        ("/state/currentStatus", {"const": "completed"}, ["completed"]),
        ("/state/currentStatus", {"enum": ["accepted", "completed"]}, ["accepted", "completed"]),
        ("/state/currentStatus", {"const": "processing"}, ["processing", "processing"]),
        ("/state/currentStatus", None, ["processing", "checkout", "processing", "accepted", "completed"]),
        ("/state", True, ["processing", "checkout", "processing", "accepted", "completed"]),
        ("/state/currentStatus", False, []),
        ("/cart", None, []),
    ],
)
def test_a_notification_is_sent_for_a_change_that_fits_its_schema(
    norce: Shop, scope: str, schema: Any, statuses: list[str]
) -> None:
    order_id = norce.create()
    notify(norce, order_id, scope=scope, schema=schema)

    walk(norce, order_id)

    assert [each["state"]["currentStatus"] for each in norce.receiver.bodies("/n")] == statuses
    assert all(validator("order").is_valid(each) for each in norce.receiver.bodies("/n"))


@pytest.mark.parametrize("kind", ["validations", "hooks", "notifications"])
@pytest.mark.parametrize("members", [{"scope": {"state": ["completed"]}}, {"version": "v2"}, {"invoke": 1}])
def test_an_order_is_not_created_with_a_registration_that_could_not_be_added(
    norce: Shop, kind: str, members: dict[str, Any]
) -> None:
    is_member = kind != "validations" or "invoke" in members

    norce.ask("create_order", {kind: [members]}, status=400 if is_member else 201)


def test_a_refused_change_sends_no_notification(norce: Shop) -> None:
    order_id = norce.create()
    notify(norce, order_id, scope="/cart")
    hook(norce, order_id, "/h", "/cart", httpx.Response(400))

    norce.ask("put_cart", {"items": []}, order_id=order_id, status=400)

    assert norce.simulator.events() == []


def test_an_event_records_its_attempts_and_can_be_retried(norce: Shop) -> None:
    order_id = norce.create()
    notify(norce, order_id, schema={"const": "processing"})
    norce.receiver.to("/n", httpx.Response(503, content=b"busy"))
    norce.move(order_id, "processing")
    [event] = norce.ask("list_events", query={"order_id": order_id}, status=200).json()["data"]
    assert [(each["status"], each["response"]) for each in event["attempts"]] == [(503, "busy")]
    norce.receiver.to("/n", None)

    norce.ask("retry_event", event_id=event["id"], status=200)

    again = norce.ask("read_event", event_id=event["id"], status=200).json()
    assert [each["status"] for each in again["attempts"]] == [503, 200]
    assert again["payload"] == event["payload"]
    assert again["payload"]["order"]["state"]["currentStatus"] == "processing"
    assert event["id"][14] == "7"


def test_events_are_filtered_and_paged(norce: Shop) -> None:
    ids = [norce.create() for _ in range(3)]
    for number, order_id in enumerate(ids):
        notify(norce, order_id, reference=f"r{number}", adapterId="a" if number else "b")
        walk(norce, order_id)

    def found(**query: Any) -> list[str]:
        events: list[Any] = []
        while page := norce.ask("list_events", query=query | {"offset": len(events)}, status=200).json()["data"]:
            events += page
        return [each["orderId"] for each in events]

    assert found() == [each for each in reversed(ids) for _ in range(5)]
    assert found(order_id=ids[1]) == found(orderId=ids[1]) == found(reference="r1") == [ids[1]] * 5
    assert found(adapter_id="b", channel="1", limit=2) == [ids[0]] * 5
    assert found(channel="2") == []
    assert norce.ask("list_events", headers={MERCHANT: "another"}).json()["pagination"]["totalSize"] == 0
    assert norce.ask("list_events").json()["pagination"] == {"offset": 0, "limit": 10, "size": 10, "totalSize": 15}


def test_static_notifications_are_added_to_every_new_order_of_their_channel(norce: Shop) -> None:
    url = norce.receiver.to("/static", None)
    static = {"scope": "/state/currentStatus", "invoke": url, "description": "Every order's."}
    document = {"$schema": "https://x.example/openapi/v1/schemas/configuration.json", "id": "static_notifications"}
    path = {"merchant": "norce", "channel": "1", "name": "static_notifications"}
    order = {"notifications": [static], "validations": [{"url": url}], "hooks": []}
    norce.ask("put_configuration", document | {"order": order}, **path, status=200)

    with_static, elsewhere = norce.create(), norce.ask("create_order", {}, headers={CHANNEL: "2"}).json()["id"]
    norce.move(with_static, "processing")

    assert paths(norce) == ["/static"]
    assert norce.simulator.order(elsewhere)["notifications"] == []
    assert norce.read(with_static)["validations"] == []
    norce.ask("put_configuration", document | {"order": order, "active": False}, **path, status=200)
    assert norce.read(norce.create())["notifications"] == []


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("http://127.0.0.1:9/{order.id}", "/ORDER"),
        ("http://127.0.0.1:9/{order_id}", "/ORDER"),
        ("http://127.0.0.1:9/{order.cart.reference}", "/a%2Fb"),
        ("{configuration.adapter.internalUrl}/{order.id}", "/in/ORDER"),
        ("{config.adapter.publicUrl}/n", "/out/n"),
        ("http://127.0.0.1:9/{order.nothing}", "/%7Border.nothing%7D"),
        ("{configuration.nothing}/n", None),
        ("{config.adapter}/n", None),
    ],
)
def test_placeholders_are_filled_from_the_order_and_the_adapters_configuration(
    norce: Shop, template: str, path: str | None
) -> None:
    adapter = {"publicUrl": "http://127.0.0.1:9/out", "internalUrl": "http://127.0.0.1:9/in"}
    document = {"$schema": "https://x.example/openapi/v1/schemas/a.json", "id": "a", "adapter": adapter}
    norce.ask("put_configuration", document, merchant="norce", channel="1", name="a", status=200)
    order_id = norce.create(cart={"reference": "a/b", "items": []})
    notify(norce, order_id, invoke=template)

    norce.move(order_id, "processing")

    called = [each.url.raw_path.decode() for each in norce.receiver.got]
    assert called == ([path.replace("ORDER", order_id)] if path else [])
    [event] = norce.simulator.events()
    assert event["payload"]["notification"]["invoke"] == template


@pytest.mark.parametrize(
    ("switches", "answer", "attempts", "slept"),
    [
        ({}, httpx.Response(500), [500], []),
        ({"notification_retries": 2}, httpx.Response(500), [500, 500, 500], [7, 7]),
        ({"notification_retries": 2}, httpx.Response(202), [202], []),
        ({"notification_retries": 1}, httpx.Response(206), [206, 206], [7]),
        ({}, unreachable, [None], []),
        ({"notifications_lost": 1}, None, [], []),
        ({"notifications_doubled": 1}, None, [200, 200], []),
        ({"notifications_reordered": 1}, None, [200], [1]),
    ],
)
def test_the_switches_decide_how_often_a_notification_is_sent(
    norce: Shop, switches: Any, answer: Any, attempts: list[Any], slept: list[float]
) -> None:
    order_id = norce.create()
    notify(norce, order_id)
    norce.receiver.to("/n", answer)
    norce.simulator.set_switches(**{"notification_retry_seconds": 7} | switches)

    norce.move(order_id, "processing")

    [event] = norce.simulator.events()
    assert [each["status"] for each in event["attempts"]] == attempts
    assert norce.clock.slept == slept


def test_the_next_notification_passes_one_that_is_held_back() -> None:
    delivered = asyncio.Event()

    async def hold(_seconds: float) -> None:
        await delivered.wait()

    def take(_request: httpx.Request) -> None:
        delivered.set()

    with shop(sleep=hold) as norce:
        order_id = norce.create()
        notify(norce, order_id)
        norce.receiver.to("/n", take)

        async def both() -> None:
            url = f"http://simulator/checkout/order/api/v0/checkout/orders/{order_id}/state"
            for status, share in ("processing", 1), ("accepted", 0):
                norce.simulator.set_switches(notifications_reordered=share)
                await norce.http.put(url, json={"currentStatus": status}, headers=norce.headers)
                await asyncio.sleep(0)
            await norce.simulator.wait_until_idle()

        norce.loop.run(both())

        assert [each["state"]["currentStatus"] for each in norce.receiver.bodies("/n")] == ["accepted", "processing"]


def test_a_delay_is_in_seconds(norce: Shop) -> None:
    order_id = norce.create()
    notify(norce, order_id, delay=3)

    norce.move(order_id, "processing")

    assert (norce.clock.slept, len(norce.receiver.got)) == ([3], 1)


def test_the_body_is_the_order_or_an_envelope_in_the_requested_version(norce: Shop) -> None:
    order_id = norce.create()
    notify(norce, order_id, "/v0")
    notify(norce, order_id, "/v1", version="v1")
    notify(norce, order_id, "/none", version=None)
    norce.ask("add_validation", {"invoke": "http://127.0.0.1:9/v"}, version="v1", order_id=order_id)
    norce.move(order_id, "processing")
    words = {each: norce.receiver.bodies(each)[0]["validations"][0] for each in ("/v0", "/v1", "/none")}
    assert {each: "url" in words[each] for each in words} == {"/v0": True, "/v1": False, "/none": True}
    norce.simulator.set_switches(notification_body="envelope")

    norce.move(order_id, "accepted")

    envelope = norce.receiver.bodies("/v0")[1]
    assert (envelope["notification"]["reference"], envelope["order"]["id"]) == ("r", order_id)
    assert norce.simulator.events()[-1]["payload"]["order"] == norce.receiver.bodies("/none")[1]["order"]


def test_the_adapters_own_changes_send_notifications_and_equal_writes_do_not(norce: Shop) -> None:
    order_id, own = norce.create(), {"x-adapterid": "a"}
    notify(norce, order_id, scope="/reference")
    hook(norce, order_id, "/h", "/reference", [], adapterId="b")

    for _ in range(2):
        norce.ask("put_reference", "1", headers=own, order_id=order_id, status=200)

    assert paths(norce) == ["/h", "/n"]


# --- only this machine is called --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://specific-feature-adapter.norce.io/api/v1/callbacks/orders/{order_id}/specific-callback",
        "https://10.0.0.1/",
        "http://0.0.0.0:9/",
        "http://[2001:db8::1]/",
        "http://127.0.0.1.example.com/",
        "http://localhost.example.com/",
        "http://127.0.0.1@example.com/",
        "//127.0.0.1/",
        "ftp://127.0.0.1/",
        "{configuration.adapter.internalUrl}/x",
        "no address",
        "http://",
        "",
        "http://127.0.0.1:9/\x00",
    ],
)
def test_only_this_machine_is_called(url: str) -> None:
    with shop() as norce:
        order_id = norce.create(SAMPLE | {"validations": [], "hooks": [], "notifications": []})
        norce.ask("add_validation", {"adapterId": "a", "url": url}, order_id=order_id)
        norce.ask("add_notification", {"scope": "/state/currentStatus", "invoke": url}, order_id=order_id)
        norce.ask("validate", order_id=order_id, status=400)
        norce.move(order_id, "processing")
        norce.ask("put_configuration", {"$schema": url, "id": "a"}, merchant="norce", channel="1", name="a")

        assert norce.receiver.got == []
        [event] = norce.simulator.events()
        assert event["attempts"][0]["status"] is None
        assert event["attempts"][0]["reason"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_every_name_of_this_machine_is_called(norce: Shop, host: str) -> None:
    order_id = norce.create()
    notify(norce, order_id, invoke=f"http://{host}:9/n")

    norce.move(order_id, "processing")

    assert paths(norce) == ["/n"]


def test_a_redirect_is_not_followed(norce: Shop) -> None:
    order_id = norce.create()
    notify(norce, order_id)
    norce.receiver.to("/n", httpx.Response(307, headers={"location": "http://127.0.0.1:9/other"}))

    norce.move(order_id, "processing")

    assert [event["attempts"][0]["status"] for event in norce.simulator.events()] == [307]
    assert paths(norce) == ["/n"]


def test_an_impossible_port_is_an_attempt_without_an_answer() -> None:
    async def attempts() -> list[Any]:
        async with Simulator(token="t") as simulator:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(simulator.app))
            base, headers = "http://simulator/checkout/order/api/v0/checkout/orders", {"authorization": "t"}
            headers |= {MERCHANT: "m", CHANNEL: "c"}
            urls = ("http://127.0.0.1:99999999/", "http://127.0.0.1:0/")
            registered = [{"scope": "/reference", "invoke": url} for url in urls]
            created = await http.post(base, json={"notifications": registered}, headers=headers)
            await http.put(f"{base}/{created.json()['id']}/reference", json="r", headers=headers)
            await simulator.wait_until_idle()
            await http.aclose()
            return [each["attempts"][0]["status"] for each in simulator.events()]

    assert asyncio.run(attempts()) == [None, None]
