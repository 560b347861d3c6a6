"""The service as a process with the handlers of the benchmarks, and the same service with a commit for each accept.

python benchmarks/servers.py service CONFIG
python benchmarks/servers.py commit_each CONFIG
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop
from sqlalchemy import Connection

from adapter import app, config, logs
from adapter.cli.shared import stop_signal
from adapter.handlers.rules import Rules
from adapter.ledger.store import Store
from adapter.plugin import (
    Context,
    Done,
    HookHandler,
    NoSettings,
    Notification,
    NotificationHandler,
    Order,
    Patch,
    Problem,
    ValidationHandler,
)
from adapter.routing import routes

HELD_SECONDS = 60


class Holds(NotificationHandler[NoSettings]):
    """Never ends: it holds one lane, all other deliveries wait, and only the accept is measured."""

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        await asyncio.Event().wait()
        return Done()


class Delivers(NotificationHandler[NoSettings]):
    """Ends at once and counts: only the work of the dispatcher is measured."""

    delivered = 0

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        Delivers.delivered += 1
        return Done()


class Compares(NotificationHandler[NoSettings]):
    """Reads a typed member of both orders: the received one, and the one that Norce has."""

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        assert notification.order.cart.items != notification.received.cart.items
        return Done()


class Accepts(HookHandler[NoSettings]):
    """Accepts: only the way to the event loop of the plugins and back is measured."""

    async def change(self, order: Order, context: Context[NoSettings]) -> list[Patch]:
        return []


class Approves(ValidationHandler[NoSettings]):
    """Approves every order that could be read."""

    async def validate(self, order: Order, context: Context[NoSettings]) -> list[Problem]:
        return []


class Sleeps(HookHandler[NoSettings]):
    """Never answers, and does not block its thread."""

    async def change(self, order: Order, context: Context[NoSettings]) -> list[Patch]:
        await asyncio.Event().wait()
        return []


class Blocks(HookHandler[NoSettings]):
    """Blocks its thread, as a synchronous client would."""

    async def change(self, order: Order, context: Context[NoSettings]) -> list[Patch]:
        time.sleep(HELD_SECONDS)  # noqa: ASYNC251 - it blocks on purpose
        return []


class Spins(HookHandler[NoSettings]):
    """Computes in four threads, which compete for the interpreter."""

    spinning = 0

    async def change(self, order: Order, context: Context[NoSettings]) -> list[Patch]:
        while Spins.spinning < 4:
            Spins.spinning += 1
            threading.Thread(target=_spin, daemon=True).start()
        _spin()
        return []


def _spin() -> None:
    ends = time.monotonic() + HELD_SECONDS
    while time.monotonic() < ends:
        pass


class CommitEach(Store):
    """A store without group commit: each piece of work is a transaction of its own."""

    own: Connection | None = None

    async def write(self, work: Callable[[Connection, Sequence[Any]], Sequence[Any]], item: Any, size: int = 0) -> Any:
        self.own = self.own or self.engine.connect()
        with self.own.begin():
            return work(self.own, [item])[0]

    def close(self) -> None:
        if self.own is not None:
            self.own.close()
        super().close()


HANDLERS = (Holds, Delivers, Compares, Rules, Accepts, Approves, Sleeps, Blocks, Spins)


class _Installed:
    """A stand-in for the entry point of a handler."""

    dist = None

    def __init__(self, handler: type) -> None:
        self.name = handler.__name__.lower()
        self._handler = handler

    def load(self) -> Any:
        return self._handler


async def service(path: Path) -> None:
    """Run the service as `norce-adapter serve` does. At the end, write the number of deliveries beside its config."""
    loaded = config.load(path, {})
    with stop_signal() as stop:
        async with app.running(loaded, routes.build(loaded, [_Installed(each) for each in HANDLERS])):  # type: ignore[misc]
            await stop.wait()
    path.with_suffix(".delivered").write_text(str(Delivers.delivered))


if __name__ == "__main__":
    logs.configure()
    if sys.argv[1] == "commit_each":
        app.Store = CommitEach  # type: ignore[attr-defined,misc]
    uvloop.run(service(Path(sys.argv[2])))
