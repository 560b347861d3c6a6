"""The HTTP endpoints of the services and of the switches.

The token is the only credential; the headers name the merchant and channel. Faults are injected outside of everything
else, so a request whose answer is lost was carried out.
"""

import hmac
import inspect
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.moments import to_milliseconds, to_text
from adapter.norce.api import ADAPTER_ID, AUTHORIZATION, BY_NAME, CHANNEL, MERCHANT, OPERATIONS, V0, Operation, schema
from adapter.sandbox.norce import configuration, other_adapters
from adapter.sandbox.norce.checkout import Checkout
from adapter.sandbox.norce.orders import CHANGES, ApiRequest, Refused, ValidationFailed, check_fits, money, part
from adapter.sandbox.norce.switches import SwitchInvalid
from adapter.sandbox.norce.versions import Order, as_version

PREFIX = "/checkout"
BASIC_SCHEMA = f"{PREFIX}/configuration/openapi/v1/schemas/configuration.json"
MAX_BODY_BYTES = 2_000_000

Handler = Callable[[ApiRequest], Any]
"""Returns the body of the answer, or an awaitable of it. Raises `Refused`."""


def application(checkout: Checkout, tokens: Collection[str]) -> ASGIApp:
    """Return the application that serves all services below `/checkout`."""
    handlers = {
        **{name: _change_handler(checkout, name) for name in CHANGES},
        **_order_handlers(checkout),
        **_event_handlers(checkout),
        **configuration.handlers(checkout),
        **other_adapters.handlers(checkout),
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
    return _WithFaults(checkout, Starlette(routes=[*routes, *_own_routes(checkout)]))


def _endpoint(
    checkout: Checkout, tokens: Collection[str], operation: Operation, version: str, handler: Handler
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(http_request: Request) -> Response:
        headers = http_request.headers
        try:
            _authorize(http_request, tokens, operation, version)
            request = ApiRequest(
                body=await _parsed_body(http_request, operation),
                path=http_request.path_params,
                query={name: http_request.query_params.getlist(name) for name in http_request.query_params},
                version=version,
                merchant=headers.get(MERCHANT, ""),
                channel=headers.get(CHANNEL, ""),
                adapter_id=headers.get(ADAPTER_ID),
                now=checkout.timestamp(),
                new_id=checkout.new_id,
                switches=checkout.switches,
            )
            body = handler(request)
            if inspect.isawaitable(body):
                body = await body
        except ValidationFailed as failure:
            http_request.scope["simulator.note"] = ", ".join(str(each["code"]) for each in failure.errors)
            return JSONResponse(failure.errors, 400)
        except Refused as refused:
            http_request.scope["simulator.note"] = refused.code
            return _refusal(refused, operation)
        return _success(http_request, operation, body)

    return endpoint


def _authorize(request: Request, tokens: Collection[str], operation: Operation, version: str) -> None:
    given = request.headers.get(AUTHORIZATION, "").encode("latin-1")
    # The access guide writes `Bearer`; the sample of the API reference does not.
    accepted = [text.encode() for token in tokens for text in (f"Bearer {token}", token)]
    if not any(hmac.compare_digest(given, each) for each in accepted):
        raise Refused("unauthorized", "Unauthorized", 401 if 401 in operation.errors[version] else 403)
    for name in operation.headers:
        if not request.headers.get(name):
            raise Refused("order-bad-request", f"The header {name} is missing.")
    merchant = request.path_params.get("merchant")
    if operation.service == "configuration" and request.headers.get(MERCHANT, merchant) not in ("", merchant):
        raise Refused("configuration-error", f"The header {MERCHANT} names another merchant than the path.")


async def _parsed_body(request: Request, operation: Operation) -> Any:
    if operation.body is None:
        return None
    code = "configuration-error" if operation.service == "configuration" else "order-bad-request"
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise Refused(code, f"The body has more than {MAX_BODY_BYTES} bytes.")
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(code, "The body is no valid JSON, or is nested too deeply.") from error
    check_fits(body, operation.body, "The body", code)
    return body


def _success(request: Request, operation: Operation, body: Any) -> Response:
    status = next(iter(operation.answers)) if operation.name != "create_from_basket" else 201  # as seen in practice
    headers = {}
    if status == 201:
        headers["location"] = f"{request.url.path}/{body['id']}"
        request.scope["simulator.order_id"] = request.path_params.get("order_id", body["id"])
    content = b"" if body is None else msgspec.json.encode(body)
    return Response(content, status, headers, "application/json" if content else None)


def _refusal(refused: Refused, operation: Operation) -> Response:
    if operation.service == "notification":
        body: dict[str, Any] = {"status": refused.status, "detail": refused.message}
        body["title"] = HTTPStatus(refused.status).phrase
        return JSONResponse(body, refused.status, media_type="application/problem+json")
    body = {"code": refused.code, "message": refused.message}
    if operation.service == "configuration":
        body["details"] = None
    return JSONResponse(body, refused.status)


# --- the order service ------------------------------------------------------------------------------------------------


def _change_handler(checkout: Checkout, name: str) -> Handler:
    has_body = any(BY_NAME[name].answers.values())

    async def change(request: ApiRequest) -> Any:
        answer = await checkout.change(name, request)
        if name in ("put_payment", "put_shipping"):
            return _parts(checkout, "payments" if name == "put_payment" else "shippings", request, answer["id"])
        return answer if has_body else None

    return change


def _parts(checkout: Checkout, name: str, request: ApiRequest, part_id: str | None = None) -> Any:
    parts = as_version(checkout.stored(request), request.version)[name]
    return parts if part_id is None else part(parts, part_id, f"{name.removesuffix('s')}-not-found")


def _order_handlers(checkout: Checkout) -> dict[str, Handler]:
    def list_transactions(request: ApiRequest) -> Any:
        order, payment_id = checkout.stored(request), request.path["payment_id"]
        part(order["payments"], payment_id, "payment-not-found")
        return order["_transactions"].get(payment_id, [])

    return {
        "create_order": lambda request: {"id": checkout.create(request)["id"]},
        "list_orders": lambda request: _list_orders(checkout.records.orders.values(), request),
        "read_order": lambda request: as_version(checkout.stored(request), request.version),
        "delete_order": checkout.delete,
        "validate": checkout.validate,
        "list_payments": lambda request: _parts(checkout, "payments", request),
        "read_payment": lambda request: _parts(checkout, "payments", request, request.path["payment_id"]),
        "list_transactions": list_transactions,
        "list_shippings": lambda request: _parts(checkout, "shippings", request),
        "read_shipping": lambda request: _parts(checkout, "shippings", request, request.path["shipping_id"]),
    }


# Each filter returns the order's values, one of which has to equal a requested value, regardless of case.
_FILTERS: Mapping[str, Callable[[Order], list[Any]]] = {
    "status": lambda order: [order["state"]["currentStatus"]],
    "reference": lambda order: [order["reference"]],
    "cart_reference": lambda order: [order["cart"]["reference"]],
    "payment_id": lambda order: [each["id"] for each in order["payments"]],
}
_LIST_PARAMETERS = {*_FILTERS, "search", "date_from", "date_to", "order_by", "order_by_direction", "offset", "limit"}


def _list_orders(orders: Iterable[Order], request: ApiRequest) -> dict[str, Any]:
    query = {name.removesuffix("[]"): values for name, values in request.query.items()}
    if not query.keys() <= _LIST_PARAMETERS or query.get("order_by", ["created"]) != ["created"]:
        raise Refused("order-bad-request", "The simulator knows order_by=created and the filters of docs/simulator.md.")
    wanted = {
        name: {value.casefold() for each in query[name] for value in each.split(",")}
        for name in query.keys() & _FILTERS.keys()
    }
    since, until = (_parsed_date(query[name][0]) if name in query else "" for name in ("date_from", "date_to"))
    search = query.get("search", [""])[0].casefold()
    found = [
        order
        for order in orders
        if (order["merchant"], order["channel"]) == (request.merchant, request.channel)
        and since <= order["created"] <= (until or order["created"])
        and all(any(str(each).casefold() in values for each in _FILTERS[n](order)) for n, values in wanted.items())
        and (not search or search in msgspec.json.encode(order).decode().casefold())
    ]
    is_ascending = query.get("order_by_direction") == ["asc"]
    found.sort(key=lambda order: str(order["created"]), reverse=not is_ascending)
    data, pagination = _page(found, request)
    if request.version == V0:
        total = sum(money((order["total"] or {}).get("includingVat")) for order in found)
        pagination |= {"size": len(found), "valueSum": round(total, 2)}
    return {"data": [as_version(order, request.version) for order in data], "pagination": pagination}


def _parsed_date(text: str) -> str:
    try:
        given = datetime.fromisoformat(text)
    except ValueError as error:
        raise Refused("order-bad-request", "date_from and date_to look like 2026-02-03T12:00:00Z.") from error
    return to_text(to_milliseconds(given if given.tzinfo else given.replace(tzinfo=UTC)))


def _page(found: list[Any], request: ApiRequest) -> tuple[list[Any], dict[str, Any]]:
    try:
        offset, limit = (int(request.query.get(*each)[0]) for each in (("offset", ["0"]), ("limit", ["10"])))
    except ValueError as error:
        raise Refused("order-bad-request", "offset and limit are integers.") from error
    if offset < 0 or limit < 0:
        raise Refused("order-bad-request", "offset and limit are not negative.")
    data = found[offset : offset + limit]
    return data, {"offset": offset, "limit": limit, "size": len(data), "totalSize": len(found)}


# --- the notification service -----------------------------------------------------------------------------------------


def _event_handlers(checkout: Checkout) -> dict[str, Handler]:
    filters = {"channel": "channel", "adapter_id": "adapterId", "reference": "reference"}
    filters |= {"order_id": "orderId", "orderId": "orderId"}  # Norce's older collection writes `orderId`

    def read_event(request: ApiRequest) -> dict[str, Any]:
        event = checkout.records.events.get(request.path["event_id"])
        if event is None or event["merchant"] != request.merchant:
            raise Refused("order-not-found", "There is no such event.")
        return event

    def list_events(request: ApiRequest) -> Any:
        wanted = {filters[name]: values for name, values in request.query.items() if name in filters}
        found = [
            event
            for event in checkout.records.events.values()
            if event["merchant"] == request.merchant and all(event[name] in values for name, values in wanted.items())
        ]
        data, pagination = _page(found[::-1], request)
        return {"data": data, "pagination": pagination}

    return {
        "list_events": list_events,
        "read_event": read_event,
        "retry_event": lambda request: checkout.callbacks.retry(read_event(request)["id"]),
    }


# --- the simulator's own ----------------------------------------------------------------------------------------------


def _own_routes(checkout: Checkout) -> list[Route]:
    async def basic_schema(_request: Request) -> Response:
        return JSONResponse(schema("adapter-configuration"))

    async def switches(request: Request) -> Response:
        if request.method == "PUT":
            try:
                given = msgspec.json.decode(await request.body(), type=dict[str, Any])
                checkout.switches = checkout.switches.with_values(given)
            except (msgspec.DecodeError, SwitchInvalid) as error:
                return JSONResponse({"code": "bad-request", "message": str(error)}, 400)
        return JSONResponse(asdict(checkout.switches))

    return [Route(BASIC_SCHEMA, basic_schema), Route("/simulator/switches", switches, methods=["GET", "PUT"])]


class _WithFaults:
    """The services with the faults of the switches. Writes each request to the journal."""

    def __init__(self, checkout: Checkout, app: ASGIApp) -> None:
        self._checkout = checkout
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(f"{PREFIX}/"):
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        switches, happens = self._checkout.switches, self._checkout.callbacks.happens
        is_broken = happens(switches.connections_broken)
        if happens(switches.server_errors):
            failure = JSONResponse({"code": "internal-server-error", "message": "An injected fault."}, 500)
            await failure(scope, receive, hold)
        elif not is_broken:
            await self._app(scope, receive, hold)
            is_broken = happens(switches.answers_lost)
        if switches.answer_seconds:
            await self._checkout.sleep(switches.answer_seconds)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        self._checkout.journal.add(
            url=scope["path"],
            at=self._checkout.timestamp(),
            kind="request",
            method=scope["method"],
            status=None if is_broken else held[0]["status"],
            took_ms=round((time.monotonic() - began) * 1000),
            order_id=scope.get("simulator.order_id", scope.get("path_params", {}).get("order_id")),
            merchant=headers.get(MERCHANT.encode()),
            channel=headers.get(CHANNEL.encode()),
            note="an injected fault" if is_broken else scope.get("simulator.note", ""),
        )
        if is_broken:
            # The server closes the connection, because the announced body does not follow.
            held = [{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}]
        for message in held:
            await send(message)
