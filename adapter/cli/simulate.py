"""The command `simulate`, which serves an offline Norce Checkout or plays a scenario.

A scenario uses the service's own configuration: its channels, its registrations with their signatures, and its ledger.
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
from adapter.callbacks.server import PortInUse, http_server, listen, url_of
from adapter.cli.shared import FAILED, USAGE, config_option, end, load_config, open_ledger, printable, stop_signal
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.norce.api import V0
from adapter.registrations.on_orders import registrations
from adapter.sandbox.norce import Simulator, Switches, SwitchInvalid
from adapter.sandbox.norce.records import Entry
from adapter.sandbox.scenarios import SCENARIOS, ServiceUnderTest, Shop, play

HOST = "127.0.0.1"
MAX_DELIVERIES = 2_000_000  # that a scenario reads; a burst has at most half as many orders


@click.command()
@click.option(
    "--port",
    default=8090,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="The port to listen on; 0 takes any free one.",
)
@click.option("--token", envvar="NORCE_TOKEN", show_envvar=True, help="The token to accept; by default a new one.")
@click.option("--switch", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a switch; may be repeated.")
@click.option("--scenario", metavar="NAME", type=click.Choice(list(SCENARIOS)), help=f"One of {', '.join(SCENARIOS)}.")
@click.option("--adapter", "address", help="The URL of the service; by default its configured port on this machine.")
@click.option("--orders", type=click.IntRange(1, 1_000_000), help="The number of orders in a burst.")
@config_option
def simulate(
    port: int,
    token: str | None,
    pairs: tuple[str, ...],
    scenario: str | None,
    address: str | None,
    orders: int | None,
    config_path: Path,
) -> None:
    """Serve an offline Norce Checkout until SIGTERM or SIGINT.

    The command prints every request and every callback. docs/simulator.md lists the switches.

    With --scenario: play a purchase against a running service, and print the result as JSON. The service has to use
    this Norce, and --config has to be its configuration. The command fails if an order does not end as it should.
    """
    logs.configure(level="warning")
    try:
        switches = Switches().with_values(dict(_split(each) for each in pairs))
        if scenario is None:
            if address is not None or orders is not None:
                end(USAGE, "--adapter and --orders need a --scenario")
            uvloop.run(_serve(port, token or secrets.token_urlsafe(24), switches))
            return
        config = load_config(config_path)
        if config.senders.signed_urls is None:
            end(USAGE, "a scenario registers signed URLs: senders.signed_urls is needed")
        if orders is not None and scenario != "burst":
            end(USAGE, "--orders is for the scenario burst")
        service = service_at(address or f"http://127.0.0.1:{config.server.port}", config)
        token = token or next(iter(config.merchants.values())).tokens[0].reveal()
        shop = Shop(token, service, switches=switches)
        summary = uvloop.run(_play(scenario, shop, port, **({} if orders is None else {"orders": orders})))
        click.echo(json.dumps(summary))
        if summary["unmet"] is not None:
            end(FAILED, f"{scenario}: {summary['unmet']}")
    except SwitchInvalid as error:
        end(USAGE, str(error))
    except PortInUse as error:
        end(FAILED, str(error))


def _split(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise SwitchInvalid(f"a switch is NAME=VALUE, not {pair}")
    return name, value


async def _serve(port: int, token: str, switches: Switches) -> None:
    with stop_signal() as stop, listen(HOST, port) as listening:
        address = url_of(listening)
        async with Simulator(token=token, switches=switches) as simulator:
            simulator.journal.on_entry = _print
            async with http_server(simulator.app, listening):
                click.echo(
                    f"Norce Checkout, offline; Ctrl-C ends it.\n  services  {address}/checkout\n  token     {token}"
                )
                await stop.wait()


async def _play(scenario: str, shop: Shop, port: int, **settings: int) -> dict[str, Any]:
    with listen(HOST, port) as listening:
        async with shop, http_server(shop.simulator.app, listening):
            return await play(scenario, shop, **settings)


def service_at(address: str, config: Config) -> ServiceUnderTest:
    """Return the service at this address. Its ledger has to be readable from here."""
    senders = Senders(config.senders)
    config = msgspec.structs.replace(config, norce=msgspec.structs.replace(config.norce, version=V0))  # as `Caller`

    def wanted(channel: Channel, order_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for each in registrations(config, senders, channel, order_id, public_url=address):
            yield each.operation, dict(each.body)

    def deliveries(state: str | None) -> list[dict[str, Any]]:
        with open_ledger(config) as connection:
            return Queries(connection).deliveries(DeliveryFilter(state=state), limit=MAX_DELIVERIES)

    return ServiceUnderTest(channels=config.channels, registrations=wanted, deliveries=deliveries)


def _print(entry: Entry) -> None:
    arrow = "→" if entry.kind == "request" else "←"  # to Norce, and from it
    row = f"{entry.at[11:23]} {arrow} {entry.kind:12} {entry.status or '-'!s:>3} {entry.took_ms:5} ms  {entry.method:6}"
    click.echo(printable(f"{row} {entry.url}{entry.note and f'  ({entry.note})'}"))
