"""Conditions: a JSON Schema for the value at a JSON Pointer in the order.

This module is pure: it never fetches, and it never hangs. `compile` checks a condition completely, so `evaluate` never
raises, whatever the order looks like. A missing value has a code of its own: the schema is then not evaluated, not even
`true` or `{"not": {}}`. Null at the scope is a value. A limit on the size of a schema does not bound its time. `_Cost`
bounds how often the schema is evaluated, and on how large a value.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple
from urllib.parse import urljoin

import jsonschema_rs
import msgspec
from jsonpointer import JsonPointer, JsonPointerException
from jsonschema_specifications import REGISTRY as METASCHEMAS  # type: ignore[import-untyped]
from referencing import Registry
from referencing.exceptions import NoSuchAnchor, PointerToNowhere, Unresolvable
from referencing.jsonschema import DRAFT202012, DynamicAnchor

from adapter.orders import Json

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DIALECT_FAMILY = "https://json-schema.org/draft/2020-12/"
MAX_SCOPE_LENGTH, MAX_SCOPE_TOKENS = 1_024, 32
MAX_SCHEMA_BYTES = 1024 * 1024  # as compact JSON
MAX_DEPTH = 64  # of a schema, of its subschemas after `$ref` expansion, and of the value at a scope
MAX_NODES = 20_000  # of a schema, after `$ref` expansion
MAX_PATTERN_LENGTH = 4_096
# A schema of n nodes takes at most n * m steps on a value of m parts. A step takes 5 to 500 ns (measured) and holds the
# interpreter. Two million steps allow 100 nodes and 20 000 parts; a large order has a few thousand parts.
MAX_STEPS = 2_000_000
# Compiled size of a pattern in bytes -> the number of nodes that it counts as, per character that it reads. Measured, a
# character takes at most 0.7 us up to 8 KiB and 8.5 us at 256 KiB, and a node takes about 0.1 us.
PATTERN_SIZES = {8 * 1024: 8, 32 * 1024: 20, 256 * 1024: 90}

_REMEDIES = {
    "scope_empty": "a condition needs a scope, a JSON Pointer such as /state/currentStatus",
    "scope_syntax": "write a JSON Pointer: it starts with /, and ~ is written ~0 and / in a name ~1",
    "scope_empty_token": "a name between two slashes is empty; remove one /",
    "scope_too_long": f"at most {MAX_SCOPE_LENGTH} characters and {MAX_SCOPE_TOKENS} names are allowed",
    "schema_type": "a schema is an object, true or false, and plain JSON (keys are text, numbers are finite)",
    "schema_invalid": "this is not valid in JSON Schema draft 2020-12",
    "dialect": f"remove $schema, or write exactly {DIALECT}; $vocabulary is not supported",
    "too_large": f"a schema has at most {MAX_SCHEMA_BYTES} bytes",
    "too_deep": f"a schema is at most {MAX_DEPTH} levels deep, also after following its $ref",
    "expansion": f"a schema has at most {MAX_NODES} nodes after following its $ref; unevaluatedProperties and "
    "unevaluatedItems multiply the nodes below them, and a long pattern counts up to 90 times",
    "ref_remote": "a $ref must point into this schema, because nothing is fetched; copy the other document into $defs",
    "ref_unresolvable": "this $ref has no target; it must point to a part of this schema, such as #/$defs/name",
    "recursive_ref": "this $ref returns to itself on the same value; a recursive schema must go into the value, "
    "such as through properties or items",
    "pattern_too_long": f"a pattern has at most {MAX_PATTERN_LENGTH} characters",
    "pattern_unsupported": "this regular expression cannot be matched in linear time; avoid look-around, "
    "back-references and large repetitions of large classes (use maxLength)",
}


class Result(Enum):
    """The results of an evaluation."""

    MATCHED = "matched"
    NOT_MATCHED = "not_matched"
    ERROR = "error"  # it cannot be decided, now or later, for the same value


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The evaluation of one condition on one tree.

    It names places and never values, so it may be logged.

    Codes of a condition that does not match: `scope_missing`, `schema`. Codes of an error: `scope_in_array`,
    `too_deep`, `too_costly` (use a smaller scope), `number_too_large` (beyond 64 bits, and the schema compares
    numbers), `not_json`, `engine`.
    """

    result: Result
    code: str | None  # None if it matched
    where: str | None  # JSON Pointer into the tree: the scope, or the part of it that exists


