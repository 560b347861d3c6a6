"""What the commands share: options, exit codes, how rows are printed, and the way to the ledger."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from adapter import config as configuration
from adapter import logs
from adapter.config import Config, ConfigurationInvalid
from adapter.ledger.databases import database_at
from adapter.ledger.store import StoreInUse, StoreMissing, StoreUnavailable, open_for_reading
from adapter.moments import to_milliseconds
from adapter.orders import instant
from adapter.routing import routes

FAILED, USAGE, NOTHING_MATCHED, CONFIGURATION, STORE = 1, 2, 3, 4, 5
WIDE = 1000  # columns, where nobody's terminal says how many: nothing is cut off in a pipe

Decorated = Callable[..., Any]


class _Text(click.ParamType[str]):
    """An argument that a database can take: a terminal may send what is no text."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail("it is not valid UTF-8", parameter, context)
        return str(value)


TEXT = _Text()
config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    envvar="NORCE_ADAPTER_CONFIG",
    default="config.yaml",
    show_default=True,
    show_envvar=True,
    help="The configuration file.",
)
output_option = click.option(
    "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="For people or programs."
)
route_option = click.option("--route", type=TEXT, help="Only this route's.")
order_option = click.option("--order", "order_id", type=TEXT, help="Only this order's.")
limit_option = click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))


def options(*given: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Several options as one decorator, in the order in which the help shows them."""

    def decorate(function: Decorated) -> Decorated:
        for each in reversed(given):
            function = each(function)
        return function

    return decorate


look_options = options(output_option, config_option)
list_options = options(limit_option, look_options)


def as_moment(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    moment = instant(value)
    if moment is None:
        raise click.BadParameter("must be a date or a moment, such as 2026-02-03 or 2026-02-03T12:00:00Z")
    return to_milliseconds(moment)


def configured(path: Path) -> tuple[Config, routes.Routes]:
    try:
        config = configuration.load(path, os.environ)
        return config, routes.build(config)
    except ConfigurationInvalid as error:
        _end_with_problems(error)


def _end_with_problems(error: ConfigurationInvalid) -> NoReturn:
    for problem in error.problems:
        click.echo(str(problem), err=True)
    count = len(error.problems)
    end(CONFIGURATION, f"{count} problem{'' if count == 1 else 's'} in the configuration; nothing was started")


def end(code: int, message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)


def loaded(path: Path) -> Config:
    """The configuration alone: what looks at the ledger needs no handlers, and works where one of them is broken."""
    try:
        return configuration.load(path, os.environ)
    except ConfigurationInvalid as error:
        _end_with_problems(error)


@contextlib.contextmanager
def reading(config: Config) -> Iterator[Connection]:
    """A connection that only reads the ledger. Whatever it cannot do ends the command, in one line."""
    where = database_at(config.store.url).location
    try:
        with open_for_reading(config.store.url).connect() as connection:
            yield connection
    except (StoreMissing, StoreUnavailable) as error:
        end(STORE, one_line(error))
    except DBAPIError as error:
        is_old = any(words in str(error.orig) for words in ("no such table", "no such column", "does not exist"))
        remedy = "; its tables may be older than this version: norce-adapter store migrate" if is_old else ""
        end(STORE, f"cannot read {where}: {one_line(error.orig)}{remedy}")


def operations_port(config: Config) -> tuple[str, dict[bytes, bytes]]:
    """Where a running service takes commands, and what they have to carry."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.operations.host, config.operations.host)  # noqa: S104
    token = config.operations.token
    headers = {b"authorization": b"Bearer " + token.reveal().encode()} if token else {}
    return f"{f'[{host}]' if ':' in host else host}:{config.operations.port}", headers


def check_done(authority: str, status: int, said: Any) -> None:
    """Ends where the service did not do what it was asked for."""
    if status != 200:
        message = said.get("message") if isinstance(said, dict) else None
        code = STORE if status == 503 else FAILED
        end(code, f"{authority} answered {status}: {printable(message or 'no message')}")


@contextlib.contextmanager
def opening(config: Config) -> Iterator[None]:
    """Around work on the store by ourselves, where no service runs. Whatever it cannot do ends the command."""
    logs.configure(level=logs.WARNING)
    try:
        database_at(config.store.url).check_exists()
        yield
    except StoreInUse as error:
        address = f"{config.operations.host}:{config.operations.port}"
        end(STORE, f"{error}, or have it answer at its operations port: nothing does at {address}")
    except (StoreMissing, StoreUnavailable) as error:
        end(STORE, one_line(error))


def print_rows(rows: list[dict[str, Any]], output: str, columns: tuple[str, ...] | None = None) -> None:
    if output == "json":
        click.echo(json.dumps(rows, ensure_ascii=False))
    elif rows:
        names = columns or tuple(rows[0])
        table = Table(*names, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text("" if row[name] is None else printable(row[name])) for name in names))
        Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(table)
    if not rows:
        sys.exit(NOTHING_MATCHED)


def printable(value: Any) -> str:
    """For a terminal: what Norce or a handler has sent must not move the cursor."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(value))


def one_line(error: object) -> str:
    """A message of a database's, which likes to have several."""
    return " ".join(str(error).split())
