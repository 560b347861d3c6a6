import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry

from adapter.conditions import MISSING, Condition, ConditionInvalid, Evaluation, Result, parse_scope
from adapter.conditions.schemas import (
    MAX_NODES,
    MAX_PATTERN_LENGTH,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_SCOPE_LENGTH,
    CheckedSchema,
)
from adapter.orders import MAX_DEPTH, decode

CASES = Path(__file__).parent
SUITE = Path(sys.prefix) / "json-schema-test-suite"


# The official suite ------------------------------------------------------------------------------------------------

# Groups of the suite that are refused: they need another document or a metaschema, or could be slow on a large order,
# such as those that compare each number of a bare list, or whole objects with one another.
# All of dynamicRef.json is refused, too.
NOT_SUPPORTED = {
    ("defs.json", "validate definition against metaschema"): "ref_remote",
    ("ref.json", "remote ref, containing refs itself"): "ref_remote",
    ("refRemote.json", "remote ref"): "ref_remote",
    ("refRemote.json", "fragment within remote ref"): "ref_remote",
    ("refRemote.json", "anchor within remote ref"): "ref_remote",
    ("refRemote.json", "ref within remote ref"): "ref_remote",
    ("refRemote.json", "base URI change"): "ref_remote",
    ("refRemote.json", "base URI change - change folder"): "ref_remote",
    ("refRemote.json", "base URI change - change folder in subschema"): "ref_remote",
    ("refRemote.json", "root ref in remote ref"): "ref_remote",
    ("refRemote.json", "remote ref with ref to defs"): "ref_remote",
    ("refRemote.json", "Location-independent identifier in remote ref"): "ref_remote",
    ("refRemote.json", "retrieved nested refs resolve relative to their URI not $id"): "ref_remote",
    ("refRemote.json", "remote HTTP ref with different $id"): "ref_remote",
    ("refRemote.json", "remote HTTP ref with different URN $id"): "ref_remote",
    ("refRemote.json", "remote HTTP ref with nested absolute ref"): "ref_remote",
    ("refRemote.json", "$ref to $ref finds detached $anchor"): "ref_remote",
    ("contains.json", "contains keyword validation"): "too_slow",
    ("contains.json", "contains keyword with const keyword"): "too_slow",
    ("contains.json", "items + contains"): "too_slow",
    ("items.json", "items does not look in applicators, valid case"): "too_slow",
    ("maxContains.json", "maxContains with contains"): "too_slow",
    ("maxContains.json", "maxContains with contains, value with a decimal"): "too_slow",
    ("maxContains.json", "minContains < maxContains"): "too_slow",
    ("minContains.json", "minContains=1 with contains"): "too_slow",
    ("minContains.json", "minContains=2 with contains"): "too_slow",
    ("minContains.json", "minContains=2 with contains with a decimal value"): "too_slow",
    ("minContains.json", "maxContains = minContains"): "too_slow",
    ("minContains.json", "maxContains < minContains"): "too_slow",
    ("minContains.json", "minContains = 0"): "too_slow",
    ("minContains.json", "minContains = 0 with maxContains"): "too_slow",
    ("patternProperties.json", "multiple simultaneous patternProperties are validated"): "too_slow",
    ("uniqueItems.json", "uniqueItems validation"): "unique_items",
    ("uniqueItems.json", "uniqueItems with an array of items"): "unique_items",
    ("uniqueItems.json", "uniqueItems with an array of items and additionalItems=false"): "unique_items",
    ("unevaluatedItems.json", "unevaluatedItems with nested unevaluatedItems"): "too_slow",
    ("unevaluatedItems.json", "unevaluatedItems with $dynamicRef"): "dynamic_ref",
    ("unevaluatedItems.json", "unevaluatedItems depends on multiple nested contains"): "too_slow",
    (
        "unevaluatedItems.json",
        "unevaluatedItems and contains interact to control item dependency relationship",
    ): "too_slow",
    ("unevaluatedProperties.json", "unevaluatedProperties with nested unevaluatedProperties"): "too_slow",
    ("unevaluatedProperties.json", "unevaluatedProperties with $dynamicRef"): "dynamic_ref",
    ("unevaluatedProperties.json", "dynamic evalation inside nested refs"): "too_slow",
    ("vocabulary.json", "schema that uses custom metaschema with with no validation vocabulary"): "dialect",
    ("vocabulary.json", "ignore unrecognized optional vocabulary"): "dialect",
}


