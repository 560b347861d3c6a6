"""
An offline Norce Checkout: it behaves as documented from the creation of an order to `completed`, and calls nobody but
this machine.

The rooms: `orders` are the rules, pure; `checkout` is the order service; `callbacks` is what goes out, `services` what
comes in; `neighbours` are other adapters; `records` is what is remembered; `switches` says what is not known for sure.
`caller` is who buys here, and `scenarios` are purchases as they go in a shop.
"""

from typing import Any

from adapter.sandbox.norce.checkout import Checkout
from adapter.sandbox.norce.records import StoreUnusable
from adapter.sandbox.norce.services import services
from adapter.sandbox.norce.switches import Switches, SwitchInvalid
from adapter.sandbox.norce.versions import Order, as_version

__all__ = ["Simulator", "StoreUnusable", "SwitchInvalid", "Switches"]


class Simulator(Checkout):
    """
    Norce Checkout in this process. `app` is its ASGI app; every service is below `/checkout`.

    `token` is the one that is taken, for every merchant; `tokens` has all that are, while one is being replaced. The
    rest is for `Checkout`: `store` is a file to remember in, `clock`, `sleep` and `seed` (of what happens by chance,
    ids included) are for tests, and `transport` is what callbacks are sent through. Raises `StoreUnusable`.
    """

    def __init__(self, *, token: str, **given: Any) -> None:
        super().__init__(**given)
        self.tokens = {token}
        self.app = services(self, self.tokens)

    async def __aenter__(self) -> "Simulator":
        self.callbacks.resume()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self.callbacks.aclose()
        self.records.close()

    def throw(self, **switches: Any) -> None:
        """Sets switches. Raises `SwitchInvalid`."""
        self.switches = self.switches.with_values(switches)

    def order(self, order_id: str, version: str = "v0") -> Order:
        """The order as it would be read. Raises `KeyError`."""
        return as_version(self.records.orders[order_id], version, self.switches)

    def orders(self) -> list[Order]:
        """Every order, the first that was created first."""
        return [self.order(order_id) for order_id in self.records.orders]

    def events(self, order_id: str | None = None) -> list[dict[str, Any]]:
        """The event records with their attempts, the oldest first."""
        return [each for each in self.records.events.values() if order_id in (None, each["orderId"])]

    async def settled(self) -> None:
        """Waits until every callback in flight has ended, retries and delays included."""
        await self.callbacks.settled()
