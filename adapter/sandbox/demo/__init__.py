"""The demo: a purchase that shows validations, hooks, a lost notification and an export.

The service runs as in production, with a ledger on disk and HTTP on loopback. A simulator plays Norce, a stand-in
plays Jetshop. Orders move through Norce's API, and Norce calls the service by itself. Everything that the demo prints
it reads from the simulator's journal, from answers, or from the ledger.
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
from adapter.callbacks.server import PortInUse, http_server, listen, url_of
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.ledger.store import open_for_reading
from adapter.routing.routes import build
from adapter.sandbox.caller import Caller, Unexpected
from adapter.sandbox.jetshop_stand_in import JetshopStandIn
from adapter.sandbox.norce import Simulator

SAMPLE_CHANNEL, ORDER_CHANNEL = Channel("norce", "1"), Channel("fjallboden", "se-b2c")
REFERENCE = "100245"  # the order's number in the shop
EXPECTED = {
    "registered": 3,
    "validation": {"denied": 400, "approved": 200},
    "hook": {"accepted": 200, "patched": 200, "refused": 400},
    "notification": 200,
    "healed": 1,
    "repeated": 200,
    "exports": 1,
    "rejected": 1,
}
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
    """A running demo."""

    service: Service
    norce: Simulator
    caller: Caller
    jetshop: JetshopStandIn
    norce_address: str
    jetshop_address: str
    config: Config
    config_path: Path
    """The secrets are in files beside the configuration."""


class DemoFailed(Exception):
    """The demo took another course than expected. The message says where."""


@contextlib.asynccontextmanager
async def demo(*, port: int = 8080, operations_port: int = 8081) -> AsyncIterator[Demo]:
    """Run the service with a simulator and a stand-in. If a port is taken, use another."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="norce-adapter-demo-")))
        keys = {name: secrets.token_hex(32) for name in ("norce-token", "jetshop-password", "url-key")}
        for name, secret in keys.items():
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(secret)
        norce = await stack.enter_async_context(Simulator(token=keys["norce-token"]))
        norce.set_switches(validation_messages=True)
        caller = await stack.enter_async_context(Caller(norce, keys["norce-token"], SAMPLE_CHANNEL))
        listening = listen("127.0.0.1", 0)
        await stack.enter_async_context(http_server(norce.app, listening))
        jetshop = JetshopStandIn(password=keys["jetshop-password"])
        jetshop_address = await stack.enter_async_context(jetshop.serve())
        text = files(__package__).joinpath("config.yaml").read_text("utf-8")
        for mark, value in {
            "@PORT@": str(_free(port)),
            "@OPERATIONS_PORT@": str(_free(operations_port)),
            "@STORE@": str(folder / "ledger.db"),
            "@SOCKET@": str(folder / "operations.sock"),
            "@NORCE@": f"{url_of(listening)}/checkout",
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
            norce_address=url_of(listening),
            jetshop_address=jetshop_address,
            config=config,
            config_path=path,
        )


async def walk(demo: Demo, say: Say) -> dict[str, Any]:
    """Play the purchase and return the observed statuses and counts.

    Calls `say` with each line of the story. Leaves the completed order beside the configuration, in
    `order-completed.json`.

    Raises:
        DemoFailed: The purchase took another course.
    """
    try:
        summary = await _walk(demo, say)
    except Unexpected as error:
        raise DemoFailed(f"Norce answered otherwise: {error}") from error
    if summary != EXPECTED:
        raise DemoFailed(f"the demo ended with {json.dumps(summary)}, not with {json.dumps(EXPECTED)}")
    if demo.jetshop.violations:
        raise DemoFailed(f"{len(demo.jetshop.violations)} requests to Jetshop broke its contract")
    return summary


