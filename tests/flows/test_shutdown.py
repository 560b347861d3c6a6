"""Shutdown: running deliveries may finish, the others stay in doubt, and the process ends."""

from pathlib import Path

import pytest

from tests.flows.service_process import COMMAND
from tests.flows.site import Site, make_order, wait_until

pytestmark = pytest.mark.usefixtures("store_url")


def add_waiting_route(site: Site, plugin: Path) -> tuple[Path, Path]:
    """Make the only route one whose handler waits for a file.

    Returns:
        The file in which the handler records its calls, and the file for which it waits.
    """
    calls, release = site.folder / "calls", site.folder / "release"
    calls.touch()
    site.environ["PYTHONPATH"] = str(plugin)
    site.config["routes"] = {
        "waits": {
            "callback": "order-status",
            "handler": "sample-waits",
            "timeout": "10m",
            "settings": {"calls": str(calls), "until": str(release)},
        }
    }
    return calls, release


def test_a_running_delivery_is_finished_and_recorded_before_the_process_ends(site: Site, sample_plugin: Path) -> None:
    calls, release = add_waiting_route(site, sample_plugin)
    site.config["dispatcher"]["grace"] = "10m"
    service = site.start()
    site.notify(service, make_order("running"))
    wait_until(lambda: "deliver running" in calls.read_text())
    ready = f"{service.operations_address}/readyz"
    assert site.http.get(ready).status_code == 200

    service.terminate()
    wait_until(lambda: site.http.get(ready).status_code == 503)
    assert site.http.get(ready).json()["checks"]["not_stopping"] is False
    assert service.is_running
    release.touch()

    assert service.wait_for_exit() == 0
    delivery = site.delivery("running")
    assert (delivery["reason"], delivery["reference"], delivery["tries"]) == ("delivered", "waited-running", 1)
    assert calls.read_text().splitlines() == ["deliver running"]


def test_an_order_that_is_read_again_when_the_grace_ends_is_not_lost(site: Site, sample_plugin: Path) -> None:
    calls, release = add_waiting_route(site, sample_plugin)
    release.touch()
    site.config["dispatcher"]["grace"] = "0s"
    site.config["norce"]["timeout"] = "1m"
    site.norce.held.add("unread")
    service = site.start()
    site.notify(service, make_order("unread"))
    wait_until(lambda: "unread" in site.norce.reads)

    assert service.stop() == 0

    assert site.delivery("unread")["state"] == "waiting"
    assert calls.read_text() == ""


def test_sigterm_ends_an_idle_service_at_once(site: Site) -> None:
    site.config["dispatcher"]["grace"] = "10m"
    service = site.start(command=[COMMAND])

    assert service.stop() == 0
    events = [event["event"] for event in service.read_log()]
    assert events[-1] == "stopped"
    assert "stopping" in events
