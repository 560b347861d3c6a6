"""The simulator: an offline Norce Checkout that behaves as documented.

`orders` holds the rules, `checkout` the order service, `endpoints` the HTTP endpoints of all services. `callbacks`
calls adapters. `other_adapters` plays the adapters of a platform, of payments and of shippings.
"""

from typing import Any, Self

from adapter.norce.api import V0
from adapter.sandbox.norce.checkout import Checkout
from adapter.sandbox.norce.endpoints import application
from adapter.sandbox.norce.switches import Switches, SwitchInvalid
from adapter.sandbox.norce.versions import Order, as_version

__all__ = ["Simulator", "SwitchInvalid", "Switches"]


class Simulator(Checkout):
    """A Norce Checkout in this process.

    Attributes:
        app: Its ASGI application. Every service is below `/checkout`.
        tokens: The bearer tokens that it accepts, for every merchant.
    """

    def __init__(self, *, token: str, **options: Any) -> None:
        """Create a simulator that accepts this token. See `Checkout` for the options."""
        super().__init__(**options)
        self.tokens = {token}
        self.app = application(self, self.tokens)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self.callbacks.aclose()

    def set_switches(self, **values: Any) -> None:
        """Set switches, or raise `SwitchInvalid`."""
        self.switches = self.switches.with_values(values)

    def put(self, order: Order) -> Order:
        """Store an order as it is and return it. Nothing is checked, and no callback is called."""
        self.records.orders[order["id"]] = order
        return order

    def order(self, order_id: str) -> Order:
        """Return the order as v0 shows it, or raise `KeyError`."""
        return as_version(self.records.orders[order_id], V0)

    def orders(self) -> list[Order]:
        """Return every order, in the order of creation."""
        return [self.order(order_id) for order_id in self.records.orders]

    def events(self, order_id: str | None = None) -> list[dict[str, Any]]:
        """Return the event records with their attempts, the oldest first."""
        return [each for each in self.records.events.values() if order_id in (None, each["orderId"])]

    async def wait_until_idle(self) -> None:
        """Wait until every callback has ended, with its retries and delays."""
        await self.callbacks.wait_until_idle()
