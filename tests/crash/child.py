"""The service as the harness runs it: `norce-adapter serve` with shorter times and with points at which it dies.

Only the code around the service belongs to the test. The process ends as soon as the harness does.
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
from tests.crash.points import Killer, install
from tests.crash.warehouse import WarehouseExport

# As in the service, a heartbeat is a third of the lease, and doubt lasts longer than a request may take.
LEASE = timedelta(milliseconds=1500)
BEAT = timedelta(milliseconds=500)
SLACK = timedelta(milliseconds=600)
POLL = timedelta(milliseconds=500)
STORE_RETRY = timedelta(milliseconds=100)


def shorten_times() -> None:
    adapter.ledger.lease.LEASE_MS = int(LEASE.total_seconds() * 1000)
    adapter.deliveries.dispatcher.HEARTBEAT = BEAT
    adapter.deliveries.dispatcher.SLACK = SLACK
    adapter.deliveries.dispatcher.POLL = POLL
    adapter.deliveries.dispatcher.STORE_RETRY = STORE_RETRY


def answer_before_storing() -> None:
    """Answer 200 before the notification is on disk. The harness must find this mistake."""
    receive = Inbox.receive
    pending: set[asyncio.Task[Any]] = set()

    async def receive_later(inbox: Inbox, notification: ReceivedNotification) -> Received:
        task = asyncio.create_task(receive(inbox, notification))
        pending.add(task)
        task.add_done_callback(pending.discard)
        return Received.NEW

    Inbox.receive = receive_later  # type: ignore[method-assign]


def skip_lookup() -> None:
    """Treat every lane in doubt as if nothing had happened. The harness must find this mistake."""

    async def find_nothing(*_: Any) -> None:
        return None

    WarehouseExport.lookup = find_nothing  # type: ignore[method-assign]


MISTAKES = {"answers-before-it-stores": answer_before_storing, "skips-the-lookup": skip_lookup}


def serve(
    config: str,
    environ: dict[str, str],
    commands: Connection,
    output: Connection,
    mistake: str | None,
    armed: tuple[str, int] | None,
) -> None:
    """Run the service in this process.

    Args:
        commands: Receives the points at which to die. The process ends when the harness closes it.
        output: Takes the standard output and the standard error.
    """
    os.environ.update(environ)
    sys.path += environ["PYTHONPATH"].split(os.pathsep)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    killer = Killer()
    install(killer)
    shorten_times()
    if mistake is not None:
        MISTAKES[mistake]()
    if armed is not None:
        killer.arm(*armed)

    def listen() -> None:
        try:
            while True:
                point, after, then_stop = commands.recv()
                killer.arm(point, after)
                if then_stop:
                    os.kill(os.getpid(), signal.SIGTERM)
        except EOFError:
            os._exit(9)

    threading.Thread(target=listen, name="crash-commands", daemon=True).start()
    main(["serve", "--config", config])
