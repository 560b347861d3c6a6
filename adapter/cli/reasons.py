"""
Why a condition does not hold: which keyword fails, and where; never on which value.

The Python library `jsonschema` finds the reason, in a process of its own that is ended when it takes too long: a
regular expression, or a schema that branches, can keep it busy for ever. What one would get wrong: it decides nothing.
What counts is the answer of `conditions`, which comes with the question. Where the two libraries are known to differ,
the reason follows that answer, and it is said that `jsonschema` by itself decides otherwise.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum
from typing import Any

import msgspec
from jsonpointer import JsonPointer
from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]
from jsonschema.validators import extend  # type: ignore[import-untyped]
from referencing import Registry

from adapter.conditions import Condition, Result

LONGEST = timedelta(seconds=5)  # then the question at hand is given up, and another process has the others

# What `jsonschema` is known to see otherwise, by keyword.
DIFFERENCES = {
    "multipleOf": "it divides binary fractions, so that 19.99 is no multiple of 0.01",
    "dependencies": "it ignores dependencies, which is no keyword of draft 2020-12 any more",
    "pattern": "its patterns are Python's regular expressions, not those of ECMA-262",
    "patternProperties": "its patterns are Python's regular expressions, not those of ECMA-262",
}


class Library(Enum):
    """What `jsonschema` by itself makes of the same question."""

    AGREES = "agrees"
    DIFFERS = "differs"
    CANNOT_TELL = "cannot_tell"  # it fails on this schema: a pattern that Python cannot read, too deep a recursion
    TOO_SLOW = "too_slow"  # it did not come to an end


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A schema as plain JSON, the value that it was asked about, and whether it holds."""

    schema: Any
    value: Any
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """
    The keyword that fails, where it stands in the schema (references followed), and where in the value it fails: for a
    member that is `required`, where it should be. A schema that is just `false` has no keyword, and the library tells
    only what is around it: so do both places.
    """

    keyword: str | None
    schema: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Why it does not hold, where that was found; what `jsonschema` says, and the keywords by which it may differ."""

    library: Library
    reason: Reason | None = None
    differs_by: tuple[str, ...] = ()


def reasons(questions: Sequence[Question], limit: timedelta = LONGEST) -> list[Answer]:
    """The answers, in the order of the questions, found in another process. A question that takes too long is left."""
    answers: list[Answer] = []
    while len(answers) < len(questions):
        asked = msgspec.json.encode(questions[len(answers) :])
        command = [sys.executable, "-P", "-m", __name__]
        try:
            # A traceback could hold values, so nobody sees it.
            said = subprocess.run(  # noqa: S603 - it is this module
                command,
                input=asked,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=limit.total_seconds(),
                check=False,
            ).stdout
        except subprocess.TimeoutExpired as error:
            said = error.stdout or b""
        lines = [line for line in said.splitlines(keepends=True) if line.endswith(b"\n")]
        whole = len(lines) // 2
        answers += [msgspec.json.decode(line, type=Answer) for line in lines[1::2] + lines[2 * whole :]]
        if len(lines) == 2 * whole and len(answers) < len(questions):
            answers.append(Answer(library=Library.TOO_SLOW))
    return answers


def answering(question: Question) -> Iterator[Answer]:
    """The answer to one question, however long it takes; before it the same without what `jsonschema` itself says."""
    schema, value = question.schema, question.value
    registry: Registry[Any] = Registry()
    try:
        error = None if question.holds else best_match(_AS_DECIDED(schema, registry=registry).iter_errors(value))
    except Exception:  # noqa: BLE001 - whatever it fails on is not ours to mend
        error = None
    answer = Answer(library=Library.TOO_SLOW, reason=None if error is None else _reason(error))
    yield answer
    try:
        agrees = Draft202012Validator(schema, registry=registry).is_valid(value) is question.holds
        library = Library.AGREES if agrees else Library.DIFFERS
    except Exception:  # noqa: BLE001 - as above
        library = Library.CANNOT_TELL
    known = () if library is Library.AGREES else tuple(sorted(_keywords(schema) & DIFFERENCES.keys()))
    yield replace(answer, library=library, differs_by=known)


def _reason(error: Any) -> Reason:
    where = list(error.absolute_path)
    if error.validator == "required":
        where.append(next(name for name in error.validator_value if name not in error.instance))
    return Reason(
        keyword=error.validator,
        schema=JsonPointer.from_parts(error.absolute_schema_path).path,
        value=JsonPointer.from_parts(where).path,
    )


def _decided(keyword: str) -> Any:
    """A keyword as the service decides it, and fast."""

    def check(_validator: Any, expected: Any, instance: Any, _schema: Any) -> Iterator[Any]:
        alone = Condition("/value", {keyword: expected}).compile()
        if alone.evaluate({"value": instance}).result is not Result.MATCHED:
            yield ValidationError("")

    return check


def _dependencies(validator: Any, dependencies: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    for name, needed in dependencies.items() if isinstance(instance, dict) else ():
        if name not in instance:
            continue
        if not isinstance(needed, list):
            yield from validator.descend(instance, needed, schema_path=name)
        elif not all(other in instance for other in needed):
            yield ValidationError("")


_AS_DECIDED = extend(
    Draft202012Validator,
    {name: _decided(name) for name in ("multipleOf", "pattern", "uniqueItems")} | {"dependencies": _dependencies},
)


def _keywords(schema: Any) -> set[str]:
    """Every name in a schema."""
    if isinstance(schema, dict):
        return schema.keys() | {name for part in schema.values() for name in _keywords(part)}
    return {name for part in schema for name in _keywords(part)} if isinstance(schema, list) else set()


if __name__ == "__main__":
    for _question in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Question]):
        for _answer in answering(_question):
            sys.stdout.buffer.write(msgspec.json.encode(_answer) + b"\n")
            sys.stdout.buffer.flush()
