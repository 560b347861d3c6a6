"""Switches that answer open questions about Norce, and that inject faults.

Every default is what is documented or, if nothing is, what an adapter should assume. No default is a promise by Norce.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

import msgspec

T = TypeVar("T")


class SwitchInvalid(Exception):
    """A switch that does not exist, or a value that it does not take."""


def _switch(default: T, question: str) -> T:
    return field(default=default, metadata={"question": question})


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """The state of all switches. A share is between 0 and 1."""

    # --- behaviour
    validation_seconds: float = _switch(3.0, "How long does Norce wait for a validation?")
    validation_messages: bool = _switch(False, "Does `validate` return the messages of validations with their codes?")
    hook_seconds: float = _switch(10.0, "How long does Norce wait for a hook?")
    notification_seconds: float = _switch(10.0, "How long does Norce wait for the answer to a notification?")
    notification_retries: int = _switch(0, "How often does Norce retry a failed notification?")
    notification_retry_seconds: float = _switch(5.0, "How long does Norce wait before such a retry?")
    notification_body: Literal["order", "envelope"] = _switch("order", "Is the body the order, or an envelope with it?")
    callback_authorization: str = _switch("", "Which `Authorization` header do callbacks carry? Empty: none.")
    transitions_enforced: bool = _switch(True, "Does Norce refuse state transitions that are not documented?")
    # --- faults
    notifications_lost: float = _switch(0.0, "Which share of notifications is never sent?")
    notifications_doubled: float = _switch(0.0, "Which share of notifications is sent twice?")
    notifications_reordered: float = _switch(0.0, "Which share of notifications is held back for a second?")
    answers_lost: float = _switch(0.0, "Which share of requests is carried out, but gets no answer?")
    connections_broken: float = _switch(0.0, "Which share of requests is neither carried out nor answered?")
    server_errors: float = _switch(0.0, "Which share of requests is answered 500?")
    answer_seconds: float = _switch(0.0, "How long does Norce take to answer a request?")
    clock_skew_seconds: float = _switch(0.0, "How far is Norce's clock ahead?")

    def with_values(self, given: Mapping[str, Any]) -> "Switches":
        """Return these switches with new values, which may be text.

        Raises:
            SwitchInvalid: There is no such switch, or it does not take the value.
        """
        known = questions()
        if unknown := given.keys() - known.keys():
            raise SwitchInvalid(f"there is no switch {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
        try:
            return msgspec.convert({**asdict(self), **given}, Switches, strict=False)
        except msgspec.ValidationError as error:
            raise SwitchInvalid(str(error)) from error


def questions() -> dict[str, tuple[str, Any]]:
    """Return the question and the default of every switch, by its name."""
    return {each.name: (each.metadata["question"], each.default) for each in fields(Switches)}
