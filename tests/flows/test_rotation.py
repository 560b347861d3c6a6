"""A key and a token are replaced while orders come and go: nobody is refused, and the old ones fall out of use."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.flows.stage import Service, Stage, free_port, until
from tests.simulators import Served

OLD, NEW = "an old key for signing URLs", "a new key for signing URLs"


class Traffic:
    """Orders that come and go all the time, in a thread: each is registered on, and moved on to its end later."""

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
            thread.join(60)
        assert self.failed == []

    def _flow(self) -> None:
        try:
            with httpx.Client(trust_env=False, timeout=10) as http:
                while not self._stopped.is_set():
                    order_id = self.norce.ask("create_order", {"currency": "SEK"})["id"]
                    self._register(http, order_id)
                    self.made.append(order_id)
                    if len(self.made) > 5:
                        self._end(self.made[-6])
                for order_id in self.made:
                    self._end(order_id)
        except BaseException as error:  # noqa: BLE001 - told in the test's own thread
            self.failed.append(error)

    def _register(self, http: httpx.Client, order_id: str) -> None:
        """As a shop does: again, while the service is being started anew."""

        def registered() -> bool:
            headers = {"authorization": f"Bearer {self.token}", "x-merchant": "norce", "x-channel": "1"}
            try:
                url = f"{self.address}/api/v1/orders/{order_id}/registrations"
                self.statuses.add(http.post(url, headers=headers).status_code)
            except httpx.TransportError:
                return False
            return True

        until(registered)

    def _end(self, order_id: str) -> None:
        if order_id not in self.ended:
            for status in ("processing", "accepted", "completed"):
                self.norce.ask("put_state", {"currentStatus": status}, order_id=order_id)
            self.ended.add(order_id)


def used(service: Service, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    text = httpx.get(f"{service.operations_address}/metrics", trust_env=False).text
    lines = (line for line in text.splitlines() if line.startswith(f"norce_adapter_{name}{{"))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines
               if all(re.search(rf'\b{label}="{value}"', line) for label, value in labels.items()))  # fmt: skip


def test_a_key_and_a_token_are_replaced_under_traffic(stage: Stage) -> None:
    port, norce_port = free_port(), free_port()
    norce = Served("the token of the shop's front end", norce_port)
    norce.simulator.tokens.add("the old token")
    stage.environ |= {"OLD": OLD, "NEW": NEW, "T_OLD": "the old token", "T_NEW": "the new token"}
    stage.config["adapter"]["public_url"] = f"http://127.0.0.1:{port}"
    stage.config["server"]["port"] = port
    stage.config["norce"]["base_url"] = norce.url
    stage.config["routes"] = {"seen": {"callback": "order-status", "handler": "log"}}

    def started(keys: list[str], tokens: list[str]) -> Service:
        stage.config["senders"] = {"signed_urls": {"keys": {key.lower(): f"${{env:{key}}}" for key in keys}}}
        own = {"tokens": [f"${{env:{token}}}" for token in tokens], "channels": {"1": {}}}
        stage.config["merchants"] = {"norce": own}
        if stage.services:
            assert stage.services[-1].stop() == 0
        return stage.start()

    try:
        started(["OLD"], ["T_OLD"])
        traffic = Traffic(norce, f"http://127.0.0.1:{port}")
        traffic.token = "the old token"
        with traffic.flowing():
            until(lambda: len(traffic.made) > 10)
            norce.simulator.tokens.add("the new token")  # Norce issues a second one
            service = started(["NEW", "OLD"], ["T_NEW", "T_OLD"])
            traffic.token = "the new token"
            of_the_old_key = len(traffic.made) + 1  # and the one that was being made
            until(lambda: set(traffic.made[:of_the_old_key]) <= traffic.ended and len(traffic.made) > of_the_old_key)

            service = started(["NEW", "OLD"], ["T_NEW", "T_OLD"])  # counts anew
            until(lambda: used(service, "auth_total", key="new", result="identified") > 10)
            assert used(service, "auth_total", key="old") == 0
            assert 'key="old"' in httpx.get(f"{service.operations_address}/metrics", trust_env=False).text
            assert used(service, "norce_requests_total", token="1") > 10
            assert used(service, "norce_requests_total", token="2") == 0

            service = started(["NEW"], ["T_NEW"])
            norce.simulator.tokens.discard("the old token")
            until(lambda: used(service, "auth_total", key="new", result="identified") > 10)

        assert traffic.statuses == {200}
        journal = norce.simulator.journal.entries
        answers = {entry.status for entry in journal if entry.kind == "notification"}
        assert answers <= {200, None}, "a callback that met nobody is no refusal"
        # 404 is the configuration document that nobody has made.
        assert {entry.status for entry in journal if entry.kind == "request"} <= {200, 201, 404}
    finally:
        norce.close()
