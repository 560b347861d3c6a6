"""
`patch`: further changes to an order that is about to be stored, from the configuration, with no code to write.

Each change is asked for where its condition holds, so a change that is there already asks for nothing more. A condition
that could not be decided leaves the whole hook without an answer, and the route's `no_answer` decides.
"""

from typing import Annotated, Any, Literal

import msgspec

from adapter.plugin import (
    CompiledCondition,
    Condition,
    ConditionInvalid,
    Context,
    HookHandler,
    Order,
    Patch,
    Result,
    Settings,
)


class ChangeUndecided(Exception):
    """
    The condition of a change ended in an error for this order, so that nobody can say whether it is wanted.

    The order holds something that the schema cannot be evaluated on; `explain` shows what.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"whether {self.path} is to be changed could not be decided: {self.reason}"


class Change(Settings, frozen=True, kw_only=True, dict=True):
    """One change, and when it is wanted."""

    scope: Annotated[str, msgspec.Meta(description="JSON Pointer to the part of the order that decides.")]
    schema: Annotated[
        dict[str, Any] | bool,
        msgspec.Meta(
            description="JSON Schema (2020-12) under which the change is wanted. Default: the part has to be there."
        ),
    ] = True
    op: Annotated[
        Literal["add", "replace", "remove"],
        msgspec.Meta(description="`add` sets a member, new or not; `replace` and `remove` need it to be there."),
    ] = "add"
    path: Annotated[
        str, msgspec.Meta(description="JSON Pointer to what is changed, inside the target of the callback.")
    ]
    value: Annotated[Any, msgspec.Meta(description="What it is set to; plain JSON.")] = msgspec.UNSET

    def __post_init__(self) -> None:
        if (self.op == "remove") is not (self.value is msgspec.UNSET):
            raise ValueError("add and replace have a value, null too; remove has none")
        try:
            compiled = Condition(scope=self.scope, schema=self.schema).compile()
        except ConditionInvalid as error:
            raise ValueError(str(error)) from error
        patch = Patch(self.op, self.path, None if self.op == "remove" else self.value)
        self.__dict__.update(compiled=compiled, patch=patch)

    @property
    def compiled(self) -> CompiledCondition:
        """The condition, compiled once when the settings were read."""
        return self.__dict__["compiled"]  # type: ignore[no-any-return]

    @property
    def patch(self) -> Patch:
        """What is asked for where the condition holds."""
        return self.__dict__["patch"]  # type: ignore[no-any-return]


class PatchSettings(Settings, frozen=True, kw_only=True):
    changes: Annotated[
        tuple[Change, ...], msgspec.Meta(min_length=1, description="The changes, asked for in this order.")
    ]


class PatchHandler(HookHandler[PatchSettings]):
    """Asks for every change whose condition holds on the order as it would be stored. Raises `ChangeUndecided`."""

    computes = True

    async def change(self, order: Order, context: Context[PatchSettings]) -> list[Patch]:
        wanted = []
        for change in context.settings.changes:
            evaluation = change.compiled.evaluate(order.data)
            if evaluation.result is Result.ERROR:
                raise ChangeUndecided(change.path, str(evaluation.code))
            if evaluation.result is Result.MATCHED:
                wanted.append(change.patch)
        return wanted
