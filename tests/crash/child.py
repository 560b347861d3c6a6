"""
The service as the harness runs it: `norce-adapter serve` with points to die at, and with shorter times.

All its words are those of the service itself; only the code around it is ours. Where the harness is gone, so is this
process, at once.
"""

import asyncio
import os
import signal
import sys
import threading
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import adapter.deliveries.dispatcher
import adapter.ledger.lease
from adapter.cli import main
from adapter.ledger.inbox import Inbox, Received, ReceivedNotification
from tests.crash.points import Turn, install
from tests.crash.warehouse import WarehouseExport

# A third of the lease is a heartbeat, and doubt is longer than a request may take: only the figures are smaller.
LEASE = timedelta(milliseconds=1500)
BEAT = timedelta(milliseconds=500)
SLACK = timedelta(milliseconds=600)
POLL = timedelta(milliseconds=500)
STORE_RETRY = timedelta(milliseconds=100)


def shorten() -> None:
    adapter.ledger.lease.LEASE_MS = int(LEASE.total_seconds() * 1000)
    adapter.deliveries.dispatcher.HEARTBEAT = BEAT
    adapter.deliveries.dispatcher.SLACK = SLACK
    adapter.deliveries.dispatcher.POLL = POLL
    adapter.deliveries.dispatcher.STORE_RETRY = STORE_RETRY


def answers_before_it_stores() -> None:
    """A mistake that the harness must find: 200 for what is not on disk yet."""
    receive = Inbox.receive
    pending: set[asyncio.Task[Any]] = set()

    async def soon(inbox: Inbox, notification: ReceivedNotification) -> Received:
        task = asyncio.create_task(receive(inbox, notification))
        pending.add(task)
        task.add_done_callback(pending.discard)
        return Received.NEW

    Inbox.receive = soon  # type: ignore[method-assign]


def forgets_to_look() -> None:
    """Another: in doubt it does not ask, and takes for granted that nothing has happened."""

    async def nothing(*_: Any) -> None:
        return None

    WarehouseExport.lookup = nothing  # type: ignore[method-assign]


MISTAKES = {"answers-before-it-stores": answers_before_it_stores, "forgets-to-look": forgets_to_look}


def serve(
    config: str,
    environ: dict[str, str],
    orders: Connection,
    said: Connection,
    mistake: str | None,
    armed: tuple[str, int] | None,
) -> None:
    """Serves in this process. `orders` tell at which point to die; where they end, the harness is gone."""
    os.environ.update(environ)
    sys.path += environ["PYTHONPATH"].split(os.pathsep)
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    turn = Turn()
    install(turn)
    shorten()
    if mistake is not None:
        MISTAKES[mistake]()
    if armed is not None:
        turn.arm(*armed)

    def listen() -> None:
        try:
            while True:
                point, after, then_stop = orders.recv()
                turn.arm(point, after)
                if then_stop:
                    os.kill(os.getpid(), signal.SIGTERM)
        except EOFError:
            os._exit(9)

    threading.Thread(target=listen, name="crash-orders", daemon=True).start()
    main(["serve", "--config", config])
