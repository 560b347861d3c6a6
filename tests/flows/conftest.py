"""A site for each flow, and what all flows share: the servers that the service calls, and the sample plugin.

A flow runs on SQLite, and on PostgreSQL as well if it uses `store_url`. Flows about doubt, restarts, shutdown and the
destination do: there the stores differ (the lanes of a dead process are free at once, or when its lease has ended).

Flows that mostly wait run at the same time. A module names them in FLOWS, with their stores, and its tests examine the
sites after the flows have ended.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.databases import KINDS, Server
from tests.flows.site import ExternalServices, Flow, RunFlow, RunFlowOn, Site, install_sample_plugin

FLOWS_AT_ONCE = 8


@pytest.fixture(scope="session")
def external_services() -> Iterator[ExternalServices]:
    with ExternalServices() as external_services:
        yield external_services


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path, external_services: ExternalServices) -> Iterator[Site]:
    store_url = request.getfixturevalue("store_url") if "store_url" in request.fixturenames else None
    with Site(tmp_path, external_services, store_url) as site:
        yield site


@pytest.fixture(scope="session")
def sample_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_sample_plugin(tmp_path_factory.mktemp("sample-plugin"))


@pytest.fixture(scope="module")
def run_flow_on(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    external_services: ExternalServices,
    sample_plugin: Path,
    postgres: Server,
) -> Iterator[RunFlowOn]:
    """Start all flows of the module. The function waits for one of them and returns its site."""
    with ExitStack() as stack, ThreadPoolExecutor(FLOWS_AT_ONCE) as pool:
        sites: dict[tuple[Flow, str], Site] = {}
        ends: dict[tuple[Flow, str], Future[None]] = {}
        for flow, kinds in request.module.FLOWS.items():
            for kind in kinds:
                folder = tmp_path_factory.mktemp(flow.__name__)
                site = Site(folder, external_services, postgres.fresh() if kind == "postgresql" else None)
                site.environ["PYTHONPATH"] = str(sample_plugin)
                sites[flow, kind] = stack.enter_context(site)
                ends[flow, kind] = pool.submit(flow, site)

        def run_flow(flow: Flow, kind: str) -> Site:
            ends[flow, kind].result()
            return sites[flow, kind]

        yield run_flow


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run_flow(run_flow_on: RunFlowOn, kind: str) -> RunFlow:
    """Return the site after a flow, on SQLite and on PostgreSQL."""
    return lambda flow: run_flow_on(flow, kind)
