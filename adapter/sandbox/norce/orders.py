"""The rules of an order.

The module is pure. A change takes an order and returns the next one, or raises `Refused`. It never changes an order in
place; ids and times come with the request. No caller and no hook writes `state.transitions`: `_moved` derives it from
the status before and after.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonpatch
import jsonschema_rs
from jsonpointer import JsonPointerException

from adapter.conditions import CompiledCondition, Condition, ConditionInvalid
from adapter.norce.api import CODES, schema
from adapter.sandbox.norce.switches import Switches
from adapter.sandbox.norce.versions import V1_NAMES, Order

Change = Callable[[Order, "ApiRequest"], tuple[Order, Any]]
"""Takes an order and a request, returns the changed order and the body of the answer."""

CHECKOUT, PROCESSING, ACCEPTED = "checkout", "processing", "accepted"
COMPLETED, DECLINED, REMOVED = "completed", "declined", "removed"
# Checkout protocol, section 3. It does not say who removes an order, or when: here every order that is not final.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    CHECKOUT: frozenset({PROCESSING, REMOVED}),
    PROCESSING: frozenset({CHECKOUT, ACCEPTED, REMOVED}),
    ACCEPTED: frozenset({COMPLETED, DECLINED, REMOVED}),
    COMPLETED: frozenset(),
    DECLINED: frozenset(),
    REMOVED: frozenset(),
}
# Payments and shippings stay open: adapters capture, refund and ship later.
_LOCKED: Mapping[str, frozenset[str]] = {
    CHECKOUT: frozenset(),
    PROCESSING: frozenset({"cart", "customer", "consents"}),
    ACCEPTED: frozenset({"cart", "consents"}),  # except for upsold lines of the cart
    **dict.fromkeys((COMPLETED, DECLINED, REMOVED), frozenset({"cart", "customer", "consents"})),
}
# The parts that a hook may watch and patch, in the order in which the older guide calls hooks.
WATCHED = ("state", "consents", "customer", "cart", "shippings", "payments", "reference")
_LISTS = {
    *((name,) for name in ("shippings", "payments", "consents", "validations", "hooks", "notifications")),
    ("cart", "items"),
    ("cart", "discounts"),
    ("state", "transitions"),
}
_ID_PREFIXES = {"validations": "v", "hooks": "h", "notifications": "n"}
_CONTEXT = {
    "culture": re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{2})*"),
    "currency": re.compile(r"[A-Za-z]{3}"),
    "country": re.compile(r"[A-Za-z]{2}"),
}
_READ_ONLY = ("id", "merchant", "channel", "orderId")


class Refused(Exception):
    """A request that Norce refuses.

    Attributes:
        code: One of Norce's codes.
        status: The HTTP status of the code; must be given if the code has several.
    """

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status or CODES[code][0]


class ValidationFailed(Refused):
    """An order that may not proceed, with the errors of Norce and of all validations."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("order-validation", "The order is not valid.")
        self.errors = errors


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRequest:
    """A request to one of the services, parsed and authorized."""

    body: Any = None
    path: Mapping[str, str]
    """The parameters in the path."""
    query: Mapping[str, list[str]]
    version: str
    merchant: str
    channel: str
    adapter_id: str | None
    now: str
    new_id: Callable[[str], str]
    """Returns a new id with this prefix."""
    switches: Switches


def find(parts: list[dict[str, Any]], part_id: str, code: str = "order-bad-request") -> int:
    """Return the position of the part with this id, or raise `Refused` with the code."""
    for position, part in enumerate(parts):
        if part["id"] == part_id:
            return position
    raise Refused(code, f"There is nothing with id:{part_id} on this order.")


def part(parts: list[dict[str, Any]], part_id: str, code: str = "order-bad-request") -> dict[str, Any]:
    """Return the part with this id, or raise `Refused` with the code."""
    return parts[find(parts, part_id, code)]


# --- changes ----------------------------------------------------------------------------------------------------------


