"""Why a condition does not hold: the reason follows the service, names places only, and holds nobody up."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jsonpointer import JsonPointer

from adapter.cli.reasons import Answer, Library, Question, Reason, answering, reasons
from adapter.conditions import Condition, Result
from tests.conditions.test_conditions import CANARY, ORDINARY_SCHEMAS, PLAIN, QUIET

HANGS = {"patternProperties": {"^(a+)+$": True}}  # for Python's regular expressions, on the value below
LONG_KEY = {"a" * 40 + "!": 1}


def asked(schema: Any, value: Any) -> Question:
    """The question as the service would put it: with its own decision."""
    result = Condition("/value", schema).compile().evaluate({"value": value}).result
    assert result is not Result.ERROR
    return Question(schema=schema, value=value, holds=result is Result.MATCHED)


def answered(schema: Any, value: Any) -> Answer:
    *_, answer = answering(asked(schema, value))
    return answer


def because(keyword: str | None, schema: str, value: str) -> Answer:
    return Answer(library=Library.AGREES, reason=Reason(keyword=keyword, schema=schema, value=value))


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"const": 1}, 1, Answer(library=Library.AGREES)),
        ({"const": 1}, 2, because("const", "/const", "")),
        (False, 2, because(None, "", "")),
        (
            {"properties": {"a/b": {"items": {"type": "string"}}}},
            {"a/b": ["x", 1]},
            because("type", "/properties/a~1b/items/type", "/a~1b/1"),
        ),
        ({"properties": {"a": {"allOf": [False]}}}, {"a": 1}, because(None, "/properties/a/allOf", "/a")),
        ({"additionalProperties": False}, {"a": 1}, because("additionalProperties", "/additionalProperties", "")),
        ({"required": ["a", "b"]}, {"a": 1}, because("required", "/required", "/b")),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1]}}}, 2, because("enum", "/enum", "")),
        (
            {"anyOf": [{"const": 1}, {"properties": {"a": {"const": 1}}, "type": "object"}]},
            {"a": 2},
            because("const", "/anyOf/1/properties/a/const", "/a"),
        ),
        ({"if": True, "then": {"minProperties": 1}}, {}, because("minProperties", "/then/minProperties", "")),
        ({"pattern": "^(a+)+$", "maxLength": 3}, "aaaa", because("maxLength", "/maxLength", "")),
        ({"uniqueItems": True}, [1, 1.0], because("uniqueItems", "/uniqueItems", "")),
    ],
    ids=[
        "holds", "const", "false", "inside", "false-inside", "no-more", "required", "reference", "any", "then", "first",
        "unique",
    ],
)  # fmt: skip
def test_the_reason_is_a_keyword_and_two_places(schema, value, expected):
    assert answered(schema, value) == expected


@pytest.mark.parametrize(
    ("schema", "value", "library", "keyword"),
    [
        ({"multipleOf": 0.01}, 19.99, Library.DIFFERS, None),
        ({"anyOf": [{"multipleOf": 0.01}, {"type": "null"}], "maximum": 5}, 19.99, Library.AGREES, "maximum"),
        ({"multipleOf": 0.01}, 19.995, Library.AGREES, "multipleOf"),
        ({"dependencies": {"a": ["b"]}}, {"a": 1}, Library.DIFFERS, "dependencies"),
        ({"dependencies": {"a": {"maxProperties": 1}}}, {"a": 1, "b": 1}, Library.DIFFERS, "maxProperties"),
        ({"dependencies": {"a": ["b"]}}, {"a": 1, "b": 1}, Library.AGREES, None),
        ({"dependencies": {"a": ["b"]}}, "a", Library.AGREES, None),
        ({"pattern": r"^\p{Lu}$"}, "x", Library.CANNOT_TELL, "pattern"),
        ({"pattern": r"^\p{Lu}$"}, "X", Library.CANNOT_TELL, None),
        ({"pattern": r"^\d$"}, "\u0663", Library.DIFFERS, "pattern"),
    ],
)  # fmt: skip
def test_where_jsonschema_differs_the_reason_follows_the_service_and_it_is_said(schema, value, library, keyword):
    found = answered(schema, value)

    assert found.library is library
    assert (found.reason and found.reason.keyword) == keyword
    known = {"multipleOf", "dependencies", "pattern"} & schema.keys() if library is not Library.AGREES else set()
    assert set(found.differs_by) == known


def test_what_takes_too_long_is_given_up_and_the_others_are_answered():
    """A process of its own answers; the one that hangs is ended, and another goes on with what is left."""
    questions = [
        asked({"const": 1}, 2),
        asked(HANGS | {"required": ["x"]}, LONG_KEY),
        asked({"pattern": "^(a+)+$"}, "a" * 40 + "!"),
        asked({"enum": [1]}, 2),
    ]

    found = reasons(questions, timedelta(seconds=2))

    assert [answer.library for answer in found] == [
        Library.AGREES,
        Library.TOO_SLOW,
        Library.TOO_SLOW,
        Library.AGREES,
    ]
    assert [answer.reason and answer.reason.keyword for answer in found] == ["const", None, "pattern", "enum"]


def test_nothing_asked_starts_no_process():
    assert reasons([], timedelta(0)) == []


def test_a_process_that_does_not_even_start_in_time_leaves_the_reasons_out():
    assert reasons([asked(True, 1)] * 2, timedelta(0)) == [Answer(library=Library.TOO_SLOW)] * 2


@QUIET
@given(schema=ORDINARY_SCHEMAS, value=PLAIN)
def test_there_is_a_reason_exactly_where_the_service_says_that_it_does_not_hold(schema, value):
    question = asked(schema, value)
    first, answer = answering(question)

    assert answer.library is Library.AGREES
    assert (answer.reason is None) is question.holds
    assert first.reason == answer.reason


@QUIET
@given(schema=ORDINARY_SCHEMAS, value=PLAIN)
def test_the_part_of_the_schema_that_is_named_fails_on_the_part_that_is_named(schema, value):
    """To the service, too."""
    reason = answered(schema, value).reason
    assume(reason is not None and reason.keyword is not None and "/propertyNames" not in reason.schema)
    at = JsonPointer(reason.value).parts
    instance = JsonPointer.from_parts(at[: len(at) - (reason.keyword == "required")]).resolve(value)
    part = JsonPointer.from_parts(JsonPointer(reason.schema).parts[:-1]).resolve(schema)

    assert not asked(part, instance).holds
    if reason.keyword == "required":
        assert at[-1] not in instance


@QUIET
@given(schema=ORDINARY_SCHEMAS | st.just({"const": 1}), data=st.data())
def test_no_value_is_ever_repeated(schema, data):
    leaves = st.sampled_from([CANARY, [CANARY], {"b": CANARY}])
    value = data.draw(leaves | st.dictionaries(st.sampled_from("ab"), leaves, max_size=2))

    assert CANARY not in repr(answered(schema, value))


@given(step=st.sampled_from([0.01, 0.1, 0.05, 2.5]), cents=st.integers(-100_000, 100_000))
def test_fractions_are_reckoned_as_the_service_does(step, cents):
    question = asked({"anyOf": [{"multipleOf": step}]}, cents / 100)
    *_, answer = answering(question)

    assert (answer.reason is None) is question.holds
    assert answer.differs_by == (() if answer.library is Library.AGREES else ("multipleOf",))