@dataclass(frozen=True, slots=True, kw_only=True)
class FailingKeyword:
    """The reason why a condition does not match: a keyword and two places.

    It holds no value, so it may be logged. A search that reached its bound names the deepest keyword that it found.
    """

    keyword: str | None  # None if the schema at this place is `false`
    schema: str  # JSON Pointer into the schema; a step through a reference is written /$ref
    where: str  # JSON Pointer into the tree; for `required`, to the missing member


class Missing(Enum):
    """The type of `MISSING`."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING  # the scope has no value in the tree; null is a value


class ConditionInvalid(Exception):
    """A scope or schema in the configuration that cannot be evaluated safely.

    The message says what is allowed. `where` is `scope`, or a JSON Pointer into the schema ("" is the whole schema).
    """

    def __init__(self, code: str, where: str, hint: str = "") -> None:
        place = where if where == "scope" else f"schema at {where}" if where else "schema"
        super().__init__(f"{place}: {code}: {_REMEDIES[code]}{hint and f' ({hint})'}")
        self.code = code
        self.where = where


def parse_scope(text: str) -> tuple[str, ...]:
    """Return the unescaped names of a scope; raise `ConditionInvalid` if it is not valid."""
    if text is None or text == "":
        raise ConditionInvalid("scope_empty", "scope")
    if not isinstance(text, str):
        raise ConditionInvalid("scope_syntax", "scope", "it has to be text")
    if len(text) > MAX_SCOPE_LENGTH:
        raise ConditionInvalid("scope_too_long", "scope")
    if text.startswith("#"):
        raise ConditionInvalid("scope_syntax", "scope", "drop the #")
    if not text.startswith("/"):
        raise ConditionInvalid("scope_syntax", "scope", f"it starts with {text[0]!r}")
    try:
        tokens = tuple(JsonPointer(text).parts)
    except JsonPointerException:
        raise ConditionInvalid("scope_syntax", "scope", "a ~ is followed by neither 0 nor 1") from None
    if len(tokens) > MAX_SCOPE_TOKENS:
        raise ConditionInvalid("scope_too_long", "scope")
    if "" in tokens:
        raise ConditionInvalid("scope_empty_token", "scope")
    return tokens


@dataclass(frozen=True, slots=True)
class Condition:
    """A scope and a schema as configured; an absent or null schema matches every value."""

    scope: str | None
    schema: Json = True

    def compile(self) -> "CompiledCondition":
        """Check the condition completely; raise `ConditionInvalid` if it is not valid."""
        return CompiledCondition(self)


class CompiledCondition:
    """A checked condition, made by `Condition.compile`. Threads may share it.

    `schema` is a copy as plain JSON. Read it, but do not change it.
    """

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self._tokens = parse_scope(condition.scope)  # type: ignore[arg-type]  # it refuses None by its own code
        self._scope = str(condition.scope)
        self.schema: Json = _plain_copy(True if condition.schema is None else condition.schema)
        self._cost = _Cost(self.schema)
        self._is_valid = _engine(self.schema).is_valid
        # Evaluations are made once: making one takes longer than evaluating most schemas.
        places = [JsonPointer.from_parts(self._tokens[:end]).path for end in range(len(self._tokens) + 1)]
        self._matched = Evaluation(result=Result.MATCHED, code=None, where=self._scope)
        self._not_matched = Evaluation(result=Result.NOT_MATCHED, code="schema", where=self._scope)
        self._in_array = [Evaluation(result=Result.ERROR, code="scope_in_array", where=place) for place in places]
        self._missing = [  # by the first name that is missing
            Evaluation(result=Result.NOT_MATCHED, code="scope_missing", where=place) for place in places[1:]
        ]

    def value(self, tree: object) -> Any:
        """Return the value at the scope, or `MISSING`, also if the scope leads through an array."""
        for token in self._tokens:
            if not isinstance(tree, dict) or token not in tree:
                return MISSING
            tree = tree[token]
        return tree

    def evaluate(self, tree: object, *, parsed: bool = False) -> Evaluation:
        """Evaluate the condition. It never raises and never takes long, whatever the tree.

        Args:
            tree: The order as plain JSON.
            parsed: Our own parser made the tree, so it is JSON for certain. This can save a walk through the tree and
                never changes the result.
        """
        value = self.value(tree)
        if value is MISSING:
            return self._missing_at(tree)
        try:
            walks = self._cost.depends_on(value) and not (parsed and self._cost.is_small(value))
            if walks and (code := self._cost.refusal(value)):
                return Evaluation(result=Result.ERROR, code=code, where=self._scope)
            return self._matched if self._is_valid(value) else self._not_matched
        except (KeyboardInterrupt, SystemExit):
            raise
        except (ValueError, TypeError):  # not from our parser: a lone surrogate, a key that is not text, a date
            return Evaluation(result=Result.ERROR, code="not_json", where=self._scope)
        except BaseException:  # noqa: BLE001 -- a panic in the engine is not an Exception, and must not stop the process
            return Evaluation(result=Result.ERROR, code="engine", where=self._scope)

    def reason(self, tree: object) -> FailingKeyword | None:
        """Find the keyword that fails, in bounded time.

        Returns:
            None if the schema does not fail: the condition matches, ends in an error or has no value at its scope.
            Also None if the search reached its bound before it found a keyword.
        """
        if self.evaluate(tree) != self._not_matched:
            return None
        return _Search(self.schema, self._cost).find(self.value(tree), self._scope)

    def _missing_at(self, tree: object) -> Evaluation:
        for depth, token in enumerate(self._tokens):
            if isinstance(tree, list):
                return self._in_array[depth]
            if not isinstance(tree, dict) or token not in tree:
                return self._missing[depth]
            tree = tree[token]
        return self._not_matched

    def __repr__(self) -> str:
        return f"<CompiledCondition {self._scope}>"


def _engine(
    schema: Any, size_limit: int = max(PATTERN_SIZES), registry: jsonschema_rs.Registry | None = None
) -> jsonschema_rs.Draft202012Validator:
    """Compile a schema. Use only `is_valid` of the result.

    The error iterator can take seconds on a recursive schema, and its messages hold values. Two measures prevent
    fetching: `offline`, and the registry without retrieval in `_Cost`.
    """
    try:
        return jsonschema_rs.Draft202012Validator(
            schema,
            offline=True,
            validate_formats=False,
            registry=registry,
            pattern_options=jsonschema_rs.RegexOptions(size_limit=size_limit, dfa_size_limit=1024 * 1024),
        )
    except jsonschema_rs.ValidationError as error:
        raise ConditionInvalid("schema_invalid", _pointer(error.instance_path)) from error
    except (jsonschema_rs.ReferencingError, ValueError) as error:
        raise ConditionInvalid("schema_invalid", "") from error


# Keywords with subschemas: for the same value as the schema around them, for a part of it, or for no value unless a
# `$ref` points there. `dependencies` has left the draft, but the engine still evaluates it.
_SAME_VALUE = frozenset(("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies"))
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "propertyNames", "unevaluatedProperties")
_OF_ARRAYS = ("items", "prefixItems", "contains", "unevaluatedItems")
_BELOW = frozenset(_OF_OBJECTS + _OF_ARRAYS)
_ASIDE = frozenset(("$defs", "definitions", "contentSchema"))
_WITH_SUBSCHEMAS = _SAME_VALUE | _BELOW | _ASIDE
_BY_NAME = frozenset(("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions"))
_UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
_NUMERIC = frozenset(("multipleOf", "maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum", "uniqueItems"))
_SCALARS = frozenset((str, int, float, bool, type(None)))


class _Cost:
    """The work of a schema per part of a value, bounded at compile time.

    The count follows every `$ref`, as the engine does. It has two figures for each subschema: `ask`, the nodes that
    evaluate it, and `mark`, the nodes that find what it evaluated, for an `unevaluated*` beside or above it. The engine
    evaluates again while it marks, so nested `unevaluated*` multiply: by 2.6 to 3.7 per level (measured), 10 s at 18.

    A `$ref` back to a schema that is being followed counts once. This bounds the work, because the engine remembers the
    result of such a schema for each object and array: it evaluates the schema once for each of them, and for each other
    value once per reference back. It does not remember in time if a cycle stays on the same value (12 definitions that
    refer to each other ran for minutes), so such cycles are refused.
    """

    def __init__(self, schema: Any) -> None:
        resource = DRAFT202012.create_resource(schema)
        registry: Registry[Any] = Registry().with_resources(
            (uri, METASCHEMAS[uri]) for uri in METASCHEMAS if uri.startswith(DIALECT_FAMILY)
        )
        self._checked = {id(METASCHEMAS[uri].contents) for uri in METASCHEMAS}
        self.pattern_weights: dict[str, int] = {}
        self._following: dict[object, int] = {}  # the schemas being followed, with their depth in the value
        self._nodes = 0
        self._returns: list[object] = []
        self._dynamic_names = {"meta"}  # the metaschema's own
        self.numbers = False
        try:
            resolver = registry.resolver_with_root(resource)
            self._unchecked = [(schema, resolver, "")]
            while self._unchecked:
                self._check(*self._unchecked.pop())
            ask, _ = self._count(schema, resolver, "", into=0, depth=0)
        except ValueError as error:
            raise ConditionInvalid("ref_unresolvable", "", "an $id or $ref is not a URI") from error
        self.patterns = bool(self.pattern_weights)
        # Every reference back evaluates each remembered schema. The limit always allows a value of 100 parts.
        self.weight = ask * max(1, len(set(self._returns)) * len(self._returns))
        if self.weight > MAX_NODES:
            raise ConditionInvalid("expansion", "", "it is recursive in too many places")

    def depends_on(self, value: object) -> bool:
        """Tell whether `refusal` depends on this value. It does not for most scalars."""
        return type(value) not in _SCALARS or self.numbers or self.patterns

    def is_small(self, value: object) -> bool:
        """Tell from the text of a JSON value, in a quarter of the time, that it has no refusal."""
        if self.numbers or (self.patterns and self.weight > MAX_STEPS // 2000):  # it hardly ever would be
            return False
        try:
            text = msgspec.json.encode(value)
        except RecursionError:
            return False
        opening = text.count(b"{") + text.count(b"[")  # never less than the depth
        size = 1 + opening + text.count(b",") + (len(text) if self.patterns else 0)  # never less than in `refusal`
        return opening <= MAX_DEPTH and size * self.weight <= MAX_STEPS

    def refusal(self, value: object) -> str | None:
        """Return the error code of a value that is not evaluated, or None."""
        parts, size = [value], 1
        for _ in range(MAX_DEPTH + 1):
            # The engine compares numbers beyond 64 bits slowly: `uniqueItems` took 5 s for 4 000 of them.
            if self.numbers and any(type(part) is int and not -(2**63) <= part < 2**63 for part in parts):
                return "number_too_large"
            if self.patterns:
                size += sum(len(part) for part in parts if type(part) is str)
            containers = [part for part in parts if type(part) not in _SCALARS]
            size += sum(map(len, containers))  # type: ignore[arg-type]  # not JSON without a length: TypeError
            if size * self.weight > MAX_STEPS:
                return "too_costly"
            if not containers:
                return None
            parts = []
            for container in containers:
                if type(container) is dict:
                    parts += container.values()
                    if self.patterns:
                        size += sum(map(len, container))
                elif type(container) is list:
                    parts += container
                else:
                    return "not_json"
        return "too_deep"

    def _check(self, schema: Any, resolver: Any, where: str) -> None:
        """Check dialect, patterns and references of every subschema, used or not."""
        if not isinstance(schema, dict):
            return
        self._checked.add(id(schema))
        resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
        for keyword, allowed in ("$schema", DIALECT), ("$vocabulary", None):
            if schema.get(keyword, allowed) != allowed:
                raise ConditionInvalid("dialect", f"{where}/{keyword}")
        for pattern, place in _patterns(schema):
            self._pattern_weight(pattern, where + place)
        for keyword in ("$ref", "$dynamicRef"):
            if keyword in schema:
                self._look_up(schema[keyword], resolver, f"{where}/{keyword}")
        if "$dynamicAnchor" in schema:
            self._dynamic_names.add(schema["$dynamicAnchor"])
        for _, place, subschema in _subschemas(schema):
            self._check(subschema, resolver, where + place)

    def _count(self, schema: Any, resolver: Any, where: str, *, into: int, depth: int) -> tuple[int, int]:
        """Return `ask` and `mark` of a subschema.

        `into` counts the steps into the value, and `depth` bounds the recursion.
        """
        own = self._own_nodes(schema, where)
        self._nodes += own
        if self._nodes > MAX_NODES:
            raise ConditionInvalid("expansion", where)
        if depth > MAX_DEPTH:
            raise ConditionInvalid("too_deep", where)
        if not isinstance(schema, dict):
            return own, own
        resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
        ask = mark = own
        for keyword in ("$ref", "$dynamicRef"):
            if keyword in schema:
                asked, marked = self._follow(schema[keyword], resolver, f"{where}/{keyword}", into, depth)
                ask, mark = ask + asked, mark + asked + marked
        for keyword, place, subschema in _subschemas(schema):
            if keyword in _ASIDE:
                continue
            below = keyword in _BELOW
            asked, marked = self._count(subschema, resolver, where + place, into=into + below, depth=depth + 1)
            ask += asked
            if not below:
                mark += asked + marked
            elif keyword in _UNEVALUATED or keyword == "contains":
                mark += asked
        if any(keyword in schema for keyword in _UNEVALUATED):
            ask += mark
        if ask > MAX_NODES:
            raise ConditionInvalid("expansion", where)
        return ask, mark

    def _follow(self, ref: str, resolver: Any, where: str, into: int, depth: int) -> tuple[int, int]:
        resolved = self._look_up(ref, resolver, where)
        target = (id(resolved.contents), self._dynamic_anchors(resolved))
        if target in self._following:
            if self._following[target] == into:
                raise ConditionInvalid("recursive_ref", where)
            self._returns.append(target)
            return 1, 1
        self._following[target] = into
        try:
            return self._count(resolved.contents, resolved.resolver, where, into=into, depth=depth + 1)
        finally:
            del self._following[target]

    def _dynamic_anchors(self, resolved: Any) -> tuple[int | None, ...]:
        """Return the targets of each `$dynamicRef`: they tell apart two uses of one schema."""
        leads: dict[str, int | None] = dict.fromkeys(self._dynamic_names)
        contents = resolved.contents
        if isinstance(contents, dict) and (name := contents.get("$dynamicAnchor")):
            leads[name] = id(contents)
        for uri, registry in resolved.resolver.dynamic_scope():  # the outermost is last, and wins
            for name in self._dynamic_names:
                with suppress(NoSuchAnchor):
                    if isinstance(anchor := registry.anchor(uri, name).value, DynamicAnchor):
                        leads[name] = id(anchor.resource.contents)
        return tuple(leads.values())

    def _look_up(self, ref: str, resolver: Any, where: str) -> Any:
        try:
            resolved = resolver.lookup(ref)
        except (PointerToNowhere, NoSuchAnchor) as error:
            raise ConditionInvalid("ref_unresolvable", where) from error
        except Unresolvable as error:
            raise ConditionInvalid("ref_remote", where) from error
        if id(resolved.contents) not in self._checked:  # no keyword says that it is a schema
            _check_metaschema(resolved.contents, where)
            self._checked.add(id(resolved.contents))
            self._unchecked.append((resolved.contents, resolved.resolver, where))
        return resolved

    def _own_nodes(self, schema: Any, where: str) -> int:
        if not isinstance(schema, dict):
            return 1
        nodes = 1
        for keyword, value in schema.items():
            nodes += 1 if keyword in _WITH_SUBSCHEMAS else _size(value)
            if keyword in _NUMERIC or (keyword in ("const", "enum") and not _is_text(value)):
                self.numbers = True
        return nodes + sum(self._pattern_weight(pattern, where + place) for pattern, place in _patterns(schema))

    def _pattern_weight(self, pattern: str, where: str) -> int:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ConditionInvalid("pattern_too_long", where)
        if pattern not in self.pattern_weights:
            for size, weight in PATTERN_SIZES.items():
                try:
                    _engine({"pattern": pattern}, size_limit=size)
                except ConditionInvalid:
                    continue
                self.pattern_weights[pattern] = weight
                break
            else:
                raise ConditionInvalid("pattern_unsupported", where)
        return self.pattern_weights[pattern]


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
    *("not", "anyOf", "oneOf", "$dynamicRef", *_UNEVALUATED),
)
_BASE = "https://schema.invalid/"  # the base of references, without an $id
# A step is one node of a schema on one character of a value; a compilation counts as this many characters. A search
# takes at most about a second (measured).
_MAX_SEARCH_STEPS, _COMPILATION_WEIGHT = 20_000_000, 50
_MAX_SEARCH_DEPTH = 400  # names in a JSON Pointer into the schema


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

    def __init__(self, schema: Any, cost: _Cost) -> None:
        uri = urljoin(_BASE, schema.get("$id", "")) if isinstance(schema, dict) else _BASE
        self._schema = _absolute(schema, _BASE)
        self._weight = cost.weight
        self._pattern_weight = max(cost.pattern_weights.values(), default=1)
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
                if (
                    keyword is None
                ):  # such as for a `$dynamicRef`, which has another target without the schemas around it
                    break
                missing = [name for name in schema[keyword] if name not in value] if keyword == "required" else []
                place = where + _pointer(missing[:1])
                found = FailingKeyword(keyword=keyword, schema=at + _pointer([keyword]), where=place)
                steps = self._steps(schema, keyword, value)
                if keyword in ("anyOf", "oneOf"):
                    return self._deepest(list(steps), at, where) or found
                step = next((step for step in steps if self._fails(step.subschema, step.part)), None)
                if step is None:
                    break
                schema, value = step.subschema, step.part
                at, where = at + _pointer(step.schema), where + _pointer(step.where)
        return found

    def _deepest(self, branches: list[_Step], at: str, where: str) -> FailingKeyword | None:
        """Find the failure that is deepest in the value: its branch fits best. None for a tie."""
        if not all(self._fails(branch.subschema, branch.part) for branch in branches):  # `oneOf`: several match
            return None
        failures = [
            self._find(branch.subschema, branch.part, at + _pointer(branch.schema), where) for branch in branches
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
            weight = self._weight
            if not any(word in text for word in (b'"$ref"', b'"$dynamicRef"', b'"unevaluated')):
                weight = min(weight, _size(schema) * (self._pattern_weight if b'"pattern' in text else 1))
            self._spend(weight * _COMPILATION_WEIGHT)
            self._engines[id(schema)] = schema, weight, _engine(schema, registry=self._registry)
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
    if keyword in _UNEVALUATED:  # it needs all keywords but the other one of its kind
        return {each: schema[each] for each in schema if each == keyword or each not in _UNEVALUATED}
    return {each: schema[each] for each in (keyword, *_TOGETHER.get(keyword, ())) if each in schema}


def _absolute(schema: Any, base: str) -> Any:
    """Return a copy with absolute references, so that each part can be evaluated alone."""
    if not isinstance(schema, dict):
        return schema
    base = urljoin(base, schema.get("$id", ""))
    copy = dict(schema)
    for keyword in copy.keys() & {"$ref", "$dynamicRef"}:
        ref = copy[keyword]
        copy[keyword] = base.partition("#")[0] + ref if ref.startswith("#") else urljoin(base, ref)
    for keyword in copy.keys() & _WITH_SUBSCHEMAS:
        below = copy[keyword]
        if keyword in _BY_NAME:
            copy[keyword] = {name: _absolute(part, base) for name, part in below.items()}
        else:
            copy[keyword] = (
                [_absolute(part, base) for part in below] if isinstance(below, list) else _absolute(below, base)
            )
    return copy


def _plain_copy(schema: Any) -> Any:
    """Return a checked copy of the schema as plain JSON; raise `ConditionInvalid`."""
    if not isinstance(schema, (dict, bool)):
        raise ConditionInvalid("schema_type", "")
    nodes, level = 1, [("", schema)]
    for depth in range(MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for where, value in level:
            if isinstance(value, (dict, list)):
                nodes += len(value)  # before collecting them: YAML aliases can repeat one list a million times
                if depth == MAX_DEPTH:
                    raise ConditionInvalid("too_deep", where)
                if nodes > MAX_NODES:
                    raise ConditionInvalid("expansion", where)
                if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                    raise ConditionInvalid("schema_type", where)
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                below += ((f"{where}/{_escaped(key)}", part) for key, part in pairs)
            elif not isinstance(value, (str, int, float)) and value is not None:
                raise ConditionInvalid("schema_type", where)
        level = below
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        size = len(text.encode())
    except ValueError as error:  # NaN, infinity, a lone surrogate
        raise ConditionInvalid("schema_type", "") from error
    if size > MAX_SCHEMA_BYTES:
        raise ConditionInvalid("too_large", "")
    plain = json.loads(text)
    _check_metaschema(plain, "")
    return plain


def _check_metaschema(schema: Any, where: str) -> None:
    from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]  # only at start: 0.06 s

    if not isinstance(schema, (dict, bool)):
        raise ConditionInvalid("schema_type", where)
    try:
        # The default `format_checker` would check patterns as Python's regular expressions, not as ECMA's.
        Draft202012Validator.check_schema(schema, format_checker=None)
    except SchemaError as error:
        raise ConditionInvalid("schema_invalid", where + _pointer(error.absolute_path)) from None


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield keyword, place and subschema; skip the lists of names in `dependencies`."""
    for keyword, value in schema.items():
        if keyword not in _WITH_SUBSCHEMAS:
            continue
        if keyword in _BY_NAME:
            parts = [(f"/{keyword}/{_escaped(name)}", part) for name, part in value.items()]
        elif isinstance(value, list):
            parts = [(f"/{keyword}/{index}", part) for index, part in enumerate(value)]
        else:
            parts = [(f"/{keyword}", value)]
        yield from ((keyword, place, part) for place, part in parts if isinstance(part, (dict, bool)))


def _patterns(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "pattern" in schema:
        yield schema["pattern"], "/pattern"
    for pattern in schema.get("patternProperties", ()):
        yield pattern, f"/patternProperties/{_escaped(pattern)}"


def _size(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, parts))


def _is_text(value: Any) -> bool:
    return all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))


def _escaped(token: object) -> str:
    return str(token).replace("~", "~0").replace("/", "~1")


def _pointer(path: Any) -> str:
    return "".join(f"/{_escaped(token)}" for token in path)
