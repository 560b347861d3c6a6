"""The command `send`: sends an order to a callback, as Norce does."""

import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click
import httpx
from rich.console import Console
from rich.progress import track

from adapter.callbacks.endpoints import RESULT_HEADER
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import CALLBACK_PATH
from adapter.cli.shared import FAILED, USAGE, config_option, end, load_config, printable
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.orders import NotAnOrder, decode

# The results of a notification, in words for people.
RESULTS = {
    "new": "it is stored, and each route that wants it delivers it",
    "repeat": "the ledger has this event already, so nothing is delivered; to deliver it again: {resend}",
    "retried": "the ledger has this event already, and its dead letter is retried",
    "conflict": "the ledger has this event with another order, so routes that read the order again do so",
    "unread": "beyond the limits of its order, so routes that read the order again do so; its body is not stored",
}


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--callback", required=True, help="The name of a configured callback.")
@click.option("--to", "address", help="The URL of the public port; by default the configured port on this host.")
@click.option("--merchant", help="Replaces the merchant in the order.")
@click.option("--channel", help="Replaces the channel in the order.")
@click.option("--order", "order_id", help="Replaces the id in the order.")
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(1, 100_000), help="How often to send it.")
@click.option("--expect", type=click.IntRange(100, 599), help="Fail if an answer has another status.")
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
    """Send an order from FILE to a callback, and print what happened.

    FILE is an order, an envelope or an event record of Norce's Notification API, as JSON. The URL is signed as it is
    when registered at Norce.
    """
    config = load_config(config_path)
    if callback not in config.callbacks:
        end(USAGE, f"no callback {callback} is configured, only {', '.join(sorted(config.callbacks))}")
    replaced = {"id": order_id, "merchant": merchant, "channel": channel}
    body, order = _read_order(file, {name: value for name, value in replaced.items() if value is not None})
    order_id, merchant, channel = (order.get(name) for name in replaced)
    named = merchant and channel and order_id
    if not named or not (isinstance(merchant, str) and isinstance(channel, str) and isinstance(order_id, str)):
        end(USAGE, "the order lacks an id, a merchant or a channel; give --order, --merchant and --channel")
    to = address or f"http://127.0.0.1:{config.server.port}"
    url, headers = _authenticate(config, to, Channel(merchant, channel), order_id, callback)
    try:
        answers = _post(url, headers, body, repeat, config.callbacks[callback].kind)
    except httpx.HTTPError as error:
        end(FAILED, f"no answer from {to}: {type(error).__name__}")
    for status in sorted({status for status, _ in answers}):
        click.echo(f"{status}: {sum(count for (each, _), count in answers.items() if each == status)}")
    chosen = f"--order {shlex.quote(order_id)} --merchant {shlex.quote(merchant)} --channel {shlex.quote(channel)}"
    resend = f"norce-adapter deliveries resend {chosen} --why …"
    for (_, result), count in answers.items():
        if result:
            words = RESULTS[result].format(resend=resend) if result in RESULTS else ""
            click.echo(printable(f"{result}: {count}" + (f" ({words})" if words else "")))
    if expect is not None and {status for status, _ in answers} != {expect}:
        end(FAILED, f"expected {expect} each time")


def _read_order(file: Path, replaced: dict[str, str]) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes to send and the order in them."""
    raw = file.read_bytes()
    try:
        tree = decode(raw)
    except NotAnOrder:
        tree = None
    if not isinstance(tree, dict):
        end(USAGE, f"{file} is not a JSON object")
    if isinstance(tree.get("payload"), dict):  # an event record of the Notification API
        tree = tree["payload"]
        raw = json.dumps(tree, ensure_ascii=False).encode()
    order = tree.get("order", tree)
    if not isinstance(order, dict):
        end(USAGE, f"{file} contains no order")
    if replaced:
        order.update(replaced)
        raw = json.dumps(tree, ensure_ascii=False).encode()
    return raw, order


def _authenticate(
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
    is_answered = callback in config.callbacks and config.callbacks[callback].kind != "notification"
    for in_url in () if is_answered else config.senders.url_secrets:
        if in_url.merchants is None or channel.merchant in in_url.merchants:
            return f"{url}?{urlencode({in_url.parameter: in_url.values[0].reveal()})}", headers
    which = "for a validation or hook" if is_answered else "in senders"
    return end(USAGE, f"no secret {which} is for merchant {channel.merchant}")


def _result(kind: str, answer: httpx.Response) -> str:
    """Return what an answer says for people: the patch of a hook, for example."""
    if answer.status_code != 200:
        return ""
    if kind == "notification":
        return str(answer.headers.get(RESULT_HEADER, ""))
    if kind == "validation":
        return "approved"
    return f"patch {answer.text}" if answer.text != "[]" else "accepted without a patch"


def _post(url: str, headers: dict[str, str], body: bytes, repeat: int, kind: str) -> Counter[tuple[int, str]]:
    """Count the answers by their status and result."""
    answers: Counter[tuple[int, str]] = Counter()
    times = range(repeat)
    with httpx.Client(trust_env=False, timeout=30) as http:
        for _ in track(times, "sending", console=Console(stderr=True)) if repeat > 1 and sys.stderr.isatty() else times:
            answer = http.post(url, headers=headers, content=body)
            answers[answer.status_code, _result(kind, answer)] += 1
            if answer.status_code >= 400 and repeat == 1:
                click.echo(answer.text, err=True)
    return answers
