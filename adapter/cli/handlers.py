"""The command `handlers list`."""

from importlib.metadata import entry_points
from typing import Any

import click

from adapter.cli.shared import list_output_option, print_rows
from adapter.routing import routes


@click.group("handlers")
def handlers_group() -> None:
    """List the handlers of installed packages."""


@handlers_group.command("list")
@list_output_option
def handlers_list(output: str) -> None:
    """List the installed handlers with their package, kind and description."""
    rows = []
    for point in sorted(entry_points(group=routes.GROUP), key=lambda each: each.name):
        row: dict[str, Any] = {"name": point.name, "from": point.dist.name if point.dist else None, "kind": None}
        try:
            handler = point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an import may fail in any way
            row |= {"says": f"cannot be imported: {type(error).__name__}"}
        else:
            is_class = isinstance(handler, type)
            fitting = (name for name, kind in routes.KINDS.items() if is_class and issubclass(handler, kind))
            row["kind"] = ", ".join(fitting) or "none"
            row["says"] = (handler.__doc__ or "").strip().partition("\n")[0]
        rows.append(row)
    print_rows(rows, output, nothing="no installed package has a handler")
