"""Mistakes in a handler class that can be found before it is called."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

CLOSE = 0.85  # similarity of two names of which one is probably a misspelling


def methods_that_block(class_: type, kinds: Iterable[type]) -> list[str]:
    """Return the methods that must be coroutines and are not.

    A decorator may hide a coroutine if it keeps the function (`functools.wraps`).
    """
    return [
        name
        for name, own in _api(class_, kinds).items()
        if inspect.iscoroutinefunction(own)
        if not inspect.iscoroutinefunction(inspect.unwrap(getattr(class_, name)))
    ]


def misspelt_names(class_: type, kinds: Iterable[type]) -> dict[str, str]:
    """Return names of the class that look like a misspelt member of the API, with the member.

    Only members that the class does not have count: besides `lookup`, a `look_up` is a method of its own.
    """
    api = _api(class_, kinds)
    missing = {_plain(name): name for name, own in api.items() if getattr(class_, name) is own}
    found = {}
    for name in dir(class_):
        if name.startswith("_") or name in api:
            continue
        is_method = callable(getattr(class_, name))
        alike = [plain for plain, member in missing.items() if callable(api[member]) == is_method]
        for plain in difflib.get_close_matches(_plain(name), alike, n=1, cutoff=CLOSE):
            found[name] = missing[plain]
    return found


def _api(class_: type, kinds: Iterable[type]) -> Mapping[str, Any]:
    """Return the public members of the base classes of `adapter.plugin`, by their names."""
    bases = [kind for kind in kinds if issubclass(class_, kind)]
    return {name: getattr(base, name) for base in bases for name in dir(base) if not name.startswith("_")}


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
