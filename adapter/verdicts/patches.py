"""
What a hook answers: the patches that its routes ask for, checked on a copy of the order and made into one JSON Patch
(RFC 6902). Pure; the order is never changed.

Every route has seen the same order, so each list is applied to that order, not to what the lists before it make of it.
What counts is then what a list asks *for*: the value at each place that it sets. Two lists contradict each other where
they ask for different values, and what holds already is not answered, whichever list made it so. A wish that holds
already is still a wish: otherwise two routes could undo each other's changes in turn, for ever.

What one would get wrong are arrays. Inserting and removing moves the other elements, so the place of such a change is
the whole array, and it is the whole array that is answered: positions in it mean nothing after another route's change,
and Norce does not say how it treats them.
"""

import math
from collections.abc import Sequence
from copy import copy
from decimal import Decimal
from typing import Any, TypeAlias

import msgspec
from jsonpatch import AddOperation, JsonPatchException, RemoveOperation, ReplaceOperation
from jsonpointer import JsonPointer, JsonPointerException

from adapter.conditions import MAX_DEPTH, MISSING
from adapter.plugin import Patch

Place: TypeAlias = tuple[str, ...]  # the names of a pointer, unescaped

_OPERATIONS = {"add": AddOperation, "replace": ReplaceOperation, "remove": RemoveOperation}
_REMEDIES = {
    "outside-target": "it is not inside the hook's target, or the callback has none; an element of an array is moved "
    "only from a target that holds the whole array",
    "does-not-apply": "there is nothing to set; replace needs the member itself, add the object or array around it",
    "contradicts": "a route before this one asks for another value here; only one of them can have its way",
    "not-json": f"a value is plain JSON or a finite Decimal, at most {MAX_DEPTH} levels deep, with valid Unicode",
}


class PatchInvalid(Exception):
    """
    A route's patches cannot be answered, none of its list: mend the handler, the callback's `target`, or the order of
    the routes. `reason` is kebab-case, `path` the pointer; neither tells a value.
    """

    def __init__(self, reason: str, path: str) -> None:
        super().__init__(f"the patch of {path} cannot be answered: {reason}: {_REMEDIES[reason]}")
        self.reason = reason
        self.path = path


def merge(
    order: Any, asked: Sequence[Sequence[Patch]], target: str | None
) -> tuple[list[Patch], list[PatchInvalid | None]]:
    """
    The patches to answer, which apply in their order, and for each list of `asked` None, or why all of it is left out.

    Inside `target` only; where it is None nothing may be patched. What is already as wanted is not answered: a value
    that equals the one in the order (as JSON: 1 is 1.0 and not true), and `remove` of what is not there.
    """
    if not any(asked):
        return [], [None] * len(asked)
    confines = None if target is None else tuple(JsonPointer(target).parts)
    tree, answer = order, list[Patch]()
    accepted: list[_Wishes] = []
    refused: list[PatchInvalid | None] = []
    for patches in asked:
        try:
            wishes = _Wishes(order, patches, confines)
            for earlier in accepted:
                wishes.check_agrees(earlier)
        except PatchInvalid as error:
            refused.append(error)
            continue
        refused.append(None)
        accepted.append(wishes)
        for patch in wishes.unmet(tree):
            answer.append(patch)
            tree = _applied(tree, patch)
    return answer, refused


def encode(patches: Sequence[Patch]) -> bytes:
    """The JSON array that Norce takes; `Decimal` becomes a number. Raises `PatchInvalid` on what is not JSON."""
    return _ENCODER.encode([_operation(patch) for patch in patches])


