"""The table of Norce's APIs: the address, body and answers of each operation. Pure.

The client, the sandbox and the tests use this table. The declared errors are not all that can come: an operation may
answer any 4xx or 5xx, with a body of either kind (`error`). A change answers 200 without a body, and hooks may have
changed more than was sent.

Facts: checkout protocol, sections 1.2, 1.3, 4, 8.4, 9 and, for what other adapters offer, 10 and 11.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from importlib.resources import files
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

V0, V1 = "v0", "v1"
AUTHORIZATION, MERCHANT, CHANNEL, ADAPTER_ID = "authorization", "x-merchant", "x-channel", "x-adapterid"

# The codes in the errors of Norce's services, and their statuses. The operation tells which of two is used.
CODES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "order-bad-request": (400,),
        "order-validation": (400,),
        "order-error": (400,),
        "payment-error": (400,),
        "configuration-error": (400,),
        "unauthorized": (401, 403),
        "application-not-found": (404,),
        "order-not-found": (404,),
        "payment-not-found": (404,),
        "shipping-not-found": (404,),
        "configuration-not-found": (404,),
        "order-conflict": (409,),
        "internal-server-error": (500,),
    }
)


_OK: Mapping[int, str | None] = MappingProxyType({200: None})


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of Norce's APIs, as declared."""

    name: str
    service: str
    method: str
    path: str  # after `…/checkout/{service}`
    _: KW_ONLY
    versions: tuple[str, ...] = (V1,)
    body: str | None = None  # name of its schema
    query: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by version
    headers: tuple[str, ...] = (AUTHORIZATION, MERCHANT, CHANNEL)  # required and not empty
    optional_headers: tuple[str, ...] = ()
    answers: Mapping[int, str | None] = field(default_factory=lambda: _OK)  # by status: name of the body's schema
    errors: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {V1: (400, 401, 404)})  # by version
    error: str = "error"  # name of the schema of an error's body

    @property
    def title(self) -> str:
        """The method and the path as messages show them: with the names of parameters."""
        return f"{self.method} {self.path.partition('{version}')[2] or self.path}"

    def template(self, version: str) -> str:
        """Return the path below the Checkout services, with its parameters in braces."""
        return f"/{self.service}{self.path.replace('{version}', version)}"

    def url(self, base_url: str, version: str, /, **parameters: str) -> str:
        """Return the address below a base such as `https://slug.api-se.norce.tech/checkout`.

        Raises `ValueError` if a parameter is empty, `.` or `..`: it would lead to another operation.
        """
        quoted = {name: quote(value, safe="") for name, value in parameters.items()}
        path = self.template(version).format_map(quoted)
        if not {"", ".", ".."}.isdisjoint(path[1:].split("/")):
            raise ValueError("a parameter of the path is empty, . or ..")
        return base_url.rstrip("/") + path


def _order(
    name: str,
    method: str,
    tail: str,
    *,
    body: str | None = None,
    answers: Mapping[int, str | None] = _OK,
    declared: tuple[int, ...] = (401, 404),  # by v1; v0 declares the same errors for every operation
    v0: tuple[int, ...] = (400, 401, 404, 500),
    query: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    error: str = "error",
) -> Operation:
    return Operation(
        name,
        "order",
        method,
        "/api/{version}/checkout/orders" + tail,
        versions=(V0, V1),
        body=body,
        query=query,
        optional_headers=(ADAPTER_ID,),
        answers=answers,
        errors={V0: v0, V1: declared},
        error=error,
    )


def _configuration(
    name: str, method: str, tail: str, *, body: str | None = None, answer: str | None = None
) -> Operation:
    return Operation(
        name,
        "configuration",
        method,
        "/api/v1/configuration/merchants/{merchant}/channels" + tail,
        body=body,
        headers=(AUTHORIZATION,),  # merchant and channel are in the path
        answers={200: answer},
        errors={V1: (400, 401) if method == "PUT" else (400, 401, 404)},  # a PUT creates what is missing
    )


