"""The handler `patch`: changes from the configuration to an order that is to be stored.

A change is requested if its condition holds. If a condition cannot be evaluated, the hook has no result and the route's
`no_answer` is used.
"""

import asyncio
from typing import Annotated, Any, Literal

import msgspec

from adapter.plugin import Conditional, Context, HookHandler, Order, Pace, Patch, Settings


class Change(Conditional, frozen=True, kw_only=True):
    """One change, with its condition."""

    op: Annotated[
        Literal["add", "replace", "remove"],
        msgspec.Meta(
            description="`add` sets a member, new or not; `replace` needs an existing one; `remove` of a missing one "
            "changes nothing."
        ),
    ] = "add"
    path: Annotated[
        str, msgspec.Meta(description="JSON Pointer to the changed member, inside the target of the callback.")
    ]
    value: Annotated[Any, msgspec.Meta(description="The new value, plain JSON.")] = msgspec.UNSET

    def __post_init__(self) -> None:
        if (self.op == "remove") is not (self.value is msgspec.UNSET):
            raise ValueError("add and replace have a value, null too; remove has none")
        super().__post_init__()
        self.__dict__["patch"] = Patch(self.op, self.path, None if self.op == "remove" else self.value)

    @property
    def patch(self) -> Patch:
        """The change as a patch."""
        return self.__dict__["patch"]  # type: ignore[no-any-return]


class PatchSettings(Settings, frozen=True, kw_only=True):
    """The settings of the handler `patch`."""

    changes: Annotated[
        tuple[Change, ...], msgspec.Meta(min_length=1, description="The changes, requested in this order.")
    ]


class PatchHandler(HookHandler[PatchSettings]):
    """The handler `patch`."""

    computes = True

    async def change(self, order: Order, context: Context[PatchSettings]) -> list[Patch]:
        """Return every change whose condition holds on the order as it would be stored.

        Raises `Undecided` if a condition cannot be evaluated.
        """
        patches: list[Patch] = []
        pace = Pace(order)
        for change in context.settings.changes:
            if pace.is_exceeded():
                await asyncio.sleep(0)  # lets other orders be answered
            if change.holds(order):
                patches.append(change.patch)
        return patches
