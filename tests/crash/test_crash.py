"""A small crash test on both stores, and mistakes that the harness must find."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT

KILLS = 2


def run_crash_test(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the crash test. Return its exit code and its result."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.crash", *arguments],
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_nothing_acknowledged_is_lost_or_done_twice(store: str) -> None:
    code, counts = run_crash_test("--kills", f"{KILLS}", "--a-round", "2", "--store", store, "--seed", "20261124")

    assert (code, counts["lost"], counts["doubled"]) == (0, 0, 0), counts
    assert (counts["kills"], counts["rounds"], counts["by_store"]) == (KILLS, 1, {store: KILLS})
    assert counts["acknowledged"] > 0
    assert counts["shipped"] >= counts["acknowledged"]


@pytest.mark.parametrize(
    ("mistake", "point", "count"),
    [
        ("answers-before-it-stores", "accept-before-commit", "lost"),
        ("skips-the-lookup", "handler-after-effect", "doubled"),
    ],
)
def test_a_mistake_in_the_service_is_found(mistake: str, point: str, count: str) -> None:
    options = ("--kills", "2", "--store", "sqlite", "--no-outages", "--seed", "1")
    code, counts = run_crash_test(*options, "--mistake", mistake, "--point", point)

    assert code == 1
    assert counts[count] > 0
    assert counts["by_point"] == {point: 2}


def test_the_documentation_refers_to_the_points() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")

    assert "(../tests/crash/points.py)" in text