def suite() -> Iterator[tuple[str, dict[str, Any]]]:
    """The mandatory part of the official suite: file and group of cases, each group with one schema."""
    archives = sorted(SUITE.glob("jsonschema-*.tar.gz"))
    if not archives:
        pytest.fail(f"The official JSON Schema test suite is not in {SUITE}: `make test` downloads it.")
    with tarfile.open(archives[-1]) as archive:
        for member in archive:
            match Path(member.name).parts:
                case _, "json", "tests", "draft2020-12", str(name) if name.endswith(".json"):
                    file = archive.extractfile(member)
                    assert file is not None
                    for group in json.load(file):
                        yield name, group


def test_every_mandatory_case_of_the_official_suite_passes_or_is_refused_by_name() -> None:
    right, wrong, refused = 0, [], {}
    for file, group in suite():
        try:
            condition = Condition("/value", group["schema"]).compile()
        except ConditionInvalid as error:
            if file != "dynamicRef.json":
                refused[file, group["description"]] = error.code
            continue
        for case in group["tests"]:
            evaluation = condition.evaluate({"value": case["data"]})
            if evaluation.result is (Result.MATCHED if case["valid"] else Result.NOT_MATCHED):
                right += 1
            else:
                wrong.append((file, group["description"], case["description"], evaluation))

    assert wrong == []
    assert refused == NOT_SUPPORTED
    assert right == 1040  # of 1257; the other 217 are in the groups above


# Cases as data -----------------------------------------------------------------------------------------------------


def cases() -> Iterator[Any]:
    for path in sorted(CASES.glob("*.json")):
        file = json.loads(path.read_text("utf-8"))
        shared = {key: file[key] for key in ("scope", "tree") if key in file}
        for case in file["cases"]:
            yield pytest.param(shared | case, id=f"{path.stem}: {case['name']}")


def test_the_cases_are_found() -> None:
    assert len(list(cases())) > 160


@pytest.mark.parametrize("case", list(cases()))
def test_case(case: dict[str, Any]) -> None:
    assert case.keys() <= {"name", "scope", "schema", "tree", "result", "code", "where", "refused", "says"}
    condition = Condition(case["scope"], case["schema"]) if "schema" in case else Condition(case["scope"])

    if "refused" in case:
        with pytest.raises(ConditionInvalid) as refusal:
            condition.compile()

        assert (refusal.value.code, refusal.value.where) == (case["refused"], case.get("where", refusal.value.where))
        assert case.get("says", "") in str(refusal.value)
    else:
        evaluation = condition.compile().evaluate(case["tree"])

        assert (evaluation.result.value, evaluation.code) == (case["result"], case.get("code"))
        assert evaluation.where == case.get("where", evaluation.where)


# What cannot be written as a case ----------------------------------------------------------------------------------


def nested(levels: int, leaf: Any = 1) -> Any:
    for level in range(levels):
        leaf = {"a": leaf} if level % 2 else [leaf]
    return leaf


def refusal(scope: Any, schema: Any = True) -> ConditionInvalid:
    with pytest.raises(ConditionInvalid) as refused:
        Condition(scope, schema).compile()
    return refused.value


def test_a_scope_may_have_at_most_1024_characters() -> None:
    assert parse_scope("/" + "a" * (MAX_SCOPE_LENGTH - 1))
    assert refusal("/" + "a" * MAX_SCOPE_LENGTH).code == "scope_too_long"


