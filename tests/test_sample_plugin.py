"""A plugin in a package of its own: built, installed, and found by its entry points."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests import ROOT
from tests.flows.site import (
    ExternalServices,
    Site,
    free_port,
    make_order,
    wait_until,
)


class Erp:
    """A small ERP that stores orders and shows them."""

    def __init__(self) -> None:
        self.orders: dict[str, dict[str, Any]] = {}
        self.puts = 0
        self.app = Starlette(routes=[Route("/api/orders/{order_id}", self._order, methods=["GET", "PUT"])])

    async def _order(self, request: Request) -> Response:
        order_id = request.path_params["order_id"]
        if request.method == "PUT":
            self.puts += 1
            self.orders[order_id] = await request.json()
        if order_id not in self.orders:
            return Response(status_code=404)
        return JSONResponse({"number": f"ERP-{order_id}"})


@pytest.fixture(scope="module")
def sample_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sample plugin and install it in a folder. PYTHONPATH makes its entry points visible."""
    folder = tmp_path_factory.mktemp("sample-plugin")
    source, target = folder / "source", folder / "installed"
    shutil.copytree(ROOT / "tests" / "sample_plugin", source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def external_services() -> Iterator[ExternalServices]:
    with ExternalServices() as external_services:
        yield external_services


@pytest.fixture
def site(tmp_path: Path, external_services: ExternalServices, sample_plugin: Path) -> Iterator[Site]:
    with Site(tmp_path, external_services) as site:
        site.environ["PYTHONPATH"] = str(sample_plugin)
        site.config["routes"] = {
            "export-to-erp": {
                "callback": "order-status",
                "handler": "sample-erp",
                "settings": {"url": f"http://127.0.0.1:{free_port()}", "company": 7},
            }
        }
        yield site


def test_installed_handlers_are_listed_with_their_package(site: Site) -> None:
    listed = site.run_command("handlers", "list", "--output", "json")

    assert listed.returncode == 0
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["sample-erp"] == {
        "name": "sample-erp",
        "from": "norce-adapter-sample",
        "kind": "notification",
        "says": "Exports orders to an ERP, one PUT each.",
    }
    assert rows["sample-sleeping-check"]["kind"] == "validation"
    assert {row["from"] for row in rows.values()} == {"norce-adapter", "norce-adapter-sample"}


def test_a_handler_without_its_package_is_a_problem(site: Site) -> None:
    del site.environ["PYTHONPATH"]

    checked = site.run_command("check")

    assert checked.returncode == 4
    assert "routes.export-to-erp.handler: no installed handler has this name" in checked.stderr


def test_settings_of_a_plugin_are_checked_at_their_lines(site: Site) -> None:
    settings = site.config["routes"]["export-to-erp"]["settings"]
    settings |= {"url": "ftp://erp.example", "company": 0, "colour": "blue"}
    lines = site.write_config().read_text().splitlines()

    checked = site.run_command("check")

    assert checked.returncode == 4
    *problems, last = checked.stderr.splitlines()
    assert last == "3 problems in the configuration; nothing was started"
    for problem, written in zip(problems, ('"url": "ftp', '"company": 0', '"colour"'), strict=True):
        (line,) = (number for number, text in enumerate(lines, 1) if written in text)
        key = written.split('"')[1]
        assert problem.startswith(f"{site.folder / 'config.yaml'}:{line}: routes.export-to-erp.settings.{key}: ")


def test_correct_settings_pass(site: Site) -> None:
    del site.config["callbacks"]["order-rules"]  # it has no route

    checked = site.run_command("check")

    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.endswith("1 callbacks, 1 routes; no problems\n")


def test_the_export_of_a_plugin_arrives(site: Site, external_services: ExternalServices) -> None:
    erp = Erp()
    site.config["routes"]["export-to-erp"]["settings"]["url"] = f"{external_services.add(erp.app)}/api"
    service = site.start()

    assert site.notify(service, make_order("for-the-erp")) == 200

    ended = site.wait_for_end("for-the-erp")
    assert (ended["reason"], ended["reference"]) == ("delivered", "ERP-for-the-erp")
    assert erp.orders == {"for-the-erp": {"company": 7, "reference": "for-the-erp", "currency": "SEK"}}
    assert erp.puts == 1


def test_a_destination_that_is_down_is_a_retry(site: Site) -> None:
    service = site.start()

    site.notify(service, make_order("for-nobody"))

    retried = wait_until(lambda: service.logged("delivery_retried", order_id="for-nobody"))
    assert (retried[0]["outcome"], retried[0]["code"]) == ("retry", "destination-unreachable")