async def _walk(demo: Demo, say: Say) -> dict[str, Any]:
    norce, ask, pay, move = demo.norce, demo.caller.ask, demo.caller.pay, demo.caller.move

    say("A shop creates the sample order of Norce's API reference. The service registers its callbacks …")
    sample, registered = await _create(demo, "order-api-request-sample", SAMPLE_CHANNEL)
    say(f"  added: {', '.join(registered['added'])}")
    say(f"  removed, because they lead to another host: {len(registered['removed'])}")
    await pay(sample)
    say("Norce calls the validation of the sample order …")
    problems = await ask("validate", order_id=sample, status=400)
    denied = _last_answer(demo, "validation", sample)
    say(f"  denied: {denied}")
    for problem in problems:
        say(f"    {problem['code']}: {problem.get('message')}")

    order, _ = await _create(demo, "order-checkout", ORDER_CHANNEL)
    await ask("patch_consents", [{"id": "terms", "checked": True}], order_id=order)
    await ask("add_payment", _GIFT_CARD, order_id=order)
    invoice = await pay(order)
    say(f"Norce calls the validation of another order, {order} …")
    await ask("validate", order_id=order)
    approved = _last_answer(demo, "validation", order)
    say(f"  approved: {approved}")

    say("The shopper changes the cart. Norce calls the hook before it stores the change …")
    hook: dict[str, int | None] = {}
    for quantity in (2, 6, 12):
        result, details = await _change_quantity(demo, order, quantity)
        hook[result] = _last_answer(demo, "hook", order)
        say(f"  {quantity} of one kind: {result}: {hook[result]}{details}")

    say("The shopper pays, and the order is `accepted`. Norce sends a notification …")
    await ask("cancel_payment", order_id=order, payment_id=invoice)  # of the larger cart
    await ask("put_reference", REFERENCE, order_id=order)
    its: dict[str, Any] = {"order_id": order, "payment_id": await pay(order)}
    await ask("put_payment", {**await ask("read_payment", **its), "state": "reserved"}, **its)
    await move(order, "processing", "accepted")
    await norce.wait_until_idle()
    accepted = _last_answer(demo, "notification", order)
    say(f"  stored on disk, then answered: {accepted}; no route wants it yet")
    say("The order is `completed`, but this notification is lost. The service reads Norce's event log …")
    norce.set_switches(notifications_lost=1.0)
    await move(order, "completed")
    norce.set_switches(notifications_lost=0.0)
    healed = await _reconcile(demo)
    say(f"  missed notifications found there: {healed}")
    say('  the condition matches: scope /state/currentStatus, schema {"const": "completed"}')
    norce.set_switches(notification_body="envelope")
    await ask("retry_event", event_id=norce.events(order)[-1]["id"], channel=ORDER_CHANNEL)
    await norce.wait_until_idle()
    repeated = _last_answer(demo, "notification", order)
    say(f"  the lost notification arrives late: {repeated}; it is a duplicate and has no effect")
    say(f"  the handler `jetshop` exports the payment information: {await _result(demo, order)}")
    completed = json.dumps(norce.order(order), ensure_ascii=False)
    demo.config_path.with_name("order-completed.json").write_text(completed, "utf-8")

    say("The sample order is completed too …")
    await move(sample, "processing", "accepted", "completed")
    await norce.wait_until_idle()
    say(f"  notification stored and answered: {_last_answer(demo, 'notification', sample)}")
    say(f"  it cannot be exported and becomes a dead letter: {await _result(demo, sample)}")

    return {
        "registered": len(registered["added"]),
        "validation": {"denied": denied, "approved": approved},
        "hook": hook,
        "notification": accepted,
        "healed": healed,
        "repeated": repeated,
        "exports": demo.jetshop.exports(REFERENCE),
        "rejected": sum(each["reason"] == "rejected" for each in _deliveries(demo, state="dead")),
    }


async def _create(demo: Demo, name: str, channel: Channel) -> tuple[str, dict[str, list[str]]]:
    # The file's own callbacks lead to another host; the service's are signed for this order.
    order = json.loads(files(__package__).joinpath("orders", f"{name}.json").read_text("utf-8"))
    order_id = await demo.caller.create(order, channel=channel)
    token = demo.config_path.with_name("norce-token").read_text()
    headers = {"authorization": f"Bearer {token}", "x-merchant": channel.merchant, "x-channel": channel.name}
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as http:
        url = f"{demo.service.public_address}/api/v1/orders/{order_id}/registrations"
        return order_id, _succeeded(await http.post(url, headers=headers)).json()


async def _reconcile(demo: Demo) -> int:
    transport = httpx.AsyncHTTPTransport(uds=demo.config.operations.socket)
    async with httpx.AsyncClient(transport=transport, timeout=PATIENCE_SECONDS) as http:
        response = _succeeded(await http.post("http://operations/commands/reconcile", content=b"{}"))
    return sum(each["missed"] for each in map(json.loads, response.text.splitlines()) if each.get("done"))


def _succeeded(response: httpx.Response) -> httpx.Response:
    if response.status_code != 200:
        raise DemoFailed(f"{response.url} was answered {response.status_code}")
    return response


def _last_answer(demo: Demo, kind: str, order_id: str) -> int | None:
    entries = demo.norce.journal.read(order_id=order_id, kind=kind)
    return entries[-1].status if entries else None


async def _change_quantity(demo: Demo, order_id: str, quantity: int) -> tuple[str, str]:
    before = (await demo.caller.read(order_id))["cart"]
    path = {"order_id": order_id, "item_id": before["items"][0]["id"]}
    if quantity > 10:  # the limit in config.yaml
        refusal = await demo.caller.ask("patch_item", {"quantity": quantity}, **path, status=400)
        return "refused", f", {refusal['code']}: {refusal['message']}"
    await demo.caller.ask("patch_item", {"quantity": quantity}, **path)
    after = (await demo.caller.read(order_id))["cart"]
    added = {name: value for name, value in after["attributes"].items() if name not in before["attributes"]}
    details = "".join(f", add /cart/attributes/{name} {json.dumps(value)}" for name, value in added.items())
    return "patched" if added else "accepted", details


def _free(port: int) -> int:
    try:
        listening = listen("127.0.0.1", port)
    except PortInUse:
        listening = listen("127.0.0.1", 0)
    with listening:
        return int(listening.getsockname()[1])


async def _result(demo: Demo, order_id: str) -> str:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                deliveries = _deliveries(demo, order_id=order_id)
                if deliveries and deliveries[0]["state"] != "waiting":
                    break
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise DemoFailed(f"the delivery of order {order_id} is not done after {PATIENCE_SECONDS:g} s") from error
    delivery = deliveries[0]
    if delivery["state"] == "done":
        return f"{delivery['reason']}, Jetshop order {delivery['reference']}"
    return f"{delivery['reason']}, {delivery['code']}\n    {delivery['message']}"


def _deliveries(demo: Demo, **filters: str) -> list[dict[str, Any]]:
    with open_for_reading(demo.config.store.url).connect() as connection:
        return Queries(connection).deliveries(DeliveryFilter(**filters))  # type: ignore[arg-type]
