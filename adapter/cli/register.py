"""The command `register`: our callbacks on one order, or on many.

It calls Norce with the tokens in the configuration, not through the service: when no service can run, callbacks must be
removed all the more, because Norce refuses changes of orders whose hooks do not answer. A change of many orders is
recorded in the ledger if a service runs on this host.
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import msgspec

from adapter.callbacks.parsing import CallbackInvalid, check_order_id
from adapter.cli.orders import call_norce, only_channel
from adapter.cli.service import record_change
from adapter.cli.shared import (
    FAILED,
    NOTHING_MATCHED,
    TEXT,
    USAGE,
    config_option,
    end,
    load_config,
    options,
    output_option,
    printable,
    progress_bar,
    stop_signal,
    who_option,
)
from adapter.config import Config
from adapter.config.model import SLUG, SLUG_IN_WORDS, MerchantConfig
from adapter.identifiers import Channel
from adapter.norce.client import Norce, NorceError, NotFound
from adapter.plugin import Secret
from adapter.registrations.on_channels import channels_at_norce, is_switched_off
from adapter.registrations.on_many_orders import HandledOrder, OrderBatch, candidates
from adapter.registrations.on_orders import CallbacksRejected, Registrar

TOKEN_VARIABLE = "NORCE_ADAPTER_NORCE_TOKEN"  # noqa: S105 - the name of a variable
MOST_SHOWN = 100
NOT_RECORDED = "the reason is not recorded in the ledger, because no service runs on this host"

reason_options = options(
    click.option(
        "--why", type=TEXT, help="Your reason, which is recorded; needed to change several orders or documents."
    ),
    who_option,
)
former_merchant_options = options(
    click.option(
        "--slug", type=TEXT, help="For a merchant that is no longer configured: its part of Norce's host names."
    ),
    click.option(
        "--norce-token-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help=f"A file with the token of such a merchant; without it, the variable {TOKEN_VARIABLE} has it.",
    ),
)


@click.command("register")
@click.argument("order_id", metavar="[ORDER]", type=TEXT, required=False)
@click.option("--merchant", type=TEXT, help="The merchant. Without it: the only one, or with --all-open all of them.")
@click.option("--channel", type=TEXT, help="The channel. Without it: the only one, or with --all-open all of them.")
@click.option("--all-open", is_flag=True, help="All orders that may still change, in the chosen channels.")
@click.option(
    "--file",
    "listing",
    type=click.Path(path_type=Path, allow_dash=True),
    help="The orders in a file, one a line: its id, or merchant, channel and id; - is standard input.",
)
@click.option(
    "--remove",
    is_flag=True,
    help="Remove all callbacks of this adapter instead; with --merchant alone, from all orders.",
)
@former_merchant_options
@click.option("--dry-run", is_flag=True, help="Only count the orders that would change.")
@reason_options
@output_option
@config_option
def register(
    order_id: str | None,
    merchant: str | None,
    channel: str | None,
    *,
    all_open: bool,
    listing: Path | None,
    remove: bool,
    slug: str | None,
    norce_token_file: Path | None,
    dry_run: bool,
    why: str | None,
    who: str,
    output: str,
    config_path: Path,
) -> None:
    """Register the callbacks on an order, or on many.

    Missing callbacks are added, and stale ones of this adapter are removed. After an interruption, run the command
    again: it skips the orders that are done.
    """
    config = with_former_merchant(load_config(config_path), merchant, slug, norce_token_file, removes=remove)
    chosen = sum((order_id is not None, all_open, listing is not None))
    if chosen > 1 or (not chosen and not (remove and merchant)):
        end(USAGE, "choose ORDER, --all-open, --file IDS, or --remove with --merchant")
    if order_id is not None:
        _register_one(config, order_id, merchant, channel, remove=remove, dry_run=dry_run, output=output)
        return
    if not dry_run and not (why or "").strip():
        end(USAGE, "--why is needed, because more than one order may change; --dry-run counts them")
    orders = None if listing is None else _orders_in(listing)
    which = "all-open" if all_open else "all"
    if orders is not None:
        which = f"{sum(map(len, orders.values()))} of a file"
    places = {name: value for name, value in (("merchant", merchant), ("channel", channel)) if value is not None}
    change: dict[str, Any] = {
        "command": "deregister" if remove else "register",
        "by": {"who": who, "why": why or ""},
        "given": {"orders": which, **places},
    }
    action = None if dry_run else record_change(config, change)
    if action is None and not dry_run:
        click.echo(NOT_RECORDED, err=True)
    report = _Report(dry_run=dry_run)
    work = _Work(config, merchant, channel, orders, only_open=all_open, removes=remove, report=report, output=output)
    try:
        call_norce(config, work.run)
    except LookupError as error:
        end(USAGE, str(error))
    finally:
        if action is not None:
            record_change(config, change | {"changed": report.changed, "action": action})
    report.print(output)


def _register_one(
    config: Config,
    order_id: str,
    merchant: str | None,
    channel: str | None,
    *,
    remove: bool,
    dry_run: bool,
    output: str,
) -> None:
    of_channel = _channel(config, merchant, channel, remove=remove)

    async def work(norce: Norce) -> Any:
        registrar = Registrar(config, norce)
        if not remove and await _is_off(config, norce, of_channel):
            end(FAILED, f"nothing was registered: {_off(of_channel)}")
        if dry_run:
            order = await norce.order(of_channel, order_id)
            return registrar.names(registrar.compare(of_channel, order_id, order.data, removes=remove)), None
        try:
            act = registrar.deregister if remove else registrar.register
            return await act(of_channel, order_id), None
        except CallbacksRejected as error:
            return error.done, error

    try:
        done, rejected = call_norce(config, work)
    except LookupError as error:
        end(USAGE, str(error))
    if output == "json":
        refused = (
            {} if rejected is None else {"rejected": {name: str(each) for name, each in rejected.rejected.items()}}
        )
        click.echo(json.dumps(msgspec.to_builtins(done) | refused))
    else:
        for what, names in msgspec.to_builtins(done).items():
            click.echo(f"{what:8} {printable(', '.join(names)) or '-'}")
    if rejected is not None:
        end(FAILED, printable(rejected))


@dataclass(slots=True, kw_only=True)
class _Report:
    """The counts of a run over many orders."""

    dry_run: bool
    orders: int = 0
    changed: int = 0
    unchanged: int = 0
    failed: int = 0
    added: int = 0
    removed: int = 0
    interrupted: bool = False
    switched_off: list[str] = field(default_factory=list)  # channels
    causes: Counter[str] = field(default_factory=Counter)  # of failures: Norce's status
    failures: list[dict[str, str | None]] = field(default_factory=list)

    def add(self, handled: HandledOrder) -> None:
        """Count an order."""
        self.orders += 1
        self.added += len(handled.done.added)
        self.removed += len(handled.done.removed)
        has_changed = bool(handled.done.added or handled.done.removed)
        self.changed += has_changed
        if handled.error is not None:
            self.fail(handled.channel, handled.order_id, handled.error)
        elif not has_changed:
            self.unchanged += 1

    def fail(self, channel: Channel, order_id: str | None, error: NorceError) -> None:
        """Count an order that failed, or a channel whose orders cannot be listed."""
        self.failed += 1
        status = 404 if isinstance(error, NotFound) else error.status
        self.causes["no answer" if status is None else str(status)] += 1
        place = {"merchant": channel.merchant, "channel": channel.name, "order_id": order_id}
        self.failures.append(place | {"code": error.code, "error": str(error)})

    def print(self, output: str) -> None:
        """Print the counts and every failure, and end the command with its exit code."""
        if output == "json":
            click.echo(json.dumps({each.name: getattr(self, each.name) for each in fields(self)}))
        else:
            would = "would change" if self.dry_run else "changed"
            click.echo(
                f"{self.orders} orders: {self.changed} {would} ({self.added} callbacks added, {self.removed} removed), "
                f"{self.unchanged} unchanged, {self.failed} failed"
            )
        lines = [f"{each}; skipped" for each in self.switched_off]
        for each in self.failures[:MOST_SHOWN]:
            order = f", order {each['order_id']}" if each["order_id"] else ""
            lines.append(f"{each['merchant']}, channel {each['channel']}{order}: {each['error']}")
        if len(self.failures) > MOST_SHOWN:
            lines.append(f"and {len(self.failures) - MOST_SHOWN} more; --output json has all")
        if self.failures:
            lines.append(
                f"failed: {', '.join(f'{number} times {cause}' for cause, number in self.causes.most_common())}"
            )
        if self.interrupted:
            lines.append("interrupted; run the same command again to go on: it skips the orders that are done")
        if self.failures or self.interrupted:
            end(FAILED, "\n".join(map(printable, lines)))
        if not self.orders:
            end(NOTHING_MATCHED, "\n".join(map(printable, [*lines, "there is no such order"])))
        for line in lines:
            click.echo(printable(line), err=True)


class _Work:
    """A run over the orders of some channels."""

    def __init__(
        self,
        config: Config,
        merchant: str | None,
        channel: str | None,
        orders: dict[Channel | None, list[str]] | None,
        *,
        only_open: bool,
        removes: bool,
        report: _Report,
        output: str,
    ) -> None:
        self._config = config
        self._merchant = merchant
        self._channel = channel
        self._orders = orders
        self._only_open = only_open
        self._removes = removes
        self._report = report
        self._output = output

    async def run(self, norce: Norce) -> None:
        """Handle the orders channel by channel. The errors of one channel stop no other."""
        registrar, report = Registrar(self._config, norce), self._report
        with stop_signal() as stop, progress_bar(hidden=self._output == "json") as progress:
            for channel, order_ids in await self._chosen(norce):
                if stop.is_set():
                    break
                if not self._removes and await _is_off(self._config, norce, channel):
                    report.switched_off.append(_off(channel))
                    continue
                batch = OrderBatch(registrar, norce, channel, removes=self._removes, dry_run=report.dry_run, stop=stop)
                task = progress.add_task(f"{channel.merchant}, channel {channel.name}", total=None)

                def show(done: int, total: int | None, task: Any = task) -> None:
                    progress.update(task, completed=done, total=total)

                orders = (
                    batch.listed(only_open=self._only_open, progress=show)
                    if order_ids is None
                    else candidates(order_ids, show)
                )
                try:
                    async for handled in batch.handle(orders):
                        report.add(handled)
                except NorceError as error:
                    report.fail(channel, None, error)
            report.interrupted = stop.is_set()

    async def _chosen(self, norce: Norce) -> list[tuple[Channel, list[str] | None]]:
        """Return the channels with their orders of the file; without a file, all orders are meant."""
        if self._orders is None:
            return [(channel, None) for channel in await self._channels(norce)]
        chosen: dict[Channel, list[str]] = {}
        for named, order_ids in self._orders.items():
            merchant, name = named or (self._merchant, self._channel)
            channel = _channel(self._config, merchant, name, remove=self._removes)
            chosen[channel] = list(dict.fromkeys([*chosen.get(channel, ()), *order_ids]))
        return list(chosen.items())

    async def _channels(self, norce: Norce) -> list[Channel]:
        merchant, name = self._merchant, self._channel
        if merchant is None or not self._removes:
            found = [
                each
                for each in self._config.channels
                if merchant in (None, each.merchant) and name in (None, each.name)
            ]
            if not found:
                end(USAGE, "no such merchant and channel is configured")
            return found
        return await channels_of_merchant(self._config, norce, merchant, name)


async def channels_of_merchant(config: Config, norce: Norce, merchant: str, name: str | None) -> list[Channel]:
    """Return the channels of a merchant, those that are configured and those that Norce lists."""
    if merchant not in config.merchants:
        end(USAGE, f"no merchant {printable(merchant)} is configured; for one that was, give --slug and its token")
    if name is not None:
        return [Channel(merchant, name)]
    configured = [each for each in config.channels if each.merchant == merchant]
    found = list(dict.fromkeys([*configured, *await channels_at_norce(norce, merchant)]))
    if not found:
        end(USAGE, f"Norce lists no channel of merchant {printable(merchant)}; give --channel")
    return found


def with_former_merchant(
    config: Config, merchant: str | None, slug: str | None, token_file: Path | None, *, removes: bool
) -> Config:
    """Return the configuration, and with `--slug` a merchant that is no longer in it.

    Without the option, a typing error in the merchant's name would send a token to another host.
    """
    if slug is None:
        if token_file is not None:
            end(USAGE, "--norce-token-file needs --slug")
        return config
    if not removes or merchant is None or merchant in config.merchants:
        end(USAGE, "--slug is for --remove with a --merchant that is no longer configured")
    if not re.match(SLUG, slug):
        end(USAGE, f"--slug must be {SLUG_IN_WORDS}")
    try:
        token = os.environ.get(TOKEN_VARIABLE, "") if token_file is None else token_file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        end(USAGE, f"{token_file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}")
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", token.strip()):
        end(USAGE, f"give the merchant's token in the variable {TOKEN_VARIABLE} or with --norce-token-file")
    former = MerchantConfig(slug=slug, tokens=(Secret(token.strip()),), channels={})
    return msgspec.structs.replace(config, merchants={**config.merchants, merchant: former})


def _channel(config: Config, merchant: str | None, channel: str | None, *, remove: bool) -> Channel:
    """Return the only channel that is meant. To leave it, it need not be configured."""
    if remove and channel is not None and merchant in config.merchants:
        return Channel(str(merchant), channel)
    return only_channel(config, merchant, channel)


async def _is_off(config: Config, norce: Norce, channel: Channel) -> bool:
    try:
        return await is_switched_off(config, norce, channel)
    except NorceError as error:  # as in the service, a document that cannot be read changes nothing
        place = f"{channel.merchant}, channel {channel.name}"
        click.echo(printable(f"{place}: the configuration document cannot be read: {error}"), err=True)
        return False


def _off(channel: Channel) -> str:
    return f"{channel.merchant}, channel {channel.name}: Norce's configuration has this adapter switched off"


def _orders_in(listing: Path) -> dict[Channel | None, list[str]]:
    """Return the ids of the orders in a file, by their channel.

    The channel is None if a line has only the id. Empty lines and comments (#) are skipped.
    """
    found: dict[Channel | None, dict[str, None]] = {}
    wrong = []
    try:
        text = sys.stdin.read() if str(listing) == "-" else listing.read_text("utf-8", "replace")
    except OSError as error:
        end(USAGE, f"{listing} cannot be read: {error.strerror}")
    for number, line in enumerate(text.splitlines(), 1):
        order_id, channel = line.strip(), None
        if not order_id or order_id.startswith("#"):
            continue
        if len(words := order_id.split()) == 3:
            channel, order_id = Channel(words[0], words[1]), words[2]
        try:
            check_order_id(order_id)
        except CallbackInvalid as error:
            wrong.append(f"{listing}:{number}: {error}")
        found.setdefault(channel, {})[order_id] = None
    if wrong:
        end(USAGE, "\n".join(map(printable, wrong[:MOST_SHOWN])))
    return {channel: list(order_ids) for channel, order_ids in found.items()}
