"""
The walk a newcomer sees: a validation denied and one approved, a cart that changes, a purchase that completes, an
export, a dead letter.

Everything is real but the two ends: the service with a ledger on disk, requests over HTTP, and a stand-in each for
Norce and Jetshop on loopback. What is printed at the end is read back from what really happened.
"""

import asyncio
import contextlib
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx

from adapter import config as configuration
from adapter.app import PortInUse, Service, listen, running, served
from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.demo.norce import NorceStandIn
from adapter.handlers.jetshop.stand_in import JetshopStandIn
from adapter.ledger.desk import Desk
from adapter.ledger.matching import Matching
from adapter.ledger.store import open_for_reading
from adapter.routes import build

SAMPLE_ID = "o_yClTSySjyAuuBjmiBlHCjuEcTf"
PATIENCE_SECONDS = 30.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The running demo: the service, its two stand-ins, and the file that says how it is configured."""

    service: Service
    norce: NorceStandIn
    jetshop: JetshopStandIn
    norce_address: str
    jetshop_address: str
    config: Config
    config_path: Path


class DemoFailed(Exception):
    """The walk did not go as it should. The message says where."""


@contextlib.asynccontextmanager
async def demo(*, port: int = 8080, operations_port: int = 8081) -> AsyncIterator[Demo]:
    """The service on a ledger in a temporary folder, between its stand-ins; on other ports where these are taken."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="norce-adapter-demo-")))
        token, password = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        for name, secret in (
            ("norce-token", token),
            ("jetshop-password", password),
            ("url-key", secrets.token_hex(32)),
        ):
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(secret)
        norce = NorceStandIn(token)
        listening = listen("127.0.0.1", 0)
        await stack.enter_async_context(served(norce.app, listening))
        norce_address = "http://{}:{}".format(*listening.getsockname())
        jetshop = JetshopStandIn(shop_id="1", username="stand-in", password=password)
        jetshop_address = await stack.enter_async_context(jetshop.serve())
        text = files(__package__).joinpath("config.yaml").read_text("utf-8")
        for mark, value in {
            "@PORT@": str(_free(port)),
            "@OPERATIONS_PORT@": str(_free(operations_port)),
            "@STORE@": str(folder / "ledger.db"),
            "@NORCE@": norce_address,
            "@JETSHOP@": jetshop_address,
        }.items():
            text = text.replace(mark, value)
        (folder / "order-completed.json").write_bytes(
            files(__package__).joinpath("orders/order-completed.json").read_bytes()
        )
        path = folder / "config.yaml"
        path.write_text(text, "utf-8")
        config = configuration.load(path, {})
        service = await stack.enter_async_context(running(config, build(config)))
        yield Demo(
            service=service,
            norce=norce,
            jetshop=jetshop,
            norce_address=norce_address,
            jetshop_address=jetshop_address,
            config=config,
            config_path=path,
        )


