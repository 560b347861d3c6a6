"""`adapter.offload`: large bodies beside the event loop."""

import asyncio
import threading

import pytest

from adapter.offload import SMALL_BYTES, offload
from tests.asynchronous import asynchronous


@asynchronous
async def test_work_on_a_small_body_is_done_at_once() -> None:
    assert await offload(SMALL_BYTES, threading.get_ident) == threading.get_ident()


@asynchronous
async def test_the_loop_goes_on_while_a_large_body_is_worked_on() -> None:
    goes_on = threading.Event()
    work = asyncio.create_task(offload(SMALL_BYTES + 1, goes_on.wait, timeout=120))
    await asyncio.sleep(0)

    goes_on.set()

    assert await work


@asynchronous
async def test_one_thread_works_on_all_large_bodies() -> None:
    idents = await asyncio.gather(*(offload(SMALL_BYTES + 1, threading.get_ident) for _ in range(5)))

    assert len(set(idents)) == 1
    assert threading.get_ident() not in idents


@pytest.mark.parametrize("size", [0, SMALL_BYTES + 1], ids=["small", "large"])
@asynchronous
async def test_an_error_reaches_the_caller(size: int) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await offload(size, int, "x")
