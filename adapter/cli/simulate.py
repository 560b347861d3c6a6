"""The command that serves the offline Norce Checkout, on this machine only."""

import secrets
from pathlib import Path

import click
import uvloop

from adapter import app, logs
from adapter.cli.shared import FAILED, STORE, USAGE, end, printable
from adapter.simulator import Simulator, StoreUnusable, Switches, SwitchInvalid
from adapter.simulator.records import Entry

HOST = "127.0.0.1"


@click.command()
@click.option("--port", default=8090, show_default=True, type=click.IntRange(0, 65535), help="0 is any free one.")
@click.option("--token", envvar="NORCE_TOKEN", show_envvar=True, help="The token to take; a new one where left out.")
@click.option("--store", type=click.Path(dir_okay=False, path_type=Path), help="A file in which orders are kept.")
@click.option(
    "--switch", "thrown", multiple=True, metavar="NAME=VALUE", help="How this Norce behaves; may be repeated."
)
def simulate(port: int, token: str | None, store: Path | None, thrown: tuple[str, ...]) -> None:
    """
    Serve an offline Norce Checkout until SIGTERM or SIGINT, and print what comes in and goes out.

    The switches are those of docs/simulator.md; they can be thrown later at /simulator/switches.
    """
    logs.configure(level=logs.WARNING)
    try:
        switches = Switches().with_values(dict(_pair(each) for each in thrown))
        uvloop.run(_serve(port, token or secrets.token_urlsafe(24), store, switches))
    except SwitchInvalid as error:
        end(USAGE, str(error))
    except StoreUnusable as error:
        end(STORE, str(error))
    except app.PortInUse as error:
        end(FAILED, str(error))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SwitchInvalid(f"a switch is NAME=VALUE, not {text}")
    return name, value


async def _serve(port: int, token: str, store: Path | None, switches: Switches) -> None:
    with app.told_to_stop() as stop, app.listen(HOST, port) as listening:
        address = f"http://{HOST}:{listening.getsockname()[1]}"
        async with Simulator(token=token, store=store, switches=switches) as simulator:
            simulator.journal.told = _print
            async with app.served(simulator.app, listening):
                click.echo(
                    f"Norce Checkout, offline; Ctrl-C ends it.\n"
                    f"  services  {address}/checkout\n"
                    f"  page      {address}/\n"
                    f"  token     {token}"
                )
                await stop.wait()


def _print(entry: Entry) -> None:
    arrow = "→" if entry.kind == "request" else "←"  # to Norce, and from it
    row = f"{entry.at[11:23]} {arrow} {entry.kind:12} {entry.status or '-'!s:>3} {entry.took_ms:5} ms  {entry.method:6}"
    click.echo(printable(f"{row} {entry.url}{entry.note and f'  ({entry.note})'}"))
