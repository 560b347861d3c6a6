"""`why` beside a running service: its answers follow an order from the checkout to the shop."""

import json
from typing import Any

import pytest

from adapter.sandbox.jetshop_stand_in import Fault
from tests.cli.test_cli import NOTHING_MATCHED, OK, run
from tests.flows.site import COMPLETED, Site, make_order, wait_until

pytestmark = pytest.mark.usefixtures("store_url", "logging_as_before")

BY = ("--why", "the shop moves", "--who", "anna@duty")


def ask(site: Site, asked: str) -> dict[str, Any]:
    result = run("why", asked, "--output", "json", config=site.write_config(), env=site.environ)
    (answer,) = json.loads(result.stdout)
    assert result.exit_code == (OK if answer["exported"] else NOTHING_MATCHED)
    return dict(answer)


def test_the_answer_follows_an_order_from_the_checkout_to_the_shop(site: Site) -> None:
    site.config["operations"]["socket"] = str(site.folder / "o.sock")
    of_channel = ("--merchant", "fjallboden", "--channel", "se-b2c")
    cases = []

    def note(order_id: str = "bought") -> str:
        answer = ask(site, order_id)
        cases.append(answer["case"])
        return str(answer["paragraph"])

    site.norce.put(make_order("bought", state=COMPLETED["state"] | {"currentStatus": "checkout"}, notifications=[]))
    service = site.start()
    note()
    assert site.run_command("register", "bought", *of_channel).returncode == OK
    note()
    assert site.run_command("queues", "pause", "export-payment", *of_channel, *BY).returncode == OK
    site.notify(service, site.norce.order("bought") | {"state": COMPLETED["state"]})
    paused = note()
    assert service.stop() == 0
    held = site.start("--hold")
    assert site.run_command("queues", "resume", "export-payment", *of_channel, *BY).returncode == OK
    note()
    assert held.stop() == 0
    site.shop.script("bought", Fault(status=422))
    service = site.start()
    site.wait_for_end("bought")
    note()
    letter = str(site.delivery("bought")["id"])
    assert site.run_command("deliveries", "retry", letter, *BY).returncode == OK
    wait_until(lambda: site.delivery("bought")["state"] == "done")
    done = note()

    assert cases == [
        "never-registered",
        "state-not-reached",
        "paused-by-person",
        "held",
        "rejected",
        "done",
    ]
    assert "one of us has paused since" in paused
    assert f"with the number {site.delivery('bought')['reference']}." in done
