"""
A stage for each story, and what all stories share: whom the service calls, and the sample plugin.

A story runs on SQLite, and on PostgreSQL as well where it asks for `store_url` too: those about doubt, restarts,
shutdown and the destination do, for there the two stores differ (a dead process's lanes are free at once, or when its
lease has ended). What blocks, what a repeat is and how a start fails is decided before any database is asked.

Stories that mostly wait are told at the same time: their modules name them in STORIES, with the stores they are told
on, and the tests look at how they ended.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.databases import KINDS, Server
from tests.flows.stage import Everywhere, Neighbours, Stage, Story, Told, install_sample_plugin

AT_THE_SAME_TIME = 8


@pytest.fixture(scope="session")
def neighbours() -> Iterator[Neighbours]:
    with Neighbours() as neighbours:
        yield neighbours


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path, neighbours: Neighbours) -> Iterator[Stage]:
    store_url = request.getfixturevalue("store_url") if "store_url" in request.fixturenames else None
    with Stage(tmp_path, neighbours, store_url) as stage:
        yield stage


@pytest.fixture(scope="session")
def sample_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_sample_plugin(tmp_path_factory.mktemp("sample-plugin"))


@pytest.fixture(scope="session")
def told_everywhere(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    neighbours: Neighbours,
    sample_plugin: Path,
    postgres: Server,
) -> Iterator[Everywhere]:
    """The stage of a story on a store, after the story. All begin when the first is asked for."""
    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    with ExitStack() as stack, ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:
        stages: dict[tuple[Story, str], Stage] = {}
        ends: dict[tuple[Story, str], Future[None]] = {}
        for module in sorted(modules, key=lambda module: str(module.__name__)):
            for story, kinds in getattr(module, "STORIES", {}).items():
                for kind in kinds:
                    folder = tmp_path_factory.mktemp(story.__name__)
                    stage = Stage(folder, neighbours, postgres.fresh() if kind == "postgresql" else None)
                    stage.environ["PYTHONPATH"] = str(sample_plugin)
                    stages[story, kind] = stack.enter_context(stage)
                    ends[story, kind] = pool.submit(story, stage)

        def told(story: Story, kind: str) -> Stage:
            ends[story, kind].result()
            return stages[story, kind]

        yield told


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def told(told_everywhere: Everywhere, kind: str) -> Told:
    """The stage of a story, after the story: on SQLite, and on PostgreSQL."""
    return lambda story: told_everywhere(story, kind)