def test_null_is_a_value_and_a_missing_member_is_missing() -> None:
    condition = Condition("/a/b").compile()

    assert condition.value({"a": {"b": 5}}) == 5
    assert condition.value({"a": {"b": None}}) is None
    elsewhere: list[Any] = [{"a": {}}, {}, {"a": None}, {"a": [{"b": 1}]}, [], None, "a"]
    for tree in elsewhere:
        assert condition.value(tree) is MISSING


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "array"},
        {"const": [[1]]},
        {"uniqueItems": True, "items": {"type": "string"}},
        {"items": {"$ref": "#"}, "minItems": 1},
    ],
    ids=["any", "type", "const", "unique", "recursive"],
)
def test_the_deepest_order_that_is_accepted_is_decided(schema: Any) -> None:
    tree = decode(b'{"value":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}")

    assert Condition("/value", schema).compile().evaluate(tree).result is not Result.ERROR


CART_RULE: Any = {
    "items": {
        "properties": {
            "sku": {"pattern": "^[A-Z]{2}"},
            "unit": {"enum": ["pcs", "kg"]},
            "quantity": {"maximum": 10},
        }
    }
}
LINE = b'{"sku":"AB-1","unit":"pcs","quantity":1,"name":"%s"}' % (b"x" * 750)


@pytest.mark.parametrize("lines", [0, 1, 100, 122, 1000, 1280])
def test_more_lines_do_not_switch_a_rule_off(lines: int) -> None:
    """1280 lines make the largest body that is accepted."""
    rule = Condition("/cart/items", CART_RULE).compile()
    many = [LINE] * lines

    tried = decode(b'{"cart":{"items":[%s]}}' % b",".join([*many, b'{"quantity":11}']))
    honest = decode(b'{"cart":{"items":[%s]}}' % b",".join([*many, b'{"quantity":10}']))

    assert rule.evaluate(tried).result is Result.NOT_MATCHED
    assert rule.evaluate(honest).result is Result.MATCHED


@pytest.mark.parametrize(
    "member",
    [
        b"100000000000000000000", b"-100000000000000000000", b"9" * 4000, b"9" * 5000, b"1e400", b"-1e400", b"1e-400",
        b"[" * 150 + b"]" * 150, b'{"a":' * 150 + b"1" + b"}" * 150, rb'"\ud83d"', rb'{"\ud83d":1}', b'""', b"null",
        b"[%s]" % b",".join([b"1"] * 200_000),
    ],
    ids=lambda member: f"{member[:12].decode()} {len(member)}",
)  # fmt: skip
def test_an_unusual_member_does_not_switch_a_rule_off(member: bytes) -> None:
    rule = Condition("/cart/items", CART_RULE).compile()

    tree = decode(b'{"cart":{"items":[{"quantity":11},{"attributes":{"x":%s}}]}}' % member)
    honest = decode(b'{"cart":{"items":[{"quantity":10},{"attributes":{"x":%s}}]}}' % member)

    assert rule.evaluate(tree).result is Result.NOT_MATCHED
    assert rule.evaluate(honest).result is Result.MATCHED


@pytest.mark.parametrize("quantity", [b"11", b"11.0", b"1e400", b"18446744073709551616", b"9" * 400, b"9" * 5000])
def test_a_quantity_of_any_size_is_compared(quantity: bytes) -> None:
    tree = decode(b'{"cart":{"items":[{"quantity":%s}]}}' % quantity)

    assert Condition("/cart/items", CART_RULE).compile().evaluate(tree).result is Result.NOT_MATCHED


def test_a_schema_may_be_at_most_64_levels_deep() -> None:
    assert Condition("/value", {"const": nested(MAX_SCHEMA_DEPTH - 1)}).compile()
    assert refusal("/value", {"const": nested(MAX_SCHEMA_DEPTH)}).code == "too_deep"


def test_references_may_be_nested_at_most_64_levels_deep() -> None:
    def chain(length: int) -> dict[str, Any]:
        definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
        return {"$defs": {**definitions, f"d{length}": True}, "$ref": "#/$defs/d0"}

    assert Condition("/value", chain(MAX_SCHEMA_DEPTH - 1)).compile()
    assert refusal("/value", chain(MAX_SCHEMA_DEPTH)).code == "too_deep"


def test_a_schema_may_have_20_000_nodes_and_one_mebibyte() -> None:
    assert Condition("/value", {"enum": list(range(MAX_NODES - 3))}).compile()
    assert refusal("/value", {"enum": list(range(MAX_NODES))}).code == "expansion"
    assert refusal("/value", {"const": "å" * (MAX_SCHEMA_BYTES // 2)}).code == "too_large"


def test_a_pattern_may_have_at_most_1024_characters() -> None:
    assert Condition("/value", {"pattern": "a" * MAX_PATTERN_LENGTH}).compile()
    assert refusal("/value", {"pattern": "a" * (MAX_PATTERN_LENGTH + 1)}).code == "pattern_too_long"


@pytest.mark.parametrize(
    "schema",
    [
        {"const": float("nan")},
        {"maximum": float("inf")},
        {"const": "\ud800"},
        {"const": date(2024, 5, 1)},
        {"const": {1: 2}},
        {5: True},
        {"enum": (1, 2)},
        {"enum": {1, 2}},
    ],
    ids=["nan", "infinity", "lone surrogate", "date", "inner key", "outer key", "tuple", "set"],
)
def test_a_schema_that_is_not_json_is_refused(schema: Any) -> None:
    assert refusal("/value", schema).code == "schema_type"


@pytest.mark.parametrize(
    "value",
    ["\ud800", date(2024, 5, 1), {1: 2}, {1, 2}],
    ids=["lone surrogate", "date", "key", "set"],
)
def test_a_value_that_is_not_json_is_an_error(value: Any) -> None:
    schema: Any = {"anyOf": [{"pattern": "^x"}, {"propertyNames": {"const": "x"}}]}

    evaluation = Condition("/value", schema).compile().evaluate({"value": value})

    assert evaluation == Evaluation(result=Result.ERROR, code="not_json", where="/value")


def test_a_later_change_of_the_schema_does_not_change_the_condition() -> None:
    schema: dict[str, Any] = {"enum": ["a"]}
    condition = Condition("/value", schema).compile()

    schema["enum"].append("b")

    assert condition.evaluate({"value": "b"}).result is Result.NOT_MATCHED


def test_conditions_and_evaluations_cannot_be_changed() -> None:
    condition = Condition("/value")
    with pytest.raises(FrozenInstanceError):
        condition.scope = "/other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        condition.compile().evaluate({}).code = "other"  # type: ignore[misc]


def test_a_refusal_names_the_place_and_the_remedy() -> None:
    assert str(refusal("/value", {"properties": {"a": {"$ref": "order.json"}}})) == (
        "schema at /properties/a/$ref: ref_remote: a $ref must point into this schema, because nothing is "
        "fetched; copy the other document into $defs"
    )
    assert str(refusal("#/value")).startswith("scope: scope_syntax: ")


# Properties --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "$ref", "type"])
LARGE_NUMBERS = st.sampled_from(
    [2**53, 2**53 + 1, 2.0**53, 2**63, 2**64, 2**64 + 1, 2.0**64, -(2**63) - 1, 10**20, 1e20, 10**20 + 1, 10**400]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.5, 1.0, -2.5, 1e300])
    | LARGE_NUMBERS
    | st.text("ab1", max_size=3)
)
JSON = st.recursive(
    SCALARS | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=2), inner, max_size=3),
    max_leaves=10,
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=10,
)
PATTERNS = st.sampled_from(["^a", "b$", "[ab]1", "^(a|b)+$", "1"])
COUNTS = st.integers(0, 3)
REFERENCES = st.sampled_from(
    ["#", "#/$defs/a", "#/$defs/b", "#/properties/a", "#b", "#/$defs/absent", "x", "http://[x"]
)


