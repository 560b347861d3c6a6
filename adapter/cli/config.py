"""Commands about configuration: what is in force, its schema, and our documents at Norce."""

import copy
from pathlib import Path
from typing import Any

import click

from adapter.cli.orders import call_norce
from adapter.cli.register import (
    NOT_RECORDED,
    channels_of_merchant,
    former_merchant_options,
    reason_options,
    with_former_merchant,
)
from adapter.cli.service import record_change
from adapter.cli.shared import (
    FAILED,
    NOTHING_MATCHED,
    TEXT,
    USAGE,
    as_json,
    channel_options,
    config_option,
    end,
    load_config,
    load_config_and_routes,
    open_ledger,
    output_option,
    print_rows,
    printable,
    route_option,
    whole_list_options,
)
from adapter.config import Config
from adapter.config.json_schema import file_schema
from adapter.identifiers import Channel
from adapter.ledger.databases import StoreMissing, database_at
from adapter.ledger.queries import Queries
from adapter.norce.client import Norce, NorceError
from adapter.registrations.on_channels import STATIC, channel_documents, documents_without_us
from adapter.routing.routes import settings_types
from adapter.routing.settings_in_force import other_settings, settings_in_force

SCHEMA_FILE = "config.schema.json"
SHOW_COLUMNS = ("route", "merchant", "channel", "setting", "value", "from", "at")


@click.group("config")
def config_group() -> None:
    """Show what is in force, print the schema, or write documents at Norce."""


@config_group.command("show")
@route_option
@channel_options
@whole_list_options
def config_show(route: str | None, merchant: str | None, channel: str | None, output: str, config_path: Path) -> None:
    """Show the settings that are in force, and the place of each.

    The settings of a route come from the route, the merchant, the channel, Norce's document as the service has read it
    last, or a default. Without options, all other settings are shown as well. A secret is shown as its reference, or
    as ***.
    """
    config, routes = load_config_and_routes(config_path)
    documents = _documents_of(config)
    rows: list[dict[str, Any]] = []
    if route is merchant is channel is None:
        of_no_route = dict.fromkeys(SHOW_COLUMNS[:3])
        rows += [of_no_route | dict(zip(SHOW_COLUMNS[3:], each, strict=True)) for each in other_settings(config)]
    for each in routes.all:
        for of in each.settings:
            if route not in (None, each.name) or merchant not in (None, of.merchant) or channel not in (None, of.name):
                continue
            document = documents.get(of)
            try:
                found = settings_in_force(config, each, of, document)
            except ValueError as error:
                click.echo(printable(f"{of.merchant}, channel {of.name}: {error}; it is left out"), err=True)
                found = settings_in_force(config, each, of, None)
            names = {"route": each.name, "merchant": of.merchant, "channel": of.name}
            rows += [names | dict(zip(SHOW_COLUMNS[3:], setting, strict=True)) for setting in found]
    for of in documents:
        if not documents[of].get("active", True):
            click.echo(printable(f"{of.merchant}, channel {of.name}: switched off by the document at Norce"), err=True)
    print_rows(
        rows, output, SHOW_COLUMNS, nothing="no route is for this merchant and channel", channels=config.channels
    )


def _documents_of(config: Config) -> dict[Channel, dict[str, Any]]:
    """Return Norce's documents as the service has read them last."""
    try:
        database_at(config.store.url).check_exists()
    except StoreMissing:
        click.echo("there is no ledger yet, so no document of Norce is shown", err=True)
        return {}
    with open_ledger(config) as connection:
        return Queries(connection).documents()


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
@click.option("--remove", is_flag=True, help="Remove our document and our entries from the channels of --merchant.")
@former_merchant_options
@click.option("--dry-run", is_flag=True, help="With --remove: only list the documents that would change.")
@reason_options
@output_option
@config_option
def config_norce(
    merchant: str | None, channel: str | None, *, write: bool, remove: bool, config_path: Path, **given: Any
) -> None:
    """Print the documents at Norce that register our callbacks on every new order.

    Other content of the documents is kept. With --write and --why, they are written; the service must be running,
    because Norce reads our schema from it. With --remove, our part is taken out again.
    """
    config = load_config(config_path)
    if write and remove:
        end(USAGE, "choose --write or --remove")
    if write and not (given["why"] or "").strip():
        end(USAGE, "--why is needed; without --write, the documents are printed")
    slug, token_file = given.pop("slug"), given.pop("norce_token_file")
    config = with_former_merchant(config, merchant, slug, token_file, removes=remove)
    if remove:
        _remove_documents(config, merchant, channel, **given)
        return
    channels = [each for each in config.channels if merchant in (None, each.merchant) and channel in (None, each.name)]
    if not channels:
        end(USAGE, "no such merchant and channel is configured")

    written: list[str] = []

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
                written.append(name)
                click.echo(printable(f"{channel.merchant}, channel {channel.name}: {name} is written"))
            else:
                click.echo(as_json(_without_secrets(name, document, config.adapter.id), indent=2))

    try:
        failed = call_norce(config, work)
    finally:
        if written:
            _record(config, "write-documents", merchant, channel, len(written), given)
    if failed:
        end(min(code for code, _ in failed), "\n".join(printable(each) for _, each in failed))


def _record(
    config: Config, command: str, merchant: str | None, channel: str | None, changed: int, author: dict[str, Any]
) -> None:
    """Record a change of documents at Norce, with the reason and the person in `author`."""
    where = {name: value for name, value in (("merchant", merchant), ("channel", channel)) if value is not None}
    by = {"who": author["who"], "why": author["why"]}
    if record_change(config, {"command": command, "by": by, "given": where, "changed": changed}) is None:
        click.echo(NOT_RECORDED, err=True)


def _remove_documents(
    config: Config, merchant: str | None, channel: str | None, *, dry_run: bool, why: str | None, who: str, output: str
) -> None:
    if merchant is None:
        end(USAGE, "--remove needs --merchant")
    if not dry_run and not (why or "").strip():
        end(USAGE, "--why is needed; --dry-run lists the documents that would change")
    rows: list[dict[str, str]] = []
    failed: list[str] = []

    async def work(norce: Norce) -> None:
        for each in await channels_of_merchant(config, norce, merchant, channel):
            place = f"{each.merchant}, channel {each.name}"
            try:
                changes, is_last = await documents_without_us(config, norce, each)
                for name, document in changes.items():
                    if document is None and is_last:
                        failed.append(f"{place}: {name} stays, because Norce removes a channel with its last document")
                        continue
                    if not dry_run:
                        operation = "remove_configuration" if document is None else "put_configuration"
                        await norce.call(each, operation, body=document, path={"name": name})
                    done = "removed" if document is None else "changed"
                    rows.append({"merchant": each.merchant, "channel": each.name, "document": name, "change": done})
            except NorceError as error:  # continue with the other channels
                failed.append(f"{place}: {error}")

    try:
        call_norce(config, work)
    finally:
        if rows and not dry_run:
            _record(config, "remove-documents", merchant, channel, len(rows), {"who": who, "why": why})
    if rows or failed:
        click.echo(
            as_json(rows) if output == "json" else f"{len(rows)} documents {'would change' if dry_run else 'changed'}"
        )
    for row in rows if output != "json" else ():
        click.echo(printable(f"{row['merchant']}, channel {row['channel']}: {row['document']} is {row['change']}"))
    if failed:
        end(FAILED, "\n".join(map(printable, failed)))
    if not rows:
        end(NOTHING_MATCHED, f"no document of {printable(merchant)} at Norce names this adapter")


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
