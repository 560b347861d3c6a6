"""
The commands. Exit codes are stable: 0 ok, 1 failed, 2 usage, 3 nothing matched, 4 configuration, 5 store.

What is meant for a program goes to standard output; logs, progress and errors go to standard error.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click
import httpx
import uvloop
from rich.console import Console
from rich.progress import track

from adapter import app, logs
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import CALLBACK_PATH, PortInUse
from adapter.cli.config import config_group
from adapter.cli.explain import explain
from adapter.cli.ledger import GROUPS
from adapter.cli.orders import orders_group, register
from adapter.cli.reconcile import reconcile
from adapter.cli.shared import FAILED, STORE, USAGE, config_option, configured, end, one_line, output_option, print_rows
from adapter.cli.simulate import simulate
from adapter.cli.verdicts import verdicts_group
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.store import StoreInUse, StoreUnavailable
from adapter.routing import routes
from adapter.sandbox.demo import DemoFailed, demo, walk


@click.group(
    commands=[*GROUPS, verdicts_group, orders_group, register, reconcile, config_group, explain, simulate],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 nothing matched, 4 configuration, 5 store.",
)
def main() -> None:
    """An order adapter behind Norce Checkout."""


@main.command()
@config_option
def serve(config_path: Path) -> None:
    """Serve callbacks until SIGTERM or SIGINT."""
    logs.configure()
    config, built = configured(config_path)
    try:
        uvloop.run(app.serve(config, built))
        _leave_threads_behind()
    except (StoreInUse, StoreUnavailable) as error:
        end(STORE, one_line(error))
    except PortInUse as error:
        end(FAILED, str(error))


@main.command()
@config_option
def check(config_path: Path) -> None:
    """Check configuration, handlers and settings, and print every problem."""
    _, built = configured(config_path)
    for warning in built.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{config_path}: {len(built.callbacks)} callbacks, {len(built.all)} routes; all is well")


@main.command("demo")
@click.option("--exit", "then_exit", is_flag=True, help="End after the walk in place of serving on.")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def demo_command(then_exit: bool, output: str) -> None:
    """Walk a purchase through the service, between an offline Norce Checkout and a stand-in for Jetshop."""
    logs.configure(level=logs.WARNING if then_exit or sys.stderr.isatty() else logs.INFO)
    try:
        uvloop.run(_demo(then_exit=then_exit, output=output))
    except DemoFailed as error:
        end(FAILED, str(error))


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--callback", required=True, help="The name of a configured callback.")
@click.option("--to", "address", help="Where the service is; the configured port of this machine where left out.")
@click.option("--merchant", help="In place of the order's own merchant.")
@click.option("--channel", help="In place of the order's own channel.")
@click.option("--order", "order_id", help="In place of the order's own id.")
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1, 100_000), help="How often to send it.")
@click.option("--expect", type=click.IntRange(100, 599), help="Fail where an answer has another status.")
@config_option
def send(
    file: Path,
    callback: str,
    address: str | None,
    merchant: str | None,
    channel: str | None,
    order_id: str | None,
    repeat: int,
    expect: int | None,
    config_path: Path,
) -> None:
    """
    Send FILE (an order, an envelope or an event record) to a callback, signed as Norce's registration would be.
    """
    config, _ = configured(config_path)
    if callback not in config.callbacks:
        end(USAGE, f"no callback {callback} is configured; there are: {', '.join(sorted(config.callbacks))}")
    instead = {"id": order_id, "merchant": merchant, "channel": channel}
    body, order = _body(file, {name: value for name, value in instead.items() if value is not None})
    order_id, merchant, channel = (order.get(name) for name in instead)
    named = merchant and channel and order_id
    if not named or not (isinstance(merchant, str) and isinstance(channel, str) and isinstance(order_id, str)):
        end(USAGE, "the order has no id, merchant or channel of its own: give --order, --merchant and --channel")
    to = address or f"http://127.0.0.1:{config.server.port}"
    url, headers = _authenticated(config, to, Channel(merchant, channel), order_id, callback)
    try:
        statuses = _post(url, headers, body, repeat)
    except httpx.HTTPError as error:
        end(FAILED, f"no answer from {to}: {type(error).__name__}")
    for status, count in sorted(statuses.items()):
        click.echo(f"{status}: {count}")
    if expect is not None and set(statuses) != {expect}:
        end(FAILED, f"expected {expect} each time")


@main.group("handlers")
def handlers_group() -> None:
    """The handlers that installed packages offer."""


@handlers_group.command("list")
@output_option
def handlers_list(output: str) -> None:
    """List the installed handlers."""
    rows = []
    for name, point in sorted(routes.installed().items()):
        row: dict[str, Any] = {"name": name, "from": point.dist.name if point.dist else None, "kind": None}
        try:
            handler = point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an import may fail in any way; it is listed as broken
            row |= {"says": f"cannot be imported: {type(error).__name__}"}
        else:
            is_class = isinstance(handler, type)
            fitting = (name for name, kind in routes.KINDS.items() if is_class and issubclass(handler, kind))
            row["kind"] = ", ".join(fitting) or "none of ours"
            row["says"] = (handler.__doc__ or "").strip().partition("\n")[0]
        rows.append(row)
    print_rows(rows, output)


@main.command()
def version() -> None:
    """The version of this service."""
    click.echo(app.VERSION)


# --- what they share ------------------------------------------------------------------------------------------------


def _leave_threads_behind() -> None:
    """Ends the process where a plugin has left a thread at work: Python would wait for one of `asyncio.to_thread`."""
    if threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _body(file: Path, instead: dict[str, str]) -> tuple[bytes, dict[str, Any]]:
    """The bytes to send and the order in them: the file's own, unless something has to be put in its place."""
    raw = file.read_bytes()
    try:
        tree = json.loads(raw)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        end(USAGE, f"{file} is no JSON object")
    if isinstance(tree.get("payload"), dict):  # an event record of the Notification API
        tree = tree["payload"]
        raw = json.dumps(tree, ensure_ascii=False).encode()
    order = tree.get("order", tree)
    if not isinstance(order, dict):
        end(USAGE, f"{file} holds no order")
    if instead:
        order.update(instead)
        raw = json.dumps(tree, ensure_ascii=False).encode()
    return raw, order