def created(request: ApiRequest) -> Order:
    """Return a new order, or raise `Refused`."""
    body = {name: value for name, value in request.body.items() if value is not None}
    status = _status(body.get("state", {}).get("currentStatus", CHECKOUT))
    if status != CHECKOUT and request.switches.transitions_enforced:
        raise Refused("order-error", f"An order begins in {CHECKOUT}, not in {status}.")
    order = {
        "reference": None,
        **body,
        "id": request.new_id("o"),
        "merchant": request.merchant,  # the headers win
        "channel": request.channel,
        "created": request.now,
        "lastModified": request.now,
        "state": {"currentStatus": status, "transitions": [{"status": status, "timeStamp": request.now}]},
        # The sample of the API reference has the placeholder "string" here, which no answer of Norce contains.
        **{name: _matching(pattern, body.get(name)) for name, pattern in _CONTEXT.items()},
        "cart": _cart(body.get("cart", {}), request),
        "shippings": [],
        "payments": [],
        "customer": body.get("customer"),
        "consents": [_with_id(each, "c", request) for each in body.get("consents", ())],
        "attributes": body.get("attributes", {}),
        "_transactions": {},
    }
    for kind in _ID_PREFIXES:
        order[kind] = []
        for each in body.get(kind, ()):
            order = with_registration(order, kind, each, request)
    return order if "total" in body else with_total(order)


def put_cart(order: Order, request: ApiRequest) -> tuple[Order, None]:
    cart = _cart(request.body, request)
    if order["state"]["currentStatus"] != ACCEPTED or not _only_adds_upsells(order["cart"], cart):
        _check_unlocked(order, "cart")
    return with_total({**order, "cart": cart}), None


def putting_address(which: str) -> Change:
    """Return the change that replaces the `billing` or `shipping` address."""

    def put(order: Order, request: ApiRequest) -> tuple[Order, None]:
        _check_unlocked(order, "customer")
        customer = {"type": request.body.get("type") or "person", **(order["customer"] or {}), which: request.body}
        return {**order, "customer": customer}, None

    return put


def patch_attributes(order: Order, request: ApiRequest) -> tuple[Order, None]:
    return {**order, "attributes": {**(order["attributes"] or {}), **request.body}}, None


def put_reference(order: Order, request: ApiRequest) -> tuple[Order, None]:
    return {**order, "reference": request.body}, None


def put_state(order: Order, request: ApiRequest) -> tuple[Order, None]:
    status = _status(request.body["currentStatus"])
    if status == PROCESSING != order["state"]["currentStatus"]:
        unchecked = [each["id"] for each in order["consents"] if each.get("required") and not each.get("checked")]
        if unchecked:
            raise Refused("order-validation", f"Required consents are not checked: {', '.join(unchecked)}.")
    return _moved(order, status, request), None


def patch_consents(order: Order, request: ApiRequest) -> tuple[Order, None]:
    _check_unlocked(order, "consents")
    consents = list(order["consents"])
    for each in request.body:
        position = find(consents, each.get("id", ""))
        consents[position] = {**consents[position], "checked": each.get("checked")}
    return {**order, "consents": consents}, None


def adding(kind: str) -> Change:
    """Return the change that adds a registration of this kind."""

    def add(order: Order, request: ApiRequest) -> tuple[Order, None]:
        after = with_registration(order, kind, request.body, request)
        _check_condition(after[kind][-1])
        return after, None

    return add


def removing(kind: str, parameter: str) -> Change:
    """Return the change that removes the part whose id is this parameter of the path."""

    def remove(order: Order, request: ApiRequest) -> tuple[Order, None]:
        position = find(order[kind], request.path[parameter])
        return {**order, kind: [*order[kind][:position], *order[kind][position + 1 :]]}, None

    return remove


