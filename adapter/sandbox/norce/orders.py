"""
An order and its rules: a change comes in, the next order goes out, or `Refused` with one of Norce's codes. Pure: an
order is never changed in place, and ids and times arrive with the `Call`.

An order is kept once for both versions of the API, in the words of v1; `versions` makes of it what v0 or v1 shows.
What one would get wrong: a status belongs to the order, but `transitions` is history. No caller and no hook writes it;
`settled` makes it from where the order was and where it is to be.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonpatch
import jsonschema_rs
import msgspec
from jsonpointer import JsonPointerException

from adapter.conditions import CompiledCondition, Condition, ConditionInvalid
from adapter.norce.api import CODES, schema
from adapter.sandbox.norce.switches import Switches
from adapter.sandbox.norce.versions import OWN_NAMES, Order

Change = Callable[[Order, "Call"], tuple[Order, Any]]

CHECKOUT, PROCESSING, ACCEPTED = "checkout", "processing", "accepted"
COMPLETED, DECLINED, REMOVED = "completed", "declined", "removed"
# Section 3 of the protocol. Nobody says who removes an order, or when; whatever is not yet final can be.
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
    ACCEPTED: frozenset({"cart", "consents"}),  # but for lines that are upsold
    **dict.fromkeys((COMPLETED, DECLINED, REMOVED), frozenset({"cart", "customer", "consents"})),
}
WATCHED = ("state", "consents", "customer", "cart", "shippings", "payments")  # in the older guide's order
_LISTS = {
    *((name,) for name in ("shippings", "payments", "consents", "validations", "hooks", "notifications")),
    ("cart", "items"),
    ("cart", "discounts"),
    ("state", "transitions"),
}
_PREFIXES = {"validations": "v", "hooks": "h", "notifications": "n", "consents": "c", "payments": "p", "shippings": "s"}
_CONTEXT = {
    "culture": re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{2})*"),
    "currency": re.compile(r"[A-Za-z]{3}"),
    "country": re.compile(r"[A-Za-z]{2}"),
}
_NOT_FROM_A_BODY = ("id", "merchant", "channel", "orderId")


class Refused(Exception):
    """The request is not carried out. `code` is one of Norce's; `status` its status, if the code leaves a choice."""

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status or CODES[code][0]


class Invalid(Refused):
    """The order may not go on. `errors` are those of the order service and of all validations."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("order-validation", "The order is not valid.")
        self.errors = errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a request brings along. `path` holds the parameters of its address."""

    body: Any = None
    path: Mapping[str, str]
    query: Mapping[str, list[str]]
    version: str
    merchant: str
    channel: str
    adapter_id: str | None
    if_match: str | None
    now: str
    new_id: Callable[[str], str]
    switches: Switches


def find(parts: list[dict[str, Any]], part_id: str, code: str = "order-bad-request") -> int:
    """Where the part stands. Raises `Refused`."""
    for position, part in enumerate(parts):
        if part["id"] == part_id:
            return position
    raise Refused(code, f"There is nothing with id:{part_id} on this order.")


def part(parts: list[dict[str, Any]], part_id: str, code: str = "order-bad-request") -> dict[str, Any]:
    """The part itself. Raises `Refused`."""
    return parts[find(parts, part_id, code)]


# --- changes: (order, call) -> (order, what is answered) --------------------------------------------------------------


def created(call: Call) -> Order:
    """A new order. Raises `Refused`."""
    body = {name: value for name, value in call.body.items() if value is not None}
    status = _status(body.get("state", {}).get("currentStatus", CHECKOUT))
    if status != CHECKOUT and call.switches.transitions_enforced:
        raise Refused("order-error", f"An order begins in {CHECKOUT}, not in {status}.")
    order = {
        "reference": None,
        **body,
        "id": call.new_id("o"),
        "merchant": call.merchant,  # the headers win
        "channel": call.channel,
        "created": call.now,
        "lastModified": call.now,
        "state": {"currentStatus": status, "transitions": [{"status": status, "timeStamp": call.now}]},
        # What the sample of the API reference has here ("string") is a placeholder, which nothing may be answered as.
        **{name: _fitting(pattern, body.get(name)) for name, pattern in _CONTEXT.items()},
        "cart": _cart(body.get("cart", {}), call),
        "shippings": [],
        "payments": [],
        "customer": body.get("customer"),
        "consents": [_with_id(each, "c", call) for each in body.get("consents", ())],
        "attributes": body.get("attributes", {}),
        "_transactions": {},
    }
    for kind in ("validations", "hooks", "notifications"):
        order[kind] = []
        for each in body.get(kind, ()):
            order = with_registration(order, kind, each, call)
    return order if "total" in body else with_total(order)


