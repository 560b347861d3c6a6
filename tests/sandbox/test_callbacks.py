"""`adapter.sandbox.norce`: what it asks and tells others, and that it calls nobody but this machine."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
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


def validated(norce: Shop, *answers: Any, order_id: str | None = None) -> httpx.Response:
    """What `validate` answers for a paid order with a validation for each answer."""
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
    got = validated(norce, answer)

    assert got.status_code == (400 if codes else 200)
    assert not codes or [(each["adapterId"], each["code"]) for each in got.json()] == codes


def test_all_validations_are_asked_at_once_and_their_errors_are_in_one_list(norce: Shop) -> None:
    meeting = [asyncio.Event(), asyncio.Event()]

    def meets(mine: int) -> Callable[[httpx.Request], Any]:
        async def answer(_request: httpx.Request) -> httpx.Response:
            meeting[mine].set()
            await meeting[1 - mine].wait()
            return httpx.Response(400, json=[{"code": f"c{mine}"}])

        return answer

    got = validated(norce, meets(0), meets(1), order_id=norce.create(cart={"items": []}))

    assert [each["code"] for each in got.json()] == ["cart-empty", "payment-amount-mismatch", "c0", "c1"]


@pytest.mark.parametrize(("too_late", "status"), [("approve", 200), ("deny", 400)])
def test_a_validation_that_is_late_fails_open_unless_told_otherwise(norce: Shop, too_late: str, status: int) -> None:
    norce.simulator.throw(validation_seconds=0.02, validation_too_late=too_late)

    assert validated(norce, never).status_code == status
    assert validated(norce, never, REFUSAL).status_code == 400


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
def test_payments_add_up_to_the_total(norce: Shop, payments: Any, codes: list[str]) -> None:
    order_id = norce.create()
    for each in payments:
        norce.pay(order_id, **each)

    answer = norce.ask("validate", order_id=order_id)

    assert [each["code"] for each in (answer.json() if answer.content else ())] == codes


def test_a_validation_is_called_as_norce_does(norce: Shop) -> None:
    validated(norce, None)
    norce.simulator.throw(validation_method="GET", validation_body="order", callback_authorization="Bearer s")
    norce.simulator.throw(callback_merchant_and_channel=False, callback_connections_kept=False)
    validated(norce, None)

    first, second = norce.receiver.got
    assert (first.method, first.content, first.headers[MERCHANT], first.headers[CHANNEL]) == ("POST", b"", "norce", "1")
    assert "authorization" not in first.headers
    assert (second.method, second.headers["authorization"], second.headers["connection"]) == (
        "GET",
        "Bearer s",
        "close",
    )
    assert MERCHANT not in second.headers
    assert validator("order").is_valid(norce.receiver.bodies("/v0")[1])


def test_the_action_of_a_payment_is_called(norce: Shop) -> None:
    path = {"order_id": norce.create()}
    path["payment_id"] = norce.pay(**path)
    actions = [{"adapterId": "p", "type": "capture", "url": norce.receiver.to(*each)} for each in (
        ("/capture", None), ("/refund", httpx.Response(500)))]  # fmt: skip
    norce.ask("add_actions", actions, **path, status=200)
    good, bad = norce.read(path["order_id"])["payments"][0]["actions"]

    norce.ask("execute_action", action_id=good["id"], **path, status=200)

    assert norce.ask("execute_action", action_id=bad["id"], **path, status=400).json()["code"] == "payment-error"
    assert [each.url.path for each in norce.receiver.got] == ["/capture", "/refund"]


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
        ("/consents", "add_consent", {}, 1),
        ("/reference", "put_reference", "r", 1),
        ("/attributes", "patch_attributes", {"a": 1}, 0),
        ("/total", "put_cart", {"items": []}, 0),
    ],
)
def test_a_hook_is_called_when_what_it_watches_changes(
    norce: Shop, scope: str, name: str, body: Any, calls: int
) -> None:
    order_id = norce.create()
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
def test_nothing_is_stored_that_a_hook_does_not_agree_to(norce: Shop, answer: Any, code: str) -> None:
    norce.simulator.throw(hook_seconds=0.02)
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


def test_a_hook_sees_its_own_patch_until_it_wants_nothing_more(norce: Shop) -> None:
    def wish(request: httpx.Request) -> list[dict[str, Any]]:
        return [{"op": "add", "path": "/cart/attributes/seen", "value": True}]

    for switches, calls in ({}, 2), ({"hook_sees_own_patch": False}, 3):
        norce.simulator.throw(**switches)
        order_id = norce.create()
        hook(norce, order_id, "/h", "/cart", wish, target="/cart")
        norce.ask("put_cart", {"items": []}, order_id=order_id, status=200)
        assert len(norce.receiver.got) == calls


def test_hooks_that_never_agree_come_to_an_end(norce: Shop) -> None:
    order_id = norce.create()
    for which in "ab":
        counter = iter(range(100))

        def count(_request: httpx.Request, counter: Iterator[int] = counter, which: str = which) -> Any:
            return [{"op": "add", "path": f"/cart/attributes/{which}", "value": next(counter)}]

        hook(norce, order_id, f"/{which}", "/cart", count, target="/cart")

    refused = norce.ask("put_cart", {"items": []}, order_id=order_id, status=400)

    assert "rounds" in refused.json()["message"]
    assert len(norce.receiver.got) == 20


def test_x_adapterid_leaves_out_the_hooks_of_that_adapter(norce: Shop) -> None:
    order_id = norce.create()
    hook(norce, order_id, "/own", "/reference", [])
    hook(norce, order_id, "/other", "/reference", [], adapterId="b")
    own = {"x-adapterid": "a"}

    norce.ask("put_reference", "1", headers=own, order_id=order_id, status=200)
    assert paths(norce) == ["/other"]
    norce.simulator.throw(adapter_id_skips_hooks=False)
    norce.ask("put_reference", "2", headers=own, order_id=order_id, status=200)
    assert paths(norce) == ["/other", "/own", "/other"]


@pytest.mark.parametrize(
    ("order", "called"),
    [
        ("registered", ["/pay", "/cart", "/late"]),
        ("part", ["/late", "/cart", "/pay"]),
        ("target", ["/late", "/pay", "/cart"]),
    ],
)
def test_hooks_are_called_in_a_set_order(norce: Shop, order: str, called: list[str]) -> None:
    """One hook on the state changes what three others watch, so that all of them are to be asked."""
    norce.simulator.throw(hook_order=order, patch_outside_target="apply")
    order_id = norce.create()
    hook(norce, order_id, "/pay", "/shippings", [], target="/customer")
    hook(norce, order_id, "/cart", "/cart", [], target="/payments")
    hook(norce, order_id, "/late", "/cart", [], target="/consents")
    patches = [
        {"op": "add", "path": "/cart/attributes/x", "value": 1},
        {"op": "add", "path": "/shippings", "value": [{"total": PRICE, "vatRate": 0.25}]},
    ]
    hook(norce, order_id, "/seed", "/state", patches, target="/state")

    norce.move(order_id, "processing")

    assert [each for each in paths(norce) if each != "/seed"] == called


def test_hooks_in_any_order_are_all_called(norce: Shop) -> None:
    norce.simulator.throw(hook_order="random")
    order_id = norce.create()
    for name in "abcd":
        hook(norce, order_id, f"/{name}", "/reference", [])
    orders = set()
    for number in range(20):
        norce.receiver.got.clear()
        norce.ask("put_reference", str(number), order_id=order_id)
        orders.add(tuple(paths(norce)))

    assert len(orders) > 1
    assert all(sorted(each) == ["/a", "/b", "/c", "/d"] for each in orders)


def test_a_patch_outside_the_target_is_dropped_refused_or_applied(norce: Shop) -> None:
    patches = [
        {"op": "add", "path": "/cart/attributes/in", "value": 1},
        {"op": "add", "path": "/customer", "value": {"type": "person"}},
        {"op": "add", "path": "/merchant", "value": "another"},
        {"op": "move", "from": "/customer", "path": "/cart/attributes/moved"},
    ]
    got = {}
    for what in ("drop", "refuse", "apply"):
        norce.simulator.throw(patch_outside_target=what)
        order_id = norce.create(customer={"type": "organization"})
        answers = iter([patches[: 3 if what == "apply" else 4]])
        hook(norce, order_id, "/h", "/reference", lambda _r, answers=answers: next(answers), target="/cart")
        answer = norce.ask("put_reference", "r", order_id=order_id)
        order = norce.read(order_id)
        got[what] = (answer.status_code, order["cart"]["attributes"], order["customer"]["type"], order["merchant"])

    assert got == {
        "drop": (200, {"in": 1}, "organization", "norce"),
        "refuse": (400, {}, "organization", "norce"),
        "apply": (200, {"in": 1}, "person", "norce"),
    }


@pytest.mark.parametrize(
    ("switches", "patch", "status"),
    [
        ({}, {"op": "copy", "from": "/cart/total", "path": "/cart/attributes/t"}, 200),
        ({"patch_operations": "basic"}, {"op": "copy", "from": "/cart/total", "path": "/cart/attributes/t"}, 400),
        ({"patch_operations": "basic"}, {"op": "add", "path": "/cart/items/-", "value": {}}, 200),
        ({"patch_array_positions": False}, {"op": "add", "path": "/cart/items/-", "value": {}}, 400),
        ({"patch_array_positions": False}, {"op": "copy", "from": "/cart/items/0/total", "path": "/cart/total"}, 400),
        ({"patch_array_positions": False}, {"op": "add", "path": "/cart/items", "value": [{}]}, 200),
        ({}, {"op": "copy", "from": "/cart/items/0/total", "path": "/cart/total"}, 200),
        ({}, {"op": "add", "path": "/cart/items/-", "value": {}}, 200),
        ({"hook_scope": "patched"}, {"op": "add", "path": "/cart/attributes/t", "value": 1}, 200),
        ({"hook_failure_blocks": False}, httpx.Response(500), 200),
        ({"hook_failure_blocks": False}, httpx.Response(400), 400),
        ({"hook_on_reference": False}, httpx.Response(400), 200),
    ],
)
def test_hooks_behave_as_they_are_told(norce: Shop, switches: dict[str, Any], patch: Any, status: int) -> None:
    norce.simulator.throw(**switches)
    order_id = norce.create()
    answers = iter([patch if isinstance(patch, httpx.Response) else [patch]])
    hook(norce, order_id, "/h", "/reference", lambda _request: next(answers, []), target="/cart")

    norce.ask("put_reference", "r", order_id=order_id, status=status)


def test_a_hook_may_see_the_order_as_it_is_and_its_own_refusal_be_kept_back(norce: Shop) -> None:
    norce.simulator.throw(hook_sees="current", hook_refusal_passed_on=False, hook_on_attributes=True)
    order_id = norce.create()
    hook(norce, order_id, "/h", "/attributes", httpx.Response(400, json={"code": "mine"}), version="v1")

    refused = norce.ask("patch_attributes", {"a": 1}, order_id=order_id, status=400)

    assert refused.json()["code"] == "order-error"
    assert norce.receiver.bodies("/h")[0]["attributes"] == {}
    assert "scope" in norce.receiver.bodies("/h")[0]["hooks"][0]


def test_the_state_of_an_order_is_not_patched_past_the_rules(norce: Shop) -> None:
    order_id = norce.create()
    patches = [{"op": "replace", "path": "/state", "value": {"currentStatus": "accepted", "transitions": []}}]
    hook(norce, order_id, "/h", "/state", patches, target="/state")
    norce.ask("put_state", {"currentStatus": "processing"}, order_id=order_id, status=400)
    norce.receiver.to("/h", [{"op": "replace", "path": "/state/currentStatus", "value": "removed"}])

    norce.move(order_id, "processing")

    assert [each["status"] for each in norce.read(order_id)["state"]["transitions"]] == ["checkout", "removed"]


def test_a_hook_may_change_the_same_order_through_the_api(norce: Shop) -> None:
    order_id = norce.create()

    async def writes(_request: httpx.Request) -> httpx.Response:
        url = f"http://simulator/checkout/order/api/v0/checkout/orders/{order_id}/attributes"
        await norce.http.patch(url, json={"written": True}, headers=norce.headers)
        return httpx.Response(200, json=[])

    hook(norce, order_id, "/h", "/reference", writes)
    norce.ask("put_reference", "r", order_id=order_id, status=200)

    order = norce.read(order_id)
    assert (order["reference"], order["attributes"]) == ("r", {"written": True})


def test_an_order_that_changes_all_the_time_is_a_conflict(norce: Shop) -> None:
    order_id, counter = norce.create(), iter(range(100))

    async def writes(_request: httpx.Request) -> httpx.Response:
        url = f"http://simulator/checkout/order/api/v0/checkout/orders/{order_id}/attributes"
        await norce.http.patch(url, json={"n": next(counter)}, headers=norce.headers)
        return httpx.Response(200, json=[])

    hook(norce, order_id, "/h", "/reference", writes)

    assert norce.ask("put_reference", "r", order_id=order_id, status=409).json()["code"] == "order-conflict"


def test_totals_follow_a_patch_only_if_told(norce: Shop) -> None:
    totals = []
    for on in (False, True):
        norce.simulator.throw(patch_totals=on)
        order_id = norce.create()
        hook(
            norce, order_id, "/h", "/reference", [{"op": "add", "path": "/cart/total", "value": PRICE}], target="/cart"
        )
        norce.ask("put_reference", "r", order_id=order_id, status=200)
        totals.append(norce.read(order_id)["total"]["includingVat"])

    assert totals == [150, 100]


# --- notifications ----------------------------------------------------------------------------------------------------


def notified(norce: Shop, order_id: str, path: str = "/n", **members: Any) -> None:
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
def test_a_notification_is_a_change_that_holds(norce: Shop, scope: str, schema: Any, statuses: list[str]) -> None:
    order_id = norce.create()
    notified(norce, order_id, scope=scope, schema=schema)

    walk(norce, order_id)

    assert [each["state"]["currentStatus"] for each in norce.receiver.bodies("/n")] == statuses
    assert all(validator("order").is_valid(each) for each in norce.receiver.bodies("/n"))


OLDER = {
    "url": "http://127.0.0.1:9/older",
    "method": "PUT",
    "headers": {"Authorization": "Bearer of-the-adapter", "X-Shop": "7"},
    "scope": {"state": ["accepted", "completed"]},
}


def test_the_older_form_of_a_notification_is_refused_unless_told_otherwise(norce: Shop) -> None:
    order_id = norce.create()
    norce.ask("add_notification", OLDER, order_id=order_id, status=400)
    norce.ask("create_order", {"notifications": [OLDER]}, status=400)

    norce.simulator.throw(notification_older_form=True, callback_authorization="Bearer of-norce")

    norce.ask("add_notification", OLDER, order_id=order_id, status=200)
    notified(norce, order_id, headers={"x-shop": "8"}, method="PUT")
    created = norce.create(notifications=[OLDER])
    for each in (order_id, created):
        walk(norce, each)
    sent = [each for each in norce.receiver.got if each.url.path == "/older"]
    assert [(each["id"], each["state"]["currentStatus"]) for each in norce.receiver.bodies("/older")] == [
        (each, status) for each in (order_id, created) for status in ("accepted", "completed")
    ]
    assert {(each.method, each.headers["x-shop"], each.headers[MERCHANT]) for each in sent} == {("PUT", "7", "norce")}
    assert {each.headers.get_list("authorization")[0] for each in sent} == {"Bearer of-the-adapter"}
    documented = [each for each in norce.receiver.got if each.url.path == "/n"]
    assert len(documented) == 5
    assert not any("x-shop" in each.headers or each.method != "POST" for each in documented)


def test_the_older_form_asks_for_an_address_and_states_only(norce: Shop) -> None:
    norce.simulator.throw(notification_older_form=True)
    order_id = norce.create()
    norce.ask("add_notification", {"url": OLDER["url"], "scope": {"state": []}}, order_id=order_id, status=200)
    wrong: list[dict[str, Any]] = [
        {"url": None},
        {"scope": {}},
        {"scope": {"state": "completed"}},
        {"scope": {"state": ["completed"], "payments": ["captured"]}},
        {"method": 1},
        {"headers": {"x-shop": 7}},
        {"version": "v2"},
    ]

    for members in wrong:
        norce.ask("add_notification", OLDER | members, order_id=order_id, status=400)

    assert [(each["scope"], each["invoke"]) for each in norce.read(order_id)["notifications"]] == [
        ("/state/currentStatus", OLDER["url"])
    ]


@pytest.mark.parametrize(("unique", "status"), [(False, 200), (True, 400)])
def test_a_reference_is_used_once_on_an_order_if_told(norce: Shop, unique: bool, status: int) -> None:
    norce.simulator.throw(notification_reference_unique=unique)
    order_id, another = norce.create(), norce.create()
    registered = {"reference": "export", "scope": "/cart", "invoke": "http://127.0.0.1:9/n"}
    for each in (order_id, another):
        norce.ask("add_notification", registered, order_id=each, status=200)
    for _ in range(2):
        norce.ask("add_notification", registered | {"reference": None}, order_id=order_id, status=200)

    second = norce.ask("add_notification", registered | {"scope": "/state"}, order_id=order_id, status=status)
    created = norce.ask("create_order", {"notifications": [registered] * 2})

    assert created.status_code == (400 if unique else 201)
    assert not unique or second.json()["code"] == created.json()["code"] == "order-bad-request"
    norce.ask("add_hook", {"reference": "export", "scope": "/cart"}, version="v1", order_id=order_id, status=200)


@pytest.mark.parametrize("kind", ["validations", "hooks", "notifications"])
@pytest.mark.parametrize("members", [{"scope": {"state": ["completed"]}}, {"version": "v2"}, {"invoke": 1}])
def test_an_order_is_not_created_with_a_registration_that_could_not_be_added(
    norce: Shop, kind: str, members: dict[str, Any]
) -> None:
    is_member = kind != "validations" or "invoke" in members

    norce.ask("create_order", {kind: [members]}, status=400 if is_member else 201)


def test_a_refused_change_notifies_nobody(norce: Shop) -> None:
    order_id = norce.create()
    notified(norce, order_id, scope="/cart")
    hook(norce, order_id, "/h", "/cart", httpx.Response(400))

    norce.ask("put_cart", {"items": []}, order_id=order_id, status=400)

    assert norce.simulator.events() == []


def test_an_event_is_recorded_with_its_attempts_and_can_be_sent_again(norce: Shop) -> None:
    order_id = norce.create()
    notified(norce, order_id, schema={"const": "processing"})
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
    norce.simulator.throw(events_attempts_shown=False)
    assert "attempts" not in norce.ask("read_event", event_id=event["id"]).json()


def test_events_are_filtered_and_paged(norce: Shop) -> None:
    ids = [norce.create() for _ in range(3)]
    for number, order_id in enumerate(ids):
        notified(norce, order_id, reference=f"r{number}", adapterId="a" if number else "b")
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
    norce.simulator.throw(events_order="oldest")
    assert found()[:5] == [ids[0]] * 5


def test_an_event_is_kept_for_ever_or_as_long_as_told(norce: Shop) -> None:
    order_id = norce.create()
    notified(norce, order_id)
    norce.move(order_id, "processing")
    norce.clock.now = norce.clock.now.replace(hour=9)
    norce.move(order_id, "accepted")
    old, new = (each["id"] for each in norce.simulator.events())

    def seen() -> list[str]:
        return [each["id"] for each in norce.ask("list_events", status=200).json()["data"]]

    assert seen() == [new, old]
    norce.simulator.throw(events_kept_seconds=3599)
    assert seen() == [new]
    norce.ask("read_event", event_id=new, status=200)
    norce.ask("read_event", event_id=old, status=404)
    norce.ask("retry_event", event_id=old, status=404)
    norce.simulator.throw(events_kept_seconds=3600)
    assert seen() == [new, old]


def test_static_notifications_are_put_on_every_new_order_of_their_channel(norce: Shop) -> None:
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
    norce.simulator.throw(static_hooks_and_validations=True)
    assert [each["invoke"] for each in norce.read(norce.create(), "v1")["validations"]] == [url]
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
    notified(norce, order_id, invoke=template)

    norce.move(order_id, "processing")

    called = [each.url.raw_path.decode() for each in norce.receiver.got]
    assert called == ([path.replace("ORDER", order_id)] if path else [])
    [event] = norce.simulator.events()
    assert event["payload"]["notification"]["invoke"] == template


def test_placeholders_may_be_sent_as_they_stand(norce: Shop) -> None:
    norce.simulator.throw(placeholders=False)
    order_id = norce.create()
    notified(norce, order_id, invoke="http://127.0.0.1:9/{order.id}")

    norce.move(order_id, "processing")

    assert [each.url.raw_path for each in norce.receiver.got] == [b"/%7Border.id%7D"]


@pytest.mark.parametrize(
    ("switches", "answer", "attempts"),
    [
        ({}, httpx.Response(500), [500]),
        ({"notification_retries": 2}, httpx.Response(500), [500, 500, 500]),
        ({"notification_retries": 2}, httpx.Response(202), [202]),
        ({"notification_retries": 1}, httpx.Response(206), [206, 206]),
        ({"notification_retries": 1, "notification_delivered": "2xx"}, httpx.Response(206), [206]),
        ({"notification_retries": 1, "notification_delivered": "200"}, httpx.Response(202), [202, 202]),
        ({"notification_seconds": 0.02}, never, [None]),
        ({}, unreachable, [None]),
        ({"notifications_lost": 1}, None, []),
        ({"notifications_doubled": 1}, None, [200, 200]),
        ({"notifications_reordered": 1, "held_back_seconds": 5}, None, [200]),
    ],
)
def test_an_attempt_is_made_as_often_as_told(norce: Shop, switches: Any, answer: Any, attempts: list[Any]) -> None:
    order_id = norce.create()
    notified(norce, order_id)
    norce.receiver.to("/n", answer)
    norce.simulator.throw(**{"notification_retry_seconds": 7} | switches)

    norce.move(order_id, "processing")

    [event] = norce.simulator.events()
    assert [each["status"] for each in event["attempts"]] == attempts
    retries = max(len(attempts) - 1, 0) if "notification_retries" in switches else 0
    assert norce.clock.slept == ([5] if "held_back_seconds" in switches else [7] * retries)


def test_one_that_is_held_back_is_passed_by_the_next() -> None:
    delivered = asyncio.Event()

    async def hold(_seconds: float) -> None:
        await delivered.wait()

    def take(_request: httpx.Request) -> None:
        delivered.set()

    with shop(sleep=hold) as norce:
        order_id = norce.create()
        notified(norce, order_id)
        norce.receiver.to("/n", take)

        async def both() -> None:
            url = f"http://simulator/checkout/order/api/v0/checkout/orders/{order_id}/state"
            for status, share in ("processing", 1), ("accepted", 0):
                norce.simulator.throw(notifications_reordered=share)
                await norce.http.put(url, json={"currentStatus": status}, headers=norce.headers)
                await asyncio.sleep(0)
            await norce.simulator.settled()

        norce.loop.run(both())

        assert [each["state"]["currentStatus"] for each in norce.receiver.bodies("/n")] == ["accepted", "processing"]


@pytest.mark.parametrize(
    ("members", "switches", "slept"),
    [({"delay": 0}, {}, []), ({"delay": 3}, {}, [3]), ({"delay": 3}, {"notification_delay_unit_seconds": 60}, [180])],
)
def test_a_delay_is_waited_for(norce: Shop, members: Any, switches: Any, slept: list[float]) -> None:
    order_id = norce.create()
    notified(norce, order_id, **members)
    norce.simulator.throw(**switches)

    norce.move(order_id, "processing")

    assert (norce.clock.slept, len(norce.receiver.got)) == (slept, 1)


def test_the_body_is_the_order_or_an_envelope_in_the_version_that_was_asked_for(norce: Shop) -> None:
    order_id = norce.create()
    notified(norce, order_id, "/v0")
    notified(norce, order_id, "/v1", version="v1")
    notified(norce, order_id, "/none", version=None)
    norce.ask("add_validation", {"invoke": "http://127.0.0.1:9/v"}, version="v1", order_id=order_id)
    norce.simulator.throw(version_left_out="v1")
    norce.move(order_id, "processing")
    words = {each: norce.receiver.bodies(each)[0]["validations"][0] for each in ("/v0", "/v1", "/none")}
    assert {each: "url" in words[each] for each in words} == {"/v0": True, "/v1": False, "/none": False}
    norce.simulator.throw(notification_body="envelope")

    norce.move(order_id, "accepted")

    envelope = norce.receiver.bodies("/v0")[1]
    assert (envelope["notification"]["reference"], envelope["order"]["id"]) == ("r", order_id)
    assert norce.simulator.events()[-1]["payload"]["order"] == norce.receiver.bodies("/none")[1]["order"]


def test_own_changes_notify_unless_told_otherwise(norce: Shop) -> None:
    order_id, own = norce.create(), {"x-adapterid": "a"}
    notified(norce, order_id, scope="/reference")

    norce.ask("put_reference", "1", headers=own, order_id=order_id)
    norce.simulator.throw(adapter_id_skips_notifications=True)
    norce.ask("put_reference", "2", headers=own, order_id=order_id)

    assert [each["reference"] for each in norce.receiver.bodies("/n")] == ["1"]


def test_an_equal_write_triggers_only_if_told(norce: Shop) -> None:
    order_id = norce.create(reference="r")
    notified(norce, order_id, scope="/reference")
    hook(norce, order_id, "/h", "/reference", [])
    notified(norce, order_id, "/elsewhere", scope="/cart")
    norce.ask("put_reference", "r", order_id=order_id)
    assert paths(norce) == []

    norce.simulator.throw(equal_write_triggers=True)
    norce.ask("put_reference", "r", order_id=order_id)

    assert paths(norce) == ["/h", "/n"]


def test_the_creation_of_an_order_notifies_only_if_told(norce: Shop) -> None:
    registered = {"scope": "/state/currentStatus", "invoke": norce.receiver.to("/n", None)}
    norce.create(notifications=[registered])
    norce.simulator.throw(notification_on_creation=True)
    order_id = norce.create(notifications=[registered])

    assert [each["id"] for each in norce.receiver.bodies("/n")] == [order_id]


def test_what_never_left_before_a_restart_leaves_after_it(tmp_path: Path) -> None:
    with shop(store=tmp_path / "norce.db") as norce:
        order_id = norce.create()
        notified(norce, order_id)
        norce.receiver.to("/n", never)

        async def ended_too_soon() -> None:
            url = f"http://simulator/checkout/order/api/v0/checkout/orders/{order_id}/state"
            await norce.http.put(url, json={"currentStatus": "processing"}, headers=norce.headers)

        norce.loop.run(ended_too_soon())

    with shop(store=tmp_path / "norce.db", seed=2) as norce:
        norce.loop.run(norce.simulator.settled())

        assert [each["id"] for each in norce.receiver.bodies("/n")] == [order_id]
        assert [each["status"] for each in norce.simulator.events()[0]["attempts"]] == [200]


# --- nobody else is called --------------------------------------------------------------------------------------------


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
def test_every_name_of_this_machine_will_do(norce: Shop, host: str) -> None:
    order_id = norce.create()
    notified(norce, order_id, invoke=f"http://{host}:9/n")

    norce.move(order_id, "processing")

    assert paths(norce) == ["/n"]


def test_a_redirect_leads_nowhere_else(norce: Shop) -> None:
    order_id = norce.create()
    notified(norce, order_id)
    norce.receiver.to("/n", httpx.Response(307, headers={"location": "http://127.0.0.1:9/other"}))
    norce.move(order_id, "processing")
    norce.simulator.throw(callback_redirects=True)
    norce.move(order_id, "accepted")
    norce.receiver.to("/n", httpx.Response(307, headers={"location": "https://elsewhere.example/"}))
    norce.move(order_id, "completed")

    reasons = [event["attempts"][0]["status"] or event["attempts"][0]["reason"] for event in norce.simulator.events()]
    assert reasons == [307, 200, "not-loopback"]
    assert paths(norce) == ["/n", "/n", "/other", "/n"]


def test_an_address_that_cannot_be_is_an_answer_that_did_not_come() -> None:
    async def attempts() -> list[Any]:
        async with Simulator(token="t") as simulator:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(simulator.app))
            base, headers = "http://simulator/checkout/order/api/v0/checkout/orders", {"authorization": "t"}
            headers |= {MERCHANT: "m", CHANNEL: "c"}
            urls = ("http://127.0.0.1:99999999/", "http://127.0.0.1:0/")
            registered = [{"scope": "/reference", "invoke": url} for url in urls]
            created = await http.post(base, json={"notifications": registered}, headers=headers)
            await http.put(f"{base}/{created.json()['id']}/reference", json="r", headers=headers)
            await simulator.settled()
            await http.aclose()
            return [each["attempts"][0]["status"] for each in simulator.events()]

    assert asyncio.run(attempts()) == [None, None]
