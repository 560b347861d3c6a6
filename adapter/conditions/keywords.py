"""The keywords for numbers and for equality, in place of the engine's own.

The engine compares numbers as texts: a MiB of `1e99` took 240 ms for one limit, an enum of 100 numbers 131 us for each
part of a value, and `uniqueItems` 7 s for 4000 integers beyond 64 bits. Here, numbers of any size are compared exactly,
and fast. Calling Python from the engine takes 0.3 us, so all keywords of a schema are checked in one call.

Any exception in `validate` means to the engine that the value is not valid.
"""

import math
from collections.abc import Callable, Iterator
from decimal import Context, Decimal
from typing import Any

OWN = "norce-adapter"  # the name of the keyword that holds the others
_RANGE = ("minimum", "maximum")
_NUMERIC = (*_RANGE, "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_BIG = 2**63
_EXACT = 1e15  # a double holds all decimals of 15 digits
_DECIMALS = 17  # at most, of a double that is at least 1
_CONTEXT = Context(prec=700)  # for the quotient of any two doubles
_DATA = frozenset(("const", "enum", "default", "examples"))  # keywords whose values are no schemas

_Holds = Callable[[Any], bool]


class OwnKeywords:
    """The keyword that checks several others in one call."""

    def __init__(self, _parent: Any, keywords: dict[str, Any], _path: Any) -> None:
        self._numeric = tuple(_numeric_checks(keywords))
        self._others = tuple(_other_checks(keywords))
        values = keywords.get("enum", [keywords.get("const")])
        if keywords.keys() in ({"const"}, {"enum"}) and _can_be_looked_up(values):
            # A failure is a `KeyError` or `TypeError`, and takes half the time of one that Python code raises.
            self.validate: Callable[[Any], object] = dict.fromkeys(values).__getitem__
        else:
            self.validate = self._validate

    def _validate(self, value: Any) -> None:
        if self._numeric and ((kind := type(value)) is int or kind is float):
            for holds in self._numeric:
                if not holds(value):
                    raise ValueError
        for holds in self._others:
            if not holds(value):
                raise ValueError


def with_own_keywords(schema: Any) -> Any:
    """Return a schema whose keywords for numbers and equality are checked here."""
    if isinstance(schema, list):
        return [with_own_keywords(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: part if name in _DATA else with_own_keywords(part) for name, part in schema.items()}
    if own := {name: copy.pop(name) for name in own_keywords(schema)}:
        copy[OWN] = own
    return copy


def own_keywords(schema: dict[str, Any]) -> list[str]:
    """Return the keywords of a schema, without those in its subschemas, that are checked here."""
    names = [name for name in _NUMERIC if name in schema]
    names += [
        name
        for name, values in (("const", [schema.get("const")]), ("enum", schema.get("enum")))
        if name in schema and not all(isinstance(value, (str, bool)) or value is None for value in values or ())
    ]
    return names + ["uniqueItems"] * (schema.get("uniqueItems") is True)


def is_simple_step(step: float) -> bool:
    """Return True if every integer is a multiple of a step, such as 0.01 or 0.25."""
    return isinstance(step, int) or _CONTEXT.remainder(Decimal(1), Decimal(repr(step))) == 0


def has_scalars(schema: dict[str, Any]) -> bool:
    """Return True if a schema refuses all objects and arrays in an array."""
    items = schema.get("items")
    kinds = items.get("type", "object") if isinstance(items, dict) and "prefixItems" not in schema else "object"
    return {"object", "array"}.isdisjoint([kinds] if isinstance(kinds, str) else kinds)


def _numeric_checks(keywords: dict[str, Any]) -> Iterator[_Holds]:
    if not keywords.keys().isdisjoint(_RANGE):
        low, high = keywords.get("minimum", -math.inf), keywords.get("maximum", math.inf)
        yield lambda value: low <= value <= high
    if "exclusiveMinimum" in keywords:
        above = keywords["exclusiveMinimum"]
        yield lambda value: value > above
    if "exclusiveMaximum" in keywords:
        below = keywords["exclusiveMaximum"]
        yield lambda value: value < below
    if "multipleOf" in keywords:
        yield _multiple_check(keywords["multipleOf"])


def _other_checks(keywords: dict[str, Any]) -> Iterator[_Holds]:
    if "const" in keywords:
        yield _is_one_of([keywords["const"]])
    if "enum" in keywords:
        yield _is_one_of(keywords["enum"])
    if "uniqueItems" in keywords:
        yield _has_unique_items


def _multiple_check(step: int | float) -> _Holds:
    """Return the check of `multipleOf`.

    Numbers are taken as they are written: 19.99 is a multiple of 0.01. Beyond 10^15, a fraction is taken as the exact
    double for a step that is an integer.
    """
    exact = Decimal(repr(step))
    exponent = exact.normalize(_CONTEXT).as_tuple().exponent
    assert isinstance(exponent, int)
    scale = 10 ** max(-exponent, 0)
    steps = step if isinstance(step, int) else int(_CONTEXT.multiply(exact, scale))
    takes_integers = scale > 1 and is_simple_step(step)
    whole = steps * 10**_DECIMALS

    def is_multiple(value: int | float) -> bool:
        if isinstance(value, int):
            return takes_integers or bool(value * scale % steps == 0)
        if value.is_integer() and (takes_integers or scale == 1):
            return takes_integers or int(value) % steps == 0
        if scale < _EXACT and -_EXACT < value * scale < _EXACT:
            number = round(value * scale)
            return bool(number / scale == value and number % steps == 0)
        if takes_integers and 1 <= abs(value) < math.inf:  # only the decimals matter, and there is no exponent
            decimals = int(repr(value).partition(".")[2].ljust(_DECIMALS, "0"))
            return bool(decimals * scale % whole == 0)
        return bool(_CONTEXT.remainder(Decimal(repr(value)), exact) == 0)

    return is_multiple


def _can_be_looked_up(values: list[Any]) -> bool:
    """Return True if a dictionary compares these values as JSON does: true is not 1."""
    return not any(isinstance(value, (list, dict)) or value in (0, 1) for value in values)


def _is_one_of(values: list[Any]) -> _Holds:
    """Return the check of `enum`. The number of its scalars does not matter."""
    scalars = {_key(value) for value in values if not isinstance(value, (list, dict))}
    others = [value for value in values if isinstance(value, (list, dict))]

    def is_one_of(value: Any) -> bool:
        kind = type(value)
        if kind is list or kind is dict:
            return any(_equal(value, other) for other in others)
        return (value if kind is not bool else (value,)) in scalars

    return is_one_of


def _key(scalar: Any) -> Any:
    """Return a key that is equal for equal scalars: 1 is 1.0, and true is not 1."""
    return (scalar,) if isinstance(scalar, bool) else scalar


def _has_unique_items(value: Any) -> bool:
    """Check `uniqueItems` of scalars; `items` refuses an array with others.

    A MiB holds at most 160 000 different scalars.
    """
    if type(value) is not list:
        return True
    seen: set[Any] = set()
    large: dict[str, int] = {}  # by their texts, because a sender could choose many integers with one hash
    for item in value:
        kind = type(item)
        if kind is int and not -_BIG < item < _BIG:
            key: Any = hex(item)
            if key in large:
                return False
            large[key] = item
        elif kind is list or kind is dict:
            return True
        else:
            key = (item,) if kind is bool else item
            if key in seen:
                return False
            seen.add(key)
    return seen.isdisjoint(large.values())  # of fractions such as 1e20


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return False
        return all(_equal(part, other[name]) for name, part in one.items())
    if isinstance(one, list):
        if not isinstance(other, list) or len(one) != len(other):
            return False
        return all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
