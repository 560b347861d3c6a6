"""Rotation of a key and a token under traffic: no request is refused, and the old ones fall out of use."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests import PATIENCE
from tests.flows.site import Service, Site, free_port, wait_until
from tests.simulators import Served

OLD, NEW = "an old key for signing URLs", "a new key for signing URLs"


class Traffic:
    """A thread that creates orders, registers the adapter on each, and completes them later."""

    def __init__(self, norce: Served, address: str) -> None:
        self.norce = norce
        self.address = address
        self.token = ""
        self.made: list[str] = []
        self.ended: set[str] = set()
        self.statuses: set[int] = set()
        self._stopped = threading.Event()
        self.failed: list[BaseException] = []

    @contextmanager
    def flowing(self) -> Iterator[None]:
        thread = threading.Thread(target=self._flow)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join(PATIENCE)
        assert self.failed == []

    def _flow(self) -> None:
        try:
            with httpx.Client(trust_env=False, timeout=PATIENCE) as http:
                while not self._stopped.is_set():
                    order_id = self.norce.ask("create_order", {"currency": "SEK"})["id"]
                    self._register(http, order_id)
                    self.made.append(order_id)
                    if len(self.made) > 5:
                        self._end(self.made[-6])
                for order_id in self.made:
                    self._end(order_id)
        except BaseException as error:  # noqa: BLE001 - the test's thread raises it
            self.failed.append(error)

    def _register(self, http: httpx.Client, order_id: str) -> None:
        """Register the adapter. Repeat while the service restarts, as a shop does."""

        def registered() -> bool:
            headers = {"authorization": f"Bearer {self.token}", "x-merchant": "norce", "x-channel": "1"}
            try:
                url = f"{self.address}/api/v1/orders/{order_id}/registrations"
                self.statuses.add(http.post(url, headers=headers).status_code)
            except httpx.TransportError:
                return False
            return True

        wait_until(registered)

    def _end(self, order_id: str) -> None:
        if order_id not in self.ended:
            for status in ("processing", "accepted", "completed"):
                self.norce.ask("put_state", {"currentStatus": status}, order_id=order_id)
            self.ended.add(order_id)


def count(service: Service, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    text = httpx.get(f"{service.operations_address}/metrics", trust_env=False).text
    lines = (line for line in text.splitlines() if line.startswith(f"norce_adapter_{name}{{"))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines
               if all(re.search(rf'\b{label}="{value}"', line) for label, value in labels.items()))  # fmt: skip


def test_a_key_and_a_token_are_replaced_under_traffic(site: Site) -> None:
    port, norce_port = free_port(), free_port()
    norce = Served("the token of the shop's front end", norce_port)
    norce.simulator.tokens.add("the old token")
    site.environ |= {"OLD": OLD, "NEW": NEW, "T_OLD": "the old token", "T_NEW": "the new token"}
    site.config["adapter"]["public_url"] = f"http://127.0.0.1:{port}"
    site.config["server"]["port"] = port
    site.config["norce"]["base_url"] = norce.url
    site.config["routes"] = {"seen": {"callback": "order-status", "handler": "log"}}

    def started(keys: list[str], tokens: list[str]) -> Service:
        site.config["senders"] = {"signed_urls": {"keys": {key.lower(): f"${{env:{key}}}" for key in keys}}}
        own = {"tokens": [f"${{env:{token}}}" for token in tokens], "channels": {"1": {}}}
        site.config["merchants"] = {"norce": own}
        if site.services:
            assert site.services[-1].stop() == 0
        return site.start()

    try:
        started(["OLD"], ["T_OLD"])
        traffic = Traffic(norce, f"http://127.0.0.1:{port}")
        traffic.token = "the old token"
        with traffic.flowing():
            wait_until(lambda: len(traffic.made) > 10)
            norce.simulator.tokens.add("the new token")  # Norce accepts both
            service = started(["NEW", "OLD"], ["T_NEW", "T_OLD"])
            traffic.token = "the new token"
            with_old_key = len(traffic.made) + 1  # and the one that was being made
            wait_until(lambda: set(traffic.made[:with_old_key]) <= traffic.ended and len(traffic.made) > with_old_key)

            service = started(["NEW", "OLD"], ["T_NEW", "T_OLD"])  # its counters begin at 0
            wait_until(lambda: count(service, "auth_total", key="new", result="identified") > 10)
            assert count(service, "auth_total", key="old") == 0
            assert 'key="old"' in httpx.get(f"{service.operations_address}/metrics", trust_env=False).text
            assert count(service, "norce_requests_total", token="1") > 10
            assert count(service, "norce_requests_total", token="2") == 0

            service = started(["NEW"], ["T_NEW"])
            norce.simulator.tokens.discard("the old token")
            wait_until(lambda: count(service, "auth_total", key="new", result="identified") > 10)

        assert traffic.statuses == {200}
        journal = norce.simulator.journal.entries
        answers = {entry.status for entry in journal if entry.kind == "notification"}
        assert answers <= {200, None}, "only a callback during a restart may have no answer"
        # 404: there is no configuration document.
        assert {entry.status for entry in journal if entry.kind == "request"} <= {200, 201, 404}
    finally:
        norce.close()