def _authenticated(
    config: Config, to: str, channel: Channel, order_id: str, callback: str
) -> tuple[str, dict[str, str]]:
    headers = {"content-type": "application/json", "x-merchant": channel.merchant, "x-channel": channel.name}
    if config.senders.signed_urls is not None:
        return Senders(config.senders).signed_url(to, channel, order_id, callback), headers
    path = CALLBACK_PATH.replace("{callback}", callback).replace("{order_id}", quote(order_id, safe=""))
    url = f"{to.rstrip('/')}{path}"
    for in_header in config.senders.header_secrets:
        if in_header.merchants is None or channel.merchant in in_header.merchants:
            return url, headers | {in_header.header: in_header.values[0].reveal()}
    for in_url in config.senders.url_secrets:
        if in_url.merchants is None or channel.merchant in in_url.merchants:
            return f"{url}?{urlencode({in_url.parameter: in_url.values[0].reveal()})}", headers
    return end(USAGE, f"no secret in senders is good for merchant {channel.merchant}")


def _post(url: str, headers: dict[str, str], body: bytes, repeat: int) -> dict[int, int]:
    statuses: dict[int, int] = {}
    times = range(repeat)
    with httpx.Client(trust_env=False, timeout=30) as http:
        for _ in track(times, "sending", console=Console(stderr=True)) if repeat > 1 and sys.stderr.isatty() else times:
            answer = http.post(url, headers=headers, content=body)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code >= 400 and repeat == 1:
                click.echo(answer.text, err=True)
    return statuses


async def _demo(*, then_exit: bool, output: str) -> None:
    with app.told_to_stop() as stop:
        async with demo() as running:
            summary = await walk(running, (lambda line: click.echo(line, err=True)) if output == "json" else click.echo)
            if output == "json":
                click.echo(json.dumps(summary))
            if then_exit:
                return
            service, command = running.service, Path(sys.argv[0])
            order = running.config_path.with_name("order-completed.json")
            click.echo(
                "\nStill running; Ctrl-C ends it.\n"
                f"  callbacks   {service.public_address}\n"
                f"  operations  {service.operations_address}/readyz  {service.operations_address}/metrics\n"
                f"  Norce       {running.norce_address}/ (offline; orders and callbacks)\n"
                f"  Jetshop     {running.jetshop_address} (stand-in)\n\n"
                "In another terminal:\n"
                f"  export NORCE_ADAPTER_CONFIG={running.config_path}\n"
                f"  {command} deliveries list\n"
                f"  {command} send {order} --callback order-status --repeat 5"
            )
            await stop.wait()
