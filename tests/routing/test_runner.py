"""`adapter.routing.runner`: handlers under a deadline, on the plugins' own event loops."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from adapter.identifiers import Channel
from adapter.norce.client import Account, Norce
from adapter.outgoing import Outgoing
from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    Secret,
    Settings,
    Url,
)
from adapter.routing.runner import DeadlinePassed, HandlerWaits, LoopAbandoned, LoopName, Run, Runner
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import Blocks, wait_forever

NOON = datetime(2026, 2, 3, 12, 0, tzinfo=UTC)
AT_ONCE = timedelta(0)
SHORTLY = timedelta(milliseconds=200)
HELD = timedelta(seconds=1)  # how long a handler may block a watched loop past its deadline
OFTEN = timedelta(milliseconds=10)


class ShopSettings(Settings, frozen=True, kw_only=True):
    base_url: Url = Url("https://shop.example")


Handler = Callable[[Context[ShopSettings]], Coroutine[Any, Any, Any]]


def context(runner: Runner, on: LoopName | None, deadline: timedelta = timedelta(minutes=1)) -> Context[Any]:
    return runner.context(
        on,
        route="export",
        settings=ShopSettings(),
        channel=Channel("fjallboden", "1"),
        order_id="order-1",
        identity="ab",
        deadline=NOON + deadline,
        first_attempt_at=NOON,
    )


def deliver(runner: Runner, handler: Handler, deadline: timedelta = timedelta(minutes=1)) -> Run[Any]:
    return runner.start("deliveries", handler, context(runner, "deliveries", deadline))


def answer(runner: Runner, handler: Handler, deadline: timedelta = timedelta(minutes=1)) -> Run[Any]:
    return runner.start("answers", handler, context(runner, "answers", deadline))


async def compute(runner: Runner, handler: Handler) -> Any:
    return (await runner.compute(handler, context(runner, None)))()


def norce() -> Norce:
    account = Account(base_url="https://norce.example/checkout", tokens=(Secret("token"),))
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"id": request.url.path.split("/")[-1]}))
    return Norce({"fjallboden": account}, adapter_id="test", timeout=timedelta(seconds=60), transport=transport)


@asynccontextmanager
async def running() -> AsyncIterator[Runner]:
    def outgoing() -> Outgoing:
        return Outgoing(httpx.MockTransport(lambda request: httpx.Response(200, text=request.url.host)))

    runner = Runner(make_norce=norce, make_outgoing=outgoing, clock=lambda: NOON)
    try:
        yield runner
    finally:
        await runner.stop(timedelta(seconds=PATIENCE))


@dataclass
class Watched:
    """A runner whose loops are watched. `replaced` are the loops, and the routes that blocked them."""

    runner: Runner
    replaced: "asyncio.Queue[tuple[str, str]]"
    thread: threading.Thread  # the first of the deliveries' threads

    async def has_replaced(self) -> tuple[str, str]:
        return await asyncio.wait_for(self.replaced.get(), PATIENCE)

    async def has_ended(self) -> None:
        """Wait until the first thread and everything on its loop have ended."""
        await asyncio.to_thread(self.thread.join, PATIENCE)
        assert not self.thread.is_alive()


@asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    runner = Runner(make_norce=norce, clock=lambda: NOON, patience=HELD, replaced=lambda *which: told.put_nowait(which))
    watching = asyncio.create_task(runner.watch(OFTEN))
    try:
        yield Watched(runner, told, runner._loops["deliveries"]._thread)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await runner.stop(timedelta(seconds=PATIENCE))


async def done(_context: Context[ShopSettings]) -> Done:
    return Done(str(threading.get_ident()))


# --- results --------------------------------------------------------------------------------------------------------


@asynchronous
async def test_the_result_is_the_value_that_the_handler_returns() -> None:
    async def done(_context: Context[ShopSettings]) -> Done:
        return Done("shop-7")

    async with running() as runner:
        run = deliver(runner, done)

        assert await run.wait(timedelta(seconds=PATIENCE)) == Done("shop-7")
        assert await run.wait() == Done("shop-7")


@asynchronous
async def test_an_exception_of_the_handler_is_raised_to_the_caller() -> None:
    async def raises(_context: Context[ShopSettings]) -> Done:
        raise Misconfigured("wrong-shop-id")

    async with running() as runner:
        run = deliver(runner, raises)

        with pytest.raises(Misconfigured, match="wrong-shop-id"):
            await run.wait(timedelta(seconds=PATIENCE))


@asynchronous
async def test_deliveries_and_answers_run_on_threads_of_their_own() -> None:
    threads = [threading.get_ident()]

    async def note(_context: Context[ShopSettings]) -> Done:
        threads.append(threading.get_ident())
        return Done()

    async with running() as runner:
        await deliver(runner, note).wait()
        await answer(runner, note).wait()

        assert len(set(threads)) == 3


@pytest.mark.parametrize("end", [SystemExit(1), KeyboardInterrupt()], ids=["exit", "interrupt"])
@asynchronous
async def test_a_handler_that_tries_to_end_the_process_fails_alone(end: BaseException) -> None:
    async def ends(_context: Context[ShopSettings]) -> Done:
        raise end

    async def done(_context: Context[ShopSettings]) -> Done:
        return Done()

    async with running() as runner:
        with pytest.raises(RuntimeError):
            await deliver(runner, ends).wait(timedelta(seconds=PATIENCE))

        after = deliver(runner, done)
        assert await after.wait(timedelta(seconds=PATIENCE)) == Done()


@asynchronous
async def test_a_handler_that_is_no_coroutine_fails_on_its_own_thread() -> None:
    threads: list[int] = []

    def synchronous(_context: Context[ShopSettings]) -> Any:
        threads.append(threading.get_ident())
        return Done()

    async with running() as runner:
        with pytest.raises(TypeError):
            await answer(runner, synchronous).wait()

        assert threads != [threading.get_ident()]


# --- deadlines ------------------------------------------------------------------------------------------------------


@asynchronous
async def test_waiting_ends_at_the_deadline_although_the_handler_blocks() -> None:
    blocks = Blocks()
    async with running() as runner:
        run = deliver(runner, blocks)
        await blocks.has_begun()

        with pytest.raises(DeadlinePassed):
            await run.wait(SHORTLY)
        blocks.go_on.set()


@asynchronous
async def test_waiting_without_a_deadline_returns_a_late_result() -> None:
    blocks = Blocks()
    async with running() as runner:
        run = deliver(runner, blocks)
        await blocks.has_begun()
        with pytest.raises(DeadlinePassed):
            await run.wait(AT_ONCE)
        ended = asyncio.create_task(run.wait())
        await asyncio.sleep(0)
        assert not ended.done()

        blocks.go_on.set()

        assert await ended == Done("late")


@asynchronous
async def test_a_handler_is_cancelled_at_its_await() -> None:
    async with running() as runner:
        run = deliver(runner, wait_forever)

        run.cancel()

        with pytest.raises(asyncio.CancelledError):
            await run.wait()


@asynchronous
async def test_a_handler_that_blocks_is_cancelled_at_its_next_await() -> None:
    blocks = Blocks()

    async def blocks_and_awaits(context: Context[ShopSettings]) -> Done:
        await blocks(context)
        await asyncio.Event().wait()
        raise AssertionError

    async with running() as runner:
        run = deliver(runner, blocks_and_awaits)
        await blocks.has_begun()
        run.cancel()
        with pytest.raises(DeadlinePassed):
            await run.wait(AT_ONCE)

        blocks.go_on.set()

        with pytest.raises(asyncio.CancelledError):
            await run.wait()


@asynchronous
async def test_answers_run_while_a_delivery_blocks_its_loop() -> None:
    blocks = Blocks()
    async with running() as runner:
        delivery = deliver(runner, blocks)
        await blocks.has_begun()

        await asyncio.wait_for(answer(runner, done).wait(), PATIENCE)
        blocks.go_on.set()
        await delivery.wait()


# --- a loop that is blocked past a deadline -------------------------------------------------------------------------


@asynchronous
async def test_a_blocked_loop_is_replaced() -> None:
    blocks = Blocks()
    async with watched() as watch:
        with capture_logs() as logged:
            held = deliver(watch.runner, blocks, SHORTLY)

            assert await watch.has_replaced() == ("plugins-deliveries", "export")
        told = {"loop": "plugins-deliveries", "route": "export"}
        assert logged == [{"event": "plugins_loop_replaced", "log_level": "error", **told}]
        with pytest.raises(LoopAbandoned) as abandoned:
            await held.wait()
        assert abandoned.value.blocked_by is held
        after = await deliver(watch.runner, done).wait()
        assert after.reference not in ("", str(watch.thread.ident))
        assert watch.thread.is_alive()

        blocks.go_on.set()
        await watch.has_ended()
        assert watch.replaced.empty()


@asynchronous
async def test_a_run_has_stopped_only_when_its_thread_goes_on() -> None:
    blocks = Blocks()
    async with watched() as watch:
        held = deliver(watch.runner, blocks, SHORTLY)
        await watch.has_replaced()
        over = asyncio.create_task(held.stopped.wait())
        await asyncio.wait((over,), timeout=SHORTLY.total_seconds())
        assert not over.done()

        blocks.go_on.set()

        await asyncio.wait_for(over, PATIENCE)
        await watch.has_ended()


class Neighbour:
    """A handler on the loop that another one blocks. It waits, and would then have an effect."""

    def __init__(self, wait: Callable[[asyncio.Event], Coroutine[Any, Any, Any]]) -> None:
        self._wait = wait
        self.go_on = asyncio.Event()
        self.began = threading.Event()
        self.effects: list[str] = []

    async def __call__(self, _context: Context[ShopSettings]) -> Done:
        try:
            self.began.set()
            await self._wait(self.go_on)
            self.effects.append("sent")
        except asyncio.CancelledError:
            self.effects.append("cancelled")
            raise
        return Done()


async def _woken_by_the_one_that_blocks(go_on: asyncio.Event) -> None:
    await go_on.wait()


async def _woken_at_every_turn(go_on: asyncio.Event) -> None:
    while not go_on.is_set():  # noqa: ASYNC110 - it must be ready at any moment
        await asyncio.sleep(0)


async def _a_timer_that_passes(go_on: asyncio.Event) -> None:
    await go_on.wait()
    await asyncio.sleep(0.001)


async def _a_thread_that_ends(go_on: asyncio.Event) -> None:
    await asyncio.to_thread(lambda: None)
    await asyncio.gather(go_on.wait(), asyncio.to_thread(lambda: None))


@pytest.mark.parametrize(
    "wait", [_woken_by_the_one_that_blocks, _woken_at_every_turn, _a_timer_that_passes, _a_thread_that_ends]
)
@asynchronous
async def test_other_handlers_on_an_abandoned_loop_are_cancelled_before_their_next_step(
    wait: Callable[[asyncio.Event], Coroutine[Any, Any, Any]],
) -> None:
    blocks, neighbour = Blocks(), Neighbour(wait)

    async def wakes_it_and_blocks(context: Context[ShopSettings]) -> Done:
        neighbour.go_on.set()  # ready from now on; it runs when this handler ends
        return await blocks(context)

    async with watched() as watch:
        beside = deliver(watch.runner, neighbour)
        assert await asyncio.to_thread(neighbour.began.wait, PATIENCE)
        held = deliver(watch.runner, wakes_it_and_blocks, SHORTLY)
        await watch.has_replaced()

        with pytest.raises(LoopAbandoned) as abandoned:
            await beside.wait()
        assert (abandoned.value.blocked_by, abandoned.value.begun) == (held, True)
        assert neighbour.effects == []
        blocks.go_on.set()
        await watch.has_ended()
        assert neighbour.effects == ["cancelled"]


@asynchronous
async def test_a_handler_that_had_not_begun_on_an_abandoned_loop_never_does() -> None:
    blocks, neighbour = Blocks(), Neighbour(_woken_at_every_turn)
    async with watched() as watch:
        deliver(watch.runner, blocks, SHORTLY)
        await blocks.has_begun()
        waits = deliver(watch.runner, neighbour)
        await watch.has_replaced()

        with pytest.raises(LoopAbandoned) as abandoned:
            await waits.wait()
        assert not abandoned.value.begun
        blocks.go_on.set()
        await watch.has_ended()
        assert not neighbour.began.is_set()


@asynchronous
async def test_an_abandoned_handler_is_cancelled_at_its_next_await() -> None:
    blocks, effects = Blocks(), []

    async def blocks_and_sends(context: Context[ShopSettings]) -> Done:
        await blocks(context)
        await asyncio.sleep(0)
        effects.append("sent")
        return Done()

    async with watched() as watch:
        deliver(watch.runner, blocks_and_sends, SHORTLY)
        await watch.has_replaced()

        blocks.go_on.set()
        await watch.has_ended()

        assert effects == []


@asynchronous
async def test_a_task_of_a_plugin_that_blocks_its_loop_is_detected() -> None:
    blocks = Blocks()

    async def leaves_a_task(context: Context[ShopSettings]) -> Done:
        await asyncio.create_task(blocks(context))
        return Done()

    async with watched() as watch:
        held = deliver(watch.runner, leaves_a_task, SHORTLY)

        assert await watch.has_replaced() == ("plugins-deliveries", "unknown")
        with pytest.raises(LoopAbandoned) as abandoned:
            await held.wait()
        assert abandoned.value.blocked_by is None
        blocks.go_on.set()
        await watch.has_ended()


@asynchronous
async def test_an_answer_that_blocks_its_loop_does_not_stop_deliveries() -> None:
    blocks = Blocks()
    async with watched() as watch:
        thread = watch.runner._loops["answers"]._thread
        with pytest.raises(LoopAbandoned):
            await answer(watch.runner, blocks, SHORTLY).wait()

        assert await watch.has_replaced() == ("plugins-answers", "export")
        await answer(watch.runner, done).wait()
        after = await deliver(watch.runner, done).wait()
        assert after.reference == str(watch.thread.ident)
        blocks.go_on.set()
        await asyncio.to_thread(thread.join, PATIENCE)


@asynchronous
async def test_a_handler_may_block_its_loop_until_its_deadline() -> None:
    blocks = Blocks()
    async with running() as runner:
        run = deliver(runner, blocks)
        await blocks.has_begun()
        runner._loops["deliveries"].is_blocked(AT_ONCE)  # sends a ping that is not answered

        assert not runner._loops["deliveries"].is_blocked(AT_ONCE)
        blocks.go_on.set()
        await run.wait()


@asynchronous
async def test_a_loop_that_answers_is_not_blocked_however_late_its_handlers_are() -> None:
    async with running() as runner:
        late = deliver(runner, wait_forever, timedelta(minutes=-1))
        await deliver(runner, done).wait()
        for _ in range(3):
            assert not runner._loops["deliveries"].is_blocked(AT_ONCE)
            await deliver(runner, done).wait()

        late.cancel()


# --- stopping -------------------------------------------------------------------------------------------------------


@asynchronous
async def test_stopping_returns_although_a_handler_blocks() -> None:
    blocks = Blocks()
    runner = Runner(make_norce=norce, clock=lambda: NOON)
    delivery = deliver(runner, blocks)
    await blocks.has_begun()

    await asyncio.wait_for(runner.stop(SHORTLY), PATIENCE)

    assert not blocks.go_on.is_set()
    blocks.go_on.set()
    assert await delivery.wait() == Done("late")
    await runner._loops["deliveries"].stop(timedelta(seconds=PATIENCE))  # leaves nothing behind for other tests


@asynchronous
async def test_stopping_does_not_wait_for_an_abandoned_thread() -> None:
    blocks = Blocks()
    async with watched() as watch:
        deliver(watch.runner, blocks, SHORTLY)
        await watch.has_replaced()

    assert watch.thread.is_alive()
    blocks.go_on.set()
    await watch.has_ended()


# --- the context ----------------------------------------------------------------------------------------------------


@asynchronous
async def test_the_context_reaches_the_hosts_in_the_settings_and_norce() -> None:
    seen: list[Any] = []

    async def looks_around(context: Context[ShopSettings]) -> Done:
        answer = await context.http.get(f"{context.settings.base_url}/orders")
        order = await context.orders.read("order-9")
        seen.extend([answer.text, order.id, context.clock(), context.route, context.identity])
        return Done()

    async with running() as runner:
        await deliver(runner, looks_around).wait()

        assert seen == ["shop.example", "order-9", NOON, "export", "ab"]


@asynchronous
async def test_a_handler_that_computes_runs_in_place() -> None:
    async with running() as runner:
        assert await compute(runner, done) == Done(str(threading.get_ident()))


@asynchronous
async def test_a_handler_that_declares_computes_and_waits_is_closed() -> None:
    closed: list[bool] = []

    async def waits(_context: Context[ShopSettings]) -> Done:
        try:
            await asyncio.sleep(1)
        finally:
            closed.append(True)
        return Done()

    async with running() as runner:
        with pytest.raises(HandlerWaits):
            await compute(runner, waits)

        assert closed == [True]


@asynchronous
async def test_a_handler_that_computes_lets_other_tasks_run_where_it_pauses() -> None:
    happened: list[str] = []

    async def pauses(_context: Context[ShopSettings]) -> Done:
        for number in range(3):
            happened.append(f"step {number}")
            await asyncio.sleep(0)
        return Done("end")

    async def another_task() -> None:
        for number in range(3):
            happened.append(f"other {number}")
            await asyncio.sleep(0)

    async with running() as runner:
        other = asyncio.create_task(another_task())
        assert await compute(runner, pauses) == Done("end")
        await other

    assert happened == ["step 0", "other 0", "step 1", "other 1", "step 2", "other 2"]


@asynchronous
async def test_a_handler_that_computes_ends_at_its_deadline_where_it_pauses() -> None:
    steps: list[int] = []
    now = NOON

    async def computes_for_ever(_context: Context[ShopSettings]) -> Done:
        nonlocal now
        while True:
            steps.append(1)
            now += timedelta(seconds=40)
            await asyncio.sleep(0)

    runner = Runner(make_norce=norce, clock=lambda: now)
    try:
        with pytest.raises(DeadlinePassed):
            await compute(runner, computes_for_ever)
    finally:
        await runner.stop(timedelta(seconds=PATIENCE))

    assert len(steps) == 2  # the deadline is after a minute


@asynchronous
async def test_a_caller_that_is_cancelled_closes_a_handler_that_computes() -> None:
    closed: list[bool] = []

    async def computes_for_ever(_context: Context[ShopSettings]) -> Done:
        try:
            for _ in range(1000):
                await asyncio.sleep(0)
            return Done()
        finally:
            closed.append(True)

    async with running() as runner:
        task = asyncio.create_task(compute(runner, computes_for_ever))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert closed == [True]


@pytest.mark.parametrize("end", [SystemExit(1), KeyboardInterrupt()], ids=["exit", "interrupt"])
@asynchronous
async def test_a_handler_that_computes_and_tries_to_end_the_process_fails_alone(end: BaseException) -> None:
    async def ends(_context: Context[ShopSettings]) -> Done:
        raise end

    async with running() as runner:
        with pytest.raises(RuntimeError, match="tried to end the process"):
            await compute(runner, ends)


async def _calls_out(context: Context[Any]) -> None:
    await context.http.get("https://shop.example/")


async def _reads_an_order(context: Context[Any]) -> None:
    await context.orders.read("order-1")


@pytest.mark.parametrize("calls", [_calls_out, _reads_an_order], ids=["http", "orders"])
@asynchronous
async def test_a_handler_that_computes_may_not_call_other_systems(calls: Handler) -> None:
    async with running() as runner:
        with pytest.raises(Misconfigured, match="computes-only"):
            await compute(runner, calls)
