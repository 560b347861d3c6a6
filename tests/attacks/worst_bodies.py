"""Search for the bodies of at most 1 MiB that hold the service's loop longest.

`python -m tests.attacks.worst_bodies --minutes 60` tries random bodies (wide, deep, many names, numbers, escapes) with
each part of the service that reads a body, changes the slowest ones, and prints the worst of each part: how long the
loop waited, how long the work took, and how often that is the time of a plain decode by msgspec. With `--keep` it
writes them to `worst_bodies.json`, which `test_worst_bodies.py` reads.

Times are those of the processor, so that a busy machine does not matter. Work on another thread holds the loop only
while it keeps the interpreter.
"""

import asyncio
import contextlib
import gc
import inspect
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import msgspec

from adapter.callbacks.parsing import parse_hook, parse_notification
from adapter.callbacks.senders import RawCallback, Sender
from adapter.callbacks.server import COLLECT_AFTER
from adapter.conditions import Condition
from adapter.handlers.rules import Rules, RulesSettings
from adapter.identifiers import Channel
from adapter.norce import client
from adapter.offload import offload
from adapter.orders import NotAnOrder, decode, order_digest, order_in, read_order
from adapter.plugin import Patch
from adapter.reconciliation import events
from adapter.routing.routes import Callback
from adapter.verdicts.answer import Verdict, combine

KEPT = Path(__file__).with_name("worst_bodies.json")
MIB = 1024 * 1024
CHANNEL = Channel("norce", "1")
SENDER = Sender(scheme="header", key="a", channel=CHANNEL)

# Parts of a body. `%` is replaced by a number that grows, so that no two are equal.
SCALARS = (
    "1", "0", "-1", "%", "-%", "1.0", "1.5", "%.5", "%.0", "0.%1", "1e5", "1e22", "1e308", "1e400", "5e-324", "%e-300",
    "1.7976931348623157e308", "0.30000000000000004", "9007199254740993", "9223372036854775807", "9223372036854775808",
    "100000000000000000000", "1000000000000000000%", "-100000000000000000000", "1" * 400, "9" * 4299, "9" * 5000,
    "true", "null", '""', '"a"', '"%"', '"' + "a" * 1000 + '"', r'"\n"', r'"\u0041%"', r'"\ud83d"', r'"\ud83d\ude00"',
    r'"\\\\\ud83d"',
    '"' + r"\\" * 500 + '"', '"' + r"\u00e9" * 500 + '"', '"' + r"\ud83d" * 500 + '"', '"é"', '"日本"', '"😀%"',
    "[]", "{}", "[%]", "[%.0]", '{"a":1}', '{"a":%}', '{"":%}', '{"a":1,"a":2}', '{"includingVat":1.5}',
    '{"quantity":1}', '{"quantity":1e99}', '{"vatRate":0.25}', '{"vatRate":1e99}', '{"price":{"includingVat":%.5}}',
    "[[1]]", '{"quantity":100000000000000000000}', '{"price":{"includingVat":%.25}}', '{"sku":"AB-%","quantity":%}',
)  # fmt: skip
NAMES = ('"%"', '"a%"', '""', '"a"', r'"\u0061%"', r'"\ud83d%"', '"é%"', '"' + "n" * 200 + '%"')
SEPARATORS = (",", " , ", ",\n\t", "," + " " * 50)
DEPTHS = (0, 0, 0, 0, 1, 5, 50, 150)

