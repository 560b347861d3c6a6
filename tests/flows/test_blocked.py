"""A plugin that blocks its thread delays only plugins: no other verdict, no notification and no shutdown."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from tests.flows.service_process import COMMAND
from tests.flows.site import Site, make_order, wait_until

DEADLINE_SECONDS = 2.0
SLACK_SECONDS = 1.0  # for a client that is itself one of many threads
T = TypeVar("T")


def add_blocking_routes(site: Site, plugin: Path) -> Path:
    """Add a delivery and a validation that sleep for minutes. Return the file in which they record their calls."""
    calls = site.folder / "calls"
    calls.touch()
    site.environ["PYTHONPATH"] = str(plugin)
    site.config["dispatcher"]["grace"] = "200ms"
    site.config["callbacks"]["order-rules"]["deadline"] = "2s"
    site.config["callbacks"] |= {"order-checks": {"kind": "validation", "deadline": "2s"}}
    site.config["routes"] |= {
        "sleeps": {"callback": "order-status", "handler": "sample-sleeps", "timeout": "1s",
                   "settings": {"calls": str(calls)}},
        "sleeping-check": {"callback": "order-checks", "handler": "sample-sleeping-check", "no_answer": "reject",
                           "settings": {"calls": str(calls)}},
        "short-orders": {"callback": "order-rules", "handler": "rules", "no_answer": "reject",
                         "settings": {"rules": [{"scope": "/currency", "schema": {"const": "SEK"},
                                                 "code": "not-sek", "message": "Kronor only."}]}},
    }  # fmt: skip
    return calls


def measure(act: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    answer = act()
    return time.perf_counter() - began, answer


@pytest.mark.speed
def test_verdicts_are_in_time_and_notifications_are_stored_while_every_plugin_blocks(
    site: Site, sample_plugin: Path
) -> None:
    calls = add_blocking_routes(site, sample_plugin)
    site.expected_errors.add("plugins_loop_replaced")
    service = site.start()
    site.notify(service, make_order("blocks"))
    wait_until(lambda: "deliver blocks" in calls.read_text())

    def check(number: int) -> tuple[float, int, str]:
        seconds, answer = measure(lambda: site.validate(service, make_order(f"check-{number}"), "order-checks"))
        return seconds, answer.status_code, answer.json()[0]["code"]

    def rule(number: int) -> tuple[float, int]:
        seconds, answer = measure(lambda: site.validate(service, make_order(f"rule-{number}")))
        return seconds, answer.status_code

    def store(number: int) -> tuple[float, int]:
        return measure(lambda: site.notify(service, make_order(f"stored-{number}")))

    # The checks wait all at once. Few others are under way beside them: the clients and Norce share this process.
    with ThreadPoolExecutor(20) as pool, ThreadPoolExecutor(4) as few:
        checks = [pool.submit(check, number) for number in range(20)]
        rules = [few.submit(rule, number) for number in range(50)]
        stored = [few.submit(store, number) for number in range(50)]

    # A handler that sleeps: the answer comes at the deadline and is the route's no_answer.
    assert {(future.result()[1], future.result()[2]) for future in checks} == {(400, "not-answered")}
    assert max(future.result()[0] for future in checks) < DEADLINE_SECONDS + SLACK_SECONDS
    # A handler that only computes is not delayed.
    assert {future.result()[1] for future in rules} == {200}
    assert max(future.result()[0] for future in rules) < DEADLINE_SECONDS + SLACK_SECONDS
    assert {future.result()[1] for future in stored} == {200}
    assert len({each["order_id"] for each in site.deliveries()}) == 51
    assert service.is_running

    assert service.stop() == 0


def test_a_shutdown_does_not_wait_for_a_thread_that_a_handler_started(site: Site, sample_plugin: Path) -> None:
    calls = add_blocking_routes(site, sample_plugin)
    site.config["routes"]["sleeps"] |= {"handler": "sample-sleeps-in-a-thread", "timeout": "10m"}
    service = site.start(command=[COMMAND])
    site.notify(service, make_order("aside"))
    wait_until(lambda: "deliver aside" in calls.read_text())

    assert service.stop() == 0


def test_metrics_and_health_are_answered_while_every_plugin_blocks(site: Site, sample_plugin: Path) -> None:
    calls = add_blocking_routes(site, sample_plugin)
    site.config["routes"]["sleeps"]["timeout"] = "10m"
    service = site.start()
    site.notify(service, make_order("blocks"))
    wait_until(lambda: "deliver blocks" in calls.read_text())

    answers = {path: site.http.get(f"{service.operations_address}/{path}") for path in ("livez", "readyz", "metrics")}

    assert {answer.status_code for answer in answers.values()} == {200}
    assert json.loads(answers["readyz"].content)["ready"] is True
    assert 'norce_adapter_deliveries{route="sleeps",state="waiting"} 1.0' in answers["metrics"].text