def put_cart(order: Order, call: Call) -> tuple[Order, None]:
    cart = _cart(call.body, call)
    if order["state"]["currentStatus"] != ACCEPTED or not _only_upsells(order["cart"], cart):
        _unlocked(order, "cart", call)
    return with_total({**order, "cart": cart}), None


def putting_address(which: str) -> Change:
    """The change of the billing or shipping address, as a whole."""

    def put(order: Order, call: Call) -> tuple[Order, None]:
        _unlocked(order, "customer", call)
        customer = {"type": call.body.get("type") or "person", **(order["customer"] or {}), which: call.body}
        return {**order, "customer": customer}, None

    return put


def patch_attributes(order: Order, call: Call) -> tuple[Order, None]:
    return {**order, "attributes": {**(order["attributes"] or {}), **call.body}}, None


def put_reference(order: Order, call: Call) -> tuple[Order, None]:
    return {**order, "reference": call.body}, None


def put_state(order: Order, call: Call) -> tuple[Order, None]:
    status = _status(call.body["currentStatus"])
    if status == PROCESSING:
        unchecked = [each["id"] for each in order["consents"] if each.get("required") and not each.get("checked")]
        if unchecked and order["state"]["currentStatus"] != PROCESSING:
            raise Refused("order-validation", f"Required consents are not checked: {', '.join(unchecked)}.")
    return _moved(order, status, call), None


def add_consent(order: Order, call: Call) -> tuple[Order, None]:
    _unlocked(order, "consents", call)
    consent = _with_id(call.body, "c", call)
    if any(each["id"] == consent["id"] for each in order["consents"]):
        raise Refused("order-bad-request", f"There is a consent with id:{consent['id']} already.")
    return {**order, "consents": [*order["consents"], consent]}, None


def patch_consents(order: Order, call: Call) -> tuple[Order, None]:
    _unlocked(order, "consents", call)
    consents = list(order["consents"])
    for each in call.body:
        position = find(consents, each.get("id", ""))
        consents[position] = {**consents[position], "checked": each.get("checked")}
    return {**order, "consents": consents}, None


def patch_consent(order: Order, call: Call) -> tuple[Order, None]:
    _unlocked(order, "consents", call)
    position = find(order["consents"], call.path["consent_id"])
    return _replaced(order, "consents", position, {**order["consents"][position], "checked": call.body.get("checked")})


def remove_consent(order: Order, call: Call) -> tuple[Order, None]:
    _unlocked(order, "consents", call)
    return _removed(order, "consents", call.path["consent_id"])


def adding(kind: str) -> Change:
    """The change that adds a registration of this kind."""

    def add(order: Order, call: Call) -> tuple[Order, None]:
        after = with_registration(order, kind, call.body, call)
        _check_condition(after[kind][-1])
        return after, None

    return add


def removing(kind: str, parameter: str) -> Change:
    """The change that takes away a registration of this kind."""
    return lambda order, call: _removed(order, kind, call.path[parameter])


def put_validation(order: Order, call: Call) -> tuple[Order, None]:
    position = find(order["validations"], call.path["validation_id"])
    new = {**_registration("validations", call.body, call), "id": call.path["validation_id"]}
    return _replaced(order, "validations", position, new)


def add_payment(order: Order, call: Call) -> tuple[Order, dict[str, str]]:
    payment = _payment(order, call.body, call.new_id("p"), call)
    return {**order, "payments": [*order["payments"], payment]}, {"id": payment["id"]}


def put_payment(order: Order, call: Call) -> tuple[Order, Any]:
    position = find(order["payments"], call.path["payment_id"], "payment-not-found")
    payment = _payment(order, call.body, call.path["payment_id"], call)
    return _replaced(order, "payments", position, payment)[0], payment


def add_actions(order: Order, call: Call) -> tuple[Order, None]:
    position = find(order["payments"], call.path["payment_id"], "payment-not-found")
    payment = order["payments"][position]
    actions = [{**each, "id": call.new_id("pa")} for each in call.body]
    return _replaced(order, "payments", position, {**payment, "actions": [*payment["actions"], *actions]})


def add_transaction(order: Order, call: Call) -> tuple[Order, Any]:
    payment_id = call.path["payment_id"]
    find(order["payments"], payment_id, "payment-not-found")
    for name in ("requestJson", "responseJson"):
        try:
            json.loads(call.body.get(name) or "null")
        except ValueError as error:
            raise Refused("order-bad-request", f"{name} holds no valid JSON.") from error
    new = {**call.body, "id": call.new_id("t"), "created": call.now}
    transactions = order["_transactions"]
    return {
        **order,
        "_transactions": {**transactions, payment_id: [*transactions.get(payment_id, ()), new]},
    }, new


