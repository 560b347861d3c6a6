"""Comparison of a schema with a part of Norce's order. It finds what no order has.

A finding that says `never` is certain: no order that fits Norce's schema meets the condition. The comparison follows
the keywords that every value has to meet. Below the others (`not`, `if`, and one branch of an `anyOf`) it reports
nothing that a value could still meet.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from adapter.conditions import CompiledCondition, Condition, ConditionInvalid, Result
from adapter.norce.order_schema import OrderPart, kind_of, nearest

_MAX_DEPTH = 40  # of a schema after `$ref` expansion; what is deeper is not compared

Where = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A place in a schema that no order can meet."""

    where: Where  # in the schema
    message: str
    never: bool  # the whole schema can never hold; otherwise only this place cannot


def compare(schema: Any, part: OrderPart) -> list[Finding]:
    """Compare a schema with the part of the order that it is for."""
    return list(_Comparison(schema).findings(schema, part, (), 0))


def have_common_value(condition: CompiledCondition, others: list[CompiledCondition], part: OrderPart) -> bool:
    """Return False if no value of the part meets a condition together with the others.

    Conditions on the same part count, and so does what conditions on parts around it say about it. Returns True if the
    condition does not limit the part to values that can be tried one by one.
    """
    values = [value for value in _candidates(condition.schema, part) or () if _accepts(condition.schema, value)]
    if not values:
        return True
    for other in others:
        for schema in _schemas_for(other, condition.tokens):
            values = [value for value in values if _accepts(schema, value)]
    return bool(values)


class _Comparison:
    def __init__(self, root: Any) -> None:
        self._root = root

    def findings(self, schema: Any, part: OrderPart, at: Where, depth: int) -> Iterator[Finding]:
        if schema is False:
            yield Finding(where=at, message="false allows no value", never=True)
        if not isinstance(schema, dict) or depth > _MAX_DEPTH or part.is_open:
            return
        found = [*self._values(schema, part, at), *self._parts(schema, part, at, depth)]
        yield from found
        if any(each.never for each in found) or (values := part.values) is None:
            return
        if not any(_accepts(schema, value, unsure=self._root is not schema) for value in values):
            message = f"no value that an order has at {part.pointer} fits: {_in_words(values)}"
            yield Finding(where=at, message=message, never=True)

    def _values(self, schema: dict[str, Any], part: OrderPart, at: Where) -> Iterator[Finding]:
        if "const" in schema and not part.fits(schema["const"]):
            yield Finding(where=(*at, "const"), message=_unfit(part, schema["const"]), never=True)
        wrong = [index for index, value in enumerate(schema.get("enum", ())) if not part.fits(value)]
        for index in wrong:
            message = _unfit(part, schema["enum"][index])
            yield Finding(where=(*at, "enum", index), message=message, never=len(wrong) == len(schema["enum"]))
        types = schema.get("type", ())
        kinds = {"number" if kind == "integer" else kind for kind in ([types] if isinstance(types, str) else types)}
        if kinds and "null" not in kinds and kinds.isdisjoint(part.kinds):
            yield Finding(where=(*at, "type"), message=f"{part.pointer} is {part.describe()}", never=True)

    def _parts(self, schema: dict[str, Any], part: OrderPart, at: Where, depth: int) -> Iterator[Finding]:
        depth += 1
        if isinstance(reference := schema.get("$ref"), str):
            target = _resolved(self._root, reference)
            yield from self.findings(target, part, (*at, "$ref"), depth)
        for index, branch in enumerate(schema.get("allOf", ())):
            yield from self.findings(branch, part, (*at, "allOf", index), depth)
        for keyword in ("anyOf", "oneOf"):
            branches = [
                [each for each in self.findings(branch, part, (*at, keyword, index), depth) if each.never]
                for index, branch in enumerate(schema.get(keyword, ()))
            ]
            if branches and all(branches):
                yield branches[0][0]
        if part.members:
            yield from self._members(schema, part, at, depth)
        items = part.items
        if items is not None:
            for each in self.findings(schema.get("items"), items, (*at, "items"), depth):
                yield replace(each, never=False)  # an array may be empty
            has_some = _is_forced(schema, part, "array") and schema.get("minContains", 1) > 0
            for each in self.findings(schema.get("contains"), items, (*at, "contains"), depth):
                yield replace(each, never=each.never and has_some)

    def _members(self, schema: dict[str, Any], part: OrderPart, at: Where, depth: int) -> Iterator[Finding]:
        is_object = _is_forced(schema, part, "object")
        required = schema.get("required", ())
        for name in required:
            if name not in part.members:
                message = f"requires a member that no order has at {part.pointer}{_meant(name, part)}"
                yield Finding(where=(*at, "required"), message=message, never=is_object)
        for name, below in schema.get("properties", {}).items():
            where = (*at, "properties", name)
            if name in part.members:
                for each in self.findings(below, part.members[name], where, depth):
                    yield replace(each, never=each.never and is_object and name in required)
            elif name not in required and nearest(name, part.members):
                message = f"no order has this member at {part.pointer}{_meant(name, part)}"
                yield Finding(where=where, message=message, never=False)


