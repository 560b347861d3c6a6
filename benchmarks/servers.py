"""
The service as a process, with handlers that benchmarks need, and the same service with a commit for each accept.

    python benchmarks/servers.py service CONFIG
    python benchmarks/servers.py commit_each CONFIG
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop
from sqlalchemy import Connection

from adapter import app, config, logs, routes
from adapter.ledger.store import Store
from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler


class Holds(NotificationHandler[NoSettings]):
    """Never done: one lane is held, everything else stays owed, and the accept is measured alone."""

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        await asyncio.Event().wait()
        return Done()


class Delivers(NotificationHandler[NoSettings]):
    """Done at once, and counted: what is left is the dispatcher's own work."""

    delivered = 0

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        Delivers.delivered += 1
        return Done()


class CommitEach(Store):
    """A store without groups: each piece of work is a transaction of its own, committed where it is asked for."""

    own: Connection | None = None

    async def write(self, work: Callable[[Connection, Sequence[Any]], Sequence[Any]], item: Any, size: int = 0) -> Any:
        self.own = self.own or self.engine.connect()
        with self.own.begin():
            return work(self.own, [item])[0]

    def close(self) -> None:
        if self.own is not None:
            self.own.close()
        super().close()


class _Installed:
    """A handler as if a package had brought it."""

    dist = None

    def __init__(self, handler: type) -> None:
        self.name = handler.__name__.lower()
        self._handler = handler

    def load(self) -> Any:
        return self._handler


async def service(path: Path) -> None:
    """The whole service, as `norce-adapter serve` runs it. At the end it leaves beside its config what it delivered."""
    loaded = config.load(path, {})
    with app.told_to_stop() as stop:
        async with app.running(loaded, routes.build(loaded, [_Installed(Holds), _Installed(Delivers)])):  # type: ignore[list-item]
            await stop.wait()
    path.with_suffix(".delivered").write_text(str(Delivers.delivered))


if __name__ == "__main__":
    logs.configure()
    if sys.argv[1] == "commit_each":
        app.Store = CommitEach  # type: ignore[attr-defined,misc]
    uvloop.run(service(Path(sys.argv[2])))