def add_shipping(order: Order, call: Call) -> tuple[Order, dict[str, str]]:
    shipping = _shipping(order, call.body, call.new_id("s"))
    return with_total({**order, "shippings": [*order["shippings"], shipping]}), {"id": shipping["id"]}


def put_shipping(order: Order, call: Call) -> tuple[Order, Any]:
    position = find(order["shippings"], call.path["shipping_id"], "shipping-not-found")
    shipping = _shipping(order, call.body, call.path["shipping_id"])
    return with_total(_replaced(order, "shippings", position, shipping)[0]), shipping


# What each operation changes: by whom, and at which pointers.
CHANGES: Mapping[str, tuple[Change, tuple[str, ...]]] = {
    "put_cart": (put_cart, ("/cart", "/total")),
    "put_billing": (putting_address("billing"), ("/customer/billing",)),
    "put_shipping_address": (putting_address("shipping"), ("/customer/shipping",)),
    "patch_attributes": (patch_attributes, ("/attributes",)),
    "put_reference": (put_reference, ("/reference",)),
    "put_state": (put_state, ("/state",)),
    "add_consent": (add_consent, ("/consents",)),
    "patch_consents": (patch_consents, ("/consents",)),
    "patch_consent": (patch_consent, ("/consents",)),
    "remove_consent": (remove_consent, ("/consents",)),
    "add_validation": (adding("validations"), ()),
    "put_validation": (put_validation, ()),
    "remove_validation": (removing("validations", "validation_id"), ()),
    "add_hook": (adding("hooks"), ()),
    "remove_hook": (removing("hooks", "hook_id"), ()),
    "add_notification": (adding("notifications"), ()),
    "remove_notification": (removing("notifications", "notification_id"), ()),
    "add_payment": (add_payment, ("/payments",)),
    "put_payment": (put_payment, ("/payments",)),
    "add_actions": (add_actions, ("/payments",)),
    "add_transaction": (add_transaction, ()),
    "add_shipping": (add_shipping, ("/shippings", "/total")),
    "put_shipping": (put_shipping, ("/shippings", "/total")),
}


# --- callbacks: what is watched, what a hook may patch ----------------------------------------------------------------


@functools.lru_cache(maxsize=10_000)
def _compiled(scope: str, text: str) -> CompiledCondition | None:
    try:
        return Condition(scope, json.loads(text)).compile()
    except ConditionInvalid:
        return None


def condition(registered: Mapping[str, Any]) -> CompiledCondition | None:
    """The condition of a hook or notification; None where it has none that could ever hold."""
    return _compiled(registered.get("scope") or "", json.dumps(registered.get("schema")))


def watched_by_hooks(order: Order, switches: Switches) -> Iterator[tuple[dict[str, Any], CompiledCondition]]:
    """The hooks of the order that can be called, and what they watch."""
    parts = set(_patchable(switches))
    for hook in order["hooks"]:
        watched = condition({"scope": hook.get("scope")})
        if watched is not None and hook["scope"].split("/")[1] in parts:
            yield hook, watched


def is_touched(scope: str, touched: tuple[str, ...]) -> bool:
    """Whether a write at these pointers is a write at the scope: there, above it or below it."""
    return any(f"{one}/".startswith(f"{other}/") for each in touched for one, other in ((scope, each), (each, scope)))


def patched(order: Order, patches: Any, hook: Mapping[str, Any], switches: Switches) -> Order:
    """The order with what the hook wants. Raises `Refused`, of which the caller is told that a hook is at fault."""
    if not _validator("hook-response").is_valid(patches):
        raise Refused("order-error", "A hook answered no JSON Patch.")
    confines = hook.get("scope" if switches.hook_scope == "patched" else "target")
    basic = switches.patch_operations == "basic"
    for patch in patches:
        op, path = patch.get("op"), patch.get("path") or ""
        if basic and op not in ("add", "replace", "remove"):
            raise Refused("order-error", f"A hook asked for the operation {op}.")
        if not switches.patch_array_positions and any(map(_is_in_array, (path, patch.get("from") or ""))):
            raise Refused("order-error", "A hook patched inside an array.")
        places = [path, patch.get("from") or ""] if op == "move" else [path]
        allowed = all(place.split("/")[1:2] and place.split("/")[1] in _patchable(switches) for place in places)
        inside = confines is not None and all(f"{place}/".startswith(f"{confines}/") for place in places)
        if op != "test" and not (allowed and (inside or switches.patch_outside_target == "apply")):
            if switches.patch_outside_target == "refuse":
                raise Refused("order-error", "A hook patched outside its target.")
            continue
        try:
            order = jsonpatch.JsonPatch([patch]).apply(order)
        except (jsonpatch.JsonPatchException, JsonPointerException, TypeError, KeyError, ValueError) as error:
            raise Refused("order-error", f"A hook's patch does not apply: {op} {path}.") from error
    return order


