"""
HTTP in: every operation of the table at its address, and the simulator's own page, journal and switches.

The token is all that is asked for; merchant and channel say whose the order is. What one would get wrong: faults happen
outside of everything else, so that a lost answer is one whose operation was carried out.
"""

import hmac
import inspect
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import jinja2
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.norce.api import (
    ADAPTER_ID,
    AUTHORIZATION,
    BY_NAME,
    CHANNEL,
    MERCHANT,
    OPERATIONS,
    V0,
    V1,
    Operation,
    schema,
)
from adapter.sandbox.norce import configuration, neighbours
from adapter.sandbox.norce.callbacks import as_text
from adapter.sandbox.norce.checkout import Checkout, etag
from adapter.sandbox.norce.orders import CHANGES, Call, Invalid, Refused, check_fits, is_older_form, money, part
from adapter.sandbox.norce.switches import Switches, SwitchInvalid
from adapter.sandbox.norce.versions import Order, as_version

PREFIX = "/checkout"
BASIC_SCHEMA = f"{PREFIX}/configuration/openapi/v1/schemas/configuration.json"

Handler = Callable[[Call], Any]  # what it answers, or an awaitable of that


def services(checkout: Checkout, tokens: Collection[str]) -> ASGIApp:
    """The app."""
    handlers = {
        **{name: _changing(checkout, name) for name in CHANGES},
        **_reading(checkout),
        **_events(checkout),
        **configuration.handlers(checkout),
        **neighbours.handlers(checkout),
    }
    routes = [
        Route(
            PREFIX + operation.template(version),
            _endpoint(checkout, tokens, operation, version, handlers[operation.name]),
            methods=[operation.method],
        )
        for operation in OPERATIONS
        for version in operation.versions
    ]
    return _Doors(checkout, Starlette(routes=[*routes, *_own(checkout)]))


