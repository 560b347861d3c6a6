"""Handlers under a deadline, on the plugins' own event loops: what a caller hears, and when it really ended."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from adapter.norce.client import Account, Norce
from adapter.orders import Order, read_order
from adapter.outgoing import Outgoing
from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    NoSettings,
    Notification,
    NotificationHandler,
    Problem,
    Secret,
    Settings,
    Skip,
    Url,
    ValidationHandler,
)
from adapter.runner import Call, DeadlinePassed, Runner

NOON = datetime(2026, 2, 3, 12, 0, tzinfo=UTC)
AT_ONCE = timedelta(0)
SHORTLY = timedelta(milliseconds=50)
PATIENCE = 10
ORDER = read_order(b'{"id": "order-1"}')


class ShopSettings(Settings, frozen=True, kw_only=True):
    base_url: Url = Url("https://shop.example")


CALL = Call(
    route="export",
    settings=ShopSettings(),
    merchant="fjallboden",
    channel="1",
    order_id="order-1",
    identity="ab",
    deadline=NOON + timedelta(minutes=1),
    first_attempt_at=NOON,
)
NOTIFICATION = Notification(
    id=1,
    merchant="fjallboden",
    channel="1",
    callback="order-status",
    order=ORDER,
    received=ORDER,
    raw=ORDER.raw,
    received_at=NOON,
)


class Does(NotificationHandler[ShopSettings]):
    """Runs what it is given."""

    def __init__(self, deliver: Callable[[Context[ShopSettings]], Coroutine[Any, Any, Done]]) -> None:
        self._deliver = deliver

    async def deliver(self, notification: Notification, context: Context[ShopSettings]) -> Done | Skip:
        return await self._deliver(context)

    async def lookup(self, notification: Notification, context: Context[ShopSettings]) -> Done | None:
        return None


class Blocks:
    """A handler that holds its thread until it is told to let go."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()

    async def __call__(self, _context: Context[ShopSettings]) -> Done:
        self.entered.set()
        self.let_go.wait(PATIENCE)
        return Done("late")

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, PATIENCE)


class Approves(ValidationHandler[ShopSettings]):
    def __init__(self) -> None:
        self.threads: list[int] = []

    async def validate(self, order: Order, context: Context[ShopSettings]) -> list[Problem]:
        self.threads.append(threading.get_ident())
        return []


def norce() -> Norce:
    account = Account(base_url="https://norce.example/checkout", tokens=(Secret("token"),))
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"id": request.url.path.split("/")[-1]}))
    return Norce({"fjallboden": account}, adapter_id="test", timeout=timedelta(seconds=5), transport=transport)


@asynccontextmanager
async def running() -> AsyncIterator[Runner]:
    def outgoing() -> Outgoing:
        return Outgoing(httpx.MockTransport(lambda request: httpx.Response(200, text=request.url.host)))

    runner = Runner(make_norce=norce, make_outgoing=outgoing, clock=lambda: NOON)
    try:
        yield runner
    finally:
        await runner.stop(timedelta(seconds=PATIENCE))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def for_ever(_context: Context[ShopSettings]) -> Done:
    await asyncio.Event().wait()
    raise AssertionError


# --- results --------------------------------------------------------------------------------------------------------


def test_what_a_handler_returns_is_the_result() -> None:
    async def test() -> None:
        async def done(_context: Context[ShopSettings]) -> Done:
            return Done("shop-7")

        async with running() as runner:
            run = runner.deliver(Does(done), NOTIFICATION, CALL)

            assert await run.result(timedelta(seconds=PATIENCE)) == Done("shop-7")
            assert await run.ended() == Done("shop-7")
            assert await runner.lookup(Does(done), NOTIFICATION, CALL).ended() is None

    run(test)


def test_what_a_handler_raises_is_raised_to_the_caller() -> None:
    async def test() -> None:
        async def raises(_context: Context[ShopSettings]) -> Done:
            raise Misconfigured("wrong-shop-id")

        async with running() as runner:
            run = runner.deliver(Does(raises), NOTIFICATION, CALL)

            with pytest.raises(Misconfigured, match="wrong-shop-id"):
                await run.result(timedelta(seconds=PATIENCE))

    run(test)


def test_handlers_run_on_a_thread_of_their_own_one_for_deliveries_and_one_for_answers() -> None:
    async def test() -> None:
        threads = [threading.get_ident()]

        async def note(_context: Context[ShopSettings]) -> Done:
            threads.append(threading.get_ident())
            return Done()

        async with running() as runner:
            await runner.deliver(Does(note), NOTIFICATION, CALL).ended()
            validation = Approves()
            await runner.validate(validation, ORDER, CALL)

            assert len({*threads, *validation.threads}) == 3

    run(test)


