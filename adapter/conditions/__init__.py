"""Conditions: a JSON Schema for the value at a JSON Pointer in the order.

The package is pure: it never fetches, and it never hangs. `schemas` checks which schemas are accepted, and
`condition` evaluates them; `failing_keyword` finds the reason why one does not hold.
"""

from adapter.conditions.condition import (
    MISSING,
    CompiledCondition,
    Condition,
    Evaluation,
    Missing,
    Result,
    parse_scope,
)
from adapter.conditions.failing_keyword import FailingKeyword
from adapter.conditions.schemas import ConditionInvalid

__all__ = [
    "MISSING",
    "CompiledCondition",
    "Condition",
    "ConditionInvalid",
    "Evaluation",
    "FailingKeyword",
    "Missing",
    "Result",
    "parse_scope",
]
