"""`play` and `ask`: the course of a delivery or a verdict, with the rules of the service."""

import asyncio
import json
import socket
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler, Reject, Retry, Skip, Unknown
from adapter.testing import FakeNorce, NetworkFault, notification, order, play
from tests.testing.erp import SETTINGS, Export, ExportInTwoSteps, FakeErp

ORDER = order().id


def courses(played: Any) -> list[str]:
    """Return kind and outcome of every attempt."""
    return [f"{each.kind} {type(each.outcome).__name__}" for each in played.attempts]


def test_a_clean_delivery_has_one_attempt_and_one_effect() -> None:
    played = play(Export, notification(), FakeErp(), settings=SETTINGS)

    assert (played.reason, played.outcome, played.effects) == ("delivered", Done("N-1"), [f"orders {ORDER}"])
    assert [(each.request.method, each.request.url.path, each.status) for each in played.requests] == [
        ("POST", "/orders", 201)
    ]


COURSES = {
    NetworkFault.REFUSED: ["deliver Retry", "deliver Done"],
    NetworkFault.RESET_BEFORE: ["deliver Unknown", "lookup NoneType", "deliver Done"],
    NetworkFault.RESET_AFTER: ["deliver Unknown", "lookup Done"],
    NetworkFault.STATUS_500: ["deliver Unknown", "lookup Done"],
    NetworkFault.STATUS_502_BEFORE: ["deliver Unknown", "lookup NoneType", "deliver Done"],
    NetworkFault.STATUS_502_AFTER: ["deliver Unknown", "lookup Done"],
    NetworkFault.STATUS_503_BEFORE: ["deliver Unknown", "lookup NoneType", "deliver Done"],
    NetworkFault.STATUS_503_AFTER: ["deliver Unknown", "lookup Done"],
    NetworkFault.STATUS_401: ["deliver Misconfigured", "deliver Done"],
    NetworkFault.STATUS_422: ["deliver Reject"],
    NetworkFault.STATUS_429: ["deliver Retry", "deliver Done"],
    NetworkFault.HTML_WITH_200: ["deliver Unknown", "lookup NoneType", "deliver Done"],
    NetworkFault.SLOW: ["deliver Unknown", "lookup Done"],
    NetworkFault.KILLED_AFTER: ["lookup Done"],
}


@pytest.mark.parametrize("fault", NetworkFault)
def test_each_fault_takes_the_course_that_the_service_takes(fault: NetworkFault) -> None:
    played = play(Export, notification(), FakeErp(), settings=SETTINGS, faults=[fault])

    assert courses(played) == COURSES[fault]
    assert len(played.effects) == (0 if fault is NetworkFault.STATUS_422 else 1)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (NetworkFault.REFUSED, 5),
        (NetworkFault.STATUS_429, 120),
        (NetworkFault.SLOW, 20 + 30 + 5),
        (NetworkFault.KILLED_AFTER, 20 + 30 + 5),
    ],
    ids=lambda each: getattr(each, "name", None),
)
def test_the_next_request_waits_for_the_schedule_the_destination_or_the_end_of_doubt(
    fault: NetworkFault, seconds: int
) -> None:
    first, second = play(Export, notification(), FakeErp(), settings=SETTINGS, faults=[fault]).requests

    assert second.at - first.at == pytest.approx(seconds, abs=0.1)


def test_a_status_that_never_follows_an_effect_is_not_sent_after_one() -> None:
    class Declares(Export):
        not_done = frozenset({503})

    played = play(Declares, notification(), FakeErp(), settings=SETTINGS, faults=[NetworkFault.STATUS_503_AFTER])

    assert courses(played) == ["deliver Retry", "deliver Done"]
    assert len(played.effects) == 1


def test_a_system_that_stays_down_exhausts_the_schedule() -> None:
    schedule = [timedelta(hours=10)] * 5
    faults = [NetworkFault.REFUSED] * 9

    played = play(Export, notification(), FakeErp(), settings=SETTINGS, faults=faults, schedule=schedule)

    assert (played.reason, len(played.attempts), played.effects) == ("exhausted", 6, [])


def test_a_handler_without_lookup_becomes_a_dead_letter_in_doubt() -> None:
    class Sends(NotificationHandler[NoSettings]):
        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            raise Unknown("gone")

    played = play(Sends)

    assert (played.reason, type(played.outcome)) == ("unknown", Unknown)


