"""The reason why a condition does not match: a failing keyword and two places, in bounded time."""

from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jsonpointer import JsonPointer
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry

from adapter.conditions import Condition, FailingKeyword, Result
from tests.conditions.test_attacks import run
from tests.conditions.test_conditions import CANARY, ORDINARY_SCHEMAS, PLAIN, QUIET, is_accepted

NUMBER = {"type": "number"}
ACCEPTED = ORDINARY_SCHEMAS.filter(is_accepted)


def reason(schema: Any, value: Any) -> FailingKeyword | None:
    return Condition("/value", schema).compile().reason({"value": value})


def fails(keyword: str | None, schema: str, where: str) -> FailingKeyword:
    return FailingKeyword(keyword=keyword, schema=schema, where=f"/value{where}")


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"const": 1}, 1, None),
        ({"const": 1}, 2, fails("const", "/const", "")),
        (False, 2, fails(None, "", "")),
        ({"type": "string", "required": ["a"]}, {}, fails("type", "/type", "")),
        ({"items": {"type": "string"}}, ["x", 1], fails("type", "/items/type", "/1")),
        ({"prefixItems": [True, {"const": 1}], "items": True}, [1, 2], fails("const", "/prefixItems/1/const", "/1")),
        ({"prefixItems": [True], "items": False}, [1, 2], fails(None, "/items", "/1")),
        ({"properties": {"a/b": {"const": 1}}}, {"a/b": 2}, fails("const", "/properties/a~1b/const", "/a~1b")),
        ({"properties": {"a": {"allOf": [False]}}}, {"a": 1}, fails(None, "/properties/a/allOf/0", "/a")),
        ({"patternProperties": {"^a": False}}, {"b": 1, "ab": 1}, fails(None, "/patternProperties/^a", "/ab")),
        ({"propertyNames": {"maxLength": 1}}, {"a": 1, "ab": 1}, fails("maxLength", "/propertyNames/maxLength", "/ab")),
        (
            {"properties": {"a": True}, "patternProperties": {"b": True}, "additionalProperties": False},
            {"a": 1, "ab": 1, "c": 1},
            fails(None, "/additionalProperties", "/c"),
        ),
        ({"required": ["a", "b"]}, {"a": 1}, fails("required", "/required", "/b")),
        ({"contains": {"const": "a"}, "minContains": 2}, ["a", "b"], fails("contains", "/contains", "")),
        ({"dependencies": {"a": ["b"]}}, {"a": 1}, fails("dependencies", "/dependencies", "")),
        (
            {"dependentSchemas": {"b": False, "a": {"maxProperties": 1}}},
            {"a": 1, "c": 1},
            fails("maxProperties", "/dependentSchemas/a/maxProperties", ""),
        ),
        ({"if": True, "then": {"minProperties": 1}}, {}, fails("minProperties", "/then/minProperties", "")),
        ({"if": False, "then": False, "else": {"const": 1}}, 2, fails("const", "/else/const", "")),
        ({"not": {"const": 1}}, 1, fails("not", "/not", "")),
        (
            {"anyOf": [{"const": 1}, {"properties": {"a": {"const": 1}}, "type": "object"}]},
            {"a": 2},
            fails("const", "/anyOf/1/properties/a/const", "/a"),
        ),
        ({"anyOf": [{"const": 1}, {"const": 2}]}, 3, fails("anyOf", "/anyOf", "")),
        ({"oneOf": [{"type": "null"}, {"required": ["a"]}]}, {}, fails("required", "/oneOf/1/required", "/a")),
        ({"oneOf": [True, {"required": ["a"]}, True]}, {}, fails("oneOf", "/oneOf", "")),
        ({"anyOf": [{"multipleOf": 0.01}, {"type": "null"}], "maximum": 5}, 19.99, fails("maximum", "/maximum", "")),
        ({"multipleOf": 0.01}, 19.995, fails("multipleOf", "/multipleOf", "")),
        ({"pattern": r"^\p{Lu}$"}, "x", fails("pattern", "/pattern", "")),
        ({"uniqueItems": True, "items": NUMBER}, [1, 1.0], fails("uniqueItems", "/uniqueItems", "")),
        ({"uniqueItems": True, "items": NUMBER}, [1, [], []], fails("type", "/items/type", "/1")),
        (
            {"allOf": [{"properties": {"a": True}}], "unevaluatedProperties": False},
            {"a": 1, "b": 1},
            fails("unevaluatedProperties", "/unevaluatedProperties", ""),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_it_names_the_keyword_and_the_places_where_it_fails(
    schema: Any, value: Any, expected: FailingKeyword | None
) -> None:
    assert reason(schema, value) == expected


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1]}}}, 2, fails("enum", "/$ref/enum", "")),
        (
            {"items": {"$ref": "#n"}, "$defs": {"a": {"$anchor": "n", "const": "a"}}},
            ["b"],
            fails("const", "/items/$ref/const", "/0"),
        ),
        (
            {
                "$id": "http://a/b",
                "properties": {"p": {"$ref": "c"}},
                "$defs": {"x": {"$id": "c", "items": {"$ref": "#/$defs/y"}, "$defs": {"y": {"const": "a"}}}},
            },
            {"p": ["a", "b"]},
            fails("const", "/properties/p/$ref/items/$ref/const", "/p/1"),
        ),
        (
            {"$id": "urn:a:b", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"const": "a"}}},
            ["b"],
            fails("const", "/items/$ref/const", "/0"),
        ),
        ({"const": {"$ref": "#/$defs/a"}}, {"$ref": "#/$defs/b"}, fails("const", "/const", "")),
    ],
    ids=["pointer", "anchor", "id", "urn", "value"],
)  # fmt: skip
def test_it_follows_references(schema: Any, value: Any, expected: FailingKeyword) -> None:
    assert reason(schema, value) == expected


