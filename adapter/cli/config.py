"""Commands about configuration: the schema of config.yaml, and our documents at Norce."""

import copy
from pathlib import Path
from typing import Any

import click

from adapter.cli.orders import call_norce
from adapter.cli.shared import FAILED, TEXT, USAGE, as_json, config_option, end, load_config, printable
from adapter.config.json_schema import file_schema
from adapter.identifiers import Channel
from adapter.norce.client import Norce, NorceError
from adapter.registrations.on_channels import STATIC, channel_documents
from adapter.routing.routes import settings_types

SCHEMA_FILE = "config.schema.json"


@click.group("config")
def config_group() -> None:
    """Print the schema, or write documents at Norce."""


@config_group.command("schema")
@click.option("--write", is_flag=True, help=f"Write it to {SCHEMA_FILE} beside the configuration file.")
@config_option
def config_schema(*, write: bool, config_path: Path) -> None:
    """Print the JSON Schema of config.yaml, with the settings of the installed handlers."""
    types, broken = settings_types()
    for name in broken:
        click.echo(f"warning: handler {name} cannot be imported and is left out", err=True)
    text = as_json(file_schema(types), indent=2)
    if not write:
        click.echo(text)
        return
    path = config_path.with_name(SCHEMA_FILE)
    try:
        path.write_text(text + "\n", "utf-8")
    except OSError as error:
        end(FAILED, f"{path} cannot be written: {error.strerror}")
    click.echo(str(path))


@config_group.command("norce")
@click.option("--merchant", type=TEXT, help="Only this merchant's channels.")
@click.option("--channel", type=TEXT, help="Only this channel.")
@click.option("--write", is_flag=True, help="Write the documents to Norce instead of printing them.")
@config_option
def config_norce(merchant: str | None, channel: str | None, *, write: bool, config_path: Path) -> None:
    """Print the documents at Norce that register our callbacks on every new order.

    Other content of the documents is kept. With --write, the service must be running, because Norce reads our schema
    from it.
    """
    config = load_config(config_path)
    channels = [each for each in config.channels if merchant in (None, each.merchant) and channel in (None, each.name)]
    if not channels:
        end(USAGE, "no such merchant and channel is configured")

    async def work(norce: Norce) -> list[tuple[int, str]]:
        failed = []
        for each in channels:
            try:
                await one(norce, each)
            except NorceError as error:  # such as an old token of one merchant; continue with the others
                failed.append((FAILED, f"{each.merchant}, channel {each.name}: {error}"))
            except LookupError as error:  # the channel has no secret for static registrations
                failed.append((USAGE, f"{each.merchant}, channel {each.name}: {error}"))
        return failed

    async def one(norce: Norce, channel: Channel) -> None:
        documents = await channel_documents(config, norce, channel)
        for name, document in documents.items():
            if write:
                await norce.call(channel, "put_configuration", body=document, path={"name": name})
                click.echo(printable(f"{channel.merchant}, channel {channel.name}: {name} is written"))
            else:
                click.echo(as_json(_without_secrets(name, document, config.adapter.id), indent=2))

    if failed := call_norce(config, work):
        end(min(code for code, _ in failed), "\n".join(printable(each) for _, each in failed))


def _without_secrets(name: str, document: dict[str, Any], adapter_id: str) -> dict[str, Any]:
    """Hide our secret and the registrations of other adapters, which may hold theirs."""
    shown = copy.deepcopy(document)
    if name != STATIC:
        shown["callbacks"]["secret"] = "***"  # noqa: S105 - shown instead of the secret
        return shown
    whose = [each.get("adapterId") if isinstance(each, dict) else None for each in shown["order"]["notifications"]]
    shown["order"]["notifications"] = [
        each if owner == adapter_id else {"adapterId": owner, "***": "kept"}
        for owner, each in zip(whose, shown["order"]["notifications"], strict=True)
    ]
    return shown
