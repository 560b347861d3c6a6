"""The worst cases of the conditions of one answer, computed and never timed."""

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adapter import config as configuration
from adapter.conditions import CompiledCondition, Condition
from adapter.config import ConfigurationInvalid
from adapter.handlers.rules import Rules
from adapter.routing.routes import Routes, build
from adapter.routing.worst_cases import worst_case

MIB = 1024 * 1024
LINE: dict[str, Any] = {"items": {"properties": {"sku": {"pattern": "^[A-Z]{2}"}, "quantity": {"maximum": 10}}}}
SECRET = "a-secret-of-thirty-two-characters"
HEAD = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
merchants: {norce: {slug: shop, tokens: ["${env:SECRET}"], channels: {"1": {}}}}
senders: {header_secrets: [{header: authorization, values: ["${env:SECRET}"]}]}
server: {max_body_bytes: BYTES}
callbacks:
  cart-changed: {kind: hook, watch: /cart, deadline: DEADLINE}
  order-rules: {kind: validation, deadline: DEADLINE}
routes:
"""


def compiled(*scopes: str, schema: Any = LINE) -> list[CompiledCondition]:
    return [Condition(scope, schema).compile() for scope in scopes]


class Point:
    name = "rules"

    def load(self) -> type[Rules]:
        return Rules


def rules(name: str, number: int, scope: str = "/cart/items", *, callback: str = "cart-changed", more: str = "") -> str:
    schema = "{items: {properties: {sku: {pattern: '^[A-Z]{2}'}, quantity: {maximum: 10}}}}"
    rule = f"{{scope: {scope}, schema: {schema}, code: a-code, message: m}}"
    return (
        f"  {name}: {{callback: {callback}, handler: rules, no_answer: reject{more},"
        f" settings: {{rules: [{', '.join([rule] * number)}]}}}}\n"
    )


def made(folder: Path, routes: str, *, deadline: str = "2s", max_body_bytes: int = MIB) -> Routes:
    path = folder / "config.yaml"
    path.write_text(HEAD.replace("DEADLINE", deadline).replace("BYTES", str(max_body_bytes)) + routes)
    points: Any = [Point()]
    return build(configuration.load(path, {"SECRET": SECRET}), points)


def refusal(folder: Path, routes: str, **more: Any) -> str:
    with pytest.raises(ConfigurationInvalid) as raised:
        made(folder, routes, **more)
    [problem] = raised.value.problems
    return f"{problem.path}: {problem.message}"


def test_the_worst_case_grows_with_the_schema_and_with_the_order() -> None:
    schemas: list[Any] = [
        {"type": "string"},
        {"items": {"type": "string"}},
        {"items": {"type": "string", "minLength": 1}},
        LINE,
        {"uniqueItems": True, "items": {"type": "string"}},
    ]

    cases = [worst_case(compiled("/a", schema=schema), MIB) for schema in schemas]

    assert all(one < other for one, other in pairwise(cases))
    assert cases[-1] <= timedelta(milliseconds=50)
    [condition] = compiled("/a")
    assert condition.worst_case(4 * MIB) == 4 * condition.worst_case(MIB)


def test_conditions_on_one_part_of_an_order_add_up() -> None:
    one = worst_case(compiled("/cart/items"), MIB)

    assert worst_case(compiled(*["/cart/items"] * 5), MIB) == 5 * one
    assert worst_case(compiled("/cart", "/cart/items", "/cart/items/a"), MIB) == 3 * one


def test_conditions_on_different_parts_share_the_bytes_of_an_order() -> None:
    one = worst_case(compiled("/cart/items"), MIB)

    assert worst_case(compiled("/cart/items", "/payments", "/cartons", "/cart/attributes"), MIB) == one
    assert worst_case(compiled("/cart", "/cart/items", "/cart/discounts", "/payments"), MIB) == 2 * one
    assert worst_case([], MIB) == timedelta()


def test_rules_that_could_take_more_than_half_of_the_deadline_are_refused(tmp_path: Path) -> None:
    one = worst_case(compiled("/cart/items"), MIB)
    fits = int(timedelta(seconds=1) / one)

    assert made(tmp_path, rules("first", fits - 1) + rules("second", 1)).of("cart-changed")
    text = refusal(tmp_path, rules("first", fits) + rules("second", 1))

    assert text.startswith("callbacks.cart-changed.deadline: the conditions of its routes (first, second) could ")
    assert "1.0 s for an order of 1 MiB" in text
    assert "raise the deadline" in text
    assert made(tmp_path, rules("first", fits) + rules("second", 1), deadline="3s").of("cart-changed")


def test_rules_on_different_parts_are_accepted_together(tmp_path: Path) -> None:
    scopes = [f"/cart/attributes/a{number}" for number in range(200)]

    assert made(tmp_path, "".join(rules(f"r{number}", 1, scope) for number, scope in enumerate(scopes)))


def test_the_largest_body_counts_for_hooks_and_the_largest_order_at_norce_for_validations(tmp_path: Path) -> None:
    one = worst_case(compiled("/cart/items"), MIB)
    number = int(timedelta(seconds=1) / one) // 2

    assert made(tmp_path, rules("first", number))
    assert "for an order of 4 MiB" in refusal(tmp_path, rules("first", number), max_body_bytes=4 * MIB)
    assert "for an order of 4 MiB" in refusal(tmp_path, rules("first", number, callback="order-rules"))


def test_conditions_of_routes_count_and_shadows_do_not(tmp_path: Path) -> None:
    when = ", when: {scope: /cart/items, schema: {uniqueItems: true, items: {type: string}}}"
    routes = "".join(rules(f"r{number}", 1, "/payments", more=when) for number in range(35))

    assert "cart-changed" in refusal(tmp_path, routes)
    assert made(tmp_path, routes.replace("no_answer: reject", "no_answer: approve, mode: shadow"))
