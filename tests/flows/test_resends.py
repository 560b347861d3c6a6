"""Orders that were exported wrongly are sent again, each once, while the service is killed three times.

`RESENDS` sets the number of orders.
"""

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.databases import KINDS, rows
from tests.flows.site import Flow, RunFlow, Site, make_order, wait_until

ORDERS = int(os.environ.get("RESENDS", "60"))
KILLS = 3
PER_STRETCH = ORDERS // (KILLS + 1)
RESEND = ("deliveries", "resend", "--output", "json")
BY = ("--route", "export-payment", "--why", "the method code was wrong")


def count_resends(site: Site) -> int:
    counted = rows(site.config["store"]["url"], "SELECT count(*) FROM deliveries WHERE again_of IS NOT NULL")
    return int(counted[0][0])


def wait_until_delivered(site: Site) -> None:
    waiting = "SELECT count(*) FROM deliveries WHERE state = 'waiting'"
    wait_until(lambda: rows(site.config["store"]["url"], waiting) == [(0,)], what="the end of all deliveries")


def resend_while_killed(site: Site) -> None:
    """Export with a wrong code, correct it, and send everything again. After each kill, resume the command."""
    site.config["operations"]["socket"] = "operations.sock"
    site.config["norce"]["timeout"] = "2s"
    route = site.config["routes"]["export-payment"]
    route |= {"timeout": "2s", "concurrency": 32}
    del route["settings"]["unmapped"]
    route["settings"]["method_map"] = {"*": {"code": "wrong"}}
    service = site.start()
    for number in range(ORDERS):
        assert site.notify(service, make_order(f"order-{number}")) == 200
    wait_until_delivered(site)
    site.results["before"] = codes(site)
    service.stop()

    route["settings"]["method_map"] = {"*": {"code": "right"}}
    site.start()
    preview = site.run_command(*RESEND, *BY, "--dry-run")
    site.results["preview"] = json.loads(preview.stdout)
    chosen: tuple[str, ...] = BY
    for kill in range(1, KILLS + 1):
        site.results["told"] = interrupt(site, *chosen, after=kill * PER_STRETCH)
        site.start()
        ((action,),) = rows(site.config["store"]["url"], "SELECT id FROM actions")
        chosen = ("--resume", str(action))
    for name in ("last", "again"):
        ended = site.run_command(*RESEND, *chosen)
        assert ended.returncode == 0, ended
        site.results[name] = json.loads(ended.stdout)
    wait_until_delivered(site)


def interrupt(site: Site, *chosen: str, after: int) -> str:
    """Run the command, kill the service after so many resends, and return what the command told."""
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(site.run_command, *RESEND, *chosen, "--rate", str(PER_STRETCH))
        wait_until(lambda: count_resends(site) >= after or command.done())
        site.services[-1].kill()
        ended = command.result()
    assert ended.returncode == 1, ended
    return ended.stderr


def codes(site: Site) -> Counter[str]:
    """Count the payments at the shop by the code of their method."""
    documents: list[dict[str, Any]] = list(site.shop.documents.values())
    return Counter(payment["method"]["code"] for document in documents for payment in document["payments"])


FLOWS: dict[Flow, tuple[str, ...]] = {resend_while_killed: KINDS}


def test_the_shop_has_each_order_with_the_corrected_code_and_was_sent_it_once_more(run_flow: RunFlow) -> None:
    site = run_flow(resend_while_killed)

    payments = site.results["before"]["wrong"]
    assert (site.results["before"], codes(site)) == ({"wrong": payments}, {"right": payments})
    puts: dict[str, list[str]] = {}
    for entry in site.shop.journal:
        puts.setdefault(entry.order_key, []).append(entry.result)
    assert puts == {f"order-{number}": ["created", "updated"] for number in range(ORDERS)}


def test_each_order_has_one_resend_and_the_command_one_record(run_flow: RunFlow) -> None:
    site = run_flow(resend_while_killed)

    assert [row["count"] for row in site.results["preview"]] == [ORDERS]
    url = site.config["store"]["url"]
    assert rows(url, "SELECT state, reason, count(*) FROM deliveries GROUP BY state, reason") == [
        ("done", "delivered", 2 * ORDERS)
    ]
    assert len(rows(url, "SELECT DISTINCT again_of FROM deliveries WHERE again_of IS NOT NULL")) == ORDERS
    assert rows(url, "SELECT command, changed FROM actions") == [("resend", ORDERS)]
    action = rows(url, "SELECT id FROM actions")[0][0]
    assert site.results["again"] == {"resent": 0, "action": action, "left_out": {}}
    assert f"norce-adapter deliveries resend --resume {action}" in site.results["told"]
