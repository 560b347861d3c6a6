"""Checks of a schema at start, and the engine that evaluates it.

An accepted schema decides every order that the service accepts, however large it is. So the bound is on the schema: on
its nodes, on its patterns, and on its nodes for each byte of the value (`MAX_NODES_PER_BYTE`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import jsonschema_rs
from referencing import Registry
from referencing.exceptions import NoSuchAnchor, PointerToNowhere, Unresolvable
from referencing.jsonschema import DRAFT202012

from adapter.conditions.keywords import OWN, OwnKeywords, has_scalars, is_simple_step, own_keywords, with_own_keywords
from adapter.conditions.patterns import PatternUnknown, has_more_states

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MAX_SCOPE_LENGTH, MAX_SCOPE_TOKENS = 1_024, 32
MAX_SCHEMA_BYTES = 1024 * 1024  # as compact JSON
MAX_SCHEMA_DEPTH = 64  # of a schema, and of its subschemas after `$ref` expansion
MAX_NODES = 20_000  # of a schema, after `$ref` expansion
MAX_PATTERN_LENGTH = 1_024
MAX_PATTERN_BYTES = 256 * 1024  # compiled
MAX_PATTERN_STATES = 2_000  # they fit in the engine's memory, so that it reads a character in 2 to 5 ns (measured)
MAX_NODES_PER_BYTE = 4.5
MIB = 1024 * 1024
LONGEST_FOR_A_MIB = timedelta(milliseconds=50)  # of an evaluation at this rate

_REMEDIES = {
    "scope_empty": "a condition needs a scope, a JSON Pointer such as /state/currentStatus",
    "scope_syntax": "write a JSON Pointer: it starts with /, and ~ is written ~0 and / in a name ~1",
    "scope_empty_token": "a name between two slashes is empty; remove one /",
    "scope_too_long": f"at most {MAX_SCOPE_LENGTH} characters and {MAX_SCOPE_TOKENS} names are allowed",
    "schema_type": "a schema is an object, true or false, and plain JSON (keys are text, numbers are finite)",
    "schema_invalid": "this is not valid in JSON Schema draft 2020-12",
    "dialect": f"remove $schema, or write exactly {DIALECT}; $vocabulary is not supported",
    "dynamic_ref": "$dynamicRef is not supported; write $ref",
    "too_large": f"a schema has at most {MAX_SCHEMA_BYTES} bytes",
    "too_deep": f"a schema is at most {MAX_SCHEMA_DEPTH} levels deep, also after following its $ref",
    "expansion": f"a schema has at most {MAX_NODES} nodes after following its $ref",
    "too_slow": "this schema could take more than 50 ms for a large order; use fewer keywords below items, contains, "
    "additionalProperties and the like, name the members with properties, or use a smaller scope",
    "unique_items": "uniqueItems compares only texts, numbers, true, false and null, because whole objects and arrays "
    "take too long; write the type of the items beside it, such as items: {type: string}",
    "ref_remote": "a $ref must point into this schema, because nothing is fetched; copy the other document into $defs",
    "ref_unresolvable": "this $ref has no target; it must point to a part of this schema, such as #/$defs/name",
    "recursive_ref": "this $ref returns to itself on the same value; a recursive schema must go into the value, "
    "such as through properties or items",
    "pattern_too_long": f"a pattern has at most {MAX_PATTERN_LENGTH} characters",
    "pattern_unsupported": "this regular expression cannot be matched fast in linear time; avoid look-around, "
    "back-references and large repetitions (use maxLength), and name letters such as [a-zåäö] instead of \\p{L}",
}


class ConditionInvalid(Exception):
    """A scope or schema in the configuration that cannot be evaluated safely.

    The message says what is allowed. `where` is `scope`, or a JSON Pointer into the schema ("" is the whole schema).
    """

    def __init__(self, code: str, where: str, hint: str = "") -> None:
        place = where if where == "scope" else f"schema at {where}" if where else "schema"
        super().__init__(f"{place}: {code}: {_REMEDIES[code]}{hint and f' ({hint})'}")
        self.code = code
        self.where = where


@dataclass(frozen=True, slots=True)
class CheckedSchema:
    """A schema that decides every order in bounded time. `check_schema` makes it."""

    schema: Any  # a copy, as plain JSON
    nodes: int  # after `$ref` expansion
    nodes_per_byte: float  # that are evaluated at most, for each byte of the value

    def engine(self, part: Any = None, registry: jsonschema_rs.Registry | None = None) -> Any:
        """Compile the schema, or a part of it. Use only `is_valid` of the result.

        The error iterator can take seconds on a recursive schema, and its messages hold values. Two measures prevent
        fetching: `offline`, and the check of every reference.
        """
        schema = with_own_keywords(self.schema if part is None else part)
        return _engine(schema, registry=registry, keywords={OWN: OwnKeywords})


def check_schema(schema: Any) -> CheckedSchema:
    """Check a schema completely. Raises `ConditionInvalid`."""
    plain = _plain_copy(schema)
    return _Check(plain).result()


def _engine(schema: Any, **options: Any) -> jsonschema_rs.Draft202012Validator:
    try:
        return jsonschema_rs.Draft202012Validator(
            schema,
            offline=True,
            validate_formats=False,
            pattern_options=jsonschema_rs.RegexOptions(size_limit=MAX_PATTERN_BYTES, dfa_size_limit=1024 * 1024),
            **options,
        )
    except jsonschema_rs.ValidationError as error:
        raise ConditionInvalid("schema_invalid", pointer(error.instance_path)) from error
    except (jsonschema_rs.ReferencingError, ValueError) as error:
        raise ConditionInvalid("schema_invalid", "") from error


# Keywords with subschemas: for the same value as the schema around them, for a part of it, or for no value unless a
# `$ref` points there. `dependencies` has left the draft, but the engine still evaluates it.
_SAME_VALUE = frozenset(("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies"))
# Keyword -> the fewest bytes of JSON for each part that it applies to.
_EVERY_PART = {
    **dict.fromkeys(("items", "contains", "unevaluatedItems"), 2),  # `1,`
    **dict.fromkeys(
        ("patternProperties", "additionalProperties", "propertyNames", "unevaluatedProperties"), 5
    ),  # `"":1,`
}
_BELOW = frozenset((*_EVERY_PART, "properties", "prefixItems"))
_ASIDE = frozenset(("$defs", "definitions", "contentSchema"))
WITH_SUBSCHEMAS = _SAME_VALUE | _BELOW | _ASIDE
BY_NAME = frozenset(("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions"))
UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
# The engine evaluates the other keywords again to find what is unevaluated: 2.6 to 3.7 times (measured).
_UNEVALUATED_FACTOR = 4
# Keywords whose subschema may fail for one part while the evaluation goes on with the next.
_GOES_ON = frozenset(("contains", "not", "anyOf", "oneOf", "if", *UNEVALUATED))
# Nodes that the keywords count as that are checked in Python (`keywords.py`).
_CALL_NODES, _FAILURE_NODES = 32, 25  # for each value; more if it may fail and the evaluation goes on
_EQUALITY_NODES, _OTHER_NODES = 25, 4
_STEP_NODES, _ODD_STEP_NODES = 55, 120  # `multipleOf`, if every integer is a multiple, and otherwise
_UNIQUE_RATE = 2.5  # for each byte of an array
_PATTERN_RATE = 0.5  # for each byte of a text


class _Check:
    """The checks of one schema: dialect, patterns, references and size.

    It follows every `$ref`, as the engine does. A `$ref` back to a schema that is being followed counts once. This
    bounds the work, because the engine remembers the result of such a schema for each object and array: it evaluates
    the schema once for each of them, and for each other value once per reference back. It does not remember in time if
    a cycle stays on the same value (12 definitions that refer to each other ran for minutes), so such cycles are
    refused.
    """

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._nodes = 0
        self._has_unique_items = False
        self._checked: set[int] = set()
        self._following: dict[int, int] = {}  # the schemas being followed, with their depth in the value
        self._smallest: dict[int, int] = {}  # recursive schema -> the fewest bytes for each value that it returns on
        self._returns: list[int] = []

    def result(self) -> CheckedSchema:
        try:
            resolver = Registry[Any]().resolver_with_root(DRAFT202012.create_resource(self._schema))
            self._unchecked = [(self._schema, resolver, "")]
            while self._unchecked:
                self._check(*self._unchecked.pop())
            known, rate = None, (0.0, 0.0)
            while known != self._smallest:  # until each recursive schema is counted for its smallest parts
                known, self._nodes, self._returns = dict(self._smallest), 0, []
                rate = self._rate(self._schema, resolver, "", each=MIB, goes_on=False, into=0, depth=0)
        except ValueError as error:
            raise ConditionInvalid("ref_unresolvable", "", "an $id or $ref is not a URI") from error
        # Every reference back evaluates each remembered schema.
        returns = max(1, len(set(self._returns)) * len(self._returns))
        nodes_per_byte = max(rate) * returns
        if nodes_per_byte > MAX_NODES_PER_BYTE or (self._returns and self._has_unique_items):
            raise ConditionInvalid("too_slow", "")
        checked = CheckedSchema(self._schema, self._nodes * returns, nodes_per_byte)
        checked.engine()
        return checked

    def _check(self, schema: Any, resolver: Any, where: str) -> None:
        """Check dialect, patterns and references of every subschema, used or not."""
        if not isinstance(schema, dict):
            return
        self._checked.add(id(schema))
        resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
        for keyword, allowed in ("$schema", DIALECT), ("$vocabulary", None):
            if schema.get(keyword, allowed) != allowed:
                raise ConditionInvalid("dialect", f"{where}/{keyword}")
        if "$dynamicRef" in schema:
            raise ConditionInvalid("dynamic_ref", f"{where}/$dynamicRef")
        for pattern, place in _patterns(schema):
            _check_pattern(pattern, where + place)
        if schema.get("uniqueItems") is True:
            self._has_unique_items = True
            if not has_scalars(schema):
                raise ConditionInvalid("unique_items", f"{where}/uniqueItems")
        if "$ref" in schema:
            self._look_up(schema["$ref"], resolver, f"{where}/$ref")
        for _, place, subschema in _subschemas(schema):
            self._check(subschema, resolver, where + place)

    def _rate(
        self, schema: Any, resolver: Any, where: str, *, each: int, goes_on: bool, into: int, depth: int
    ) -> tuple[float, float]:
        """Return the nodes that are evaluated for a byte of a value: on itself, and on its parts.

        The larger one is the rate of the subschema, because the bytes of a part are bytes of the value, too.

        Args:
            schema: The subschema.
            resolver: Of its references.
            where: Its place.
            each: The fewest bytes for each value that it is evaluated on.
            goes_on: Whether the evaluation goes on if it fails for a value.
            into: The steps into the value so far.
            depth: Bounds the recursion.
        """
        nodes = _own_nodes(schema)
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ConditionInvalid("expansion", where)
        if depth > MAX_SCHEMA_DEPTH:
            raise ConditionInvalid("too_deep", where)
        if not isinstance(schema, dict):
            return nodes / each, 0
        resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
        own, parts = (
            _own_weight(schema, goes_on=goes_on) / each + _PATTERN_RATE * ("pattern" in schema),
            _nodes_per_byte_of_parts(schema),
        )
        if "$ref" in schema:
            more, below = self._follow(
                schema["$ref"], resolver, f"{where}/$ref", each=each, goes_on=goes_on, into=into, depth=depth
            )
            own, parts = own + more, parts + below
        named = 0.0  # the members that `properties` names are different parts of the value
        for keyword, place, subschema in _subschemas(schema):
            if keyword in _ASIDE:
                continue
            is_below = keyword in _BELOW
            more, below = self._rate(
                subschema,
                resolver,
                where + place,
                each=_bytes_of_part(keyword, place, each),
                goes_on=goes_on or keyword in _GOES_ON,
                into=into + is_below,
                depth=depth + 1,
            )
            if keyword == "properties":
                named = max(named, more, below)
            elif is_below:
                parts += max(more, below)
            else:
                own, parts = own + more, parts + below
        factor = _UNEVALUATED_FACTOR if any(keyword in schema for keyword in UNEVALUATED) else 1
        return own * factor, (parts + named) * factor

    def _follow(
        self, ref: str, resolver: Any, where: str, *, each: int, goes_on: bool, into: int, depth: int
    ) -> tuple[float, float]:
        resolved = self._look_up(ref, resolver, where)
        target = id(resolved.contents)
        if target in self._following:
            if self._following[target] == into:
                raise ConditionInvalid("recursive_ref", where)
            self._returns.append(target)
            self._smallest[target] = min(each, self._smallest.get(target, each))
            return 1 / each, 0
        self._following[target] = into
        goes_on = goes_on or target in self._smallest
        each = min(each, self._smallest.get(target, each))
        try:
            return self._rate(
                resolved.contents, resolved.resolver, where, each=each, goes_on=goes_on, into=into, depth=depth + 1
            )
        finally:
            del self._following[target]

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


def _own_weight(schema: dict[str, Any], *, goes_on: bool) -> int:
    """Return the nodes of the keywords that apply to a value itself."""
    weight = len(schema) + len(schema.get("dependentRequired", ())) + len(schema.get("required", ())) // 4
    if own := own_keywords(schema):
        weight += _CALL_NODES + _FAILURE_NODES * goes_on
    for name in own:
        if name == "enum" or isinstance(schema[name], (list, dict)):
            weight += _EQUALITY_NODES + _containers(schema[name])
        elif name == "multipleOf":
            weight += _STEP_NODES if is_simple_step(schema[name]) else _ODD_STEP_NODES
        else:
            weight += _OTHER_NODES
    return weight


def _own_nodes(schema: Any) -> int:
    if not isinstance(schema, dict):
        return 1
    return 1 + sum(1 if keyword in WITH_SUBSCHEMAS else size(value) for keyword, value in schema.items())


def _nodes_per_byte_of_parts(schema: dict[str, Any]) -> float:
    """Return the nodes for keywords whose time depends on the length of an array or of names."""
    patterns = len(schema.get("patternProperties", ()))
    return _UNIQUE_RATE * (schema.get("uniqueItems") is True) + _PATTERN_RATE * patterns


def _bytes_of_part(keyword: str, place: str, each: int) -> int:
    """Return the fewest bytes for each part that a keyword applies to."""
    if keyword in _EVERY_PART:
        return _EVERY_PART[keyword]
    if keyword == "properties":  # `{"name":1},`
        return each + len(place.rpartition("/")[2].replace("~1", "/").replace("~0", "~")) + 5
    return each


def _check_pattern(pattern: str, where: str) -> None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ConditionInvalid("pattern_too_long", where)
    try:
        _engine({"pattern": pattern})
        if not has_more_states(pattern, MAX_PATTERN_STATES):
            return
    except (ConditionInvalid, PatternUnknown) as error:
        raise ConditionInvalid("pattern_unsupported", where) from error
    raise ConditionInvalid("pattern_unsupported", where)


def _plain_copy(schema: Any) -> Any:
    """Return a checked copy of the schema as plain JSON; raise `ConditionInvalid`."""
    if not isinstance(schema, (dict, bool)):
        raise ConditionInvalid("schema_type", "")
    nodes, level = 1, [("", schema)]
    for depth in range(MAX_SCHEMA_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for where, value in level:
            if isinstance(value, (dict, list)):
                nodes += len(value)  # before collecting them: YAML aliases can repeat one list a million times
                if depth == MAX_SCHEMA_DEPTH:
                    raise ConditionInvalid("too_deep", where)
                if nodes > MAX_NODES:
                    raise ConditionInvalid("expansion", where)
                if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                    raise ConditionInvalid("schema_type", where)
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                below += ((f"{where}/{escaped(key)}", part) for key, part in pairs)
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
        raise ConditionInvalid("schema_invalid", where + pointer(error.absolute_path)) from None


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield keyword, place and subschema; skip the lists of names in `dependencies`."""
    for keyword, value in schema.items():
        if keyword not in WITH_SUBSCHEMAS:
            continue
        if keyword in BY_NAME:
            parts = [(f"/{keyword}/{escaped(name)}", part) for name, part in value.items()]
        elif isinstance(value, list):
            parts = [(f"/{keyword}/{index}", part) for index, part in enumerate(value)]
        else:
            parts = [(f"/{keyword}", value)]
        yield from ((keyword, place, part) for place, part in parts if isinstance(part, (dict, bool)))


def _patterns(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "pattern" in schema:
        yield schema["pattern"], "/pattern"
    for pattern in schema.get("patternProperties", ()):
        yield pattern, f"/patternProperties/{escaped(pattern)}"


def size(value: Any) -> int:
    """Return the number of values in a JSON value."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(size, parts))


def _containers(value: Any) -> int:
    """Return the number of values in the arrays and objects of an `enum` or `const`."""
    return size(value) if isinstance(value, dict) else sum(map(_containers, value)) if isinstance(value, list) else 0


def escaped(token: object) -> str:
    """Return a name as part of a JSON Pointer."""
    return str(token).replace("~", "~0").replace("/", "~1")


def pointer(path: Any) -> str:
    """Return the JSON Pointer of a path of names."""
    return "".join(f"/{escaped(token)}" for token in path)
