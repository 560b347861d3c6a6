"""
Does this schema hold at this pointer? Pure: values in, an answer out; nothing is fetched and nothing hangs.

A condition is checked in full when it is compiled, so that `evaluate` never raises, whatever the order looks like. What
one would get wrong: *missing* is an answer of its own. Where the scope leads nowhere the schema is not asked, not even
`true` or `{"not": {}}`; null at the scope is a value like any other. And a limit on the size of a schema does not bound
the time that it takes: what counts is how often it is asked on how large a value (`_Cost`).
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
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
from jsonschema_specifications import REGISTRY as METASCHEMAS  # type: ignore[import-untyped]
from referencing import Registry
from referencing.exceptions import NoSuchAnchor, PointerToNowhere, Unresolvable
from referencing.jsonschema import DRAFT202012, DynamicAnchor

from adapter.orders import Json

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DIALECT_FAMILY = "https://json-schema.org/draft/2020-12/"
LONGEST_SCOPE, MOST_SCOPE_TOKENS = 1_024, 32
LARGEST_SCHEMA = 1024 * 1024  # bytes, written compactly
DEEPEST = 64  # of a schema, of its subschemas after `$ref` expansion, and of the value at a scope
MOST_NODES = 20_000  # of a schema, after `$ref` expansion
LONGEST_PATTERN = 4_096
# A schema of n nodes asked about a value of m parts takes at most n * m steps of, measured, 5 to 500 ns, and holds the
# interpreter meanwhile. Two million are room for 100 nodes and 20 000 parts; a large order has a few thousand parts.
MOST_STEPS = 2_000_000
# Compiled size in bytes -> nodes that the pattern counts as, for each character that it reads. Linear time is not the
# same for all: measured, at worst 0.7 us a character up to 8 KiB and 8.5 us at 256 KiB, and a node takes about 0.1 us.
PATTERN_SIZES = {8 * 1024: 8, 32 * 1024: 20, 256 * 1024: 90}

_REMEDIES = {
    "scope_empty": "a condition needs a scope, a JSON Pointer such as /state/currentStatus",
    "scope_syntax": "write a JSON Pointer: it starts with /, and ~ is written ~0 and / in a name ~1",
    "scope_empty_token": "there is a / too many; every name between slashes needs at least one character",
    "scope_too_long": f"at most {LONGEST_SCOPE} characters and {MOST_SCOPE_TOKENS} names are allowed",
    "schema_type": "a schema is an object, true or false, and JSON throughout (keys are text, numbers are finite)",
    "schema_invalid": "this is not valid JSON Schema draft 2020-12",
    "dialect": f"leave $schema out or write exactly {DIALECT}; $vocabulary is not supported",
    "too_large": f"a schema has at most {LARGEST_SCHEMA} bytes",
    "too_deep": f"a schema is at most {DEEPEST} levels deep, also after following its $ref",
    "expansion": f"a schema has at most {MOST_NODES} nodes after following its $ref; below unevaluatedProperties and "
    "unevaluatedItems they count several times, a long pattern as up to 90",
    "ref_remote": "a $ref points into this schema; other documents are never fetched, copy them into $defs",
    "ref_unresolvable": "this $ref leads nowhere; it points at a part of this schema, such as #/$defs/name",
    "recursive_ref": "this $ref comes back to itself for the same value; a recursive schema has to go into the value "
    "first, through properties or items for example",
    "pattern_too_long": f"a pattern has at most {LONGEST_PATTERN} characters",
    "pattern_unsupported": "not a regular expression that is decided in linear time: no look-around, no "
    "back-references, no large repetitions of large classes (maxLength is better)",
}


class Result(Enum):
    MATCHED = "matched"
    NOT_MATCHED = "not_matched"
    ERROR = "error"  # could not be decided, and will not be on another try with the same value


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """
    What became of one condition on one tree. It names places, never values, so it may be logged.

    Codes where it did not match: `scope_missing`, `schema`. Where it is an error: `scope_in_array`, `too_deep`,
    `too_costly` (a smaller scope helps), `number_too_large` (beyond 64 bits, and the schema asks about numbers),
    `not_json`, `engine`.
    """

    result: Result
    code: str | None  # None where it matched
    where: str | None  # JSON Pointer into the tree: the scope, or as much of it as there is


@dataclass(frozen=True, slots=True, kw_only=True)
class FailingKeyword:
    """
    The reason why a condition does not hold: a keyword and two places. It holds no value, so it may be logged.

    A search that reached its bound names the deepest keyword that it found.
    """

    keyword: str | None  # None: the schema at this place is `false`
    schema: str  # JSON Pointer into the schema; a step through a reference is written /$ref
    where: str  # JSON Pointer into the tree; for `required`, of the member that is missing


class Missing(Enum):
    MISSING = "missing"


MISSING: Final = Missing.MISSING  # what `value` answers where the scope leads nowhere; null is a value


class ConditionInvalid(Exception):
    """
    The configuration holds a scope or a schema that cannot be decided safely; the message says what is allowed.

    `where` is `scope`, or a JSON Pointer into the schema ("" is the whole of it).
    """

    def __init__(self, code: str, where: str, hint: str = "") -> None:
        place = where if where == "scope" else f"schema at {where}" if where else "schema"
        super().__init__(f"{place}: {code}: {_REMEDIES[code]}{hint and f' ({hint})'}")
        self.code = code
        self.where = where


def parse_scope(text: str) -> tuple[str, ...]:
    """The names that lead to the scope, unescaped. Raises `ConditionInvalid`."""
    if text is None or text == "":
        raise ConditionInvalid("scope_empty", "scope")
    if not isinstance(text, str):
        raise ConditionInvalid("scope_syntax", "scope", "it has to be text")
    if len(text) > LONGEST_SCOPE:
        raise ConditionInvalid("scope_too_long", "scope")
    if text.startswith("#"):
        raise ConditionInvalid("scope_syntax", "scope", "drop the #")
    if not text.startswith("/"):
        raise ConditionInvalid("scope_syntax", "scope", f"it starts with {text[0]!r}")
    try:
        tokens = tuple(JsonPointer(text).parts)
    except JsonPointerException:
        raise ConditionInvalid("scope_syntax", "scope", "a ~ is followed by neither 0 nor 1") from None
    if len(tokens) > MOST_SCOPE_TOKENS:
        raise ConditionInvalid("scope_too_long", "scope")
    if "" in tokens:
        raise ConditionInvalid("scope_empty_token", "scope")
    return tokens


@dataclass(frozen=True, slots=True)
class Condition:
    """A scope and a schema as they were configured. A schema that is absent or null holds for every value."""

    scope: str | None
    schema: Json = True

    def compile(self) -> "CompiledCondition":
        """Check everything that can be checked without a value. Raises `ConditionInvalid`."""
        return CompiledCondition(self)


class CompiledCondition:
    """
    A condition that was found decidable. Made by `Condition.compile`; may be shared between threads.

    `schema` is what is decided, as plain JSON of its own: to be read, not changed.
    """

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self._tokens = parse_scope(condition.scope)  # type: ignore[arg-type]  # None has a refusal of its own
        self._scope = str(condition.scope)
        self.schema: Json = _plain_copy(True if condition.schema is None else condition.schema)
        self._cost = _Cost(self.schema)
        self._is_valid = _engine(self.schema).is_valid
        # Answers are made beforehand: making one takes longer than most schemas do.
        places = [JsonPointer.from_parts(self._tokens[:end]).path for end in range(len(self._tokens) + 1)]
        self._matched = Evaluation(result=Result.MATCHED, code=None, where=self._scope)
        self._not_matched = Evaluation(result=Result.NOT_MATCHED, code="schema", where=self._scope)
        self._in_array = [Evaluation(result=Result.ERROR, code="scope_in_array", where=place) for place in places]
        self._missing = [  # the first name on the way that is not there
            Evaluation(result=Result.NOT_MATCHED, code="scope_missing", where=place) for place in places[1:]
        ]

    def value(self, tree: object) -> Any:
        """What stands at the scope, or `MISSING`; also where the way there leads through an array."""
        for token in self._tokens:
            if not isinstance(tree, dict) or token not in tree:
                return MISSING
            tree = tree[token]
        return tree

    def evaluate(self, tree: object, *, parsed: bool = False) -> Evaluation:
        """
        Decide. Never raises and never takes long, whatever the tree. `parsed`: it is JSON for certain, for our own
        parser made it, which may save looking at every part of it; the answer is the same.
        """
        value = self.value(tree)
        if value is MISSING:
            return self._why_missing(tree)
        try:
            looks = self._cost.depends_on(value) and not (parsed and self._cost.is_small(value))
            if looks and (code := self._cost.refusal(value)):
                return Evaluation(result=Result.ERROR, code=code, where=self._scope)
            return self._matched if self._is_valid(value) else self._not_matched
        except (KeyboardInterrupt, SystemExit):
            raise
        except (ValueError, TypeError):  # a lone surrogate, a key that is no text, a date: not from our parser
            return Evaluation(result=Result.ERROR, code="not_json", where=self._scope)
        except BaseException:  # noqa: BLE001 -- a panic in the engine is no Exception, and must not stop the intake
            return Evaluation(result=Result.ERROR, code="engine", where=self._scope)

    def reason(self, tree: object) -> FailingKeyword | None:
        """
        Find the keyword that fails, in bounded time. None if the condition matches, cannot be decided or has nothing at
        its scope, and if the bound was reached before any keyword was found.
        """
        if self.evaluate(tree) != self._not_matched:
            return None
        return _Search(self.schema, self._cost).find(self.value(tree), self._scope)

    def _why_missing(self, tree: object) -> Evaluation:
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
    """
    What decides. `offline` and the empty registry of `_Cost` are two locks on one door: either keeps us from fetching.

    Only `is_valid` may be asked: its error iterator can take seconds on a recursive schema, and its texts hold values.
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


