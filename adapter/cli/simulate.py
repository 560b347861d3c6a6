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
from adapter.cli.explain import bytes_of, order_in_file
from adapter.cli.shared import FAILED, USAGE, config_option, end, load_config, open_ledger, printable, stop_signal
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.norce.api import V0
from adapter.registrations.on_orders import registrations
from adapter.routing.from_config import sandbox_port
from adapter.sandbox.norce import Simulator, Switches, SwitchInvalid
from adapter.sandbox.norce.records import Entry
from adapter.sandbox.scenarios import SCENARIOS, WITH_ANY_ORDER, ServiceUnderTest, Shop, play

HOST, PORT = "127.0.0.1", 8090
MAX_DELIVERIES = 2_000_000  # that a scenario reads; a burst has at most half as many orders


order_file_option = click.option(
    "--order",
    "order_file",
    metavar="FILE",
    help="Play the scenario with copies of this order, an envelope or an event record, as JSON.",
)


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="The port to listen on; by default that of norce.base_url in a scenario, otherwise 8090; 0: any free one.",
)
@click.option("--token", envvar="NORCE_TOKEN", show_envvar=True, help="The token to accept; by default a new one.")
@click.option("--switch", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a switch; may be repeated.")
@click.option("--scenario", metavar="NAME", type=click.Choice(list(SCENARIOS)), help=f"One of {', '.join(SCENARIOS)}.")
@click.option("--adapter", "address", help="The URL of the service; by default its configured port on this machine.")
@click.option("--orders", type=click.IntRange(1, 1_000_000), help="The number of orders in a burst.")
@order_file_option
@config_option
def simulate(
    port: int | None,
    token: str | None,
    pairs: tuple[str, ...],
    scenario: str | None,
    address: str | None,
    orders: int | None,
    order_file: str | None,
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
            if (address, orders, order_file) != (None, None, None):
                end(USAGE, "--adapter, --orders and --order need a --scenario")
            uvloop.run(_serve(PORT if port is None else port, token or secrets.token_urlsafe(24), switches))
            return
        config = load_config(config_path)
        sample = sample_for(scenario, order_file, config)
        if orders is not None and scenario != "burst":
            end(USAGE, "--orders is for the scenario burst")
        service = service_at(address or f"http://{HOST}:{config.server.port}", config)
        token = token or next(iter(config.merchants.values())).tokens[0].reveal()
        expected = sandbox_port(config)
        port = expected or PORT if port is None else port
        if port != expected:
            where = config.norce.base_url or f"Norce's {config.norce.environment}"
            click.echo(f"warning: this Norce has port {port}, but norce.base_url leads to {where}", err=True)
        shop = Shop(token, service, sample=sample, switches=switches)
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
            simulator.journal.on_entry = print_entry
            async with http_server(simulator.app, listening):
                click.echo(
                    f"Norce Checkout, offline; Ctrl-C ends it.\n  services  {address}/checkout\n  token     {token}"
                )
                await stop.wait()


async def _play(scenario: str, shop: Shop, port: int, **settings: int) -> dict[str, Any]:
    with listen(HOST, port) as listening:
        async with shop, http_server(shop.simulator.app, listening):
            return await play(scenario, shop, **settings)


def sample_for(scenario: str, order_file: str | None, config: Config) -> dict[str, Any] | None:
    """Return the order to play a scenario with, or None for its own.

    End the command if they do not fit.
    """
    if config.senders.signed_urls is None:
        end(USAGE, "a scenario registers signed URLs: senders.signed_urls is needed")
    if order_file is None:
        return None
    if scenario not in WITH_ANY_ORDER:
        end(USAGE, f"{scenario} needs an order of its own; --order is for {', '.join(WITH_ANY_ORDER)}")
    return order_in_file(bytes_of(order_file), order_file)


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


def print_entry(entry: Entry) -> None:
    """Print a request or a callback in one line."""
    arrow = "→" if entry.kind == "request" else "←"  # to Norce, and from it
    row = f"{entry.at[11:23]} {arrow} {entry.kind:12} {entry.status or '-'!s:>3} {entry.took_ms:5} ms  {entry.method:6}"
    click.echo(printable(f"{row} {entry.url}{entry.note and f'  ({entry.note})'}"))
