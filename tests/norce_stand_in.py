"""
A stand-in for Norce Checkout that knows a handful of orders and answers one question: the order as it is now.

It gives an order what only Norce gives: id, merchant, channel and `lastModified`. URLs inside orders are data; nothing
is ever called.
"""

import json
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router


class NorceStandIn:
    """Orders by id, behind `GET …/order/api/v0/checkout/orders/{id}` with a bearer token and the two headers."""

    def __init__(self, token: str) -> None:
        self._token = token
        self.orders: dict[str, dict[str, Any]] = {}
        self.app = Router([Route("/order/api/v0/checkout/orders/{order_id}", self._read)])

    def put(self, order: dict[str, Any], **given: Any) -> dict[str, Any]:
        """Stores an order with the members that Norce gives, and returns it as Norce would send it."""
        modified = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        stored = {**order, "lastModified": modified, **given}
        self.orders[stored["id"]] = stored
        return stored

    async def _read(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {self._token}":
            return JSONResponse({"code": "unauthorized", "message": "Unauthorized"}, 401)
        order_id = request.path_params["order_id"]
        order = self.orders.get(order_id)
        whose = (request.headers.get("x-merchant"), request.headers.get("x-channel"))
        if order is None or (order["merchant"], order["channel"]) != whose:
            return JSONResponse({"code": "order-not-found", "message": f"Order with id:{order_id} not found."}, 404)
        return Response(json.dumps(order, ensure_ascii=False).encode(), media_type="application/json")
