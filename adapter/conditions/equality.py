"""The keywords `const`, `enum` and `uniqueItems` in place of the engine's own.

The engine compares numbers as texts: an enum of 100 numbers took 131 us for each part of a value, and uniqueItems 7 s
for 4000 integers beyond 64 bits. Here, integers of any size are compared exactly, and fast. Any exception in
`validate` means to the engine that the value is not valid.
"""

from typing import Any

from adapter.orders import canonical

_BIG = 2**63
_EXACT = 2**53  # the integers of a double
_DATA = frozenset(("const", "enum", "default", "examples"))  # keywords whose values are no schemas


class _Enum:
    """The keyword `enum`. The number of its scalars does not matter."""

    def __init__(self, _parent: Any, values: list[Any], _path: Any) -> None:
        self._scalars = {_equality_key(value) for value in values if not isinstance(value, (list, dict))}
        self._others = [value for value in values if isinstance(value, (list, dict))]

    def validate(self, value: Any) -> None:
        if isinstance(value, (list, dict)):
            is_one = any(_equal(value, other) for other in self._others)
        else:
            is_one = _equality_key(value) in self._scalars
        if not is_one:
            raise ValueError


class _Const(_Enum):
    """The keyword `const`."""

    def __init__(self, parent: Any, value: Any, path: Any) -> None:
        super().__init__(parent, [value], path)


class _UniqueItems:
    """The keyword `uniqueItems`."""

    def __init__(self, _parent: Any, is_wanted: bool, _path: Any) -> None:
        self._is_wanted = is_wanted

    def validate(self, value: Any) -> None:
        if not self._is_wanted or not isinstance(value, list) or len(value) < 2:
            return
        seen = set()
        for key in map(_equality_key, value):
            if key in seen:
                raise ValueError
            seen.add(key)


def _equality_key(value: Any) -> Any:
    """Return a hashable value that is equal for equal JSON: 1 is 1.0, and true is not 1."""
    kind = type(value)
    # Beyond 64 bits, a sender could choose many integers with one hash.
    if kind is str or ((kind is int or kind is float) and -_BIG < value < _BIG):
        return value
    return canonical(value)


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


def with_ranges(schema: Any) -> Any:
    """Return a schema with a range in place of each `const` that is an integer.

    The engine evaluates a range faster.
    """
    if isinstance(schema, list):
        return [with_ranges(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: part if name in _DATA else with_ranges(part) for name, part in schema.items()}
    value: Any = copy.get("const")
    if is_integer(value):
        del copy["const"]
        copy["allOf"] = [*copy.get("allOf", ()), {"type": "number", "minimum": int(value), "maximum": int(value)}]
    return copy


def is_integer(value: Any) -> bool:
    """Return True if a value is an integer that the engine compares fast."""
    return type(value) in (int, float) and -_EXACT <= value <= _EXACT and value == int(value)


def is_near(limit: float) -> bool:
    """Return True if a limit is one that the engine compares fast."""
    return -_BIG <= limit <= _BIG


KEYWORDS = {"const": _Const, "enum": _Enum, "uniqueItems": _UniqueItems}
