"""Evaluation of a condition.

`compile` checks a condition completely, so `evaluate` decides every order that the service accepts, whatever it looks
like. A missing value has a code of its own: the schema is then not evaluated, not even `true` or `{"not": {}}`. Null at
the scope is a value.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Final

from jsonpointer import JsonPointer, JsonPointerException

from adapter.conditions.failing_keyword import FailingKeyword, find_failing_keyword
from adapter.conditions.schemas import (
    LONGEST_FOR_A_MIB,
    MAX_NODES_PER_BYTE,
    MAX_SCOPE_LENGTH,
    MAX_SCOPE_TOKENS,
    MIB,
    ConditionInvalid,
    check_schema,
)
from adapter.orders import Json


class Result(Enum):
    """The results of an evaluation."""

    MATCHED = "matched"
    NOT_MATCHED = "not_matched"
    ERROR = "error"  # it cannot be decided, now or later, for the same value


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The evaluation of one condition on one tree.

    It names places and never values, so it may be logged.

    Codes of a condition that does not match: `scope_missing`, `schema`. Codes of an error: `scope_in_array`, and for
    trees that our decoder did not make, `not_json` and `engine`.
    """

    result: Result
    code: str | None  # None if it matched
    where: str | None  # JSON Pointer into the tree: the scope, or the part of it that exists


class Missing(Enum):
    """The type of `MISSING`."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING  # the scope has no value in the tree; null is a value


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
        self.tokens = parse_scope(condition.scope)  # type: ignore[arg-type]  # it refuses None by its own code
        self._scope = str(condition.scope)
        self._checked = check_schema(True if condition.schema is None else condition.schema)
        self.schema: Json = self._checked.schema
        self._is_valid = self._checked.engine().is_valid
        # Evaluations are made once: making one takes longer than evaluating most schemas.
        places = [JsonPointer.from_parts(self.tokens[:end]).path for end in range(len(self.tokens) + 1)]
        self._matched = Evaluation(result=Result.MATCHED, code=None, where=self._scope)
        self._not_matched = Evaluation(result=Result.NOT_MATCHED, code="schema", where=self._scope)
        self._in_array = [Evaluation(result=Result.ERROR, code="scope_in_array", where=place) for place in places]
        self._missing = [  # by the first name that is missing
            Evaluation(result=Result.NOT_MATCHED, code="scope_missing", where=place) for place in places[1:]
        ]

    def value(self, tree: object) -> Any:
        """Return the value at the scope, or `MISSING`, also if the scope leads through an array."""
        for token in self.tokens:
            if not isinstance(tree, dict) or token not in tree:
                return MISSING
            tree = tree[token]
        return tree

    def worst_case(self, order_bytes: int) -> timedelta:
        """Return the longest time of an evaluation for an order of a size, by the schema."""
        return LONGEST_FOR_A_MIB * (self._checked.nodes_per_byte / MAX_NODES_PER_BYTE) * (order_bytes / MIB)

    def evaluate(self, tree: object) -> Evaluation:
        """Evaluate the condition on an order as plain JSON. Never raises.

        It takes at most about 50 ms for an order of 1 MiB.
        """
        value = self.value(tree)
        if value is MISSING:
            return self._missing_at(tree)
        try:
            return self._matched if self._is_valid(value) else self._not_matched
        except (KeyboardInterrupt, SystemExit):
            raise
        except (ValueError, TypeError):  # not from our decoder: a lone surrogate, a key that is not text, a date
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
        return find_failing_keyword(self._checked, self.value(tree), self._scope)

    def _missing_at(self, tree: object) -> Evaluation:
        for depth, token in enumerate(self.tokens):
            if isinstance(tree, list):
                return self._in_array[depth]
            if not isinstance(tree, dict) or token not in tree:
                return self._missing[depth]
            tree = tree[token]
        return self._not_matched

    def __repr__(self) -> str:
        return f"<CompiledCondition {self._scope}>"