# Schemas that `check` accepts, each near the bound of what it accepts.
SCHEMAS: dict[str, Any] = {
    "types": {"items": {"type": ["string", "number", "object", "array", "boolean", "null"]}},
    "quantity": {"items": {"properties": {"quantity": {"minimum": -1, "maximum": 1e300}}}},
    "enum of fractions": {"items": {"properties": {"vatRate": {"enum": [0, 0.06, 0.12, 0.25, 1e99]}}}},
    "multiples": {"items": {"properties": {"price": {"properties": {"includingVat": {"multipleOf": 0.01}}}}}},
    "unique": {"uniqueItems": True, "items": {"type": ["number", "string"]}},
    "contains": {"contains": {"properties": {"quantity": {"const": -1}}}},
    "pattern": {"not": {"contains": {"pattern": "[01]*1[01]{9}2"}}},
    "recursive": {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": ["number", "string", "object"]}]},
    "names": {"propertyNames": {"maxLength": 300}, "patternProperties": {"^a": {"maxLength": 300}}},
}


class Recipe(msgspec.Struct, frozen=True):
    """A body: parts in turn, inside an array or an object."""

    parts: tuple[str, ...]
    name: str | None = None  # of each member; None makes an array
    separator: str = ","
    depth: int = 0  # of each part
    has_moment: bool = True

    def content(self, size: int) -> str:
        """Return an array or object of at most this size."""
        opened, closed = "[" * self.depth, "]" * self.depth
        written, length, number = [], 0, 0
        while True:
            part = opened + self.parts[number % len(self.parts)].replace("%", str(number)) + closed
            if self.name is not None:
                part = f"{self.name.replace('%', str(number))}:{part}"
            length += len(part.encode()) + len(self.separator)
            if length > size:
                break
            written.append(part)
            number += 1
        text = self.separator.join(written)
        return f"[{text}]" if self.name is None else f"{{{text}}}"

    def order(self, size: int = MIB) -> bytes:
        """Return an order with this content as the items of its cart."""
        moment = '"lastModified":"2026-02-03T08:16:40Z",' if self.has_moment else ""
        return f'{{"id":"o",{moment}"cart":{{"items":{self.content(size - 200)}}}}}'.encode()


def raw_callback(body: bytes) -> RawCallback:
    return RawCallback(
        method="POST",
        order_id="o",
        callback="c",
        query={},
        headers={"content-type": "application/json"},
        body=body,
    )


Measured = Callable[[], Any]  # the work whose time counts; it may have to be awaited


def decoding(recipe: Recipe) -> Measured:
    body = recipe.order()
    return lambda: offload(MIB, decode, body)


def notification(recipe: Recipe) -> Measured:
    raw = raw_callback(recipe.order())
    callback = Callback(name="c", kind="notification", condition=Condition("/cart").compile())
    return lambda: parse_notification(raw, SENDER, callback, {CHANNEL}, 2_000_000_000_000)


def hook(recipe: Recipe) -> Measured:
    raw = raw_callback(recipe.order())
    return lambda: asyncio.to_thread(parse_hook, raw, SENDER, Callback(name="c", kind="hook"), {CHANNEL})


def digest(recipe: Recipe) -> Measured:
    order = order_in(decode(recipe.order()))
    return lambda: offload(MIB, order_digest, order)


def evaluation(schema: Any) -> Callable[[Recipe], Measured]:
    condition = Condition("/cart/items", schema).compile()

    def prepare(recipe: Recipe) -> Measured:
        order = order_in(decode(recipe.order()))
        return lambda: condition.evaluate(order)

    return prepare


def rules(recipe: Recipe) -> Measured:
    """Thirty rules on the items: the runner lets other tasks run between them."""
    order = read_order(recipe.order())
    rule = {"scope": "/cart/items", "schema": SCHEMAS["quantity"], "code": "c", "message": "m"}
    settings = msgspec.convert({"rules": [rule] * 30}, RulesSettings)
    context: Any = SimpleNamespace(settings=settings)
    return lambda: Rules().validate(order, context)


def patching(recipe: Recipe) -> Measured:
    """Two routes replace the items; a third changes a thousand of them."""
    order = read_order(recipe.order())
    items = order.data["cart"]["items"]
    whole = [Patch.replace("/cart/items", items)]
    keys = list(range(len(items))) if isinstance(items, list) else [key for key in items if key and "/" not in key]
    single = [Patch.replace(f"/cart/items/{key}", 1) for key in keys[:1000] if "~" not in str(key)]
    callback = Callback(name="c", kind="hook", target="/cart")
    route: Any = SimpleNamespace(name="r", callback=callback, no_answer="approve")
    verdicts = [
        Verdict(route=route, decided="patch", patches=each, started_at=0, ended_at=0) for each in (whole, single, whole)
    ]
    return lambda: asyncio.to_thread(combine, callback, order, verdicts)


def listing(recipe: Recipe) -> Measured:
    page = b'{"data":%s}' % recipe.content(MIB - 20).encode()
    return lambda: client._page(page, 0, dict)


EVENT = '{"id":"e","createdAt":"2026-02-03T08:16:40Z","merchant":"m","channel":"1","orderId":"o","payload":PAYLOAD}'


def event_log(recipe: Recipe) -> Measured:
    page = f'{{"data":[{EVENT.replace("PAYLOAD", recipe.content(MIB - 200))}]}}'.encode()
    return lambda: client._page(page, 0, client.Event)


def many_events(recipe: Recipe) -> Measured:
    parts = tuple(EVENT.replace("PAYLOAD", part) for part in recipe.parts)
    several = msgspec.structs.replace(recipe, parts=parts, depth=0, name=None)
    page = b'{"data":%s}' % several.content(MIB - 20).encode()
    return lambda: client._page(page, 0, client.Event)


def registered_names(recipe: Recipe) -> Measured:
    payload = msgspec.Raw(b'{"notification":%s}' % recipe.content(MIB - 30).encode())
    return lambda: events._names_in(payload)


PARTS: dict[str, Callable[[Recipe], Measured]] = {
    "decode": decoding,
    "parse a notification": notification,
    "parse a hook": hook,
    "digest": digest,
    **{f"condition: {name}": evaluation(schema) for name, schema in SCHEMAS.items()},
    "thirty rules": rules,
    "patches": patching,
    "list of orders": listing,
    "an event": event_log,
    "many events": many_events,
    "names in an event": registered_names,
}


class Found(msgspec.Struct, frozen=True):
    """A body and its times in one part of the service."""

    part: str
    held_ms: float  # how long the loop waited
    took_ms: float
    ratio: float  # of `held_ms` to a plain decode of the same body
    recipe: Recipe


def measure(part: str, recipe: Recipe, *, times: int = 1) -> Found:
    """Return the shortest of some times."""
    try:
        work = PARTS[part](recipe)
    except NotAnOrder:  # the parser refuses it
        return Found(part, 0, 0, 0, recipe)
    plain = plain_seconds(recipe.order(), times=times)
    held, took = min(asyncio.run(_watched(work)) for _ in range(times))
    return Found(part, round(held * 1000, 1), round(took * 1000, 1), round(held / max(plain, 0.001), 1), recipe)


async def _watched(work: Measured) -> tuple[float, float]:
    """Return for how long another task waited at most, and how long the work took."""
    longest, last = 0.0, time.process_time()

    def note() -> None:
        nonlocal longest, last
        now = time.process_time()
        longest, last = max(longest, now - last), now

    async def other_task() -> None:
        while True:
            note()
            await asyncio.sleep(0)

    other = asyncio.create_task(other_task())
    await asyncio.sleep(0)
    began = time.process_time()
    with contextlib.suppress(Exception):  # a refusal is as good
        result = work()
        if inspect.isawaitable(result):
            await result
    took = time.process_time() - began
    other.cancel()
    note()
    return longest, took


def plain_seconds(body: bytes, *, times: int) -> float:
    """Return the shortest time of a plain decode without garbage collections, also of one that fails."""

    def once() -> float:
        began = time.process_time()
        with contextlib.suppress(msgspec.DecodeError):
            msgspec.json.decode(body)
        return time.process_time() - began

    is_collecting = gc.isenabled()
    gc.disable()
    try:
        return min(once() for _ in range(times))
    finally:
        if is_collecting:
            gc.enable()


def random_recipe(chance: random.Random) -> Recipe:
    return Recipe(
        parts=tuple(chance.choices(SCALARS, k=chance.choice((1, 1, 1, 2, 3)))),
        name=chance.choice((None, None, *NAMES)),
        separator=chance.choice((",", ",", ",", *SEPARATORS)),
        depth=chance.choice(DEPTHS),
        has_moment=chance.random() < 0.5,
    )


def changed(recipe: Recipe, chance: random.Random) -> Recipe:
    other = random_recipe(chance)
    field = chance.choice(("parts", "name", "separator", "depth", "has_moment", "more"))
    if field == "more":
        return msgspec.structs.replace(recipe, parts=recipe.parts + other.parts[:1])
    return msgspec.structs.replace(recipe, **{field: getattr(other, field)})


def search(seconds: float, seed: int, parts: list[str]) -> Iterator[dict[str, Found]]:
    """Search for the worst body of each part; yield the worst so far after each round."""
    chance = random.Random(seed)
    worst: dict[str, Found] = {}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for part in parts:
            known = worst.get(part)
            recipe = random_recipe(chance) if known is None or chance.random() < 0.5 else changed(known.recipe, chance)
            found = measure(part, recipe)
            if known is None or found.held_ms > known.held_ms:
                found = measure(part, recipe, times=3)
                if known is None or found.held_ms > known.held_ms:
                    worst[part] = found
        yield worst


def shown(worst: dict[str, Found]) -> str:
    lines = [f"{'part':32}{'held ms':>8}{'took ms':>9}{'x decode':>10}  body"]
    for found in sorted(worst.values(), key=lambda each: -each.held_ms):
        recipe = {name: value for name, value in msgspec.to_builtins(found.recipe).items() if value}
        times = f"{found.held_ms:>8}{found.took_ms:>9}{found.ratio:>10}"
        lines.append(f"{found.part:32}{times}  {json.dumps(recipe)[:150]}")
    return "\n".join(lines)


@click.command()
@click.option("--minutes", type=float, default=1)
@click.option("--seed", type=int, default=None)
@click.option("--part", "parts", multiple=True, type=click.Choice(sorted(PARTS)))
@click.option("--keep", is_flag=True, help=f"write {KEPT.name}")
def main(minutes: float, seed: int | None, parts: tuple[str, ...], *, keep: bool) -> None:
    """Search, and print the worst body of each part."""
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])  # as the service does
    seed = random.randrange(1_000_000) if seed is None else seed
    click.echo(f"seed {seed}")
    worst: dict[str, Found] = {}
    for number, worst in enumerate(search(minutes * 60, seed, list(parts) or list(PARTS))):
        if number % 100 == 99:
            click.echo(shown(worst))
    click.echo(shown(worst))
    if keep:
        KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(list(worst.values())), indent=1) + b"\n")


if __name__ == "__main__":
    main()
