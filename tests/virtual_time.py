"""An event loop whose time moves only when nothing else is left to do, and then as far as the next timer."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits, and no timer is left"
            self._loop.now += timeout
        return ready


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run work that waits for nothing outside its loop."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)
