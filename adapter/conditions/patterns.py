"""Bound of a regular expression: the states that the engine may need to read a text.

The engine reads a text in 2 to 5 ns for each byte, with a deterministic automaton that it builds as it reads. An
automaton that does not fit in its memory makes it slow: then it follows all positions of the pattern at once, which
took 0.7 us for each byte with `[01]*1[01]{100}2`. So the states are counted at start, by building the same automaton
over characters. The engine has accepted the pattern before, so the parser only has to find its parts.
"""

import re
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TypeAlias

MAX_POSITIONS = 4_000  # characters of a pattern, with each counted repetition written out
MAX_OPAQUE = 3  # different \p{…} of a pattern

_LAST = 0x10FFFF
_DIGITS = ((48, 57),)
_WORD = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACES = ((9, 13), (32, 32), (160, 160), (5760, 5760), (8192, 8202), (8232, 8233), (8239, 8239), (8287, 8287),
           (12288, 12288), (65279, 65279))  # fmt: skip
_LINE_ENDS = ((10, 10), (13, 13), (8232, 8233))
_CONTROLS = {"n": 10, "r": 13, "t": 9, "v": 11, "f": 12, "0": 0}
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?:P?<\w+>|:))?")
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]+)\}|c([a-zA-Z])")
_PROPERTY = re.compile(r"[pP](?:\{[^}]*\}|[A-Z])")
_SET_OPERATION = re.compile(r"\[|&&|--|~~")


class PatternUnknown(Exception):
    """A part of a pattern whose states cannot be counted."""


@dataclass(frozen=True, slots=True)
class _Set:
    """A set of characters: ranges, and properties such as `L` in general."""

    ranges: tuple[tuple[int, int], ...] = ()
    opaque: frozenset[str] = frozenset()
    is_negated: bool = False

    def has(self, character: int, opaque: frozenset[str]) -> bool:
        is_in = any(low <= character <= high for low, high in self.ranges) or not self.opaque.isdisjoint(opaque)
        return is_in is not self.is_negated


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Repetition:
    part: "_Node"
    least: int
    most: int | None


_Node: TypeAlias = _Set | _Sequence | _Choice | _Repetition
_BEGIN, _END = _Set(opaque=frozenset("^")), _Set(opaque=frozenset("$"))  # no character is in them


def has_more_states(pattern: str, most: int) -> bool:
    """Return True if the engine may need more than `most` states to search a text.

    Raises:
        PatternUnknown: The pattern has a part whose states cannot be counted.
    """
    try:
        automaton = _Automaton(_Parser(pattern).parse())
    except RecursionError as error:
        raise PatternUnknown from error
    return automaton.has_more_states(most)


