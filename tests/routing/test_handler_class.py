"""Mistakes in a handler class: methods that block, and names that look misspelt."""

import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from adapter.handlers.jetshop import JetshopExport
from adapter.handlers.log import LogHandler
from adapter.handlers.patch import PatchHandler
from adapter.handlers.rules import Rules
from adapter.plugin import HookHandler, NotificationHandler, ValidationHandler
from adapter.routing.handler_class import methods_that_block, misspelt_names
from adapter.routing.routes import KINDS


def subclass(*bases: type, **members: Any) -> type:
    return type("Handler", bases, members)


async def coroutine(self: Any, *_: Any) -> None: ...


def function(self: Any, *_: Any) -> None: ...


async def generator(self: Any, *_: Any) -> AsyncIterator[None]:
    yield


@functools.wraps(coroutine)
def decorated(*arguments: Any) -> Any:
    return coroutine(*arguments)


BUNDLED = [JetshopExport, LogHandler, PatchHandler, Rules]


@pytest.mark.parametrize(
    ("member", "blocks"),
    [
        (coroutine, False),
        (decorated, False),
        (staticmethod(coroutine), False),
        (function, True),
        (generator, True),
        (functools.partial(function, None), True),
        (None, True),
    ],
    ids=["coroutine", "decorated coroutine", "static coroutine", "function", "async generator", "partial", "None"],
)
@pytest.mark.parametrize(
    ("base", "name"),
    [
        (NotificationHandler, "deliver"),
        (NotificationHandler, "lookup"),
        (ValidationHandler, "validate"),
        (HookHandler, "change"),
        (HookHandler, "check_credentials"),
    ],
)
def test_every_method_of_the_api_must_be_a_coroutine(base: type, name: str, member: Any, blocks: bool) -> None:
    assert methods_that_block(subclass(base, **{name: member}), KINDS.values()) == [name] * blocks


@pytest.mark.parametrize(
    ("base", "name", "member", "meant"),
    [
        (NotificationHandler, "look_up", coroutine, "lookup"),
        (NotificationHandler, "Lookup", coroutine, "lookup"),
        (NotificationHandler, "loookup", coroutine, "lookup"),
        (NotificationHandler, "check_credential", coroutine, "check_credentials"),
        (NotificationHandler, "repeatble", True, "repeatable"),
        (NotificationHandler, "other_client", True, "other_clients"),
        (NotificationHandler, "notDone", {503}, "not_done"),
        (NotificationHandler, "lookup_by_keys", True, "lookup_by_key"),
        (ValidationHandler, "valdate", coroutine, "validate"),
        (ValidationHandler, "compute", True, "computes"),
        (HookHandler, "changes", coroutine, "change"),
        (ValidationHandler, "compute", function, None),
        (NotificationHandler, "find", coroutine, None),
        (NotificationHandler, "lookup_by_number", coroutine, None),
        (NotificationHandler, "_look_up", coroutine, None),
        (NotificationHandler, "validate", coroutine, None),
    ],
)
def test_a_name_close_to_a_member_that_the_class_lacks_looks_misspelt(
    base: type, name: str, member: Callable[..., Any] | bool, meant: str | None
) -> None:
    assert misspelt_names(subclass(base, **{name: member}), KINDS.values()) == ({} if meant is None else {name: meant})


def test_a_name_close_to_a_member_that_the_class_has_is_its_own() -> None:
    handler = subclass(NotificationHandler, deliver=coroutine, delivery=coroutine, lookup=coroutine, look_up=coroutine)

    assert misspelt_names(handler, KINDS.values()) == {}


def test_a_handler_of_two_kinds_has_both_apis() -> None:
    handler = subclass(ValidationHandler, HookHandler, validate=function, chnge=coroutine)

    assert methods_that_block(handler, KINDS.values()) == ["validate"]
    assert misspelt_names(handler, KINDS.values()) == {"chnge": "change"}


@pytest.mark.parametrize("handler", BUNDLED)
def test_the_bundled_handlers_have_neither(handler: type) -> None:
    assert methods_that_block(handler, KINDS.values()) == []
    assert misspelt_names(handler, KINDS.values()) == {}
