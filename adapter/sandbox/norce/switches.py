"""
What can be told to the simulator: how Norce behaves where nobody outside knows, and what goes wrong.

Every default is what the documentation says or, where it says nothing, what an adapter should assume. None of them is a
promise of Norce's: try the other readings too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import msgspec

T = TypeVar("T")


class SwitchInvalid(Exception):
    """There is no such switch, or it does not take this value."""


def _asks(default: T, question: str) -> T:
    return field(default=default, metadata={"question": question})


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """How this Norce behaves. A share is between 0 and 1."""

    # --- validations
    validation_seconds: float = _asks(3.0, "How long does Norce wait for a validation?")
    validation_too_late: Literal["approve", "deny"] = _asks("approve", "What does a validation count as that is late?")
    validation_method: Literal["POST", "GET"] = _asks("POST", "With which method is a validation called?")
    validation_body: Literal["none", "order"] = _asks("none", "What body has a validation?")
    validation_messages: bool = _asks(False, "Are messages of validations handed on, besides their codes?")
    validate_refusal: Literal["array", "object"] = _asks("array", "Is a refusal [...] or {errors: [...]}?")
    validate_success: Literal["empty", "array"] = _asks("empty", "Has a 200 of validate a body?")
    # --- hooks
    hook_seconds: float = _asks(10.0, "How long does Norce wait for a hook?")
    hook_order: Literal["part", "target", "registered", "random"] = _asks(
        "part", "In which order are hooks called: by watched part, by target, as registered, or any?"
    )
    hook_sees: Literal["proposed", "current"] = _asks(
        "proposed", "Is a hook sent the order with or without the change?"
    )
    hook_scope: Literal["watched", "patched"] = _asks(
        "watched", "Is scope only what is watched, or what may be patched?"
    )
    hook_failure_blocks: bool = _asks(True, "Does a time-out, or an error other than 400, block the change?")
    hook_refusal_passed_on: bool = _asks(True, "Does the caller get the body of a hook's 400?")
    hook_on_reference: bool = _asks(True, "Can /reference be watched?")
    hook_on_attributes: bool = _asks(False, "Can /attributes be watched?")
    hook_sees_own_patch: bool = _asks(True, "Does a patch that a hook returns call that same hook?")
    adapter_id_skips_hooks: bool = _asks(True, "Does x-adapterid leave out that adapter's hooks?")
    patch_operations: Literal["all", "basic"] = _asks("all", "All of RFC 6902, or only add, replace and remove?")
    patch_array_positions: bool = _asks(True, "Can a patch name a position in an array?")
    patch_outside_target: Literal["drop", "refuse", "apply"] = _asks("drop", "What of a patch outside the target?")
    patch_totals: bool = _asks(False, "Is the order's total computed anew after a patch?")
    # --- notifications
    notification_seconds: float = _asks(10.0, "How long does Norce wait for the answer to a notification?")
    notification_retries: int = _asks(0, "How often is a failed notification tried again?")
    notification_retry_seconds: float = _asks(5.0, "How long after is it tried again?")
    notification_delivered: Literal["2xx", "200-202-204", "200"] = _asks(
        "200-202-204", "Which answers count as delivered?"
    )
    notification_body: Literal["order", "envelope"] = _asks("order", "The order alone, or {notification, order}?")
    notification_delay_unit_seconds: float = _asks(1.0, "What is the unit of delay?")
    notification_older_form: bool = _asks(
        False, "Can one be registered as {url, method, headers, scope: {state: [...]}} too?"
    )
    notification_reference_unique: bool = _asks(False, "Is a second one with the same reference on an order refused?")
    notification_on_creation: bool = _asks(False, "Is the creation of an order a change of all its parts?")
    adapter_id_skips_notifications: bool = _asks(False, "Does x-adapterid silence that adapter's notifications too?")
    equal_write_triggers: bool = _asks(False, "Is a write of an equal value a change?")
    events_order: Literal["newest", "oldest"] = _asks("newest", "Which event comes first in the list?")
    events_kept_seconds: float = _asks(0.0, "How long is an event kept? 0: for ever.")
    events_attempts_shown: bool = _asks(True, "Does an event record hold its attempts?")
    # --- callbacks of all kinds
    callback_authorization: str = _asks("", "What Authorization do callbacks carry? Empty: none.")
    callback_merchant_and_channel: bool = _asks(True, "Are x-merchant and x-channel sent?")
    callback_redirects: bool = _asks(False, "Are redirects followed?")
    callback_connections_kept: bool = _asks(True, "Are connections used again?")
    placeholders: bool = _asks(True, "Are placeholders in registered URLs replaced?")
    version_left_out: Literal["v0", "v1"] = _asks("v0", "Which order body is sent where no version was asked for?")
    static_hooks_and_validations: bool = _asks(False, "Does configuration add hooks and validations to new orders?")
    # --- orders
    transitions_enforced: bool = _asks(True, "Are other moves of the state than the documented ones refused?")
    parts_locked: bool = _asks(True, "Are changes refused of what is locked in the order's state?")
    deleted: Literal["gone", "removed"] = _asks("gone", "Is a deleted order gone, or readable in the state removed?")
    created_body: Literal["object", "string"] = _asks("object", "Is a created order answered as {id} or as a string?")
    etags: bool = _asks(False, "Has a read an ETag, and is a change with another in If-Match a 412?")
    cart_reference_unique: bool = _asks(False, "Is a second order with the same cart.reference a conflict?")
    id_characters: Literal[24, 61] = _asks(24, "How many random characters has an id? 61 makes the longest expected.")
    order_id_underscore: bool = _asks(False, "Do ids have an underscore, as in the samples?")
    largest_order_bytes: int = _asks(2_000_000, "How large may the body of a request be?")
    enums: Literal["lower", "capital"] = _asks("lower", "Person or person, Intent or intent?")
    channels_unknown: bool = _asks(False, "Is a channel without configuration unknown?")
    v0_served: bool = _asks(True, "Is v0 of the order service still there?")
    v1_problems: bool = _asks(False, "Are errors of v1 RFC 7807 problems?")
    token_merchant: str = _asks("", "Which merchant alone is the token for? Empty: every one.")
    requests_per_second: int = _asks(0, "How many requests are taken before a 429? 0: any number.")
    state_status: Literal[200, 202] = _asks(200, "What does v1 answer to a change of the state?")
    basket_created_status: Literal[200, 201] = _asks(201, "What does the platform adapter answer to a creation?")
    # --- faults
    notifications_lost: float = _asks(0.0, "Which share of notifications never leaves?")
    notifications_doubled: float = _asks(0.0, "Which share of notifications is sent twice?")
    notifications_reordered: float = _asks(0.0, "Which share of notifications is held back?")
    held_back_seconds: float = _asks(1.0, "For how long?")
    answers_lost: float = _asks(0.0, "Which share of requests is carried out, and the connection broken then?")
    answers_slow: float = _asks(0.0, "Which share of requests is answered late?")
    slow_seconds: float = _asks(1.0, "How late?")
    connections_broken: float = _asks(0.0, "Which share of requests breaks before it is carried out?")
    server_errors: float = _asks(0.0, "Which share of requests is answered 500?")
    clock_skew_seconds: float = _asks(0.0, "How far ahead is Norce's clock?")

    def with_values(self, given: Mapping[str, Any]) -> "Switches":
        """These switches with others thrown, from values or their text. Raises `SwitchInvalid`."""
        known = questions()
        thrown = {}
        for name, value in given.items():
            if name not in known:
                raise SwitchInvalid(f"there is no switch {name}; there are: {', '.join(known)}")
            try:
                thrown[name] = msgspec.convert({name: value}, Switches, strict=False)
            except msgspec.ValidationError as error:
                raise SwitchInvalid(f"{name}: {error}") from error
        return replace(self, **{name: getattr(each, name) for name, each in thrown.items()})


def questions() -> dict[str, tuple[str, Any]]:
    """Every switch: its question and its default."""
    return {each.name: (each.metadata["question"], each.default) for each in fields(Switches)}