def put_validation(order: Order, request: ApiRequest) -> tuple[Order, None]:
    position = find(order["validations"], request.path["validation_id"])
    new = {**_registration("validations", request.body, request), "id": request.path["validation_id"]}
    return _replaced(order, "validations", position, new), None


def add_payment(order: Order, request: ApiRequest) -> tuple[Order, dict[str, str]]:
    payment = _payment(order, request.body, request.new_id("p"), request)
    return {**order, "payments": [*order["payments"], payment]}, {"id": payment["id"]}


def put_payment(order: Order, request: ApiRequest) -> tuple[Order, Any]:
    position = find(order["payments"], request.path["payment_id"], "payment-not-found")
    payment = _payment(order, request.body, request.path["payment_id"], request)
    return _replaced(order, "payments", position, payment), payment


def add_transaction(order: Order, request: ApiRequest) -> tuple[Order, Any]:
    payment_id, transactions = request.path["payment_id"], order["_transactions"]
    find(order["payments"], payment_id, "payment-not-found")
    for name in ("requestJson", "responseJson"):
        try:
            json.loads(request.body.get(name) or "null")
        except ValueError as error:
            raise Refused("order-bad-request", f"{name} holds no valid JSON.") from error
    new = {**request.body, "id": request.new_id("t"), "created": request.now}
    transactions = {**transactions, payment_id: [*transactions.get(payment_id, ()), new]}
    return {**order, "_transactions": transactions}, new


def add_shipping(order: Order, request: ApiRequest) -> tuple[Order, dict[str, str]]:
    shipping = _shipping(order, request.body, request.new_id("s"))
    return with_total({**order, "shippings": [*order["shippings"], shipping]}), {"id": shipping["id"]}


def put_shipping(order: Order, request: ApiRequest) -> tuple[Order, Any]:
    position = find(order["shippings"], request.path["shipping_id"], "shipping-not-found")
    shipping = _shipping(order, request.body, request.path["shipping_id"])
    return with_total(_replaced(order, "shippings", position, shipping)), shipping


# By the name of the operation.
CHANGES: Mapping[str, Change] = {
    "put_cart": put_cart,
    "put_billing": putting_address("billing"),
    "put_shipping_address": putting_address("shipping"),
    "patch_attributes": patch_attributes,
    "put_reference": put_reference,
    "put_state": put_state,
    "patch_consents": patch_consents,
    "add_validation": adding("validations"),
    "put_validation": put_validation,
    "remove_validation": removing("validations", "validation_id"),
    "add_hook": adding("hooks"),
    "remove_hook": removing("hooks", "hook_id"),
    "add_notification": adding("notifications"),
    "remove_notification": removing("notifications", "notification_id"),
    "add_payment": add_payment,
    "put_payment": put_payment,
    "add_transaction": add_transaction,
    "add_shipping": add_shipping,
    "put_shipping": put_shipping,
}


# --- conditions and patches of hooks ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=10_000)
def _compiled(scope: str, schema_text: str) -> CompiledCondition | None:
    try:
        return Condition(scope, json.loads(schema_text)).compile()
    except ConditionInvalid:
        return None


def condition(registered: Mapping[str, Any]) -> CompiledCondition | None:
    """Return the condition of a hook or notification, or None if it cannot hold."""
    return _compiled(registered.get("scope") or "", json.dumps(registered.get("schema")))


def watching_hooks(order: Order) -> Iterator[tuple[dict[str, Any], CompiledCondition]]:
    """Yield the hooks that can be called, each with a condition on its scope."""
    for hook in order["hooks"]:
        watched = condition({"scope": hook.get("scope")})
        if watched is not None and hook["scope"].split("/")[1] in WATCHED:
            yield hook, watched


