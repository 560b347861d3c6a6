"""Repeats of an event: one delivery, one export, and a retry of a dead letter."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapter.sandbox.jetshop_stand_in import Fault
from tests.flows.site import ExternalServices, Service, Site, in_envelope, make_order, wait_until

REFUSED = Fault(status=422, code="not-today")


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, external_services: ExternalServices
) -> Iterator[tuple[Site, Service]]:
    """A running service for the tests that do not change it."""
    with Site(tmp_path_factory.mktemp("repeats"), external_services) as site:
        yield site, site.start()


def test_one_event_in_five_forms_at_the_same_moment_is_exported_once(shared: tuple[Site, Service]) -> None:
    site, service = shared
    body = make_order("popular")
    forms = [
        json.dumps(body).encode(),
        json.dumps(body, indent=4, ensure_ascii=False).encode(),
        json.dumps(dict(reversed(body.items()))).encode(),
        json.dumps(in_envelope(body, "n1")).encode(),
        json.dumps(in_envelope(body, "n2")).encode(),
    ]
    barrier = threading.Barrier(len(forms))

    def send(form: bytes) -> int:
        barrier.wait()
        return site.notify(service, body, form)

    with ThreadPoolExecutor(len(forms)) as pool:
        answers = list(pool.map(send, forms))

    assert answers == [200] * 5
    assert site.wait_for_end("popular")["reason"] == "delivered"
    assert site.shop.methods("popular") == ["PUT"]
    results = [each["result"] for each in service.logged("callback_answered", order_id="popular")]
    assert sorted(results) == ["new", "repeat", "repeat", "repeat", "repeat"]


@pytest.mark.usefixtures("store_url")
def test_a_repeat_after_the_export_or_after_a_restart_does_nothing_more(site: Site) -> None:
    first = site.start()
    site.notify(first, make_order("done-already"))
    site.wait_for_end("done-already")
    assert site.notify(first, make_order("done-already")) == 200
    assert first.stop() == 0

    second = site.start()
    assert site.notify(second, make_order("done-already")) == 200
    assert site.notify(second, make_order("the-next")) == 200
    site.wait_for_end("the-next")

    assert site.delivery("done-already")["tries"] == 1  # the only delivery
    assert site.shop.methods("done-already") == ["PUT"]


def test_a_newer_snapshot_of_an_unchanged_order_is_a_new_event_and_changes_nothing_at_the_shop(
    shared: tuple[Site, Service],
) -> None:
    site, service = shared
    site.notify(service, make_order("touched", lastModified="2026-02-03T09:00:00Z"))
    site.wait_for_end("touched")

    assert site.notify(service, make_order("touched", lastModified="2026-02-03T09:00:01Z")) == 200
    wait_until(lambda: not site.deliveries("touched", state="waiting"))

    newest, oldest = site.deliveries("touched")
    assert (newest["reason"], newest["code"], oldest["reason"]) == ("skipped", "nothing-changed", "delivered")
    assert site.shop.methods("touched") == ["PUT"]


def test_a_repeat_retries_a_rejected_delivery(shared: tuple[Site, Service]) -> None:
    site, service = shared
    site.shop.script("mended", REFUSED)
    site.notify(service, make_order("mended"))
    assert site.wait_for_end("mended")["reason"] == "rejected"

    assert site.notify(service, make_order("mended")) == 200

    assert site.wait_for_end("mended")["reason"] == "delivered"
    assert site.shop.exports("mended") == 1


@pytest.mark.usefixtures("store_url")
def test_a_repeat_retries_at_most_once_an_hour_across_restarts(site: Site) -> None:
    service = site.start()
    site.shop.script("hopeless", *[REFUSED] * 9)
    site.notify(service, make_order("hopeless"))
    site.wait_for_end("hopeless")
    site.notify(service, make_order("hopeless"))
    assert site.wait_for_end("hopeless")["reason"] == "rejected"
    assert len(site.shop.requests_for("hopeless")) == 2

    assert site.notify(service, make_order("hopeless")) == 200
    assert site.delivery("hopeless")["state"] == "dead"  # a retry is in the transaction that the 200 stands for
    assert service.stop() == 0
    assert site.notify(site.start(), make_order("hopeless")) == 200

    assert site.delivery("hopeless")["state"] == "dead"
    assert len(site.shop.requests_for("hopeless")) == 2
