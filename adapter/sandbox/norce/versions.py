"""
An order as v0 or v1 of the API shows it. It is kept once, in the words of v1 and with the members of both; names that
begin with an underscore are the simulator's own.
"""

from collections.abc import Mapping
from typing import Any

from adapter.norce.api import V0, V1
from adapter.sandbox.norce.switches import Switches

Order = dict[str, Any]

OWN_NAMES = {"validations": {"url": "invoke"}, "hooks": {"subscribeTo": "scope"}}  # v0's -> v1's
_HIDDEN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    V0: {"validations": ("reference", "description"), "hooks": ("reference", "description")},
    V1: {
        "payments": ("merchant", "channel", "upsell"),
        "shippings": ("merchant", "channel"),
        "notifications": ("delay",),
        "items": ("logistics", "upsell"),
        "discounts": ("reference", "description"),
        "deliveryDetails": ("carrierProductId",),
    },
}


def as_version(order: Order, version: str, switches: Switches) -> Order:
    """The order as this version of the API shows it."""
    shown: Order = _shown({name: value for name, value in order.items() if not name.startswith("_")}, "", version)
    return _capitals(shown) if switches.enums == "capital" else shown


def _shown(value: Any, name: str, version: str) -> Any:
    if name in ("attributes", "schema"):
        return value
    if isinstance(value, list):
        return [_shown(each, name, version) for each in value]
    if not isinstance(value, dict):
        return value
    hidden = _HIDDEN[version].get(name, ())
    renamed = {} if version == V1 else {new: old for old, new in OWN_NAMES.get(name, {}).items()}
    return {
        renamed.get(key, key): _shown(part, key, version) if isinstance(part, (dict, list)) else part
        for key, part in value.items()
        if key not in hidden
    }


def _capitals(value: Any) -> Any:
    """As some of Norce's samples write these two."""
    if isinstance(value, list):
        return [_capitals(each) for each in value]
    if not isinstance(value, dict):
        return value
    names = {"person": "Person", "organization": "Organization", "intent": "Intent"}
    return {
        name: names.get(part, part) if name in ("type", "state") and isinstance(part, str) else _capitals(part)
        for name, part in value.items()
    }
