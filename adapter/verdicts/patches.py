"""Merges the patches of a hook's routes into one JSON Patch (RFC 6902).

Pure; the order is never changed. All routes saw the same order, so each list is applied to a copy of that order, not to
the result of the lists before it. What counts is the value that a list wants at each place. Two lists contradict each
other if they want different values. A value that the order already has is not sent, but it counts as wanted: otherwise
two routes could undo each other's changes in turn, for ever.

Adding or removing an element of an array moves the others. So the place of such a change is the whole array, and the
answer replaces the whole array: a position means something else after another route's change, and Norce does not
document how it treats positions.
"""

import math
from collections.abc import Sequence
from copy import copy
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

import msgspec
from jsonpatch import AddOperation, JsonPatchException, RemoveOperation, ReplaceOperation
from jsonpointer import JsonPointer, JsonPointerException

from adapter.conditions import MISSING
from adapter.plugin import Patch

MAX_DEPTH = 64  # of a value
Place: TypeAlias = tuple[str, ...]  # the unescaped names of a pointer

_OPERATIONS = {"add": AddOperation, "replace": ReplaceOperation, "remove": RemoveOperation}
_REMEDIES = {
    "outside-target": "it is not inside the hook's target, or the callback has none; to add or remove an element of an "
    "array, the target must hold the whole array",
    "does-not-apply": "its place does not exist; replace needs the member itself, add the object or array around it",
    "contradicts": "an earlier route wants another value here",
    "not-json": f"a value must be plain JSON or a finite Decimal, at most {MAX_DEPTH} levels deep, with valid Unicode",
}


class Merged(NamedTuple):
    """The patches to send, to be applied in their order, and what became of each list.

    A list is left out for an error. Of any other list, `added` says whether a patch to send comes from it.
    """

    patches: list[Patch]
    errors: list["PatchInvalid | None"]
    added: list[bool]


class PatchInvalid(Exception):
    """The patches of a route cannot be used, so its whole list is left out.

    Correct the handler, the callback's `target`, or the order of the routes. `reason` is in kebab-case, `path` is the
    pointer; neither contains a value.
    """

    def __init__(self, reason: str, path: str) -> None:
        super().__init__(f"the patch of {path} cannot be used: {reason}: {_REMEDIES[reason]}")
        self.reason = reason
        self.path = path


def merge(order: Any, asked: Sequence[Sequence[Patch]], target: str | None) -> Merged:
    """Merge the patches of several routes.

    Left out is what the order already has: a value that is equal (as JSON: 1 is 1.0, and not true), and the removal of
    an absent member.

    Args:
        asked: One list of patches for each route.
        target: The pointer that all patches must be inside; with None no patch is allowed.
    """
    if not any(asked):
        return Merged([], [None] * len(asked), [False] * len(asked))
    inside = None if target is None else tuple(JsonPointer(target).parts)
    tree, answer = _Tree(order), list[Patch]()
    accepted: list[_Changes] = []
    errors: list[PatchInvalid | None] = []
    added: list[bool] = []
    for patches in asked:
        try:
            changes = _Changes(order, patches, inside)
            for earlier in accepted:
                changes.check_agrees(earlier)
        except PatchInvalid as error:
            errors.append(error)
            added.append(False)
            continue
        errors.append(None)
        accepted.append(changes)
        unmet = changes.unmet(tree.value)
        added.append(bool(unmet))
        for patch in unmet:
            answer.append(patch)
            tree.apply(patch)
    return Merged(answer, errors, added)


def encode(patches: Sequence[Patch]) -> bytes:
    """Encode patches as Norce expects them. Raises `PatchInvalid` if a value is not JSON."""
    return _ENCODER.encode([_operation(patch) for patch in patches])


