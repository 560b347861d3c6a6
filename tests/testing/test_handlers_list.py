"""`norce-adapter handlers list --conformance`, and the public names of the test kit."""

import json
import re
from typing import Any

import pytest
from click.testing import CliRunner

import adapter.testing
from adapter import cli
from adapter.cli import handlers
from adapter.routing import routes
from adapter.testing.bundled import RULES, JetshopConformance, LogConformance, PatchConformance
from tests import ROOT
from tests.testing.test_conformance import HandlerConformance, suite
from tests.testing.wrong import Export, KeepsTheEmail, LosesPatience

WRONG = suite(HandlerConformance, LosesPatience)
WAIVED = suite(HandlerConformance, KeepsTheEmail, waivers={"privacy": "the ERP knows the customer by e-mail"})


class Point:
    """An entry point of a package named `erp`."""

    dist = type("Package", (), {"name": "erp"})

    def __init__(self, name: str, loaded: Any) -> None:
        self.name = name
        self.loaded = loaded

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def listed(monkeypatch: pytest.MonkeyPatch, **suites: Any) -> tuple[int, dict[str, str]]:
    """Run the command with one handler for each suite; return its exit code, and the results by handler."""
    points = {
        routes.GROUP: [Point(name, Export) for name in (*suites, "untested")],
        handlers.CONFORMANCE_GROUP: [Point(name, each) for name, each in suites.items()],
    }
    monkeypatch.setattr(handlers, "entry_points", lambda group: points[group])
    result = CliRunner().invoke(cli.main, ["handlers", "list", "--conformance", "--output", "json"])
    return result.exit_code, {row["name"]: row["conformance"] for row in json.loads(result.stdout)}


def test_the_bundled_handlers_are_listed_with_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    code, results = listed(monkeypatch, log=LogConformance, rules=RULES, patch=PatchConformance)

    assert (code, results) == (
        0,
        {"log": "passes", "rules": "passes", "patch": "passes", "untested": "no conformance suite"},
    )


def test_failed_checks_end_the_command_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    code, results = listed(monkeypatch, wrong=WRONG, broken=ImportError("gone"), log=LogConformance)

    assert code == 1
    assert results["wrong"] == "fails: slow"
    assert results["broken"] == "fails: the suite cannot be run: ImportError"
    assert results["log"] == "passes"


def test_waivers_are_shown_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    code, results = listed(monkeypatch, waived=WAIVED)

    assert (code, results["waived"]) == (0, "passes; waived: privacy (the ERP knows the customer by e-mail)")


def test_every_bundled_handler_names_its_suite() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    groups = [
        re.findall(r"^(\S+) = ", project.partition(f'[project.entry-points."{group}"]\n')[2].partition("\n\n")[0], re.M)
        for group in (routes.GROUP, handlers.CONFORMANCE_GROUP)
    ]

    assert groups[0] == groups[1]
    assert JetshopConformance.checks.keys() == LogConformance.checks.keys()


def test_the_public_names_of_the_test_kit_are_those_of_the_changelog() -> None:
    ((names,),) = [re.findall(r"- `adapter\.testing` exports ([^.]+)\.", (ROOT / "CHANGELOG.md").read_text("utf-8"))]

    assert re.findall(r"`(\w+)`", names) == adapter.testing.__all__
    assert all(hasattr(adapter.testing, name) for name in adapter.testing.__all__)
