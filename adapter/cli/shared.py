"""Options, exit codes, output and access to the ledger that several commands share."""

import contextlib
import csv
import getpass
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from adapter import config as configuration
from adapter.config import Config, ConfigurationInvalid
from adapter.config.convert import duration_of
from adapter.identifiers import Channel
from adapter.moments import to_milliseconds
from adapter.orders import instant

if TYPE_CHECKING:
    import asyncio

    from rich.progress import Progress
    from sqlalchemy import Connection

    from adapter.routing.routes import Routes

FAILED, USAGE, NOTHING_MATCHED, CONFIGURATION, STORE = 1, 2, 3, 4, 5
SENTENCES = frozenset(
    {"codes", "conformance", "matching", "message", "reason", "says", "value", "why"}
)  # columns that may be folded
LEAST_WIDTH = 24  # of a folded column
FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are full-width

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Text(click.ParamType[str]):
    """A text that a database can take: the bytes on a command line need not be valid UTF-8."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail("it is not valid UTF-8", parameter, context)
        return str(value)


def options(*decorators: Decorator) -> Decorator:
    """Combine options into one decorator. The help shows them in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def current_user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a number that has no name
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


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
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table for people, or JSON for programs.",
)
channel_options = options(
    click.option("--merchant", type=TEXT, help="Only of this merchant."),
    click.option("--channel", type=TEXT, help="Only of this channel."),
)
who_option = click.option("--who", type=TEXT, default=current_user, help="Your name; by default your user and host.")
author_options = options(
    click.option("--why", type=TEXT, required=True, help="Your reason. It is recorded."), who_option
)
rate_option = click.option(
    "--rate", type=click.IntRange(1, 100_000), help="Largest number per second; by default no limit."
)
list_output_option = click.option(
    "--output",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="A table for people, or JSON or CSV with all columns for programs.",
)
route_option = click.option("--route", type=TEXT, help="Only of this route.")
order_options = options(
    click.option(
        "--order", "order_id", type=TEXT, help="Only of this order; six characters or more may be the beginning of ids."
    ),
    click.option(
        "--reference", type=TEXT, help="Only of orders with this reference: their own, or a destination's number."
    ),
)
limit_option = click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(1, 100_000), help="The largest number of rows."
)
read_options = options(output_option, config_option)
whole_list_options = options(list_output_option, config_option)
list_options = options(limit_option, whole_list_options)
service_options = options(
    click.option(
        "--to", metavar="URL", help="The operations port of a service on another host, such as http://10.0.0.5:8081."
    ),
    click.option(
        "--token",
        envvar="NORCE_ADAPTER_OPERATIONS_TOKEN",
        show_envvar=True,
        help="The operations.token of that service. Prefer the variable: other users of this host can see an option.",
    ),
    config_option,
)


def since_option(what: str) -> Decorator:
    forms = "such as 1h (ago), 02:10, a date or a moment; UTC by default"
    return click.option(
        "--since", callback=parse_moment, metavar="TIME", help=f"Only {what} at this time or later, {forms}."
    )


def time_options(what: str) -> Decorator:
    until = click.option("--until", callback=parse_moment, metavar="TIME", help=f"Only {what} before this time.")
    return options(since_option(what), until)