SCALAR_TYPES = ["null", "boolean", "number", "string"]


def subschemas(inner: st.SearchStrategy[Any], *, references: bool) -> st.SearchStrategy[Any]:
    lists, members = st.lists(inner, min_size=1, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"]),
        "const": PLAIN,
        "enum": st.lists(PLAIN, min_size=1, max_size=3),
        "multipleOf": st.integers(1, 3)
        | st.just(10**20),  # the oracle is wrong about fractions: 19.99 is no multiple of 0.01 to it
        "maximum": st.integers(-3, 3) | LARGE_NUMBERS,
        "minimum": st.sampled_from([-2.5, 0, 1.0]) | LARGE_NUMBERS,
        "exclusiveMaximum": st.integers(-3, 3) | LARGE_NUMBERS,
        "exclusiveMinimum": st.integers(-3, 3) | LARGE_NUMBERS,
        "maxLength": COUNTS,
        "minLength": COUNTS,
        "pattern": PATTERNS,
        "maxItems": COUNTS,
        "minItems": COUNTS,
        "maxContains": COUNTS,
        "minContains": COUNTS,
        "maxProperties": COUNTS,
        "minProperties": COUNTS,
        "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
        "dependentRequired": st.dictionaries(st.sampled_from("abc"), st.just(["a"]), max_size=2),
        "format": st.sampled_from(["email", "date", "regex"]),
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), lists),
        **dict.fromkeys(("not", "if", "then", "else", "items", "contains", "propertyNames"), inner),
        **dict.fromkeys(("additionalProperties", "unevaluatedItems", "unevaluatedProperties"), inner),
        **dict.fromkeys(("properties", "dependentSchemas"), members),
        "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
    }
    if references:
        keywords |= {
            "$ref": REFERENCES,
            **dict.fromkeys(("$anchor", "$dynamicAnchor"), st.sampled_from("ab")),
            "$id": st.sampled_from(["x", "http://a/b", "http://[x"]),
            "$defs": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            "$schema": st.sampled_from(["https://json-schema.org/draft/2020-12/schema", "x"]),
        }
    some = st.lists(st.sampled_from(sorted(keywords)), min_size=1, max_size=4, unique=True)
    unique = st.fixed_dictionaries({"uniqueItems": st.booleans(), "items": st.just({"type": SCALAR_TYPES})})
    return unique | some.flatmap(lambda chosen: st.fixed_dictionaries({name: keywords[name] for name in chosen}))


