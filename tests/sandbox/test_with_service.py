"""The simulator and the service together, over HTTP."""

import asyncio
from pathlib import Path
from typing import Any

import httpx

from adapter import config as configuration
from adapter.app import running
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import http_server, listen
from adapter.identifiers import Channel
from adapter.ledger.queries import Queries
from adapter.ledger.store import open_for_reading
from adapter.norce.api import BY_NAME
from adapter.routing.routes import build
from adapter.sandbox.norce import Simulator
from tests.simulators import SAMPLE

TOKEN = "a-token-for-the-simulator"
CONFIG = """\
adapter: {id: jetshop_adapter, public_url: https://adapter.example}
server: {host: 127.0.0.1, port: 0}
operations: {port: 0, socket: null}
store: {url: "sqlite:///@FOLDER@/ledger.db"}
norce: {base_url: "@NORCE@/checkout"}
merchants: {norce: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}}
senders: {signed_urls: {keys: {k1: "${env:KEY}"}}}
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus, schema: {const: completed}}
  order-rules: {kind: validation}
  cart-changed: {kind: hook, watch: /cart, target: /cart}
routes:
  seen: {callback: order-status, handler: log}
  was-asked:
    {callback: order-rules, handler: rules, no_answer: reject,
     settings: {rules: [{scope: /attributes/asked, schema: {const: true}, code: not-asked, message: Ask.}]}}
  has-lines:
    {callback: cart-changed, handler: rules, no_answer: reject,
     settings: {rules: [{scope: /cart/items, schema: {minItems: 1}, code: empty-cart, message: Fill it.}]}}
"""


def test_the_sample_order_goes_from_creation_to_a_delivery(tmp_path: Path) -> None:
    async def walk() -> None:
        listening = listen("127.0.0.1", 0)
        address = "http://{}:{}".format(*listening.getsockname())
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.replace("@FOLDER@", str(tmp_path)).replace("@NORCE@", address), "utf-8")
        config = configuration.load(path, {"TOKEN": TOKEN, "KEY": "k" * 32})
        headers = {"authorization": f"Bearer {TOKEN}", "x-merchant": "norce", "x-channel": "1"}
        async with (
            Simulator(token=TOKEN) as norce,
            http_server(norce.app, listening),
            running(config, build(config)) as service,
            httpx.AsyncClient(headers=headers, trust_env=False) as http,
        ):

            async def ask(name: str, body: Any = None, **path: str) -> httpx.Response:
                operation = BY_NAME[name]
                url = operation.url(f"{address}/checkout", operation.versions[0], **path)
                return await http.request(operation.method, url, json=body)

            order = (await ask("create_order", SAMPLE | {"validations": [], "hooks": [], "notifications": []})).json()
            its = {"order_id": order["id"]}

            def address_of(callback: str) -> str:
                return Senders(config.senders).signed_url(
                    service.public_address, Channel("norce", "1"), its["order_id"], callback
                )

            hook = SAMPLE["hooks"][0] | {"subscribeTo": "/cart", "target": "/cart"}
            await ask("add_hook", hook | {"invoke": address_of("cart-changed")}, **its)
            await ask("add_validation", SAMPLE["validations"][0] | {"url": address_of("order-rules")}, **its)
            await ask("add_notification", SAMPLE["notifications"][0] | {"invoke": address_of("order-status")}, **its)
            payment_id = (await ask("start_payment", **its)).json()["paymentId"]

            refused = await ask("put_cart", {"items": []}, **its)
            denied = await ask("complete_payment", payment_id=payment_id, **its)
            await ask("patch_attributes", {"asked": True}, **its)
            completed = await ask("complete_payment", payment_id=payment_id, **its)
            await norce.wait_until_idle()

            assert (refused.status_code, refused.json()["code"]) == (400, "empty-cart")
            assert len(norce.order(its["order_id"])["cart"]["items"]) == 1
            assert denied.json() == [{"adapterId": "jetshop_adapter", "code": "not-asked"}]
            assert completed.status_code == 200, completed.text
            assert norce.order(its["order_id"])["state"]["currentStatus"] == "completed"
            assert [each["status"] for each in norce.events()[0]["attempts"]] == [200]
            with open_for_reading(config.store.url).connect() as connection:
                [delivery] = Queries(connection).deliveries()
            assert delivery["order_id"] == its["order_id"]

    asyncio.run(walk())
