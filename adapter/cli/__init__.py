"""The commands of `norce-adapter`.

Exit codes are stable: 0 ok, 1 failed, 2 usage, 3 nothing matched, 4 configuration, 5 store. Results go to standard
output; logs, progress and errors go to standard error. A command imports only what it uses, so that it starts fast:
`COMMANDS` names its module, and modules import large libraries in their functions.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from importlib import import_module, metadata
from typing import Any

import click

COMMANDS = {
    "init": "init.init",
    "new": "new.new",
    "serve": "serve.serve",
    "check": "serve.check",
    "demo": "demo.demo_command",
    "simulate": "simulate.simulate",
    "send": "send.send",
    "why": "why.why",
    "explain": "explain.explain",
    "try": "try_.try_command",
    "handlers": "handlers.handlers_group",
    "register": "register.register",
    "reconcile": "reconcile.reconcile",
    "orders": "orders.orders_group",
    "notifications": "ledger.notifications_group",
    "deliveries": "deliveries.deliveries_group",
    "queues": "ledger.queues_group",
    "verdicts": "ledger.verdicts_group",
    "store": "ledger.store_group",
    "config": "config.config_group",
}


class LazyGroup(click.Group):
    """A group that imports a command when it is used."""

    def main(self, *arguments: Any, **named: Any) -> Any:
        _prepare_standard_streams()
        try:
            return super().main(*arguments, **named)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
                raise
            click.echo(f"the output cannot be written: {error.strerror}", err=True)
            sys.exit(1)

    def list_commands(self, context: click.Context) -> list[str]:
        return [*COMMANDS, *super().list_commands(context)]

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments[0] == "serve":
            # Before the imports, which take a second: a terminal that is closed must not end the start.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return super().resolve_command(context, arguments)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return super().get_command(context, name)
        module, _, function = COMMANDS[name].partition(".")
        command: click.Command = getattr(import_module(f"adapter.cli.{module}"), function)
        return command


def _prepare_standard_streams() -> None:
    """Occupy closed standard descriptors, and write `?` for what a terminal cannot show."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file or connection gets this number, and with it what is meant for the terminal.
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            with contextlib.suppress(OSError):  # a pipe that has taken the place of a file cannot be repositioned
                stream.reconfigure(errors="replace")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 nothing matched, 4 configuration, 5 store.",
)
def main() -> None:
    """An order adapter behind Norce Checkout."""


@main.command()
def version() -> None:
    """Print the version of this service."""
    click.echo(metadata.version("norce-adapter"))
