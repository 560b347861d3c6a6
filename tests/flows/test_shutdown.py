"""Told to stop: what runs may finish, what does not is left in doubt, and nobody waits for ever."""

from pathlib import Path

import pytest

from tests.flows.stage import Stage, order, until

pytestmark = pytest.mark.usefixtures("store_url")


def waits(stage: Stage, plugin: Path) -> tuple[Path, Path]:
    """A single route whose handler waits for a file: where it says that it was called, and the file."""
    calls, release = stage.folder / "calls", stage.folder / "release"
    calls.touch()
    stage.environ["PYTHONPATH"] = str(plugin)
    stage.config["routes"] = {
        "waits": {
            "callback": "order-status",
            "handler": "sample-waits",
            "timeout": "10s",
            "settings": {"calls": str(calls), "until": str(release)},
        }
    }
    return calls, release


def test_a_delivery_that_runs_is_finished_and_recorded_before_the_end(stage: Stage, sample_plugin: Path) -> None:
    calls, release = waits(stage, sample_plugin)
    stage.config["dispatcher"]["grace"] = "20s"
    service = stage.start()
    stage.notify(service, order("running"))
    until(lambda: "deliver running" in calls.read_text())
    ready = f"{service.operations_address}/readyz"
    assert stage.http.get(ready).status_code == 200

    service.told_to_stop()
    until(lambda: stage.http.get(ready).status_code == 503, within=5)
    assert stage.http.get(ready).json()["checks"]["not_stopping"] is False
    assert service.process.poll() is None
    release.touch()

    assert service.exit_code(within=10) == 0
    delivery = stage.delivery("running")
    assert (delivery["reason"], delivery["reference"], delivery["tries"]) == ("delivered", "waited-running", 1)
    assert calls.read_text().splitlines() == ["deliver running"]


def test_an_order_that_is_being_re_read_at_the_end_of_the_grace_is_not_lost(stage: Stage, sample_plugin: Path) -> None:
    calls, release = waits(stage, sample_plugin)
    release.touch()
    stage.config["dispatcher"]["grace"] = "0s"
    stage.config["norce"]["timeout"] = "20s"
    stage.norce.held.add("unread")
    service = stage.start()
    stage.notify(service, order("unread"))
    until(lambda: "unread" in stage.norce.reads)

    assert service.stop(within=10) == 0

    assert stage.delivery("unread")["state"] == "waiting"
    assert calls.read_text() == ""


def test_sigterm_ends_an_idle_service_at_once(stage: Stage) -> None:
    service = stage.start()

    assert service.stop(within=5) == 0
    said = [event["event"] for event in service.events()]
    assert said[-1] == "stopped"
    assert "stopping" in said
