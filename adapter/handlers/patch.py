"""
`patch`: further changes to an order that is about to be stored, from the configuration, with no code to write.

Each change is asked for where its condition holds, so a change that is there already asks for nothing more. A condition
that could not be decided leaves the whole hook without an answer, and the route's `no_answer` decides.
"""

from typing import Annotated, Any, Literal

import msgspec

from adapter.plugin import Conditional, Context, HookHandler, Order, Patch, Settings


class Change(Conditional, frozen=True, kw_only=True):
    """One change, and when it is wanted."""

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
        super().__post_init__()
        self.__dict__["patch"] = Patch(self.op, self.path, None if self.op == "remove" else self.value)

    @property
    def patch(self) -> Patch:
        """What is asked for where the condition holds."""
        return self.__dict__["patch"]  # type: ignore[no-any-return]


class PatchSettings(Settings, frozen=True, kw_only=True):
    changes: Annotated[
        tuple[Change, ...], msgspec.Meta(min_length=1, description="The changes, asked for in this order.")
    ]


class PatchHandler(HookHandler[PatchSettings]):
    """Asks for every change whose condition holds on the order as it would be stored. Raises `Undecided`."""

    computes = True

    async def change(self, order: Order, context: Context[PatchSettings]) -> list[Patch]:
        return [change.patch for change in context.settings.changes if change.holds(order)]
