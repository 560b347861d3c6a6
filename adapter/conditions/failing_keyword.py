"""Search for the keyword that fails, for `explain`, `why` and the operations page."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urljoin

import jsonschema_rs
import msgspec
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from adapter.conditions.schemas import (
    BY_NAME,
    UNEVALUATED,
    WITH_SUBSCHEMAS,
    CheckedSchema,
    ConditionInvalid,
    pointer,
    size,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailingKeyword:
    """The reason why a condition does not match: a keyword and two places.

    It holds no value, so it may be logged. A search that reached its bound names the deepest keyword that it found.
    """

    keyword: str | None  # None if the schema at this place is `false`
    schema: str  # JSON Pointer into the schema; a step through a reference is written /$ref
    where: str  # JSON Pointer into the tree; for `required`, to the missing member


# Keywords that need those beside them.
_TOGETHER = {
    "if": ("then", "else"),
    "additionalProperties": ("properties", "patternProperties"),
    "items": ("prefixItems",),
    "contains": ("minContains", "maxContains"),
}
# The order in which a search tries keywords, after all other keywords. A keyword follows those that it depends on, and
# keywords that explain little come late.
_TRIED_LAST = (
    *("$ref", "allOf", "if", "dependentSchemas", "dependencies"),
    *("properties", "patternProperties", "propertyNames", "additionalProperties", "prefixItems", "items", "contains"),
    *("not", "anyOf", "oneOf", *UNEVALUATED),
)
_BASE = "https://schema.invalid/"  # the base of references, without an $id
# A step is one node of a schema on one character of a value; a compilation counts as this many characters. A search
# takes at most about a second (measured).
_MAX_SEARCH_STEPS, _COMPILATION_WEIGHT = 20_000_000, 50
_MAX_SEARCH_DEPTH = 400  # names in a JSON Pointer into the schema


def find_failing_keyword(checked: CheckedSchema, value: Any, scope: str) -> FailingKeyword | None:
    """Find the keyword of a schema that fails on a value, in bounded time.

    Returns None if the bound is reached before a keyword is found.
    """
    return _Search(checked).find(value, scope)


class _SearchEnded(Exception):
    """The search reached its bound."""


class _Step(NamedTuple):
    """A subschema and the part of the value that it applies to, with the names to both."""

    subschema: Any
    schema: tuple[str, ...]
    part: Any
    where: tuple[str, ...] = ()


class _Search:
    """A search for the failing keyword of a schema that does not match a value.

    It evaluates one keyword after another, and goes on below the first that fails. The bound counts work, not time, so
    the same search always has the same result.
    """

    def __init__(self, checked: CheckedSchema) -> None:
        schema = checked.schema
        uri = urljoin(_BASE, schema.get("$id", "")) if isinstance(schema, dict) else _BASE
        self._schema = _absolute(schema, _BASE)
        self._checked = checked
        self._registry = jsonschema_rs.Registry([(uri, self._schema)])
        self._resolver = Registry().with_resource(uri, DRAFT202012.create_resource(self._schema)).resolver()
        self._engines: dict[int, tuple[Any, int, jsonschema_rs.Draft202012Validator]] = {}
        self._steps_left = _MAX_SEARCH_STEPS

    def find(self, value: Any, scope: str) -> FailingKeyword | None:
        return self._find(self._schema, value, "", scope)

    def _find(self, schema: Any, value: Any, at: str, where: str) -> FailingKeyword | None:
        """Find the failing keyword of a subschema."""
        found = None
        with suppress(_SearchEnded, ConditionInvalid, Unresolvable, ValueError):
            while at.count("/") < _MAX_SEARCH_DEPTH:
                if schema is False:
                    return FailingKeyword(keyword=None, schema=at, where=where)
                failing = (each for each in _search_order(schema) if self._fails(_only(schema, each), value))
                keyword = next(failing, None)
                if keyword is None:
                    break
                missing = [name for name in schema[keyword] if name not in value] if keyword == "required" else []
                place = where + pointer(missing[:1])
                found = FailingKeyword(keyword=keyword, schema=at + pointer([keyword]), where=place)
                steps = self._steps(schema, keyword, value)
                if keyword in ("anyOf", "oneOf"):
                    return self._deepest(list(steps), at, where) or found
                step = next((step for step in steps if self._fails(step.subschema, step.part)), None)
                if step is None:
                    break
                schema, value = step.subschema, step.part
                at, where = at + pointer(step.schema), where + pointer(step.where)
        return found

    def _deepest(self, branches: list[_Step], at: str, where: str) -> FailingKeyword | None:
        """Find the failure that is deepest in the value: its branch fits best. None for a tie."""
        if not all(self._fails(branch.subschema, branch.part) for branch in branches):  # `oneOf`: several match
            return None
        failures = [
            self._find(branch.subschema, branch.part, at + pointer(branch.schema), where) for branch in branches
        ]
        depths = [failure.where.count("/") if failure else 0 for failure in failures]
        return failures[depths.index(max(depths))] if depths.count(max(depths)) == 1 else None

    def _steps(self, schema: dict[str, Any], keyword: str, value: Any) -> Iterator[_Step]:
        """Yield the subschemas of a failing keyword; none if they cannot explain the failure."""
        below = schema[keyword]
        match keyword:
            case "$ref":
                yield _Step(self._resolver.lookup(below).contents, (keyword,), value)
            case "allOf" | "anyOf" | "oneOf":
                for index, branch in enumerate(below):
                    yield _Step(branch, (keyword, str(index)), value)
            case "if":
                for branch in ("then", "else"):
                    if branch in schema and self._fails(below, value) is (branch == "else"):
                        yield _Step(schema[branch], (branch,), value)
            case "dependentSchemas" | "dependencies":
                for name, branch in below.items():
                    if name in value and isinstance(branch, (dict, bool)):
                        yield _Step(branch, (keyword, name), value)
            case "properties":
                for name, branch in below.items():
                    if name in value:
                        yield _Step(branch, (keyword, name), value[name], (name,))
            case "patternProperties":
                for pattern, branch in below.items():
                    matching = {"pattern": pattern}
                    for name, part in value.items():
                        if not self._fails(matching, name):
                            yield _Step(branch, (keyword, pattern), part, (name,))
            case "propertyNames":
                for name in value:
                    yield _Step(below, (keyword,), name, (name,))
            case "additionalProperties":
                only = _only(schema, keyword)
                for name, part in value.items():
                    if self._fails(only, {name: part}):
                        yield _Step(below, (keyword,), part, (name,))
            case "prefixItems":
                for index, (branch, part) in enumerate(zip(below, value, strict=False)):
                    yield _Step(branch, (keyword, str(index)), part, (str(index),))
            case "items":
                for index in range(len(schema.get("prefixItems", ())), len(value)):
                    yield _Step(below, (keyword,), value[index], (str(index),))

    def _fails(self, schema: Any, value: Any) -> bool:
        if id(schema) not in self._engines:
            text = msgspec.json.encode(schema)
            has_more = any(word in text for word in (b'"$ref"', b'"unevaluated'))
            weight = self._checked.nodes if has_more else min(self._checked.nodes, size(schema))
            self._spend(weight * _COMPILATION_WEIGHT)
            self._engines[id(schema)] = schema, weight, self._checked.engine(schema, self._registry)
        _, weight, engine = self._engines[id(schema)]
        self._spend(weight * len(json.dumps(value)))
        return not engine.is_valid(value)

    def _spend(self, steps: int) -> None:
        self._steps_left -= 1000 + steps
        if self._steps_left < 0:
            raise _SearchEnded


def _search_order(schema: Any) -> list[str]:
    known = [keyword for keyword in schema if not keyword.startswith("$") or keyword in _TRIED_LAST]
    return sorted(known, key=lambda keyword: _TRIED_LAST.index(keyword) if keyword in _TRIED_LAST else -1)


def _only(schema: dict[str, Any], keyword: str) -> dict[str, Any]:
    """Return a schema of one keyword and the keywords that it needs."""
    if keyword in UNEVALUATED:  # it needs all keywords but the other one of its kind
        return {each: schema[each] for each in schema if each == keyword or each not in UNEVALUATED}
    return {each: schema[each] for each in (keyword, *_TOGETHER.get(keyword, ())) if each in schema}


def _absolute(schema: Any, base: str) -> Any:
    """Return a copy with absolute references, so that each part can be evaluated alone."""
    if not isinstance(schema, dict):
        return schema
    base = urljoin(base, schema.get("$id", ""))
    copy = dict(schema)
    if (ref := copy.get("$ref")) is not None:
        copy["$ref"] = base.partition("#")[0] + ref if ref.startswith("#") else urljoin(base, ref)
    for keyword in copy.keys() & WITH_SUBSCHEMAS:
        below = copy[keyword]
        if keyword in BY_NAME:
            copy[keyword] = {name: _absolute(part, base) for name, part in below.items()}
        else:
            copy[keyword] = (
                [_absolute(part, base) for part in below] if isinstance(below, list) else _absolute(below, base)
            )
    return copy
