"""`adapter.verdicts.shared_runs`: callers share runs, but only those that start after they asked."""

import asyncio
import gc
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter.testing import virtual_time
from adapter.verdicts.shared_runs import SharedRuns

AT_ONCE = 4
SECOND = timedelta(seconds=1)


class Run:
    def __init__(self, key: str, within: timedelta | None, begun: int) -> None:
        self.key = key
        self.within = within
        self.begun = begun
        self.end: asyncio.Future[int] = asyncio.get_running_loop().create_future()


class Runs:
    """A function whose runs end when the test says so; remembers in which order calls and runs began."""

    def __init__(self) -> None:
        self.shared = SharedRuns(self._run, at_once=AT_ONCE)
        self.moment = 0
        self.begun: list[Run] = []
        self.running: list[Run] = []

    def now(self) -> int:
        self.moment += 1
        return self.moment

    async def _run(self, key: str, within: timedelta | None) -> int:
        run = Run(key, within, self.now())
        self.begun.append(run)
        self.running.append(run)
        assert sum(each.key == key for each in self.running) <= AT_ONCE
        try:
            async with asyncio.timeout(None if within is None else within.total_seconds()):
                return await run.end
        finally:
            self.running.remove(run)

    def ask(self, key: str = "o1", within: timedelta | None = None) -> asyncio.Task[int]:
        return asyncio.create_task(self.shared.get(key, within))

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def played(play: Callable[[Runs], Any]) -> None:
    async def work() -> None:
        await play(Runs())

    virtual_time.run(work())


def test_the_first_callers_have_a_run_each_and_later_ones_share_the_next() -> None:
    async def play(runs: Runs) -> None:
        first = [runs.ask() for _ in range(AT_ONCE)]
        await runs.settle()
        later = [runs.ask() for _ in range(10)]
        await runs.settle()
        assert len(runs.begun) == AT_ONCE

        runs.begun[2].end.set_result(2)
        await runs.settle()

        assert len(runs.begun) == AT_ONCE + 1
        runs.begun[AT_ONCE].end.set_result(42)
        assert [await each for each in later] == [42] * 10
        for each in first:
            each.cancel()

    played(play)


def test_a_caller_does_not_join_a_run_that_has_begun() -> None:
    async def play(runs: Runs) -> None:
        asked = [runs.ask() for _ in range(AT_ONCE + 1)]
        await runs.settle()
        runs.begun[0].end.set_result(0)
        await runs.settle()
        too_late = runs.ask()
        await runs.settle()
        runs.begun[AT_ONCE].end.set_result(1)
        await runs.settle()

        assert not too_late.done()
        runs.begun[AT_ONCE + 1].end.set_result(2)
        assert await too_late == 2
        for each in asked:
            each.cancel()

    played(play)


def test_keys_do_not_wait_for_each_other() -> None:
    async def play(runs: Runs) -> None:
        flood = [runs.ask("flooded") for _ in range(100)]
        await runs.settle()

        beside = runs.ask("o1")
        await runs.settle()
        runs.begun[-1].end.set_result(1)

        assert await beside == 1
        for each in flood:
            each.cancel()

    played(play)


def test_a_caller_whose_run_has_not_begun_in_its_time_gets_a_timeout() -> None:
    async def play(runs: Runs) -> None:
        asked = [runs.ask() for _ in range(AT_ONCE)]
        await runs.settle()

        with pytest.raises(TimeoutError):
            await runs.shared.get("o1", SECOND)

        assert asyncio.get_running_loop().time() == 1
        runs.begun[0].end.set_result(0)
        await runs.settle()
        assert len(runs.begun) == AT_ONCE  # no caller needs another
        for each in asked:
            each.cancel()

    played(play)