class _Changes:
    """The outermost places that one list of patches sets, on its own copy of the order."""

    def __init__(self, order: Any, patches: Sequence[Patch], inside: Place | None) -> None:
        tree = _Tree(order)
        self.places: dict[Place, Patch | None] = {}  # its patch, if that is the only one of its place
        self._within: dict[Place, list[Place]] = {}  # place -> the places inside it, some of which may be gone
        for patch in patches:
            place = tuple(JsonPointer(patch.path).parts)
            is_absent = patch.op == "remove" and _value_at(tree.value, place) is MISSING
            moves_elements = (
                not is_absent and patch.op != "replace" and isinstance(_value_at(tree.value, place[:-1]), list)
            )
            if moves_elements:
                place = place[:-1]
            if inside is None or place[: len(inside)] != inside:
                raise PatchInvalid("outside-target", patch.path)
            if not is_absent:
                tree.apply(patch)
            self._add(place, None if moves_elements else patch)
        self.tree = tree.value

    def _add(self, place: Place, patch: Patch | None) -> None:
        outer, inner = self._related(place)
        if outer:
            self.places[outer[0]] = None
            return
        for each in inner:
            del self.places[each]
        self._within.pop(place, None)
        self.places[place] = None if inner else patch
        for end in range(len(place)):
            self._within.setdefault(place[:end], []).append(place)

    def _related(self, place: Place) -> tuple[list[Place], list[Place]]:
        """Return the places that are or hold this one, and those inside it."""
        outer = [place[:end] for end in range(len(place) + 1) if place[:end] in self.places]
        return outer, [each for each in self._within.get(place, ()) if each in self.places]

    def check_agrees(self, earlier: "_Changes") -> None:
        """Raise `PatchInvalid` if the two want different values."""
        equal: dict[Place, bool] = {}  # compared once for all places inside
        for place in self.places:
            outer, inner = earlier._related(place)
            if not all(_agree(self.tree, place, earlier.tree, each, equal) for each in outer + inner):
                raise PatchInvalid("contradicts", _pointer(place))

    def unmet(self, tree: Any) -> list[Patch]:
        """Return the patches that `tree` still lacks."""
        patches = []
        for place, patch in self.places.items():
            wanted, there = _value_at(self.tree, place), _value_at(tree, place)
            if _equal(wanted, there):
                continue
            if patch is None:
                path = _pointer(place)
                if wanted is MISSING:
                    patch = Patch.remove(path)
                else:
                    patch = Patch.add(path, wanted) if there is MISSING else Patch.replace(path, wanted)
            patches.append(patch)
        return patches


class _Tree:
    """A tree to which patches are applied.

    It shares all unchanged parts with the order, and copies each changed part once.
    """

    def __init__(self, order: Any) -> None:
        self.value = order
        self._copies: dict[int, Any] = {}  # by their id

    def apply(self, patch: Patch) -> None:
        operation = _operation(patch)
        parts = JsonPointer(patch.path).parts
        self.value = node = self._copied(self.value)
        try:
            for part in parts[:-1]:
                key = JsonPointer.get_part(node, part)
                node[key] = node = self._copied(node[key])
            _OPERATIONS[patch.op](operation).apply(self.value)
        except (JsonPatchException, JsonPointerException, KeyError, IndexError, TypeError) as error:
            raise PatchInvalid("does-not-apply", patch.path) from error

    def _copied(self, part: Any) -> Any:
        if id(part) in self._copies:
            return part
        copied = copy(part)
        self._copies[id(copied)] = copied
        return copied


def _operation(patch: Patch) -> dict[str, Any]:
    try:
        patch.path.encode()
        operation = {"op": patch.op, "path": patch.path}
        return operation if patch.op == "remove" else operation | {"value": _copied(patch.value, MAX_DEPTH)}
    except (ValueError, OverflowError) as error:
        raise PatchInvalid("not-json", patch.path) from error


def _copied(value: Any, depth: int) -> Any:
    """Return a copy of a JSON value, in which a `Decimal` stays one.

    Raises:
        ValueError, OverflowError: The value is not JSON.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        value.encode()
        return value
    if kind in (int, float, Decimal) and math.isfinite(float(value)):
        return value
    if depth == 0:
        raise ValueError
    if kind is dict and all(type(name) is str and name.encode() is not None for name in value):
        return {name: _copied(part, depth - 1) for name, part in value.items()}
    if kind in (list, tuple):
        return [_copied(part, depth - 1) for part in value]
    raise ValueError


def _value_at(tree: Any, place: Place) -> Any:
    try:
        for part in place:
            tree = tree[JsonPointer.get_part(tree, part)]
    except (JsonPointerException, KeyError, IndexError, TypeError):
        return MISSING
    return tree


def _agree(one: Any, its: Place, other: Any, others: Place, equal: dict[Place, bool]) -> bool:
    """Return True if two trees agree where one of two places holds the other.

    `equal` remembers the places whose values have been compared.
    """
    length = min(len(its), len(others))
    place = its[:length]
    one, other = _value_at(one, place), _value_at(other, place)
    if place not in equal:
        equal[place] = _equal(one, other)
    if equal[place]:
        return True
    inner = (its + others[len(its) :])[length:]
    for part in inner:
        if isinstance(one, list) or isinstance(other, list):
            return False  # a position may hold another element by now
        one = one.get(part, MISSING) if isinstance(one, dict) else MISSING
        other = other.get(part, MISSING) if isinstance(other, dict) else MISSING
    return bool(inner) and _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    """Compare two JSON values, without recursion because an order may be deep."""
    pairs = [(one, other)]
    while pairs:
        one, other = pairs.pop()
        if one is other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            pairs += [(part, other[name]) for name, part in one.items()]
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif isinstance(one, bool) or isinstance(other, bool) or _as_number(one) != _as_number(other):
            return False
    return True


def _as_number(scalar: Any) -> Any:
    """Return a number as Norce will send it back: the Decimal 987.20 as the float 987.2."""
    return msgspec.json.decode(str(scalar)) if isinstance(scalar, Decimal) else scalar


def _pointer(place: Place) -> str:
    return str(JsonPointer.from_parts(place).path)


_ENCODER = msgspec.json.Encoder(decimal_format="number")
