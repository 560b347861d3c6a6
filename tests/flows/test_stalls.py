"""A plugin or Norce that never answers: the caller gets the route's no_answer inside the deadline."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.flows.site import Service, Site, make_order, signed_url, wait_until

pytestmark = pytest.mark.speed

DEADLINE_SECONDS = 2.0
SLACK_SECONDS = 1.0  # for a client that is itself one of thirty threads
STORED = 20
MISSING = 'verdicts_missing_total{{callback="{}",reason="{}",route="{}"}}'
REPLACED = 'plugin_loops_replaced_total{{loop="{}",route="{}"}}'


def add_hooks(site: Site, plugin: Path, how: str) -> None:
    """Add two callbacks with one hook each: one that stalls, and one that computes."""
    site.environ["PYTHONPATH"] = str(plugin)
    site.config["callbacks"] |= {
        "cart-stalls": {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "2s"},
        "cart-rules": {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "2s"},
    }
    site.config["routes"] |= {
        "stalls": {"callback": "cart-stalls", "handler": "sample-stalls", "no_answer": "reject",
                   "settings": {"how": how}},
        "a-cart": {"callback": "cart-rules", "handler": "rules", "no_answer": "reject",
                   "settings": {"rules": [{"scope": "/cart/items", "code": "no-items", "message": "Nothing in it."}]}},
    }  # fmt: skip


def timed_post(site: Site, service: Service, callback: str, name: str) -> tuple[float, httpx.Response]:
    body = make_order(name)
    began = time.perf_counter()
    answer = site.http.post(signed_url(service.address, callback, body), json=body)
    return time.perf_counter() - began, answer


def timed_notify(site: Site, service: Service, name: str) -> tuple[float, int]:
    began = time.perf_counter()
    status = site.notify(service, make_order(name))
    return time.perf_counter() - began, status


def assert_stored(site: Site, answers: list[tuple[float, int]]) -> None:
    """Check that every notification was answered 200 inside the deadline and is in the ledger."""
    assert {status for _, status in answers} == {200}
    assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
    assert {each["order_id"] for each in site.deliveries()} == {f"stored-{number}" for number in range(STORED)}


def count(site: Site, service: Service, metric: str) -> float:
    """Return the value of a sample in the metrics, or 0 if there is none."""
    lines = site.http.get(f"{service.operations_address}/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"norce_adapter_{metric} ")), 0.0)


@pytest.mark.parametrize("how", ["waits", "blocks", "spins"])
def test_a_hook_is_answered_in_time_although_its_plugin_stalls(site: Site, sample_plugin: Path, how: str) -> None:
    add_hooks(site, sample_plugin, how)
    site.expected_errors.add("plugins_loop_replaced")
    service = site.start()

    with ThreadPoolExecutor(30) as pool:
        stalled, ruled = (
            [pool.submit(timed_post, site, service, callback, f"{callback}-{number}") for number in range(20)]
            for callback in ("cart-stalls", "cart-rules")
        )
        stored = [pool.submit(timed_notify, site, service, f"stored-{number}") for number in range(STORED)]

    answers = [future.result() for future in stalled]
    assert {(answer.status_code, answer.json()["code"]) for _, answer in answers} == {(400, "not-answered")}
    assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
    answers = [future.result() for future in ruled]
    assert {(answer.status_code, answer.content) for _, answer in answers} == {(200, b"[]")}
    assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
    assert_stored(site, [future.result() for future in stored])
    reason = "late" if how == "waits" else "blocks"
    wait_until(
        lambda: service.logged("verdict", route="stalls", reason=reason), what="a log event that names the route"
    )
    assert count(site, service, MISSING.format("cart-stalls", reason, "stalls")) > 0
    if how != "waits":
        wait_until(
            lambda: service.logged("plugins_loop_replaced", route="stalls"), what="a log event that names the route"
        )
        assert count(site, service, REPLACED.format("plugins-answers", "stalls")) > 0
    assert service.stop() == 0


def test_the_open_circuit_breaker_answers_at_once(site: Site, sample_plugin: Path) -> None:
    add_hooks(site, sample_plugin, "waits")
    site.config["circuit_breaker"] = {"orders": 2}
    service = site.start()

    seconds = [timed_post(site, service, "cart-stalls", f"order-{number}")[0] for number in range(4)]

    assert min(seconds[:2]) > DEADLINE_SECONDS / 2 > max(seconds[2:])
    wait_until(lambda: len(service.logged("verdict", reason="circuit-open")) == 2)
    assert service.stop() == 0


def test_a_validation_is_answered_in_time_although_norce_does_not_answer(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent_norce:
        site.config["callbacks"]["order-rules"]["deadline"] = "2s"
        site.config["dispatcher"]["grace"] = "200ms"  # deliveries wait for Norce, too
        site.config["norce"] = {"base_url": "http://{}:{}".format(*silent_norce.getsockname())}
        site.config["routes"]["a-currency"] = {
            "callback": "order-rules", "handler": "rules", "no_answer": "approve",
            "settings": {"rules": [{"scope": "/currency", "code": "no-currency", "message": "None."}]},
        }  # fmt: skip
        service = site.start()

        with ThreadPoolExecutor(30) as pool:
            asked = [pool.submit(timed_post, site, service, "order-rules", f"order-{number}") for number in range(30)]
            stored = [pool.submit(timed_notify, site, service, f"stored-{number}") for number in range(STORED)]

        answers = [future.result() for future in asked]
        assert {answer.status_code for _, answer in answers} == {200}
        assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
        assert_stored(site, [future.result() for future in stored])
        wait_until(
            lambda: len(service.logged("verdict", route="a-currency", reason="order-unreadable")) == len(answers)
        )
        assert count(site, service, MISSING.format("order-rules", "order-unreadable", "a-currency")) == len(answers)
        assert service.stop() == 0
