"""The layout of the packages: imports run downwards only, and every package has its layer."""

import ast
import configparser
from collections.abc import Iterator, Mapping

import pytest

from tests import ROOT

ADAPTER = ROOT / "adapter"


def packages() -> set[str]:
    """Return the names of the packages and modules directly below `adapter`."""
    folders = {path.parent.name for path in ADAPTER.glob("*/__init__.py")}
    return folders | {path.stem for path in ADAPTER.glob("*.py")} - {"__init__"}


def imported_names(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the full name of everything that a module of `package` imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            yield from (".".join(filter(None, (*module, alias.name))) for alias in node.names)


def imports_between_packages() -> dict[str, set[str]]:
    """Return the packages that each package imports. A package is the first component below `adapter`."""
    known = packages()
    imports: dict[str, set[str]] = {name: set() for name in known}
    for path in ADAPTER.rglob("*.py"):
        package = path.relative_to(ADAPTER).parts[0].removesuffix(".py")
        for name in imported_names(path.read_text("utf-8"), path.relative_to(ROOT).parent.parts):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == "adapter" and package in known and target in known - {package}:
                imports[package].add(target)
    return imports


def find_cycle(imports: Mapping[str, set[str]]) -> list[str]:
    """Return one cycle as a path that ends where it begins, or an empty list."""
    finished: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for target in sorted(imports[path[-1]] - finished):
            if target in path:
                return [*path[path.index(target) :], target]
            if cycle := search([*path, target]):
                return cycle
        finished.add(path[-1])
        return []

    return next((cycle for name in sorted(imports) if (cycle := search([name]))), [])


@pytest.mark.parametrize(
    ("imports", "cycle"),
    [
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}, ["b", "c", "d", "b"]),
    ],
    ids=["none", "three packages"],
)
def test_the_search_finds_a_cycle(imports: dict[str, set[str]], cycle: list[str]) -> None:
    assert find_cycle(imports) == cycle


def test_imports_inside_functions_and_relative_imports_are_seen() -> None:
    source = "import adapter.logs\ndef f():\n    from ..ledger import store\n    from . import lists\n"

    found = set(imported_names(source, ("adapter", "cli")))

    assert found == {"adapter.logs", "adapter.ledger.store", "adapter.cli.lists"}


def test_packages_import_one_another_in_one_direction() -> None:
    imports = imports_between_packages()

    assert sum(map(len, imports.values())) > len(imports)  # the imports were found at all
    assert " → ".join(find_cycle(imports)) == ""


def test_every_package_has_a_layer() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:layers"]["layers"]

    assert sorted(layers.replace("|", " ").split()) == sorted(packages())
