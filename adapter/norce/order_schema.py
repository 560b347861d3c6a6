"""Norce's order by its schema: the members and the values that an order of a version has.

The order is read as closed here: a member that the schema does not name is one that no order has, except inside the
maps that Norce leaves open (`attributes`).
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from adapter.norce.api import V0, V1, schema

# The members that one version does not show (checkout protocol, section 2), by the member that holds them.
HIDDEN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    V0: {"validations": ("reference", "description"), "hooks": ("reference", "description")},
    V1: {
        "payments": ("merchant", "channel", "upsell"),
        "shippings": ("merchant", "channel"),
        "notifications": ("delay",),
        "items": ("logistics", "upsell"),
        "discounts": ("reference", "description"),
        "deliveryDetails": ("carrierProductId",),
    },
}
_STATES_OF_V1 = ("cancelled", "refunded")  # of a payment (section 2.5)
# The parts that a hook can watch and change. `/reference` is in no list of Norce's, but its own adapters use it; a hook
# on `/attributes` is not called (section 7).
HOOK_PARTS = ("/state", "/consents", "/customer", "/cart", "/shippings", "/payments", "/reference")

_WORDS = {
    "string": "text",
    "number": "a number",
    "boolean": "true or false",
    "object": "an object",
    "array": "an array",
    "null": "null",
}
_LIKE = 0.6  # two names that are this much alike may be the same name with a typing error


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPart:
    """A part of an order, with what Norce's schema says about it."""

    pointer: str  # for people: the items of an array are written []
    name: str  # of the member that holds it; the items of an array have the array's
    version: str
    rules: Mapping[str, Any]  # keywords of the schema, without a reference
    document: str  # that references in `rules` belong to

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of JSON that an order has here; an integer is a number. Empty if any."""
        given = self.rules.get("type", ())
        if not given and self.values is not None:
            return frozenset(map(kind_of, self.values))
        return frozenset({"number" if kind == "integer" else kind for kind in _listed(given)})

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values that an order has here, or None if there are too many."""
        if (given := self.rules.get("enum")) is not None:
            is_state = self.version == V0 and self.name == "state" and self.pointer.startswith("/payments/")
            return tuple(value for value in given if not (is_state and value in _STATES_OF_V1))
        kinds = _listed(self.rules.get("type", ()))
        if kinds and set(kinds) <= {"boolean", "null"}:
            return (True, False, *([None] if "null" in kinds else []))
        return None

    @property
    def members(self) -> Mapping[str, "OrderPart"]:
        """The members of an object; empty if it is none, or if Norce leaves it open."""
        hidden = HIDDEN[self.version].get(self.name, ())
        return {
            name: self._part(f"{self.pointer}/{name}", name, rules)
            for name, rules in self.rules.get("properties", {}).items()
            if name not in hidden
        }

    @property
    def items(self) -> "OrderPart | None":
        """The items of an array; None if it is none, or if Norce leaves them open."""
        given = self.rules.get("items")
        return None if given is None else self._part(f"{self.pointer}/[]", self.name, given)

    @property
    def is_open(self) -> bool:
        """True if Norce leaves open what is here."""
        return not self.kinds or ("object" in self.kinds and not self.members)

    def fits(self, value: Any) -> bool:
        """Return False if no order has this value here.

        Null fits everywhere, because some adapters write it.
        """
        kind = kind_of(value)
        if kind == "null" or not self.kinds:
            return True
        if kind not in self.kinds or (self.values is not None and value not in self.values):
            return False
        if kind == "number" and "number" not in _listed(self.rules.get("type", ())) and value != int(value):
            return False
        if kind == "string":
            return re.search(self.rules.get("pattern", ""), value) is not None
        if kind == "array":
            items = self.items
            return items is None or all(items.fits(item) for item in value)
        members = self.members if kind == "object" else {}
        return all(part.fits(value[name]) for name, part in members.items() if name in value)

    def describe(self) -> str:
        """Return the kind of the values here in words, such as "text"."""
        kinds = [_WORDS[kind] for kind in _WORDS if kind in self.kinds - {"null"}]
        return " or ".join(kinds)

    def descendants(self) -> Iterator["OrderPart"]:
        """Yield the parts below that a JSON Pointer can reach: those outside arrays."""
        for part in self.members.values():
            yield part
            yield from part.descendants()

    def _part(self, pointer: str, name: str, rules: Mapping[str, Any]) -> "OrderPart":
        document = self.document
        while "$ref" in rules:
            target, _, place = rules["$ref"].partition("#/$defs/")
            document = target.removesuffix(".json") or document
            found = schema("order")["$defs"][document]
            rules = (found["$defs"][place] if place else found) | {
                key: value for key, value in rules.items() if key != "$ref"
            }
        return OrderPart(pointer=pointer, name=name, version=self.version, rules=rules, document=document)


@cache
def order(version: str) -> OrderPart:
    """Return the whole order of a version of the Order API."""
    return OrderPart(pointer="", name="", version=version, rules=schema("order")["$defs"]["order"], document="order")


class NoSuchPart(LookupError):
    """A pointer to a part that no order has. The message says why, and what may be meant."""


class InArray(NoSuchPart):
    """A pointer into an array, which neither conditions nor registrations support."""


def part_at(tokens: tuple[str, ...], version: str) -> OrderPart | None:
    """Return the part of an order at a pointer, or None if Norce leaves open what is there.

    Raises:
        NoSuchPart: No order has it.
    """
    part = order(version)
    for token in tokens:
        if part.is_open:
            return None
        if "array" in part.kinds:
            raise InArray(f"points into the array {part.pointer}")
        if token not in part.members:
            raise NoSuchPart(f"is in no order of Norce ({version}){_suggestion(tokens, token, version)}")
        part = part.members[token]
    return None if part.is_open else part


def _suggestion(tokens: tuple[str, ...], token: str, version: str) -> str:
    given = f"/{'/'.join(tokens)}".casefold()

    def likeness(pointer: str) -> float:
        pointer = pointer.casefold()
        return max(_ratio(given, pointer), _ratio(token.casefold(), pointer.rpartition("/")[2]))

    found = sorted(((likeness(part.pointer), part.pointer) for part in order(version).descendants()), reverse=True)
    near = [pointer for ratio, pointer in found[:2] if ratio >= max(_LIKE, found[0][0] - 0.1)]
    return f"; did you mean {' or '.join(near)}?" if near else "; data of your own is in /attributes"


def nearest(text: str, names: Mapping[str, Any] | tuple[Any, ...]) -> str | None:
    """Return the name that is most like a text, if one is."""
    known = {name.casefold(): name for name in names if isinstance(name, str)}
    near = difflib.get_close_matches(text.casefold(), known, n=1, cutoff=_LIKE)
    return known[near[0]] if near else None


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value; an integer is a number."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def _listed(types: Any) -> tuple[str, ...]:
    return (types,) if isinstance(types, str) else tuple(types)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
