"""A client of the simulator that calls operations by name, without a port."""

from typing import Any, Self

import httpx

from adapter.identifiers import Channel
from adapter.norce.api import AUTHORIZATION, BY_NAME, CHANNEL, MERCHANT
from adapter.sandbox.norce import Simulator


class Unexpected(Exception):
    """A result that was not expected. The message holds codes and counts, never an order."""


class Caller:
    """The front end of a shop. Uses `channel`, except for orders that it created on another.

    Attributes:
        channels: The channel of each order that was created here, by order id.
    """

    def __init__(self, simulator: Simulator, token: str, channel: Channel) -> None:
        self.simulator = simulator
        self.channels: dict[str, Channel] = {}
        self._channel = channel
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
        channel: Channel | None = None,
        **path: str,
    ) -> Any:
        """Call an operation of `norce.api` and return the body of its answer.

        Args:
            status: The expected status; by default any success.
            channel: By default the order's channel.
            path: The parameters in the path.

        Raises:
            Unexpected: The answer has another status.
        """
        operation = BY_NAME[name]
        merchant, channel_name = channel or self.channels.get(path.get("order_id", ""), self._channel)
        response = await self._http.request(
            operation.method,
            operation.url("http://norce/checkout", operation.versions[0], **path),
            headers={MERCHANT: merchant, CHANNEL: channel_name},
            json=body,
        )
        answer = response.json() if response.content else None
        if response.status_code != status and not (status is None and response.is_success):
            found = ", ".join(codes(answer))
            raise Unexpected(f"{name} was answered {response.status_code} ({found}), not {status or 200}")
        return answer

    async def create(self, order: dict[str, Any], *, channel: Channel | None = None) -> str:
        """Create an order and return its id."""
        order_id = str((await self.ask("create_order", order, channel=channel))["id"])
        self.channels[order_id] = channel or self._channel
        return order_id

    async def read(self, order_id: str) -> dict[str, Any]:
        order: dict[str, Any] = await self.ask("read_order", order_id=order_id)
        return order

    async def move(self, order_id: str, *statuses: str) -> None:
        """Move the state of an order to each of these statuses in turn."""
        for status in statuses:
            await self.ask("put_state", {"currentStatus": status}, order_id=order_id)

    async def pay(self, order_id: str) -> str:
        """Start a payment of the amount that is not covered yet, and return its id."""
        return str((await self.ask("start_payment", order_id=order_id))["paymentId"])


def codes(answer: Any) -> list[str]:
    """Return the codes of an error or of a list of errors."""
    return [
        str(each.get("code")) for each in (answer if isinstance(answer, list) else [answer]) if isinstance(each, dict)
    ]