@pytest.mark.parametrize("end", [SystemExit(1), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_a_handler_that_tries_to_end_the_process_fails_alone(end: BaseException) -> None:
    async def test() -> None:
        async def ends(_context: Context[ShopSettings]) -> Done:
            raise end

        async def done(_context: Context[ShopSettings]) -> Done:
            return Done()

        async with running() as runner:
            with pytest.raises(RuntimeError):
                await runner.deliver(Does(ends), NOTIFICATION, CALL).result(timedelta(seconds=PATIENCE))

            after = runner.deliver(Does(done), NOTIFICATION, CALL)
            assert await after.result(timedelta(seconds=PATIENCE)) == Done()

    run(test)


def test_a_handler_that_is_no_coroutine_fails_and_not_on_the_callers_thread() -> None:
    threads: list[int] = []

    class Synchronous(Approves):
        def validate(self, order: Order, context: Context[ShopSettings]) -> list[Problem]:  # type: ignore[override]
            threads.append(threading.get_ident())
            return []

    async def test() -> None:
        async with running() as runner:
            with pytest.raises(TypeError):
                await runner.validate(Synchronous(), ORDER, CALL)

            assert threads != [threading.get_ident()]

    run(test)


# --- deadlines ------------------------------------------------------------------------------------------------------


def test_a_caller_gives_up_at_the_deadline_although_the_handler_blocks_its_thread() -> None:
    async def test() -> None:
        blocks = Blocks()
        async with running() as runner:
            run = runner.deliver(Does(blocks), NOTIFICATION, CALL)
            await blocks.has_begun()

            with pytest.raises(DeadlinePassed):
                await run.result(SHORTLY)
            blocks.let_go.set()

    run(test)


def test_ended_waits_for_a_handler_that_is_late_and_tells_what_it_did() -> None:
    async def test() -> None:
        blocks = Blocks()
        async with running() as runner:
            run = runner.deliver(Does(blocks), NOTIFICATION, CALL)
            await blocks.has_begun()
            with pytest.raises(DeadlinePassed):
                await run.result(AT_ONCE)
            ended = asyncio.create_task(run.ended())
            await asyncio.sleep(0)
            assert not ended.done()

            blocks.let_go.set()

            assert await ended == Done("late")

    run(test)


def test_a_handler_that_awaits_is_cancelled_when_it_is_told() -> None:
    async def test() -> None:
        async with running() as runner:
            run = runner.deliver(Does(for_ever), NOTIFICATION, CALL)

            run.cancel()

            with pytest.raises(asyncio.CancelledError):
                await run.ended()

    run(test)


def test_a_handler_that_blocks_hears_of_its_cancellation_when_it_lets_go() -> None:
    async def test() -> None:
        blocks = Blocks()

        async def blocks_and_awaits(context: Context[ShopSettings]) -> Done:
            await blocks(context)
            await asyncio.Event().wait()
            raise AssertionError

        async with running() as runner:
            run = runner.deliver(Does(blocks_and_awaits), NOTIFICATION, CALL)
            await blocks.has_begun()
            run.cancel()
            with pytest.raises(DeadlinePassed):
                await run.result(AT_ONCE)

            blocks.let_go.set()

            with pytest.raises(asyncio.CancelledError):
                await run.ended()

    run(test)


def test_answers_go_out_while_a_delivery_blocks_its_loop() -> None:
    async def test() -> None:
        blocks = Blocks()
        async with running() as runner:
            delivery = runner.deliver(Does(blocks), NOTIFICATION, CALL)
            await blocks.has_begun()

            assert await asyncio.wait_for(runner.validate(Approves(), ORDER, CALL), PATIENCE) == []
            blocks.let_go.set()
            await delivery.ended()

    run(test)


def test_a_caller_that_stops_waiting_for_an_answer_cancels_the_handler() -> None:
    cancelled = threading.Event()

    class Hesitates(Approves):
        async def validate(self, order: Order, context: Context[ShopSettings]) -> list[Problem]:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return []

    async def test() -> None:
        async with running() as runner:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(runner.validate(Hesitates(), ORDER, CALL), SHORTLY.total_seconds())

            assert await asyncio.to_thread(cancelled.wait, PATIENCE)

    run(test)


# --- stopping -------------------------------------------------------------------------------------------------------


def test_stopping_returns_although_a_handler_blocks_its_thread() -> None:
    async def test() -> None:
        blocks = Blocks()
        runner = Runner(make_norce=norce, clock=lambda: NOON)
        delivery = runner.deliver(Does(blocks), NOTIFICATION, CALL)
        await blocks.has_begun()

        await asyncio.wait_for(runner.stop(SHORTLY), PATIENCE)

        assert not blocks.let_go.is_set()
        blocks.let_go.set()
        assert await delivery.ended() == Done("late")
        await runner._deliveries.stop(timedelta(seconds=PATIENCE))  # nothing is left behind for other tests

    run(test)


# --- the context ----------------------------------------------------------------------------------------------------


def test_a_handler_reaches_its_own_hosts_and_norce_through_its_context() -> None:
    async def test() -> None:
        seen: list[Any] = []

        async def looks_around(context: Context[ShopSettings]) -> Done:
            answer = await context.http.get(f"{context.settings.base_url}/orders")
            order = await context.orders.read("order-9")
            seen.extend([answer.text, order.id, context.clock(), context.route, context.identity])
            return Done()

        async with running() as runner:
            await runner.deliver(Does(looks_around), NOTIFICATION, CALL).ended()

            assert seen == ["shop.example", "order-9", NOON, "export", "ab"]

    run(test)


class Computes(Approves):
    computes = True


def test_a_handler_that_computes_runs_in_place() -> None:
    async def test() -> None:
        async with running() as runner:
            handler = Computes()
            await runner.validate(handler, ORDER, CALL)

            assert handler.threads == [threading.get_ident()]

    run(test)


async def _calls_out(context: Context[Any]) -> None:
    await context.http.get("https://shop.example/")


async def _reads_an_order(context: Context[Any]) -> None:
    await context.orders.read("order-1")


@pytest.mark.parametrize("calls", [_calls_out, _reads_an_order], ids=["http", "orders"])
def test_a_handler_that_computes_may_call_nobody(calls: Callable[[Context[Any]], Coroutine[Any, Any, None]]) -> None:
    class Calls(ValidationHandler[NoSettings]):
        computes = True

        async def validate(self, order: Order, context: Context[NoSettings]) -> list[Problem]:
            await calls(context)
            return []

    async def test() -> None:
        async with running() as runner:
            with pytest.raises(Misconfigured, match="computes-only"):
                await runner.validate(Calls(), ORDER, CALL)

    run(test)
