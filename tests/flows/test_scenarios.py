"""Scenarios of the sandbox, played against the running service: all on SQLite, and some on PostgreSQL.

`play` checks the promises of a scenario about Norce and the ledger. The tests check what arrived at the shop. All
scenarios of a store share one service; each has its own Norce at the same address.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from adapter import config as configuration
from adapter.callbacks.server import http_server, listen
from adapter.cli.simulate import service_at
from adapter.sandbox.scenarios import SCENARIOS, Shop, play
from tests import PATIENCE, ROOT
from tests.databases import KINDS, Server
from tests.flows.site import NORCE_TOKEN, ExternalServices, Service, Site, free_port

CONFIGURED = ROOT / "docs" / "scenarios.yaml"
ORDERS = 20  # of the burst
# Numbers of orders and deliveries of each scenario by final state.
ENDS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "declined-after-acceptance": ({"declined": 1}, {}),
    "two-merchants": ({"completed": 2}, {"delivered": 2}),
    "burst": ({"completed": ORDERS}, {"delivered": ORDERS}),
    "removed-order": ({"removed": 1}, {"rejected": 1}),
}


class Played(NamedTuple):
    summary: dict[str, Any]
    orders: list[dict[str, Any]]


class ScenarioSite:
    """A running service whose Norce listens on `port` during a scenario. It exports to the shop of the site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.port = free_port()
        documented = YAML(typ="safe").load(CONFIGURED)
        site.environ["NORCE_TOKEN"] = NORCE_TOKEN
        exporting = documented["routes"]["export-payment"] | {
            name: site.config["routes"]["export-payment"][name] for name in ("handler", "timeout", "retry", "settings")
        }
        own = {name: site.config[name] for name in ("server", "operations", "store", "senders")}
        norce = {"base_url": f"http://127.0.0.1:{self.port}/checkout"}
        site.config = documented | own | {"norce": norce}
        for name in ("order-rules", "cart-changed", "address-changed"):
            site.config["callbacks"][name]["deadline"] = "10s"
        site.config["routes"]["export-payment"] = exporting
        self.service: Service = site.start()
        config = configuration.load(site.write_config(), site.environ)
        self.service_under_test = service_at(self.service.address, config)

    def play(self, name: str, **settings: Any) -> Played:
        async def play_scenario() -> Played:
            shop = Shop(NORCE_TOKEN, self.service_under_test)
            shop.simulator.set_switches(
                validation_seconds=PATIENCE, hook_seconds=PATIENCE, notification_seconds=PATIENCE
            )
            async with shop, http_server(shop.simulator.app, listen("127.0.0.1", self.port)):
                return Played(await play(name, shop, **settings), shop.simulator.orders())

        return asyncio.run(play_scenario())

    def command(self, scenario: str, *more: str, token: str = NORCE_TOKEN) -> tuple[int, dict[str, Any], str]:
        arguments = ["--adapter", self.service.address, "--port", str(self.port), "--token", token, *more]
        result = self.site.run_command("simulate", "--scenario", scenario, *arguments)
        return result.returncode, json.loads(result.stdout or "{}"), result.stderr


@pytest.fixture(scope="module", params=KINDS)
def scenario_site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, external_services: ExternalServices
) -> Iterator[ScenarioSite]:
    server: Server | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    store_url = server.fresh() if server else None
    try:
        with Site(tmp_path_factory.mktemp("scenarios"), external_services, store_url) as site:
            yield ScenarioSite(site)
    finally:
        if server and store_url:
            server.drop(store_url)


@pytest.mark.parametrize(
    ("scenario_site", "name"),
    [("sqlite", name) for name in SCENARIOS] + [("postgresql", name) for name in ENDS],
    indirect=["scenario_site"],
)
def test_a_scenario_keeps_its_promises_and_every_completed_order_is_exported_once(
    scenario_site: ScenarioSite, name: str
) -> None:
    played = scenario_site.play(name, **({"orders": ORDERS} if name == "burst" else {}))

    orders, deliveries = ENDS.get(name, ({"completed": 1}, {"delivered": 1}))
    assert played.summary | {"orders": orders, "deliveries": deliveries, "unmet": None} == played.summary
    assert (played.summary["lost"], played.summary["doubled"]) == (0, 0)
    exported = {each["reference"]: scenario_site.site.shop.exports(each["reference"]) for each in played.orders}
    assert Counter(exported.values()) == Counter(int(each["state"]["currentStatus"] == "completed")
                                                 for each in played.orders)  # fmt: skip
    for order in played.orders:
        if exported[order["reference"]]:
            document = scenario_site.site.shop.documents[order["reference"]]
            assert document["totals"]["order"]["incVat"] == f"{order['total']['includingVat']:.2f}"
            assert document["source"]["merchant"] == order["merchant"]


def test_the_command_plays_a_scenario_and_prints_json(scenario_site: ScenarioSite) -> None:
    status, summary, _ = scenario_site.command("burst", "--orders", "3")

    assert (status, summary["unmet"], summary["orders"], summary["lost"]) == (0, None, {"completed": 3}, 0)


def test_the_command_fails_if_a_promise_is_broken(scenario_site: ScenarioSite) -> None:
    """Norce does not accept the token of the service, so the service cannot read the order and rejects it."""
    status, summary, said = scenario_site.command("happy-purchase", token="another")

    assert status == 1
    assert summary["unmet"].startswith("validate was answered 400")
    assert said == f"happy-purchase: {summary['unmet']}\n"
