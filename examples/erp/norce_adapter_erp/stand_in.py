"""A stand-in for the ERP, for tests and `norce-adapter dev`. It has a memory, and knows no idempotency key."""

from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class StandIn(Starlette):
    """An ERP with orders and a stock.

    Attributes:
        effects: The orders that were created, and `released` for each release.
        orders: The orders by their numbers.
        stock: The pieces that are there, by article; 1000 of each one that is not named.
    """

    def __init__(self) -> None:
        super().__init__(
            routes=[
                Route("/api/orders", self._create, methods=["POST"]),
                Route("/api/orders/{external_id}", self._find),
                Route("/api/orders/{number}/release", self._release, methods=["POST"]),
                Route("/api/stock", self._stock, methods=["POST"]),
            ]
        )
        self.effects: list[Any] = []
        self.orders: dict[str, dict[str, Any]] = {}
        self.stock: dict[str, int] = {}

    async def _create(self, request: Request) -> Response:
        document = await request.json()
        number = f"SO-{1001 + len(self.orders)}"
        self.effects.append(document)
        self.orders[number] = document | {"number": number, "status": "draft"}
        return JSONResponse(self.orders[number], 201)

    async def _find(self, request: Request) -> Response:
        for order in self.orders.values():
            if order["externalId"] == request.path_params["external_id"]:
                return JSONResponse(order)
        return JSONResponse({"message": "no such order"}, 404)

    async def _release(self, request: Request) -> Response:
        order = self.orders[request.path_params["number"]]
        if order["status"] == "released":
            return JSONResponse({"message": "released already"}, 409)
        order["status"] = "released"
        self.effects.append("released")
        return JSONResponse(order)

    async def _stock(self, request: Request) -> Response:
        return JSONResponse({sku: self.stock.get(sku, 1000) for sku in (await request.json())["skus"]})
