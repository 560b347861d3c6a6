"""
The walk a newcomer sees: callbacks put on an order, a validation denied and one approved, a cart that changes, a
purchase whose last notification is lost and found, an export, a dead letter.

Everything is real but the two ends: the service with a ledger on disk, requests over HTTP, and on loopback the offline
Norce Checkout and a stand-in for Jetshop. The orders go their way through Norce's API, and Norce calls the service by
itself. What is printed is read back from what really happened: from its journal and its events, and from the ledger.
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
from adapter.app import Service, running
from adapter.callbacks.server import PortInUse, http_server, listen
from adapter.config import Config
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.ledger.store import open_for_reading
from adapter.routing.routes import build
from adapter.sandbox.caller import Caller, Unmet
from adapter.sandbox.jetshop_stand_in import JetshopStandIn
from adapter.sandbox.norce import Simulator

REFERENCE = "100245"  # which the shop knows the order by
MOST_OF_A_KIND = 10  # by the rules in the configuration
_GIFT_CARD = {
    "adapterId": "awardit_adapter",
    "name": "Presentkort",
    "type": "voucher",
    "amount": 200.0,
    "state": "confirmed",
    "reference": "GC-7710-0042",
}
PATIENCE_SECONDS = 30.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The running demo: the service, its two ends, and the file that says how it is configured."""

    service: Service
    norce: Simulator
    caller: Caller
    jetshop: JetshopStandIn
    norce_address: str
    jetshop_address: str
    config: Config
    config_path: Path


class DemoFailed(Exception):
    """The walk did not go as it should. The message says where."""


@contextlib.asynccontextmanager
async def demo(*, port: int = 8080, operations_port: int = 8081) -> AsyncIterator[Demo]:
    """The service on a ledger in a temporary folder, between its two ends; on other ports where these are taken."""
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
        norce = await stack.enter_async_context(Simulator(token=token))
        norce.throw(validation_messages=True)
        caller = await stack.enter_async_context(Caller(norce, token, ("norce", "1")))
        listening = listen("127.0.0.1", 0)
        await stack.enter_async_context(http_server(norce.app, listening))
        norce_address = "http://{}:{}".format(*listening.getsockname())
        jetshop = JetshopStandIn(shop_id="1", username="stand-in", password=password)
        jetshop_address = await stack.enter_async_context(jetshop.serve())
        text = files(__package__).joinpath("config.yaml").read_text("utf-8")
        for mark, value in {
            "@PORT@": str(_free(port)),
            "@OPERATIONS_PORT@": str(_free(operations_port)),
            "@STORE@": str(folder / "ledger.db"),
            "@SOCKET@": str(folder / "operations.sock"),
            "@NORCE@": f"{norce_address}/checkout",
            "@JETSHOP@": jetshop_address,
        }.items():
            text = text.replace(mark, value)
        path = folder / "config.yaml"
        path.write_text(text, "utf-8")
        config = configuration.load(path, {})
        service = await stack.enter_async_context(running(config, build(config)))
        yield Demo(
            service=service,
            norce=norce,
            caller=caller,
            jetshop=jetshop,
            norce_address=norce_address,
            jetshop_address=jetshop_address,
            config=config,
            config_path=path,
        )


async def walk(demo: Demo, say: Say) -> dict[str, Any]:
    """
    Walks through a purchase and says in words what happens. Returns the status codes and counts that were met.

    The completed order lies beside the configuration afterwards. Raises `DemoFailed`.
    """
    try:
        summary = await _walked(demo, say)
    except Unmet as error:
        raise DemoFailed(f"Norce did not go along: {error}") from error
    expected = {
        "registered": 3,
        "validation": {"denied": 400, "approved": 200},
        "hook": {"accepted": 200, "patched": 200, "refused": 400},
        "notification": 200,
        "healed": 1,
        "repeated": 200,
        "exports": 1,
        "rejected": 1,
    }
    if summary != expected:
        raise DemoFailed(f"the walk ended with {json.dumps(summary)}, not with {json.dumps(expected)}")
    if demo.jetshop.violations:
        raise DemoFailed(f"the stand-in for Jetshop saw {len(demo.jetshop.violations)} requests against its contract")
    return summary


