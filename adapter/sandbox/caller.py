"""
Who buys at the simulator: calls its services by the names of the operations, without a port in between.

An answer with another status than was expected is an exception, so that what is read afterwards is what it seems to be.
"""

from typing import Any, Self

import httpx

from adapter.norce.api import AUTHORIZATION, BY_NAME, CHANNEL, MERCHANT
from adapter.sandbox.norce import Simulator


class Unmet(Exception):
    """Something was not as it was expected. The message says what, with codes and counts, never an order."""


class Caller:
    """The front end of the shops, one of them (merchant and channel) by default. `whose` are the orders it made."""

    def __init__(self, simulator: Simulator, token: str, shop: tuple[str, str]) -> None:
        self.simulator = simulator
        self.whose: dict[str, tuple[str, str]] = {}
        self._shop = shop
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(simulator.app), headers={AUTHORIZATION: f"Bearer {token}"}
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self._http.aclose()

    async def ask(
        self,
        name: str,
        body: Any = None,
        *,
        status: int | None = None,
        shop: tuple[str, str] | None = None,
        **path: str,
    ) -> Any:
        """
        What an operation answers, for the shop of the order that it is about.

        Raises `Unmet` where that is another status, or no success while none was expected.
        """
        operation = BY_NAME[name]
        merchant, channel = shop or self.whose.get(path.get("order_id", ""), self._shop)
        answer = await self._http.request(
            operation.method,
            operation.url("http://norce/checkout", operation.versions[0], **path),
            headers={MERCHANT: merchant, CHANNEL: channel},
            json=body,
        )
        told = answer.json() if answer.content else None
        if answer.status_code != status and not (status is None and answer.is_success):
            raise Unmet(f"{name} was answered {answer.status_code} ({', '.join(codes(told))}), not {status or 200}")
        return told

    async def create(self, order: dict[str, Any], *, shop: tuple[str, str] | None = None) -> str:
        """A new order; its id."""
        order_id = str((await self.ask("create_order", order, shop=shop))["id"])
        self.whose[order_id] = shop or self._shop
        return order_id

    async def read(self, order_id: str) -> dict[str, Any]:
        order: dict[str, Any] = await self.ask("read_order", order_id=order_id)
        return order

    async def move(self, order_id: str, *statuses: str) -> None:
        for status in statuses:
            await self.ask("put_state", {"currentStatus": status}, order_id=order_id)

    async def pay(self, order_id: str) -> str:
        """A payment of what is not yet covered; its id."""
        return str((await self.ask("start_payment", order_id=order_id))["paymentId"])


def codes(told: Any) -> list[str]:
    """The codes of an error, or of all of them."""
    return [str(each.get("code")) for each in (told if isinstance(told, list) else [told]) if isinstance(each, dict)]
