"""The demo: its result, its secrets, and its failures."""

import asyncio
import copy
import json
import socket
from typing import Any

import httpx
import pytest

from adapter.callbacks.senders import Senders
from adapter.identifiers import Channel
from adapter.ledger.queries import Queries
from adapter.ledger.store import open_for_reading
from adapter.sandbox.demo import Demo, DemoFailed, demo, walk
from adapter.sandbox.jetshop_stand_in import Accepted

SECRETS = ("norce-token", "jetshop-password", "url-key")
SUMMARY = {
    "registered": 3,
    "validation": {"denied": 400, "approved": 200},
    "hook": {"accepted": 200, "patched": 200, "refused": 400},
    "notification": 200,
    "healed": 1,
    "repeated": 200,
    "exports": 1,
    "rejected": 1,
}


def url(running: Demo, order: dict[str, Any], callback: str) -> str:
    senders = Senders(running.config.senders)
    return senders.signed_url(
        running.service.public_address, Channel(order["merchant"], order["channel"]), order["id"], callback
    )


def deliveries(running: Demo) -> list[dict[str, Any]]:
    with open_for_reading(running.config.store.url).connect() as connection:
        return Queries(connection).deliveries()


def completed(running: Demo) -> dict[str, Any]:
    [order] = [order for order in running.norce.orders() if order["merchant"] == "fjallboden"]
    return order


def test_the_demo_ends_with_one_export_and_one_dead_letter() -> None:
    said: list[str] = []

    async def play() -> tuple[dict[str, Any], list[Any], list[Any], list[dict[str, Any]]]:
        async with demo(port=0, operations_port=0) as running:
            summary = await walk(running, said.append)
            return summary, list(running.jetshop.journal), list(running.jetshop.violations), deliveries(running)

    summary, journal, violations, owed = asyncio.run(play())

    assert summary == SUMMARY
    [accepted] = journal
    assert (accepted.document["orderReference"], accepted.result) == ("100245", "created")
    assert violations == []
    assert sorted((each["state"], each["reason"]) for each in owed) == [("dead", "rejected"), ("done", "delivered")]
    assert any("denied: 400" in line for line in said)
    assert any("approved: 200" in line for line in said)
    assert any('patched: 200, add /cart/attributes/priceList "volume"' in line for line in said)
    assert any("refused: 400, too-many-of-a-kind: Högst tio av samma sort" in line for line in said)


def test_an_order_that_is_sent_five_more_times_is_exported_once() -> None:
    async def play() -> tuple[list[int], list[Any], int]:
        async with demo(port=0, operations_port=0) as running, httpx.AsyncClient(trust_env=False) as http:
            await walk(running, lambda _line: None)
            order = completed(running)
            shuffled = dict(reversed(order.items()))
            answers = [
                await http.post(url(running, order, "order-status"), json=body)
                for body in (order, shuffled, {"order": order, "notification": {}}, order, copy.deepcopy(order))
            ]
            before = len(deliveries(running))
            journal = running.jetshop.journal
        # The service has ended, so nothing more is sent.
        return [answer.status_code for answer in answers], list(journal), before

    statuses, journal, owed = asyncio.run(play())

    assert statuses == [200] * 5
    assert len(journal) == 1
    assert owed == 2


def test_the_demo_uses_free_ports_if_its_own_are_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def play() -> tuple[str, int]:
            async with demo(port=port, operations_port=port) as running, httpx.AsyncClient(trust_env=False) as http:
                answer = await http.get(f"{running.service.operations_address}/readyz")
                return running.service.public_address, answer.status_code

        address, ready = asyncio.run(play())

    assert not address.endswith(f":{port}")
    assert ready == 200


def test_the_secrets_are_private_and_the_folder_is_removed() -> None:
    async def play() -> tuple[Any, list[int]]:
        async with demo(port=0, operations_port=0) as running:
            folder = running.config_path.parent
            modes = [(folder / name).stat().st_mode & 0o777 for name in SECRETS]
            secrets = [(folder / name).read_text() for name in SECRETS]
            assert not any(secret in running.config_path.read_text() for secret in secrets)
            return folder, modes

    folder, modes = asyncio.run(play())

    assert modes == [0o600] * len(SECRETS)
    assert not folder.exists()


def test_norce_calls_only_the_service() -> None:
    async def play() -> tuple[list[str], str, list[int | None]]:
        async with demo(port=0, operations_port=0) as running:
            await walk(running, lambda _line: None)
            journal = running.norce.journal.read(limit=1000)
            called = [each.url for each in journal if each.kind != "request"]
            attempts = [attempt["status"] for event in running.norce.events() for attempt in event["attempts"]]
            return called, running.service.public_address, attempts

    called, address, attempts = asyncio.run(play())

    assert called
    assert all(each.startswith(f"{address}/api/v1/callbacks/orders/") for each in called)
    assert attempts == [200] * 4, "accepted and completed twice; the lost event is sent on request"


def test_the_completed_order_is_written_beside_the_configuration() -> None:
    async def play() -> tuple[Any, Any]:
        async with demo(port=0, operations_port=0) as running:
            await walk(running, lambda _line: None)
            written = running.config_path.with_name("order-completed.json").read_text("utf-8")
            return json.loads(written), completed(running)

    written, order = asyncio.run(play())

    assert written == order
    assert order["state"]["currentStatus"] == "completed"


@pytest.mark.parametrize(
    ("switch", "value", "says"),
    [
        ("server_errors", 1.0, r"create_order was answered 500 \(internal-server-error\)"),
        ("validation_seconds", 0.0, "validate was answered 200"),
    ],
)
def test_an_unexpected_answer_of_norce_fails_the_demo(switch: str, value: float, says: str) -> None:
    async def play() -> None:
        async with demo(port=0, operations_port=0) as running:
            running.norce.set_switches(**{switch: value})
            await walk(running, lambda _line: None)

    with pytest.raises(DemoFailed, match=says):
        asyncio.run(play())


def test_an_unexpected_result_fails_the_demo() -> None:
    async def play() -> None:
        async with demo(port=0, operations_port=0) as running:
            other = Accepted(order_key="100245", idempotency_key="other", document={}, result="created")
            running.jetshop.journal.append(other)
            await walk(running, lambda _line: None)

    with pytest.raises(DemoFailed, match="the demo ended with"):
        asyncio.run(play())
