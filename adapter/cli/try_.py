"""The command `try`: runs a handler once on an order, and shows what it sends."""

import asyncio
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx

from adapter.cli.explain import bytes_of, order_in_file
from adapter.cli.masks import Masker, message_lines, secrets_in
from adapter.cli.shared import FAILED, USAGE, config_option, end, load_config_and_routes, printable
from adapter.identifiers import Channel
from adapter.plugin import Done, Outcome, Refuse, Skip, Url
from adapter.routing.routes import Route
from adapter.testing import PlayedDelivery, PlayedVerdict, SentRequest, ask, notification, play
from adapter.testing import order as order_for

# Parts that the simulated Norce expects of every order.
PARTS: dict[str, Any] = {
    "id": "order",
    "merchant": "",
    "channel": "",
    "lastModified": None,
    "state": {},
    "attributes": {},
    "payments": [],
    "shippings": [],
    "consents": [],
}


@click.command("try")
@click.argument("file", metavar="FILE")
@click.option("--route", "name", required=True, help="The route whose handler and settings are used.")
@click.option("--against", metavar="URL", help="Send every request to this server instead, with its own path.")
@config_option
def try_command(file: str, name: str, against: str | None, config_path: Path) -> None:
    """Run the handler of a route once on an order, and show each request and its answer.

    FILE holds an order, an envelope or an event record; - is standard input. What the handler does at its destination
    is real, unless --against leads elsewhere. Norce is simulated, with this one order. No condition is evaluated
    (`explain` does that), and nothing is stored or repeated; after an unknown outcome the handler looks it up.

    Secrets are masked, and so are headers that may hold one. The order and the answers are shown as they are. The
    command fails if the handler does.
    """
    config, routes = load_config_and_routes(config_path)
    route = next((each for each in routes.all if each.name == name), None)
    if route is None:
        end(USAGE, f"no route {name} is configured; there are: {', '.join(sorted(config.routes))}")
    tree = order_in_file(bytes_of(file), file)
    order = order_for(base=PARTS | tree | dict.fromkeys(("validations", "hooks", "notifications"), ()))
    settings = route.settings[_channel_of(route, Channel(order.merchant, order.channel))]
    try:
        target = None if against is None else httpx.URL(Url(against))
    except ValueError as error:
        end(USAGE, f"--against {error}")
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(int).result()  # the guard of `play` lets only threads connect that were there before
        limit = min(route.timeout, route.callback.deadline)
        system = _Destination(thread, target, limit)
        played: PlayedDelivery | PlayedVerdict
        if route.callback.kind == "notification":
            about = notification(order, callback=route.callback.name)
            played = play(route.handler, about, system, settings=settings, timeout=limit, schedule=())  # type: ignore[arg-type]
        else:
            kind, within = route.callback.kind, route.callback.target or "/-"
            played = ask(route.handler, order, system, settings=settings, kind=kind, target=within, deadline=limit)
    mask = Masker([*secrets_in(settings), *(token for its in config.merchants.values() for token in its.tokens)])
    for line in mask("\n".join(_lines(played, system.answers))).splitlines():
        click.echo(printable(line))
    is_good = isinstance(played.outcome, Done | Skip) if isinstance(played, PlayedDelivery) else not played.missing
    if not is_good:
        end(FAILED, "the handler failed")


def _channel_of(route: Route, given: Channel) -> Channel:
    """Return the channel whose settings are used: that of the order, or else the only one."""
    if given not in route.settings and len(route.settings) > 1:
        ours = ", ".join(f"{each.merchant} {each.name}" for each in route.settings)
        end(USAGE, f"the merchant and channel of the order are not of this route, which has: {ours}")
    return given if given in route.settings else next(iter(route.settings))


class _Destination:
    """The real destination, or the server at `target`, as the system of a play.

    It keeps the answers by the identity of their requests.
    """

    def __init__(self, thread: ThreadPoolExecutor, target: httpx.URL | None, limit: timedelta) -> None:
        self.answers: dict[int, httpx.Response] = {}
        self._thread = thread
        self._target = target
        self._http = httpx.Client(trust_env=False, timeout=limit.total_seconds())

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        url, headers = request.url, httpx.Headers(request.headers)
        if (to := self._target) is not None:
            url = url.copy_with(scheme=to.scheme, host=to.host, port=to.port)
            headers["host"] = url.netloc.decode("ascii")
        led = httpx.Request(request.method, url, headers=headers, content=request.content)
        answer = await asyncio.get_running_loop().run_in_executor(self._thread, partial(self._http.send, led))
        self.answers[id(request)] = answer
        plain = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
        return httpx.Response(answer.status_code, headers=plain, content=answer.content)


def _lines(played: PlayedDelivery | PlayedVerdict, answers: dict[int, httpx.Response]) -> list[str]:
    lines = [line for sent in played.requests for line in _exchange(sent, answers.get(id(sent.request)))]
    for error in played.errors:
        lines += "".join(traceback.format_exception(error)).splitlines()
    if isinstance(played, PlayedDelivery):
        lines += [f"{each.kind}: {_in_words(each.outcome)}" for each in played.attempts]
        return [*lines, f"the delivery ends as: {played.reason}"]
    if played.missing is not None:
        return [*lines, f"no answer ({played.missing}): {played.error or ''}"]
    if played.refusal is not None:
        return [*lines, f"refused: {_in_words(played.refusal)}"]
    lines += [f"problem {each.code}: {each.message}" for each in played.problems]
    lines += [f"patch {each.op} {each.path} {json.dumps(each.value, default=str)}" for each in played.patches]
    return [*lines, "rejected" if played.problems else "patched" if played.patches else "approved"]


def _in_words(outcome: Done | Skip | Outcome | Refuse | None) -> str:
    if isinstance(outcome, Done):
        return f"Done {outcome.reference or ''} {dict(outcome.facts) or ''}".rstrip()
    if outcome is None:
        return "no effect is there"
    return f"{type(outcome).__name__} {outcome.reason if isinstance(outcome, Skip) else outcome}"


def _exchange(sent: SentRequest, answer: httpx.Response | None) -> list[str]:
    request = sent.request
    lines = [f"→ {request.method} {request.url}", *message_lines(request.headers, request.content)]
    lines.append(f"← {'no answer' if sent.status is None else sent.status}")
    return lines if answer is None else [*lines, *message_lines(answer.headers, answer.content)]
