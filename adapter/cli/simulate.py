"""
The command that serves the offline Norce Checkout, on this machine only, or plays a scenario against a service.

A scenario is played by the service's own configuration: whom it serves, what it registers with which signatures, and
where its ledger is.
"""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import uvloop

from adapter import logs
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import PortInUse, http_server, listen
from adapter.cli.shared import FAILED, STORE, USAGE, config_option, end, loaded, printable, reading, stop_signal
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.norce.api import V0
from adapter.registrations.on_orders import registrations
from adapter.sandbox.norce import Simulator, StoreUnusable, Switches, SwitchInvalid
from adapter.sandbox.norce.records import Entry
from adapter.sandbox.scenarios import SCENARIOS, Adapter, Shop, play

HOST = "127.0.0.1"
MOST_DELIVERIES = 2_000_000  # that a scenario looks at; a burst has at most half as many orders


@click.command()
@click.option("--port", default=8090, show_default=True, type=click.IntRange(0, 65535), help="0 is any free one.")
@click.option("--token", envvar="NORCE_TOKEN", show_envvar=True, help="The token to take; a new one where left out.")
@click.option("--store", type=click.Path(dir_okay=False, path_type=Path), help="A file in which orders are kept.")
@click.option(
    "--switch", "thrown", multiple=True, metavar="NAME=VALUE", help="How this Norce behaves; may be repeated."
)
@click.option(
    "--scenario", metavar="NAME", type=click.Choice(list(SCENARIOS)), help=f"Play one: {', '.join(SCENARIOS)}."
)
@click.option("--adapter", "address", help="The service to play against; the configured port of this machine.")
@click.option("--orders", type=click.IntRange(1, 1_000_000), help="How many, in a burst.")
@config_option
def simulate(
    port: int,
    token: str | None,
    store: Path | None,
    thrown: tuple[str, ...],
    scenario: str | None,
    address: str | None,
    orders: int | None,
    config_path: Path,
) -> None:
    """
    Serve an offline Norce Checkout until SIGTERM or SIGINT, and print what comes in and goes out.

    The switches are those of docs/simulator.md; they can be thrown later at /simulator/switches.

    With a scenario: play it against a running service that has this Norce for its own and is configured by --config,
    and print what came of it as JSON. It fails where something was not as the scenario promises.
    """
    logs.configure(level=logs.WARNING)
    try:
        switches = Switches().with_values(dict(_pair(each) for each in thrown))
        if scenario is not None:
            config = loaded(config_path)
            if config.senders.signed_urls is None:
                end(USAGE, "a scenario registers signed URLs: senders.signed_urls is needed")
            if orders is not None and scenario != "burst":
                end(USAGE, "--orders is for the scenario burst")
            adapter = adapter_at(address or f"http://127.0.0.1:{config.server.port}", config)
            token = token or next(iter(config.merchants.values())).tokens[0].reveal()
            shop = Shop(token, adapter, store=store, switches=switches)
            summary = uvloop.run(_play(scenario, shop, port, **({} if orders is None else {"orders": orders})))
            click.echo(json.dumps(summary))
            if summary["unmet"] is not None:
                end(FAILED, f"{scenario}: {summary['unmet']}")
            return
        if address is not None or orders is not None:
            end(USAGE, "--adapter and --orders are for a --scenario")
        uvloop.run(_serve(port, token or secrets.token_urlsafe(24), store, switches))
    except SwitchInvalid as error:
        end(USAGE, str(error))
    except StoreUnusable as error:
        end(STORE, str(error))
    except PortInUse as error:
        end(FAILED, str(error))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SwitchInvalid(f"a switch is NAME=VALUE, not {text}")
    return name, value


async def _serve(port: int, token: str, store: Path | None, switches: Switches) -> None:
    with stop_signal() as stop, listen(HOST, port) as listening:
        address = f"http://{HOST}:{listening.getsockname()[1]}"
        async with Simulator(token=token, store=store, switches=switches) as simulator:
            simulator.journal.told = _print
            async with http_server(simulator.app, listening):
                click.echo(
                    f"Norce Checkout, offline; Ctrl-C ends it.\n"
                    f"  services  {address}/checkout\n"
                    f"  page      {address}/\n"
                    f"  token     {token}"
                )
                await stop.wait()


async def _play(scenario: str, shop: Shop, port: int, **settings: int) -> dict[str, Any]:
    with listen(HOST, port) as listening:
        async with shop, http_server(shop.simulator.app, listening):
            return await play(scenario, shop, **settings)


def adapter_at(address: str, config: Config) -> Adapter:
    """The service at this address, as a scenario knows it. Its ledger has to be within reach."""
    senders = Senders(config.senders)
    config = msgspec.structs.replace(config, norce=msgspec.structs.replace(config.norce, version=V0))  # as a shop asks

    def wanted(merchant: str, channel: str, order_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for each in registrations(config, senders, Channel(merchant, channel), order_id, public_url=address):
            yield each.operation, dict(each.body)

    def deliveries(state: str | None) -> list[dict[str, Any]]:
        with reading(config) as connection:
            return Queries(connection).deliveries(DeliveryFilter(state=state), limit=MOST_DELIVERIES)

    return Adapter(shops=config.channels, registrations=wanted, deliveries=deliveries)


def _print(entry: Entry) -> None:
    arrow = "→" if entry.kind == "request" else "←"  # to Norce, and from it
    row = f"{entry.at[11:23]} {arrow} {entry.kind:12} {entry.status or '-'!s:>3} {entry.took_ms:5} ms  {entry.method:6}"
    click.echo(printable(f"{row} {entry.url}{entry.note and f'  ({entry.note})'}"))
