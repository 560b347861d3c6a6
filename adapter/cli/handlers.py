"""The command `handlers list`."""

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from adapter.cli.shared import FAILED, end, list_output_option, print_rows
from adapter.routing import routes

CONFORMANCE_GROUP = "norce_adapter.conformance"


@click.group("handlers")
def handlers_group() -> None:
    """List the handlers of installed packages."""


@handlers_group.command("list")
@click.option("--conformance", is_flag=True, help="Run the conformance suites that the packages name, offline.")
@list_output_option
def handlers_list(output: str, conformance: bool) -> None:
    """List the installed handlers with their package, kind and description.

    With --conformance, the command exits with 1 if a handler fails a check.
    """
    rows = []
    suites = {(point.name, _package(point)): point for point in entry_points(group=CONFORMANCE_GROUP)}
    for point in sorted(entry_points(group=routes.GROUP), key=lambda each: each.name):
        row: dict[str, Any] = {"name": point.name, "from": _package(point), "kind": None}
        try:
            handler = point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an import may fail in any way
            row |= {"says": f"cannot be imported: {type(error).__name__}"}
        else:
            is_class = isinstance(handler, type)
            fitting = (name for name, kind in routes.KINDS.items() if is_class and issubclass(handler, kind))
            row["kind"] = ", ".join(fitting) or "none"
            row["says"] = (handler.__doc__ or "").strip().partition("\n")[0]
        if conformance:
            row["conformance"] = _conformance(suites.get((point.name, row["from"])))
        rows.append(row)
    print_rows(rows, output, nothing="no installed package has a handler")
    failing = [row["name"] for row in rows if row.get("conformance", "").startswith("fail")]
    if failing:
        end(FAILED, f"these handlers fail their conformance suite: {', '.join(failing)}")


def _package(point: EntryPoint) -> str | None:
    return point.dist.name if point.dist else None


def _conformance(point: EntryPoint | None) -> str:
    """Run the suite, or the suites, at an entry point, and return the result in words."""
    if point is None:
        return "no conformance suite"
    try:
        loaded = point.load()
        suites = loaded if isinstance(loaded, Collection) else [loaded]
        results = [result for suite in suites for result in suite.results()]
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an import may fail in any way
        return f"fails: the suite cannot be run: {type(error).__name__}"
    failed = [each.name for each in results if each.failure is not None and each.waiver is None]
    waived = [f"; waived: {each.name} ({each.waiver})" for each in results if each.waiver is not None]
    return (f"fails: {', '.join(failed)}" if failed else "passes") + "".join(waived)
