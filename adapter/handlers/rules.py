"""
`rules`: may this purchase go on? Conditions from the configuration, with no code to write.

A rule says what must *hold*: its problem is reported where the condition did not match. A missing scope does not match
either, so `{scope: …, schema: {type: string}}` demands that the member is there. A condition that could not be decided
is neither: then there is no answer, and the route's `no_answer` decides.
"""

from typing import Annotated, Any

import msgspec

from adapter.plugin import (
    CompiledCondition,
    Condition,
    ConditionInvalid,
    Context,
    Order,
    Problem,
    Result,
    Settings,
    ValidationHandler,
)


class RuleUndecided(Exception):
    """
    A rule's condition ended in an error for this order, so that nothing can be said about the purchase.

    The order holds something that the rule's schema cannot be evaluated on; `explain` shows what. The route's
    `no_answer` decides about the purchase meanwhile.
    """

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(rule, reason)
        self.rule = rule
        self.reason = reason

    def __str__(self) -> str:
        return f"the rule {self.rule} could not be decided: {self.reason}"


class Rule(Settings, frozen=True, kw_only=True, dict=True):
    """What must hold for a purchase to go on, and what is answered where it does not."""

    scope: Annotated[str, msgspec.Meta(description="JSON Pointer to the part of the order that the rule is about.")]
    schema: Annotated[
        dict[str, Any] | bool,
        msgspec.Meta(description="JSON Schema (2020-12) that this part must meet. Default: it only has to be there."),
    ] = True
    code: Annotated[
        str,
        msgspec.Meta(
            description="Kebab-case code that the front end shows or translates, such as `national-id-missing`."
        ),
    ]
    message: Annotated[
        str, msgspec.Meta(min_length=1, description="What to tell the shopper. No values of the order are put into it.")
    ]

    def __post_init__(self) -> None:
        try:
            compiled = Condition(scope=self.scope, schema=self.schema).compile()
        except ConditionInvalid as error:
            raise ValueError(str(error)) from error
        self.__dict__.update(compiled=compiled, problem=Problem(self.code, self.message))

    @property
    def compiled(self) -> CompiledCondition:
        """The condition, compiled once when the settings were read."""
        return self.__dict__["compiled"]  # type: ignore[no-any-return]

    @property
    def problem(self) -> Problem:
        """What stands against a purchase for which the rule does not hold."""
        return self.__dict__["problem"]  # type: ignore[no-any-return]


class RulesSettings(Settings, frozen=True, kw_only=True):
    rules: Annotated[
        tuple[Rule, ...],
        msgspec.Meta(min_length=1, description="The rules; all are asked, and problems come in this order."),
    ]


class Rules(ValidationHandler[RulesSettings]):
    """Reports the problem of every rule that does not hold, in the order of the rules. Raises `RuleUndecided`."""

    computes = True

    async def validate(self, order: Order, context: Context[RulesSettings]) -> list[Problem]:
        problems = []
        for rule in context.settings.rules:
            evaluation = rule.compiled.evaluate(order.data)
            if evaluation.result is Result.ERROR:
                raise RuleUndecided(rule.code, str(evaluation.code))
            if evaluation.result is Result.NOT_MATCHED:
                problems.append(rule.problem)
        return problems
