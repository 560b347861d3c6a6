"""The handler `patch`: changes from the configuration, each with a condition."""

import asyncio
from typing import Any

import msgspec
import pytest

from adapter.handlers.patch import PatchHandler, PatchSettings
from adapter.orders import read_order
from adapter.plugin import Patch, Undecided
from adapter.testing import context
from adapter.verdicts.patches import merge

MEMBERS = {
    "scope": "/customer/billing/type",
    "schema": {"const": "organization"},
    "path": "/cart/attributes/priceList",
    "value": "business",
}
NO_NOTE = {"scope": "/cart/attributes/note", "op": "remove", "path": "/cart/attributes/note"}


def settings(*changes: dict[str, Any]) -> PatchSettings:
    return msgspec.convert({"changes": changes}, PatchSettings)


def asked(order: dict[str, Any], *changes: dict[str, Any]) -> list[Patch]:
    return asyncio.run(
        PatchHandler().change(read_order(msgspec.json.encode(order)), context(PatchHandler, {"changes": changes}))
    )


def order(type_: str = "organization", **attributes: Any) -> dict[str, Any]:
    return {"id": "order-1", "customer": {"billing": {"type": type_}}, "cart": {"attributes": attributes}}


def test_a_change_is_requested_if_its_condition_holds() -> None:
    assert asked(order(), MEMBERS) == [Patch.add("/cart/attributes/priceList", "business")]
    assert asked(order("person"), MEMBERS) == []


def test_changes_are_requested_in_order() -> None:
    assert asked(order(note="a"), NO_NOTE, MEMBERS) == [
        Patch.remove("/cart/attributes/note"),
        Patch.add("/cart/attributes/priceList", "business"),
    ]


def test_a_changed_order_is_not_changed_again() -> None:
    changed = order(priceList="business")

    answer, refused, _ = merge(changed, [asked(changed, MEMBERS, NO_NOTE)], "/cart")

    assert (answer, refused) == ([], [None])


def test_null_can_be_set() -> None:
    assert asked(order(), {**MEMBERS, "value": None}) == [Patch.add("/cart/attributes/priceList", None)]


def test_an_undecided_condition_raises() -> None:
    with pytest.raises(Undecided, match="condition at /cart/attributes/tags/0 could not be evaluated"):
        asked(order(tags=["a"]), {**MEMBERS, "scope": "/cart/attributes/tags/0"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({**MEMBERS, "op": "remove"}, "remove has none"),
        ({**NO_NOTE, "op": "replace"}, "add and replace have a value"),
        ({**MEMBERS, "path": ""}, "JSON Pointer"),
        ({**MEMBERS, "op": "move"}, "op"),
        ({**MEMBERS, "scope": "cart"}, "scope"),
        ({**MEMBERS, "schema": {"type": "money"}}, "schema at /type"),
    ],
    ids=["remove-with-a-value", "replace-without", "the-whole-order", "another-operation", "scope", "schema"],
)
def test_invalid_settings_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=says):
        settings(change)
