"""A plugin that blocks its thread holds up its own kind, never a verdict, the intake or the end of the process."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests.flows.stage import Stage, order, until

DEADLINE_SECONDS = 1.0
SLACK_SECONDS = 0.5  # for a client that is itself one of forty threads on a busy machine
T = TypeVar("T")


def blocked(stage: Stage, plugin: Path) -> Path:
    """Adds a delivery and a check that sleep for half a minute; where they say that they were called."""
    calls = stage.folder / "calls"
    calls.touch()
    stage.environ["PYTHONPATH"] = str(plugin)
    stage.config["dispatcher"]["grace"] = "200ms"
    stage.config["callbacks"] |= {"order-checks": {"kind": "validation", "deadline": "1s"}}
    stage.config["routes"] |= {
        "sleeps": {"callback": "order-status", "handler": "sample-sleeps", "timeout": "1s",
                   "settings": {"calls": str(calls)}},
        "sleeping-check": {"callback": "order-checks", "handler": "sample-sleeping-check", "no_answer": "reject",
                           "settings": {"calls": str(calls)}},
        "short-orders": {"callback": "order-rules", "handler": "rules", "no_answer": "reject",
                         "settings": {"rules": [{"scope": "/currency", "schema": {"const": "SEK"},
                                                 "code": "not-sek", "message": "Kronor only."}]}},
    }  # fmt: skip
    return calls


def timed(act: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    answer = act()
    return time.perf_counter() - began, answer


def test_verdicts_are_in_time_and_notifications_stored_while_every_plugin_blocks(
    stage: Stage, sample_plugin: Path
) -> None:
    calls = blocked(stage, sample_plugin)
    stage.expected.add("plugins_loop_replaced")
    service = stage.start()
    stage.notify(service, order("blocks"))
    until(lambda: "deliver blocks" in calls.read_text())

    def check(number: int) -> tuple[float, int, str]:
        seconds, answer = timed(lambda: stage.validate(service, order(f"check-{number}"), "order-checks"))
        return seconds, answer.status_code, answer.json()[0]["code"]

    def rule(number: int) -> tuple[float, int]:
        seconds, answer = timed(lambda: stage.validate(service, order(f"rule-{number}")))
        return seconds, answer.status_code

    def store(number: int) -> tuple[float, int]:
        return timed(lambda: stage.notify(service, order(f"stored-{number}")))

    with ThreadPoolExecutor(40) as pool:
        checks, rules, stored = (
            [pool.submit(act, number) for number in range(count)]
            for act, count in ((check, 40), (rule, 100), (store, 100))
        )

    # Asked of a handler that sleeps: answered at the deadline, as the route's no_answer says.
    assert {(future.result()[1], future.result()[2]) for future in checks} == {(400, "not-answered")}
    assert max(future.result()[0] for future in checks) < DEADLINE_SECONDS + SLACK_SECONDS
    # Asked of one that computes: not held up at all.
    assert {future.result()[1] for future in rules} == {200}
    assert max(future.result()[0] for future in rules) < DEADLINE_SECONDS + SLACK_SECONDS
    assert {future.result()[1] for future in stored} == {200}
    assert len({each["order_id"] for each in stage.deliveries()}) == 101
    assert service.process.poll() is None

    assert service.stop(within=10) == 0


def test_a_thread_that_a_handler_left_behind_does_not_hold_up_the_end(stage: Stage, sample_plugin: Path) -> None:
    calls = blocked(stage, sample_plugin)
    stage.config["routes"]["sleeps"] |= {"handler": "sample-sleeps-in-a-thread", "timeout": "20s"}
    service = stage.start()
    stage.notify(service, order("aside"))
    until(lambda: "deliver aside" in calls.read_text())

    assert service.stop(within=10) == 0


def test_metrics_and_health_are_answered_while_every_plugin_blocks(stage: Stage, sample_plugin: Path) -> None:
    calls = blocked(stage, sample_plugin)
    service = stage.start()
    stage.notify(service, order("blocks"))
    until(lambda: "deliver blocks" in calls.read_text())

    answers = {path: stage.http.get(f"{service.operations_address}/{path}") for path in ("livez", "readyz", "metrics")}

    assert {answer.status_code for answer in answers.values()} == {200}
    assert json.loads(answers["readyz"].content)["ready"] is True
    assert 'norce_adapter_deliveries{route="sleeps",state="waiting"} 1.0' in answers["metrics"].text
