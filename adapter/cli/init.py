"""The command `init`, which writes a configuration that works with the sandbox."""

import os
import secrets
from pathlib import Path

import click

from adapter.cli.shared import FAILED, config_option, end, printable

SECRETS = ("NORCE_TOKEN", "NORCE_ADAPTER_URL_KEY")
CONFIGURATION_FOR_THE_SANDBOX = """\
# Written by `norce-adapter init`, for the sandbox of `norce-adapter simulate`. docs/norce.md leads from here to a shop.
adapter: {id: my_adapter, public_url: "http://127.0.0.1:8080"} # for Norce: your id there, and an https address
norce: {base_url: "http://127.0.0.1:8090/checkout"} # for Norce: {environment: playground}
merchants:
  norce: # the merchant's id at Norce; also its slug, unless you add a slug
    tokens: ["${env:NORCE_TOKEN}"]
    channels: {"1": {}}
senders: {signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}}
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus, schema: {enum: [accepted, completed]}}
routes:
  export-order:
    callback: order-status
    when: {scope: /state/currentStatus, schema: {const: completed}}
    handler: log # logs the order; put your own here
"""


@click.command()
@config_option
def init(config_path: Path) -> None:
    """Write a first configuration, which works with the sandbox (`norce-adapter simulate`).

    A file that exists is never overwritten.
    """
    try:
        with config_path.open("x", encoding="utf-8") as file:
            file.write(CONFIGURATION_FOR_THE_SANDBOX)
    except FileExistsError:
        end(FAILED, f"{printable(config_path)} exists already; give another path with --config, or move it away")
    except OSError as error:
        end(FAILED, f"{printable(config_path)} cannot be written: {error.strerror}")
    needed = {name: secrets.token_urlsafe(24) for name in SECRETS if name not in os.environ}
    if config_path != Path("config.yaml"):
        needed["NORCE_ADAPTER_CONFIG"] = printable(config_path)
    click.echo(f"{printable(config_path)} is written. In two terminals:")
    if needed:
        click.echo(f"  export {' '.join(f'{name}={value}' for name, value in needed.items())}")
    click.echo("  norce-adapter serve")
    click.echo("  norce-adapter simulate --scenario happy-purchase")
