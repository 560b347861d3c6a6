"""
What is measured: the bare echo and the service, each a process of its own.

    python benchmarks/servers.py echo PORT
    python benchmarks/servers.py service CONFIG
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adapter import app, config, logs, routes
from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler


class Holds(NotificationHandler[NoSettings]):
    """Never done: one lane is held, everything else stays owed, and the accept is measured alone."""

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        await asyncio.Event().wait()
        return Done()


class _Installed:
    """A handler as if a package had brought it."""

    dist = None

    def __init__(self, name: str, handler: type) -> None:
        self.name = name
        self._handler = handler

    def load(self) -> Any:
        return self._handler


def echo(port: int) -> None:
    """uvicorn, a Starlette route, the body read, a constant answer."""

    async def answer(request: Request) -> Response:
        await request.body()
        return Response(status_code=200)

    application = Starlette(routes=[Route("/{rest:path}", answer, methods=["POST"])])
    uvicorn.run(
        application, host="127.0.0.1", port=port, log_config=None, access_log=False, lifespan="off", ws="none",
        server_header=False, loop="uvloop", http="httptools",
    )  # fmt: skip


async def service(path: Path) -> None:
    """The whole service, as `norce-adapter serve` runs it, with a handler that is never done."""
    loaded = config.load(path, {})
    with app.told_to_stop() as stop:
        async with app.running(loaded, routes.build(loaded, [_Installed("holds", Holds)])):  # type: ignore[list-item]
            await stop.wait()


if __name__ == "__main__":
    logs.configure()
    if sys.argv[1] == "echo":
        echo(int(sys.argv[2]))
    else:
        uvloop.run(service(Path(sys.argv[2])))