def _is_forced(schema: dict[str, Any], part: OrderPart, kind: str) -> bool:
    """Return True if only values of a kind meet a schema.

    Null, for example, would meet `required` and `contains`.
    """
    return part.kinds == {kind} or schema.get("type") == kind


def _unfit(part: OrderPart, value: Any) -> str:
    """Return why a value does not fit a part, and a remedy.

    The value itself is not shown, because it may be a secret.
    """
    if kind_of(value) not in part.kinds:
        below = [each for each in part.descendants() if isinstance(value, str) and "string" in each.kinds]
        meant = [each.pointer for each in below if each.values is not None and nearest(value, each.values)]
        remedy = f"; use {' or '.join(meant)}" if meant else f" with {', '.join(part.members)}" if part.members else ""
        return f"no order has this value: {part.pointer} is {part.describe()}{remedy}"
    if part.values is not None:
        near = nearest(value, part.values) if isinstance(value, str) else None
        remedy = f"; did you mean {near}?" if near else f": it is {_in_words(part.values)}"
        return f"no order has this value at {part.pointer}{remedy}"
    pattern = part.rules.get("pattern") if isinstance(value, str) else None
    return f"no order has this value at {part.pointer}" + (f", which matches {pattern}" if pattern else "")


def _meant(name: str, part: OrderPart) -> str:
    near = nearest(name, part.members)
    return f"; did you mean {near}?" if near else f": its members are {', '.join(part.members)}"


def _in_words(values: tuple[Any, ...]) -> str:
    texts = [json.dumps(value) if not isinstance(value, str) else value for value in values]
    return f"{', '.join(texts[:-1])} or {texts[-1]}"


def _resolved(root: Any, reference: str) -> Any:
    """Return the schema at a reference within the document, or True."""
    if not reference.startswith("#") or not isinstance(root, dict) or "$id" in root:
        return True
    for token in reference.removeprefix("#").split("/")[1:]:
        token = token.replace("~1", "/").replace("~0", "~")
        if not isinstance(root, dict) or token not in root:
            return True  # an anchor, an array or a percent-encoded name
        root = root[token]
    return root


def _candidates(schema: Any, part: OrderPart) -> tuple[Any, ...] | None:
    """Return all values that may meet a schema at a part, or None if they are too many."""
    given = schema if isinstance(schema, dict) else {}
    listed = [given["const"]] if "const" in given else given.get("enum")
    return part.values if listed is None else tuple(value for value in listed if part.fits(value))


def _accepts(schema: Any, value: Any, *, unsure: bool = True) -> bool:
    """Return whether a value meets a schema.

    With `unsure`, True if the schema has references, which may lead outside it.
    """
    if unsure and '"$ref"' in json.dumps(schema):
        return True
    try:
        return Condition("/value", schema).compile().evaluate({"value": value}).result is not Result.NOT_MATCHED
    except ConditionInvalid:
        return True


def _schemas_for(condition: CompiledCondition, tokens: tuple[str, ...]) -> Iterator[Any]:
    """Yield the schemas that a condition has for the value at a pointer."""
    size = len(condition.tokens)
    if tokens[:size] == condition.tokens:
        yield from _schemas_at(tokens[size:], condition.schema)


def _schemas_at(tokens: tuple[str, ...], schema: Any) -> Iterator[Any]:
    if not tokens:
        yield schema
    elif isinstance(schema, dict):
        yield from (found for branch in schema.get("allOf", ()) for found in _schemas_at(tokens, branch))
        yield from _schemas_at(tokens[1:], schema.get("properties", {}).get(tokens[0], True))
