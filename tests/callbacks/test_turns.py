"""`adapter.callbacks.turns`: so many a turn of the loop, in order, and whoever else comes is let through."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.callbacks.turns import Turns


def turns_of(count: int, most: int, *, gone: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
    """In which turn of the loop each had its own; those who are `gone` were cancelled while they waited."""

    async def crowd() -> list[tuple[int, int]]:
        turns, had, loop = Turns(most), [], asyncio.get_running_loop()
        turn = 0

        def tick() -> None:
            nonlocal turn
            turn += 1
            if turn < 3 * (count + 3):
                loop.call_soon(tick)

        async def one(number: int) -> None:
            await turns.taken()
            had.append((number, turn))

        tasks = [asyncio.create_task(one(number)) for number in range(count)]
        loop.call_soon(tick)
        await asyncio.sleep(0)
        for number in gone:
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return had

    return asyncio.run(crowd())


@given(count=st.integers(min_value=0, max_value=30), most=st.integers(min_value=1, max_value=8))
def test_everybody_has_a_turn_in_order_and_so_many_at_a_time(count: int, most: int) -> None:
    had = turns_of(count, most)

    assert [number for number, _ in had] == list(range(count))
    in_each = [sum(turn == each for _, turn in had) for each in {turn for _, turn in had}]
    assert all(number <= most for number in in_each)


def test_who_has_gone_takes_nobodys_turn() -> None:
    had = turns_of(10, 2, gone=frozenset({4, 5, 6}))

    assert [number for number, _ in had] == [0, 1, 2, 3, 7, 8, 9]
    assert [sum(turn == each for _, turn in had) for each in sorted({turn for _, turn in had})] == [2, 2, 2, 1]


@pytest.mark.parametrize("most", [1, 4])
def test_somebody_else_is_not_held_up(most: int) -> None:
    """A shopper who comes behind a crowd is served in the next turn of the loop."""

    async def crowd() -> int:
        turns, served = Turns(most), 0

        async def one() -> None:
            nonlocal served
            await turns.taken()
            served += 1

        tasks = [asyncio.create_task(one()) for _ in range(64)]
        await asyncio.sleep(0)
        shopper = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(shopper.set_result, None)
        await shopper
        before_the_shopper = served
        await asyncio.gather(*tasks)
        return before_the_shopper

    assert asyncio.run(crowd()) <= 3 * most
