"""The same event again: one delivery, one export; and a dead one that is asked for again."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapter.sandbox.jetshop_stand_in import Fault
from tests.flows.stage import Neighbours, Service, Stage, enveloped, order, until

REFUSED = Fault(status=422, code="not-today")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, neighbours: Neighbours) -> Iterator[tuple[Stage, Service]]:
    """A running service for the stories that leave it as it is."""
    with Stage(tmp_path_factory.mktemp("repeats"), neighbours) as stage:
        yield stage, stage.start()


def test_one_event_in_five_forms_at_the_same_moment_is_exported_once(shared: tuple[Stage, Service]) -> None:
    stage, service = shared
    body = order("popular")
    forms = [
        json.dumps(body).encode(),
        json.dumps(body, indent=4, ensure_ascii=False).encode(),
        json.dumps(dict(reversed(body.items()))).encode(),
        json.dumps(enveloped(body, "n1")).encode(),
        json.dumps(enveloped(body, "n2")).encode(),
    ]
    together = threading.Barrier(len(forms))

    def send(form: bytes) -> int:
        together.wait()
        return stage.notify(service, body, form)

    with ThreadPoolExecutor(len(forms)) as pool:
        answers = list(pool.map(send, forms))

    assert answers == [200] * 5
    assert stage.ended("popular")["reason"] == "delivered"
    assert stage.shop.methods("popular") == ["PUT"]
    results = [each["result"] for each in service.said("callback_answered", order_id="popular")]
    assert sorted(results) == ["new", "repeat", "repeat", "repeat", "repeat"]


@pytest.mark.usefixtures("store_url")
def test_a_repeat_after_the_export_or_after_a_restart_does_nothing_more(stage: Stage) -> None:
    first = stage.start()
    stage.notify(first, order("done-already"))
    stage.ended("done-already")
    assert stage.notify(first, order("done-already")) == 200
    assert first.stop() == 0

    second = stage.start()
    assert stage.notify(second, order("done-already")) == 200
    assert stage.notify(second, order("the-next")) == 200
    stage.ended("the-next")

    assert stage.delivery("done-already")["tries"] == 1  # the one delivery that there is
    assert stage.shop.methods("done-already") == ["PUT"]


def test_a_newer_snapshot_of_an_unchanged_order_is_a_new_event_and_changes_nothing_at_the_shop(
    shared: tuple[Stage, Service],
) -> None:
    stage, service = shared
    stage.notify(service, order("touched", lastModified="2026-02-03T09:00:00Z"))
    stage.ended("touched")

    assert stage.notify(service, order("touched", lastModified="2026-02-03T09:00:01Z")) == 200
    until(lambda: not stage.deliveries("touched", state="waiting"))

    newest, oldest = stage.deliveries("touched")
    assert (newest["reason"], newest["code"], oldest["reason"]) == ("skipped", "nothing-changed", "delivered")
    assert stage.shop.methods("touched") == ["PUT"]


def test_a_repeat_retries_a_rejected_delivery(shared: tuple[Stage, Service]) -> None:
    stage, service = shared
    stage.shop.script("mended", REFUSED)
    stage.notify(service, order("mended"))
    assert stage.ended("mended")["reason"] == "rejected"

    assert stage.notify(service, order("mended")) == 200

    assert stage.ended("mended")["reason"] == "delivered"
    assert stage.shop.exports("mended") == 1


@pytest.mark.usefixtures("store_url")
def test_a_repeat_retries_at_most_once_an_hour_across_restarts(stage: Stage) -> None:
    service = stage.start()
    stage.shop.script("hopeless", *[REFUSED] * 9)
    stage.notify(service, order("hopeless"))
    stage.ended("hopeless")
    stage.notify(service, order("hopeless"))
    assert stage.ended("hopeless")["reason"] == "rejected"
    assert len(stage.shop.met("hopeless")) == 2

    assert stage.notify(service, order("hopeless")) == 200
    assert stage.delivery("hopeless")["state"] == "dead"  # a retry is in the transaction that the 200 stands for
    assert service.stop() == 0
    assert stage.notify(stage.start(), order("hopeless")) == 200

    assert stage.delivery("hopeless")["state"] == "dead"
    assert len(stage.shop.met("hopeless")) == 2