def test_a_killed_process_forgets_what_the_handler_kept_and_runs_no_cleanup() -> None:
    ends: list[str] = []

    class Keeps(Export):
        def __init__(self) -> None:
            self.calls = 0

        async def deliver(self, notification: Notification, context: Context[Any]) -> Done | Skip:
            self.calls += 1
            try:
                return await super().deliver(notification, context)
            finally:
                ends.append(f"after {len(erp.effects)}")

        async def lookup(self, notification: Notification, context: Context[Any]) -> Done | None:
            ends.append(f"lookup after {self.calls} calls")
            return await super().lookup(notification, context)

    erp = FakeErp()

    play(Keeps, notification(), erp, settings=SETTINGS, faults=[NetworkFault.KILLED_AFTER])

    assert ends == ["lookup after 0 calls", "after 1"]


def test_two_steps_go_on_where_they_were_interrupted() -> None:
    faults = {2: NetworkFault.KILLED_AFTER}

    played = play(ExportInTwoSteps, notification(), FakeErp(), settings=SETTINGS, faults=faults)

    assert played.effects == [f"orders {ORDER}", f"invoices {ORDER}"]
    assert (played.reason, courses(played)) == ("delivered", ["lookup Done"])


def test_a_handler_that_goes_on_after_its_deadline_never_ends() -> None:
    class GoesOn(NotificationHandler[NoSettings]):
        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            while True:
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError:
                    continue

    assert play(GoesOn).reason == "running"


def test_a_blocking_client_in_a_thread_takes_real_time() -> None:
    class InAThread(NotificationHandler[NoSettings]):
        other_clients = True

        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            return Done(await asyncio.to_thread(lambda: "from a thread"))

    assert play(InAThread).outcome == Done("from a thread")


def test_a_thread_of_the_route_is_waited_for_past_the_deadline_and_may_connect() -> None:
    class Blocks(NotificationHandler[NoSettings]):
        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            return Done(await context.thread(connect))

    def connect() -> str:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            return "connected"

    played = play(Blocks)

    assert (played.outcome, played.connections, played.blocking) == (Done("connected"), [], [])


def test_the_fake_system_may_be_an_application() -> None:
    async def create(request: Request) -> JSONResponse:
        return JSONResponse({"number": (await request.json())["reference"]}, 201)

    app = Starlette(routes=[Route("/orders", create, methods=["POST"])])

    played = play(Export, notification(), app, settings=SETTINGS)

    assert (played.outcome, played.effects) == (Done("100245"), ["POST /orders"])


def test_a_mistake_of_the_fake_system_is_raised() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise AssertionError("an unexpected request")

    with pytest.raises(AssertionError, match="an unexpected request"):
        play(Export, notification(), broken, settings=SETTINGS)


def test_a_handler_reads_and_changes_the_order_at_norce() -> None:
    class Writes(NotificationHandler[NoSettings]):
        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            before = await context.orders.read(notification.order.id)
            await context.orders.set_reference(before.id, "R-1")
            payment = {"adapterId": "erp", "name": "Invoice", "amount": 1.0}
            await context.orders.call("add_payment", before.id, payment)
            return Done((await context.orders.read(before.id)).reference)

    norce = FakeNorce(order())

    played = play(Writes, norce=norce)

    assert played.outcome == Done("R-1")
    assert norce.order(ORDER)["reference"] == "R-1"
    assert [each.partition("/orders/")[2] for each in played.effects] == [f"{ORDER}/payments"]


def test_the_log_is_as_it_leaves_the_process() -> None:
    class Logs(NotificationHandler[NoSettings]):
        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            context.log.info("order_seen", status="completed", name=notification.order.customer.billing.given_name)
            raise Reject("no")

    (line,) = play(Logs).log

    assert (line["event"], line["status"], line["name"]) == ("order_seen", "completed", "[redacted]")


def test_a_bug_is_shown_with_its_exception() -> None:
    class Breaks(NotificationHandler[NoSettings]):
        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            raise KeyError("currency")

    played = play(Breaks)

    assert played.reason == "broken"
    assert [repr(each) for each in played.errors] == ["KeyError('currency')"]


def test_resends_and_the_previous_result_reach_the_handler() -> None:
    seen: list[Any] = []

    class Sees(NotificationHandler[NoSettings]):
        async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
            seen.append((context.is_resend, context.attempt, context.key()))
            if context.attempt == 1:
                raise Retry("later")
            return Skip("nothing-changed")

    played = play(Sees, is_resend=True)

    assert (played.reason, played.outcome) == ("skipped", Skip("nothing-changed"))
    assert [each[:2] for each in seen] == [(True, 1), (True, 2)]
    assert seen[0][2] == seen[1][2]
    assert json.dumps(play(Sees).log) == "[]"