def test_each_caller_of_a_shared_run_has_its_own_time_and_the_last_one_ends_the_run() -> None:
    async def play(runs: Runs) -> None:
        asked = [runs.ask() for _ in range(AT_ONCE)]
        await runs.settle()
        short, long = runs.ask(within=SECOND), runs.ask(within=3 * SECOND)
        await runs.settle()
        runs.begun[0].end.set_result(0)
        await asyncio.wait((short,))

        assert isinstance(short.exception(), TimeoutError)
        assert asyncio.get_running_loop().time() == 1
        assert runs.begun[AT_ONCE] in runs.running
        await asyncio.wait((long,))
        await runs.settle()
        assert asyncio.get_running_loop().time() == 3
        assert runs.begun[AT_ONCE] not in runs.running
        for each in asked:
            each.cancel()

    played(play)


def test_a_run_that_is_cancelled_before_its_first_step_leaves_its_place_to_the_next() -> None:
    async def play(runs: Runs) -> None:
        asked = [runs.ask() for _ in range(AT_ONCE)]
        await runs.settle()
        waiting = runs.ask()
        await runs.settle()
        runs.begun[0].end.set_result(0)
        await asyncio.sleep(0)
        assert asked[0].done()
        assert len(runs.begun) == AT_ONCE  # the shared run is about to begin
        waiting.cancel()
        await runs.settle()

        again = runs.ask()
        await runs.settle()
        assert len(runs.running) == AT_ONCE
        for each in (*asked, again):
            each.cancel()

    played(play)


def test_all_callers_of_a_shared_run_get_its_error() -> None:
    async def play(runs: Runs) -> None:
        asked = [runs.ask() for _ in range(AT_ONCE)]
        await runs.settle()
        sharing = [runs.ask() for _ in range(3)]
        await runs.settle()
        runs.begun[0].end.set_exception(LookupError("no such order"))
        await runs.settle()
        runs.begun[AT_ONCE].end.set_exception(LookupError("no such order"))
        await asyncio.wait(sharing)

        assert [type(each.exception()) for each in (asked[0], *sharing)] == [LookupError] * 4
        for each in asked[1:]:
            each.cancel()

    played(play)


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["o1", "o2"]), st.none() | st.integers(0, 3)),
    st.tuples(st.just("end"), st.integers(0, 20), st.booleans()),
    st.tuples(st.just("leave"), st.integers(0, 20), st.none()),
    st.tuples(st.just("let steps pass"), st.integers(0, 3), st.none()),
    st.tuples(st.just("let time pass"), st.integers(1, 2), st.none()),
)


@settings(max_examples=settings.default.max_examples // 2)
@given(st.lists(STEPS, max_size=25))
def test_whatever_comes_and_ends_a_caller_gets_a_run_that_began_after_it_asked(steps: list[Any]) -> None:
    """At most four runs of a key are under way (see `Runs`), every caller ends, and nothing stays behind."""

    async def play(runs: Runs) -> None:
        callers: list[asyncio.Task[int]] = []

        async def call(key: str, within: int | None) -> int:
            asked = runs.now()
            begun = await runs.shared.get(key, None if within is None else within * SECOND)
            assert begun > asked
            return begun

        def end(run: Run, *, fails: bool) -> None:
            if not run.end.done():
                if fails:
                    run.end.set_exception(LookupError())
                else:
                    run.end.set_result(run.begun)

        for what, first, second in steps:
            match what:
                case "ask":
                    callers.append(asyncio.create_task(call(first, second)))
                case "end" if runs.running:
                    end(runs.running[first % len(runs.running)], fails=second)
                case "leave" if callers:
                    callers[first % len(callers)].cancel()
                case "let steps pass":
                    for _ in range(first):
                        await asyncio.sleep(0)
                case "let time pass":
                    await asyncio.sleep(first)
        while not all(each.done() for each in callers):
            await asyncio.sleep(0)
            for run in tuple(runs.running):
                end(run, fails=False)
        await runs.settle()
        for each in callers:
            if not each.cancelled():
                assert isinstance(each.exception(), LookupError | TimeoutError | None)
        assert runs.running == []
        assert not runs.shared._lines
        callers.clear()
        gc.collect()

    complaints: list[Any] = []

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await play(Runs())

    virtual_time.run(work())
    assert complaints == []
