"""Work on large bodies, beside the event loop.

One thread does all of it, because each further one would take its share of the interpreter from the loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BYTES = 32 * 1024  # the largest body whose work is done at once: no such body takes longer than some milliseconds


async def offload(size: int, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run `work` and return its result: beside the event loop, if its body is large.

    Args:
        size: Of the body, in bytes.
        work: Called with the other arguments.
    """
    if size <= SMALL_BYTES:
        return work(*arguments, **named)
    return await asyncio.wrap_future(_thread().submit(work, *arguments, **named))


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="large-bodies")
