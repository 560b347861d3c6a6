"""The destination fails us: it is down, it answers nothing, it does not know us. The work is kept, and done once."""

import pytest

from adapter.sandbox.jetshop_stand_in import Fault
from tests.flows.stage import Stage, free_port, order, until

pytestmark = pytest.mark.usefixtures("store_url")

WRONG = {"type": "basic", "username": "stories", "password": "${env:WRONG_PASSWORD}"}


def test_a_destination_that_is_down_for_a_while_gets_every_order_once(stage: Stage) -> None:
    port, names = free_port(), [f"order-{number}" for number in range(5)]
    stage.config["routes"]["export-payment"]["settings"]["base_url"] = f"http://127.0.0.1:{port}"
    stage.config["queues"] = {"first_pause": "200ms", "max_pause": "400ms"}
    service = stage.start()
    assert {stage.notify(service, order(name)) for name in names} == {200}
    until(lambda: stage.overview().paused)
    assert {stage.delivery(name)["code"] for name in names} == {"destination-unreachable"}
    assert stage.http.get(f"{service.operations_address}/readyz").status_code == 200  # the intake goes on

    with stage.shop.serving(port=port):
        assert {stage.ended(name)["reason"] for name in names} == {"delivered"}

    assert [stage.shop.methods(name) for name in names] == [["PUT"]] * 5
    assert stage.overview().paused == {}


def test_a_busy_destination_is_not_asked_again_before_it_says_so(stage: Stage) -> None:
    stage.shop.script("busy", Fault(status=429, retry_after="1"))
    service = stage.start()
    stage.notify(service, order("busy"))

    assert stage.ended("busy")["reason"] == "delivered"
    refused, taken = stage.shop.met("busy")
    assert taken.at - refused.at >= 1.0


def test_a_delivery_that_waits_for_its_next_attempt_gets_it_after_a_kill(stage: Stage) -> None:
    stage.shop.down = Fault(status=503)
    first = stage.start()
    assert stage.notify(first, order("patient")) == 200
    until(lambda: first.said("delivery_retried", order_id="patient"))
    first.kill()

    stage.shop.down = None
    stage.start()

    assert stage.ended("patient")["reason"] == "delivered"
    assert stage.shop.exports("patient") == stage.shop.taken("patient") == 1


def test_wrong_credentials_pause_the_queue_and_bury_nothing_until_they_are_mended(stage: Stage) -> None:
    export = stage.config["routes"]["export-payment"]
    export["concurrency"] = 1
    right, export["settings"]["auth"] = export["settings"]["auth"], WRONG
    names = ["early", "late", "later"]
    first = stage.start()
    stage.notify(first, order("early"))
    until(lambda: stage.overview().paused)
    for name in names[1:]:
        assert stage.notify(first, order(name)) == 200
    assert stage.overview().paused == {("export-payment", "fjallboden", "se-b2c"): "jetshop-unauthorized"}
    assert first.stop() == 0
    assert len(stage.shop.seen) == 1  # a paused queue asks nobody
    assert stage.deliveries(state="dead") == []
    assert [stage.delivery(name)["state"] for name in names] == ["waiting"] * 3

    export["settings"]["auth"] = right
    stage.start()

    assert [stage.ended(name)["reason"] for name in names] == ["delivered"] * 3
    assert [stage.shop.taken(name) for name in names] == [1, 1, 1]
    assert stage.overview().paused == {}


def test_one_merchants_wrong_credentials_do_not_touch_another(stage: Stage) -> None:
    stage.config["merchants"]["norce"]["routes"] = {"export-payment": {"settings": {"auth": WRONG}}}
    service = stage.start()
    stage.notify(service, order("theirs", merchant="norce", channel="1"))
    until(lambda: stage.overview().paused)

    stage.notify(service, order("ours"))

    assert stage.ended("ours")["reason"] == "delivered"
    assert stage.overview().paused == {("export-payment", "norce", "1"): "jetshop-unauthorized"}
    assert stage.delivery("theirs")["state"] == "waiting"
    assert stage.shop.exports("theirs") == 0
