"""A destination that is down, busy or rejects the credentials: the work is kept and done once."""

import pytest

from adapter.sandbox.jetshop_stand_in import Fault
from tests.flows.site import Site, free_port, make_order, wait_until
from tests.simulators import in_thread

pytestmark = pytest.mark.usefixtures("store_url")

WRONG = {"type": "basic", "username": "flows", "password": "${env:WRONG_PASSWORD}"}


LONG_PAUSE = {"pause_after": 2, "first_pause": "1h", "max_pause": "1h"}


def test_a_destination_that_is_down_for_a_while_gets_every_order_once(site: Site) -> None:
    port, names = free_port(), [f"order-{number}" for number in range(5)]
    site.config["routes"]["export-payment"]["settings"]["base_url"] = f"http://127.0.0.1:{port}"
    site.config["queues"] = {"first_pause": "200ms", "max_pause": "400ms"}
    service = site.start()
    assert {site.notify(service, make_order(name)) for name in names} == {200}
    wait_until(lambda: site.overview().paused)
    assert {site.delivery(name)["code"] for name in names} == {"destination-unreachable"}
    assert site.http.get(f"{service.operations_address}/readyz").status_code == 200  # notifications are still accepted

    with in_thread(site.shop.serve(port)):
        assert {site.wait_for_end(name)["reason"] for name in names} == {"delivered"}

    assert [site.shop.methods(name) for name in names] == [["PUT"]] * 5
    assert site.overview().paused == {}


def test_a_busy_destination_gets_no_request_before_the_time_it_named(site: Site) -> None:
    site.shop.script("busy", Fault(status=429, retry_after="1"))
    service = site.start()
    site.notify(service, make_order("busy"))

    assert site.wait_for_end("busy")["reason"] == "delivered"
    refused, taken = site.shop.requests_for("busy")
    assert taken.at - refused.at >= 1.0


def test_a_delivery_that_waits_for_a_retry_is_retried_after_a_kill(site: Site) -> None:
    site.shop.down = Fault(status=429)
    first = site.start()
    assert site.notify(first, make_order("patient")) == 200
    wait_until(lambda: first.logged("delivery_retried", order_id="patient"))
    first.kill()

    site.shop.down = None
    site.start()

    assert site.wait_for_end("patient")["reason"] == "delivered"
    assert site.shop.exports("patient") == site.shop.count_puts("patient") == 1


def test_a_lane_that_a_dead_letter_stopped_goes_on_once_its_route_reads_the_order_again(site: Site) -> None:
    export = site.config["routes"]["export-payment"]
    export["refetch"] = False
    site.shop.script("stopped", Fault(status=422))
    first = site.start()
    site.notify(first, make_order("stopped", lastModified="2026-02-03T09:00:00Z"))
    assert site.wait_for_end("stopped")["reason"] == "rejected"
    site.notify(first, make_order("stopped", lastModified="2026-02-03T09:00:01Z"))
    assert first.stop() == 0
    assert {each["state"] for each in site.deliveries("stopped")} == {"dead", "waiting"}

    del export["refetch"]
    site.start()

    wait_until(lambda: not site.deliveries("stopped", state="waiting"), what="the second delivery")
    assert {each["reason"] for each in site.deliveries("stopped")} == {"rejected", "delivered"}
    assert site.shop.exports("stopped") == 1


def test_wrong_credentials_pause_the_queue_and_keep_its_deliveries_until_they_are_corrected(site: Site) -> None:
    export = site.config["routes"]["export-payment"]
    export["concurrency"] = 1
    right, export["settings"]["auth"] = export["settings"]["auth"], WRONG
    site.config["queues"] = LONG_PAUSE
    names = ["early", "second", "late", "later"]
    first = site.start()
    for name in names[:2]:
        site.notify(first, make_order(name))
    wait_until(lambda: site.overview().paused)
    sent = len(site.shop.received)
    for name in names[2:]:
        assert site.notify(first, make_order(name)) == 200
    assert site.overview().paused == {("export-payment", "fjallboden", "se-b2c"): "jetshop-unauthorized"}
    assert first.stop() == 0
    assert len(site.shop.received) == sent  # a paused queue sends nothing
    assert site.deliveries(state="dead") == []
    assert [site.delivery(name)["state"] for name in names] == ["waiting"] * 4

    export["settings"]["auth"] = right
    site.start()

    assert [site.wait_for_end(name)["reason"] for name in names] == ["delivered"] * 4
    assert [site.shop.count_puts(name) for name in names] == [1, 1, 1, 1]
    assert site.overview().paused == {}


def test_wrong_credentials_of_one_merchant_do_not_affect_another(site: Site) -> None:
    site.config["merchants"]["norce"]["routes"] = {"export-payment": {"settings": {"auth": WRONG}}}
    site.config["queues"] = LONG_PAUSE
    service = site.start()
    for name in ("theirs", "theirs-too"):
        site.notify(service, make_order(name, merchant="norce", channel="1"))
    wait_until(lambda: site.overview().paused)

    site.notify(service, make_order("ours"))

    assert site.wait_for_end("ours")["reason"] == "delivered"
    assert site.overview().paused == {("export-payment", "norce", "1"): "jetshop-unauthorized"}
    assert site.delivery("theirs")["state"] == "waiting"
    assert site.shop.exports("theirs") == 0