ORDINARY_SCHEMAS = st.recursive(
    st.booleans() | subschemas(st.booleans(), references=False),
    lambda inner: subschemas(inner, references=False),
    max_leaves=6,
)
ODD_SCHEMAS = st.recursive(
    st.booleans() | JSON | subschemas(st.booleans(), references=True),
    lambda inner: subschemas(inner, references=True),
    max_leaves=6,
)


SLOW = ("too_slow", "unique_items")


def is_accepted(schema: Any) -> bool:
    """Return False for a schema that could be slow on a large order."""
    try:
        return Condition("/value", schema).compile() is not None
    except ConditionInvalid as error:
        if error.code in SLOW:
            return False
        raise


QUIET = settings(max_examples=settings.default.max_examples, suppress_health_check=list(HealthCheck))


@QUIET
@given(schema=JSON | ODD_SCHEMAS, tree=JSON, scope=st.sampled_from(["/value", "/value/a", "/a"]))
def test_any_schema_is_refused_or_evaluates_any_tree_without_raising(schema: Any, tree: Any, scope: str) -> None:
    try:
        condition = Condition(scope, schema).compile()
    except ConditionInvalid as error:
        assert error.code in str(error)  # noqa: PT017 -- a refusal is one of the two good ends
        return

    for whole in (tree, {"value": tree}):
        evaluation = condition.evaluate(whole)

        assert isinstance(evaluation.result, Result)
        assert (evaluation.code is None) == (evaluation.result is Result.MATCHED)
        assert evaluation.code != "engine"


@QUIET
@given(schema=ORDINARY_SCHEMAS, value=PLAIN)
def test_evaluations_agree_with_another_implementation(schema: Any, value: Any) -> None:
    expected = Draft202012Validator(schema, registry=Registry()).is_valid(value)

    engine = CheckedSchema(schema, nodes=0, nodes_per_byte=0).engine()

    assert engine.is_valid(value) is expected


@QUIET
@given(scope=st.text(max_size=8) | st.text("/~01a#-", max_size=8) | st.text("/~01a", max_size=8).map("/".__add__))
def test_any_text_is_refused_as_a_scope_or_can_be_evaluated(scope: str) -> None:
    try:
        condition = Condition(scope).compile()
    except ConditionInvalid as error:
        assert error.code.startswith("scope_")  # noqa: PT017
        return

    trees: list[Any] = [{}, {"a": {"a": 1, "": 2}, "0": [{}]}, [], [[]], None, 1, "a"]
    for tree in trees:
        assert isinstance(condition.evaluate(tree), Evaluation)


@QUIET
@given(tokens=st.lists(st.text("/~01a# %", min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_member_can_be_reached_by_a_scope(tokens: list[str]) -> None:
    scope = "".join("/" + token.replace("~", "~0").replace("/", "~1") for token in tokens)
    tree: Any = "found"
    for token in reversed(tokens):
        tree = {token: tree}

    assert parse_scope(scope) == tuple(tokens)
    assert Condition(scope, {"const": "found"}).compile().evaluate(tree).result is Result.MATCHED


CANARY = "19121212-1212"


@QUIET
@given(schema=ORDINARY_SCHEMAS.filter(is_accepted), scope=st.sampled_from(["/a", "/a/b", "/b"]), data=st.data())
def test_no_value_is_ever_repeated(schema: Any, scope: str, data: st.DataObject) -> None:
    leaves = st.sampled_from([CANARY, {CANARY: CANARY}, [CANARY, "\ud800"], {"b": CANARY}, date(1912, 12, 12)])
    tree = data.draw(st.dictionaries(st.sampled_from("ab"), leaves | st.lists(leaves, max_size=2), max_size=2))

    evaluation = Condition(scope, schema).compile().evaluate(tree)

    assert CANARY not in repr(evaluation)
    assert "1912" not in repr(evaluation)
