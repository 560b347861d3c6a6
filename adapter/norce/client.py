"""
Norce's Order Management API in our words: read one order.

Errors are Norce's facts, not outcomes: a validation turns `OrderNotFound` into a 404, a delivery into a dead letter.
Facts: checkout protocol, sections 1.2, 1.3 and 4 (`GET …/checkout/order/api/v0/checkout/orders/{id}`, Bearer token,
`x-merchant` and `x-channel`). A client belongs to one event loop.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import quote

import httpx

from adapter.orders import NotAnOrder, Order, read_order
from adapter.outgoing import connections, retry_after
from adapter.plugin import Misconfigured, Reject, Retry, Secret

LARGEST_ORDER_BYTES = 4 * 1024 * 1024
# Of one merchant, so that one whose Norce is silent takes nobody else's place. Not left to the client's own pool: that
# looks at every request that waits whenever one ends, and kept the event loop for 15 s while 300 of them waited.
MOST_READS_AT_ONCE = 64


class OrderNotFound(Exception):
    """Norce has no such order (404)."""


class NorceRefused(Exception):
    """Norce does not take this merchant's tokens (401, 403). Check `merchants.<merchant>.tokens`."""


class NorceUnavailable(Exception):
    """Norce did not answer in time, or with an error, or with something that is no order. `after`: it said when."""

    def __init__(self, message: str, after: timedelta | None = None) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A merchant at Norce: where its Checkout services are (`…/checkout`), and its tokens, tried in turn."""

    base_url: str
    tokens: tuple[Secret, ...]


class Norce:
    """A client for all merchants. `timeout` bounds a whole request; `transport` is for tests."""

    def __init__(
        self,
        accounts: Mapping[str, Account],
        *,
        adapter_id: str,
        timeout: timedelta,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._accounts = accounts
        self._adapter_id = adapter_id
        self._timeout = timeout
        self._reading = {merchant: asyncio.Semaphore(MOST_READS_AT_ONCE) for merchant in accounts}
        self._client = httpx.AsyncClient(
            transport=transport or connections(),
            trust_env=False,
            follow_redirects=False,
        )

    async def order(self, merchant: str, channel: str, order_id: str, *, within: timedelta | None = None) -> Order:
        """
        The order as Norce has it now, `within` a time (the configured one if shorter or left out).

        Two tokens are tried in turn where one is refused. Raises `OrderNotFound`, `NorceRefused`, `NorceUnavailable`.
        """
        account = self._accounts[merchant]
        url = f"{account.base_url}/order/api/v0/checkout/orders/{quote(order_id, safe='')}"
        headers = {"x-merchant": merchant, "x-channel": channel, "x-adapterid": self._adapter_id}
        try:
            async with (
                asyncio.timeout(min(within or self._timeout, self._timeout).total_seconds()),
                self._reading[merchant],
            ):
                for token in account.tokens:
                    headers["authorization"] = f"Bearer {token.reveal()}"
                    answer = await self._client.get(url, headers=headers, timeout=self._timeout.total_seconds())
                    if answer.status_code not in (401, 403):
                        break
        except (httpx.HTTPError, TimeoutError) as error:
            raise NorceUnavailable(f"no answer from Norce: {type(error).__name__}") from error
        return _order(answer, order_id)

    def for_handlers(self, merchant: str, channel: str) -> "HandlerOrders":
        """The same as a handler sees it, through `context.orders`."""
        return HandlerOrders(self, merchant, channel)

    async def aclose(self) -> None:
        await self._client.aclose()


class HandlerOrders:
    """`adapter.plugin.Orders` for one merchant and channel: Norce's facts as outcomes."""

    def __init__(self, norce: Norce, merchant: str, channel: str) -> None:
        self._norce = norce
        self._merchant = merchant
        self._channel = channel

    async def read(self, order_id: str) -> Order:
        try:
            return await self._norce.order(self._merchant, self._channel, order_id)
        except OrderNotFound as error:
            raise Reject("order-not-found", "Norce has no such order") from error
        except NorceRefused as error:
            raise Misconfigured("norce-unauthorized", str(error)) from error
        except NorceUnavailable as error:
            raise Retry("norce-unavailable", str(error), after=error.after) from error


def base_url(environment: str, slug: str) -> str:
    """Where a merchant's Checkout services are: `…/checkout`. Production has no environment segment."""
    segment = "" if environment == "production" else f"{environment}."
    return f"https://{slug}.api-se.{segment}norce.tech/checkout"


def _order(answer: httpx.Response, order_id: str) -> Order:
    status = answer.status_code
    if status == 404:
        raise OrderNotFound("Norce has no such order")
    if status in (401, 403):
        raise NorceRefused(f"Norce answered {status}: check the tokens of this merchant")
    if status != 200:
        raise NorceUnavailable(f"Norce answered {status}", retry_after(answer.headers.get("retry-after")))
    if len(answer.content) > LARGEST_ORDER_BYTES:
        raise NorceUnavailable("Norce's answer is larger than 4 MiB")
    try:
        order = read_order(answer.content)
    except NotAnOrder as error:
        raise NorceUnavailable("Norce's answer is no order") from error
    if order.id != order_id:  # a page of a proxy's, say: no condition would hold on it, and the order would be lost
        raise NorceUnavailable("Norce's answer is not this order")
    return order
