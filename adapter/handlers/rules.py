"""The handler `rules`: refuses a purchase or a change by configured conditions.

A rule gives a condition that must *hold*; its problem is reported if the condition does not match. A missing scope does
not match, so `{scope: …, schema: {type: string}}` requires the member. If a condition cannot be evaluated, there is no
result and the route's `no_answer` is used.

A validation returns every problem. A hook is refused with the first one, since Norce takes only one.
"""

import asyncio
import re
from typing import Annotated, TypeAlias

import msgspec

from adapter.plugin import (
    Conditional,
    Context,
    HookHandler,
    Order,
    Pace,
    Patch,
    Problem,
    Refuse,
    Settings,
    ValidationHandler,
)

DEFAULT = "default"  # for cultures without a message of their own
_CULTURE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{2})*")  # a language, or one with a region; as Norce's order has it
_Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]


class Rule(Conditional, frozen=True, kw_only=True):
    """A condition that must hold, and the problem that is reported if it does not."""

    code: Annotated[
        str,
        msgspec.Meta(
            pattern=r"^[a-z0-9]+(-[a-z0-9]+)*(?!\n)$",
            max_length=64,
            description="Kebab-case code that the front end shows or translates, such as `national-id-missing`.",
            extra={"allowed": "kebab-case (a-z, 0-9 and single hyphens), at most 64 characters"},
        ),
    ]
    message: Annotated[
        _Text | dict[str, _Text],
        msgspec.Meta(
            description="The text for the shopper, or a text for each culture of an order (`sv-SE`), language "
            "(`sv`), and `default`. No values of the order are put into it."
        ),
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["problems"] = self._problems()

    def _problems(self) -> dict[str, Problem]:
        """Return the problem for each culture and language, in lower case.

        A language without a text of its own has that of its first culture.
        """
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
        """Return the problem in the words of a culture."""
        problems: dict[str, Problem] = self.__dict__["problems"]
        wanted = (culture or DEFAULT).lower()
        return problems.get(wanted) or problems.get(wanted.partition("-")[0]) or problems[DEFAULT]


class RulesSettings(Settings, frozen=True, kw_only=True):
    """The settings of the handler `rules`."""

    rules: Annotated[
        tuple[Rule, ...],
        msgspec.Meta(
            min_length=1,
            description="The rules, in order. A validation reports all that do not hold, a hook only the first.",
        ),
    ]


class Rules(ValidationHandler[RulesSettings], HookHandler[RulesSettings]):
    """The handler `rules`, for validations and hooks."""

    computes = True

    async def validate(self, order: Order, context: Context[RulesSettings]) -> list[Problem]:
        """Return the problem of every rule that does not hold. Raises `Undecided`."""
        return await _problems(order, context.settings)

    async def change(self, order: Order, context: Context[RulesSettings]) -> list[Patch]:
        """Refuse the change with the first problem, or accept it without further changes.

        Raises `Refuse`, or `Undecided` if such a condition comes first.
        """
        for problem in await _problems(order, context.settings, most=1):
            raise Refuse(problem.code, problem.message)
        return []


async def _problems(order: Order, settings: RulesSettings, most: int | None = None) -> list[Problem]:
    problems: list[Problem] = []
    pace = Pace(order)
    for rule in settings.rules:
        if pace.is_exceeded():
            await asyncio.sleep(0)  # lets other orders be answered
        if not rule.holds(order):
            culture = order.data.get("culture")  # from `data`: decoding the view of a large order takes seconds
            problems.append(rule.problem(culture if isinstance(culture, str) else None))
            if len(problems) == most:
                break
    return problems