def parse_moment(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """Convert the text of an option to milliseconds."""
    if value is None:
        return None
    moment = moment_in(value, datetime.now(UTC))
    if moment is None:
        raise click.BadParameter("must be such as 1h (ago), 02:10, 2026-02-03 or 2026-02-03T12:00:00Z")
    return to_milliseconds(moment)


def moment_in(text: str, now: datetime) -> datetime | None:
    """Return the moment that a text names, or None. A text without a zone is in UTC.

    Args:
        text: A duration before now (`1h`), a time within the last day (`02:10`), a date or a moment.
        now: The present moment, in UTC.
    """
    if ":" in text and (moment := instant(f"{now.date()}T{text}")) is not None:
        while moment > now:
            moment -= timedelta(days=1)
        return moment
    with contextlib.suppress(ValueError, OverflowError):
        return now - duration_of(text)
    return instant(text)


def load_config_and_routes(path: Path) -> tuple[Config, "Routes"]:
    """Load the configuration and the handlers, or end with every problem."""
    config = load_config(path)
    return config, load_routes(config)


def load_routes(config: Config) -> "Routes":
    """Load the handlers, or end with every problem."""
    from adapter.routing import routes

    try:
        return routes.build(config)
    except ConfigurationInvalid as error:
        end_with_problems(error)


def end_with_problems(error: ConfigurationInvalid) -> NoReturn:
    count = len(error.problems)
    summary = f"{count} problem{'' if count == 1 else 's'} in the configuration; nothing was started"
    end(CONFIGURATION, "\n".join([*map(str, error.problems), summary]))


def end(code: int, message: str) -> NoReturn:
    with contextlib.suppress(OSError):  # the exit code counts if standard error takes nothing
        click.echo(_encodable(message), err=True)
    sys.exit(code)


def load_config(path: Path) -> Config:
    """Load the configuration, or end with every problem. It does not import the handlers."""
    try:
        return configuration.load(path, os.environ)
    except ConfigurationInvalid as error:
        end_with_problems(error)


@contextlib.contextmanager
def open_ledger(config: Config) -> Iterator["Connection"]:
    """Give a connection that only reads the ledger. An error ends the command."""
    from sqlalchemy.exc import DBAPIError

    from adapter.ledger.databases import StoreMissing, StoreUnavailable, database_at

    database = database_at(config.store.url)
    try:
        database.check_exists()
        with database.engine(read_only=True).connect() as connection:
            yield connection
    except (StoreMissing, StoreUnavailable) as error:
        end(STORE, in_one_line(error))
    except DBAPIError as error:
        is_old = any(words in str(error.orig) for words in ("no such table", "no such column", "does not exist"))
        remedy = "; its tables may be older than this version, so run `norce-adapter store migrate`" if is_old else ""
        end(STORE, f"cannot read {database.location}: {in_one_line(error.orig)}{remedy}")


def print_rows(
    rows: Sequence[dict[str, Any]],
    output: str,
    columns: Sequence[str] | None = None,
    *,
    nothing: str = "nothing matches",
    matching: str | None = None,
    channels: Collection[Channel] | None = None,
) -> None:
    """Print rows. Without rows, say so and end the command.

    Args:
        rows: The rows, with equal keys.
        output: The form: table, json or csv.
        columns: The columns of the table; without them, all.
        nothing: The sentence if there are no rows.
        matching: The number of rows that match, in words, if it is larger.
        channels: The configured channels; the table has their merchants and names only if there are several.
    """
    if output == "json":
        click.echo(as_json(rows))
    elif rows and output == "csv":
        click.echo(_as_csv(rows), nl=False)
    elif rows:
        names = columns or tuple(rows[0])
        if channels is not None:
            merchants = {*(each.merchant for each in channels), *(row["merchant"] for row in rows)} - {None}
            channel_names = {*(each.name for each in channels), *(row["channel"] for row in rows)} - {None}
            single = [name for name, of in (("merchant", merchants), ("channel", channel_names)) if len(of) < 2]
            names = [name for name in names if name not in single]
        _print_table([[_cell(row[name]) for name in names] for row in rows], names)
    if not rows:
        end(NOTHING_MATCHED, nothing)
    if matching is not None:
        click.echo(f"{len(rows):,} of {matching}; --limit changes the number".replace(",", " "), err=True)


def _print_table(rows: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    """Print a table, or a paragraph for each row on a terminal that is too narrow.

    Nothing is cut off.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
    least = [min(width, LEAST_WIDTH) if name in SENTENCES else width for name, width in zip(names, widths, strict=True)]
    is_terminal, between = sys.stdout.isatty(), 2 * len(names)
    console = Console(highlight=False) if is_terminal else Console(width=sum(widths) + between, highlight=False)
    if is_terminal and sum(least) + between > console.width:
        longest = max(map(len, names))
        paragraphs = (
            [f"{name:{longest}}  {value}" for name, value in zip(names, row, strict=True) if value] for row in rows
        )
        click.echo("\n\n".join("\n".join(lines) for lines in paragraphs))
        return
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=name not in SENTENCES, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_as_text(value) for value in row.values()] for row in rows)
    return text.getvalue()


def _as_text(value: Any) -> str:
    """Return a cell of CSV. A text that looks like a formula gets an apostrophe."""
    cell = _cell(value)
    return f"'{cell}" if isinstance(value, str) and cell.startswith(FORMULAS) else cell


def _cell(value: Any) -> str:
    if isinstance(value, bool | list | dict):
        value = json.dumps(value, ensure_ascii=False)
    return "" if value is None else printable(value)


def as_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that standard output can take without a loss."""
    encoding = (sys.stdout and sys.stdout.encoding) or ""
    return json.dumps(value, indent=indent, ensure_ascii=not encoding.lower().startswith("utf"))


def progress_bar(*, hidden: bool = False) -> "Progress":
    """Return a progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True, disable=hidden or not sys.stderr.isatty())


def printable(value: Any) -> str:
    """Escape control characters, so that text from elsewhere cannot control the terminal."""
    return _encodable("".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(value)))


def _encodable(text: str) -> str:
    """Replace characters that the terminal does not take: `click.echo` ignores ASCII."""
    encoding = (sys.stdout and sys.stdout.encoding) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def in_one_line(error: object) -> str:
    """Return the message of a database without its line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def stop_signal() -> Iterator["asyncio.Event"]:
    """Give an event that SIGTERM, SIGINT and SIGHUP set while the context lasts.

    A SIGHUP that is ignored stays ignored.

    Only this function handles signals: two uvicorn servers would replace each other's handlers.
    """
    import asyncio

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
