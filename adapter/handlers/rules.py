"""
`rules`: may this purchase go on, may this change be stored? Conditions from the configuration, with no code to write.

A rule says what must *hold*: its problem is reported where the condition did not match. A missing scope does not match
either, so `{scope: …, schema: {type: string}}` demands that the member is there. A condition that could not be decided
is neither: then there is no answer, and the route's `no_answer` decides.

The same settings serve both kinds of callback. A validation is told every problem, a hook is refused with the first:
Norce takes one.
"""

import re
from collections.abc import Iterator
from typing import Annotated, TypeAlias

import msgspec

from adapter.plugin import (
    Conditional,
    Context,
    HookHandler,
    Order,
    Patch,
    Problem,
    Refuse,
    Settings,
    ValidationHandler,
)

DEFAULT = "default"  # the message for every other culture
_CULTURE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{2})*")  # a language, or one with a region; as Norce's order has it
_Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]


class Rule(Conditional, frozen=True, kw_only=True):
    """What must hold for a purchase to go on or a change to be stored, and what is answered where it does not."""

    code: Annotated[
        str,
        msgspec.Meta(
            description="Kebab-case code that the front end shows or translates, such as `national-id-missing`."
        ),
    ]
    message: Annotated[
        _Text | dict[str, _Text],
        msgspec.Meta(
            description="What to tell the shopper: a text, or a text for each culture of an order (`sv-SE`), language "
            "(`sv`), and `default`. No values of the order are put into it."
        ),
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["problems"] = self._problems()

    def _problems(self) -> dict[str, Problem]:
        """The problem for each culture, in lower case, and for each language: its own, or that of its first culture."""
        if isinstance(self.message, str):
            return {DEFAULT: Problem(self.code, self.message)}
        problems: dict[str, Problem] = {}
        for culture, text in self.message.items():
            if culture != DEFAULT and not _CULTURE.fullmatch(culture):
                raise ValueError("message has a text for each culture such as sv-SE, language such as sv, and default")
            if culture.lower() in problems:
                raise ValueError(f"message has two texts for {culture}; leave one of them out")
            problems[culture.lower()] = Problem(self.code, text)
        if DEFAULT not in problems:
            raise ValueError("message has no text for an order of another culture; add it as default")
        for culture in tuple(problems):
            problems.setdefault(culture.partition("-")[0], problems[culture])
        return problems

    def problem(self, culture: str | None) -> Problem:
        """What stands against a purchase or a change for which the rule does not hold, in the words of its culture."""
        problems: dict[str, Problem] = self.__dict__["problems"]
        wanted = (culture or DEFAULT).lower()
        return problems.get(wanted) or problems.get(wanted.partition("-")[0]) or problems[DEFAULT]


class RulesSettings(Settings, frozen=True, kw_only=True):
    rules: Annotated[
        tuple[Rule, ...],
        msgspec.Meta(
            min_length=1,
            description="The rules. A validation is told of all that do not hold, a hook of the first, in this order.",
        ),
    ]


class Rules(ValidationHandler[RulesSettings], HookHandler[RulesSettings]):
    """Tells a validation the problem of every rule that does not hold, and refuses a hook's change with the first."""

    computes = True

    async def validate(self, order: Order, context: Context[RulesSettings]) -> list[Problem]:
        """Raises `Undecided`."""
        return list(_broken(order, context.settings))

    async def change(self, order: Order, context: Context[RulesSettings]) -> list[Patch]:
        """Never asks for further changes. Raises `Refuse`, and `Undecided` where that comes first."""
        problem = next(_broken(order, context.settings), None)
        if problem is not None:
            raise Refuse(problem.code, problem.message)
        return []


def _broken(order: Order, settings: RulesSettings) -> Iterator[Problem]:
    for rule in settings.rules:
        if not rule.holds(order):
            culture = order.data.get("culture")  # the view of a large order takes seconds, and shoppers wait here
            yield rule.problem(culture if isinstance(culture, str) else None)