def _endpoint(
    checkout: Checkout, tokens: Collection[str], operation: Operation, version: str, handler: Handler
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        switches = checkout.switches
        try:
            _let_in(request, checkout, tokens, operation, version)
            call = Call(
                body=await _body(request, operation, switches),
                path=request.path_params,
                query={name: request.query_params.getlist(name) for name in request.query_params},
                version=version,
                merchant=request.headers.get(MERCHANT, ""),
                channel=request.headers.get(CHANNEL, ""),
                adapter_id=request.headers.get(ADAPTER_ID),
                # A change that another adapter makes on request is its own, and knows of no tag.
                if_match=request.headers.get("if-match") if operation.service == "order" else None,
                now=as_text(checkout.now()),
                new_id=checkout.new_id,
                switches=switches,
            )
            body = handler(call)
            if inspect.isawaitable(body):
                body = await body
        except Invalid as invalid:
            request.scope["simulator.note"] = ", ".join(str(each["code"]) for each in invalid.errors)
            is_array = switches.validate_refusal == "array"
            return JSONResponse(invalid.errors if is_array else {"errors": invalid.errors}, 400)
        except Refused as refused:
            request.scope["simulator.note"] = refused.code
            return _refusal(refused, operation, version, problems=switches.v1_problems)
        answer = _answer(request, operation, version, switches, body)
        if switches.etags and operation.service == "order" and operation.method == "GET" and "order_id" in call.path:
            answer.headers["etag"] = etag(checkout.stored(call))
        return answer

    return endpoint


def _let_in(request: Request, checkout: Checkout, tokens: Collection[str], operation: Operation, version: str) -> None:
    """Raises `Refused`."""
    switches, headers = checkout.switches, request.headers
    given = headers.get(AUTHORIZATION, "").encode("latin-1")
    # The access guide writes Bearer, the sample of the API reference does not.
    taken = [known.encode() for token in tokens for known in (f"Bearer {token}", token)]
    is_known = any(hmac.compare_digest(given, known) for known in taken)
    is_theirs = switches.token_merchant in ("", headers.get(MERCHANT) or request.path_params.get("merchant"))
    if not (is_known and is_theirs):
        raise Refused("unauthorized", "Unauthorized", 401 if 401 in operation.errors[version] else 403)
    for name in operation.headers:
        if not headers.get(name):
            raise Refused("order-bad-request", f"The header {name} is missing.")
    if operation.service == "order" and version == V0 and not switches.v0_served:
        raise Refused("order-not-found", "There is no v0.")
    merchant, channel = headers.get(MERCHANT, ""), headers.get(CHANNEL, "")
    if operation.service == "configuration" and merchant not in ("", request.path_params["merchant"]):
        raise Refused("configuration-error", f"The header {MERCHANT} names another merchant than the path.")
    asks_channel = CHANNEL in operation.headers and switches.channels_unknown
    if asks_channel and not checkout.records.documents_of(merchant, channel):
        raise Refused("application-not-found", "There is no such merchant and channel.")


def _answer(request: Request, operation: Operation, version: str, switches: Switches, body: Any) -> Response:
    status: int = next(iter(operation.answers))
    if operation.name == "create_from_basket":
        status = switches.basket_created_status
    elif operation.name == "put_state" and version == V1:
        status = switches.state_status
    headers = {}
    if status == 201:
        headers["location"] = f"{request.url.path}/{body['id']}"
        request.scope["simulator.order_id"] = request.path_params.get("order_id", body["id"])
    if operation.name == "create_order" and switches.created_body == "string":
        body = body["id"]
    content = b"" if body is None else msgspec.json.encode(body)
    return Response(content, status, headers, "application/json" if content else None)


async def _body(request: Request, operation: Operation, switches: Switches) -> Any:
    """What was sent, if the operation takes a body and this one fits its schema. Raises `Refused`."""
    code = "configuration-error" if operation.service == "configuration" else "order-bad-request"
    if operation.body is None:
        return None
    raw, largest = bytearray(), switches.largest_order_bytes
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > largest:
            raise Refused(code, f"The body has more than {largest} bytes.")
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise Refused(code, "The body is no valid JSON.") from error
    except RecursionError as error:
        raise Refused(code, "The body is nested too deeply.") from error
    if operation.name == "add_notification" and switches.notification_older_form and is_older_form(body):
        return body  # it has no schema; who registers it reads it
    check_fits(body, operation.body, "The body", code)
    return body


def _refusal(refused: Refused, operation: Operation, version: str, *, problems: bool) -> Response:
    if operation.service == "notification" or (operation.service == "order" and version == V1 and problems):
        title = HTTPStatus(refused.status).phrase
        body: dict[str, Any] = {"title": title, "status": refused.status, "detail": refused.message}
        return JSONResponse(body, refused.status, media_type="application/problem+json")
    body = {"code": refused.code, "message": refused.message}
    if operation.service == "configuration":
        body["details"] = None
    return JSONResponse(body, refused.status)


# --- the order service ------------------------------------------------------------------------------------------------


def _changing(checkout: Checkout, name: str) -> Handler:
    shown = BY_NAME[name].answers

    async def change(call: Call) -> Any:
        answer = await checkout.change(name, call)
        if name in ("put_payment", "put_shipping"):
            part = "payments" if name == "put_payment" else "shippings"
            return _parts(checkout.stored(call), part, call, answer["id"])
        return answer if any(shown.values()) else None

    return change


def _parts(order: Order, name: str, call: Call, part_id: str | None = None) -> Any:
    parts = as_version(order, call.version, call.switches)[name]
    if part_id is None:
        return parts
    return part(parts, part_id, f"{name.removesuffix('s')}-not-found")


def _reading(checkout: Checkout) -> dict[str, Handler]:
    async def validate(call: Call) -> Any:
        await checkout.validate(call)
        return None if call.switches.validate_success == "empty" else []

    def list_transactions(call: Call) -> Any:
        order = checkout.stored(call)
        part(order["payments"], call.path["payment_id"], "payment-not-found")
        return order["_transactions"].get(call.path["payment_id"], [])

    return {
        "create_order": lambda call: {"id": checkout.create(call)["id"]},
        "list_orders": lambda call: _page(checkout.records.orders.values(), call),
        "read_order": lambda call: as_version(checkout.stored(call), call.version, call.switches),
        "delete_order": checkout.delete,
        "validate": validate,
        "execute_action": checkout.execute,
        "list_payments": lambda call: _parts(checkout.stored(call), "payments", call),
        "read_payment": lambda call: _parts(checkout.stored(call), "payments", call, call.path["payment_id"]),
        "list_transactions": list_transactions,
        "list_shippings": lambda call: _parts(checkout.stored(call), "shippings", call),
        "read_shipping": lambda call: _parts(checkout.stored(call), "shippings", call, call.path["shipping_id"]),
    }


def _at(order: Mapping[str, Any], *names: str) -> Any:
    value: Any = order
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _name(order: Order, which: str) -> str:
    address = _at(order, "customer", which) or {}
    return " ".join(str(address[part]) for part in ("givenName", "familyName") if address.get(part))


# Filters of the list: what of an order must equal, without regard to case, one of the values asked for.
_FILTERS: dict[str, Callable[[Order], Iterable[Any]]] = {
    "status": lambda order: [order["state"]["currentStatus"]],
    "reference": lambda order: [order["reference"]],
    "cart_reference": lambda order: [order["cart"]["reference"]],
    "payment_id": lambda order: [each["id"] for each in order["payments"]],
    "countries": lambda order: [order["country"]],
    "billing_names": lambda order: [_name(order, "billing")],
    "billing_emails": lambda order: [_at(order, "customer", "billing", "email")],
    "billing_phones": lambda order: [_at(order, "customer", "billing", "phone")],
    "billing_countries": lambda order: [_at(order, "customer", "billing", "country")],
    "shipping_names": lambda order: [_name(order, "shipping")],
    "shipping_emails": lambda order: [_at(order, "customer", "shipping", "email")],
    "shipping_phones": lambda order: [_at(order, "customer", "shipping", "phone")],
    "shipping_countries": lambda order: [_at(order, "customer", "shipping", "country")],
}
_SORTED_BY: Mapping[str, Callable[[Order], Any]] = {
    "created": lambda order: order["created"],
    "billingEmail": lambda order: _at(order, "customer", "billing", "email") or "",
    "billingName": lambda order: _name(order, "billing"),
    "cartTotal": lambda order: money(_at(order, "cart", "total", "includingVat")),
}


def _page(orders: Iterable[Order], call: Call) -> dict[str, Any]:
    asked = {name.removesuffix("[]"): values for name, values in call.query.items()}
    wanted = {
        name: {value.casefold() for each in asked[name] for value in each.split(",")}
        for name in asked & _FILTERS.keys()
    }
    since, until = (_moment(asked[name][0]) if name in asked else "" for name in ("date_from", "date_to"))
    search = asked.get("search", [""])[0].casefold()
    found = [
        order
        for order in orders
        if (order["merchant"], order["channel"]) == (call.merchant, call.channel)
        and since <= order["created"] <= (until or order["created"])
        and all(any(str(each).casefold() in values for each in _FILTERS[n](order)) for n, values in wanted.items())
        and (not search or search in msgspec.json.encode(order).decode().casefold())
    ]
    order_by = asked.get("order_by", ["created"])[0]
    if order_by not in _SORTED_BY:
        raise Refused("order-bad-request", f"order_by is one of {', '.join(_SORTED_BY)}.")
    direction = (asked.get("order_by_direction") or asked.get("direction") or ["desc"])[0]
    found.sort(key=_SORTED_BY[order_by], reverse=direction.lower() == "desc")
    data, pagination = _cut(found, call)
    if call.version == V0:
        worth = round(sum(money(_at(order, "total", "includingVat")) for order in found), 2)
        pagination |= {"size": len(found), "valueSum": worth}
    return {"data": [as_version(order, call.version, call.switches) for order in data], "pagination": pagination}


def _moment(text: str) -> str:
    """As orders have it. Raises `Refused`."""
    try:
        given = datetime.fromisoformat(text)
    except ValueError as error:
        raise Refused("order-bad-request", "date_from and date_to are moments such as 2026-02-03T12:00:00Z.") from error
    return as_text((given if given.tzinfo else given.replace(tzinfo=UTC)).astimezone(UTC))


def _cut(found: list[Any], call: Call) -> tuple[list[Any], dict[str, Any]]:
    try:
        offset, limit = (
            int(call.query.get(name, [default])[0]) for name, default in (("offset", "0"), ("limit", "10"))
        )
    except ValueError as error:
        raise Refused("order-bad-request", "offset and limit are integers.") from error
    if offset < 0 or limit < 0:
        raise Refused("order-bad-request", "offset and limit are not below 0.")
    data = found[offset : offset + limit]
    return data, {"offset": offset, "limit": limit, "size": len(data), "totalSize": len(found)}


# --- the notification service -----------------------------------------------------------------------------------------


def _events(checkout: Checkout) -> dict[str, Handler]:
    filters = {"channel": "channel", "adapter_id": "adapterId", "reference": "reference"}
    filters |= {"order_id": "orderId", "orderId": "orderId"}  # as an older collection writes it

    def shown(event: dict[str, Any], call: Call) -> dict[str, Any]:
        hidden = ("_lost",) if call.switches.events_attempts_shown else ("_lost", "attempts")
        return {name: value for name, value in event.items() if name not in hidden}

    def is_seen(event: dict[str, Any], call: Call) -> bool:
        kept = call.switches.events_kept_seconds
        is_kept = not kept or age(event) <= kept
        return is_kept and event["merchant"] == call.merchant

    def age(event: dict[str, Any]) -> float:
        return (checkout.now() - datetime.fromisoformat(event["createdAt"])).total_seconds()

    def find_event(call: Call) -> dict[str, Any]:
        event = checkout.records.events.get(call.path["event_id"])
        if event is None or not is_seen(event, call):
            raise Refused("order-not-found", "There is no such event.")
        return event

    def list_events(call: Call) -> Any:
        asked = {filters[name]: values for name, values in call.query.items() if name in filters}
        found = [
            event
            for event in checkout.records.events.values()
            if is_seen(event, call) and all(event[name] in values for name, values in asked.items())
        ]
        if call.switches.events_order == "newest":
            found.reverse()
        data, pagination = _cut(found, call)
        return {"data": [shown(each, call) for each in data], "pagination": pagination}

    return {
        "list_events": list_events,
        "read_event": lambda call: shown(find_event(call), call),
        "retry_event": lambda call: checkout.callbacks.retry(find_event(call)["id"]),
    }


# --- the simulator's own ----------------------------------------------------------------------------------------------


def _own(checkout: Checkout) -> list[Route]:
    page = jinja2.Environment(autoescape=True).from_string(files(__package__).joinpath("page.html").read_text("utf-8"))

    async def basic_schema(_request: Request) -> Response:
        return JSONResponse(schema("adapter-configuration"))

    async def journal(request: Request) -> Response:
        query = request.query_params
        try:
            after, limit = int(query.get("after", "0")), int(query.get("limit", "100"))
        except ValueError:
            return JSONResponse({"code": "bad-request", "message": "after and limit are integers."}, 400)
        rows = checkout.journal.read(order_id=query.get("order_id"), kind=query.get("kind"), after=after, limit=limit)
        return JSONResponse([asdict(each) for each in rows])

    async def switches(request: Request) -> Response:
        if request.method == "PUT":
            try:
                given = msgspec.json.decode(await request.body(), type=dict[str, Any])
                checkout.switches = checkout.switches.with_values(given)
            except (msgspec.DecodeError, SwitchInvalid) as error:
                return JSONResponse({"code": "bad-request", "message": str(error)}, 400)
        return JSONResponse(asdict(checkout.switches))

    async def front(_request: Request) -> Response:
        orders = sorted(checkout.records.orders.values(), key=lambda each: str(each["lastModified"]), reverse=True)
        shown = [(each, checkout.journal.read(order_id=each["id"], limit=50)) for each in orders[:25]]
        return HTMLResponse(page.render(orders=shown, count=len(orders), switches=asdict(checkout.switches)))

    return [
        Route(BASIC_SCHEMA, basic_schema),
        Route("/simulator/journal", journal),
        Route("/simulator/switches", switches, methods=["GET", "PUT"]),
        Route("/", front),
    ]


class _Doors:
    """Around the services: the journal, and what goes wrong before or after an operation."""

    def __init__(self, checkout: Checkout, app: ASGIApp) -> None:
        self._checkout = checkout
        self._app = app
        self._second, self._taken = "", 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(f"{PREFIX}/"):
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status: int | None = None
        held: list[Message] = []  # until it is known what becomes of the answer

        async def hold(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            held.append(message)

        switches, chance = self._checkout.switches, self._checkout.chance
        breaks = chance.random() < switches.connections_broken
        fault = None if breaks else self._fault()
        if not breaks:
            await (fault or self._app)(scope, receive, hold)
        if chance.random() < switches.answers_slow:
            await self._checkout.sleep(switches.slow_seconds)
        breaks = breaks or chance.random() < switches.answers_lost
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path = scope.get("path_params", {})
        self._checkout.journal.write(
            url=scope["path"],
            at=as_text(self._checkout.now()),
            kind="request",
            method=scope["method"],
            status=None if breaks else status,
            took_ms=round((time.monotonic() - began) * 1000),
            order_id=scope.get("simulator.order_id", path.get("order_id")),
            merchant=headers.get(MERCHANT.encode()),
            channel=headers.get(CHANNEL.encode()),
            note="broken on purpose" if breaks else scope.get("simulator.note", ""),
        )
        if breaks:
            # An answer that is announced and does not come: the server closes the connection.
            held = [{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}]
        for message in held:
            await send(message)

    def _fault(self) -> ASGIApp | None:
        switches = self._checkout.switches
        second = as_text(self._checkout.now())[:19]
        self._taken = self._taken + 1 if second == self._second else 1
        self._second = second
        if 0 < switches.requests_per_second < self._taken:
            return JSONResponse({"code": "too-many-requests", "message": "Slower."}, 429, {"retry-after": "1"})
        if self._checkout.chance.random() < switches.server_errors:
            return JSONResponse({"code": "internal-server-error", "message": "On purpose."}, 500)
        return None