async def walk(demo: Demo, say: Say) -> dict[str, Any]:
    """
    Walks through a purchase and says in words what happens. Returns the status codes and counts that were met.

    Raises `DemoFailed`.
    """
    async with httpx.AsyncClient(trust_env=False) as http:
        caller = _Norce(demo, http)
        sample = demo.norce.put(_order("order-api-request-sample"), id=SAMPLE_ID, merchant="norce", channel="1")
        say("Norce asks whether the sample order of its API reference may be bought …")
        denied = await caller.calls("order-rules", sample)
        say(f"  denied: {denied.status_code}")
        for problem in denied.json() if denied.status_code == 400 else ():
            say(f"    {problem['code']}: {problem['message']}")

        order = demo.norce.put(_order("order-checkout"))
        say(f"Norce asks the same about order {order['id']} …")
        approved = await caller.calls("order-rules", order)
        say(f"  approved: {approved.status_code}")

        say("The shopper changes the cart, and Norce asks before it stores the change …")
        hooked: dict[str, int] = {}
        for quantity in (1, 6, 12):
            answer = await caller.calls("cart-changed", _with_quantity(order, quantity))
            became, told = _became(answer)
            hooked[became] = answer.status_code
            say(f"  {quantity} of a kind: {became}: {answer.status_code}{told}")

        order = _order("order-completed")
        demo.norce.orders[order["id"]] = order
        say("The shopper pays, and the order reaches `completed`. Norce notifies us, over HTTP …")
        accepted = await caller.calls("order-status", order)
        say(f"  stored on disk, then answered: {accepted.status_code}")
        say('  the condition matches: scope /state/currentStatus, schema {"const": "completed"}')
        again = await caller.calls(
            "order-status", {"notification": {"reference": "export-on-completed"}, "order": order}
        )
        say(f"  the same event once more, in an envelope: {again.status_code}, and nothing is done twice")
        delivery = await _ended(demo, order["id"])
        say(f"  the jetshop handler has exported the payment information: {_told(delivery)}")

        sample = demo.norce.put(sample, state={"currentStatus": "completed"})
        say("The sample order, completed, arrives as well …")
        taken = await caller.calls("order-status", sample)
        say(f"  taken without complaint: {taken.status_code}")
        dead = await _ended(demo, sample["id"])
        say(f"  but it cannot be exported, and waits for a person as a dead letter: {_told(dead)}")

        summary = {
            "validation": {"denied": denied.status_code, "approved": approved.status_code},
            "hook": hooked,
            "notification": accepted.status_code,
            "repeated": again.status_code,
            "exports": demo.jetshop.exports(order["reference"]),
            "rejected": len([each for each in _deliveries(demo, state="dead") if each["reason"] == "rejected"]),
        }
    expected = {
        "validation": {"denied": 400, "approved": 200},
        "hook": {"accepted": 200, "patched": 200, "refused": 400},
        "notification": 200,
        "repeated": 200,
        "exports": 1,
        "rejected": 1,
    }
    if summary != expected:
        raise DemoFailed(f"the walk ended with {json.dumps(summary)}, not with {json.dumps(expected)}")
    if demo.jetshop.violations:
        raise DemoFailed(f"the stand-in for Jetshop saw {len(demo.jetshop.violations)} requests against its contract")
    return summary


def _free(port: int) -> int:
    try:
        listening = listen("127.0.0.1", port)
    except PortInUse:
        listening = listen("127.0.0.1", 0)
    with listening:
        return int(listening.getsockname()[1])


class _Norce:
    """Calls our callbacks as Norce would: at signed URLs, with its two headers."""

    def __init__(self, demo: Demo, http: httpx.AsyncClient) -> None:
        self._demo = demo
        self._http = http
        self._senders = Senders(demo.config.senders)

    async def calls(self, callback: str, body: dict[str, Any]) -> httpx.Response:
        order = body.get("order", body)
        merchant, channel = order["merchant"], order["channel"]
        address = self._demo.service.public_address
        url = self._senders.signed_url(address, merchant, channel, order["id"], callback)
        headers = {"x-merchant": merchant, "x-channel": channel}
        if callback == "order-rules":  # a validation has no body
            return await self._http.post(url, headers=headers)
        return await self._http.post(url, headers=headers, json=body)


async def _ended(demo: Demo, order_id: str) -> dict[str, Any]:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                deliveries = _deliveries(demo, order_id=order_id)
                if deliveries and deliveries[0]["state"] != "waiting":
                    return deliveries[0]
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise DemoFailed(f"the delivery for order {order_id} has not ended in {PATIENCE_SECONDS:g} s") from error


def _deliveries(demo: Demo, **filters: str) -> list[dict[str, Any]]:
    engine = open_for_reading(demo.config.store.url)
    with engine.connect() as connection:
        return Desk(connection).deliveries(Matching(**filters))  # type: ignore[arg-type]


def _told(delivery: dict[str, Any]) -> str:
    if delivery["state"] == "done":
        return f"{delivery['reason']}, Jetshop order {delivery['reference']}"
    return f"{delivery['reason']}, {delivery['code']}\n    {delivery['message']}"


def _with_quantity(order: dict[str, Any], quantity: int) -> dict[str, Any]:
    """The order as it would be with so many of its first item; a hook does no sums."""
    cart = order["cart"]
    first, *others = cart["items"]
    return {**order, "cart": {**cart, "items": [{**first, "quantity": quantity}, *others]}}


def _became(answer: httpx.Response) -> tuple[str, str]:
    """What a hook's answer means for the change, and the rest of it in words."""
    body = answer.json()
    if answer.status_code != 200:
        return "refused", f", {body['code']}: {body['message']}"
    changes = [f", {each['op']} {each['path']} {json.dumps(each.get('value'))}" for each in body]
    return "patched" if changes else "accepted", "".join(changes)


def _order(name: str) -> dict[str, Any]:
    order: dict[str, Any] = json.loads(files(__package__).joinpath("orders", f"{name}.json").read_text("utf-8"))
    return order