def patched(order: Order, patches: Any, target: str | None) -> Order:
    """Return the order with a hook's patches, without those outside of its target.

    Raises:
        Refused: This is no JSON Patch, or it does not apply.
    """
    if not _validator("hook-response").is_valid(patches):
        raise Refused("order-error", "A hook answered no JSON Patch.")
    for patch in patches:
        op, path = patch.get("op"), patch.get("path") or ""
        paths = [path, patch.get("from") or ""] if op == "move" else [path]
        is_inside = target is not None and all(_is_inside(each, target) for each in paths)
        if op != "test" and not is_inside:
            continue
        try:
            order = jsonpatch.JsonPatch([patch]).apply(order)
        except (jsonpatch.JsonPatchException, JsonPointerException, TypeError, KeyError, ValueError) as error:
            raise Refused("order-error", f"A hook's patch does not apply: {op} {path}.") from error
    return order


def _is_inside(path: str, target: str) -> bool:
    return f"{path}/".startswith(f"{target}/") and f"{path}/".split("/")[1] in WATCHED


def after_patches(base: Order, proposed: Order, request: ApiRequest) -> Order:
    """Return the patched order with what only Norce writes, or raise `Refused`."""
    state, cart = proposed.get("state"), proposed.get("cart")
    if not (state and cart is not None and _validator("order").is_valid(proposed)):
        raise Refused("order-error", "The hooks' patches left no valid order.")
    payments, shippings = proposed.get("payments") or (), proposed.get("shippings") or ()
    return {
        **_moved({**proposed, "state": base["state"]}, _status(state.get("currentStatus")), request),
        "cart": _cart(cart, request),
        "customer": proposed.get("customer"),
        "reference": proposed.get("reference"),
        "attributes": proposed.get("attributes") or {},
        "consents": [_with_id(each, "c", request) for each in proposed.get("consents") or ()],
        "payments": [_payment(base, each, each.get("id") or request.new_id("p"), request) for each in payments],
        "shippings": [_shipping(base, each, each.get("id") or request.new_id("s")) for each in shippings],
    }