def settled(base: Order, proposed: Order, call: Call, *, was_patched: bool) -> Order:
    """The order as it is to be stored, after hooks. Raises `Refused` where their patches left no order."""
    if was_patched:
        state, cart = proposed.get("state"), proposed.get("cart")
        if not (state and cart is not None and _validator("order").is_valid(proposed)):
            raise Refused("order-error", "The hooks' patches left no valid order.")
        proposed = _moved({**proposed, "state": base["state"]}, _status(state.get("currentStatus")), call)
        proposed |= {
            "cart": _cart(cart, call),
            "customer": proposed.get("customer"),
            "reference": proposed.get("reference"),
            "attributes": proposed.get("attributes") or {},
            "consents": [_with_id(each, "c", call) for each in proposed.get("consents") or ()],
            "payments": [
                _payment(base, e, e.get("id") or call.new_id("p"), call) for e in proposed.get("payments") or ()
            ],
            "shippings": [_shipping(base, e, e.get("id") or call.new_id("s")) for e in proposed.get("shippings") or ()],
        }
        if call.switches.patch_totals:
            proposed = with_total(proposed)
    return {**proposed, "lastModified": call.now}


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, and not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


# --- what the order service checks itself -----------------------------------------------------------------------------


def problems(order: Order) -> list[dict[str, str]]:
    """What `validate` finds without asking anybody, as validation errors."""
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
    """An amount, with what is missing as 0."""
    return round(float(amount or 0), 2)


def with_total(order: Order) -> Order:
    """The order with its total: the cart, and the shippings that are not removed."""
    priced = [order["cart"].get("total"), *(each["total"] for each in order["shippings"] if each["state"] != REMOVED)]
    return {**order, "total": _sum(priced)}


# --- what they share --------------------------------------------------------------------------------------------------


@functools.cache
def _validator(name: str) -> Any:
    return jsonschema_rs.validator_for(schema(name))


def check_fits(value: Any, name: str, what: str, code: str = "order-bad-request") -> None:
    """Raises `Refused` where the value does not fit the schema of this name."""
    for problem in _validator(name).iter_errors(value):
        place = "/".join(map(str, problem.instance_path))
        raise Refused(code, f"{what} does not fit at /{place}.")


def with_registration(order: Order, kind: str, body: Mapping[str, Any], call: Call) -> Order:
    """The order with one more validation, hook or notification, as the last of its kind. Raises `Refused`."""
    new = _registration(kind, body, call)
    unique = call.switches.notification_reference_unique and kind == "notifications"
    if unique and new.get("reference") in {each.get("reference") for each in order[kind]} - {None}:
        raise Refused("order-bad-request", "There is a notification with this reference already.")
    return {**order, kind: [*order[kind], new]}


