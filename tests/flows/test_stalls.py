"""However a plugin does not come back, and though Norce does not either: the answer is the route's, and in time."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.flows.stage import Service, Stage, order, signed_url, until

DEADLINE_SECONDS = 1.0
SLACK_SECONDS = 0.5  # for a client that is itself one of thirty threads on a busy machine
STORED = 20
MISSING = 'verdicts_missing_total{{callback="{}",reason="{}",route="{}"}}'
REPLACED = 'plugins_loops_replaced_total{{loop="{}",route="{}"}}'


def hooked(stage: Stage, plugin: Path, how: str) -> None:
    """Adds two hooks of one callback each: one that stalls, and one that computes."""
    stage.environ["PYTHONPATH"] = str(plugin)
    stage.config["callbacks"] |= {
        "cart-stalls": {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "1s"},
        "cart-rules": {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "1s"},
    }
    stage.config["routes"] |= {
        "stalls": {"callback": "cart-stalls", "handler": "sample-stalls", "no_answer": "reject",
                   "settings": {"how": how}},
        "a-cart": {"callback": "cart-rules", "handler": "rules", "no_answer": "reject",
                   "settings": {"rules": [{"scope": "/cart/items", "code": "no-items", "message": "Nothing in it."}]}},
    }  # fmt: skip


def timed_post(stage: Stage, service: Service, callback: str, name: str) -> tuple[float, httpx.Response]:
    body = order(name)
    began = time.perf_counter()
    answer = stage.http.post(signed_url(service.address, callback, body), json=body)
    return time.perf_counter() - began, answer


def timed_notify(stage: Stage, service: Service, name: str) -> tuple[float, int]:
    began = time.perf_counter()
    status = stage.notify(service, order(name))
    return time.perf_counter() - began, status


def assert_stored(stage: Stage, answers: list[tuple[float, int]]) -> None:
    """Every notification was answered 200, as soon as an answer would be, and is in the ledger."""
    assert {status for _, status in answers} == {200}
    assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
    assert {each["order_id"] for each in stage.deliveries()} == {f"stored-{number}" for number in range(STORED)}


def counted(stage: Stage, service: Service, metric: str) -> float:
    """The value of this sample in the metrics, 0 where it is not among them."""
    lines = stage.http.get(f"{service.operations_address}/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"norce_adapter_{metric} ")), 0.0)


@pytest.mark.parametrize("how", ["waits", "blocks", "spins"])
def test_a_hook_is_answered_in_time_however_its_plugin_stalls(stage: Stage, sample_plugin: Path, how: str) -> None:
    hooked(stage, sample_plugin, how)
    stage.expected.add("plugins_loop_replaced")
    service = stage.start()

    with ThreadPoolExecutor(30) as pool:
        stalled, ruled = (
            [pool.submit(timed_post, stage, service, callback, f"{callback}-{number}") for number in range(20)]
            for callback in ("cart-stalls", "cart-rules")
        )
        stored = [pool.submit(timed_notify, stage, service, f"stored-{number}") for number in range(STORED)]

    answers = [future.result() for future in stalled]
    assert {(answer.status_code, answer.json()["code"]) for _, answer in answers} == {(400, "not-answered")}
    assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
    answers = [future.result() for future in ruled]
    assert {(answer.status_code, answer.content) for _, answer in answers} == {(200, b"[]")}
    assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
    assert_stored(stage, [future.result() for future in stored])
    reason = "late" if how == "waits" else "blocks"
    until(lambda: service.said("verdict", route="stalls", reason=reason), what="the route that stalls by its name")
    assert counted(stage, service, MISSING.format("cart-stalls", reason, "stalls")) > 0
    if how != "waits":
        until(lambda: service.said("plugins_loop_replaced", route="stalls"), what="the route that blocks by its name")
        assert counted(stage, service, REPLACED.format("plugins-answers", "stalls")) > 0
    assert service.stop(within=10) == 0


def test_a_route_that_misses_again_and_again_is_answered_at_once(stage: Stage, sample_plugin: Path) -> None:
    hooked(stage, sample_plugin, "waits")
    stage.config["circuit_breaker"] = {"failures": 2}
    service = stage.start()

    seconds = [timed_post(stage, service, "cart-stalls", f"order-{number}")[0] for number in range(4)]

    assert min(seconds[:2]) > DEADLINE_SECONDS / 2 > max(seconds[2:])
    until(lambda: len(service.said("verdict", reason="circuit-open")) == 2)
    assert service.stop(within=10) == 0


def test_a_validation_is_answered_in_time_though_norce_says_nothing(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as mute:
        stage.config["dispatcher"]["grace"] = "200ms"  # deliveries, too, wait for Norce
        stage.config["norce"] = {"base_url": "http://{}:{}".format(*mute.getsockname())}
        stage.config["routes"]["a-currency"] = {
            "callback": "order-rules", "handler": "rules", "no_answer": "approve",
            "settings": {"rules": [{"scope": "/currency", "code": "no-currency", "message": "None."}]},
        }  # fmt: skip
        service = stage.start()

        with ThreadPoolExecutor(30) as pool:
            asked = [pool.submit(timed_post, stage, service, "order-rules", f"order-{number}") for number in range(60)]
            stored = [pool.submit(timed_notify, stage, service, f"stored-{number}") for number in range(STORED)]

        answers = [future.result() for future in asked]
        assert {answer.status_code for _, answer in answers} == {200}
        assert max(seconds for seconds, _ in answers) < DEADLINE_SECONDS + SLACK_SECONDS
        assert_stored(stage, [future.result() for future in stored])
        until(lambda: len(service.said("verdict", route="a-currency", reason="order-unreadable")) == len(answers))
        assert counted(stage, service, MISSING.format("order-rules", "order-unreadable", "a-currency")) == len(answers)
        assert service.stop(within=10) == 0
