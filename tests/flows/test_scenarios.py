"""
The purchases of a shop, against the running service on both stores: what each scenario promises of Norce and of the
ledger (`play` fails it otherwise), and here what arrived at the shop.

One service per store for all of them, and for each scenario a Norce of its own at the same address.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from adapter import config as configuration
from adapter.callbacks.server import listen, served
from adapter.cli.simulate import adapter_at
from adapter.sandbox.scenarios import SCENARIOS, Adapter, Shop, play
from tests import ROOT
from tests.databases import KINDS, Server
from tests.flows.stage import NORCE_TOKEN, Neighbours, Service, Stage, free_port

CONFIGURED = ROOT / "docs" / "scenarios.yaml"
ORDERS = 200  # of the burst
# How the orders and the deliveries of each scenario end.
ENDS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "declined-after-acceptance": ({"declined": 1}, {}),
    "two-merchants": ({"completed": 2}, {"delivered": 2}),
    "burst": ({"completed": ORDERS}, {"delivered": ORDERS}),
    "removed-order": ({"removed": 1}, {"rejected": 1}),
}


class Played(NamedTuple):
    summary: dict[str, Any]
    orders: list[dict[str, Any]]


class Theatre:
    """A running service that has a Norce at `port`, whenever there is one, and exports to the stage's shop."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.port = free_port()
        documented = YAML(typ="safe").load(CONFIGURED)
        stage.environ["NORCE_TOKEN"] = NORCE_TOKEN
        exporting = documented["routes"]["export-payment"] | {
            name: stage.config["routes"]["export-payment"][name] for name in ("handler", "timeout", "retry", "settings")
        }
        own = {name: stage.config[name] for name in ("server", "operations", "store", "senders")}
        norce = {"base_url": f"http://127.0.0.1:{self.port}/checkout"}
        stage.config = documented | own | {"norce": norce}
        stage.config["routes"]["export-payment"] = exporting
        self.service: Service = stage.start()
        self.adapter: Adapter = adapter_at(self.service.address, configuration.load(stage.write(), stage.environ))

    def plays(self, name: str, **settings: Any) -> Played:
        async def on_stage() -> Played:
            shop = Shop(NORCE_TOKEN, self.adapter)
            async with shop, served(shop.simulator.app, listen("127.0.0.1", self.port)):
                return Played(await play(name, shop, **settings), shop.simulator.orders())

        return asyncio.run(on_stage())

    def command(self, scenario: str, *more: str, token: str = NORCE_TOKEN) -> tuple[int, dict[str, Any], str]:
        arguments = ["--adapter", self.service.address, "--port", str(self.port), "--token", token, *more]
        result = self.stage.command("simulate", "--scenario", scenario, *arguments)
        return result.returncode, json.loads(result.stdout or "{}"), result.stderr


@pytest.fixture(scope="module", params=KINDS)
def theatre(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, neighbours: Neighbours
) -> Iterator[Theatre]:
    server: Server | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    store_url = server.fresh() if server else None
    try:
        with Stage(tmp_path_factory.mktemp("scenarios"), neighbours, store_url) as stage:
            yield Theatre(stage)
    finally:
        if server and store_url:
            server.drop(store_url)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_ends_as_it_promises_and_every_completed_order_is_exported_once(theatre: Theatre, name: str) -> None:
    played = theatre.plays(name, **({"orders": ORDERS} if name == "burst" else {}))

    orders, deliveries = ENDS.get(name, ({"completed": 1}, {"delivered": 1}))
    assert played.summary | {"orders": orders, "deliveries": deliveries, "unmet": None} == played.summary
    assert (played.summary["lost"], played.summary["doubled"]) == (0, 0)
    exported = {each["reference"]: theatre.stage.shop.exports(each["reference"]) for each in played.orders}
    assert Counter(exported.values()) == Counter(int(each["state"]["currentStatus"] == "completed")
                                                 for each in played.orders)  # fmt: skip
    for order in played.orders:
        if exported[order["reference"]]:
            document = theatre.stage.shop.documents[order["reference"]]
            assert document["totals"]["order"]["incVat"] == f"{order['total']['includingVat']:.2f}"
            assert document["source"]["merchant"] == order["merchant"]


def test_the_command_plays_one_and_tells_in_json(theatre: Theatre) -> None:
    status, summary, _ = theatre.command("burst", "--orders", "3")

    assert (status, summary["unmet"], summary["orders"], summary["lost"]) == (0, None, {"completed": 3}, 0)
    assert summary["peak_memory_mib"] > 10


def test_the_command_fails_where_something_is_not_as_promised(theatre: Theatre) -> None:
    """The service cannot read orders of a Norce that does not take its token, and rejects what it cannot decide."""
    status, summary, said = theatre.command("happy-purchase", token="another")

    assert status == 1
    assert summary["unmet"].startswith("validate was answered 400")
    assert said == f"happy-purchase: {summary['unmet']}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--scenario", "happy-purchase", "--orders", "3"], "--orders is for the scenario burst"),
        (["--orders", "3"], "are for a --scenario"),
        (["--scenario", "sad-purchase"], "'sad-purchase' is not one of"),
    ],
)
def test_what_makes_no_sense_together_is_refused(theatre: Theatre, words: list[str], says: str) -> None:
    result = theatre.stage.command("simulate", *words)

    assert result.returncode == 2
    assert says in result.stderr
