"""A shop goes live: its route is a shadow first, then in force, then a shadow again."""

import json

import pytest

from tests.flows.site import Site, make_order, wait_until

pytestmark = pytest.mark.usefixtures("store_url")


def set_mode(site: Site, mode: str) -> None:
    site.config["routes"]["export-payment"]["mode"] = mode


def test_a_shadow_sends_nothing_and_reads_nothing_and_the_next_event_is_sent_once_it_is_in_force(site: Site) -> None:
    set_mode(site, "shadow")
    service = site.start()

    assert site.notify(service, make_order("tried")) == 200
    assert site.notify(service, make_order("open", state={"currentStatus": "accepted"})) == 200

    tried = site.delivery("tried")
    assert (tried["state"], tried["reason"], tried["attempts"]) == ("done", "shadow", [])
    assert site.deliveries("open") == []  # not wanted
    listed = json.loads(site.run_command("queues", "list", "--output", "json").stdout)
    assert {row["state"] for row in listed} == {"shadow"}
    text = site.http.get(f"{service.operations_address}/metrics").text
    assert 'norce_adapter_deliveries_shadow_total{route="export-payment"} 1.0' in text
    assert service.stop() == 0

    set_mode(site, "enforce")
    service = site.start()
    assert site.notify(service, make_order("tried", lastModified="2026-02-03T10:00:00Z")) == 200
    wait_until(lambda: site.deliveries("tried")[0]["reason"] == "delivered")

    assert [each["reason"] for each in site.deliveries("tried")] == ["delivered", "shadow"]
    assert site.shop.methods("tried") == ["PUT"]
    assert "open" not in site.norce.reads


def test_what_waits_when_a_route_becomes_a_shadow_is_sent_when_it_is_in_force_again(site: Site) -> None:
    site.config["operations"]["socket"] = "operations.sock"
    held = site.start("--hold")
    assert site.notify(held, make_order("owed")) == 200
    assert held.stop() == 0

    set_mode(site, "shadow")
    service = site.start()
    assert site.notify(service, make_order("owed", lastModified="2026-02-03T10:00:00Z")) == 200
    assert site.notify(service, make_order("other")) == 200
    assert [each["reason"] for each in site.deliveries("owed")] == ["shadow", None]
    assert service.stop() == 0
    assert site.shop.received == []

    set_mode(site, "enforce")
    site.start()
    wait_until(lambda: not site.deliveries(state="waiting"))
    assert [each["reason"] for each in site.deliveries("owed")] == ["shadow", "delivered"]
    assert site.shop.methods("owed") == ["PUT"]
    assert site.shop.methods("other") == []


def test_a_shop_goes_live_without_sending_and_a_backfill_then_sends_every_order_once(site: Site) -> None:
    site.config["operations"]["socket"] = "operations.sock"
    set_mode(site, "shadow")
    service = site.start()
    for name in ("first", "second", "third"):
        assert site.notify(service, make_order(name)) == 200
    assert site.notify(service, make_order("second", lastModified="2026-02-03T10:00:00Z")) == 200
    assert site.notify(service, make_order("open", state={"currentStatus": "accepted"})) == 200
    too_early = site.run_command("deliveries", "backfill", "export-payment", "--why", "live")
    assert too_early.returncode != 0
    assert "shadow" in too_early.stderr
    assert service.stop() == 0
    assert site.shop.received == []

    set_mode(site, "enforce")
    service = site.start()
    assert site.notify(service, make_order("third", lastModified="2026-02-03T11:00:00Z")) == 200
    wait_until(lambda: site.deliveries("third")[0]["reason"] == "delivered")
    for _ in range(2):
        site.run_command("deliveries", "backfill", "export-payment", "--why", "live")
    wait_until(lambda: not site.deliveries(state="waiting"))

    reasons = {name: [each["reason"] for each in site.deliveries(name)] for name in ("first", "second", "third")}
    assert reasons == {
        "first": ["delivered", "shadow"],
        "second": ["delivered", "shadow", "shadow"],
        "third": ["delivered", "shadow"],
    }
    assert [site.shop.methods(name) for name in ("first", "second", "third", "open")] == [["PUT"]] * 3 + [[]]