# Where subschemas stand: asked about the same value as the schema around them, about a part of it, or not at all
# unless a `$ref` points there. `dependencies` is no longer in the draft, but the engine still decides it.
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
    """
    How much work a schema is for each part of a value: counted and bounded at compile, compared with the value later.

    The count follows every `$ref`, as the engine does, and keeps two figures for each subschema: `ask`, the nodes that
    decide it, and `mark`, those that find out what it evaluated, for an `unevaluated*` beside or above it. The engine
    asks again while it marks, so nesting `unevaluated*` multiplies: measured, 2.6 to 3.7 times a level, 10 s at 18.

    A `$ref` back to a schema that is being followed counts once. That bounds the work since the engine remembers, for
    such a schema, its answer on each object and array: however much a recursive schema fans out, it is asked once for
    each of them, and for each other value once per way back. It remembers nothing in time where a cycle stays on the
    same value (12 definitions that refer to each other ran for minutes), so those are refused.
    """

    def __init__(self, schema: Any) -> None:
        resource = DRAFT202012.create_resource(schema)
        registry: Registry[Any] = Registry().with_resources(
            (uri, METASCHEMAS[uri]) for uri in METASCHEMAS if uri.startswith(DIALECT_FAMILY)
        )
        self._checked = {id(METASCHEMAS[uri].contents) for uri in METASCHEMAS}
        self.pattern_weights: dict[str, int] = {}
        self._following: dict[object, int] = {}  # the schemas on the way here, and how far into the value each was
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
        # Each remembered schema is asked from every way back. Within the limit, a value of 100 parts is always decided.
        self.weight = ask * max(1, len(set(self._returns)) * len(self._returns))
        if self.weight > MOST_NODES:
            raise ConditionInvalid("expansion", "", "it is recursive in too many places")

    def depends_on(self, value: object) -> bool:
        """Whether `refusal` has to be asked: not for the scalars that most conditions look at."""
        return type(value) not in _SCALARS or self.numbers or self.patterns

    def is_small(self, value: object) -> bool:
        """Whether a JSON value is seen at once to be one without a refusal: by its text, in a quarter of the time."""
        if self.numbers or (self.patterns and self.weight > MOST_STEPS // 2000):  # it would hardly ever be
            return False
        try:
            text = msgspec.json.encode(value)
        except RecursionError:
            return False
        opening = text.count(b"{") + text.count(b"[")  # at least as many as it is deep
        size = 1 + opening + text.count(b",") + (len(text) if self.patterns else 0)  # at least what `refusal` counts
        return opening <= DEEPEST and size * self.weight <= MOST_STEPS

    def refusal(self, value: object) -> str | None:
        """The code under which the engine is not asked about this value."""
        parts, size = [value], 1
        for _ in range(DEEPEST + 1):
            # Beyond 64 bits the engine compares slowly, and `uniqueItems` each with each: 4 000 of them took 5 s.
            if self.numbers and any(type(part) is int and not -(2**63) <= part < 2**63 for part in parts):
                return "number_too_large"
            if self.patterns:
                size += sum(len(part) for part in parts if type(part) is str)
            containers = [part for part in parts if type(part) not in _SCALARS]
            size += sum(map(len, containers))  # type: ignore[arg-type]  # what has no length is not JSON: TypeError
            if size * self.weight > MOST_STEPS:
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
        """Every subschema once, used or not: its dialect, its patterns, and that its references lead somewhere."""
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
        """`ask` and `mark` of a subschema. `into` counts the steps into the value; `depth` bounds our own recursion."""
        own = self._own_nodes(schema, where)
        self._nodes += own
        if self._nodes > MOST_NODES:
            raise ConditionInvalid("expansion", where)
        if depth > DEEPEST:
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
        if ask > MOST_NODES:
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
        """Where each `$dynamicRef` leads from here: under other anchors the same schema is another one."""
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
        if id(resolved.contents) not in self._checked:  # it stands where no schema was expected
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
        if len(pattern) > LONGEST_PATTERN:
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


# Keywords that are decided together with those beside them.
_TOGETHER = {
    "if": ("then", "else"),
    "additionalProperties": ("properties", "patternProperties"),
    "items": ("prefixItems",),
    "contains": ("minContains", "maxContains"),
}
# Keywords in the order in which they are tried; the others come first. A keyword follows those that it depends on, and
# those that tell less come late.
_TRIED_LAST = (
    *("$ref", "allOf", "if", "dependentSchemas", "dependencies"),
    *("properties", "patternProperties", "propertyNames", "additionalProperties", "prefixItems", "items", "contains"),
    *("not", "anyOf", "oneOf", "$dynamicRef", *_UNEVALUATED),
)
_BASE = "https://schema.invalid/"  # what references are relative to where no $id says otherwise
# A step is one node of a schema on one character of a value; a compilation counts as this many characters. Measured,
# a search takes at most a second.
_STEPS_OF_A_SEARCH, _COMPILING = 20_000_000, 50
_LONGEST_WAY = 400  # names in the place in the schema


class _SearchEnded(Exception):
    """The bound was reached."""


class _Step(NamedTuple):
    """A subschema and the part of the value that it applies to, with the steps to both."""

    subschema: Any
    schema: tuple[str, ...]
    part: Any
    where: tuple[str, ...] = ()


class _Search:
    """
    The search for the keyword that fails: each keyword by itself is put to the engine, then what is below it.

    Its bound counts work, not time, so that the answer is always the same.
    """

    def __init__(self, schema: Any, cost: _Cost) -> None:
        uri = urljoin(_BASE, schema.get("$id", "")) if isinstance(schema, dict) else _BASE
        self._schema = _absolute(schema, _BASE)
        self._weight = cost.weight
        self._pattern_weight = max(cost.pattern_weights.values(), default=1)
        self._registry = jsonschema_rs.Registry([(uri, self._schema)])
        self._resolver = Registry().with_resource(uri, DRAFT202012.create_resource(self._schema)).resolver()
        self._engines: dict[int, tuple[Any, int, jsonschema_rs.Draft202012Validator]] = {}
        self._steps_left = _STEPS_OF_A_SEARCH

    def find(self, value: Any, scope: str) -> FailingKeyword | None:
        return self._find(self._schema, value, "", scope)

    def _find(self, schema: Any, value: Any, at: str, where: str) -> FailingKeyword | None:
        """Find the failing keyword of a schema that does not hold."""
        found = None
        with suppress(_SearchEnded, ConditionInvalid, Unresolvable, ValueError):
            while at.count("/") < _LONGEST_WAY:
                if schema is False:
                    return FailingKeyword(keyword=None, schema=at, where=where)
                failing = (each for each in _in_order(schema) if self._fails(_alone(schema, each), value))
                keyword = next(failing, None)
                if keyword is None:  # such as a `$dynamicRef`, which leads elsewhere without the schemas around it
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
        """Find the one failure that is deepest in the value: most likely its branch is the one that was meant."""
        if not all(self._fails(branch.subschema, branch.part) for branch in branches):  # `oneOf`: more than one holds
            return None
        failures = [
            self._find(branch.subschema, branch.part, at + _pointer(branch.schema), where) for branch in branches
        ]
        depths = [failure.where.count("/") if failure else 0 for failure in failures]
        return failures[depths.index(max(depths))] if depths.count(max(depths)) == 1 else None

    def _steps(self, schema: dict[str, Any], keyword: str, value: Any) -> Iterator[_Step]:
        """What is below a failing keyword; nothing where its subschemas do not tell why it fails."""
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
                alone = _alone(schema, keyword)
                for name, part in value.items():
                    if self._fails(alone, {name: part}):
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
            self._spend(weight * _COMPILING)
            self._engines[id(schema)] = schema, weight, _engine(schema, registry=self._registry)
        _, weight, engine = self._engines[id(schema)]
        self._spend(weight * len(json.dumps(value)))
        return not engine.is_valid(value)

    def _spend(self, steps: int) -> None:
        self._steps_left -= 1000 + steps
        if self._steps_left < 0:
            raise _SearchEnded


def _in_order(schema: Any) -> list[str]:
    known = [keyword for keyword in schema if not keyword.startswith("$") or keyword in _TRIED_LAST]
    return sorted(known, key=lambda keyword: _TRIED_LAST.index(keyword) if keyword in _TRIED_LAST else -1)


def _alone(schema: dict[str, Any], keyword: str) -> dict[str, Any]:
    """What decides a keyword by itself. It is asked after those that it depends on, which hold."""
    if keyword in _UNEVALUATED:
        return schema
    return {each: schema[each] for each in (keyword, *_TOGETHER.get(keyword, ())) if each in schema}


def _absolute(schema: Any, base: str) -> Any:
    """A copy whose references mean the same wherever a part of it stands."""
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
    """The schema as plain JSON of our own, which nobody can change, small enough and checked against the metaschema."""
    if not isinstance(schema, (dict, bool)):
        raise ConditionInvalid("schema_type", "")
    nodes, level = 1, [("", schema)]
    for depth in range(DEEPEST + 1):
        below: list[tuple[str, Any]] = []
        for where, value in level:
            if isinstance(value, (dict, list)):
                nodes += len(value)  # before they are gathered: YAML can name one list a million times
                if depth == DEEPEST:
                    raise ConditionInvalid("too_deep", where)
                if nodes > MOST_NODES:
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
    if size > LARGEST_SCHEMA:
        raise ConditionInvalid("too_large", "")
    plain = json.loads(text)
    _check_metaschema(plain, "")
    return plain


def _check_metaschema(schema: Any, where: str) -> None:
    if not isinstance(schema, (dict, bool)):
        raise ConditionInvalid("schema_type", where)
    try:
        # Without `format_checker` patterns would be judged by Python's regular expressions, which are not ECMA's.
        Draft202012Validator.check_schema(schema, format_checker=None)
    except SchemaError as error:
        raise ConditionInvalid("schema_invalid", where + _pointer(error.absolute_path)) from None


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Keyword, place and subschema; what is no subschema (a list of names in `dependencies`) is left out."""
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
