"""Named points of the service at which the child process kills itself.

The child wraps methods of the service; the service itself has no such points. A SIGKILL to the own process takes effect
before the call returns, in every thread. So nothing after a point happens.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

import alembic.command
import alembic.ddl.impl

from adapter.deliveries.dispatcher import Dispatcher
from adapter.handlers.jetshop import JetshopExport
from adapter.ledger import lanes
from adapter.ledger.inbox import Inbox
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.maintenance import Maintenance
from adapter.ledger.store import Store
from adapter.plugin import Done
from adapter.routing.runner import Runner
from tests.crash.warehouse import WarehouseExport

WHILE_STARTING = {
    "migration-in-the-middle": "some tables of an empty database are made, nothing is committed",
    "migration-before-commit": "the tables are up to date, nothing is committed",
    "start-opened": "the store is open and migrated, no lease has begun",
    "start-before-lease-commit": "the lease and the burial of dead processes are written, not committed",
    "start-leased": "the lease is committed, no queue is open",
    "start-queues-before-commit": "the queues are written, not committed",
    "prune-before-commit": "a step of the pruning is done, not committed",
}
WHILE_WORKING = {
    "accept-before-commit": "notifications, deliveries and lanes of a group are written, not committed",
    "accept-after-commit": "a notification is on disk, its 200 has not been sent",
    "commit-unheard": "a transaction is committed, and only the writer's thread knows it",
    "claim-before-commit": "lanes are claimed, not committed",
    "claim-after-commit": "claims are on disk, no handler has begun",
    "handler-before": "the order is re-read, the handler has not begun",
    "handler-after-effect": "the destination has answered, the handler's outcome is not known to the dispatcher",
    "lookup-answered": "the destination has answered the lookup, and the answer is not recorded",
    "settle-before": "the outcome is Done, nothing of it is written",
    "settle-in-the-middle": "delivery and lane are written, the attempt is not",
    "settle-before-commit": "all of a settlement is written, not committed",
    "settle-after-commit": "a settlement is committed, the dispatcher has not heard of it",
    "heartbeat-before-commit": "the lease is renewed, not committed",
    "heartbeat-after-commit": "the lease is renewed",
}
WHILE_STOPPING = {
    "stop-begins": "SIGTERM has come, nothing is drained",
    "stop-drained": "what ran has ended or was cancelled, the store is open",
    "stop-closing": "the writer is about to end",
}
WITH_A_FAILING_STORE = {
    "give-back-before-commit": "claims that may be on disk are undone after an outage, not committed",
}
POINTS = WHILE_STARTING | WHILE_WORKING | WHILE_STOPPING | WITH_A_FAILING_STORE


class Killer:
    """The armed point, and how often the process passes it before it dies there."""

    def __init__(self) -> None:
        self._armed: tuple[str, int] | None = None

    def arm(self, point: str, after: int) -> None:
        assert point in POINTS, point
        self._armed = (point, after)

    def pass_point(self, point: str) -> None:
        armed = self._armed
        if armed is None or armed[0] != point:
            return
        if armed[1] <= 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self._armed = (point, armed[1] - 1)


def install(killer: Killer) -> None:
    """Wrap methods of the service. Call this once, before the service starts."""

    def after(owner: Any, name: str, point: str, when: Callable[[Any], bool] = lambda answer: True) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            answer = original(*arguments, **named)
            if when(answer):
                killer.pass_point(point)
            return answer

        setattr(owner, name, wrapped)

    def awaited(owner: Any, name: str, point: str, when: Callable[[Any], bool] = lambda answer: True) -> None:
        original = getattr(owner, name)

        async def wrapped(*arguments: Any, **named: Any) -> Any:
            answer = await original(*arguments, **named)
            if when(answer):
                killer.pass_point(point)
            return answer

        setattr(owner, name, wrapped)

    def before(owner: Any, name: str, point: str, when: Callable[..., bool] = lambda *arguments: True) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if when(*arguments):
                killer.pass_point(point)
            return original(*arguments, **named)

        setattr(owner, name, wrapped)

    # During the start.
    after(alembic.ddl.impl.DefaultImpl, "create_table", "migration-in-the-middle")
    after(alembic.command, "upgrade", "migration-before-commit")
    opened = Store.open.__func__  # type: ignore[attr-defined]

    def open_store(cls: type[Store], *arguments: Any, **named: Any) -> Store:
        made: Store = opened(cls, *arguments, **named)
        killer.pass_point("start-opened")
        return made

    Store.open = classmethod(open_store)  # type: ignore[method-assign]
    after(Lease, "_enter", "start-before-lease-commit")
    awaited(Lease, "enter", "start-leased")
    after(Lanes, "_open_queues", "start-queues-before-commit")
    for step in ("_bodies", "_rows"):
        after(Maintenance, step, "prune-before-commit")

    # During operation.
    after(Inbox, "_receive", "accept-before-commit")
    awaited(Inbox, "receive", "accept-after-commit")
    after(Store, "_transaction", "commit-unheard")
    after(Lanes, "_claim", "claim-before-commit", lambda taken: bool(taken.claims))
    awaited(Lanes, "claim", "claim-after-commit", lambda taken: bool(taken.claims))
    before(Runner, "start", "handler-before")
    for handler in (JetshopExport, WarehouseExport):
        awaited(handler, "deliver", "handler-after-effect")
        awaited(handler, "lookup", "lookup-answered")
    before(Lanes, "settle", "settle-before", lambda _, record: isinstance(record.result, Done))
    before(lanes, "attempt_row", "settle-in-the-middle")
    after(Lanes, "_settle", "settle-before-commit")
    awaited(Lanes, "settle", "settle-after-commit")
    after(Lease, "_renew", "heartbeat-before-commit")
    awaited(Lease, "renew", "heartbeat-after-commit")

    # During shutdown, and with a store that fails.
    before(Dispatcher, "stop", "stop-begins")
    awaited(Dispatcher, "stop", "stop-drained")
    before(Store, "close", "stop-closing")
    after(Lanes, "_give_back", "give-back-before-commit")
