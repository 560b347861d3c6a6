"""`new`: a package that installs, whose tests pass, and that overwrites nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import FAILED, OK, USAGE, run

INSTALL = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_new_package_installs_and_its_tests_pass(tmp_path: Path) -> None:
    created = run("new", "my-erp2")
    package, site = tmp_path / "my-erp2", tmp_path / "site"
    environ = {**os.environ, "PYTHONPATH": str(site)}

    def python(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, cwd=package, env=environ, capture_output=True, text=True, check=False)

    installed = python("pip", *INSTALL, "--target", site, ".")
    tested = python("pytest", "-q", "-p", "no:cacheprovider", "tests")

    assert created.exit_code == OK
    assert installed.returncode == 0, installed.stderr
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout
    assert "skipped" not in tested.stdout


def test_everything_has_the_name_of_the_package(tmp_path: Path) -> None:
    run("new", "my-erp2")

    files = [path for path in (tmp_path / "my-erp2").rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(tmp_path / "my-erp2")) for path in files)
    assert names == [
        "README.md", "config.yaml", "my_erp2/__init__.py", "my_erp2/conformance.py", "my_erp2/stand_in.py",
        "order.json", "pyproject.toml", "sandbox-secret", "tests/test_handler.py",
    ]  # fmt: skip
    assert not [path for path in files for old in ("shop-erp", "shop_erp", "ShopErp") if old in path.read_text("utf-8")]
    assert (
        "class MyErp2(NotificationHandler[MyErp2Settings]):" in (tmp_path / "my-erp2/my_erp2/__init__.py").read_text()
    )
    assert json.loads((tmp_path / "my-erp2/order.json").read_text("utf-8"))["id"]
    assert (tmp_path / "my-erp2/sandbox-secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Shop-Erp", "use small letters and digits"),
        ("shop_erp", "use small letters and digits"),
        ("shop--erp", "use small letters and digits"),
        ("2shop", "use small letters and digits"),
        ("../shop", "use small letters and digits"),
        ("", "use small letters and digits"),
        ("sh\u00f6p", "use small letters and digits"),
        ("class", "Python has a word or a module of this name"),
        ("json", "Python has a word or a module of this name"),
        ("jetshop", "there is a handler of this name"),
        ("adapter", "a module of this name is installed"),
        ("jsonschema-rs", "a module of this name is installed"),
    ],
)
def test_a_name_that_no_package_can_have_is_refused(tmp_path: Path, name: str, says: str) -> None:
    result = run("new", name)

    assert (result.exit_code, result.stderr.count("\n")) == (USAGE, 1)
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "my-erp2").mkdir()

    result = run("new", "my-erp2")

    assert result.exit_code == FAILED
    assert result.stderr == "my-erp2 exists already; give another name, or move it away\n"
    assert list((tmp_path / "my-erp2").iterdir()) == []
