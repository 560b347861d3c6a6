"""The attacks that need no load, on a service in a process of its own. `make attack` runs the others.

No test here depends on speed: each waits for something that the service does, or counts answers.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from tests import PATIENCE
from tests.attacks import connections, orders, outside
from tests.attacks.catalogue import ATTACKS, combined
from tests.attacks.harness import Orders, prepare, with_slow_orders
from tests.attacks.wire import Target, head, is_closed, order_bytes, put, request, status_of, stop_reading
from tests.flows.site import ExternalServices, Site, install_sample_plugin


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExternalServices() as external_services, Site(tmp_path_factory.mktemp("attacks"), external_services) as site:
        prepare(site)
        with_slow_orders(site)
        site.environ["PYTHONPATH"] = str(install_sample_plugin(tmp_path_factory.mktemp("plugin")))
        site.config["callbacks"]["order-rules"]["deadline"] = "10s"
        yield site


@pytest.fixture(scope="module")
def target(site: Site) -> Target:
    service = site.start()
    return Target(address=service.address, operations_address=service.operations_address)


# --- connections ------------------------------------------------------------------------------------------------------


def test_a_connection_that_sends_trailers_without_end_is_closed(target: Target) -> None:
    most = 8 * 1024 * 1024

    assert asyncio.run(connections.send_trailers(target, most)) < most


def test_a_trailer_is_no_credential(target: Target) -> None:
    assert asyncio.run(connections.ask_with_trailer(target, "by-trailer")) == 401


@pytest.mark.parametrize("way", ["unknown path", "unknown caller", "validation", "operations"])
def test_a_connection_is_closed_if_the_body_never_comes_after_its_answer(target: Target, way: str) -> None:
    first, port = connections.answered_before_body(target)[way]

    status, closed = asyncio.run(connections.fall_silent(target, first, port, PATIENCE))

    assert status in (200, 400, 401, 404)
    assert closed


def test_an_unknown_caller_is_refused_before_its_body_and_cut_off(target: Target) -> None:
    async def call() -> tuple[int, bool]:
        async with target.connect() as (reader, writer):
            put(writer, head("POST", connections.UNSIGNED, connections.LENGTH))
            return await status_of(reader), await is_closed(reader, PATIENCE)

    assert asyncio.run(call()) == (401, True)


def test_a_client_that_reads_no_answers_is_cut_off(target: Target) -> None:
    async def call() -> bool:
        async with target.connect(receive_buffer=4096) as (_, writer):
            stop_reading(writer)
            async with asyncio.timeout(PATIENCE):
                while not writer.transport.is_closing():
                    put(writer, connections.UNREAD)
                    await asyncio.sleep(0.05)
            return True

    assert asyncio.run(call())


# --- orders -----------------------------------------------------------------------------------------------------------


def test_a_flood_of_one_orders_validations_approves_nothing(site: Site, target: Target) -> None:
    """More calls than the reads that one merchant may have, while Norce does not answer for this order."""
    flooded = request("POST", target.path("order-rules", "refused-flood"), b"")
    other = request("POST", target.path("order-rules", "refused-other"), b"")

    async def call() -> tuple[int, Counter[int]]:
        calls = [asyncio.ensure_future(target.exchange(flooded)) for _ in range(100)]
        async with asyncio.timeout(PATIENCE):
            while "refused-flood" not in site.norce.reads:  # noqa: ASYNC110 - Norce is in another thread
                await asyncio.sleep(0.01)
        status = await target.exchange(other)
        site.norce.held.clear()
        return status, Counter(await asyncio.gather(*calls))

    site.norce.held.add("refused-flood")
    status, flood = asyncio.run(call())

    assert status == 400
    assert flood.keys() <= {400, 503}
    assert flood[400]


def test_slow_hooks_of_one_order_switch_no_rule_off_for_others(target: Target) -> None:
    def hook(order_id: str) -> bytes:
        return request("POST", target.path("cart-slow", order_id), order_bytes(order_id))

    async def call() -> list[int]:
        await asyncio.gather(*(target.exchange(hook("slow-1")) for _ in range(5)))
        return [await target.exchange(hook(f"other-{number}")) for number in range(5)]

    assert 400 in asyncio.run(call())  # all pass while the circuit breaker is open


@pytest.mark.parametrize("callback", ["cart-changed", "order-rules"])
def test_a_secret_in_the_url_asks_for_no_verdict(target: Target, callback: str) -> None:
    asked = orders.with_url_secret(callback, "by-secret", order_bytes("by-secret"))

    assert asyncio.run(target.exchange(asked)) in (401, 403)


# --- outside ----------------------------------------------------------------------------------------------------------


def test_the_operations_port_refuses_other_hosts(target: Target) -> None:
    wrong = asyncio.run(outside.ask_with_host(target, "attacker.example"))
    right = asyncio.run(outside.ask_with_host(target, f"127.0.0.1:{target.operations_port}"))

    assert all(400 <= status < 500 for status in wrong.values()), wrong
    assert right["/livez"] == right["/metrics"] == 200


# --- the attacks themselves -------------------------------------------------------------------------------------------


def test_every_attack_says_what_it_is() -> None:
    assert all(attack.summary and attack.seconds > 0 for attack in ATTACKS.values())
    assert combined().keys() < ATTACKS.keys()


def test_the_offline_norce_has_every_order() -> None:
    every = Orders()

    assert every.get("refused-1")["currency"] != every.get("other")["currency"]
