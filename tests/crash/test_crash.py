"""A little of `make crash`, on both stores; and that the harness finds what it is there to find."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT
from tests.crash.harness import FROZEN, RANDOM, RANDOM_START
from tests.crash.points import POINTS

KILLS = 6


def crash(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the last line of stdout."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.crash", *arguments],
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_nothing_acknowledged_is_lost_or_done_twice(store: str) -> None:
    code, counts = crash("--kills", f"{KILLS}", "--a-round", "3", "--store", store, "--seed", "20261124")

    assert (code, counts["lost"], counts["doubled"]) == (0, 0, 0), counts
    assert (counts["kills"], counts["rounds"], counts["by_store"]) == (KILLS, 2, {store: KILLS})
    assert counts["acknowledged"] > 0
    assert counts["shipped"] >= counts["acknowledged"]


@pytest.mark.parametrize(
    ("mistake", "point", "what"),
    [
        ("answers-before-it-stores", "accept-before-commit", "lost"),
        ("forgets-to-look", "handler-after-effect", "doubled"),
    ],
)
def test_a_mistake_in_the_service_is_found(mistake: str, point: str, what: str) -> None:
    options = ("--kills", "3", "--store", "sqlite", "--no-outages", "--seed", "1")
    code, counts = crash(*options, "--mistake", mistake, "--point", point)

    assert code == 1
    assert counts[what] > 0
    assert counts["by_point"] == {point: 3}


def test_the_documents_say_what_every_point_means() -> None:
    said = (ROOT / "docs" / "reliability.md").read_text("utf-8")

    for point in (*POINTS, FROZEN, RANDOM, RANDOM_START):
        assert f"| `{point}` |" in said