def same(one: Any, other: Any) -> bool:
    """Compare JSON values: 1 equals 1.0, but not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


# --- checks and totals ------------------------------------------------------------------------------------------------


def problems(order: Order) -> list[dict[str, str]]:
    """Return the validation errors that the order service finds itself."""
    found = []
    payments = [each for each in order["payments"] if each.get("state") != REMOVED]
    total = money((order.get("total") or {}).get("includingVat"))
    if not order["cart"]["items"]:
        found.append(("cart-empty", "There is nothing in the cart."))
    if total > 0 and not payments:
        found.append(("payment-missing", "No payment covers the total."))
    elif round(sum(money(each.get("amount")) for each in payments), 2) != total:
        found.append(("payment-amount-mismatch", "The payments do not add up to the total."))
    if any(each.get("required") and not each.get("checked") for each in order["consents"]):
        found.append(("consent-required", "A required consent is not checked."))
    return [{"adapterId": "norce_checkout", "code": code, "message": message} for code, message in found]


def money(amount: Any) -> float:
    """Return an amount with two decimals, and 0 for a missing one."""
    return round(float(amount or 0), 2)


def with_total(order: Order) -> Order:
    """Return the order with its total: the cart and the shippings that are not removed."""
    priced = [order["cart"].get("total"), *(each["total"] for each in order["shippings"] if each["state"] != REMOVED)]
    return {**order, "total": _sum(priced)}


@functools.cache
def _validator(name: str) -> Any:
    return jsonschema_rs.validator_for(schema(name))


def check_fits(value: Any, name: str, what: str, code: str = "order-bad-request") -> None:
    """Raise `Refused` if the value does not fit the schema of this name."""
    for problem in _validator(name).iter_errors(value):
        place = "/".join(map(str, problem.instance_path))
        raise Refused(code, f"{what} does not fit its schema at /{place}.")


def with_registration(order: Order, kind: str, body: Mapping[str, Any], request: ApiRequest) -> Order:
    """Return the order with one more validation, hook or notification, or raise `Refused`."""
    return {**order, kind: [*order[kind], _registration(kind, body, request)]}


def _registration(kind: str, body: Mapping[str, Any], request: ApiRequest) -> dict[str, Any]:
    names = V1_NAMES.get(kind, {})
    new = {**{names.get(name, name): value for name, value in body.items()}, "id": request.new_id(_ID_PREFIXES[kind])}
    check_fits(new, kind.removesuffix("s"), f"One of the {kind}")
    return new


def _check_condition(registered: Mapping[str, Any]) -> None:
    if (scope := registered.get("scope")) is None:
        return
    parts = tuple(scope.split("/")[1:])
    if any(parts[:end] in _LISTS for end in range(1, len(parts))):
        raise Refused("order-bad-request", "A scope inside an array is not supported.")
    try:
        Condition(scope, registered.get("schema")).compile()
    except ConditionInvalid as error:
        raise Refused("order-bad-request", str(error)) from error


def _status(name: Any) -> str:
    status = name.lower() if isinstance(name, str) else ""
    if status not in TRANSITIONS:
        raise Refused("order-bad-request", f"There is no status {name}.")
    return status


def _moved(order: Order, status: str, request: ApiRequest) -> Order:
    state = order["state"]
    if status == state["currentStatus"]:
        return dict(order)
    if request.switches.transitions_enforced and status not in TRANSITIONS[state["currentStatus"]]:
        raise Refused("order-error", f"An order does not move from {state['currentStatus']} to {status}.")
    transitions = [*state["transitions"], {"status": status, "timeStamp": request.now}]
    return {**order, "state": {**state, "currentStatus": status, "transitions": transitions}}


def _check_unlocked(order: Order, part: str) -> None:
    status = order["state"]["currentStatus"]
    if part in _LOCKED[status]:
        raise Refused("order-error", f"The {part} of an order in {status} does not change.")


def _only_adds_upsells(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    before, after = ({each["id"]: each for each in cart["items"]} for cart in (old, new))
    are_kept = all(name in after and same(after[name], each) for name, each in before.items())
    return are_kept and all(each.get("upsell") for name, each in after.items() if name not in before)


def _cart(body: Mapping[str, Any], request: ApiRequest) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if value is not None}
    items = [_item(each, request) for each in given.get("items", ())]
    total = given.get("total") or _sum([each.get("total") for each in items])
    return {"reference": None, "discounts": [], "attributes": {}, **given, "items": items, "total": total}


def _item(item: Mapping[str, Any], request: ApiRequest) -> dict[str, Any]:
    own = {"items": [_item(each, request) for each in item["items"]]} if item.get("items") else {}
    return {**_with_id(item, "ci", request), **own}


def _with_id(body: Mapping[str, Any], prefix: str, request: ApiRequest) -> dict[str, Any]:
    return {**body, "id": body.get("id") or request.new_id(prefix)}


def _payment(order: Order, body: Mapping[str, Any], payment_id: str, request: ApiRequest) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if value is not None and name not in _READ_ONLY}
    actions = [_with_id(each, "pa", request) for each in given.pop("actions", ())]
    payment = {"state": "intent", "type": "default", "currency": order["currency"], "attributes": {}, **given}
    return {**payment, **_read_only(order, payment_id), "actions": actions}


def _shipping(order: Order, body: Mapping[str, Any], shipping_id: str) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if name not in _READ_ONLY}
    return {"attributes": {}, **given, "state": given.get("state") or "intent", **_read_only(order, shipping_id)}


def _read_only(order: Order, part_id: str) -> dict[str, Any]:
    return {"id": part_id, "orderId": order["id"], "merchant": order["merchant"], "channel": order["channel"]}


def _replaced(order: Order, part: str, position: int, new: Any) -> Order:
    return {**order, part: [*order[part][:position], new, *order[part][position + 1 :]]}


def _sum(prices: list[Any]) -> dict[str, float]:
    return {
        name: round(sum(money((each or {}).get(name)) for each in prices), 2)
        for name in ("includingVat", "excludingVat")
    }


def _matching(pattern: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
