"""The demo: its result, its secrets, and its failures."""

import asyncio
import copy
import json
import socket
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Played:
    """A demo after the walk, and after the completed order was sent five more times."""

    running: Demo
    summary: dict[str, Any]
    story: str
    written: dict[str, Any]
    repeated: list[int]
    deliveries: list[dict[str, Any]]


@pytest.fixture(scope="module")
def played() -> Played:
    lines: list[str] = []

    async def play() -> Played:
        async with demo(port=0, operations_port=0) as running, httpx.AsyncClient(trust_env=False) as http:
            summary = await walk(running, lines.append)
            order = completed(running)
            senders = Senders(running.config.senders)
            channel = Channel(order["merchant"], order["channel"])
            url = senders.signed_url(running.service.public_address, channel, order["id"], "order-status")
            bodies = (order, dict(reversed(order.items())), {"order": order, "notification": {}}, order,
                      copy.deepcopy(order))  # fmt: skip
            repeated = [(await http.post(url, json=body)).status_code for body in bodies]
            with open_for_reading(running.config.store.url).connect() as connection:
                deliveries = Queries(connection).deliveries()
            written = json.loads(running.config_path.with_name("order-completed.json").read_text("utf-8"))
        # The service has ended, so nothing more is sent.
        return Played(running, summary, "\n".join(lines), written, repeated, deliveries)

    return asyncio.run(play())


def completed(running: Demo) -> dict[str, Any]:
    [order] = [order for order in running.norce.orders() if order["merchant"] == "fjallboden"]
    return order


def test_the_demo_ends_with_one_export_and_one_dead_letter(played: Played) -> None:
    assert played.summary == {
        "registered": 3,
        "validation": {"denied": 400, "approved": 200},
        "hook": {"accepted": 200, "patched": 200, "refused": 400},
        "notification": 200,
        "healed": 1,
        "repeated": 200,
        "exports": 1,
        "rejected": 1,
    }
    [accepted] = played.running.jetshop.journal
    assert (accepted.document["orderReference"], accepted.result) == ("100245", "created")
    assert sorted((each["state"], each["reason"]) for each in played.deliveries) == [
        ("dead", "rejected"),
        ("done", "delivered"),
    ]


def test_the_story_tells_the_verdicts(played: Played) -> None:
    assert "denied: 400" in played.story
    assert "approved: 200" in played.story
    assert 'patched: 200, add /cart/attributes/priceList "volume"' in played.story
    assert "refused: 400, too-many-of-a-kind: Högst tio av samma sort" in played.story


def test_an_order_that_is_sent_five_more_times_is_exported_once(played: Played) -> None:
    assert played.repeated == [200] * 5
    assert len(played.running.jetshop.journal) == 1
    assert len(played.deliveries) == 2


def test_norce_calls_only_the_service(played: Played) -> None:
    norce, address = played.running.norce, played.running.service.public_address
    urls = [each.url for each in norce.journal.read(limit=1000) if each.kind != "request"]
    attempts = [attempt["status"] for event in norce.events() for attempt in event["attempts"]]

    assert urls
    assert all(each.startswith(f"{address}/api/v1/callbacks/orders/") for each in urls)
    assert attempts == [200] * 4, "two orders are accepted and completed; the lost event is sent on request"


def test_the_completed_order_is_written_beside_the_configuration(played: Played) -> None:
    assert played.written == completed(played.running)
    assert played.written["state"]["currentStatus"] == "completed"


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
            assert folder.stat().st_mode & 0o077 == 0
            modes = [(folder / name).stat().st_mode & 0o777 for name in SECRETS]
            secrets = [(folder / name).read_text() for name in SECRETS]
            assert not any(secret in running.config_path.read_text() for secret in secrets)
            return folder, modes

    folder, modes = asyncio.run(play())

    assert modes == [0o600] * 3
    assert not folder.exists()


@pytest.mark.parametrize(
    ("switch", "value", "message"),
    [
        ("server_errors", 1.0, r"create_order was answered 500 \(internal-server-error\)"),
        ("validation_seconds", 0.0, "validate was answered 200"),
    ],
)
def test_an_unexpected_answer_of_norce_fails_the_demo(switch: str, value: float, message: str) -> None:
    async def play() -> None:
        async with demo(port=0, operations_port=0) as running:
            running.norce.set_switches(**{switch: value})
            await walk(running, lambda _line: None)

    with pytest.raises(DemoFailed, match=message):
        asyncio.run(play())


def test_an_unexpected_result_fails_the_demo() -> None:
    async def play() -> None:
        async with demo(port=0, operations_port=0) as running:
            other = Accepted(order_key="100245", idempotency_key="other", document={}, result="created")
            running.jetshop.journal.append(other)
            await walk(running, lambda _line: None)

    with pytest.raises(DemoFailed, match="the demo ended with"):
        asyncio.run(play())