def _registration(kind: str, body: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """As it is kept: in the words of v1, with an id of ours. Raises `Refused`."""
    names = OWN_NAMES.get(kind, {})
    if kind == "notifications":
        body = _documented(body, call.switches)
    new = {**{names.get(name, name): value for name, value in body.items()}, "id": call.new_id(_PREFIXES[kind])}
    check_fits(new, kind.removesuffix("s"), f"One of the {kind}")
    return new


class _States(msgspec.Struct, forbid_unknown_fields=True):
    state: list[str]


class _OlderForm(msgspec.Struct):
    """A notification as the solution guide has it registered."""

    url: str
    scope: _States
    method: str = "POST"
    headers: dict[str, str] = {}  # msgspec copies it


def is_older_form(body: Any) -> bool:
    return isinstance(body, Mapping) and isinstance(body.get("scope"), Mapping)


def _documented(body: Mapping[str, Any], switches: Switches) -> dict[str, Any]:
    """A notification in the words of the API description, and how it is sent beside them. Raises `Refused`."""
    # The documented form has none of these, so that what is kept of them has been read below.
    shared = {name: value for name, value in body.items() if name not in ("url", "method", "headers")}
    if not (switches.notification_older_form and is_older_form(body)):
        return shared
    try:
        older = msgspec.convert(body, _OlderForm)
    except msgspec.ValidationError as error:
        raise Refused("order-bad-request", f"The notification does not fit: {error}.") from error
    watched = {"scope": "/state/currentStatus", "schema": {"enum": older.scope.state}}
    return {**shared, **watched, "invoke": older.url, "method": older.method, "headers": older.headers}


def _check_condition(new: Mapping[str, Any]) -> None:
    if (scope := new.get("scope")) is None:
        return
    if _is_in_array(scope):
        raise Refused("order-bad-request", "A scope inside an array is not supported.")
    try:
        Condition(scope, new.get("schema")).compile()
    except ConditionInvalid as error:
        raise Refused("order-bad-request", str(error)) from error


def _is_in_array(pointer: str) -> bool:
    parts = tuple(pointer.split("/")[1:])
    return any(parts[:end] in _LISTS for end in range(1, len(parts)))


def _patchable(switches: Switches) -> tuple[str, ...]:
    more = {"reference": switches.hook_on_reference, "attributes": switches.hook_on_attributes}
    return (*WATCHED, *(name for name, on in more.items() if on))


def _status(name: Any) -> str:
    status = name.lower() if isinstance(name, str) else ""
    if status not in TRANSITIONS:
        raise Refused("order-bad-request", f"There is no status {name}.")
    return status


def _moved(order: Order, status: str, call: Call) -> Order:
    state = order["state"]
    if status == state["currentStatus"]:
        return dict(order)
    if call.switches.transitions_enforced and status not in TRANSITIONS[state["currentStatus"]]:
        raise Refused("order-error", f"An order does not move from {state['currentStatus']} to {status}.")
    transitions = [*state["transitions"], {"status": status, "timeStamp": call.now}]
    return {**order, "state": {**state, "currentStatus": status, "transitions": transitions}}


def _unlocked(order: Order, part: str, call: Call) -> None:
    status = order["state"]["currentStatus"]
    if call.switches.parts_locked and part in _LOCKED[status]:
        raise Refused("order-error", f"The {part} of an order in {status} does not change.")


def _only_upsells(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    kept, before = {each["id"]: each for each in new["items"]}, {each["id"]: each for each in old["items"]}
    return all(name in kept and same(kept[name], each) for name, each in before.items()) and all(
        each.get("upsell") for name, each in kept.items() if name not in before
    )


def _cart(body: Mapping[str, Any], call: Call) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if value is not None}
    items = [_item(each, call) for each in given.get("items", ())]
    total = given.get("total") or _sum([each.get("total") for each in items])
    return {"reference": None, "discounts": [], "attributes": {}, **given, "items": items, "total": total}


def _item(item: Mapping[str, Any], call: Call) -> dict[str, Any]:
    own = {"items": [_item(each, call) for each in item["items"]]} if item.get("items") else {}
    return {**_with_id(item, "ci", call), **own}


def _with_id(body: Mapping[str, Any], prefix: str, call: Call) -> dict[str, Any]:
    return {**body, "id": body.get("id") or call.new_id(prefix)}


def _payment(order: Order, body: Mapping[str, Any], payment_id: str, call: Call) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if value is not None and name not in _NOT_FROM_A_BODY}
    actions = [_with_id(each, "pa", call) for each in given.pop("actions", ())]
    payment = {"state": "intent", "type": "default", "currency": order["currency"], "attributes": {}, **given}
    return {**payment, **_whose(order, payment_id), "actions": actions}


def _shipping(order: Order, body: Mapping[str, Any], shipping_id: str) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if name not in _NOT_FROM_A_BODY}
    return {"attributes": {}, **given, "state": given.get("state") or "intent", **_whose(order, shipping_id)}


def _whose(order: Order, part_id: str) -> dict[str, Any]:
    return {"id": part_id, "orderId": order["id"], "merchant": order["merchant"], "channel": order["channel"]}


def _replaced(order: Order, part: str, position: int, new: Any) -> tuple[Order, None]:
    return {**order, part: [*order[part][:position], new, *order[part][position + 1 :]]}, None


def _removed(order: Order, part: str, part_id: str) -> tuple[Order, None]:
    position = find(order[part], part_id)
    return {**order, part: [*order[part][:position], *order[part][position + 1 :]]}, None


def _sum(prices: list[Any]) -> dict[str, float]:
    return {
        name: round(sum(money((each or {}).get(name)) for each in prices), 2)
        for name in ("includingVat", "excludingVat")
    }


def _fitting(pattern: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
