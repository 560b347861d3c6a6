"""The order as v0 or v1 of the Order API shows it.

The simulator stores an order once: in the words of v1, with the members of both versions. Names that begin with an
underscore are its own.
"""

from typing import Any

from adapter.norce.api import V1
from adapter.norce.order_schema import HIDDEN

Order = dict[str, Any]

V1_NAMES = {"validations": {"url": "invoke"}, "hooks": {"subscribeTo": "scope"}}  # by the name in v0


def as_version(order: Order, version: str) -> Order:
    """Return the order as this version of the API shows it."""
    shown: Order = _as_version({name: value for name, value in order.items() if not name.startswith("_")}, "", version)
    return shown


def _as_version(value: Any, name: str, version: str) -> Any:
    if name in ("attributes", "schema"):
        return value
    if isinstance(value, list):
        return [_as_version(each, name, version) for each in value]
    if not isinstance(value, dict):
        return value
    hidden = HIDDEN[version].get(name, ())
    v0_names = {} if version == V1 else {v1: v0 for v0, v1 in V1_NAMES.get(name, {}).items()}
    return {
        v0_names.get(key, key): _as_version(part, key, version) if isinstance(part, (dict, list)) else part
        for key, part in value.items()
        if key not in hidden
    }
