"""The outcome that an error of a handler means. Pure.

It depends on what was sent: before any write of the attempt there is no doubt.
"""

from typing import get_args

from adapter.ledger.settlement import Broken
from adapter.plugin import Misconfigured, Reject, Retry, Unknown
from adapter.routing.runner import leaves

FailedAttempt = Unknown | Broken | Misconfigured | Reject | Retry
# The gravest first: doubt outlasts everything, and no order dies because of a configuration that a person can mend.
GRAVITY = get_args(FailedAttempt)


def is_bug(error: BaseException) -> bool:
    """Return whether an error is neither an outcome of `adapter.plugin` nor a time limit."""
    return not isinstance(error, FailedAttempt | TimeoutError)


def outcome_of(error: BaseException, *, sent: bool, succeeded: bool, unanswered: bool = False) -> FailedAttempt:
    """Return the outcome of an attempt whose handler raised `error`; of a group, the gravest.

    Args:
        error: Raised by the handler.
        sent: A write may have gone out in this attempt.
        succeeded: A write of this attempt was answered 2xx. A retry would then do it twice.
        unanswered: A write of this attempt may have had an effect that no answer tells, such as one that a `TaskGroup`
            cancelled because another request was refused.
    """
    outcomes = [_of_leaf(each, sent=sent, succeeded=succeeded, unanswered=unanswered) for each in leaves(error)]
    return min(outcomes, key=_gravity)


def _of_leaf(error: BaseException, *, sent: bool, succeeded: bool, unanswered: bool) -> FailedAttempt:
    if (isinstance(error, Retry | Misconfigured) and succeeded) or (
        isinstance(error, Retry | Misconfigured | Reject) and unanswered
    ):
        unknown = Unknown(error.code, error.message, after=error.after if isinstance(error, Retry) else None)
        unknown.host, unknown.status, unknown.explanation = error.host, error.status, error.explanation
        return unknown
    if isinstance(error, TimeoutError):
        return (Unknown if sent else Retry)("timed-out", "a time limit of the handler's own passed")
    if is_bug(error):
        return (Unknown if sent else Broken)("handler-failed", f"the handler raised {type(error).__name__}")
    assert isinstance(error, FailedAttempt)
    return error


def _gravity(outcome: FailedAttempt) -> tuple[int, float]:
    kind = next(place for place, kind in enumerate(GRAVITY) if isinstance(outcome, kind))
    after = outcome.after if isinstance(outcome, Retry | Unknown) else None
    return kind, -after.total_seconds() if after else 0.0