class _Wishes:
    """What one list asks for: the outermost places that it sets, on its own copy of the order."""

    def __init__(self, order: Any, patches: Sequence[Patch], confines: Place | None) -> None:
        self.tree = order
        self.places: dict[Place, Patch | None] = {}  # with the patch itself where it is the only one for its place
        self._above: set[Place] = set()  # what holds one of them
        for patch in patches:
            place = tuple(JsonPointer(patch.path).parts)
            gone = patch.op == "remove" and _at(self.tree, place) is MISSING
            moves = not gone and patch.op != "replace" and isinstance(_at(self.tree, place[:-1]), list)
            if moves:
                place = place[:-1]
            if confines is None or place[: len(confines)] != confines:
                raise PatchInvalid("outside-target", patch.path)
            if not gone:
                self.tree = _applied(self.tree, patch)
            self._add(place, None if moves else patch)

    def _add(self, place: Place, patch: Patch | None) -> None:
        outer, inner = self._related(place)
        if outer:
            self.places[outer[0]] = None
            return
        for each in inner:
            del self.places[each]
        self.places[place] = None if inner else patch
        self._above.update(place[:end] for end in range(len(place)))

    def _related(self, place: Place) -> tuple[list[Place], list[Place]]:
        """The places that are this one or hold it, and those inside it. Found without a look at all the others."""
        outer = [place[:end] for end in range(len(place) + 1) if place[:end] in self.places]
        within = self.places if place in self._above else ()
        return outer, [each for each in within if each != place and each[: len(place)] == place]

    def check_agrees(self, earlier: "_Wishes") -> None:
        """Raises `PatchInvalid` where the two ask for different values."""
        for place in self.places:
            outer, inner = earlier._related(place)
            if not all(_agree(self.tree, place, earlier.tree, each) for each in outer + inner):
                raise PatchInvalid("contradicts", _pointer(place))

    def unmet(self, tree: Any) -> list[Patch]:
        """What is still to be answered where the order has become `tree`."""
        patches = []
        for place, patch in self.places.items():
            wanted, there = _at(self.tree, place), _at(tree, place)
            if _same(wanted, there):
                continue
            if patch is None:
                path = _pointer(place)
                if wanted is MISSING:
                    patch = Patch.remove(path)
                else:
                    patch = Patch.add(path, wanted) if there is MISSING else Patch.replace(path, wanted)
            patches.append(patch)
        return patches


def _applied(tree: Any, patch: Patch) -> Any:
    """The tree with the patch applied. It shares with the old one what lies beside the way there."""
    operation = _operation(patch)
    parts = JsonPointer(patch.path).parts
    new = node = copy(tree)
    try:
        for part in parts[:-1]:
            key = JsonPointer.get_part(node, part)
            node[key] = node = copy(node[key])
        return _OPERATIONS[patch.op](operation).apply(new)
    except (JsonPatchException, JsonPointerException, KeyError, IndexError, TypeError) as error:
        raise PatchInvalid("does-not-apply", patch.path) from error


def _operation(patch: Patch) -> dict[str, Any]:
    try:
        patch.path.encode()
        operation = {"op": patch.op, "path": patch.path}
        return operation if patch.op == "remove" else operation | {"value": _json(patch.value, MAX_DEPTH)}
    except (ValueError, OverflowError) as error:
        raise PatchInvalid("not-json", patch.path) from error


def _json(value: Any, depth: int) -> Any:
    """A copy of our own. Raises `ValueError` or `OverflowError` on what is not JSON; `Decimal` stays what it is."""
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
        return {name: _json(part, depth - 1) for name, part in value.items()}
    if kind in (list, tuple):
        return [_json(part, depth - 1) for part in value]
    raise ValueError


def _at(tree: Any, place: Place) -> Any:
    """What stands at a place, or `MISSING`."""
    try:
        for part in place:
            tree = tree[JsonPointer.get_part(tree, part)]
    except (JsonPointerException, KeyError, IndexError, TypeError):
        return MISSING
    return tree


def _agree(one: Any, its: Place, other: Any, others: Place) -> bool:
    """Whether two trees have the same to say where a place of one is a place of the other, or lies inside it."""
    length = min(len(its), len(others))
    one, other = _at(one, its[:length]), _at(other, its[:length])
    if _same(one, other):
        return True
    inner = (its + others[len(its) :])[length:]
    for part in inner:
        if isinstance(one, list) or isinstance(other, list):
            return False  # the same position may be another element by now
        one = one.get(part, MISSING) if isinstance(one, dict) else MISSING
        other = other.get(part, MISSING) if isinstance(other, dict) else MISSING
    return bool(inner) and _same(one, other)


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; without recursion, since an order may be deep."""
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
        elif isinstance(one, bool) or isinstance(other, bool) or _as_read(one) != _as_read(other):
            return False
    return True


def _as_read(scalar: Any) -> Any:
    """A `Decimal` as it will come back from Norce: 987.20 as the float 987.2."""
    return msgspec.json.decode(str(scalar)) if isinstance(scalar, Decimal) else scalar


def _pointer(place: Place) -> str:
    return str(JsonPointer.from_parts(place).path)


_ENCODER = msgspec.json.Encoder(decimal_format="number")