async def _walked(demo: Demo, say: Say) -> dict[str, Any]:
    ask, pay, move = demo.caller.ask, demo.caller.pay, demo.caller.move

    say("The sample order of Norce's API reference is created, and our callbacks are put on it …")
    sample, registered = await _created(demo, "order-api-request-sample", ("norce", "1"))
    say(f"  added: {', '.join(registered['added'])}")
    say(f"  removed, for they led to another host: {len(registered['removed'])}")
    await pay(sample)
    say("Norce asks whether it may be bought …")
    problems = await ask("validate", order_id=sample, status=400)
    denied = _answered(demo, "validation", sample)
    say(f"  denied: {denied}")
    for problem in problems:
        say(f"    {problem['code']}: {problem.get('message')}")

    order, _ = await _created(demo, "order-checkout", ("fjallboden", "se-b2c"))
    await ask("patch_consents", [{"id": "terms", "checked": True}], order_id=order)
    await ask("add_payment", _GIFT_CARD, order_id=order)
    invoice = await pay(order)
    say(f"Norce asks the same about order {order} …")
    await ask("validate", order_id=order)
    approved = _answered(demo, "validation", order)
    say(f"  approved: {approved}")

    say("The shopper changes the cart, and Norce asks before it stores the change …")
    hooked: dict[str, int | None] = {}
    for quantity in (2, 6, 12):
        became, told = await _with_quantity(demo, order, quantity)
        hooked[became] = _answered(demo, "hook", order)
        say(f"  {quantity} of a kind: {became}: {hooked[became]}{told}")

    say("The shopper pays, and the order is `accepted`. Norce notifies us, over HTTP …")
    await ask("cancel_payment", order_id=order, payment_id=invoice)  # for a smaller cart
    await ask("put_reference", REFERENCE, order_id=order)
    paying = await pay(order)
    reserved = {**await ask("read_payment", order_id=order, payment_id=paying), "state": "reserved"}
    await ask("put_payment", reserved, order_id=order, payment_id=paying)
    await move(order, "processing", "accepted")
    await demo.norce.settled()
    accepted = _answered(demo, "notification", order)
    say(f"  stored on disk, then answered: {accepted}; no route wants it yet")
    say("It is `completed`, and this notification is lost on its way. Norce's event log is read …")
    demo.norce.throw(notifications_lost=1.0)
    await move(order, "completed")
    demo.norce.throw(notifications_lost=0.0)
    healed = await _reconciled(demo)
    say(f"  notifications that never came: {healed}, brought now")
    say('  the condition matches: scope /state/currentStatus, schema {"const": "completed"}')
    demo.norce.throw(notification_body="envelope")
    await ask("retry_event", event_id=demo.norce.events(order)[-1]["id"], shop=demo.caller.whose[order])
    await demo.norce.settled()
    again = _answered(demo, "notification", order)
    say(f"  the same event comes after all, in an envelope: {again}, and nothing is done twice")
    delivery = await _ended(demo, order)
    say(f"  the jetshop handler has exported the payment information: {_told(delivery)}")
    completed = json.dumps(demo.norce.order(order), ensure_ascii=False)
    demo.config_path.with_name("order-completed.json").write_text(completed, "utf-8")

    await move(sample, "processing", "accepted", "completed")
    await demo.norce.settled()
    say("The sample order, completed, arrives as well …")
    say(f"  taken without complaint: {_answered(demo, 'notification', sample)}")
    dead = await _ended(demo, sample)
    say(f"  but it cannot be exported, and waits for a person as a dead letter: {_told(dead)}")

    return {
        "registered": len(registered["added"]),
        "validation": {"denied": denied, "approved": approved},
        "hook": hooked,
        "notification": accepted,
        "healed": healed,
        "repeated": again,
        "exports": demo.jetshop.exports(REFERENCE),
        "rejected": len([each for each in _deliveries(demo, state="dead") if each["reason"] == "rejected"]),
    }


async def _created(demo: Demo, name: str, shop: tuple[str, str]) -> tuple[str, dict[str, list[str]]]:
    """
    The order, created as it stands, and what became of the callbacks on it: its own lead to somebody else's host, ours
    are signed for this order.
    """
    order_id = await demo.caller.create(_order(name), shop=shop)
    path = f"/api/v1/orders/{order_id}/registrations"
    headers = _bearer(demo, "norce-token") | {"x-merchant": shop[0], "x-channel": shop[1]}
    return order_id, (await _posted(demo.service.public_address + path, headers)).json()


async def _reconciled(demo: Demo) -> int:
    """Return how many notifications were missed, and brought in."""
    transport = httpx.AsyncHTTPTransport(uds=demo.config.operations.socket)
    answer = await _posted("http://operations/commands/reconcile", {}, b"{}", transport)
    told = [json.loads(line) for line in answer.text.splitlines()]
    return sum(each["missed"] for each in told if each.get("done"))


async def _posted(
    url: str, headers: dict[str, str], content: bytes = b"", transport: httpx.AsyncBaseTransport | None = None
) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS, transport=transport) as http:
        answer = await http.post(url, headers=headers, content=content)
    if answer.status_code != 200:
        raise DemoFailed(f"{url} was answered {answer.status_code}")
    return answer


def _bearer(demo: Demo, name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {demo.config_path.with_name(name).read_text()}"}


def _answered(demo: Demo, kind: str, order_id: str) -> int | None:
    """What the service answered to Norce's last callback of this kind, if it was asked and answered at all."""
    asked = demo.norce.journal.read(order_id=order_id, kind=kind)
    return asked[-1].status if asked else None


async def _with_quantity(demo: Demo, order_id: str, quantity: int) -> tuple[str, str]:
    """Changes how many of the first item there are: what became of it, and the rest of it in words."""
    before = (await demo.caller.read(order_id))["cart"]
    item, is_refused = before["items"][0]["id"], quantity > MOST_OF_A_KIND
    refusal = await demo.caller.ask(
        "patch_item", {"quantity": quantity}, order_id=order_id, item_id=item, status=400 if is_refused else 200
    )
    if is_refused:
        return "refused", f", {refusal['code']}: {refusal['message']}"
    after = (await demo.caller.read(order_id))["cart"]
    added = {name: value for name, value in after["attributes"].items() if before["attributes"].get(name) != value}
    told = "".join(f", add /cart/attributes/{name} {json.dumps(value)}" for name, value in added.items())
    return "patched" if added else "accepted", told


def _free(port: int) -> int:
    try:
        listening = listen("127.0.0.1", port)
    except PortInUse:
        listening = listen("127.0.0.1", 0)
    with listening:
        return int(listening.getsockname()[1])


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
        return Queries(connection).deliveries(DeliveryFilter(**filters))  # type: ignore[arg-type]


def _told(delivery: dict[str, Any]) -> str:
    if delivery["state"] == "done":
        return f"{delivery['reason']}, Jetshop order {delivery['reference']}"
    return f"{delivery['reason']}, {delivery['code']}\n    {delivery['message']}"


def _order(name: str) -> dict[str, Any]:
    order: dict[str, Any] = json.loads(files(__package__).joinpath("orders", f"{name}.json").read_text("utf-8"))
    return order
