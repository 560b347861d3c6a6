"""A new route gets the orders of stored notifications, each once, while the service is killed three times.

`BACKFILL` sets the number of stored notifications.
"""

import asyncio
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from adapter.identifiers import Channel
from adapter.ledger.inbox import Inbox, ReceivedNotification
from adapter.ledger.store import Store
from tests import ROOT
from tests.crash.destinations import Warehouse
from tests.crash.warehouse import install
from tests.databases import KINDS, rows
from tests.flows.site import Flow, RunFlow, Site, make_order, wait_until

STORED = int(os.environ.get("BACKFILL", "150"))
ORDERS = STORED // 3
KILLS = 3
BACKFILL = ("deliveries", "backfill", "ship", "--why", "the route is new", "--output", "json")


def store_notifications(site: Site) -> None:
    """Store three notifications of each order. The new route wants two of them for every second order."""

    async def receive() -> None:
        store = Store.open(site.config["store"]["url"])
        inbox = Inbox(store)
        for number in range(ORDERS):
            statuses = ("accepted", "completed", "completed") if number % 2 else ("checkout", "processing", "accepted")
            await asyncio.gather(*(inbox.receive(_notification(site, number, *each)) for each in enumerate(statuses)))
        store.close()

    asyncio.run(receive())


def _notification(site: Site, number: int, snapshot: int, status: str) -> ReceivedNotification:
    order = make_order(f"order-{number}", state={"currentStatus": status})
    site.norce.put(order)
    return ReceivedNotification(
        identity=f"{number:08}/{snapshot}".encode(),
        channel=Channel("fjallboden", "se-b2c"),
        callback="order-status",
        order_id=f"order-{number}",
        snapshot_at=snapshot,
        source="callback",
        body=json.dumps(order).encode(),
    )


def count_deliveries(site: Site) -> int:
    return int(rows(site.config["store"]["url"], "SELECT count(*) FROM deliveries")[0][0])


def backfill_while_killed(site: Site) -> None:
    """Start the command again after each kill, until it ends."""
    site.results["warehouse"] = warehouse = Warehouse()
    site.environ["PYTHONPATH"] = os.pathsep.join(
        (site.environ["PYTHONPATH"], str(ROOT), str(install(site.folder / "warehouse")))
    )
    site.config["operations"]["socket"] = "operations.sock"
    site.config["norce"]["timeout"] = "2s"
    site.config["routes"] = {
        "ship": {
            "callback": "order-status",
            "when": {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
            "handler": "warehouse",
            "timeout": "2s",
            "concurrency": 32,
            "retry": {"schedule": ["100ms"] * 50},
            "settings": {"url": site.external_services.add(warehouse)},
        }
    }
    store_notifications(site)
    wanted = ORDERS // 2
    site.start()
    site.results["counted"] = _counted(site)
    for kill in range(1, KILLS + 1):
        interrupt(site, per_second=wanted // 4, after=kill * (wanted // 4))
        site.start()
    last = site.run_command(*BACKFILL)
    assert last.returncode == 0, last
    again = site.run_command(*BACKFILL)
    site.results["last"], site.results["again"] = json.loads(last.stdout), (again.returncode, json.loads(again.stdout))
    wait_until(lambda: not site.deliveries(state="waiting"), what="the end of all deliveries")


def interrupt(site: Site, *, per_second: int, after: int) -> None:
    """Run the command, and kill the service after so many deliveries."""
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(site.run_command, *BACKFILL, "--rate", str(per_second))
        wait_until(lambda: count_deliveries(site) >= after or command.done())
        site.services[-1].kill()
        assert command.result().returncode == 1, command.result()


def _counted(site: Site) -> Any:
    preview = site.run_command(*BACKFILL, "--dry-run")
    assert preview.returncode == 0, preview
    assert count_deliveries(site) == 0
    return json.loads(preview.stdout)["counts"]


FLOWS: dict[Flow, tuple[str, ...]] = {backfill_while_killed: KINDS}


def test_every_wanted_order_is_sent_once_and_no_other(run_flow: RunFlow) -> None:
    site = run_flow(backfill_while_killed)

    shipped: Counter[str] = Counter()
    for (order, _), number in site.results["warehouse"].shipped.items():
        shipped[order] += number
    assert shipped == {f"order-{number}": 1 for number in range(1, ORDERS, 2)}
    assert Counter(each["reason"] for each in site.deliveries()) == {"delivered": ORDERS // 2}
    snapshots = "SELECT DISTINCT n.snapshot_at FROM deliveries d JOIN notifications n ON n.id = d.notification_id"
    assert rows(site.config["store"]["url"], snapshots) == [(2,)]  # of the newest


def test_the_preview_counts_what_is_sent_and_the_actions_add_up(run_flow: RunFlow) -> None:
    site = run_flow(backfill_while_killed)

    assert [each["count"] for each in site.results["counted"]] == [ORDERS // 2]
    assert site.results["again"] == (3, {"backfilled": 0, "unread": [], "paused": []})
    actions = rows(site.config["store"]["url"], "SELECT changed FROM actions WHERE command = 'backfill'")
    assert sum(changed for (changed,) in actions) == ORDERS // 2
    assert len(actions) == KILLS + 2