_CHANGED = (400, 401, 404)
_CALLBACKS = (400, 403)  # by v1, for registrations
_PEOPLE = tuple(
    f"{whose}_{what}[]"
    for whose in ("billing", "shipping")
    for what in ("names", "emails", "phones", "countries")
)  # fmt: skip
_LISTING = {
    V0: ("offset", "limit", "search", "payment_id", "reference", "cart_reference", "order_by", "order_by_direction"),
    V1: (
        "offset", "limit", "order_by", "order_by_direction", "date_from", "date_to", "status[]", "payment_id",
        "reference", "cart_reference", "countries[]", *_PEOPLE,
    ),
}  # fmt: skip
_PLATFORM = "/api/v1/orders"
_PROVIDER = "/api/checkout/v1/orders/{order_id}"

OPERATIONS: tuple[Operation, ...] = (
    # --- the order service: orders ---------------------------------------------------------------------------------
    _order("create_order", "POST", "", body="order-create", answers={201: "created"}, declared=(401,),
           v0=(400, 401, 404, 409, 500)),
    _order("list_orders", "GET", "", answers={200: "order-page"}, query=_LISTING),
    _order("read_order", "GET", "/{order_id}", answers={200: "order"}),
    _order("delete_order", "DELETE", "/{order_id}", answers={204: None}),
    _order("put_cart", "PUT", "/{order_id}/cart", body="cart", declared=_CHANGED),
    _order("put_billing", "PUT", "/{order_id}/customer/billing", body="address", declared=_CHANGED),
    _order("put_shipping_address", "PUT", "/{order_id}/customer/shipping", body="address", declared=_CHANGED),
    _order("patch_attributes", "PATCH", "/{order_id}/attributes", body="attributes", declared=_CHANGED),
    _order("put_reference", "PUT", "/{order_id}/reference", body="reference"),
    _order("put_state", "PUT", "/{order_id}/state", body="state", answers={200: None, 202: None}),
    _order("validate", "POST", "/{order_id}/validate", answers={200: "errors"}, declared=_CHANGED, error="refusal"),
    # --- consents --------------------------------------------------------------------------------------------------
    _order("patch_consents", "PATCH", "/{order_id}/consents", body="consents", declared=_CHANGED),
    # --- callbacks; the answer to an addition has no id, so read the order to find it ------------------------------
    _order("add_validation", "POST", "/{order_id}/validations", body="validation", declared=_CALLBACKS),
    _order("put_validation", "PUT", "/{order_id}/validations/{validation_id}", body="validation", declared=_CALLBACKS),
    _order("remove_validation", "DELETE", "/{order_id}/validations/{validation_id}", declared=_CALLBACKS),
    _order("add_hook", "POST", "/{order_id}/hooks", body="hook", declared=_CALLBACKS),
    _order("remove_hook", "DELETE", "/{order_id}/hooks/{hook_id}", declared=_CALLBACKS),
    _order("add_notification", "POST", "/{order_id}/notifications", body="notification", declared=_CALLBACKS),
    _order("remove_notification", "DELETE", "/{order_id}/notifications/{notification_id}", declared=_CALLBACKS),
    # --- payments and shippings ------------------------------------------------------------------------------------
    _order("list_payments", "GET", "/{order_id}/payments", answers={200: "payments"}),
    _order("add_payment", "POST", "/{order_id}/payments", body="payment", answers={201: "created"}),
    _order("read_payment", "GET", "/{order_id}/payments/{payment_id}", answers={200: "payment"}),
    _order("put_payment", "PUT", "/{order_id}/payments/{payment_id}", body="payment", answers={200: "payment"}),
    _order("list_transactions", "GET", "/{order_id}/payments/{payment_id}/transactions",
           answers={200: "transactions"}),
    _order("add_transaction", "POST", "/{order_id}/payments/{payment_id}/transactions", body="transaction",
           answers={200: "transaction"}),
    _order("list_shippings", "GET", "/{order_id}/shippings", answers={200: "shippings"}),
    _order("add_shipping", "POST", "/{order_id}/shippings", body="shipping", answers={201: "created"}),
    _order("read_shipping", "GET", "/{order_id}/shippings/{shipping_id}", answers={200: "shipping"}),
    _order("put_shipping", "PUT", "/{order_id}/shippings/{shipping_id}", body="shipping", answers={200: "shipping"}),
    # --- the configuration service ---------------------------------------------------------------------------------
    _configuration("list_channels", "GET", "", answer="channels"),
    _configuration("list_configurations", "GET", "/{channel}/configurations", answer="configurations"),
    _configuration("put_configurations", "PUT", "/{channel}/configurations", body="configurations",
                   answer="configurations"),
    _configuration("remove_configurations", "DELETE", "/{channel}/configurations"),
    _configuration("read_configuration", "GET", "/{channel}/configurations/{name}", answer="adapter-configuration"),
    _configuration("put_configuration", "PUT", "/{channel}/configurations/{name}", body="adapter-configuration",
                   answer="adapter-configuration"),
    _configuration("remove_configuration", "DELETE", "/{channel}/configurations/{name}"),
    # --- the notification service ----------------------------------------------------------------------------------
    # The channel is a filter of events, so its header is not needed.
    Operation("list_events", "notification", "GET", "/api/v1/events", answers={200: "events"},
              headers=(AUTHORIZATION, MERCHANT), errors={V1: (400, 401)},
              query={V1: ("channel", "adapter_id", "reference", "order_id", "offset", "limit")}),
    Operation("read_event", "notification", "GET", "/api/v1/events/{event_id}", answers={200: "notification-event"},
              headers=(AUTHORIZATION, MERCHANT), errors={V1: (401, 404)}),
    Operation("retry_event", "notification", "POST", "/api/v1/events/{event_id}/retry",
              headers=(AUTHORIZATION, MERCHANT), errors={V1: (401, 404)}),
    # --- other adapters, as far as an order needs them to be completed ---------------------------------------------
    Operation("create_from_basket", "norce-adapter", "POST", _PLATFORM, body="basket",
              answers={200: "created", 201: "created"}, errors={V1: (400, 401, 404, 409)}),
    Operation("refresh_from_basket", "norce-adapter", "PUT", f"{_PLATFORM}/{{order_id}}", answers={200: "order"}),
    Operation("patch_item", "norce-adapter", "PATCH", f"{_PLATFORM}/{{order_id}}/cart/items/{{item_id}}",
              body="quantity"),
    Operation("validate_basket", "norce-adapter", "POST", f"{_PLATFORM}/{{order_id}}/validate", error="refusal"),
    Operation("start_payment", "nonpsp-adapter", "POST", f"{_PROVIDER}/payments", answers={200: "startedPayment"}),
    Operation("complete_payment", "nonpsp-adapter", "POST", f"{_PROVIDER}/payments/{{payment_id}}/complete",
              error="refusal"),
    Operation("cancel_payment", "nonpsp-adapter", "POST", f"{_PROVIDER}/payments/{{payment_id}}/remove"),
    Operation("start_shipping", "ingrid-adapter", "POST", f"{_PROVIDER}/shippings",
              answers={200: "startedShipping"}),
    Operation("complete_shipping", "ingrid-adapter", "POST", f"{_PROVIDER}/shippings/{{shipping_id}}/complete"),
)  # fmt: skip

BY_NAME: Mapping[str, Operation] = MappingProxyType({each.name: each for each in OPERATIONS})


@functools.cache
def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a body, with everything that it refers to.

    `name` is what an operation calls it. Raises `KeyError`.
    """
    documents = _documents()
    bodies = documents["bodies"]["$id"]
    target = f"{bodies}#/$defs/{name}" if name in documents["bodies"]["$defs"] else documents[name]["$id"]
    return {"$schema": documents["bodies"]["$schema"], "$ref": target, "$defs": documents}


@functools.cache
def _documents() -> dict[str, dict[str, Any]]:
    folder = files(__package__).joinpath("schemas")
    return {each.name.removesuffix(".json"): json.loads(each.read_text("utf-8")) for each in folder.iterdir()}