class _Parser:
    """A parser of the regular expressions that the engine accepts."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self._at != len(self._text):
            raise PatternUnknown
        return node

    def _take(self, text: str) -> bool:
        is_there = self._text.startswith(text, self._at)
        self._at += len(text) * is_there
        return is_there

    def _match(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        found = expression.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _next(self) -> str:
        if self._at == len(self._text):
            raise PatternUnknown
        self._at += 1
        return self._text[self._at - 1]

    def _choice(self) -> _Node:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return _Choice(tuple(parts))

    def _sequence(self) -> _Node:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))
        return _Sequence(tuple(parts))

    def _repeated(self, node: _Node) -> _Node:
        while True:
            if self._take("*"):
                node = _Repetition(node, 0, None)
            elif self._take("+"):
                node = _Repetition(node, 1, None)
            elif self._take("?"):
                node = _Repetition(node, 0, 1)
            elif (found := self._match(_COUNT)) is not None:
                least = int(found[1] or 0)
                node = _Repetition(node, least, int(found[3]) if found[3] else None if found[2] else least)
            else:
                return node
            self._take("?")

    def _atom(self) -> _Node:
        if self._match(_GROUP):
            if self._text.startswith("?", self._at):
                raise PatternUnknown  # flags
            node = self._choice()
            if not self._take(")"):
                raise PatternUnknown
            return node
        character = self._next()
        if character == "\\":
            if self._take("b") or self._take("B"):
                return _Sequence(())
            return self._escape()
        if character == "[":
            return self._class()
        return {"^": _BEGIN, "$": _END, ".": _Set(_LINE_ENDS, is_negated=True)}.get(character) or _one(ord(character))

    def _class(self) -> _Set:
        is_negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        opaque: set[str] = set()
        while not self._take("]"):
            if self._match(_SET_OPERATION):
                raise PatternUnknown
            one = self._member()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                other = self._member()
                if len(one.ranges) != 1 or len(other.ranges) != 1 or one.is_negated or other.is_negated:
                    raise PatternUnknown
                one = _Set(((one.ranges[0][0], other.ranges[0][1]),))
            ranges += _inverse(one.ranges) if one.is_negated else one.ranges
            opaque |= one.opaque
        return _Set(tuple(ranges), frozenset(opaque), is_negated)

    def _member(self) -> _Set:
        character = self._next()
        if character != "\\":
            return _one(ord(character))
        return _one(8) if self._take("b") else self._escape()

    def _escape(self) -> _Set:
        if (code := self._match(_CODE)) is not None:
            return _one(ord(code[4]) % 32 if code[4] else int(code[1] or code[2] or code[3], 16))
        if (name := self._match(_PROPERTY)) is not None:
            return _Set(opaque=frozenset((name[0],)))
        kind = self._next()
        known = {"d": _DIGITS, "w": _WORD, "s": _SPACES}.get(kind.lower())
        if known is not None:
            return _Set(known, is_negated=kind.isupper())
        return _one(_CONTROLS.get(kind, ord(kind)))


def _one(character: int) -> _Set:
    return _Set(((character, character),))


def _inverse(ranges: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    lows = [0, *(high + 1 for _, high in ranges)]
    highs = [*(low - 1 for low, _ in ranges), _LAST]
    return list(zip(lows, highs, strict=True))


@dataclass(frozen=True, slots=True)
class _Fragment:
    """A part of the automaton. Sets of positions are the bits of an integer."""

    first: int = 0
    last: int = 0
    may_be_empty: bool = True


class _Automaton:
    """The positions of a pattern and those that may follow them (Glushkov's construction)."""

    def __init__(self, node: _Node) -> None:
        self._sets: list[_Set] = []  # of each position
        self._follow: list[int] = []
        self._whole = self._add(node)

    def _add(self, node: _Node) -> _Fragment:
        match node:
            case _Set():
                if len(self._sets) == MAX_POSITIONS:
                    raise PatternUnknown
                position = 1 << len(self._sets)
                self._sets.append(node)
                self._follow.append(0)
                return _Fragment(position, position, may_be_empty=False)
            case _Choice(parts):
                added = [self._add(part) for part in parts]
                first = last = 0
                for each in added:
                    first, last = first | each.first, last | each.last
                return _Fragment(first, last, any(each.may_be_empty for each in added))
            case _Sequence(parts):
                whole = _Fragment()
                for part in parts:
                    whole = self._joined(whole, self._add(part))
                return whole
            case _Repetition(part, least, None):
                whole = self._add(part)
                self._connect(whole.last, whole.first)
                whole = _Fragment(whole.first, whole.last, whole.may_be_empty or least == 0)
                for _ in range(least - 1):
                    whole = self._joined(self._add(part), whole)
                return whole
            case _Repetition(part, least, most):
                whole = _Fragment()
                for number in range(most or 0, 0, -1):
                    whole = self._joined(self._add(part), whole)
                    if number > least:
                        whole = _Fragment(whole.first, whole.last, may_be_empty=True)
                return whole
        raise AssertionError(node)

    def _joined(self, one: _Fragment, other: _Fragment) -> _Fragment:
        self._connect(one.last, other.first)
        return _Fragment(
            one.first | other.first * one.may_be_empty,
            other.last | one.last * other.may_be_empty,
            one.may_be_empty and other.may_be_empty,
        )

    def _connect(self, last: int, first: int) -> None:
        for position in _bits(last):
            self._follow[position] |= first

    def has_more_states(self, most: int) -> bool:
        """Return True if there are more states than `most` before a match ends the search."""
        state = self._at_begin()
        if self._whole.may_be_empty or state & self._whole.last:
            return False
        masks = self._masks()
        states, unread = {state}, [state]
        while unread:
            after = self._whole.first | self._after(unread.pop())
            for mask in masks:
                state = after & mask
                if state not in states and not state & self._whole.last:
                    states.add(state)
                    unread.append(state)
            if len(states) > most:
                return True
        return False

    def _at_begin(self) -> int:
        begin = sum(1 << position for position, each in enumerate(self._sets) if each is _BEGIN)
        state, reached = -1, self._whole.first & begin
        while state != reached:
            state = reached
            reached |= self._after(state) & begin
        return state

    def _after(self, state: int) -> int:
        after = 0
        for position in _bits(state):
            after |= self._follow[position]
        return after

    def _masks(self) -> set[int]:
        """Return the positions of each kind of character: those that are in the same sets."""
        positions: dict[_Set, int] = {}
        for position, each in enumerate(self._sets):
            if each is not _BEGIN and each is not _END:
                positions[each] = positions.get(each, 0) | 1 << position
        opaque = sorted(set(chain.from_iterable(each.opaque for each in positions)))
        if len(opaque) > MAX_OPAQUE:
            raise PatternUnknown
        in_properties = [frozenset(some) for number in range(len(opaque) + 1) for some in combinations(opaque, number)]
        ranges = set(chain.from_iterable(each.ranges for each in positions))
        characters = {0, *(low for low, _ in ranges), *(high + 1 for _, high in ranges)}
        return {
            sum(mask for each, mask in positions.items() if each.has(character, properties))
            for character in characters
            for properties in in_properties
        }


def _bits(state: int) -> list[int]:
    positions = []
    while state:
        lowest = state & -state
        positions.append(lowest.bit_length() - 1)
        state ^= lowest
    return positions
