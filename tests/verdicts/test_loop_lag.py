"""The lateness of the event loop, by a clock that the test moves."""

import asyncio

import pytest

from adapter.verdicts.loop_lag import TICK_SECONDS, LoopLag


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_loop_that_is_not_watched_is_not_late() -> None:
    clock = Clock()
    lag = LoopLag(clock)

    clock.now += 60

    assert lag.seconds() == 0


def test_lateness_counts_as_it_grows_and_adds_up() -> None:
    async def measured() -> list[float]:
        clock = Clock()
        ticks: asyncio.Queue[None] = asyncio.Queue()

        async def sleep(_seconds: float) -> None:
            await ticks.get()
            ticks.task_done()

        lag = LoopLag(clock, sleep)
        watching = asyncio.create_task(lag.watch())
        await asyncio.sleep(0)  # the first tick begins
        seen = [lag.seconds()]
        for passed in (TICK_SECONDS, 0.3, 0.2):
            clock.now += passed
            seen.append(lag.seconds())  # before the loop could notice
        ticks.put_nowait(None)
        await ticks.join()  # the first tick ends, and the next one begins
        seen.append(lag.seconds())
        clock.now += TICK_SECONDS + 1
        seen.append(lag.seconds())
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return seen

    assert asyncio.run(measured()) == pytest.approx([0, 0, 0.3, 0.5, 0.5, 1.5])
