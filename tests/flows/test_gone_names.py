"""Callbacks are renamed, and a channel and a merchant leave, under traffic: no purchase is refused."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from adapter.identifiers import Channel
from adapter.sandbox.norce.orders import COMPLETED
from tests import PATIENCE
from tests.databases import KINDS
from tests.flows.site import Service, Site, free_port, wait_until
from tests.flows.test_rotation import count
from tests.simulators import Served

TOKEN = "the token of the shops"
STAYS, LEAVES, OTHER = Channel("norce", "1"), Channel("norce", "2"), Channel("left", "1")
CALLBACKS = {
    "order-status": {"kind": "notification", "scope": "/state/currentStatus"},
    "order-rules": {"kind": "validation", "deadline": "10s"},
    "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "10s"},
}
CART: dict[str, Any] = {"reference": "7", "items": [{"name": "Mössa", "quantity": 1, "total": {"includingVat": 150}}]}


class Shops:
    """A thread that creates orders, registers the adapter on each, and buys each some orders later.

    It pauses while a test restarts the service: a port on which nothing listens refuses a purchase, whatever the
    configuration says.
    """

    def __init__(self, norce: Served, address: str) -> None:
        self.norce = norce
        self.address = address
        self.channels = [STAYS, LEAVES, OTHER]  # of new orders
        self.made: list[str] = []
        self.bought = 0
        self._is_open = threading.Event()
        self._is_open.set()
        self._trading = threading.Lock()
        self.registered: set[int] = set()
        self.failed: list[BaseException] = []
        self._stopped = threading.Event()

    @contextmanager
    def trading(self) -> Iterator[None]:
        thread = threading.Thread(target=self._trade)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join(PATIENCE)
        assert self.failed == []

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._is_open.clear()
        with self._trading:
            yield
        self._is_open.set()

    def wait_for_purchases(self, number: int) -> None:
        ends = self.bought + number
        wait_until(lambda: self.bought >= ends or self.failed, what=f"{number} purchases")
        assert self.failed == []

    def _trade(self) -> None:
        try:
            with httpx.Client(trust_env=False, timeout=PATIENCE) as http:
                while not self._stopped.is_set():
                    self._is_open.wait(PATIENCE)
                    with self._trading:
                        self._make(http, self.channels[len(self.made) % len(self.channels)])
                        if len(self.made) > 6:
                            self._buy()
                while self.bought < len(self.made):
                    self._buy()
        except BaseException as error:  # noqa: BLE001 - the test's thread raises it
            self.failed.append(error)

    def _make(self, http: httpx.Client, channel: Channel) -> None:
        order_id = self.norce.run(self.norce.caller.create({"currency": "SEK", "cart": CART}, channel=channel))
        headers = {"authorization": f"Bearer {TOKEN}", "x-merchant": channel.merchant, "x-channel": channel.name}
        answer = http.post(f"{self.address}/api/v1/orders/{order_id}/registrations", headers=headers)
        self.registered.add(answer.status_code)
        self.made.append(order_id)

    def _buy(self) -> None:
        """Change the cart, which calls the hook; then pay and complete, which call the validation.

        An answer of Norce that refuses one of these raises.
        """
        order_id, caller = self.made[self.bought], self.norce.caller
        self.norce.ask("put_cart", {**CART, "items": CART["items"] * 2}, order_id=order_id)
        payment_id = self.norce.run(caller.pay(order_id))
        self.norce.ask("validate", order_id=order_id)
        self.norce.ask("complete_payment", order_id=order_id, payment_id=payment_id)
        self.bought += 1


@pytest.mark.parametrize("store", KINDS)
def test_no_purchase_is_refused_while_names_are_renamed_and_removed(
    request: pytest.FixtureRequest, site: Site, store: str
) -> None:
    if store == "postgresql":
        site.config["store"]["url"] = request.getfixturevalue("postgres").fresh()
    port, norce = free_port(), Served(TOKEN)
    (site.folder / "norce-token").write_text(TOKEN)
    token, ours = {"tokens": ["${file:norce-token}"]}, site.config
    ours["adapter"]["public_url"] = f"http://127.0.0.1:{port}"
    ours["server"]["port"] = port
    ours["norce"]["base_url"] = norce.url
    ours["reconciliation"] = {"every": "0s"}
    ours["merchants"] = {"norce": token | {"channels": {"1": {}, "2": {}}}, "left": token | {"channels": {"1": {}}}}
    ours["callbacks"] = dict(CALLBACKS)
    ours["routes"] = {"seen": {"callback": "order-status", "handler": "log"}}
    shops = Shops(norce, f"http://127.0.0.1:{port}")
    site.start()

    def restart(*channels: Channel) -> Service:
        with shops.paused():
            shops.channels = [*channels]
            assert site.services[-1].stop() == 0
            return site.start()

    def count_gone(service: Service, **labels: str) -> float:
        return count(service, "calls_to_gone_names_total", **labels)

    try:
        with shops.trading():
            shops.wait_for_purchases(6)
            ours["callbacks"] = {f"new-{name}": each for name, each in CALLBACKS.items()}  # all are renamed
            ours["routes"]["seen"]["callback"] = "new-order-status"
            renamed = restart(STAYS, LEAVES, OTHER)
            shops.wait_for_purchases(9)
            gone = {name: count_gone(renamed, callback=name) for name in CALLBACKS}

            del ours["merchants"]["norce"]["channels"]["2"]  # a channel leaves
            without_channel = restart(STAYS, OTHER)
            shops.wait_for_purchases(9)
            of_channel = count_gone(without_channel, merchant="norce", channel="2", result="accepted")

            del ours["merchants"]["left"]  # a merchant leaves
            without_merchant = restart(STAYS)
            shops.wait_for_purchases(9)
            of_merchant = count_gone(without_merchant, merchant="left", result="accepted")

        checked = site.run_command("check")
        journal = norce.simulator.journal.entries
        statuses = {kind: {each.status for each in journal if each.kind == kind} for kind in ("validation", "hook")}
        states = [each["state"]["currentStatus"] for each in norce.simulator.orders()]

        assert states == [COMPLETED] * len(shops.made)
        assert statuses == {"validation": {200}, "hook": {200}}
        assert min(gone.values()) > 0, gone
        assert min(of_channel, of_merchant) > 0
        for name in ("callback `order-rules`", "channel `2` of `norce`", "merchant `left`"):
            assert f"{name} was called" in checked.stderr
        assert renamed.logged("gone_name_called", callback="order-rules", result="accepted")
        assert renamed.logged("gone_name_called", callback="order-status", result="not-found")
        assert shops.registered == {200}
    finally:
        norce.close()
