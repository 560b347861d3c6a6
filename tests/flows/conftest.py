"""A stage for each story, and what all stories share: whom the service calls, and the sample plugin."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stage import Neighbours, Stage, install_sample_plugin


@pytest.fixture(scope="session")
def neighbours() -> Iterator[Neighbours]:
    with Neighbours() as neighbours:
        yield neighbours


@pytest.fixture
def stage(tmp_path: Path, neighbours: Neighbours) -> Iterator[Stage]:
    with Stage(tmp_path, neighbours) as stage:
        yield stage


@pytest.fixture(scope="session")
def sample_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_sample_plugin(tmp_path_factory.mktemp("sample-plugin"))
