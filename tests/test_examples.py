"""The example package: its entry points lead to classes, and its configuration is complete."""

import tomllib
from importlib.metadata import EntryPoint

from adapter.config import load
from adapter.routing.routes import GROUP, build
from tests import ROOT

ERP = ROOT / "examples" / "erp"
GROUPS = tomllib.loads((ERP / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
ENVIRONMENT = {"NORCE_TOKEN": "canary", "ERP_TOKEN": "canary", "NORCE_ADAPTER_URL_KEY": "canary" * 8}


def test_the_entry_points_of_the_example_lead_to_classes() -> None:
    loaded = [EntryPoint(name, value, group).load() for group, each in GROUPS.items() for name, value in each.items()]

    assert len(loaded) == 7
    assert all(isinstance(each, type) for each in loaded)


def test_the_configuration_of_the_example_is_complete() -> None:
    points = [EntryPoint(name, value, GROUP) for name, value in GROUPS[GROUP].items()]

    routes = build(load(ERP / "config.yaml", ENVIRONMENT), points)

    assert {route.handler_name for route in routes.all} == GROUPS[GROUP].keys()
    assert routes.warnings == ()
