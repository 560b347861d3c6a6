"""The command `demo`."""

import json
import sys
from pathlib import Path

import click
import uvloop

from adapter import logs
from adapter.cli.shared import FAILED, end, stop_signal
from adapter.sandbox.demo import DemoFailed, demo, walk


@click.command("demo")
@click.option("--exit", "then_exit", is_flag=True, help="Exit after the walk.")
@click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Text for people, or JSON for programs.",
)
def demo_command(then_exit: bool, output: str) -> None:
    """Walk a purchase through the service.

    Norce Checkout and Jetshop are simulated on this host.
    """
    logs.configure(level="warning" if then_exit or sys.stderr.isatty() else "info")
    try:
        uvloop.run(_demo(then_exit=then_exit, output=output))
    except DemoFailed as error:
        end(FAILED, str(error))


async def _demo(*, then_exit: bool, output: str) -> None:
    with stop_signal() as stop:
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
                f"  Norce       {running.norce_address}/checkout (offline)\n"
                f"  Jetshop     {running.jetshop_address} (stand-in)\n\n"
                "In another terminal:\n"
                f"  export NORCE_ADAPTER_CONFIG={running.config_path}\n"
                f"  {command} deliveries list\n"
                f"  {command} send {order} --callback order-status --repeat 5"
            )
            await stop.wait()