def test_there_is_no_reason_without_a_failing_schema() -> None:
    condition = Condition("/value/a", {"const": 1}).compile()
    trees: list[Any] = [{}, {"value": {}}, {"value": []}, {"value": {"a": 1}}]

    assert [condition.reason(tree) for tree in trees] == [None] * 4
    assert reason({"uniqueItems": True, "items": NUMBER}, [2**70]) is None


def resolved(schema: Any, place: str) -> Any:
    return JsonPointer(place).resolve(schema)


@QUIET
@given(schema=ACCEPTED, value=PLAIN)
def test_the_named_keyword_fails_on_the_named_part(schema: Any, value: Any) -> None:
    found = reason(schema, value)
    holds = Condition("/value", schema).compile().evaluate({"value": value}).result is Result.MATCHED
    assert (found is None) is holds
    assume(found is not None and "/propertyNames" not in found.schema)
    assert found is not None
    missing = found.keyword == "required"
    part = resolved({"value": value}, found.where.rpartition("/")[0] if missing else found.where)

    if found.keyword is None:
        assert resolved(schema, found.schema) is False
        return
    around = resolved(schema, found.schema.rpartition("/")[0])
    assert found.keyword in around
    assert reason(around, part) is not None
    if missing:
        assert found.where.rpartition("/")[2] not in part


def all_errors(errors: Any) -> list[ValidationError]:
    return [each for error in errors for each in (error, *all_errors(error.context or ()))]


@QUIET
@given(schema=ACCEPTED, value=PLAIN)
@example(schema={"unevaluatedItems": False, "unevaluatedProperties": False}, value=[0])
@example(schema={"contains": True, "minContains": 2}, value=[0])
def test_jsonschema_reports_the_same_failure_among_others(schema: Any, value: Any) -> None:
    found = reason(schema, value)
    errors = all_errors(Draft202012Validator(schema, registry=Registry()).iter_errors(value))

    assert (found is None) is (errors == [])
    assume(found is not None and found.keyword is not None and "/propertyNames" not in found.schema)
    assert found is not None
    where = found.where.rpartition("/")[0] if found.keyword == "required" else found.where
    assert (found.keyword, found.schema, where) in {
        (
            "contains" if error.validator in ("minContains", "maxContains") else error.validator,
            JsonPointer.from_parts(error.absolute_schema_path).path,
            JsonPointer.from_parts(["value", *error.absolute_path]).path,
        )
        for error in errors
    }


@QUIET
@given(schema=ACCEPTED | st.just({"const": 1}), data=st.data())
def test_no_value_is_repeated(schema: Any, data: st.DataObject) -> None:
    leaves = st.sampled_from([CANARY, [CANARY], {"b": CANARY}])
    value = data.draw(leaves | st.dictionaries(st.sampled_from("ab"), leaves, max_size=2))

    assert CANARY not in repr(reason(schema, value))


def test_no_schema_and_no_value_make_the_search_endless() -> None:
    """`run` has a time limit. The error iterators of both libraries take hours on some of these."""
    found = run("""
        import random

        def search(name, schema, value):
            condition = Condition("/value", schema).compile()
            assert condition.evaluate({"value": value}).code == "schema", name
            reason = condition.reason({"value": value})
            answers[name] = "none" if reason is None else reason.keyword

        again = {"$ref": "#"}
        members = {"type": "object", "properties": {"a": again}}
        deep = nested(64)
        for keyword in "allOf", "anyOf", "oneOf":
            search(keyword, {"type": "object", keyword: [members, members]}, deep)
            step = lambda i: {keyword: [{"$ref": f"#/$defs/d{i + 1}"}]}
            back = {"type": "object", "additionalProperties": {"$ref": "#/$defs/d0"}}
            chain = {f"d{i}": step(i) for i in range(3)} | {"d3": back}
            search(f"a long way round, {keyword}", {"$defs": chain, "$ref": "#/$defs/d0"}, deep)
        search("if", {"type": "object", "if": members, "then": True, "else": members}, deep)
        search("backtracking", {"patternProperties": {"^(a+)+$": {"type": "null"}}, "required": ["x"]}, {"a" * 9999: 1})
        bits = format(random.Random(1).getrandbits(50_000), "b")
        search("many patterns", {"anyOf": [{"pattern": f"[01]*1[01]{{{i}}}2"} for i in range(5, 9)]}, bits)
        search("many items", {"items": {"type": "integer"}}, [1] * 150_000 + ["x"])
        numbers = {str(i): i for i in range(80_000)}
        search("many members", {"additionalProperties": {"type": "integer"}}, numbers | {"": ""})
        search("many branches", {"anyOf": [{"properties": {"a": {"const": i}}} for i in range(4000)]}, {"a": -1})
    """)

    assert "none" not in found.values()
    assert found["backtracking"] == "required"
    assert found["allOf"] in ("type", "$ref", "properties", "allOf")


def test_the_keyword_found_so_far_is_named_when_the_bound_is_reached() -> None:
    assert reason({"items": {"type": "integer"}}, [1] * 150_000 + ["x"]) == fails("items", "/items", "")
