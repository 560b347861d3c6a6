"""Worst cases of the conditions of an answer, computed from their schemas and never timed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import msgspec

from adapter.conditions import CompiledCondition
from adapter.config.problems import under
from adapter.plugin import Conditional


def worst_case(conditions: Iterable[CompiledCondition], order_bytes: int) -> timedelta:
    """Return the longest time of conditions together, for an order of a size.

    Conditions on different parts of an order share its bytes. So what counts is one part, with the conditions on it and
    on the parts around it.
    """
    at: dict[tuple[str, ...], timedelta] = defaultdict(timedelta)
    for condition in conditions:
        at[condition.tokens] += condition.worst_case(order_bytes)
    around = (sum((at[scope[:end]] for end in range(len(scope) + 1)), timedelta()) for scope in tuple(at))
    return max(around, default=timedelta())


def conditions_in(settings: Any, path: str = "") -> Iterator[tuple[str, CompiledCondition]]:
    """Yield the conditions anywhere in the settings of a handler, with their paths."""
    if isinstance(settings, Conditional):
        yield path, settings.compiled
    if isinstance(settings, msgspec.Struct):
        settings = {field.encode_name: getattr(settings, field.name) for field in msgspec.structs.fields(settings)}
    elif isinstance(settings, (list, tuple)):
        settings = dict(enumerate(settings))
    elif not isinstance(settings, dict):
        return
    for step, each in settings.items():
        yield from conditions_in(each, under(path, step))
